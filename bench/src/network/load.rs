//! What is measured of a way.

use std::{
    io::{self, ErrorKind},
    net::UdpSocket,
    process::{Child, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use portolan_bench::stats::Series;

use crate::{nodes::End, ways::Way};

/// Bytes of a small datagram.
const SMALL: usize = 64;
/// Datagrams that are sent at a time.
const BURST: u32 = 32;
/// How long a datagram is waited for.
const PATIENCE: Duration = Duration::from_millis(200);
const PORT: u16 = 5202;

/// `iperf3 -s` at one end, until it is dropped.
pub struct Server(Child);

impl Server {
    pub fn start(at: &End) -> Result<Self> {
        let server = at.command("iperf3").arg("-s").stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Ok(Self(server.context("iperf3")?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // nsenter has become the server itself (it forks only for other kinds of namespaces).
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Gbit/s that arrive by so many TCP streams. Cubic, because BBR measures its own pacing on such a wire.
pub fn tcp(way: &Way, streams: u32, time: Duration) -> Result<f64> {
    let [streams, seconds] = [u64::from(streams), time.as_secs().max(1)].map(|number| number.to_string());
    let mut client = way.from.command("iperf3");
    client.args(["-c", &way.to.address.to_string(), "-C", "cubic", "-P", &streams, "-t", &seconds, "-J"]);
    let output = client.output().context("iperf3")?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).context("what iperf3 says")?;
    let bits = report.pointer("/end/sum_received/bits_per_second").and_then(serde_json::Value::as_f64);
    Ok(bits.with_context(|| format!("{}: iperf3 says {}", way.name, report["error"]))? / 1e9)
}

/// Datagrams of 64 bytes that arrive in a second, in thousands, when one thread sends as fast as it can.
pub fn small(way: &Way, time: Duration) -> Result<f64> {
    let (sender, receiver) = sockets(way)?;
    let done = AtomicBool::new(false);
    let (arrived, took) = thread::scope(|scope| {
        let counted = scope.spawn(|| count(&receiver, &done));
        let begun = Instant::now();
        while begun.elapsed() < time {
            for _ in 0..64 {
                // Queues that are full are part of what is measured.
                let _ = sender.send(&[7; SMALL]);
            }
        }
        let took = begun.elapsed();
        done.store(true, Ordering::Relaxed);
        (counted.join(), took)
    });
    let arrived = arrived.map_err(|_| anyhow::anyhow!("the counting thread panicked"))??;
    ensure!(arrived > 0, "{}: no datagram arrives", way.name);
    Ok(arrived as f64 / took.as_secs_f64() / 1000.0)
}

/// Datagrams of 64 bytes that arrive in a second, in thousands, when so many are sent at a time and the next ones once these are there. So none of
/// those who work on them keeps the others from the processor, if there is only one.
pub fn bursts(way: &Way, time: Duration) -> Result<f64> {
    let (sender, receiver) = sockets(way)?;
    let mut buffer = [0; SMALL];
    let mut arrived = 0_u64;
    let begun = Instant::now();
    while begun.elapsed() < time {
        for _ in 0..BURST {
            sender.send(&[7; SMALL])?;
        }
        for _ in 0..BURST {
            match receiver.recv(&mut buffer) {
                Ok(_) => arrived += 1,
                // It is lost.
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e.into()),
            }
        }
    }
    ensure!(arrived > 0, "{}: no datagram arrives", way.name);
    Ok(arrived as f64 / begun.elapsed().as_secs_f64() / 1000.0)
}

fn count(receiver: &UdpSocket, done: &AtomicBool) -> io::Result<u64> {
    let mut buffer = [0; SMALL];
    let mut arrived = 0;
    while !done.load(Ordering::Relaxed) {
        match receiver.recv(&mut buffer) {
            Ok(_) => arrived += 1,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(arrived)
}

/// Of requests of 64 bytes and answers as long, one at a time: how many there are in a second, in thousands, and how long they take
/// in µs.
pub fn requests(way: &Way, time: Duration) -> Result<(f64, Series)> {
    let (client, server) = sockets(way)?;
    let done = AtomicBool::new(false);
    let (took, served) = thread::scope(|scope| {
        let served = scope.spawn(|| echo(&server, &done));
        let took = ask(&client, time);
        done.store(true, Ordering::Relaxed);
        (took, served.join())
    });
    served.map_err(|_| anyhow::anyhow!("the echoing thread panicked"))??;
    let took = took?;
    ensure!(!took.is_empty(), "{}: no request is answered", way.name);
    let rate = 1000.0 / (took.iter().sum::<f64>() / took.len() as f64);
    Ok((rate, Series::new(took)))
}

fn echo(server: &UdpSocket, done: &AtomicBool) -> io::Result<()> {
    let mut buffer = [0; SMALL];
    while !done.load(Ordering::Relaxed) {
        match server.recv_from(&mut buffer) {
            Ok((length, from)) => drop(server.send_to(&buffer[..length], from)?),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// How long each request took, in µs; those that were lost are left out.
fn ask(client: &UdpSocket, time: Duration) -> io::Result<Vec<f64>> {
    let mut took = Vec::new();
    let mut buffer = [0; SMALL];
    let begun = Instant::now();
    while begun.elapsed() < time {
        let sent = Instant::now();
        client.send(&[7; SMALL])?;
        match client.recv(&mut buffer) {
            Ok(_) => took.push(sent.elapsed().as_secs_f64() * 1e6),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(took)
}

/// A socket at each end, that of the first connected to the second.
fn sockets(way: &Way) -> Result<(UdpSocket, UdpSocket)> {
    let open = |end: &End, port| {
        let address = end.address;
        end.inside(move || {
            let socket = UdpSocket::bind((address, port))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket)
        })
    };
    let to = open(&way.to, PORT)?;
    let from = open(&way.from, 0)?;
    from.connect((way.to.address, PORT))?;
    Ok((from, to))
}
