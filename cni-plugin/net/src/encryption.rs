//! The way that encrypted networks take between nodes: WireGuard, from a namespace that has no other way out.
//!
//! The VXLAN devices of encrypted networks are made from the namespace `portolan-encrypted`, as others are from the host's: their packets
//! come in and go out by it. It has the node's address, and a route to each node that is known by its key, through a WireGuard device. The
//! devices are made from the host's namespace, where their own UDP sockets stay (wireguard(4), "NETWORK NAMESPACES"). So what isn't
//! encrypted has no way: neither out, nor in.
//!
//! A node's keys are numbered by their generation. Keys of one generation belong to a device of their own, of which there are two, so
//! that the former generation goes on until the next one is known to work.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
    path::Path,
};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    address::AddressAttribute,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
};
use rtnetlink::{LinkUnspec, LinkWireguard, RouteMessageBuilder};

use crate::{
    Dataplane,
    error::{Error, Result},
    namespace::Namespace,
    netlink::{Netlink, ok_if},
    port::IPV6_LEAST_MTU,
    sysctl,
    underlay::{vxlan_overhead, wireguard_overhead},
    wireguard::{Device, PrivateKey, PublicKey, Wireguard, changes},
};

/// The namespace's path on the host. What follows the dash is no network's number.
const PATH: &str = "/run/netns/portolan-encrypted";
/// Devices, and so generations at a time.
const DEVICES: [u16; 2] = [0, 1];
/// WireGuard fills packets up to a multiple of so many bytes.
const PADDING: u32 = 16;

/// Nothing is forwarded, and packets of a node are taken from whichever device they come. No device has an IPv6 address of its own making.
const SYSCTLS: [(&str, &str); 6] = [
    ("ipv4/ip_forward", "0"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv6/conf/all/forwarding", "0"),
    ("ipv6/conf/default/addr_gen_mode", "1"),
    ("ipv6/conf/default/accept_ra", "0"),
];

/// It has IPv6 only where nodes have such addresses.
fn family_sysctls(vtep: IpAddr) -> [(&'static str, &'static str); 2] {
    let without = if vtep.is_ipv6() { "0" } else { "1" };
    [("ipv6/conf/all/disable_ipv6", without), ("ipv6/conf/default/disable_ipv6", without)]
}

/// How a node's encrypted networks reach other nodes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Encryption {
    /// This node's address on the underlay.
    pub vtep: IpAddr,
    /// The underlay's MTU in bytes.
    pub underlay_mtu: u32,
    /// UDP port of the keys of even generations, the same on all nodes; those of odd ones have the next.
    pub port: u16,
    /// This node's keys by generation: no two of the same parity.
    pub keys: BTreeMap<u32, PrivateKey>,
    /// The other nodes' keys by generation, by their addresses on the underlay.
    pub peers: BTreeMap<IpAddr, BTreeMap<u32, PublicKey>>,
}

/// What was found when encryption was set up.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Encrypted {
    /// This node's public keys by generation.
    pub keys: BTreeMap<u32, PublicKey>,
    /// The generation by which packets are sent to each node. One without a key of a generation that this node has isn't reached.
    pub sends: BTreeMap<IpAddr, u32>,
    /// The oldest generation by which packets may still be sent to any node.
    pub oldest: Option<u32>,
    /// Nodes with which there has been no handshake by their newest key.
    pub waiting: BTreeSet<IpAddr>,
}

/// The largest packet that VXLAN of an encrypted network sends between nodes, in bytes with the outer IP header, for pods with an `mtu`.
pub fn encrypted_size(mtu: u32, vtep: IpAddr, underlay_mtu: u32) -> u32 {
    let inside = mtu.saturating_add(vxlan_overhead(vtep));
    let largest = underlay_mtu.saturating_sub(wireguard_overhead(vtep));
    // What doesn't fit would be cut into pieces first; then the path is too small.
    let filled = if inside < largest { inside.next_multiple_of(PADDING).min(largest) } else { inside };
    filled.saturating_add(wireguard_overhead(vtep))
}

/// The generation by which a node is sent to: the newest that has been seen to work, else the newest that may come to.
fn chosen(common: &BTreeMap<u32, bool>) -> Option<u32> {
    let works = common.iter().rev().find(|(_, connected)| **connected);
    works.or(common.iter().next_back()).map(|(generation, _)| *generation)
}

fn device_of(generation: u32) -> u16 {
    DEVICES[usize::from(generation % 2 == 1)]
}

fn device_name(device: u16) -> String {
    format!("wg{device}")
}

/// The name of a device while it is being made in the host's namespace.
fn pending_name(device: u16) -> String {
    format!("portolan-wg{device}")
}

