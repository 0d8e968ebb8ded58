//! What a pod may say of itself: a port's guard drops frames by which its pod would pass for another.
//!
//! It is two classifiers at the ingress of the port (tc-bpf(8)), where the pod's frames enter, before the bridge sees them. The first
//! lets frames pass that say the truth, the second drops what is left. They are the kernel's: they need no process of ours, and go
//! with the port.

use std::net::Ipv6Addr;

use futures::TryStreamExt;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{
        TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
        TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcMirror, TcOption,
    },
};
use rtnetlink::packet_core::{DefaultNla, Emitable, NLM_F_CREATE, NLM_F_REPLACE, Nla, NlasIterator, Parseable};
use serde::{Deserialize, Serialize};

use crate::{
    Mac, PortSpec,
    bpf::{At, INSTRUCTION, Label, Program},
    error::{Error, Result},
    netlink::{Netlink, ok_if},
};

/// The addresses that a pod may use beside those of its interface.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Allowed {
    /// All: the port has no guard.
    Any,
    /// Those of these subnets.
    Further(Vec<IpNet>),
}

impl Default for Allowed {
    fn default() -> Self {
        Self::Further(Vec::new())
    }
}

impl Allowed {
    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// EtherTypes (IEEE 802 numbers, IANA).
pub(crate) const IPV4: u32 = 0x0800;
pub(crate) const ARP: u32 = 0x0806;
pub(crate) const IPV6: u32 = 0x86dd;
/// Tags of VLANs. The kernel takes the first one off a frame before it is looked at: here it is a tag within a tag.
const TAGS: [u32; 2] = [0x8100, 0x88a8];

/// Verdicts of a classifier (tc-bpf(8)): "it is mine, and nothing is to be done to it", and "ask the next".
pub(crate) const PASS: u32 = u32::MAX;
const NEXT: u32 = 0;
/// The verdict of one that says itself what is to be done: `TC_ACT_SHOT` (`linux/pkt_cls.h`).
pub(crate) const DROP: u32 = 2;

/// How many extension headers of an IPv6 packet are followed to find its message. RFC 8200 (section 4.1) knows five; a packet with more
/// than these is dropped.
const EXTENSIONS: usize = 4;
/// ICMPv6, and the headers that lead to it (RFC 8200, section 4): hop-by-hop options, routing, destination options; fragment.
pub(crate) const ICMPV6: u32 = 58;
const OPTIONS: [u32; 3] = [0, 43, 60];
const FRAGMENT: u32 = 44;
/// A neighbour advertisement (RFC 4861, section 4.4).
pub(crate) const ADVERTISEMENT: u32 = 136;

/// Attributes that the netlink library has no names for (`linux/pkt_cls.h`): actions, and a classic program's length and instructions.
const ACTIONS: u16 = 1;
const OPS_LENGTH: u16 = 4;
const OPS: u16 = 5;
/// `ETH_P_ALL` in network byte order, as classifiers have it.
const ALL_PROTOCOLS: u32 = 0x0300;

/// A classifier of the guard: its priority, program, and whether the program says itself what is to be done. If not, frames that are its own may
/// be led to another link.
pub(crate) struct Classifier {
    pub priority: u32,
    pub program: Vec<u8>,
    pub decides: bool,
    pub to: Option<u32>,
}

/// Makes a port's guard what the spec says: none, or the two classifiers. What changes is replaced in one step. What passes goes by the link
/// `to`, if there is one.
pub(crate) async fn set(network: &Netlink, index: u32, spec: &PortSpec, to: Option<u32>) -> Result<()> {
    let port = i32::try_from(index).unwrap_or_default();
    let wanted = classifiers(spec, to);
    let is_right = present(network, port).await? == wanted.iter().map(Classifier::facts).collect::<Vec<_>>();
    if spec.allowed == Allowed::Any && (wanted.is_empty() || !is_right) {
        let mut ingress = TcMessage::with_index(port);
        ingress.header.parent = TcHandle::INGRESS;
        let action = format!("remove the guard of port {}", spec.port);
        let removed = network.send(RouteNetlinkMessage::DelQueueDiscipline(ingress), 0, action).await;
        ok_if(ok_if(removed, libc::ENOENT), libc::EINVAL)?;
    }
    if wanted.is_empty() {
        return Ok(());
    }
    let made = network.handle().qdisc().add(port).ingress().execute().await;
    ok_if(made.map_err(|e| network.error(format!("make the guard of port {}", spec.port), e)), libc::EEXIST)?;
    let present = present(network, port).await?;
    // The one that drops comes last: until then a port that is in use goes on.
    for classifier in wanted {
        if present.contains(&classifier.facts()) {
            continue;
        }
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        let action = format!("set the guard of port {}", spec.port);
        network.send(RouteNetlinkMessage::NewTrafficFilter(classifier.message(port)), flags, action).await?;
    }
    Ok(())
}

/// Whether a port's guard is what the spec says, and what passes goes by the link `to`.
pub(crate) async fn check(network: &Netlink, index: u32, spec: &PortSpec, to: Option<u32>) -> Result<()> {
    let present = present(network, i32::try_from(index).unwrap_or_default()).await?;
    let wanted: Vec<_> = classifiers(spec, to).iter().map(Classifier::facts).collect();
    if present == wanted {
        return Ok(());
    }
    Err(Error::NotGuarded { port: spec.port.clone(), place: network.place().to_owned() })
}

/// What tells a classifier from another: priority, program, whether it decides, and where it leads to.
type Facts = (u32, Vec<u8>, bool, Option<u32>);

/// The classifiers that a port has, in the order in which they are asked.
async fn present(network: &Netlink, port: i32) -> Result<Vec<Facts>> {
    let listed = network.handle().traffic_filter(port).get().ingress().execute().try_collect::<Vec<_>>().await;
    let listed = match listed.map_err(|e| network.error("list classifiers", e)) {
        // There is nothing that could have some.
        Err(e) if e.is_errno(libc::EINVAL) || e.is_errno(libc::ENOENT) => return Ok(Vec::new()),
        other => other?,
    };
    let mut present: Vec<_> = listed.iter().filter_map(facts).collect();
    present.sort();
    Ok(present)
}

fn facts(message: &TcMessage) -> Option<Facts> {
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let (mut program, mut decides, mut to) = (Vec::new(), false, None);
    for option in options {
        match option {
            TcOption::Bpf(TcFilterBpfOption::Flags(flags)) => decides = flags.contains(TcBpfFlags::DirectAction),
            TcOption::Bpf(TcFilterBpfOption::Other(other)) if other.kind() == OPS => {
                program = vec![0; other.value_len()];
                other.emit_value(&mut program);
            }
            TcOption::Bpf(TcFilterBpfOption::Other(other)) if other.kind() == ACTIONS => to = led_to(other),
            _ => {}
        }
    }
    Some((message.header.info >> 16, program, decides, to))
}

/// The link that the actions of a classifier lead to.
fn led_to(actions: &DefaultNla) -> Option<u32> {
    let mut bytes = vec![0; actions.value_len()];
    actions.emit_value(&mut bytes);
    let actions = NlasIterator::new(&bytes[..]).filter_map(|action| TcAction::parse(&action.ok()?).ok());
    let attributes: Vec<_> = actions.flat_map(|action| action.attributes).collect();
    let options = attributes.iter().filter_map(|attribute| match attribute {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    });
    options.flatten().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(to)) => Some(to.ifindex),
        _ => None,
    })
}

