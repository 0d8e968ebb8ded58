//! Many pods with the same question at once.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use hickory_proto::op::{Edns, Message, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::metrics::exposed;
use super::{ELSEWHERE, Fixture, Manual, POD_ON_A, POD_ON_BOTH, addresses, question, start, stub_answer};

const NAME: &str = "same.example.org";
/// Time for all queries to be received before the upstream answers.
const MEANWHILE: Duration = Duration::from_millis(300);

/// Asks by UDP as several pods do at once: each with an id and with upper and lower case of its own. Returns id, name as it was
/// asked for, and answer.
fn ask_at_once(server: &Fixture, count: u16) -> JoinSet<(u16, String, Message)> {
    let mut askers = JoinSet::new();
    for number in 0..count {
        let at = server.address;
        askers.spawn(async move {
            let mut name = NAME.to_owned();
            name[..usize::from(number % 5)].make_ascii_uppercase();
            let mut query = question(&name, RecordType::A);
            query.metadata.id = 1000 + number;
            let from = if number % 2 == 0 { POD_ON_A } else { POD_ON_BOTH };
            let socket = UdpSocket::bind((from, 0)).await.unwrap();
            socket.send_to(&query.to_vec().unwrap(), at).await.unwrap();
            let mut buffer = vec![0; 4096];
            let length = timeout(Duration::from_secs(20), socket.recv(&mut buffer)).await.expect("an answer").unwrap();
            (query.metadata.id, format!("{name}."), Message::from_vec(&buffer[..length]).unwrap())
        });
    }
    askers
}

/// The lines of questions to the upstreams, without the upstream's address.
fn asked(server: &Fixture) -> Vec<String> {
    let lines = exposed(server, "dns_upstream_total");
    lines.iter().filter_map(|line| Some(line.split_once("result=")?.1.to_owned())).collect()
}

#[tokio::test]
async fn the_same_question_is_asked_once_and_each_asker_has_its_own_answer() {
    let (upstream, at) = Manual::new();
    let server = start(vec![at]).await;
    let askers = ask_at_once(&server, 40);
    let answering = async {
        let mut buffer = [0; 4096];
        let (length, peer) = upstream.0.recv_from(&mut buffer).await.unwrap();
        let answer = async {
            sleep(MEANWHILE).await;
            let answer = stub_answer(&buffer[..length]).to_vec().unwrap();
            upstream.0.send_to(&answer, peer).await.unwrap();
        };
        tokio::join!(server.ask_by_tcp(POD_ON_A, NAME), answer).0
    };
    let (by_tcp, answers) = tokio::join!(answering, askers.join_all());
    assert_eq!((addresses(&by_tcp), by_tcp.metadata.id), (vec![ELSEWHERE], 4711));
    assert_eq!(answers.len(), 40);
    for (id, name, answer) in answers {
        assert_eq!((answer.metadata.id, answer.queries[0].name.to_ascii()), (id, name));
        assert_eq!(addresses(&answer), [ELSEWHERE]);
    }
    assert_eq!(asked(&server), ["\"answered\"} 1"]);
    let merged = exposed(&server, "dns_cache_total{result=\"merged\"}");
    assert_eq!(merged, ["dns_cache_total{result=\"merged\"} 40"]);
}

#[tokio::test]
async fn a_failure_is_shared_and_not_tried_again_by_each() {
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let server = start(vec![silent.local_addr().unwrap()]).await;
    let began = Instant::now();
    let answers = ask_at_once(&server, 20).join_all().await;
    assert!(began.elapsed() < Duration::from_secs(4), "all wait for the same two seconds: {:?}", began.elapsed());
    assert!(answers.iter().all(|(_, _, answer)| answer.metadata.response_code == ResponseCode::ServFail));
    assert_eq!(asked(&server), ["\"timeout\"} 1"]);
}

#[tokio::test]
async fn an_old_answer_stands_in_for_all_that_wait() {
    let (upstream, at) = Manual::new();
    let server = start(vec![at]).await;
    let first = server.ask(POD_ON_A, NAME, RecordType::A);
    tokio::join!(first, upstream.answer(|answer| answer.answers[0].ttl = 1));
    sleep(Duration::from_millis(1100)).await;
    // The upstream is there, and silent.
    let answers = ask_at_once(&server, 20).join_all().await;
    for (_, _, answer) in &answers {
        assert_eq!((addresses(answer), answer.answers[0].ttl), (vec![ELSEWHERE], 30));
    }
    assert_eq!(asked(&server), ["\"answered\"} 1", "\"timeout\"} 1"]);
}

/// 100 addresses: more than fits a datagram of someone who doesn't say what it takes.
fn long_answer(packet: &[u8]) -> Vec<u8> {
    let mut answer = stub_answer(packet);
    let name: Name = answer.queries[0].name.clone();
    let address = |last| Record::from_rdata(name.clone(), 30, RData::A(A(Ipv4Addr::new(192, 0, 2, last))));
    answer.answers = (0..100).map(address).collect();
    answer.to_vec().unwrap()
}

#[tokio::test]
async fn each_asker_gets_what_it_can_take() {
    let (upstream, at) = Manual::new();
    let server = start(vec![at]).await;
    let larger = async {
        let mut query = question(NAME, RecordType::A);
        query.edns.get_or_insert_with(Edns::new).set_max_payload(4096);
        server.raw(POD_ON_A, &query.to_vec().unwrap()).await.unwrap()
    };
    let (by_udp, by_tcp) = (server.ask(POD_ON_A, NAME, RecordType::A), server.ask_by_tcp(POD_ON_BOTH, NAME));
    let answering = async {
        // Whoever came first asks by its own transport, and then by TCP what was too long. With EDNS it is another question.
        loop {
            let mut buffer = vec![0; 4096];
            tokio::select! {
                received = upstream.0.recv_from(&mut buffer) => {
                    let (length, peer) = received.unwrap();
                    sleep(MEANWHILE).await;
                    upstream.0.send_to(&long_answer(&buffer[..length]), peer).await.unwrap();
                }
                accepted = upstream.1.accept() => {
                    let (mut stream, _) = accepted.unwrap();
                    let mut query = vec![0; stream.read_u16().await.unwrap().into()];
                    stream.read_exact(&mut query).await.unwrap();
                    sleep(MEANWHILE).await;
                    let answer = long_answer(&query);
                    stream.write_u16(answer.len().try_into().unwrap()).await.unwrap();
                    stream.write_all(&answer).await.unwrap();
                }
            }
        }
    };
    let (larger, by_udp, by_tcp) = tokio::select! {
        told = async { tokio::join!(larger, by_udp, by_tcp) } => told,
        () = answering => unreachable!(),
    };
    assert_eq!(addresses(&Message::from_vec(&larger).unwrap()).len(), 100);
    assert!(by_udp.metadata.truncation && by_udp.answers.is_empty());
    assert!(!by_tcp.metadata.truncation && by_tcp.answers.len() == 100);
    assert_eq!(asked(&server), ["\"answered\"} 2"]);
}