impl Dataplane {
    /// The namespace that encrypted networks leave by.
    pub(crate) fn encrypted_underlay(&self) -> Result<Namespace> {
        Namespace::open(self.root(), Path::new(PATH))
    }

    /// Whether encrypted networks have their way out.
    pub fn has_encryption(&self) -> bool {
        !Namespace::is_gone(self.root(), Path::new(PATH))
    }

    /// Makes encrypted networks' way what is wanted. A node is reached by a newer key once there was a handshake by it, and by both
    /// nodes' older keys until then, so that no packet is lost.
    ///
    /// # Errors
    /// [`Error::NoWireGuard`] where the kernel has none; what it refuses else. What was made by then stays, for the next try: it lets nothing
    /// out that isn't encrypted.
    pub async fn ensure_encryption(&self, wanted: &Encryption) -> Result<Encrypted> {
        let namespace = Namespace::ensure(self.root(), Path::new(PATH))?;
        sysctl::set(&namespace, &SYSCTLS)?;
        sysctl::set(&namespace, &family_sysctls(wanted.vtep))?;
        let netlink = Netlink::open(&namespace)?;
        set_own_address(&netlink, wanted.vtep).await?;
        let underlay = Netlink::open(&self.underlay()?)?;
        let mut indexes = BTreeMap::new();
        for generation in wanted.keys.keys() {
            let device = device_of(*generation);
            indexes.insert(*generation, ensure_device(&netlink, &underlay, &namespace, device, wanted).await?);
        }
        let mut found = BTreeMap::new();
        if !wanted.keys.is_empty() {
            let wireguard = Wireguard::open(&namespace).await?;
            for (generation, key) in &wanted.keys {
                let name = device_name(device_of(*generation));
                configure(&wireguard, &name, wanted, (*generation, key)).await?;
                let index = netlink.index(&name).await?;
                netlink.set_link(LinkUnspec::new_with_index(index).up().build(), format!("bring {name} up")).await?;
                found.insert(*generation, wireguard.get(&name).await?);
            }
        }
        let told = judge(wanted, &found);
        set_routes(&netlink, &told.sends, &indexes).await?;
        // Last: until now packets may have left by it.
        for device in DEVICES.into_iter().filter(|device| !wanted.keys.keys().any(|it| device_of(*it) == *device)) {
            netlink.remove_link(&device_name(device)).await?;
        }
        Ok(told)
    }

    /// Takes encrypted networks their way; what is left of them reaches no other node.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn remove_encryption(&self) -> Result<()> {
        let path = Path::new(PATH);
        if !Namespace::is_gone(self.root(), path) {
            // By hand: a socket that is still open would keep the namespace, and with it the UDP ports.
            let netlink = Netlink::open(&Namespace::open(self.root(), path)?)?;
            for device in DEVICES {
                netlink.remove_link(&device_name(device)).await?;
                netlink.remove_link(&pending_name(device)).await?;
            }
        }
        Namespace::remove(self.root(), path)
    }
}

async fn set_own_address(netlink: &Netlink, vtep: IpAddr) -> Result<()> {
    let loopback = netlink.index("lo").await?;
    netlink.set_link(LinkUnspec::new_with_index(loopback).up().build(), "bring lo up").await?;
    netlink.add_address(loopback, IpNet::from(vtep)).await?;
    // One that was this node's before may be another's by now.
    let listed =
        netlink.handle().address().get().set_link_index_filter(loopback).execute().try_collect::<Vec<_>>().await;
    for message in listed.map_err(|e| netlink.error("list addresses", e))? {
        let is_kept = |attribute: &AddressAttribute| matches!(attribute, AddressAttribute::Local(it) | AddressAttribute::Address(it) if *it == vtep || it.is_loopback());
        if message.header.index == loopback && !message.attributes.iter().any(is_kept) {
            let removed = netlink.handle().address().del(message).execute().await;
            ok_if(removed.map_err(|e| netlink.error("remove a former address of this node", e)), libc::EADDRNOTAVAIL)?;
        }
    }
    Ok(())
}

