//! A network's way outside: a gateway that is the same on every node, and each node's own.
//!
//! The bridge has the first host address of each subnet, with the MAC that it has on every node. The network's namespace has a pair of veth to
//! the host's: `gw0`, and there `pgw<vni>`. Its packets have an address of that pair when they get to the host (networks may have the same
//! subnets), and the host's when they leave it.
//!
//! `gw0` is made first and removed last: where it isn't, nothing else of this is.

mod rules;

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
};

use futures::TryStreamExt;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::{
    address::AddressAttribute,
    link::{InfoData, InfoVeth, LinkAttribute, LinkMessage},
};
use rtnetlink::{LinkUnspec, LinkVeth};

use crate::{
    BRIDGE, BRIDGE_MAC, Dataplane, announcement,
    error::{Error, Result},
    ipam::gateway,
    multicast,
    namespace::Namespace,
    netlink::{Netlink, link_name},
    network::{ARP, NO_ARP, OWN_ARP, ROUTES_NOTHING},
    nft, sysctl,
};

/// What the addresses between networks and their host are taken from: two for each network, link-local (RFC 3927), of no meaning elsewhere.
pub const TRANSIT: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 64, 0), 20);
/// The same in IPv6 (RFC 4193).
pub const TRANSIT_IPV6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd70, 0x6f72, 0x746f, 0x6c00, 0, 0, 0, 0), 64);
/// How many networks can have a gateway on one node.
const SLOTS: u16 = 1 << (32 - 20 - 1);
/// The network's end of the way to the host.
pub(crate) const LINK: &str = "gw0";
/// How the host's ends are called, before the VNI.
const HOST_LINKS: &str = "pgw";

/// One network's way outside.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Egress {
    /// The network.
    pub vni: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its subnets, at most one of a family. Each has its gateway ([`gateway`]).
    pub subnets: Vec<IpNet>,
    /// UDP port of all networks' tunnels.
    pub tunnel_port: u16,
}

/// What keeps packets from leaving the host, and isn't ours to change.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Obstacle {
    /// It forwards no IPv4.
    Ipv4Forwarding,
    /// It forwards no IPv6.
    Ipv6Forwarding,
}

impl Obstacle {
    fn parameter(self) -> &'static str {
        match self {
            Self::Ipv4Forwarding => "ipv4/ip_forward",
            Self::Ipv6Forwarding => "ipv6/conf/all/forwarding",
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.parameter().replace('/', ".");
        write!(f, "the host forwards nothing: net.{name} is not 1 (sysctl -w net.{name}=1)")
    }
}

/// The two ends' addresses of a slot.
fn transit(slot: u16) -> [(IpNet, IpNet); 2] {
    let first = u32::from(slot) * 2;
    let ipv4 = |n: u32| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from_bits(TRANSIT.network().to_bits() + n), 31));
    let ipv6 = |n: u32| {
        IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from_bits(TRANSIT_IPV6.network().to_bits() + u128::from(n)), 127))
    };
    [(ipv4(first), ipv4(first + 1)), (ipv6(first), ipv6(first + 1))]
}

/// The slot of an address; none for one that isn't between a network and the host.
fn slot_of(address: IpAddr) -> Option<u16> {
    let offset = match address {
        IpAddr::V4(address) if TRANSIT.contains(&address) => {
            u128::from(address.to_bits() - TRANSIT.network().to_bits())
        }
        IpAddr::V6(address) if TRANSIT_IPV6.contains(&address) => address.to_bits() - TRANSIT_IPV6.network().to_bits(),
        _ => return None,
    };
    u16::try_from(offset / 2).ok().filter(|slot| *slot < SLOTS)
}

/// The slot that a network has on the host, or else the first that nobody has. `addresses` are the host's, and whether each is of the network's link.
fn slot(addresses: &[(IpAddr, bool)]) -> Option<u16> {
    let slots =
        |own: bool| addresses.iter().filter(move |(_, is_own)| *is_own == own).filter_map(|(it, _)| slot_of(*it));
    let taken: BTreeSet<u16> = slots(false).collect();
    slots(true).find(|slot| !taken.contains(slot)).or_else(|| (0..SLOTS).find(|slot| !taken.contains(slot)))
}

fn host_link(vni: u32) -> String {
    format!("{HOST_LINKS}{vni}")
}

/// Both ends of a network's way to the host.
struct Way {
    inside: Namespace,
    network: Netlink,
    outside: Namespace,
    host: Netlink,
}

