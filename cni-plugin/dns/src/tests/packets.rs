//! Packets and connections as they shouldn't be, and what doesn't fit.

use std::net::Ipv4Addr;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, OpCode, ResponseCode};
use hickory_proto::rr::RecordType;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::timeout;

use super::{POD_ON_A, POD_ON_BOTH, addresses, question, start, zone};
use crate::answer::{Audience, Decision, Transport, decide};

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

/// A connection that never sends the rest of its query is closed, although it is never silent for long.
#[tokio::test]
async fn a_query_that_comes_too_slowly_is_not_waited_for() {
    let server = start(vec![]).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((POD_ON_A, 0).into()).unwrap();
    let mut stream = socket.connect(server.address).await.unwrap();
    stream.write_u16(60_000).await.unwrap();
    let drip = async {
        while stream.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(60), drip).await.expect("closed");
}

fn audience() -> Audience {
    Audience::Network("a".to_owned())
}

proptest! {
    #[test]
    fn no_packet_panics(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
        let _ = decide(&zone(), &audience(), POD_ON_A.into(), Transport::Udp, &bytes);
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
        if let Decision::Forward(query) = decide(&zone(), &audience(), POD_ON_A.into(), Transport::Udp, &bytes) {
            let _ = query.is_answered_by(&bytes, 0);
            let _ = query.pass_on(bytes, Transport::Udp);
        }
    }
}

#[tokio::test]
async fn queries_that_come_at_once_are_each_answered_to_who_asked() {
    let server = start(vec![]).await;
    let mut pods = vec![];
    for _ in 0..3 {
        let pod = UdpSocket::bind((POD_ON_A, 0)).await.unwrap();
        pod.writable().await.unwrap();
        pods.push(pod);
    }
    // The server runs on this thread: it takes none before all are there.
    for id in 0..60_u16 {
        let mut query = question(&format!("db-{}.a", id % 3), RecordType::A);
        query.metadata.id = id;
        let pod = &pods[usize::from(id) % 3];
        pod.try_send_to(&query.to_vec().unwrap(), server.address).unwrap();
    }
    for id in 0..60_u16 {
        let mut buffer = [0; 512];
        let pod = &pods[usize::from(id) % 3];
        let length = timeout(Duration::from_secs(8), pod.recv(&mut buffer)).await.expect("an answer").unwrap();
        let answer = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!(answer.metadata.id, id, "in the order in which they came");
        assert_eq!(addresses(&answer), [Ipv4Addr::new(10, 0, 0, u8::try_from(id % 3).unwrap() + 1)]);
    }
}
