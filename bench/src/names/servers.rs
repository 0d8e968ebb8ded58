//! The two servers, with the same names.

use std::{
    collections::HashMap,
    fmt::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result};
use portolan_dns::{Host, Member, Metrics, NetworkZone, Upstream, Zone, ZoneHandle};

/// Where Portolan's server answers.
pub const OURS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5300);
/// Where CoreDNS answers: the same names, and those that Portolan's server forwards.
pub const COREDNS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5301);
/// Where the limit answers ([`start_echo`]).
pub const ECHO: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5302);
/// Where the limit of forwarding answers ([`start_relay`]).
pub const RELAY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5303);
/// Pods that ask, each from an address of its own: what one of them may ask in a second is limited.
pub const ASKERS: u8 = 8;
const NETWORK: &str = "backend";

/// A name of the network.
pub fn own(number: usize) -> String {
    format!("p{number}.shop.{NETWORK}")
}

/// A name that is forwarded.
pub fn foreign(number: usize) -> String {
    format!("f{number}.example")
}

/// The address of a pod that asks.
pub fn asker(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 1, number)
}

fn address(number: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a20_0000 + u32::try_from(number).unwrap_or_default())
}

/// A network of so many pods, each with one address and one name.
pub fn zone(names: usize) -> NetworkZone {
    let host = |number| Host {
        namespace: "shop".into(),
        pod: format!("p{number}"),
        node: "node1".into(),
        addresses: vec![address(number).into()],
        ready: true,
        ..Host::default()
    };
    let member =
        |number| Member { address: asker(number).into(), namespace: "shop".into(), networks: vec![NETWORK.into()] };
    NetworkZone {
        name: NETWORK.into(),
        node: "node1".into(),
        hosts: (0..names).map(host).collect(),
        members: (0..ASKERS).map(member).collect(),
        ..NetworkZone::default()
    }
}

/// Portolan's server, in this process.
pub struct Ours {
    pub handle: ZoneHandle,
    /// Its threads end with it.
    _runtime: tokio::runtime::Runtime,
}

impl Ours {
    /// As the agent runs it: on tokio's usual threads, and those that it starts itself.
    pub fn start(names: usize) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let handle = ZoneHandle::new(Zone::new(vec![zone(names)]));
        let (udp, tcp) = (UdpSocket::bind(OURS)?, TcpListener::bind(OURS)?);
        let upstream = Upstream { servers: vec![COREDNS] };
        let server = portolan_dns::run(
            udp,
            tcp,
            NETWORK.into(),
            handle.clone(),
            upstream,
            Metrics::default(),
            std::future::pending::<()>(),
        );
        runtime.spawn(server);
        Ok(Self { handle, _runtime: runtime })
    }
}

/// The limit: a thread that looks at nothing and answers each datagram with itself and one address, one system call to take it and one to
/// send it. It ends with the process.
pub fn start_echo() -> Result<()> {
    /// An A record of the question's name (RFC 1035, section 4.1.3).
    const RECORD: [u8; 16] = [0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4, 10, 32, 0, 1];
    let socket = UdpSocket::bind(ECHO)?;
    std::thread::spawn(move || {
        let mut packet = [0; 512];
        loop {
            let Ok((length, peer)) = socket.recv_from(&mut packet[..512 - RECORD.len()]) else { return };
            packet[2] |= 0x80;
            packet[7] = 1;
            packet[length..length + RECORD.len()].copy_from_slice(&RECORD);
            // What can't be sent is missed by whoever asked.
            let _ = socket.send_to(&packet[..length + RECORD.len()], peer);
        }
    });
    Ok(())
}

/// The limit of forwarding: a thread that sends what comes to CoreDNS, and one that sends what CoreDNS says to who asked, by two sockets that
/// are always the same; they look at nothing but the message's id. They end with the process.
pub fn start_relay() -> Result<()> {
    let front = Arc::new(UdpSocket::bind(RELAY)?);
    let back = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?);
    back.connect(COREDNS)?;
    let peers: Arc<Mutex<HashMap<[u8; 2], SocketAddr>>> = Arc::default();
    let there = (Arc::clone(&front), Arc::clone(&back), Arc::clone(&peers));
    std::thread::spawn(move || {
        let (front, back, peers) = there;
        let mut packet = [0; 512];
        while let Ok((length, peer)) = front.recv_from(&mut packet) {
            lock(&peers).insert([packet[0], packet[1]], peer);
            // What can't be sent is missed by whoever asked.
            let _ = back.send(&packet[..length]);
        }
    });
    std::thread::spawn(move || {
        let mut packet = [0; 512];
        while let Ok(length) = back.recv(&mut packet) {
            let peer = lock(&peers).remove(&[packet[0], packet[1]]);
            let _ = peer.map(|peer| front.send_to(&packet[..length], peer));
        }
    });
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// CoreDNS with its plugin `hosts`, until it is dropped.
pub struct CoreDns {
    child: Child,
    _files: tempfile::TempDir,
}

impl CoreDns {
    pub fn start(names: usize, foreigners: usize) -> Result<Self> {
        let program =
            std::env::var_os("COREDNS").context("COREDNS: the program's path is needed (make bench-names gives it)")?;
        let files = tempfile::tempdir()?;
        let mut hosts = String::new();
        for number in 0..names {
            writeln!(hosts, "{} {}", address(number), own(number))?;
        }
        for number in 0..foreigners {
            writeln!(hosts, "{} {}", address(number), foreign(number))?;
        }
        let [hosts_file, config] = ["hosts", "Corefile"].map(|name| files.path().join(name));
        std::fs::write(&hosts_file, hosts)?;
        let text = format!(".:{} {{\n hosts {} {{\n reload 0\n }}\n}}\n", COREDNS.port(), hosts_file.display());
        std::fs::write(&config, text)?;
        let mut command = Command::new(program);
        command.arg("-conf").arg(&config).stdout(Stdio::null());
        Ok(Self { child: command.spawn().context("CoreDNS")?, _files: files })
    }

    /// What it has of memory, in bytes.
    pub fn memory(&self) -> Result<u64> {
        resident(&self.child.id().to_string()).context("CoreDNS has ended")
    }
}

impl Drop for CoreDns {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Memory of a process that is resident, in bytes (`VmRSS` in proc_pid_status(5)).
pub fn resident(process: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}
