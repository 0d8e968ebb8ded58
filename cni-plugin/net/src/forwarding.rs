//! Where frames go: forwarding entries, head-end replication and neighbours. What is wanted is compared with what the kernel
//! has, and only the difference is applied, so that traffic that isn't concerned sees nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
};
use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};

use crate::{
    BRIDGE, Dataplane, Mac, TUNNEL,
    error::Result,
    netlink::{Netlink, ok_if},
    port::remove_neighbour,
};

/// What a network's forwarding shall be on this node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Forwarding {
    /// Endpoints of this node: address and MAC. One that has several addresses is here with each.
    pub local: Vec<(IpAddr, Mac)>,
    /// The other nodes that have the network.
    pub peers: Vec<Peer>,
    /// Whether the bridge answers ARP and neighbour discovery for remote endpoints.
    pub suppression: bool,
}

/// Another node on a network.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Peer {
    /// Its address on the underlay.
    pub vtep: Ipv4Addr,
    /// Its endpoints: address and MAC. One that has several addresses is here with each.
    pub endpoints: Vec<(IpAddr, Mac)>,
}

/// Entries, as the kernel has them or as they are wanted.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Table {
    /// On vx0: through which tunnel a MAC is reached.
    tunnels: BTreeMap<Mac, Ipv4Addr>,
    /// On vx0: the tunnels that broadcasts and unknown frames are copied to.
    floods: BTreeSet<Ipv4Addr>,
    /// On br0: MACs that are behind vx0.
    behind: BTreeSet<Mac>,
    /// On br0: neighbours.
    neighbours: BTreeMap<IpAddr, Mac>,
}

/// One request to the kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Change {
    SetTunnel(Mac, Ipv4Addr),
    RemoveTunnel(Mac, Ipv4Addr),
    AddFlood(Ipv4Addr),
    RemoveFlood(Ipv4Addr),
    AddBehind(Mac),
    RemoveBehind(Mac),
    SetNeighbour(IpAddr, Mac),
    RemoveNeighbour(IpAddr),
}

impl Forwarding {
    fn wanted(&self) -> Table {
        let local: BTreeSet<Mac> = self.local.iter().map(|(_, mac)| *mac).collect();
        // The bridge itself speaks IPv4 only: it needs no other neighbours than those it answers for.
        let spoken_to = self.local.iter().filter(|(address, _)| address.is_ipv4());
        let mut table = Table { neighbours: spoken_to.copied().collect(), ..Table::default() };
        for peer in &self.peers {
            table.floods.insert(peer.vtep);
            for (address, mac) in peer.endpoints.iter().filter(|(_, mac)| !local.contains(mac)) {
                table.tunnels.insert(*mac, peer.vtep);
                table.behind.insert(*mac);
                if self.suppression {
                    table.neighbours.insert(*address, *mac);
                }
            }
        }
        table
    }
}

/// What takes the kernel from `have` to `want`. Additions come first: a moved endpoint is never unreachable in between.
fn plan(have: &Table, want: &Table) -> Vec<Change> {
    let mut changes = Vec::new();
    let news = |have: Option<&Ipv4Addr>, vtep: &Ipv4Addr| have != Some(vtep);
    changes.extend(
        want.tunnels.iter().filter(|(m, v)| news(have.tunnels.get(m), v)).map(|(m, v)| Change::SetTunnel(*m, *v)),
    );
    changes.extend(want.behind.difference(&have.behind).map(|m| Change::AddBehind(*m)));
    changes.extend(want.floods.difference(&have.floods).map(|v| Change::AddFlood(*v)));
    let stale = want.neighbours.iter().filter(|(a, m)| have.neighbours.get(a) != Some(m));
    changes.extend(stale.map(|(a, m)| Change::SetNeighbour(*a, *m)));
    changes.extend(have.behind.difference(&want.behind).map(|m| Change::RemoveBehind(*m)));
    let gone = have.tunnels.iter().filter(|(m, _)| !want.tunnels.contains_key(m));
    changes.extend(gone.map(|(m, v)| Change::RemoveTunnel(*m, *v)));
    changes.extend(have.floods.difference(&want.floods).map(|v| Change::RemoveFlood(*v)));
    let gone = have.neighbours.keys().filter(|a| !want.neighbours.contains_key(a));
    changes.extend(gone.map(|a| Change::RemoveNeighbour(*a)));
    changes
}

