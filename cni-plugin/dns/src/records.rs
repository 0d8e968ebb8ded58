//! From what the zone has of a name to the records of an answer.

use std::net::IpAddr;

use hickory_proto::ProtoError;
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use rand::seq::SliceRandom;

use crate::zone::{Data, Found, Host};

/// Seconds for which an answer may be kept: a pod that moved is found again after at most this.
pub(crate) const TTL: u32 = 1;
/// Bytes of one string of a TXT record (RFC 1035, 3.3).
const STRING: usize = 255;

/// Puts what was found into the reply to `question`.
pub(crate) fn fill(message: &mut Message, question: &Query, found: &Found<'_>) -> Result<(), ProtoError> {
    let (name, type_) = (&question.name, question.query_type);
    let is_asked = |kind| type_ == kind || type_ == RecordType::ANY;
    match &found.data {
        Data::Missing => message.metadata.response_code = ResponseCode::NXDomain,
        Data::Hosts { all, .. } if type_ == RecordType::TXT && found.is_explained => {
            message.answers = all.iter().map(|host| text(name, &explain(host))).collect();
        }
        Data::Hosts { answered, .. } => {
            let addresses = answered.iter().flat_map(|host| &host.addresses);
            let data = addresses.map(|address| of_address(*address)).filter(|data| is_asked(data.record_type()));
            message.answers = data.map(|data| Record::from_rdata(name.clone(), TTL, data)).collect();
            message.answers.shuffle(&mut rand::rng());
        }
        Data::Services(services) if is_asked(RecordType::SRV) => {
            // Whoever asks by a full name may know no others.
            let targets = services.iter().filter_map(|(host, port)| Some((name_of(host, &found.apex)?, *host, *port)));
            let mut targets: Vec<_> = targets.collect();
            targets.shuffle(&mut rand::rng());
            for (target, host, port) in targets {
                let addresses = host.addresses.iter().map(|address| of_address(*address));
                message.additionals.extend(addresses.map(|data| Record::from_rdata(target.clone(), TTL, data)));
                message.answers.push(Record::from_rdata(name.clone(), TTL, RData::SRV(SRV::new(0, 1, port, target))));
            }
        }
        Data::Address(host) if is_asked(RecordType::PTR) => {
            let pointer = name_of(host, found.network).map(|target| RData::PTR(PTR(target)));
            message.answers = pointer.into_iter().map(|data| Record::from_rdata(name.clone(), TTL, data)).collect();
        }
        Data::Ambiguous(namespaces) if type_ == RecordType::TXT => {
            let said =
                format!("ambiguous: namespaces {} have this name; ask with the namespace", namespaces.join(", "));
            message.answers = vec![text(name, &said)];
        }
        Data::Services(_) | Data::Address(_) | Data::Ambiguous(_) => {}
    }
    // Most answers need none, and it takes longer to make than they do.
    if type_ != RecordType::SOA && !message.answers.is_empty() {
        return Ok(());
    }
    let authority = authority(&found.apex)?;
    if type_ == RecordType::SOA && authority.name == *name {
        message.answers = vec![authority];
    } else if message.answers.is_empty() {
        message.authorities = vec![authority];
    }
    Ok(())
}

/// The message's bytes. Leaves out as many records as needed and says so (TC): whoever can't ask again by TCP still has some.
pub(crate) fn fitted(message: &mut Message, limit: usize) -> Result<Vec<u8>, ProtoError> {
    loop {
        let bytes = message.to_vec()?;
        if bytes.len() <= limit {
            return Ok(bytes);
        }
        // What is only additional may be left out without a word (RFC 2181, 9).
        if !message.additionals.is_empty() {
            message.additionals.clear();
            continue;
        }
        let count = message.answers.len();
        message.metadata.truncation = true;
        message.answers.truncate((count * limit / bytes.len()).min(count.saturating_sub(1)));
        if count == 0 {
            return message.to_vec();
        }
    }
}

fn of_address(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    }
}

/// A pod's own name below a network's domain; none if it is longer than a name may be (RFC 1035, 3.1).
fn name_of(host: &Host, domain: &str) -> Option<Name> {
    Name::from_ascii(format!("{}.{}.{domain}.", host.pod, host.namespace)).ok()
}

/// What a person wants to know of a pod that has a name.
fn explain(host: &Host) -> String {
    let addresses: Vec<String> = host.addresses.iter().map(IpAddr::to_string).collect();
    let why = match (host.ready, host.publish_not_ready) {
        (true, _) if host.node_is_silent => "ready=true (its node doesn't answer: not answered beside others)",
        (true, _) => "ready=true",
        (false, true) => "ready=false answered=true (it asks for that)",
        (false, false) => "ready=false answered=false",
    };
    format!("pod={}/{} node={} address={} {why}", host.namespace, host.pod, host.node, addresses.join(","))
}

fn text(name: &Name, text: &str) -> Record {
    let data = TXT::from_bytes(text.as_bytes().chunks(STRING).collect());
    Record::from_rdata(name.clone(), TTL, RData::TXT(data))
}

/// The record that says for how long a negative answer holds (RFC 2308: the lesser of its TTL and its last field).
fn authority(apex: &str) -> Result<Record, ProtoError> {
    let name = |text: String| Name::from_ascii(text);
    let (server, contact) = (name(format!("ns.{apex}."))?, name(format!("hostmaster.{apex}."))?);
    let soa = SOA::new(server, contact, 1, 3600, 600, 86400, TTL);
    Ok(Record::from_rdata(name(format!("{apex}."))?, TTL, RData::SOA(soa)))
}