/// Makes a device, if it isn't there; returns its index.
async fn ensure_device(
    netlink: &Netlink,
    underlay: &Netlink,
    namespace: &Namespace,
    device: u16,
    wanted: &Encryption,
) -> Result<u32> {
    let (name, pending) = (device_name(device), pending_name(device));
    let mtu = wanted.underlay_mtu.saturating_sub(wireguard_overhead(wanted.vtep));
    if wanted.vtep.is_ipv6() && mtu < IPV6_LEAST_MTU {
        return Err(Error::MtuTooSmall { mtu, address: wanted.vtep.into(), interface: name });
    }
    if netlink.link(&name).await?.is_none() {
        netlink.remove_link(&pending).await?;
        // As a VXLAN device is: made from the underlay's namespace, straight into the other one (network.rs).
        let link = LinkWireguard::new(&pending).setns_by_fd(namespace.as_raw_fd()).build();
        match underlay.add_link(link, "make a WireGuard device").await {
            Err(Error::Netlink { source, .. }) if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return Err(Error::NoWireGuard { source });
            }
            other => other?,
        }
        let index = netlink.index(&pending).await?;
        let named = LinkUnspec::new_with_index(index).name(&name).build();
        netlink.set_link(named, format!("name the WireGuard device {name}")).await?;
    }
    let index = netlink.index(&name).await?;
    let link = LinkUnspec::new_with_index(index).mtu(mtu).build();
    netlink.set_link(link, format!("set {name}'s MTU to {mtu}")).await?;
    Ok(index)
}

/// Gives a device the keys of its generation, this node's and the others'.
async fn configure(
    wireguard: &Wireguard,
    name: &str,
    wanted: &Encryption,
    (generation, key): (u32, &PrivateKey),
) -> Result<()> {
    let port = wanted.port.saturating_add(device_of(generation));
    let have = wireguard.get(name).await?;
    // The kernel has set some bits of it.
    if have.private.as_ref().map(PrivateKey::clamped) != Some(key.clamped()) || have.port != port {
        wireguard.set_key(name, key, port).await?;
    }
    let peers = wanted.peers.iter().filter_map(|(vtep, keys)| Some((*keys.get(&generation)?, *vtep))).collect();
    wireguard.set_peers(name, port, &changes(&have.peers, &peers)).await
}

/// What the devices, by generation, say of the nodes.
fn judge(wanted: &Encryption, found: &BTreeMap<u32, Device>) -> Encrypted {
    let mut told = Encrypted::default();
    told.keys.extend(found.iter().filter_map(|(generation, device)| Some((*generation, device.public?))));
    for (vtep, keys) in &wanted.peers {
        let connected =
            |generation, key| found.get(generation).and_then(|it: &Device| it.peers.get(key)).map(|it| it.connected);
        let common: BTreeMap<u32, bool> =
            keys.iter().filter_map(|(generation, key)| Some((*generation, connected(generation, key)?))).collect();
        if let Some(generation) = chosen(&common) {
            told.sends.insert(*vtep, generation);
            // Which of them comes to work first isn't known until one does.
            let oldest = if common.get(&generation) == Some(&true) { Some(&generation) } else { common.keys().next() };
            told.oldest = told.oldest.into_iter().chain(oldest.copied()).min();
        }
        let newest = keys.keys().next_back();
        if newest.and_then(|newest| common.get(newest)) != Some(&true) {
            told.waiting.insert(*vtep);
        }
    }
    told
}

/// All unicast routes to nodes are ours. One is replaced by another at once: no packet finds none in between.
async fn set_routes(netlink: &Netlink, sends: &BTreeMap<IpAddr, u32>, indexes: &BTreeMap<u32, u32>) -> Result<()> {
    let have: BTreeMap<IpAddr, u32> = routes(netlink).await?.iter().filter_map(route).collect();
    let want: BTreeMap<IpAddr, u32> =
        sends.iter().filter_map(|(vtep, generation)| Some((*vtep, *indexes.get(generation)?))).collect();
    for (vtep, device) in want.iter().filter(|(vtep, device)| have.get(vtep) != Some(device)) {
        let added = netlink.handle().route().add(message(*vtep, *device)).replace().execute().await;
        added.map_err(|e| netlink.error(format!("send to {vtep} by WireGuard"), e))?;
    }
    for (vtep, device) in have.iter().filter(|(vtep, _)| !want.contains_key(vtep)) {
        let removed = netlink.handle().route().del(message(*vtep, *device)).execute().await;
        ok_if(removed.map_err(|e| netlink.error(format!("send to {vtep} no more"), e)), libc::ESRCH)?;
    }
    Ok(())
}

/// The namespace's routes of both families: a node may have had an address of the other one before.
async fn routes(netlink: &Netlink) -> Result<Vec<RouteMessage>> {
    let mut found = Vec::new();
    for all in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()] {
        let listed = netlink.handle().route().get(all).execute().try_collect::<Vec<_>>().await;
        found.extend(listed.map_err(|e| netlink.error("list routes", e))?);
    }
    Ok(found)
}

/// The route to a node by a device.
fn message(vtep: IpAddr, device: u32) -> RouteMessage {
    match vtep {
        IpAddr::V4(vtep) => {
            let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(vtep, 32).output_interface(device);
            route.scope(RouteScope::Link).build()
        }
        IpAddr::V6(vtep) => {
            RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(vtep, 128).output_interface(device).build()
        }
    }
}

