//! The server as a pod sees it, over loopback: its source address stands for the pod's.

mod everyone;
mod explanation;
mod following;
mod forwarding;
mod full;
mod merging;
mod metrics;
mod names;
mod packets;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record as Answer, RecordType};
use tokio::net::{TcpListener, TcpSocket, UdpSocket};
use tokio::time::timeout;

use crate::forward::{read_message, write_message};
use crate::{Host, Member, Metrics, NetworkZone, Port, Upstream, Zone, ZoneHandle, run, run_for_everyone};

/// A pod on networks a and b, asking on a.
pub(crate) const POD_ON_BOTH: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// A pod on network a only.
pub(crate) const POD_ON_A: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
/// What the stub upstream says of every name.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 99);

fn host(namespace: &str, pod: &str, owner: Option<&str>, last: u8) -> Host {
    Host {
        namespace: namespace.to_owned(),
        pod: pod.to_owned(),
        owner: owner.map(str::to_owned),
        node: "node-1".to_owned(),
        addresses: vec![Ipv4Addr::new(10, 0, 0, last).into()],
        ready: true,
        ..Host::default()
    }
}

pub(crate) fn zone() -> Zone {
    let member = |address: Ipv4Addr, networks: &[&str]| Member {
        address: address.into(),
        namespace: "shop".to_owned(),
        networks: networks.iter().map(|n| (*n).to_owned()).collect(),
    };
    let mut hosts: Vec<_> = (0..3).map(|n| host("shop", &format!("db-{n}"), Some("db"), n + 1)).collect();
    hosts.push(host("prod", "db", None, 4));
    hosts.push(host("prod", "db.shop", None, 5));
    hosts.extend([host("prod", "cache", None, 6), host("aaa", "cache", None, 7)]);
    hosts.extend((100..220).map(|last| host("shop", &format!("many-{last}"), Some("many"), last)));
    let mut web = host("shop", "web-0", Some("web"), 8);
    web.addresses.push("fd00::8".parse().unwrap());
    web.aliases = vec!["www".to_owned()];
    web.ports = vec![Port { name: "http".to_owned(), protocol: "tcp".to_owned(), number: 8080 }];
    let starting = Host { ready: false, ..host("shop", "web-1", Some("web"), 9) };
    let early = Host { ready: false, publish_not_ready: true, ..host("shop", "early", None, 10) };
    hosts.extend([web, starting, early]);
    Zone::new(vec![
        NetworkZone {
            name: "a".to_owned(),
            node: "node-1".to_owned(),
            subnets: vec!["10.0.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()],
            hosts,
            members: vec![member(POD_ON_BOTH, &["a", "b"]), member(POD_ON_A, &["a"])],
        },
        NetworkZone {
            name: "b".to_owned(),
            node: "node-1".to_owned(),
            subnets: vec!["10.1.0.0/24".parse().unwrap()],
            hosts: vec![Host { addresses: vec!["10.1.0.7".parse().unwrap()], ..host("shop", "db", None, 7) }],
            members: vec![],
        },
    ])
    .within(Some("portolan.internal".parse().unwrap()))
}

fn question(name: &str, type_: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(format!("{name}.")).unwrap(), type_));
    message
}

fn addresses(message: &Message) -> Vec<Ipv4Addr> {
    let of = |answer: &Answer| match &answer.data {
        RData::A(address) => Some(address.0),
        _ => None,
    };
    message.answers.iter().filter_map(of).collect()
}

fn texts(message: &Message) -> Vec<String> {
    message.answers.iter().map(|record| record.data.to_string()).collect()
}

