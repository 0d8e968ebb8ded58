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
use crate::{Host, Member, NetworkZone, Port, Upstream, Zone, ZoneHandle, run};

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
    assert_eq!(addresses(&server.ask(POD_ON_BOTH, "db.b", RecordType::A).await), [Ipv4Addr::new(10, 1, 0, 7)]);
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
}

#[tokio::test]
async fn an_answer_is_kept_and_stands_in_when_the_upstream_is_gone() {
    let (upstream, at) = Manual::new();
    let server = start(vec![at]).await;
    let ask = || server.ask(POD_ON_A, "Kept.example.org", RecordType::A);
    let (first, _) = tokio::join!(ask(), upstream.answer(|answer| answer.answers[0].ttl = 2));
    assert_eq!((addresses(&first), first.answers[0].ttl), (vec![ELSEWHERE], 2));
    drop(upstream);
    let stale = async {
        loop {
            let answer = ask().await;
            assert_eq!(addresses(&answer), [ELSEWHERE]);
            assert_eq!(answer.queries[0].name.to_ascii(), "Kept.example.org.");
            match answer.answers[0].ttl {
                30 => return,
                ttl => assert!(ttl <= 2),
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), stale).await.expect("its lifetime ends");
    let unknown = server.ask(POD_ON_A, "unknown.example.org", RecordType::A).await;
    assert_eq!(unknown.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn the_case_of_a_name_guards_against_forgers_and_comes_back_as_asked() {
    let (upstream, at) = Manual::new();
    let server = start(vec![at]).await;
    let name = "a-rather-long-name-of-many-letters.example.org";
    let (answer, query) = tokio::join!(server.ask(POD_ON_A, name, RecordType::A), upstream.answer(|_| ()));
    assert_eq!(answer.queries[0].name.to_ascii(), format!("{name}."));
    assert_ne!(query.queries[0].name.to_ascii(), format!("{name}."), "1 in 2^37");
    // Who doesn't keep the case isn't believed by UDP, and asked again by TCP.
    let other = format!("other-{name}");
    let by_tcp = async {
        let lower = |answer: &mut Message| {
            answer.queries[0].name = answer.queries[0].name.to_lowercase();
            answer.answers[0].data = RData::A(A(Ipv4Addr::new(6, 6, 6, 6)));
        };
        upstream.answer(lower).await;
        let (mut stream, _) = upstream.1.accept().await.unwrap();
        let mut query = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut query).await.unwrap();
        let answer = stub_answer(&query).to_vec().unwrap();
        stream.write_u16(answer.len().try_into().unwrap()).await.unwrap();
        stream.write_all(&answer).await.unwrap();
    };
    let (answer, ()) = tokio::join!(server.ask(POD_ON_A, &other, RecordType::A), by_tcp);
    assert_eq!(addresses(&answer), [ELSEWHERE]);
}

#[tokio::test]
async fn another_upstream_is_asked_when_one_says_that_it_failed() {
    let (failing, at) = Manual::new();
    let server = start(vec![at, upstream().await]).await;
    let fail = failing.answer(|answer| answer.metadata.response_code = ResponseCode::ServFail);
    let (answer, _) = tokio::join!(server.ask(POD_ON_A, "example.org", RecordType::A), fail);
    assert_eq!(addresses(&answer), [ELSEWHERE]);
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
    let connect = async |from: Ipv4Addr| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        socket.connect(server.address).await.unwrap()
    };
    let mut open = Vec::new();
    for _ in 0..16 {
        open.push(connect(POD_ON_A).await);
    }
    let mut one_more = connect(POD_ON_A).await;
    let end = timeout(Duration::from_secs(5), one_more.read(&mut [0; 1])).await.expect("closed at once");
    assert!(matches!(end, Ok(0) | Err(_)));
    assert_eq!(addresses(&server.ask_by_tcp(POD_ON_BOTH, "db-0.a").await).len(), 1, "others are unharmed");
    open.clear();
    let again = async {
        loop {
            let mut stream = connect(POD_ON_A).await;
            let query = question("db-0.a", RecordType::A).to_vec().unwrap();
            stream.write_u16(query.len().try_into().unwrap()).await.unwrap();
            if stream.write_all(&query).await.is_ok() && stream.read_u16().await.is_ok() {
                return;
            }
        }
    };
    timeout(Duration::from_secs(10), again).await.expect("room again");
}

fn texts(message: &Message) -> Vec<String> {
    message.answers.iter().map(|record| record.data.to_string()).collect()
}

#[tokio::test]
async fn a_name_with_namespace_is_exact_whatever_others_are_called() {
    let server = start(vec![]).await;
    let ask = async |name| addresses(&server.ask(POD_ON_A, name, RecordType::A).await);
    assert_eq!(ask("db.shop.a").await.len(), 3, "not pod db.shop of namespace prod");
    assert_eq!(ask("db.shop.prod.a").await, [Ipv4Addr::new(10, 0, 0, 5)]);
    assert_eq!(ask("db.prod.a").await, [Ipv4Addr::new(10, 0, 0, 4)]);
}

#[tokio::test]
async fn no_namespace_takes_the_short_name_of_another() {
    let server = start(vec![]).await;
    // Pods of shop ask: prod has a db too.
    assert_eq!(addresses(&server.ask(POD_ON_A, "db.a", RecordType::A).await).len(), 3);
    // Nobody in shop, but two others.
    let answer = server.ask(POD_ON_A, "cache.a", RecordType::A).await;
    assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 0));
    assert!(texts(&server.ask(POD_ON_A, "cache.a", RecordType::TXT).await)[0].contains("namespaces prod, aaa"));
    // Whoever is in no namespace has no namesakes.
    assert!(server.ask(Ipv4Addr::new(127, 0, 0, 9), "db.a", RecordType::A).await.answers.is_empty());
    // A name whose pods all fail stays theirs.
    let hosts = vec![Host { ready: false, ..host("prod", "db", None, 1) }, host("aaa", "db", None, 2)];
    let network = NetworkZone { name: "a".to_owned(), hosts, ..NetworkZone::default() };
    server.zone.replace(Zone::new(vec![network]));
    assert!(server.ask(POD_ON_A, "db.a", RecordType::A).await.answers.is_empty());
}

