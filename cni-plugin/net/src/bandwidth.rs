//! How fast a pod may receive and send: token buckets (tc-tbf(8)), which are the kernel's and go with the port.
//!
//! What goes to the pod waits in a bucket at the root of its port. What comes from it can't wait where it comes in: the port's guard leads what it
//! lets pass to an interface of its own, an ifb, whose root has the other bucket. From there it comes back to the port, behind the guard, as if
//! it had just come in. A classifier could also drop what is too much at once (`police`); but a connection gets less out of that, and not
//! each kernel that the nodes may have was built with it.

use futures::TryStreamExt;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};
use rtnetlink::{
    LinkUnspec,
    packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE, Nla, NlasIterator},
};
use serde::{Deserialize, Serialize};

use crate::{
    PortSpec,
    error::{Error, Result},
    mac::is_port_name,
    netlink::{Netlink, ok_if},
};

/// What a pod may receive and send by one interface; without a limit, as much as it can.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    /// To the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Limit>,
    /// From the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Limit>,
}

impl Bandwidth {
    /// Whether there are no limits.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// A token bucket.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Limit {
    /// In bits a second.
    pub rate: u64,
    /// What may go at once after a pause, in bits.
    pub burst: u64,
}

const KIND: &str = "tbf";
/// The bucket's own handle: by it the kernel knows that it is to change the one that is there.
const HANDLE: TcHandle = TcHandle { major: 1, minor: 0 };
/// Attributes (`linux/pkt_sched.h`): `struct tc_tbf_qopt`, a rate that needs more than 32 bits, the burst in bytes.
const PARAMETERS: u16 = 1;
const RATE64: u16 = 4;
const BURST: u16 = 6;
/// Where in `struct tc_tbf_qopt` the rate and the limit are. Before it is the rest of a `struct tc_ratespec`, between them another one.
const RATE_AT: usize = 8;
const LIMIT_AT: usize = 24;
const PARAMETERS_LENGTH: usize = 36;
/// `TC_LINKLAYER_ETHERNET`, in that structure's second byte: the kernel itself reckons how long a frame takes.
const ETHERNET: u8 = 1;
/// How much waits, in bytes, beside what may go at once: what goes in 50 ms; at least a packet as large as the kernel makes them, at most what
/// a node can spare.
const QUEUE_PARTS_OF_A_SECOND: u64 = 20;
const LEAST_QUEUE: u64 = 64 * 1024;
const LARGEST_QUEUE: u64 = 64 * 1024 * 1024;

impl Limit {
    /// In bytes a second.
    fn bytes(self) -> u64 {
        (self.rate / 8).max(1)
    }

    /// The bytes that may wait: what is more is dropped.
    fn limit(self) -> u32 {
        let queue = (self.bytes() / QUEUE_PARTS_OF_A_SECOND).clamp(LEAST_QUEUE, LARGEST_QUEUE);
        u32::try_from(queue.saturating_add(self.burst / 8)).unwrap_or(u32::MAX)
    }

    fn facts(self) -> Facts {
        (self.bytes(), self.limit())
    }

    /// As the root of a link.
    fn message(self, link: u32) -> TcMessage {
        let mut parameters = [0; PARAMETERS_LENGTH];
        parameters[1] = ETHERNET;
        let rate = u32::try_from(self.bytes()).unwrap_or(u32::MAX);
        parameters[RATE_AT..RATE_AT + 4].copy_from_slice(&rate.to_ne_bytes());
        parameters[LIMIT_AT..LIMIT_AT + 4].copy_from_slice(&self.limit().to_ne_bytes());
        let burst = u32::try_from(self.burst / 8).unwrap_or(u32::MAX);
        let options = [
            DefaultNla::new(PARAMETERS, parameters.to_vec()),
            DefaultNla::new(RATE64, self.bytes().to_ne_bytes().to_vec()),
            DefaultNla::new(BURST, burst.to_ne_bytes().to_vec()),
        ];
        let mut message = root_of(link);
        message.header.handle = HANDLE;
        message.attributes =
            vec![TcAttribute::Kind(KIND.to_owned()), TcAttribute::Options(options.map(TcOption::Other).to_vec())];
        message
    }
}

/// What tells a bucket from another: bytes a second, and the bytes that may wait, which are the burst and what the rate makes of it. (The kernel tells
/// the burst itself only as the time that it takes.)
type Facts = (u64, u32);

/// The name of the interface by which comes what a port's pod sends: `p…` with another first letter.
pub(crate) fn shaper_name(port: &str) -> String {
    format!("i{}", port.get(1..).unwrap_or_default())
}

/// Whether a link's name is one that `shaper_name` makes.
pub(crate) fn is_shaper_name(name: &str) -> bool {
    name.strip_prefix('i').is_some_and(|rest| is_port_name(&format!("p{rest}")))
}

