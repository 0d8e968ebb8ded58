//! Names that aren't ours.

use std::net::Ipv4Addr;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, RecordType};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::{ELSEWHERE, Manual, POD_ON_A, addresses, start, upstream};

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
            // Not as fast as it can: a pod that asks 20,000 times a second gets no answers.
            tokio::time::sleep(Duration::from_millis(5)).await;
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
        upstream.answer_by_tcp().await;
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
async fn a_reply_that_is_larger_than_was_asked_for_is_asked_for_again_by_tcp() {
    let (upstream, at) = Manual::new();
    let server = start(vec![at]).await;
    let both = async {
        // 40 records take more than the 512 bytes of a query without EDNS.
        upstream.answer(|answer| answer.answers = vec![answer.answers[0].clone(); 40]).await;
        upstream.answer_by_tcp().await;
    };
    let ask = async { tokio::join!(server.ask(POD_ON_A, "example.org", RecordType::A), both) };
    let (answer, ()) = timeout(Duration::from_secs(8), ask).await.expect("it is asked again");
    assert_eq!(addresses(&answer), [ELSEWHERE]);
}
