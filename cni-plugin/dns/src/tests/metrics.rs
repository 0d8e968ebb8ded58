//! What an operator sees of the server.

use std::net::Ipv4Addr;

use hickory_proto::rr::RecordType;
use prometheus_client::registry::Registry;
use tokio::net::UdpSocket;

use super::{Fixture, Manual, POD_ON_A, POD_ON_BOTH, start, upstream};

/// The lines of the exposition that begin with `name`.
pub(super) fn exposed(server: &Fixture, name: &str) -> Vec<String> {
    let mut registry = Registry::default();
    server.metrics.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let mut lines: Vec<String> = text.lines().filter(|line| line.starts_with(name)).map(str::to_owned).collect();
    lines.sort();
    lines
}

#[tokio::test]
async fn queries_are_counted_by_type_and_result() {
    let server = start(vec![upstream().await]).await;
    for (name, type_) in [("db.a", RecordType::A), ("db.a", RecordType::A), ("db.a", RecordType::AAAA)] {
        server.ask(POD_ON_A, name, type_).await;
    }
    server.ask(POD_ON_A, "nobody.a", RecordType::A).await;
    server.ask(POD_ON_A, "db.a", RecordType::NAPTR).await;
    server.ask_by_tcp(POD_ON_A, "example.org").await;
    let labels = |source, type_, result, count| {
        format!("dns_queries_total{{network=\"a\",source=\"{source}\",type=\"{type_}\",result=\"{result}\"}} {count}")
    };
    let mut expected = vec![
        labels("own", "A", "noerror", 2),
        labels("own", "AAAA", "nodata", 1),
        labels("own", "A", "nxdomain", 1),
        labels("own", "other", "nodata", 1),
        labels("forwarded", "A", "noerror", 1),
    ];
    expected.sort();
    assert_eq!(exposed(&server, "dns_queries_total"), expected);
    let counts = exposed(&server, "dns_duration_seconds_count");
    assert_eq!(
        counts,
        ["dns_duration_seconds_count{source=\"forwarded\"} 1", "dns_duration_seconds_count{source=\"own\"} 5"]
    );
}

#[tokio::test]
async fn the_cache_and_each_upstream_are_counted() {
    let (manual, at) = Manual::new();
    let server = start(vec![at]).await;
    let ask = || server.ask(POD_ON_A, "kept.example.org", RecordType::A);
    tokio::join!(ask(), manual.answer(|_| ()));
    ask().await;
    assert_eq!(
        exposed(&server, "dns_cache_total"),
        ["dns_cache_total{result=\"hit\"} 1", "dns_cache_total{result=\"miss\"} 1"]
    );
    drop(manual);
    server.ask(POD_ON_A, "unknown.example.org", RecordType::A).await;
    let asked = exposed(&server, "dns_upstream_total");
    let of = |result| format!("dns_upstream_total{{server=\"{at}\",result=\"{result}\"}} 1");
    assert_eq!(asked, [of("answered"), of("failed")]);
}

#[tokio::test]
async fn what_gets_no_answer_is_counted_by_its_reason() {
    let server = start(vec![]).await;
    let socket = UdpSocket::bind((POD_ON_BOTH, 0)).await.unwrap();
    socket.send_to(&[0xff; 600], server.address).await.unwrap();
    socket.send_to(b"x", server.address).await.unwrap();
    server.ask(POD_ON_A, "db-0.a", RecordType::A).await;
    let malformed = "dns_dropped_total{network=\"a\",reason=\"malformed\"} 2";
    assert_eq!(exposed(&server, "dns_dropped_total"), [malformed]);
}

#[tokio::test]
async fn a_pod_cannot_make_up_labels() {
    let server = start(vec![]).await;
    for type_ in 60_000..60_100 {
        server.ask(Ipv4Addr::LOCALHOST, "db.a", RecordType::Unknown(type_)).await;
    }
    assert_eq!(exposed(&server, "dns_queries_total").len(), 1);
}