/// Makes the interface that slows what the pod sends, if it is to be slowed; returns its index.
pub(crate) async fn ensure_shaper(network: &Netlink, spec: &PortSpec) -> Result<Option<u32>> {
    let Some(limit) = spec.bandwidth.egress else { return Ok(None) };
    let name = shaper_name(&spec.port);
    if network.link(&name).await?.is_none() {
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::IfName(name.clone()));
        link.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]));
        network.add_link(link, format!("make ifb {name}")).await?;
    }
    let index = network.index(&name).await?;
    set_bucket(network, index, &name, Some(limit)).await?;
    network.set_link(LinkUnspec::new_with_index(index).up().build(), format!("bring {name} up")).await?;
    Ok(Some(index))
}

/// Limits what goes to the pod, and removes the interface that nothing is led to any more.
pub(crate) async fn set(network: &Netlink, index: u32, spec: &PortSpec) -> Result<()> {
    set_bucket(network, index, &spec.port, spec.bandwidth.ingress).await?;
    if spec.bandwidth.egress.is_none() {
        network.remove_link(&shaper_name(&spec.port)).await?;
    }
    Ok(())
}

/// Whether a port is held to what the spec says; returns the interface that slows what the pod sends.
pub(crate) async fn check(network: &Netlink, index: u32, spec: &PortSpec) -> Result<Option<u32>> {
    let shaper = network.link(&shaper_name(&spec.port)).await?.map(|link| link.header.index);
    let from_pod = match shaper {
        Some(shaper) => bucket(network, shaper).await?,
        None => None,
    };
    let wanted = [spec.bandwidth.ingress, spec.bandwidth.egress].map(|limit| limit.map(Limit::facts));
    if [bucket(network, index).await?, from_pod] == wanted && shaper.is_some() == wanted[1].is_some() {
        return Ok(shaper);
    }
    Err(Error::NotLimited { port: spec.port.clone(), place: network.place().to_owned() })
}

/// Makes the root of a link what it is to be. A bucket that is there is changed, and what waits in it stays.
async fn set_bucket(network: &Netlink, link: u32, name: &str, limit: Option<Limit>) -> Result<()> {
    let present = bucket(network, link).await?;
    if present == limit.map(Limit::facts) {
        return Ok(());
    }
    let action = format!("set the bandwidth of {name}");
    match limit {
        Some(limit) => {
            let flags = NLM_F_CREATE | NLM_F_REPLACE;
            network.send(RouteNetlinkMessage::NewQueueDiscipline(limit.message(link)), flags, action).await
        }
        None => {
            let removed = network.send(RouteNetlinkMessage::DelQueueDiscipline(root_of(link)), 0, action).await;
            ok_if(removed, libc::ENOENT)
        }
    }
}

fn root_of(link: u32) -> TcMessage {
    let mut message = TcMessage::with_index(i32::try_from(link).unwrap_or_default());
    message.header.parent = TcHandle::ROOT;
    message
}

/// The bucket at the root of a link.
async fn bucket(network: &Netlink, link: u32) -> Result<Option<Facts>> {
    let listed = network.handle().qdisc().get().execute().try_collect::<Vec<_>>().await;
    let listed = listed.map_err(|e| network.error("list queues", e))?;
    let index = i32::try_from(link).unwrap_or_default();
    let root = listed.iter().find(|it| it.header.index == index && it.header.parent == TcHandle::ROOT);
    Ok(root.and_then(facts))
}

fn facts(message: &TcMessage) -> Option<Facts> {
    if !message.attributes.contains(&TcAttribute::Kind(KIND.to_owned())) {
        return None;
    }
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => options.first(),
        _ => None,
    })?;
    // Of a kind that the library doesn't know it gives all options as one.
    let TcOption::Other(all) = options else { return None };
    let mut bytes = vec![0; all.value_len()];
    all.emit_value(&mut bytes);
    let (mut rate, mut limit) = (0, 0);
    for option in NlasIterator::new(&bytes[..]).flatten() {
        let word = |at: usize| Some(u32::from_ne_bytes(option.value().get(at..at + 4)?.try_into().ok()?));
        match option.kind() {
            PARAMETERS => (rate, limit) = (rate.max(u64::from(word(RATE_AT)?)), word(LIMIT_AT)?),
            RATE64 => rate = u64::from_ne_bytes(option.value().try_into().ok()?),
            _ => {}
        }
    }
    Some((rate, limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_bounded() {
        let limit = |rate, burst| Limit { rate, burst }.limit();
        assert_eq!(limit(8_000_000, 800_000), 64 * 1024 + 100_000, "room for a packet as large as they get");
        assert_eq!(limit(8_000_000_000, 800_000), 50_000_000 + 100_000, "50 ms");
        assert_eq!(limit(1_000_000_000_000, 800_000), 64 * 1024 * 1024 + 100_000, "what a node can spare");
        assert_eq!(limit(u64::MAX, u64::MAX), u32::MAX, "as much as the kernel can count");
    }
}