#[tokio::test]
async fn only_ready_pods_are_answered_unless_they_ask_for_it() {
    let server = start(vec![]).await;
    assert_eq!(addresses(&server.ask(POD_ON_A, "web.a", RecordType::A).await), [Ipv4Addr::new(10, 0, 0, 8)]);
    let answer = server.ask(POD_ON_A, "web-1.a", RecordType::A).await;
    assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 0));
    assert_eq!(addresses(&server.ask(POD_ON_A, "early.a", RecordType::A).await), [Ipv4Addr::new(10, 0, 0, 10)]);
    let why = texts(&server.ask(POD_ON_A, "web.a", RecordType::TXT).await);
    assert!(why[0].contains("pod=shop/web-0 node=node-1 address=10.0.0.8,fd00::8 ready=true"), "{why:?}");
    assert!(why[1].contains("pod=shop/web-1") && why[1].contains("ready=false answered=false"), "{why:?}");
}

#[tokio::test]
async fn pods_of_the_same_node_are_preferred_if_they_ask_for_it() {
    let server = start(vec![]).await;
    let here = Host { prefer_same_node: true, ..host("shop", "log-0", Some("log"), 1) };
    let there =
        Host { node: "node-2".to_owned(), ..Host { addresses: vec!["10.0.0.2".parse().unwrap()], ..here.clone() } };
    let other = Host { prefer_same_node: false, ..host("shop", "log-2", Some("log"), 3) };
    let found = async |hosts: &[&Host]| {
        let hosts = hosts.iter().map(|host| (*host).clone()).collect();
        let network = NetworkZone { name: "a".to_owned(), node: "node-1".to_owned(), hosts, ..NetworkZone::default() };
        server.zone.replace(Zone::new(vec![network]));
        addresses(&server.ask(POD_ON_A, "log.a", RecordType::A).await)
    };
    assert_eq!(found(&[&here, &there, &other]).await, [Ipv4Addr::new(10, 0, 0, 1)]);
    let failing = Host { ready: false, ..here.clone() };
    assert_eq!(found(&[&failing, &there, &other]).await.len(), 2, "no Ready one here");
    assert_eq!(found(&[&other, &there]).await.len(), 2, "nobody here asks for it");
}

