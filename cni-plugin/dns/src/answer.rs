//! From a packet to what is to be done with it. Pure: no socket, no clock.

use std::net::IpAddr;

use hickory_proto::ProtoError;
use hickory_proto::op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use crate::plain::Plain;
use crate::records::{fill, fitted};
use crate::wire::{self, question_name};
use crate::zone::{Found, Zone};

/// The largest datagram we send of our own accord (DNS flag day 2020): it fits without fragments.
const OWN_PAYLOAD: u16 = 1232;

/// What to do with a packet.
#[derive(Debug)]
pub(crate) enum Decision {
    /// Send this.
    Reply(Vec<u8>),
    /// The name is not ours: ask upstream.
    Forward(Forward),
    /// Not a query: nothing is owed.
    Drop,
}

/// A query that goes upstream as it came, but for its id.
#[derive(Debug)]
pub(crate) struct Forward {
    /// The packet, which has been read once: it is a message with one question.
    pub(crate) packet: Vec<u8>,
    /// The largest datagram that the asker takes, in bytes.
    pub(crate) payload: usize,
}

/// How the query came, which bounds the reply.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// Whom a server answers.
#[derive(Clone, Debug)]
pub(crate) enum Audience {
    /// The pods of this network (lower case): their own networks' names, and by the upstreams all others.
    Network(String),
    /// Everyone: full names with namespace, and nothing else.
    Everyone,
}

impl Audience {
    fn has_upstreams(&self) -> bool {
        matches!(self, Self::Network(_))
    }
}

/// Decides about `packet`, which came from `source` to the server for `audience`.
pub(crate) fn decide(
    zone: &Zone,
    audience: &Audience,
    source: IpAddr,
    transport: Transport,
    packet: &[u8],
) -> Decision {
    decide_plain(zone, audience, source, transport, packet)
        .unwrap_or_else(|| decide_any(zone, audience, source, transport, packet))
}

/// The same for what is asked most; none for everything else.
fn decide_plain(
    zone: &Zone,
    audience: &Audience,
    source: IpAddr,
    transport: Transport,
    packet: &[u8],
) -> Option<Decision> {
    let plain = Plain::read(packet)?;
    let payload = plain.payload();
    match find(zone, audience, source, &plain.name) {
        None if audience.has_upstreams() => Some(Decision::Forward(Forward { packet: packet.to_vec(), payload })),
        found => {
            let limit = limit(payload, transport).min(own_limit(transport));
            plain.reply(&found?.data, limit, audience.has_upstreams(), OWN_PAYLOAD).map(Decision::Reply)
        }
    }
}

/// The same for every packet.
pub(crate) fn decide_any(
    zone: &Zone,
    audience: &Audience,
    source: IpAddr,
    transport: Transport,
    packet: &[u8],
) -> Decision {
    let Some(header) = header(packet) else { return Decision::Drop };
    if header.metadata.message_type != MessageType::Query {
        return Decision::Drop;
    }
    if header.metadata.op_code != OpCode::Query {
        return bare(&header.metadata, ResponseCode::NotImp);
    }
    if header.counts.queries != 1 {
        return bare(&header.metadata, ResponseCode::FormErr);
    }
    let Ok(query) = Message::from_vec(packet) else {
        return bare(&header.metadata, ResponseCode::FormErr);
    };
    let Some(question) = query.queries.first().cloned() else {
        return bare(&header.metadata, ResponseCode::FormErr);
    };
    let payload = usize::from(query.max_payload());
    let answer = |mut message: Message| {
        message.metadata.recursion_available = audience.has_upstreams();
        fitted(&mut message, limit(payload, transport).min(own_limit(transport)))
            .map_or(Decision::Drop, Decision::Reply)
    };
    if query.version() > 0 {
        return answer(refusal(&query, ResponseCode::BADVERS));
    }
    let name = match question.query_class {
        DNSClass::IN | DNSClass::ANY => text_of(&question.name),
        _ => None,
    };
    match name.and_then(|name| find(zone, audience, source, &name)) {
        None if audience.has_upstreams() => Decision::Forward(Forward { packet: packet.to_vec(), payload }),
        None => answer(refusal(&query, ResponseCode::Refused)),
        Some(found) => {
            answer(own(&query, &question, &found).unwrap_or_else(|_| refusal(&query, ResponseCode::ServFail)))
        }
    }
}

fn find<'a>(zone: &'a Zone, audience: &'a Audience, source: IpAddr, name: &str) -> Option<Found<'a>> {
    match audience {
        Audience::Network(network) => zone.find(network, source, name),
        Audience::Everyone => zone.find_for_everyone(name),
    }
}

