//! The server for those who are on no network.

use std::net::Ipv4Addr;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{DNSClass, RecordType};
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;
use tokio::time::timeout;

use super::metrics::exposed;
use super::{POD_ON_A, addresses, host, question, start_for_everyone, texts};
use crate::{Host, NetworkZone, Zone};

/// Someone who is no pod of any network.
const SOMEBODY: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 77);

#[tokio::test]
async fn full_names_with_namespace_are_answered() {
    let server = start_for_everyone().await;
    let answer = server.ask(SOMEBODY, "DB.prod.a.Portolan.internal", RecordType::A).await;
    assert_eq!((addresses(&answer), answer.answers[0].ttl), (vec![Ipv4Addr::new(10, 0, 0, 4)], 1));
    assert!(answer.metadata.authoritative && !answer.metadata.recursion_available);
    assert_eq!(addresses(&server.ask_by_tcp(SOMEBODY, "db.shop.a.portolan.internal").await).len(), 3);
    assert_eq!(addresses(&server.ask(SOMEBODY, "db.shop.b.portolan.internal", RecordType::A).await).len(), 1);
    assert_eq!(texts(&server.ask(SOMEBODY, "www.shop.a.portolan.internal", RecordType::AAAA).await), ["fd00::8"]);
    let services = server.ask(SOMEBODY, "_http._tcp.web.shop.a.portolan.internal", RecordType::SRV).await;
    assert_eq!(texts(&services), ["0 1 8080 web-0.shop.a.portolan.internal."]);
    assert_eq!(services.additionals.len(), 2);
}

#[tokio::test]
async fn a_name_without_namespace_is_nobodys() {
    let server = start_for_everyone().await;
    for name in ["db-0", "web", "www", "_http._tcp.web", "cache", "nobody", "nobody.shop", "db.nobody"] {
        // Not even to a pod that would get it from its own server.
        for from in [SOMEBODY, POD_ON_A] {
            let answer = server.ask(from, &format!("{name}.a.portolan.internal"), RecordType::A).await;
            assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain, "{name}");
            assert_eq!(answer.authorities[0].name.to_ascii(), "a.portolan.internal.", "{name}");
        }
    }
    for (name, apex) in [
        ("shop.a.portolan.internal", "a.portolan.internal."),
        ("a.portolan.internal", "a.portolan.internal."),
        ("portolan.internal", "portolan.internal."),
    ] {
        let answer = server.ask(SOMEBODY, name, RecordType::A).await;
        assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 0), "{name}");
        assert_eq!(answer.authorities[0].name.to_ascii(), apex);
        assert_eq!(
            server.ask(SOMEBODY, name, RecordType::SOA).await.answers.len(),
            usize::from(name != "shop.a.portolan.internal")
        );
    }
    let unknown = server.ask(SOMEBODY, "db.shop.nowhere.portolan.internal", RecordType::A).await;
    assert_eq!(unknown.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(unknown.authorities[0].name.to_ascii(), "portolan.internal.");
}

#[tokio::test]
async fn all_else_is_refused() {
    let server = start_for_everyone().await;
    for name in ["db.shop.a", "a", "example.org", "internal", "xportolan.internal", "4.0.0.10.in-addr.arpa"] {
        let answer = server.ask(SOMEBODY, name, RecordType::A).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::Refused, "{name}");
        assert!(answer.answers.is_empty() && answer.authorities.is_empty() && !answer.metadata.recursion_available);
    }
    assert_eq!(server.ask_by_tcp(SOMEBODY, "example.org").await.metadata.response_code, ResponseCode::Refused);
    let mut chaos = question("version.bind", RecordType::TXT);
    chaos.queries[0].set_query_class(DNSClass::CH);
    let answer = server.raw(SOMEBODY, &chaos.to_vec().unwrap()).await.unwrap();
    assert_eq!(hickory_proto::op::Message::from_vec(&answer).unwrap().metadata.response_code, ResponseCode::Refused);
    server.zone.replace(Zone::default());
    let answer = server.ask(SOMEBODY, "db.prod.a.portolan.internal", RecordType::A).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused, "without a domain");
}

