//! Plain questions for addresses, which are most of what pods ask: read and answered as bytes, without a message in between.
//!
//! Nothing here says what `answer` would not say of the same packet (the fuzzer holds it to that), and whatever isn't plain is left
//! to it.

use std::net::IpAddr;

use rand::seq::SliceRandom;

use crate::records::TTL;
use crate::wire::{self, A, AAAA, IN, OPT};
use crate::zone::Data;

/// Bytes of what a reply has after its records where the query has EDNS: no options, and what datagrams we take (RFC 6891, 6.1.2).
const EDNS: usize = 11;
/// Bytes of an A record and of an AAAA record that point at the question's name (RFC 1035, 4.1.4; RFC 3596, 2.2).
const A_RECORD: usize = 16;
const AAAA_RECORD: usize = 28;
/// A pointer to the question's name, which stands right after the header.
const TO_QUESTION: [u8; 2] = [0xc0, 0x0c];
/// Bits of the header's third and fourth byte (RFC 1035, 4.1.1; RFC 4035, 3).
const RESPONSE: u8 = 0x80;
const OPERATION: u8 = 0x78;
const AUTHORITATIVE: u8 = 0x04;
const RECURSION_DESIRED: u8 = 0x01;
const RECURSION_AVAILABLE: u8 = 0x80;
const CHECKING_DISABLED: u8 = 0x10;

/// A query with one question of class IN by letters, digits, `-` and `_`, and with nothing else but EDNS without options.
#[derive(Debug)]
pub(crate) struct Plain<'p> {
    /// Header and question.
    packet: &'p [u8],
    /// The name in lower case, without trailing dot.
    pub(crate) name: String,
    type_: u16,
    /// What EDNS says of the datagrams that the asker takes, in bytes.
    payload: Option<u16>,
}

impl<'p> Plain<'p> {
    /// None if the packet is no such query.
    pub(crate) fn read(packet: &'p [u8]) -> Option<Self> {
        let [_, _, flags, _, 0, 1, 0, 0, 0, 0, 0, has_edns @ (0 | 1)] = *packet.first_chunk::<{ wire::HEADER }>()?
        else {
            return None;
        };
        if flags & (RESPONSE | OPERATION) != 0 {
            return None;
        }
        let name = wire::question_name(packet)?;
        let (head, rest) = packet.split_at_checked(name.end + wire::QUESTION_TAIL)?;
        let type_ = wire::question_type(packet)?;
        if head.get(name.end + 2..)? != IN.to_be_bytes() {
            return None;
        }
        let payload = match (has_edns, rest) {
            (0, []) => None,
            // Root, type, payload, no bits of a code, version 0, whatever flags, no options.
            (1, [0, 0, OPT_LOW, high, low, 0, 0, _, _, 0, 0]) => Some(u16::from_be_bytes([*high, *low])),
            _ => return None,
        };
        Some(Self { packet: head, name: text_of(packet.get(name)?)?, type_, payload })
    }

    /// The largest datagram that the asker takes, in bytes (RFC 6891, 6.2.3).
    pub(crate) fn payload(&self) -> usize {
        self.payload.map_or(wire::CLASSIC, |payload| wire::CLASSIC.max(payload.into()))
    }

    /// The reply, if it is addresses and has at most `limit` bytes.
    pub(crate) fn reply(
        &self,
        data: &Data<'_>,
        limit: usize,
        recursion_available: bool,
        own_payload: u16,
    ) -> Option<Vec<u8>> {
        let Data::Hosts { answered, .. } = data else { return None };
        let of_type = |address: &&IpAddr| match self.type_ {
            A => address.is_ipv4(),
            AAAA => address.is_ipv6(),
            _ => false,
        };
        let mut addresses: Vec<&IpAddr> = answered.iter().flat_map(|host| &host.addresses).filter(of_type).collect();
        let record = if self.type_ == A { A_RECORD } else { AAAA_RECORD };
        let length = self.packet.len() + addresses.len() * record + self.payload.map_or(0, |_| EDNS);
        if addresses.is_empty() || length > limit {
            return None;
        }
        addresses.shuffle(&mut rand::rng());
        let mut reply = Vec::with_capacity(length);
        reply.extend_from_slice(self.packet);
        self.put_header(&mut reply, u16::try_from(addresses.len()).ok()?, recursion_available)?;
        for address in addresses {
            put_record(&mut reply, *address);
        }
        if self.payload.is_some() {
            reply.extend([0, 0, OPT_LOW]);
            reply.extend(own_payload.to_be_bytes());
            reply.extend([0; 6]);
        }
        Some(reply)
    }

    fn put_header(&self, reply: &mut [u8], answers: u16, recursion_available: bool) -> Option<()> {
        let [_, _, flags, more, counts @ ..] = reply.first_chunk_mut::<{ wire::HEADER }>()?;
        *flags = RESPONSE | AUTHORITATIVE | (*flags & RECURSION_DESIRED);
        *more = (*more & CHECKING_DISABLED) | if recursion_available { RECURSION_AVAILABLE } else { 0 };
        let [high, low] = answers.to_be_bytes();
        *counts = [0, 1, high, low, 0, 0, 0, self.payload.is_some().into()];
        Some(())
    }
}

/// OPT's second byte; its first is 0.
const OPT_LOW: u8 = OPT.to_be_bytes()[1];

fn put_record(reply: &mut Vec<u8>, address: IpAddr) {
    let mut put = |type_: u16, data: &[u8]| {
        reply.extend(TO_QUESTION);
        reply.extend(type_.to_be_bytes());
        reply.extend(IN.to_be_bytes());
        reply.extend(TTL.to_be_bytes());
        reply.extend([0, data.len().to_le_bytes()[0]]);
        reply.extend_from_slice(data);
    };
    match address {
        IpAddr::V4(address) => put(A, &address.octets()),
        IpAddr::V6(address) => put(AAAA, &address.octets()),
    }
}

/// A name of the wire in lower case with dots; none if it is the root, too long, or has a character that no Kubernetes name has.
fn text_of(mut name: &[u8]) -> Option<String> {
    if name.len() > wire::LONGEST_NAME {
        return None;
    }
    let mut text = String::with_capacity(name.len());
    while let Some((length, rest)) = name.split_first().filter(|(length, _)| **length > 0) {
        let (label, rest) = rest.split_at_checked(usize::from(*length))?;
        if !text.is_empty() {
            text.push('.');
        }
        for byte in label {
            if !wire::is_of_names(*byte) {
                return None;
            }
            text.push(byte.to_ascii_lowercase().into());
        }
        name = rest;
    }
    (!text.is_empty()).then_some(text)
}
