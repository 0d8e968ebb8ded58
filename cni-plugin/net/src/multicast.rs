//! Whether a network's IP multicast goes to all or only where it was joined: the bridge's snooping of IGMP and MLD (RFC 4541).
//!
//! Each node's bridge looks after its own pods: it asks them what they have joined, and delivers accordingly. `vx0` is where routers are,
//! in the words of that RFC: all groups go there, so that no node has to know what others have joined. The questions and the answers stay
//! on their node: two bridges that ask would leave it to one of them, and a group that is joined elsewhere needs no place in this one's table.

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{BridgeMulticastRouterType, InfoBridge, InfoData, InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    tc::{TcAttribute, TcHandle, TcMessage},
};
use rtnetlink::{
    LinkBridgePort,
    packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE},
};
use serde::{Deserialize, Serialize};

use crate::{
    BRIDGE_MAC, TUNNEL,
    bpf::{At, Program},
    error::Result,
    guard::{Classifier, DROP, IPV4, IPV6, PASS, link_local},
    netlink::{Netlink, ok_if},
};

/// Where a network's IP multicast goes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum Multicast {
    /// To all pods.
    #[default]
    Flood,
    /// To those pods that have joined the group, and to the other nodes.
    Snooping,
}

/// How long a pod may take to answer what it has joined, in hundredths of a second. For so long the bridge floods after it began to snoop. The
/// kernel's default of ten seconds is for links with many hosts; here each is asked on a port of its own.
const RESPONSE: u64 = 100;
/// How long after the first question a bridge, or a new port, is asked once more, in hundredths of a second: what was lost or kept back the
/// first time is told then. Later it asks each 125 seconds.
const AGAIN: u64 = 200;
/// In which versions of IGMP and MLD the bridge asks. In the last ones each pod answers (RFC 3376, section 7.3.1). In those before, which are the
/// kernel's default, a pod that hears another's answer keeps its own to itself; and while the bridge still floods, pods hear each other.
const LAST_VERSIONS: [InfoBridge; 2] = [InfoBridge::MulticastIgmpVersion(3), InfoBridge::MulticastMldVersion(2)];
const FIRST_VERSIONS: [InfoBridge; 2] = [InfoBridge::MulticastIgmpVersion(2), InfoBridge::MulticastMldVersion(1)];
/// IGMP (RFC 3376, section 4), and in IPv6 a header of hop-by-hop options, which MLD always has (RFC 3810, section 5).
const IGMP: u32 = 2;
const HOP_BY_HOP: u32 = 0;
const ICMPV6: u32 = 58;
/// MLD's query, report, done, and report of version 2 (RFC 3810, section 5).
const MLD: [u32; 4] = [130, 131, 132, 143];
/// Where classifiers are that look at what goes out (tc-bpf(8)).
const EGRESS: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_EGRESS };

/// Makes the bridge, which is up and has `vx0` in it, flood or snoop. No frame is lost by the change: one that is flooded too often does no harm.
/// A gateway keeps its link-local address, by which it looks for pods.
pub(crate) async fn set(netlink: &Netlink, bridge: u32, multicast: Multicast, is_gateway: bool) -> Result<()> {
    let tunnel = netlink.index(TUNNEL).await?;
    match multicast {
        Multicast::Flood => flood(netlink, bridge, tunnel, is_gateway).await,
        Multicast::Snooping => snoop(netlink, bridge, tunnel).await,
    }
}

/// The bridge that asks begins last: then what it doesn't know yet has its way already.
async fn snoop(netlink: &Netlink, bridge: u32, tunnel: u32) -> Result<()> {
    set_router(netlink, tunnel, BridgeMulticastRouterType::Permanent).await?;
    keep_membership(netlink, tunnel).await?;
    // MLD asks from a link-local address (RFC 3810, section 5.1.14). A kernel without IPv6 has nothing to ask.
    let address = netlink.add_address(bridge, link_local_subnet()).await;
    ok_if(address, libc::EOPNOTSUPP)?;
    // Before the others, as the kernel would set it after them.
    let [igmp, mld] = LAST_VERSIONS;
    let [response, again] =
        [InfoBridge::MulticastQueryResponseInterval(RESPONSE), InfoBridge::MulticastStartupQueryInterval(AGAIN)];
    set_bridge(netlink, bridge, vec![response, again, igmp, mld]).await?;
    set_bridge(netlink, bridge, vec![InfoBridge::MulticastSnooping(true), InfoBridge::MulticastQuerier(true)]).await
}