/// The action that sends what a classifier has for its own out by a link (tc-mirred(8)).
fn lead(to: u32) -> TcFilterBpfOption {
    let mut parameters = TcMirror::default();
    parameters.generic.action = TcActionType::Stolen;
    parameters.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(parameters))]),
    ];
    let mut bytes = vec![0; action.buffer_len()];
    action.emit(&mut bytes);
    TcFilterBpfOption::Other(DefaultNla::new(ACTIONS, bytes))
}

impl Classifier {
    fn facts(&self) -> Facts {
        (self.priority, self.program.clone(), self.decides, self.to)
    }

    pub fn message(&self, port: i32) -> TcMessage {
        let length = u16::try_from(self.program.len() / INSTRUCTION).unwrap_or(u16::MAX);
        let flags = if self.decides { TcBpfFlags::DirectAction } else { TcBpfFlags::empty() };
        let options = [
            TcFilterBpfOption::Other(DefaultNla::new(OPS_LENGTH, length.to_ne_bytes().to_vec())),
            TcFilterBpfOption::Other(DefaultNla::new(OPS, self.program.clone())),
            // Of a classifier that doesn't decide: what frames that are its own are counted as. Nobody counts them.
            TcFilterBpfOption::ClassId(TcHandle { major: 0, minor: 1 }),
            TcFilterBpfOption::Flags(flags),
        ];
        let options = options.into_iter().chain(self.to.map(lead)).map(TcOption::Bpf);
        let mut message = TcMessage::with_index(port);
        message.header.parent = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
        message.header.handle = TcHandle { major: 0, minor: 1 };
        message.header.info = self.priority << 16 | ALL_PROTOCOLS;
        message.attributes =
            vec![TcAttribute::Kind(TcFilterBpf::KIND.to_owned()), TcAttribute::Options(options.collect())];
        message
    }
}