impl Dataplane {
    /// Gives a network that is set up here its way outside. Returns what keeps packets from going on all the same. Needs the host's `nft`. Not for
    /// two networks at the same time.
    ///
    /// # Errors
    /// [`Error::NoNetwork`] when the network isn't set up here; what `nft` or the kernel refuses: what was made by then stays, for the next try.
    pub async fn ensure_egress(&self, wanted: &Egress) -> Result<Vec<Obstacle>> {
        let way = self.way(wanted.vni)?;
        let bridge = way.network.index(BRIDGE).await?;
        let (inner, outer) = ensure_pair(&way, wanted).await?;
        // Before anything can pass.
        nft::run(self.programs(), way.inside.again()?, rules::of_network(wanted)).await?;
        nft::run(self.programs(), way.outside.again()?, rules::of_host(wanted.tunnel_port)).await?;
        connect(&way, wanted, inner, outer).await?;
        tell_pods(&way, wanted, bridge).await?;
        for subnet in &wanted.subnets {
            way.network.add_address(bridge, IpNet::from(gateway(*subnet))).await?;
            if subnet.addr().is_ipv6() {
                // What comes from outside for a pod that isn't known by its MAC makes the bridge ask for it, which it does from such an address only
                // (RFC 4861, section 7.2.2). Without a gateway `ensure_network` takes it away.
                way.network.add_address(bridge, multicast::link_local_subnet()).await?;
                way.network.add_route(bridge, *subnet, None).await?;
            }
        }
        sysctl::set(&way.inside, &[(ARP, OWN_ARP), ("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
        obstacles(&way.outside, wanted)
    }

    /// Takes a network its way outside; it is right if it has none, or isn't set up here. `subnets` are those that it was given for.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn remove_egress(&self, vni: u32, subnets: &[IpNet]) -> Result<()> {
        let way = match self.way(vni) {
            Err(Error::NoNetwork { .. }) => return Ok(()),
            other => other?,
        };
        if way.network.link(LINK).await?.is_none() {
            return Ok(());
        }
        sysctl::set(&way.inside, &ROUTES_NOTHING)?;
        sysctl::set(&way.inside, &[(ARP, NO_ARP)])?;
        if let Some(bridge) = way.network.link(BRIDGE).await? {
            for subnet in subnets {
                way.network.remove_address(bridge.header.index, IpNet::from(gateway(*subnet))).await?;
                if subnet.addr().is_ipv6() {
                    way.network.remove_route(bridge.header.index, *subnet).await?;
                }
            }
        }
        nft::remove_table(self.programs(), way.inside.again()?, &rules::ROUTED).await?;
        nft::remove_table(self.programs(), way.inside.again()?, &rules::BRIDGED).await?;
        let own = host_link(vni);
        let links = way.host.links().await?;
        let is_others =
            |name: &str| name != own && name.strip_prefix(HOST_LINKS).is_some_and(|vni| vni.parse::<u32>().is_ok());
        if !links.iter().filter_map(link_name).any(is_others) {
            nft::remove_table(self.programs(), way.outside.again()?, &rules::ROUTED).await?;
        }
        way.network.remove_link(LINK).await
    }

    fn way(&self, vni: u32) -> Result<Way> {
        let (inside, outside) = (self.namespace(vni)?, self.underlay()?);
        let (network, host) = (Netlink::open(&inside)?, Netlink::open(&outside)?);
        Ok(Way { inside, network, outside, host })
    }
}

/// Makes the pair, if it isn't there; returns the indexes of the network's end and the host's.
async fn ensure_pair(way: &Way, wanted: &Egress) -> Result<(u32, u32)> {
    let name = host_link(wanted.vni);
    let (inner, outer) = (way.network.link(LINK).await?, way.host.link(&name).await?);
    let is_pair =
        |inner: &LinkMessage, outer: &LinkMessage| inner.attributes.contains(&LinkAttribute::Link(outer.header.index));
    if let (Some(inner), Some(outer)) = (&inner, &outer)
        && is_pair(inner, outer)
    {
        return Ok((inner.header.index, outer.header.index));
    }
    way.network.remove_link(LINK).await?;
    way.host.remove_link(&name).await?;
    let peer = LinkUnspec::new_with_name(&name).mtu(wanted.mtu).setns_by_fd(way.outside.as_raw_fd()).build();
    let veth = LinkVeth::new(LINK, &name).mtu(wanted.mtu).set_info_data(InfoData::Veth(InfoVeth::Peer(peer))).build();
    way.network.add_link(veth, format!("make {LINK} with {name} on the host")).await?;
    Ok((way.network.index(LINK).await?, way.host.index(&name).await?))
}

/// Says that gateways which are to come are the bridge, to pods that may know another MAC for the address: that of a pod which had it. It comes
/// after the rules, which keep it on this node and let nobody else say so any more; and before the addresses, so that whoever is killed in
/// between says it again.
async fn tell_pods(way: &Way, wanted: &Egress, bridge: u32) -> Result<()> {
    let present = way.network.addresses(bridge).await?;
    let gateways = wanted.subnets.iter().copied().map(gateway);
    let new: Vec<IpAddr> = gateways.filter(|it| !present.contains(&IpNet::from(*it))).collect();
    if !new.is_empty()
        && let Err(error) = announcement::announce(&way.inside, bridge, BRIDGE_MAC, &new).await
    {
        tracing::warn!(vni = wanted.vni, %error, "pods that have asked for the gateway before find it when they ask again");
    }
    Ok(())
}

/// Gives both ends their addresses, and the network's namespace its routes.
async fn connect(way: &Way, wanted: &Egress, inner: u32, outer: u32) -> Result<()> {
    let slot = slot(&host_addresses(&way.host, outer).await?).ok_or(Error::NoTransit { range: TRANSIT.into() })?;
    let is_wanted =
        |(end, _): &(IpNet, IpNet)| wanted.subnets.iter().any(|subnet| subnet.addr().is_ipv4() == end.addr().is_ipv4());
    let ends: Vec<(IpNet, IpNet)> = transit(slot).into_iter().filter(is_wanted).collect();
    let with_ipv6 = ends.iter().any(|(end, _)| end.addr().is_ipv6());
    for (namespace, name) in [(&way.inside, LINK), (&way.outside, &*host_link(wanted.vni))] {
        quiet(namespace, name, with_ipv6)?;
    }
    for (netlink, index) in [(&way.network, inner), (&way.host, outer)] {
        let up = LinkUnspec::new_with_index(index).mtu(wanted.mtu).up().build();
        netlink
            .set_link(up, format!("bring the way between the network with VNI {} and the host up", wanted.vni))
            .await?;
    }
    way.host.set_addresses(outer, ends.iter().map(|(host, _)| *host)).await?;
    way.network.set_addresses(inner, ends.iter().map(|(_, network)| *network)).await?;
    for (host, _) in &ends {
        let everywhere =
            if host.addr().is_ipv4() { IpNet::V4(Ipv4Net::default()) } else { IpNet::V6(Ipv6Net::default()) };
        way.network.add_route(inner, everywhere, Some(host.addr())).await?;
    }
    Ok(())
}

/// No end has an address of its own making, nor believes a router.
fn quiet(namespace: &Namespace, link: &str, with_ipv6: bool) -> Result<()> {
    let key = |key: &str| format!("ipv6/conf/{link}/{key}");
    let disabled = if with_ipv6 { "0" } else { "1" };
    let (generation, router, without) = (key("addr_gen_mode"), key("accept_ra"), key("disable_ipv6"));
    sysctl::set(namespace, &[(&generation, "1"), (&router, "0"), (&without, disabled)])
}

/// The host's addresses, and whether each is of this link.
async fn host_addresses(host: &Netlink, link: u32) -> Result<Vec<(IpAddr, bool)>> {
    let listed = host.handle().address().get().execute().try_collect::<Vec<_>>().await;
    let listed = listed.map_err(|e| host.error("list addresses", e))?;
    let addresses = listed.iter().flat_map(|message| {
        let of = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Local(address) | AddressAttribute::Address(address) => Some(*address),
            _ => None,
        };
        message.attributes.iter().filter_map(of).map(move |address| (address, message.header.index == link))
    });
    Ok(addresses.collect())
}

fn obstacles(host: &Namespace, wanted: &Egress) -> Result<Vec<Obstacle>> {
    let mut found = Vec::new();
    for subnet in &wanted.subnets {
        let obstacle = if subnet.addr().is_ipv4() { Obstacle::Ipv4Forwarding } else { Obstacle::Ipv6Forwarding };
        if sysctl::get(host, obstacle.parameter())?.as_deref().is_none_or(|value| value == "0") {
            found.push(obstacle);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[(&str, bool)]) -> Vec<(IpAddr, bool)> {
        texts.iter().map(|(text, own)| (text.parse().unwrap(), *own)).collect()
    }

    #[test]
    fn a_slot_is_two_addresses_of_each_family() {
        for slot in [0, 1, 77, SLOTS - 1] {
            for (host, network) in transit(slot) {
                assert_eq!(host.trunc(), network.trunc(), "the two are of one net");
                assert_eq!((slot_of(host.addr()), slot_of(network.addr())), (Some(slot), Some(slot)));
            }
        }
        let [(ipv4, _), (ipv6, _)] = transit(SLOTS - 1);
        assert_eq!(
            (ipv4.to_string(), ipv6.to_string()),
            ("169.254.79.254/31".into(), "fd70:6f72:746f:6c00::ffe/127".into())
        );
        for other in
            ["169.254.63.255", "169.254.80.0", "fd70:6f72:746f:6c00::1000", "fd70:6f72:746f:6c01::", "10.0.0.1"]
        {
            assert_eq!(slot_of(other.parse().unwrap()), None, "{other}");
        }
    }

    #[test]
    fn a_slot_is_kept_and_nobody_elses_is_taken() {
        assert_eq!(slot(&addresses(&[("192.0.2.1", false)])), Some(0));
        assert_eq!(slot(&addresses(&[("169.254.64.0", false), ("169.254.64.3", false)])), Some(2));
        assert_eq!(slot(&addresses(&[("169.254.64.0", false), ("169.254.64.8", true)])), Some(4), "it has one");
        let lost = addresses(&[("169.254.64.8", false), ("169.254.64.8", true)]);
        assert_eq!(slot(&lost), Some(0), "somebody else has it by now");
        assert_eq!(slot(&addresses(&[("fd70:6f72:746f:6c00::", false)])), Some(1), "of either family");
        let all: Vec<(IpAddr, bool)> = (0..SLOTS).map(|slot| (transit(slot)[0].0.addr(), false)).collect();
        assert_eq!(slot(&all), None);
    }
}
