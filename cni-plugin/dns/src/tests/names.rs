//! Who has which name, and for whom.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;

use super::{ELSEWHERE, POD_ON_A, POD_ON_BOTH, addresses, host, start, texts, upstream};
use crate::{Host, NetworkZone, Port, Zone};

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
async fn a_pod_sees_only_its_own_networks() {
    let server = start(vec![upstream().await]).await;
    assert_eq!(addresses(&server.ask(POD_ON_BOTH, "db.b", RecordType::A).await), [Ipv4Addr::new(10, 1, 0, 7)]);
    assert_eq!(addresses(&server.ask(POD_ON_A, "db.b", RecordType::A).await), [ELSEWHERE]);
    let stranger = Ipv4Addr::new(127, 0, 0, 9);
    assert_eq!(addresses(&server.ask(stranger, "db.b", RecordType::A).await), [ELSEWHERE]);
    assert_eq!(addresses(&server.ask(stranger, "db-0.a", RecordType::A).await), [Ipv4Addr::new(10, 0, 0, 1)]);
}

#[tokio::test]
async fn a_new_zone_counts_at_once() {
    let server = start(vec![]).await;
    server.zone.replace(Zone::default());
    let answer = server.ask(POD_ON_A, "db.a", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
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
async fn pods_of_silent_nodes_are_answered_only_when_there_is_nobody_else() {
    let server = start(vec![]).await;
    let port = Port { name: "http".to_owned(), protocol: "tcp".to_owned(), number: 80 };
    let gone = |last| Host {
        node_is_silent: true,
        ports: vec![port.clone()],
        ..host("shop", &format!("db-{last}"), Some("db"), last)
    };
    let there = Host { node_is_silent: false, ..gone(3) };
    let failing = Host { ready: false, ..there.clone() };
    let found = async |hosts: &[Host]| {
        let network = NetworkZone { name: "a".to_owned(), hosts: hosts.to_vec(), ..NetworkZone::default() };
        server.zone.replace(Zone::new(vec![network]));
        let services = server.ask(POD_ON_A, "_http._tcp.db.shop.a", RecordType::SRV).await.answers.len();
        (addresses(&server.ask(POD_ON_A, "db.shop.a", RecordType::A).await).len(), services)
    };
    assert_eq!(found(&[gone(1), gone(2), there.clone()]).await, (1, 1));
    assert_eq!(found(&[gone(1), gone(2), failing]).await, (2, 2), "silence alone empties no name");
    assert_eq!(found(&[gone(1)]).await, (1, 1));
    server.zone.replace(Zone::new(vec![NetworkZone {
        name: "a".to_owned(),
        hosts: vec![gone(1), there],
        ..NetworkZone::default()
    }]));
    let why = texts(&server.ask(POD_ON_A, "db.shop.a", RecordType::TXT).await);
    assert!(why.iter().any(|text| text.contains("db-1") && text.contains("doesn't answer")), "{why:?}");
}

#[tokio::test]
async fn addresses_of_both_families_aliases_and_services() {
    let server = start(vec![]).await;
    for name in ["web.a", "www.a", "www.shop.a", "web-0.a"] {
        assert_eq!(texts(&server.ask(POD_ON_A, name, RecordType::AAAA).await), ["fd00::8"], "{name}");
    }
    let answer = server.ask(POD_ON_A, "_http._tcp.web.a", RecordType::SRV).await;
    assert_eq!(texts(&answer), ["0 1 8080 web-0.shop.a."]);
    let along: Vec<String> = answer.additionals.iter().map(|record| record.data.to_string()).collect();
    assert_eq!(along, ["10.0.0.8", "fd00::8"], "its addresses come along");
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

/// Pods of networks without IPv4: their names exist, and have no A.
#[tokio::test]
async fn a_pod_without_ipv4_has_no_data_of_that_family() {
    let server = start(vec![]).await;
    let six: Vec<String> = (2..4).map(|last| format!("fd00::{last}")).collect();
    let only_six = |last: u8| Host {
        addresses: vec![six[usize::from(last) - 2].parse().unwrap()],
        ..host("shop", &format!("six-{last}"), Some("six"), last)
    };
    let zone = NetworkZone { name: "a".to_owned(), hosts: vec![only_six(2), only_six(3)], ..NetworkZone::default() };
    server.zone.replace(Zone::new(vec![zone]));
    let mut answered = texts(&server.ask(POD_ON_A, "six.shop.a", RecordType::AAAA).await);
    answered.sort();
    assert_eq!(answered, six);
    let no_data = server.ask(POD_ON_A, "six.shop.a", RecordType::A).await;
    assert_eq!((no_data.metadata.response_code, no_data.answers.len()), (ResponseCode::NoError, 0));
    assert_eq!(no_data.authorities[0].record_type(), RecordType::SOA, "so it may be kept (RFC 2308)");
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
