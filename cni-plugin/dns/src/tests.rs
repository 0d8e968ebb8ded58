//! The server as a pod sees it, over loopback: its source address stands for the pod's.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record as Answer, RecordType};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, UdpSocket};
use tokio::time::timeout;

use crate::answer::{Decision, Transport, decide};
use crate::{Member, NetworkZone, Record, Upstream, Zone, ZoneHandle, run};

/// A pod on networks a and b, asking on a.
const POD_ON_BOTH: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// A pod on network a only.
const POD_ON_A: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
/// What the stub upstream says of every name.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 99);

fn record(name: &str, last: u8) -> Record {
    Record { name: name.to_owned(), address: Ipv4Addr::new(10, 0, 0, last) }
}

fn zone() -> Zone {
    let member =
        |address, networks: &[&str]| Member { address, networks: networks.iter().map(|n| (*n).to_owned()).collect() };
    let mut records = vec![record("db-0.a", 1), record("db.a", 1), record("db.a", 2), record("db.a", 3)];
    records.extend([record("db.prod.a", 4), record("a", 5)]);
    records.extend((0..120).map(|last| record("many.a", last)));
    Zone::new(vec![
        NetworkZone {
            name: "a".to_owned(),
            records,
            members: vec![member(POD_ON_BOTH, &["a", "b"]), member(POD_ON_A, &["a"])],
        },
        NetworkZone { name: "b".to_owned(), records: vec![record("db.b", 7)], members: vec![] },
    ])
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

/// A server of network a, with a stub upstream unless told that it is dead.
struct Fixture {
    address: SocketAddr,
    zone: ZoneHandle,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One address for UDP and TCP.
fn sockets() -> (std::net::UdpSocket, std::net::TcpListener) {
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
    let server = run(udp, tcp, "a".to_owned(), zone.clone(), Upstream { servers: upstream }, std::future::pending());
    Fixture { address, zone, task: tokio::spawn(async move { server.await.unwrap() }) }
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
            let (mut stream, _) = tcp.accept().await.unwrap();
            let mut query = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut query).await.unwrap();
            let answer = stub_answer(&query).to_vec().unwrap();
            stream.write_u16(answer.len().try_into().unwrap()).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        }
    });
    address
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
        let query = question(name, RecordType::A).to_vec().unwrap();
        stream.write_u16(query.len().try_into().unwrap()).await.unwrap();
        stream.write_all(&query).await.unwrap();
        let mut answer = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut answer).await.unwrap();
        Message::from_vec(&answer).unwrap()
    }
}

#[tokio::test]
async fn a_name_resolves_to_its_address() {
    let server = start(vec![]).await;
    let answer = server.ask(POD_ON_A, "db-0.a", RecordType::A).await;
    assert_eq!(addresses(&answer), [Ipv4Addr::new(10, 0, 0, 1)]);
    assert!(answer.metadata.authoritative);
    assert_eq!(answer.answers[0].ttl, 1);
    assert_eq!(addresses(&server.ask(POD_ON_A, "DB-0.A", RecordType::A).await), [Ipv4Addr::new(10, 0, 0, 1)]);
    assert_eq!(addresses(&server.ask(POD_ON_A, "db.prod.a", RecordType::A).await), [Ipv4Addr::new(10, 0, 0, 4)]);
}

#[tokio::test]
async fn all_addresses_come_in_changing_order() {
    let server = start(vec![]).await;
    let mut first = HashSet::new();
    for _ in 0..60 {
        let found = addresses(&server.ask(POD_ON_A, "db.a", RecordType::A).await);
        assert_eq!(found.iter().collect::<HashSet<_>>().len(), 3);
        first.insert(found[0]);
    }
    assert_eq!(first.len(), 3, "each address comes first now and then");
}

#[tokio::test]
async fn another_type_of_a_name_is_no_data() {
    let server = start(vec![]).await;
    for name in ["db.a", "prod.a"] {
        let answer = server.ask(POD_ON_A, name, RecordType::AAAA).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError, "{name}");
        assert!(answer.answers.is_empty());
        assert_eq!(answer.authorities[0].record_type(), RecordType::SOA);
        assert!(answer.authorities[0].ttl <= 5);
    }
}

