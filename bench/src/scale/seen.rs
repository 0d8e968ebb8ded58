//! What can be seen of a network on its node: forwarding entries, and answers to names.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader},
    net::{IpAddr, Ipv4Addr, UdpSocket},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use portolan_net::{BRIDGE_ADDRESS, Namespace};
use portolan_tests::node::{Node, Pod};

use crate::world::VNI;

/// How long is waited for an answer before it is asked again.
const ANSWER: Duration = Duration::from_millis(100);
/// How long is waited for what is measured.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// Waits until something is so, which is looked at every so often.
pub fn wait(what: &str, every: Duration, mut is_so: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let begun = Instant::now();
    while !is_so()? {
        ensure!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(every);
    }
    Ok(begun.elapsed())
}

/// Whether a name has an address, to a pod that asks its node.
pub fn is_answered(node: &Node, asking: &Pod, name: &str) -> Result<bool> {
    let mut question = b"\x12\x67\x01\0\0\x01\0\0\0\0\0\0".to_vec();
    for label in name.split('.') {
        question.push(u8::try_from(label.len())?);
        question.extend(label.as_bytes());
    }
    question.extend(b"\0\0\x01\0\x01");
    let answer = Namespace::open(node.root(), &asking.netns)?.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(ANSWER))?;
        socket.send_to(&question, (BRIDGE_ADDRESS, 53))?;
        let mut answer = [0; 512];
        Ok(socket.recv(&mut answer).map_or_else(|_| Vec::new(), |length| answer[..length].to_vec()))
    })?;
    // The number of answers (RFC 1035, section 4.1.1).
    Ok(matches!(answer.get(6..8), Some(count) if count != [0, 0]))
}

fn namespace(node: &Node) -> String {
    format!("--net={}", node.root().join(format!("run/netns/portolan-{VNI}")).display())
}

/// Whether the bridge knows an address' MAC.
pub fn is_neighbour(node: &Node, address: Ipv4Addr) -> Result<bool> {
    let address = address.to_string();
    let mut ip = Command::new("nsenter");
    ip.arg(namespace(node)).args(["ip", "neighbour", "get", &address, "dev", "br0"]);
    Ok(ip.stdout(Stdio::null()).stderr(Stdio::null()).status()?.success())
}

/// How many forwarding entries lead to other nodes: MACs through tunnels, broadcasts to nodes, MACs behind the tunnels.
pub fn entries(node: &Node) -> Result<[usize; 3]> {
    let output = Command::new("nsenter").arg(namespace(node)).args(["bridge", "fdb", "show", "dev", "vx0"]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let mut counts = [0; 3];
    for line in text.lines() {
        match (line.contains(" dst "), line.starts_with("00:00:00:00:00:00")) {
            (true, false) => counts[0] += 1,
            (true, true) => counts[1] += 1,
            (false, _) if line.contains("master br0") && line.contains("static") => counts[2] += 1,
            _ => {}
        }
    }
    Ok(counts)
}

/// Hears of each neighbour that the bridge gets, as the last of a new endpoint's entries.
pub struct Listener {
    monitor: Child,
    heard: Receiver<(IpAddr, Instant)>,
    seen: HashMap<IpAddr, Instant>,
}

impl Listener {
    pub fn start(node: &Node) -> Result<Self> {
        let mut monitor = Command::new("nsenter");
        monitor.arg(namespace(node)).args(["ip", "monitor", "neigh", "dev", "br0"]).stdout(Stdio::piped());
        let mut monitor = monitor.spawn().context("ip monitor")?;
        let lines = BufReader::new(monitor.stdout.take().context("ip monitor's output")?).lines();
        let (tell, heard) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok).filter(|line| !line.starts_with("Deleted")) {
                if let Some(Ok(address)) = line.split(' ').next().map(str::parse) {
                    let _ = tell.send((address, Instant::now()));
                }
            }
        });
        // It has to have begun to listen.
        std::thread::sleep(Duration::from_millis(500));
        Ok(Self { monitor, heard, seen: HashMap::new() })
    }

    /// When an address was heard of; waits for it.
    pub fn when(&mut self, address: Ipv4Addr) -> Result<Instant> {
        let address = IpAddr::from(address);
        loop {
            if let Some(at) = self.seen.remove(&address) {
                return Ok(at);
            }
            let (heard, at) = self.heard.recv_timeout(PATIENCE).map_err(|_| anyhow!("no entry for {address}"))?;
            self.seen.insert(heard, at);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

/// Whether a network's namespace is there.
pub fn is_there(node: &Node) -> bool {
    node.on_host(Path::new(&format!("/run/netns/portolan-{VNI}"))).exists()
}