/// A server of network a, with a stub upstream unless told that it is dead.
struct Fixture {
    address: SocketAddr,
    zone: ZoneHandle,
    metrics: Metrics,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One address for UDP and TCP.
pub(crate) fn sockets() -> (std::net::UdpSocket, std::net::TcpListener) {
    loop {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        if let Ok(udp) = std::net::UdpSocket::bind(tcp.local_addr().unwrap()) {
            return (udp, tcp);
        }
    }
}

async fn start(upstream: Vec<SocketAddr>) -> Fixture {
    let (udp, tcp) = sockets();
    let address = udp.local_addr().unwrap();
    let zone = ZoneHandle::new(zone());
    let (upstream, metrics) = (Upstream { servers: upstream }, Metrics::default());
    let server = run(udp, tcp, "a".to_owned(), zone.clone(), upstream, metrics.clone(), std::future::pending());
    Fixture { address, zone, metrics, task: tokio::spawn(async move { server.await.unwrap() }) }
}

/// A server for everyone.
async fn start_for_everyone() -> Fixture {
    let (udp, tcp) = sockets();
    let address = udp.local_addr().unwrap();
    let (zone, metrics) = (ZoneHandle::new(zone()), Metrics::default());
    let server = run_for_everyone(udp, tcp, zone.clone(), metrics.clone(), std::future::pending());
    Fixture { address, zone, metrics, task: tokio::spawn(async move { server.await.unwrap() }) }
}

/// Answers everything with [`ELSEWHERE`]; `large.*` is truncated by UDP. Sends a forged reply first.
async fn upstream() -> SocketAddr {
    let (udp, tcp) = sockets();
    let address = udp.local_addr().unwrap();
    udp.set_nonblocking(true).unwrap();
    tcp.set_nonblocking(true).unwrap();
    let (udp, tcp) = (UdpSocket::from_std(udp).unwrap(), TcpListener::from_std(tcp).unwrap());
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, peer) = udp.recv_from(&mut buffer).await.unwrap();
            let mut answer = stub_answer(&buffer[..length]);
            let mut forged = answer.clone();
            forged.metadata.id = forged.metadata.id.wrapping_add(1);
            forged.answers = vec![Answer::from_rdata(Name::root(), 9, RData::A(A(Ipv4Addr::new(6, 6, 6, 6))))];
            udp.send_to(&forged.to_vec().unwrap(), peer).await.unwrap();
            if answer.queries[0].name.to_ascii().starts_with("large.") {
                answer.answers.clear();
                answer.metadata.truncation = true;
            }
            udp.send_to(&answer.to_vec().unwrap(), peer).await.unwrap();
        }
    });
    tokio::spawn(async move {
        loop {
            answer_by_tcp(&tcp).await;
        }
    });
    address
}

/// Answers one connection's first query.
async fn answer_by_tcp(listener: &TcpListener) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let query = read_message(&mut stream).await.unwrap();
    write_message(&mut stream, &stub_answer(&query).to_vec().unwrap()).await.unwrap();
}

fn stub_answer(packet: &[u8]) -> Message {
    let query = Message::from_vec(packet).unwrap();
    let mut answer = Message::response(query.metadata.id, OpCode::Query);
    answer.queries = query.queries.clone();
    let name = query.queries[0].name.clone();
    answer.answers = vec![Answer::from_rdata(name, 30, RData::A(A(ELSEWHERE)))];
    answer
}

impl Fixture {
    async fn raw(&self, from: Ipv4Addr, packet: &[u8]) -> Option<Vec<u8>> {
        let socket = UdpSocket::bind((from, 0)).await.unwrap();
        socket.send_to(packet, self.address).await.unwrap();
        let mut buffer = vec![0; 65535];
        let (length, peer) = timeout(Duration::from_secs(8), socket.recv_from(&mut buffer)).await.ok()?.unwrap();
        assert_eq!(peer, self.address);
        buffer.truncate(length);
        Some(buffer)
    }

    async fn ask(&self, from: Ipv4Addr, name: &str, type_: RecordType) -> Message {
        let answer = self.raw(from, &question(name, type_).to_vec().unwrap()).await.expect("an answer");
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!(answer.metadata.id, 4711);
        assert_eq!(answer.metadata.message_type, MessageType::Response);
        answer
    }

    async fn ask_by_tcp(&self, from: Ipv4Addr, name: &str) -> Message {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        let mut stream = socket.connect(self.address).await.unwrap();
        write_message(&mut stream, &question(name, RecordType::A).to_vec().unwrap()).await.unwrap();
        Message::from_vec(&read_message(&mut stream).await.unwrap()).unwrap()
    }
}

/// An upstream that a test answers for itself.
struct Manual(UdpSocket, TcpListener);

impl Manual {
    fn new() -> (Self, SocketAddr) {
        let (udp, tcp) = sockets();
        let address = udp.local_addr().unwrap();
        udp.set_nonblocking(true).unwrap();
        tcp.set_nonblocking(true).unwrap();
        (Self(UdpSocket::from_std(udp).unwrap(), TcpListener::from_std(tcp).unwrap()), address)
    }

    /// Answers one query by UDP; returns it.
    async fn answer(&self, change: impl Fn(&mut Message)) -> Message {
        let mut buffer = [0; 4096];
        let (length, peer) = self.0.recv_from(&mut buffer).await.unwrap();
        let mut answer = stub_answer(&buffer[..length]);
        change(&mut answer);
        self.0.send_to(&answer.to_vec().unwrap(), peer).await.unwrap();
        Message::from_vec(&buffer[..length]).unwrap()
    }

    /// Answers one query by TCP.
    async fn answer_by_tcp(&self) {
        answer_by_tcp(&self.1).await;
    }
}