impl Dataplane {
    /// Makes a network's forwarding what is wanted; returns how many entries had to be changed.
    ///
    /// # Errors
    /// What the kernel refuses; entries before it are in place.
    pub async fn forward(&self, vni: u32, wanted: &Forwarding) -> Result<usize> {
        let netlink = Netlink::open(&self.namespace(vni)?)?;
        let tunnel = netlink.index(TUNNEL).await?;
        let bridge = netlink.index(BRIDGE).await?;
        let have = read(&netlink, tunnel, bridge).await?;
        let changes = plan(&have, &wanted.wanted());
        for change in &changes {
            apply(&netlink, tunnel, bridge, *change).await?;
        }
        Ok(changes.len())
    }
}

async fn read(netlink: &Netlink, tunnel: u32, bridge: u32) -> Result<Table> {
    let mut table = Table::default();
    for entry in netlink.neighbours(AddressFamily::Bridge).await? {
        let (mac, destination) = facts(&entry);
        let (Some(mac), true) = (mac, entry.header.ifindex == tunnel) else { continue };
        let is_tunnels_own = entry.header.flags.contains(NeighbourFlags::Own);
        match (is_tunnels_own, destination) {
            (true, Some(IpAddr::V4(vtep))) if mac == Mac::default() => drop(table.floods.insert(vtep)),
            (true, Some(IpAddr::V4(vtep))) => drop(table.tunnels.insert(mac, vtep)),
            // The bridge's entry for vx0's own MAC is permanent, which there means "local": not ours.
            (false, _) if entry.header.state != NeighbourState::Permanent => drop(table.behind.insert(mac)),
            _ => {}
        }
    }
    let mut entries = netlink.neighbours(AddressFamily::Inet).await?;
    entries.extend(netlink.neighbours(AddressFamily::Inet6).await?);
    for entry in entries {
        if entry.header.ifindex == bridge
            && entry.header.state == NeighbourState::Permanent
            && let (Some(mac), Some(address)) = facts(&entry)
        {
            table.neighbours.insert(address, mac);
        }
    }
    Ok(table)
}

async fn apply(netlink: &Netlink, tunnel: u32, bridge: u32, change: Change) -> Result<()> {
    let add = |entry, flags, action: String| netlink.send(RouteNetlinkMessage::NewNeighbour(entry), flags, action);
    let remove = async |entry, action: String| {
        ok_if(netlink.send(RouteNetlinkMessage::DelNeighbour(entry), 0, action).await, libc::ENOENT)
    };
    let set = NLM_F_CREATE | NLM_F_REPLACE;
    match change {
        Change::SetTunnel(mac, vtep) => {
            add(tunnel_entry(tunnel, mac, vtep), set, format!("send {mac} to {vtep}")).await
        }
        Change::RemoveTunnel(mac, vtep) => {
            remove(tunnel_entry(tunnel, mac, vtep), format!("send {mac} to {vtep} no more")).await
        }
        Change::AddFlood(vtep) => {
            let entry = tunnel_entry(tunnel, Mac::default(), vtep);
            let action = format!("copy broadcasts to {vtep}");
            ok_if(add(entry, NLM_F_CREATE | NLM_F_APPEND, action).await, libc::EEXIST)
        }
        Change::RemoveFlood(vtep) => {
            remove(tunnel_entry(tunnel, Mac::default(), vtep), format!("copy broadcasts to {vtep} no more")).await
        }
        Change::AddBehind(mac) => add(bridge_entry(tunnel, mac), set, format!("forward {mac} to vx0")).await,
        Change::RemoveBehind(mac) => remove(bridge_entry(tunnel, mac), format!("forward {mac} to vx0 no more")).await,
        Change::SetNeighbour(address, mac) => {
            add(neighbour(bridge, address, mac), set, format!("add neighbour {address}")).await
        }
        Change::RemoveNeighbour(address) => remove_neighbour(netlink, bridge, address).await,
    }
}

/// The MAC and the IP address of an entry.
fn facts(entry: &NeighbourMessage) -> (Option<Mac>, Option<IpAddr>) {
    let mut found = (None, None);
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                found.0 = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac);
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => found.1 = Some((*address).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => found.1 = Some((*address).into()),
            // Entries of the bridge family come without a type for the address.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                found.1 = <[u8; 4]>::try_from(bytes.as_slice()).ok().map(IpAddr::from);
            }
            _ => {}
        }
    }
    found
}