fn classifiers(spec: &PortSpec, to: Option<u32>) -> Vec<Classifier> {
    let always = |verdict| {
        let mut program = Program::default();
        program.end(verdict);
        program.bytes()
    };
    match (&spec.allowed, to) {
        (Allowed::Any, None) => Vec::new(),
        (Allowed::Any, Some(_)) => vec![Classifier { priority: 1, program: always(PASS), decides: false, to }],
        (Allowed::Further(_), _) => vec![
            Classifier { priority: 1, program: truthful(spec).bytes(), decides: false, to },
            Classifier { priority: 2, program: always(DROP), decides: true, to: None },
        ],
    }
}

/// Lets frames pass that say the truth. A frame that ends before what has to be looked at does not: the kernel ends a program that
/// reads beyond it with 0, which is [`NEXT`].
fn truthful(spec: &PortSpec) -> Program {
    let further = match &spec.allowed {
        Allowed::Any => &[][..],
        Allowed::Further(further) => further,
    };
    let own = spec.addresses.iter().map(|address| IpNet::from(address.addr()));
    let sources: Vec<IpNet> = own.chain(further.iter().copied()).collect();
    let ipv4: Vec<IpNet> = sources.iter().copied().filter(|s| matches!(s, IpNet::V4(_))).collect();
    let link_local = IpNet::from(Ipv6Net::from(link_local(spec.mac)));
    let ipv6 = sources.iter().copied().filter(|s| matches!(s, IpNet::V6(_))).chain([link_local]).collect::<Vec<_>>();

    let mut p = Program::default();
    let (pass, refuse) = (p.label(), p.label());
    let (is_ipv4, is_ipv6, is_arp) = (p.label(), p.label(), p.label());
    p.load(2, At::Frame(12));
    p.jump_if(IPV4, is_ipv4);
    p.jump_if(IPV6, is_ipv6);
    p.jump_if(ARP, is_arp);
    for tag in TAGS {
        p.jump_if(tag, refuse);
    }
    p.jump(pass);

    p.place(is_ipv4);
    // Who has no address yet says 0.0.0.0 (RFC 2131, section 4.1; RFC 5227, section 2.1.1).
    let nobody = IpNet::from(Ipv4Net::from(std::net::Ipv4Addr::UNSPECIFIED));
    for subnet in ipv4.iter().chain([&nobody]) {
        p.jump_if_within(At::Frame(26), *subnet, pass);
    }
    p.jump(refuse);

    p.place(is_arp);
    // For IPv4 over addresses of six bytes; then the sender's two addresses (RFC 826).
    p.load(4, At::Frame(16));
    p.jump_unless(0x0800_0604, refuse);
    let [a, b, c, d, e, f] = spec.mac.0;
    p.load(4, At::Frame(22));
    p.jump_unless(u32::from_be_bytes([a, b, c, d]), refuse);
    p.load(2, At::Frame(26));
    p.jump_unless(u32::from_be_bytes([0, 0, e, f]), refuse);
    for subnet in ipv4.iter().chain([&nobody]) {
        p.jump_if_within(At::Frame(28), *subnet, pass);
    }
    p.jump(refuse);

    p.place(is_ipv6);
    let source_is_right = p.label();
    // Who asks whether an address is free says :: (RFC 4862, section 5.4.2), and so may who joins a group (RFC 3810, section 5.2.13).
    let nobody = IpNet::from(Ipv6Net::from(Ipv6Addr::UNSPECIFIED));
    for subnet in ipv6.iter().chain([&nobody]) {
        p.jump_if_within(At::Frame(22), *subnet, source_is_right);
    }
    p.jump(refuse);

    p.place(source_is_right);
    let is_icmp = p.label();
    find_icmp(&mut p, is_icmp, pass, refuse);
    p.place(is_icmp);
    p.load(1, At::Index(0));
    p.jump_unless(ADVERTISEMENT, pass);
    for subnet in &ipv6 {
        p.jump_if_within(At::Index(8), *subnet, pass);
    }
    p.jump(refuse);

    p.place(pass);
    p.end(PASS);
    p.place(refuse);
    p.end(NEXT);
    p
}