#[tokio::test]
async fn nodes_and_failing_pods_are_not_told_of() {
    let server = start_for_everyone().await;
    for name in ["db.prod", "web-1.shop"] {
        let answer = server.ask(SOMEBODY, &format!("{name}.a.portolan.internal"), RecordType::TXT).await;
        assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 0), "{name}");
    }
    let failing = server.ask(SOMEBODY, "web-1.shop.a.portolan.internal", RecordType::A).await;
    assert_eq!((failing.metadata.response_code, failing.answers.len()), (ResponseCode::NoError, 0));
}

#[tokio::test]
async fn the_longest_network_counts_and_nothing_above_a_name_is_missing() {
    let server = start_for_everyone().await;
    let network = |name: &str, last| {
        let hosts = vec![host("c", "db", None, last), Host { ..host("shop", "db", None, last + 1) }];
        NetworkZone { name: name.to_owned(), hosts, ..NetworkZone::default() }
    };
    let zone = Zone::new(vec![network("b", 1), network("c.b", 3), network("x.y", 5)]);
    server.zone.replace(zone.within(Some("portolan.internal".parse().unwrap())));
    let ask = async |name: &str| server.ask(SOMEBODY, &format!("{name}.portolan.internal"), RecordType::A).await;
    assert_eq!(addresses(&ask("db.shop.b").await), [Ipv4Addr::new(10, 0, 0, 2)]);
    assert_eq!(addresses(&ask("db.shop.c.b").await), [Ipv4Addr::new(10, 0, 0, 4)]);
    assert_eq!(ask("db.c.b").await.metadata.response_code, ResponseCode::NXDomain, "of network c.b, without namespace");
    assert_eq!(ask("y").await.metadata.response_code, ResponseCode::NoError);
    assert_eq!(ask("z.y").await.metadata.response_code, ResponseCode::NXDomain);
    let nothing = Zone::new(vec![]).within(Some("portolan.internal".parse().unwrap()));
    server.zone.replace(nothing);
    assert_eq!(ask("db.shop.b").await.metadata.response_code, ResponseCode::NXDomain);
    let domain = server.ask(SOMEBODY, "portolan.internal", RecordType::A).await;
    assert_eq!(domain.metadata.response_code, ResponseCode::NoError);
}

#[tokio::test]
async fn it_has_limits_and_one_label_whatever_is_asked() {
    let server = start_for_everyone().await;
    for name in ["db.prod.a", "db.shop.b", "db.shop.nowhere", "db.shop.elsewhere"] {
        server.ask(SOMEBODY, &format!("{name}.portolan.internal"), RecordType::A).await;
    }
    server.ask(SOMEBODY, "example.org", RecordType::A).await;
    let of = |result, count| {
        format!("dns_queries_total{{network=\"*\",source=\"own\",type=\"A\",result=\"{result}\"}} {count}")
    };
    let mut expected = [of("noerror", 2), of("nxdomain", 2), of("refused", 1)];
    expected.sort();
    assert_eq!(exposed(&server, "dns_queries_total"), expected);
    // The limits are those of the other servers.
    let connect = async || {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((SOMEBODY, 0).into()).unwrap();
        socket.connect(server.address).await.unwrap()
    };
    let mut open = Vec::new();
    for _ in 0..16 {
        open.push(connect().await);
    }
    let mut one_more = connect().await;
    let end = timeout(Duration::from_secs(5), one_more.read(&mut [0; 1])).await.expect("closed at once");
    assert!(matches!(end, Ok(0) | Err(_)));
    let closed = exposed(&server, "dns_dropped_total");
    assert_eq!(closed, ["dns_dropped_total{network=\"*\",reason=\"connections\"} 1"]);
    assert_eq!(addresses(&server.ask_by_tcp(POD_ON_A, "db.prod.a.portolan.internal").await).len(), 1);
}