#[tokio::test]
async fn addresses_of_both_families_aliases_and_services() {
    let server = start(vec![]).await;
    for name in ["web.a", "www.a", "www.shop.a", "web-0.a"] {
        assert_eq!(texts(&server.ask(POD_ON_A, name, RecordType::AAAA).await), ["fd00::8"], "{name}");
    }
    let answer = server.ask(POD_ON_A, "_http._tcp.web.a", RecordType::SRV).await;
    assert_eq!(texts(&answer), ["0 1 8080 web-0.shop.a."]);
    assert_eq!(answer.additionals.len(), 2, "its addresses come along");
    let code = async |name| {
        let answer = server.ask(POD_ON_A, name, RecordType::SRV).await;
        assert!(answer.answers.is_empty() && answer.authorities[0].record_type() == RecordType::SOA, "{name}");
        answer.metadata.response_code
    };
    for name in ["_tcp.web.a", "_http._tcp.web-1.shop.a", "_udp.web.a", "_ftp._tcp.web.a", "_http._udp.web.a", "_tcp.a"]
    {
        let exists = name == "_tcp.web.a";
        assert_eq!(code(name).await, if exists { ResponseCode::NoError } else { ResponseCode::NXDomain }, "{name}");
    }
}

#[tokio::test]
async fn addresses_of_own_networks_have_names() {
    let server = start(vec![upstream().await]).await;
    let six = format!("8.{}0.0.d.f.ip6.arpa", "0.".repeat(27));
    for name in ["8.0.0.10.in-addr.arpa", &six] {
        assert_eq!(texts(&server.ask(POD_ON_A, name, RecordType::PTR).await), ["web-0.shop.a."], "{name}");
    }
    let unused = server.ask(POD_ON_A, "99.0.0.10.in-addr.arpa", RecordType::PTR).await;
    assert_eq!(unused.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(unused.authorities[0].name.to_ascii(), "0.0.10.in-addr.arpa.");
    let address = server.ask(POD_ON_A, "8.0.0.10.in-addr.arpa", RecordType::A).await;
    assert_eq!((address.metadata.response_code, address.answers.len()), (ResponseCode::NoError, 0));
    // Another network's address is its pods' business, and everybody else's the cluster's.
    let other = "7.0.1.10.in-addr.arpa";
    assert_eq!(texts(&server.ask(POD_ON_BOTH, other, RecordType::PTR).await), ["db.shop.b."]);
    assert_eq!(addresses(&server.ask(POD_ON_A, other, RecordType::PTR).await), [ELSEWHERE]);
    assert_eq!(texts(&server.ask(POD_ON_A, "a", RecordType::SOA).await).len(), 1);
}

proptest! {
    #[test]
    fn no_packet_panics(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
        let _ = decide(&zone(), "a", POD_ON_A.into(), Transport::Udp, &bytes);
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
        if let Decision::Forward(query) = decide(&zone(), "a", POD_ON_A.into(), Transport::Udp, &bytes) {
            let _ = query.is_answered_by(&bytes, 0);
            let _ = query.pass_on(bytes, Transport::Udp);
        }
    }
}