/// Follows an IPv6 packet's headers. At `is_icmp` the index register points to the ICMPv6 message. What is not the beginning of one
/// passes: a later fragment has no header to look at, and hosts take no neighbour discovery in fragments (RFC 6980).
fn find_icmp(p: &mut Program, is_icmp: Label, pass: Label, refuse: Label) {
    const KIND: u32 = 0;
    const LENGTH: u32 = 1;
    // The fixed header is of 40 bytes, after 14 of Ethernet; its field "next header" is its seventh.
    p.push(libc::BPF_LDX | libc::BPF_W | libc::BPF_IMM, 54);
    p.load(1, At::Frame(20));
    for _ in 0..EXTENSIONS {
        let (fragment, options, next) = (p.label(), p.label(), p.label());
        p.jump_if(ICMPV6, is_icmp);
        p.jump_if(FRAGMENT, fragment);
        for kind in OPTIONS {
            p.jump_if(kind, options);
        }
        p.jump(pass);

        p.place(fragment);
        p.load(2, At::Index(2));
        p.jump_if_any(0xfff8, pass);
        p.load(1, At::Index(0));
        p.push(libc::BPF_ST, KIND);
        p.push(libc::BPF_LD | libc::BPF_IMM, 8);
        p.jump(next);

        p.place(options);
        p.load(1, At::Index(0));
        p.push(libc::BPF_ST, KIND);
        // In units of eight bytes, less the first (RFC 8200, section 4.3).
        p.load(1, At::Index(1));
        p.push(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K, 1);
        p.push(libc::BPF_ALU | libc::BPF_LSH | libc::BPF_K, 3);

        p.place(next);
        p.push(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_X, 0);
        p.push(libc::BPF_ST, LENGTH);
        p.push(libc::BPF_LDX | libc::BPF_W | libc::BPF_MEM, LENGTH);
        p.push(libc::BPF_LD | libc::BPF_MEM, KIND);
    }
    p.jump_if(ICMPV6, is_icmp);
    for kind in OPTIONS.into_iter().chain([FRAGMENT]) {
        p.jump_if(kind, refuse);
    }
    p.jump(pass);
}

/// The link-local address of an interface with this MAC (RFC 4291, appendix A).
pub(crate) fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0.map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_local_address_is_as_the_kernel_makes_it() {
        let mac = Mac([0x02, 0x1f, 0x0a, 0x20, 0x00, 0x05]);
        assert_eq!(link_local(mac).to_string(), "fe80::1f:aff:fe20:5");
    }
}