/// To which node a route leads, and by which device. What the kernel makes by itself (to an own address, to groups) leads to none.
fn route(message: &RouteMessage) -> Option<(IpAddr, u32)> {
    let mut found = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => found.0 = Some(IpAddr::from(*address)),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => found.0 = Some(IpAddr::from(*address)),
            RouteAttribute::Oif(index) => found.1 = Some(*index),
            _ => {}
        }
    }
    let is_ours = message.header.kind == RouteType::Unicast && message.header.protocol != RouteProtocol::Kernel;
    is_ours.then_some(found.0.zip(found.1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wireguard::PeerState;

    fn key(number: u8) -> PublicKey {
        PublicKey([number; 32])
    }

    fn vtep(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    fn vtep_ipv6(last: u16) -> IpAddr {
        [0xfd00, 0, 0, 0, 0, 0, 0, last].into()
    }

    #[test]
    fn sizes_are_those_on_the_wire() {
        for (mtu, underlay, size) in [
            (1390, 1500, 1500),
            (1340, 1450, 1450), // 1390 can't be filled up to 1392: the device's MTU is 1390
            (1339, 1450, 1450),
            (1300, 1500, 1420), // 1350 is filled up to 1360
            (1310, 1500, 1420),
            (1311, 1500, 1436),
            (1450, 1500, 1560), // more than the underlay takes
        ] {
            assert_eq!(encrypted_size(mtu, vtep(1), underlay), size, "{mtu} of {underlay}");
        }
        // Both outer headers are larger by 20 bytes over IPv6.
        for (mtu, underlay, size) in [(1350, 1500, 1500), (1290, 1500, 1440), (1290, 1440, 1440), (1289, 1500, 1440)] {
            assert_eq!(encrypted_size(mtu, vtep_ipv6(1), underlay), size, "{mtu} of {underlay}");
        }
    }

    #[test]
    fn a_node_of_either_family_is_led_to_by_its_address_alone() {
        for (vtep, length) in [(vtep(2), 32), (vtep_ipv6(2), 128)] {
            let made = message(vtep, 7);
            assert_eq!((route(&made), made.header.destination_prefix_length), (Some((vtep, 7)), length));
            let mut by_kernel = made.clone();
            by_kernel.header.protocol = RouteProtocol::Kernel;
            assert_eq!(route(&by_kernel), None, "to its own address");
        }
    }

    #[test]
    fn the_way_has_ipv6_only_where_nodes_have() {
        assert!(family_sysctls(vtep(1)).iter().all(|(key, value)| key.ends_with("disable_ipv6") && *value == "1"));
        assert!(family_sysctls(vtep_ipv6(1)).iter().all(|(_, value)| *value == "0"));
    }

    #[test]
    fn a_newer_key_is_used_once_it_works() {
        for (common, expected) in [
            (&[][..], None),
            (&[(3, false)], Some(3)),
            (&[(3, true), (4, false)], Some(3)),
            (&[(3, true), (4, true)], Some(4)),
            (&[(3, false), (4, true)], Some(4)),
            (&[(3, false), (4, false)], Some(4)),
        ] {
            assert_eq!(chosen(&common.iter().copied().collect()), expected, "{common:?}");
        }
    }

    #[test]
    fn nodes_without_a_common_generation_are_not_sent_to() {
        let peers = BTreeMap::from([
            (vtep(1), BTreeMap::from([(3, key(13)), (4, key(14))])),
            (vtep(2), BTreeMap::from([(3, key(23))])),
            (vtep(3), BTreeMap::from([(9, key(39))])),
            (vtep(4), BTreeMap::new()),
        ]);
        let wanted = Encryption { vtep: vtep(9), underlay_mtu: 1500, port: 7795, keys: BTreeMap::new(), peers };
        let device = |own, peers: &[(u8, bool)]| Device {
            public: Some(key(own)),
            peers: peers
                .iter()
                .map(|(number, connected)| (key(*number), PeerState { connected: *connected, ..PeerState::default() }))
                .collect(),
            ..Device::default()
        };
        let found = BTreeMap::from([(3, device(93, &[(13, true), (23, true)])), (4, device(94, &[(14, false)]))]);
        let told = judge(&wanted, &found);
        assert_eq!(told.keys, BTreeMap::from([(3, key(93)), (4, key(94))]));
        assert_eq!(told.sends, BTreeMap::from([(vtep(1), 3), (vtep(2), 3)]));
        assert_eq!(told.oldest, Some(3));
        assert_eq!(told.waiting, BTreeSet::from([vtep(1), vtep(3), vtep(4)]));
    }
}