#[tokio::test]
async fn an_unknown_name_of_an_own_network_does_not_exist() {
    let server = start(vec![upstream().await]).await;
    let answer = server.ask(POD_ON_A, "nobody.a", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(answer.authorities[0].record_type(), RecordType::SOA);
}

#[tokio::test]
async fn other_names_are_forwarded() {
    let server = start(vec![upstream().await]).await;
    for name in ["db.a.default.svc.cluster.local", "example.org", "a.example.org", "xa"] {
        assert_eq!(addresses(&server.ask(POD_ON_A, name, RecordType::A).await), [ELSEWHERE], "{name}");
        assert_eq!(addresses(&server.ask_by_tcp(POD_ON_A, name).await), [ELSEWHERE], "{name} by TCP");
    }
}

#[tokio::test]
async fn a_truncated_reply_is_asked_for_again_by_tcp() {
    let server = start(vec![upstream().await]).await;
    assert_eq!(addresses(&server.ask(POD_ON_A, "large.example.org", RecordType::A).await), [ELSEWHERE]);
}

#[tokio::test]
async fn a_pod_sees_only_its_own_networks() {
    let server = start(vec![upstream().await]).await;
    assert_eq!(addresses(&server.ask(POD_ON_BOTH, "db.b", RecordType::A).await), [Ipv4Addr::new(10, 0, 0, 7)]);
    assert_eq!(addresses(&server.ask(POD_ON_A, "db.b", RecordType::A).await), [ELSEWHERE]);
    let stranger = Ipv4Addr::new(127, 0, 0, 9);
    assert_eq!(addresses(&server.ask(stranger, "db.b", RecordType::A).await), [ELSEWHERE]);
    assert_eq!(addresses(&server.ask(stranger, "db-0.a", RecordType::A).await), [Ipv4Addr::new(10, 0, 0, 1)]);
}

#[tokio::test]
async fn a_dead_upstream_is_passed_over_and_then_a_server_failure() {
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let dead = silent.local_addr().unwrap();
    let server = start(vec![dead]).await;
    let answer = server.ask(POD_ON_A, "example.org", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(addresses(&server.ask(POD_ON_A, "db-0.a", RecordType::A).await).len(), 1, "own names still resolve");
    let server = start(vec![dead, upstream().await]).await;
    assert_eq!(addresses(&server.ask(POD_ON_A, "example.org", RecordType::A).await), [ELSEWHERE]);
}

#[tokio::test]
async fn a_new_zone_counts_at_once() {
    let server = start(vec![]).await;
    server.zone.replace(Zone::default());
    let answer = server.ask(POD_ON_A, "db.a", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn an_answer_fits_the_datagram_and_is_whole_by_tcp() {
    let server = start(vec![]).await;
    let packet = server.raw(POD_ON_A, &question("many.a", RecordType::A).to_vec().unwrap()).await.unwrap();
    assert!(packet.len() <= 512);
    let answer = Message::from_vec(&packet).unwrap();
    assert!(answer.metadata.truncation);
    assert!(answer.answers.len() > 20);

    let mut query = question("many.a", RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    query.edns = Some(edns);
    let packet = server.raw(POD_ON_A, &query.to_vec().unwrap()).await.unwrap();
    assert!(packet.len() > 512 && packet.len() <= 1232);
    assert!(Message::from_vec(&packet).unwrap().edns.is_some());

    let answer = server.ask_by_tcp(POD_ON_A, "many.a").await;
    assert!(!answer.metadata.truncation);
    assert_eq!(answer.answers.len(), 120);
}

#[tokio::test]
async fn garbage_is_refused_and_the_server_goes_on() {
    let server = start(vec![]).await;
    let mut cut = question("db.a", RecordType::A).to_vec().unwrap();
    cut.truncate(15);
    let answer = Message::from_vec(&server.raw(POD_ON_A, &cut).await.unwrap()).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::FormErr);
    let mut update = question("db.a", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    let answer = server.raw(POD_ON_A, &update.to_vec().unwrap()).await.unwrap();
    assert_eq!(Message::from_vec(&answer).unwrap().metadata.response_code, ResponseCode::NotImp);
    let mut version = question("db.a", RecordType::A);
    version.edns = Some(Edns::new());
    version.edns.as_mut().unwrap().set_version(1);
    let answer = server.raw(POD_ON_A, &version.to_vec().unwrap()).await.unwrap();
    // 16 is BADVERS in a reply to a query without signature (RFC 6895, 2.3).
    assert_eq!(u16::from(Message::from_vec(&answer).unwrap().metadata.response_code), 16);

    let socket = UdpSocket::bind((POD_ON_A, 0)).await.unwrap();
    for packet in [&b""[..], b"x", &[0xff; 600], &[0; 11]] {
        socket.send_to(packet, server.address).await.unwrap();
    }
    assert_eq!(addresses(&server.ask(POD_ON_A, "db-0.a", RecordType::A).await).len(), 1);
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_and_make_room_again() {
    let server = start(vec![]).await;
    let mut open = Vec::new();
    for _ in 0..64 {
        open.push(tokio::net::TcpStream::connect(server.address).await.unwrap());
    }
    let mut one_more = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let end = timeout(Duration::from_secs(5), one_more.read(&mut [0; 1])).await.expect("closed at once");
    assert!(matches!(end, Ok(0) | Err(_)));
    open.clear();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(addresses(&server.ask_by_tcp(POD_ON_A, "db-0.a").await).len(), 1);
}

proptest! {
    #[test]
    fn no_packet_panics(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
        let _ = decide(&zone(), "a", POD_ON_A, Transport::Udp, &bytes);
    }

    #[test]
    fn no_damaged_query_panics(at in 0usize..60, value: u8, cut in 0usize..60) {
        let mut query = question("db.prod.a", RecordType::A);
        query.edns = Some(Edns::new());
        let mut bytes = query.to_vec().unwrap();
        if let Some(byte) = bytes.get_mut(at) {
            *byte = value;
        }
        bytes.truncate(bytes.len().saturating_sub(cut / 2));
        if let Decision::Forward(query) = decide(&zone(), "a", POD_ON_A, Transport::Udp, &bytes) {
            let _ = query.is_answered_by(&bytes, 0);
            let _ = query.pass_on(bytes, Transport::Udp);
        }
    }
}
