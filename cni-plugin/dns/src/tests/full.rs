//! Full names: those in the domain of all networks.

use std::net::Ipv4Addr;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;

use super::{ELSEWHERE, POD_ON_A, POD_ON_BOTH, addresses, host, start, texts, upstream};
use crate::{Member, NetworkZone, Zone};

#[tokio::test]
async fn a_full_name_is_what_the_short_one_is() {
    let server = start(vec![]).await;
    for type_ in [RecordType::A, RecordType::AAAA, RecordType::SRV, RecordType::TXT, RecordType::PTR, RecordType::ANY] {
        for name in [
            "db",
            "DB-0",
            "db.prod",
            "db.shop.prod",
            "web",
            "www.shop",
            "web-1",
            "cache",
            "shop",
            "nobody",
            "nobody.shop",
            "_http._tcp.nobody",
            "_tcp.web",
            "_ftp._tcp.web",
        ] {
            let short = server.ask(POD_ON_A, &format!("{name}.a"), type_).await;
            let full = server.ask(POD_ON_A, &format!("{name}.A.Portolan.INTERNAL"), type_).await;
            assert_eq!(full.metadata, short.metadata, "{name} {type_}");
            let sorted = |mut texts: Vec<String>| {
                texts.sort();
                texts
            };
            assert_eq!(sorted(texts(&full)), sorted(texts(&short)), "{name} {type_}");
            // A negative answer is one of the zone that the name is in.
            let apexes = full.authorities.iter().map(|it| (it.record_type(), it.name.to_ascii(), it.ttl));
            let expected = short.authorities.iter().map(|it| (it.record_type(), "a.portolan.internal.".to_owned(), 1));
            assert_eq!(apexes.collect::<Vec<_>>(), expected.collect::<Vec<_>>(), "{name} {type_}");
        }
    }
    assert_eq!(texts(&server.ask(POD_ON_A, "a.portolan.internal", RecordType::SOA).await).len(), 1);
}

#[tokio::test]
async fn a_services_targets_are_full_names_and_an_address_has_its_short_one() {
    let server = start(vec![]).await;
    let answer = server.ask(POD_ON_A, "_http._tcp.web.a.portolan.internal", RecordType::SRV).await;
    assert_eq!(texts(&answer), ["0 1 8080 web-0.shop.a.portolan.internal."]);
    let along: Vec<_> = answer.additionals.iter().map(|it| it.name.to_ascii()).collect();
    assert_eq!(along, ["web-0.shop.a.portolan.internal."; 2]);
    let address = server.ask(POD_ON_A, "8.0.0.10.in-addr.arpa", RecordType::PTR).await;
    assert_eq!(texts(&address), ["web-0.shop.a."]);
}

#[tokio::test]
async fn full_names_of_other_networks_are_not_ours() {
    let server = start(vec![upstream().await]).await;
    let ask = async |from, name| addresses(&server.ask(from, name, RecordType::A).await);
    assert_eq!(ask(POD_ON_BOTH, "db.b.portolan.internal").await, [Ipv4Addr::new(10, 1, 0, 7)]);
    for name in
        ["db.b.portolan.internal", "b.portolan.internal", "db.portolan.internal", "xportolan.internal", "internal"]
    {
        assert_eq!(ask(POD_ON_A, name).await, [ELSEWHERE], "{name}");
    }
    // Full names end in it: nobody may be told that it doesn't exist (RFC 8020).
    let domain = server.ask(POD_ON_A, "portolan.internal", RecordType::A).await;
    assert_eq!((domain.metadata.response_code, domain.answers.len()), (ResponseCode::NoError, 0));
    assert_eq!(domain.authorities[0].name.to_ascii(), "portolan.internal.");
}

/// Networks that are called as the domain is, or as one of its names: `.9` of each is pod db in namespace shop.
fn odd(names: &[&str]) -> Zone {
    let network = |(number, name): (usize, &&str)| {
        let number = u8::try_from(number).unwrap();
        let mut db = host("shop", "db", None, 9);
        db.addresses = vec![Ipv4Addr::new(10, number, 0, 9).into()];
        NetworkZone {
            name: (*name).to_owned(),
            hosts: vec![db, host("portolan", "db", None, number)],
            members: vec![Member {
                address: POD_ON_A.into(),
                namespace: "shop".to_owned(),
                networks: names.iter().map(|it| (*it).to_owned()).collect(),
            }],
            ..NetworkZone::default()
        }
    };
    Zone::new(names.iter().enumerate().map(network).collect()).within(Some("portolan.internal".parse().unwrap()))
}

#[tokio::test]
async fn networks_that_are_called_like_the_domain() {
    let server = start(vec![upstream().await]).await;
    let ask = async |name| addresses(&server.ask(POD_ON_A, name, RecordType::A).await);
    let db_of = |number| vec![Ipv4Addr::new(10, number, 0, 9)];
    // The server is that of network a.
    server.zone.replace(odd(&["a", "internal", "portolan.internal", "a.portolan.internal", "portolan"]));
    assert_eq!(ask("db.internal").await, db_of(1));
    assert_eq!(ask("db.internal.portolan.internal").await, db_of(1));
    assert_eq!(ask("db.portolan.internal").await, db_of(2), "not that of namespace portolan on network internal");
    assert_eq!(ask("db.portolan").await, db_of(4));
    assert_eq!(ask("db.portolan.portolan.internal").await, db_of(4), "the longest match");
    assert_eq!(ask("db.a.portolan.internal").await, db_of(3), "a network's own name goes before a full one");
    assert_eq!(ask("db.a").await, db_of(0));

    server.zone.replace(odd(&["a", "internal"]));
    assert_eq!(ask("db.portolan.internal").await, [Ipv4Addr::new(10, 0, 0, 1)], "no full name: of namespace portolan");
    assert_eq!(ask("db.a.portolan.internal").await, db_of(0));
    let domain = server.ask(POD_ON_A, "portolan.internal", RecordType::A).await;
    assert_eq!(domain.metadata.response_code, ResponseCode::NoError);

    server.zone.replace(odd(&["a", "b.c"]));
    assert_eq!(ask("db.b.c.portolan.internal").await, db_of(1));
    let between = server.ask(POD_ON_A, "c.portolan.internal", RecordType::A).await;
    assert_eq!((between.metadata.response_code, between.answers.len()), (ResponseCode::NoError, 0));
    assert_eq!(ask("x.c.portolan.internal").await, [ELSEWHERE]);
}

#[tokio::test]
async fn without_a_domain_there_are_no_full_names() {
    let server = start(vec![upstream().await]).await;
    server.zone.replace(odd(&["a"]).within(None));
    for name in ["db.a.portolan.internal", "portolan.internal"] {
        assert_eq!(addresses(&server.ask(POD_ON_A, name, RecordType::A).await), [ELSEWHERE], "{name}");
    }
}