/// A bridge that doesn't ask, and isn't told that somebody else does, takes nothing for certain of what it heard, and floods.
async fn flood(netlink: &Netlink, bridge: u32, tunnel: u32, is_gateway: bool) -> Result<()> {
    let [igmp, mld] = FIRST_VERSIONS;
    set_bridge(netlink, bridge, vec![InfoBridge::MulticastQuerier(false), igmp, mld]).await?;
    if !is_gateway {
        netlink.remove_address(bridge, link_local_subnet()).await?;
    }
    let mut filters = TcMessage::with_index(i32::try_from(tunnel).unwrap_or_default());
    filters.header.parent = TcHandle::CLSACT;
    let removed =
        netlink.send(RouteNetlinkMessage::DelQueueDiscipline(filters), 0, "remove the classifier of vx0").await;
    ok_if(ok_if(removed, libc::ENOENT), libc::EINVAL)?;
    set_router(netlink, tunnel, BridgeMulticastRouterType::TempQuery).await
}

async fn set_router(netlink: &Netlink, tunnel: u32, kind: BridgeMulticastRouterType) -> Result<()> {
    let port = LinkBridgePort::new(tunnel).mcast_router(kind).build();
    let set = netlink.handle().link().set_port(port).execute().await;
    set.map_err(|e| netlink.error("set whether all groups go to vx0", e))
}

async fn set_bridge(netlink: &Netlink, bridge: u32, options: Vec<InfoBridge>) -> Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = bridge;
    let info = vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(InfoData::Bridge(options))];
    message.attributes.push(LinkAttribute::LinkInfo(info));
    // Not `SetLink`, by which the kernel changes nothing that is of one kind of link only.
    netlink.send(RouteNetlinkMessage::NewLink(message), 0, "set br0's multicast snooping").await
}

/// The bridge's link-local address.
pub(crate) fn link_local_subnet() -> ipnet::IpNet {
    // 64 is less than 128.
    ipnet::Ipv6Net::new_assert(link_local(BRIDGE_MAC), 64).into()
}

/// Lets IGMP, MLD, and what the bridge itself says not out by `vx0`.
async fn keep_membership(netlink: &Netlink, tunnel: u32) -> Result<()> {
    let port = i32::try_from(tunnel).unwrap_or_default();
    let mut clsact = TcMessage::with_index(port);
    clsact.header.parent = TcHandle::CLSACT;
    clsact.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    clsact.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    let made = netlink.send(RouteNetlinkMessage::NewQueueDiscipline(clsact), flags, "make room for vx0's classifier");
    ok_if(made.await, libc::EEXIST)?;
    let mut classifier =
        Classifier { priority: 1, program: membership().bytes(), decides: true, to: None }.message(port);
    classifier.header.parent = EGRESS;
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    netlink.send(RouteNetlinkMessage::NewTrafficFilter(classifier), flags, "set the classifier of vx0").await
}

/// Drops what says who has joined, and what comes from the bridge. A frame that ends before what is looked at passes.
fn membership() -> Program {
    let mut p = Program::default();
    let (pass, drop) = (p.label(), p.label());
    let (from_pod, is_ipv4, is_ipv6) = (p.label(), p.label(), p.label());
    let [a, b, c, d, e, f] = BRIDGE_MAC.0;
    p.load(4, At::Frame(6));
    p.jump_unless(u32::from_be_bytes([a, b, c, d]), from_pod);
    p.load(2, At::Frame(10));
    p.jump_if(u32::from_be_bytes([0, 0, e, f]), drop);

    p.place(from_pod);
    p.load(2, At::Frame(12));
    p.jump_if(IPV4, is_ipv4);
    p.jump_if(IPV6, is_ipv6);
    p.jump(pass);

    p.place(is_ipv4);
    p.load(1, At::Frame(23));
    p.jump_if(IGMP, drop);
    p.jump(pass);

    p.place(is_ipv6);
    p.load(1, At::Frame(20));
    p.jump_unless(HOP_BY_HOP, pass);
    // Behind the fixed header, of 40 bytes after 14 of Ethernet; its options are a router alert, eight bytes with all.
    p.load(1, At::Frame(54));
    p.jump_unless(ICMPV6, pass);
    p.load(1, At::Frame(62));
    for kind in MLD {
        p.jump_if(kind, drop);
    }

    p.place(pass);
    p.end(PASS);
    p.place(drop);
    p.end(DROP);
    p
}