/// A VXLAN device's forwarding entry (`bridge fdb … self permanent`).
fn tunnel_entry(tunnel: u32, mac: Mac, vtep: Ipv4Addr) -> NeighbourMessage {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Bridge;
    entry.header.ifindex = tunnel;
    entry.header.state = NeighbourState::Permanent;
    entry.header.flags = NeighbourFlags::Own;
    entry.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    entry.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(vtep)));
    entry
}

/// A bridge's forwarding entry (`bridge fdb … master static`). Not `permanent`, which for a bridge means "this host itself".
pub(crate) fn bridge_entry(port: u32, mac: Mac) -> NeighbourMessage {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Bridge;
    entry.header.ifindex = port;
    entry.header.state = NeighbourState::Noarp;
    entry.header.flags = NeighbourFlags::Controller;
    entry.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    entry
}

/// A permanent neighbour on an interface.
pub(crate) fn neighbour(index: u32, address: IpAddr, mac: Mac) -> NeighbourMessage {
    let (family, destination) = match address {
        IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
        IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
    };
    let mut entry = NeighbourMessage::default();
    entry.header.family = family;
    entry.header.ifindex = index;
    entry.header.state = NeighbourState::Permanent;
    entry.attributes.push(NeighbourAttribute::Destination(destination));
    entry.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    entry
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    fn mac(last: u8) -> Mac {
        Mac([2, 0, 0, 0, 0, last])
    }

    fn ip(last: u8) -> IpAddr {
        Ipv4Addr::new(10, 32, 0, last).into()
    }

    fn ip6(last: u16) -> IpAddr {
        Ipv6Addr::new(0xfd32, 0, 0, 0, 0, 0, 0, last).into()
    }

    fn vtep(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, last)
    }

    fn forwarding(suppression: bool) -> Forwarding {
        Forwarding {
            local: vec![(ip(1), mac(1))],
            peers: vec![Peer { vtep: vtep(2), endpoints: vec![(ip(2), mac(2))] }],
            suppression,
        }
    }

    #[test]
    fn from_nothing() {
        let changes = plan(&Table::default(), &forwarding(false).wanted());
        let wanted = [
            Change::SetTunnel(mac(2), vtep(2)),
            Change::AddBehind(mac(2)),
            Change::AddFlood(vtep(2)),
            Change::SetNeighbour(ip(1), mac(1)),
        ];
        assert_eq!(changes, wanted);
    }

    #[test]
    fn nothing_to_do() {
        let table = forwarding(true).wanted();
        assert_eq!(plan(&table, &table), []);
        assert!(table.neighbours.contains_key(&ip(2)), "suppression needs the neighbour");
    }

    #[test]
    fn an_endpoint_with_two_addresses_is_one_destination() {
        let mut both = forwarding(false);
        both.local.push((ip6(1), mac(1)));
        both.peers[0].endpoints.push((ip6(2), mac(2)));
        assert_eq!(both.wanted(), forwarding(false).wanted(), "the bridge has nothing to say in IPv6");
        both.suppression = true;
        let neighbours = BTreeMap::from([(ip(1), mac(1)), (ip(2), mac(2)), (ip6(2), mac(2))]);
        assert_eq!(both.wanted(), Table { neighbours, ..forwarding(false).wanted() });
    }

    #[test]
    fn a_move_is_one_replacement() {
        let before = forwarding(false);
        let mut after = before.clone();
        after.peers[0].vtep = vtep(3);
        let changes = plan(&before.wanted(), &after.wanted());
        assert_eq!(
            changes,
            [Change::SetTunnel(mac(2), vtep(3)), Change::AddFlood(vtep(3)), Change::RemoveFlood(vtep(2))]
        );
    }

    #[test]
    fn what_is_local_is_never_sent_away() {
        let mut both = forwarding(false);
        both.local.push((ip(2), mac(2)));
        assert_eq!(both.wanted().tunnels, BTreeMap::new());
        let back = plan(&forwarding(false).wanted(), &both.wanted());
        assert!(back.contains(&Change::RemoveTunnel(mac(2), vtep(2))) && back.contains(&Change::RemoveBehind(mac(2))));
    }
}
