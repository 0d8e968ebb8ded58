//! Any packet whatsoever: mutations of a kept corpus, each with a right answer or a right error.
//!
//! `PORTOLAN_FUZZ_ITERATIONS` makes it longer, `PORTOLAN_FUZZ_SEED` different. What it finds is put into the corpus.

use std::net::IpAddr;
use std::path::Path;

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::RData;

use crate::answer::{Audience, Decision, Transport, decide, decide_any};
use crate::tests::{POD_ON_A, POD_ON_BOTH, zone};
use crate::{Zone, cache, wire};

const ITERATIONS: u64 = 200_000;
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
/// What we send by UDP to whoever takes as much, and to whoever doesn't say, in bytes.
const LARGEST: usize = 1232;
const CLASSIC: usize = 512;

/// xorshift64* (Vigna 2016): the same packets for the same seed on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % limit.max(1)
    }

    fn byte(&mut self) -> u8 {
        // Lengths, pointers and types are where parsers go wrong.
        const ODD: [u8; 10] = [0, 1, 12, 41, 63, 64, 0x80, 0xc0, 0xfe, 0xff];
        if self.below(2) == 0 { ODD[self.below(ODD.len())] } else { self.next().to_le_bytes()[7] }
    }
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| text.parse().expect(variable))
}

fn corpus() -> Vec<Vec<u8>> {
    // Of the tree that cargo runs us for: trees share what is compiled, and the one that we were compiled in may be gone.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs the tests");
    let directory = Path::new(&package).join("corpus");
    let mut files: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

fn mutate(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut packet = corpus[random.below(corpus.len())].clone();
    for _ in 0..random.below(5) {
        let at = random.below(packet.len() + 1);
        match random.below(6) {
            0 => packet.truncate(at),
            1 => packet.insert(at, random.byte()),
            2 if at < packet.len() => drop(packet.remove(at)),
            3 => {
                let other = &corpus[random.below(corpus.len())];
                packet.truncate(at);
                packet.extend_from_slice(&other[random.below(other.len() + 1)..]);
            }
            4 => packet.extend_from_within(random.below(at + 1)..at),
            _ if at < packet.len() => packet[at] = random.byte(),
            _ => packet.push(random.byte()),
        }
    }
    packet
}

/// What must be so of each reply, however bad the packet was.
fn examine(packet: &[u8], audience: &Audience, transport: Transport, reply: &[u8]) {
    let answer = Message::from_vec(reply).expect("well formed");
    assert_eq!(reply[..2], packet[..2], "to the query's id");
    assert_eq!(answer.metadata.message_type, MessageType::Response);
    assert_eq!(reply[2] & 0x78, packet[2] & 0x78, "to the query's operation");
    let known = [ResponseCode::NoError, ResponseCode::NXDomain, ResponseCode::FormErr, ResponseCode::NotImp];
    let code = answer.metadata.response_code;
    let is_refused = code == ResponseCode::Refused && matches!(audience, Audience::Everyone);
    assert!(known.contains(&code) || u16::from(code) == 16 || is_refused, "{code}");
    let is_empty = answer.answers.is_empty() && answer.additionals.is_empty();
    assert!(code == ResponseCode::NoError || is_empty, "no records with an error");
    if transport == Transport::Udp {
        assert!(reply.len() <= LARGEST);
        let accepts = Message::from_vec(packet).map_or(CLASSIC, |query| usize::from(query.max_payload()));
        assert!(reply.len() <= accepts, "{} bytes for {accepts}", reply.len());
    }
    for record in answer.answers.iter().chain(&answer.additionals) {
        let address: IpAddr = match &record.data {
            RData::A(address) => address.0.into(),
            RData::AAAA(address) => address.0.into(),
            _ => continue,
        };
        assert_ne!(address, IpAddr::from([10, 0, 0, 9]), "a pod that isn't Ready");
    }
}

/// The short way to an answer says what the long one says; which addresses come first, or at all in a cut answer, is chance.
fn agree(packet: &[u8], one: &Decision, other: &Decision) {
    match (one, other) {
        (Decision::Reply(one), Decision::Reply(other)) => {
            let [one, other] = [one, other].map(|reply| {
                let mut message = Message::from_vec(reply).expect("well formed");
                message.answers.sort_by_key(ToString::to_string);
                message.additionals.sort_by_key(ToString::to_string);
                message
            });
            if one.metadata.truncation && other.metadata.truncation {
                assert_eq!((one.metadata, &one.queries, &one.edns), (other.metadata, &other.queries, &other.edns));
            } else {
                assert_eq!(one, other);
            }
        }
        (Decision::Forward(one), Decision::Forward(other)) => {
            assert_eq!((&*one.packet, one.payload), (packet, other.payload));
        }
        (Decision::Drop, Decision::Drop) => {}
        (one, other) => panic!("{one:?}, but {other:?}"),
    }
}

fn try_one(zone: &Zone, random: &mut Random, corpus: &[Vec<u8>], packet: &[u8]) {
    let transport = if random.below(4) == 0 { Transport::Tcp } else { Transport::Udp };
    let source = if random.below(2) == 0 { POD_ON_A } else { POD_ON_BOTH };
    let pods = Audience::Network("a".to_owned());
    let audience = if random.below(4) == 0 { Audience::Everyone } else { pods };
    let decision = decide(zone, &audience, source.into(), transport, packet);
    agree(packet, &decision, &decide_any(zone, &audience, source.into(), transport, packet));
    match decision {
        Decision::Reply(reply) => examine(packet, &audience, transport, &reply),
        Decision::Drop => assert!(packet.len() < wire::HEADER || packet[2] & 0x80 != 0, "a query is owed a reply"),
        Decision::Forward(query) => {
            assert!(matches!(audience, Audience::Network(_)), "not for everyone");
            let mut answer = mutate(random, corpus);
            let _ = cache::key(packet);
            let _ = wire::map_ttls(&mut answer, |ttl| ttl);
            let id = u16::from_be_bytes([packet[0], packet[1]]);
            if query.is_answered_by(&answer, id) {
                assert!(answer[2] & 0x80 != 0 && answer[..2] == packet[..2]);
            }
            let failed = query.failed().expect("a failure can always be told");
            assert_eq!(Message::from_vec(&failed).unwrap().metadata.response_code, ResponseCode::ServFail);
            if let Some(passed) = query.pass_on(answer, Transport::Udp) {
                let accepts = Message::from_vec(packet).map_or(CLASSIC, |query| usize::from(query.max_payload()));
                assert!(passed.len() <= accepts);
            }
        }
    }
}

/// Tells which packet it was when a check fails.
struct Culprit<'a>(&'a [u8]);

impl Drop for Culprit<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("the packet: {hex}");
        }
    }
}

#[test]
fn fuzz_every_packet_has_a_right_answer_or_a_right_error() {
    let (zone, corpus) = (zone(), corpus());
    let mut random = Random(number("PORTOLAN_FUZZ_SEED", SEED).max(1));
    for packet in &corpus {
        let _culprit = Culprit(packet);
        try_one(&zone, &mut random, &corpus, packet);
    }
    for _ in 0..number("PORTOLAN_FUZZ_ITERATIONS", ITERATIONS) {
        let packet = mutate(&mut random, &corpus);
        let _culprit = Culprit(&packet);
        try_one(&zone, &mut random, &corpus, &packet);
    }
}