impl Forward {
    /// The reply when no upstream has answered.
    pub(crate) fn failed(&self) -> Option<Vec<u8>> {
        refusal(&self.query()?, ResponseCode::ServFail).to_vec().ok()
    }

    fn query(&self) -> Option<Message> {
        Message::from_vec(&self.packet).ok()
    }

    /// An upstream's reply as the asker gets it: with the asker's id and case, and only its head if it is too large.
    pub(crate) fn pass_on(&self, mut answer: Vec<u8>, transport: Transport) -> Option<Vec<u8>> {
        if answer.len() > limit(self.payload, transport) {
            let mut head = refusal(&self.query()?, ResponseCode::NoError);
            head.metadata.truncation = true;
            return head.to_vec().ok();
        }
        answer.get_mut(..2)?.copy_from_slice(self.packet.get(..2)?);
        if let Some(name) = question_name(&self.packet)
            && let (Some(asked), Some(told)) = (self.packet.get(name.clone()), answer.get_mut(name))
            && told.eq_ignore_ascii_case(asked)
        {
            told.copy_from_slice(asked);
        }
        Some(answer)
    }

    /// True if `answer` replies to this question under `id`.
    pub(crate) fn is_answered_by(&self, answer: &[u8], id: u16) -> bool {
        let mut decoder = BinDecoder::new(answer);
        let Ok(header) = Header::read(&mut decoder) else { return false };
        if header.metadata.id != id || header.metadata.message_type != MessageType::Response {
            return false;
        }
        // A server that could not read the question may leave it out (RFC 1035, 4.1.1: FORMERR).
        if header.counts.queries == 0 {
            return matches!(header.metadata.response_code, ResponseCode::FormErr | ResponseCode::NotImp);
        }
        let is_asked = |question: Query| self.query().is_some_and(|query| query.queries.first() == Some(&question));
        header.counts.queries == 1 && Query::read(&mut decoder).is_ok_and(is_asked)
    }
}

/// True if the server says that it can't tell.
pub(crate) fn is_failure(answer: &[u8]) -> bool {
    header(answer).is_some_and(|header| {
        matches!(header.metadata.response_code, ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::NotImp)
    })
}

/// True if the question is in the reply.
pub(crate) fn has_question(answer: &[u8]) -> bool {
    header(answer).is_some_and(|header| header.counts.queries > 0)
}

fn header(packet: &[u8]) -> Option<Header> {
    if packet.len() < wire::HEADER {
        return None;
    }
    Header::read(&mut BinDecoder::new(packet)).ok()
}

/// A name in lower case with dots; none if a label has a character that no Kubernetes name has.
fn text_of(name: &Name) -> Option<String> {
    let mut text = String::with_capacity(name.len());
    for label in name {
        if !text.is_empty() {
            text.push('.');
        }
        for &byte in label {
            if !wire::is_of_names(byte) {
                return None;
            }
            text.push(byte.to_ascii_lowercase().into());
        }
    }
    (!text.is_empty()).then_some(text)
}

fn own(query: &Message, question: &Query, found: &Found<'_>) -> Result<Message, ProtoError> {
    let mut message = answer_to(query);
    message.metadata.authoritative = true;
    message.queries = vec![question.clone()];
    fill(&mut message, question, found)?;
    Ok(message)
}

/// An empty reply to `query`, with EDNS if the query has it (RFC 6891, 7).
fn answer_to(query: &Message) -> Message {
    let mut message = Message::response(query.metadata.id, query.metadata.op_code);
    message.metadata = Metadata::response_from_request(&query.metadata);
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(OWN_PAYLOAD);
        message.edns = Some(edns);
    }
    message
}

fn refusal(query: &Message, code: ResponseCode) -> Message {
    let mut message = answer_to(query);
    message.metadata.recursion_available = true;
    message.metadata.response_code = code;
    message.queries = query.queries.clone();
    message
}

/// A refusal of a packet of which no more than the header is understood.
fn bare(request: &Metadata, code: ResponseCode) -> Decision {
    let mut message = Message::response(request.id, request.op_code);
    message.metadata.recursion_desired = request.recursion_desired;
    message.metadata.response_code = code;
    reply(&message)
}

fn reply(message: &Message) -> Decision {
    message.to_vec().map_or(Decision::Drop, Decision::Reply)
}

/// The largest reply that the asker takes, in bytes, if it takes datagrams of `payload` bytes.
fn limit(payload: usize, transport: Transport) -> usize {
    match transport {
        Transport::Udp => payload,
        Transport::Tcp => u16::MAX.into(),
    }
}

fn own_limit(transport: Transport) -> usize {
    match transport {
        Transport::Udp => OWN_PAYLOAD.into(),
        Transport::Tcp => u16::MAX.into(),
    }
}
