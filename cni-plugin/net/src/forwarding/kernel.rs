//! Forwarding entries in the kernel: how they are asked for, and how many of them are changed by one call.

use std::{io, net::IpAddr};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
};
use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};

use super::{Change, Table, batch::Batches, following::Entries};
use crate::{BRIDGE, Mac, TUNNEL, error::Result, namespace::Namespace, netlink::Netlink};

/// A network's entries in the kernel.
pub(super) struct Kernel {
    batches: Batches,
    tunnel: u32,
    bridge: u32,
}

impl Kernel {
    /// Those of the network whose namespace it is.
    pub async fn open(namespace: &Namespace) -> Result<Self> {
        let netlink = Netlink::open(namespace)?;
        let (tunnel, bridge) = (netlink.index(TUNNEL).await?, netlink.index(BRIDGE).await?);
        Ok(Self { batches: Batches::open(namespace)?, tunnel, bridge })
    }

    /// All that there are.
    pub async fn read(&self, namespace: &Namespace) -> Result<Table> {
        read(&Netlink::open(namespace)?, self.tunnel, self.bridge).await
    }

    /// The request that makes a change.
    fn request(&self, change: Change) -> (RouteNetlinkMessage, u16) {
        let set = NLM_F_CREATE | NLM_F_REPLACE;
        let add = |entry, flags| (RouteNetlinkMessage::NewNeighbour(entry), flags);
        let remove = |entry| (RouteNetlinkMessage::DelNeighbour(entry), 0);
        match change {
            Change::SetTunnel(mac, vtep) => add(tunnel_entry(self.tunnel, mac, vtep), set),
            Change::RemoveTunnel(mac, vtep) => remove(tunnel_entry(self.tunnel, mac, vtep)),
            Change::AddFlood(vtep) => add(tunnel_entry(self.tunnel, Mac::default(), vtep), NLM_F_CREATE | NLM_F_APPEND),
            Change::RemoveFlood(vtep) => remove(tunnel_entry(self.tunnel, Mac::default(), vtep)),
            Change::AddBehind(mac) => add(bridge_entry(self.tunnel, mac), set),
            Change::RemoveBehind(mac) => remove(bridge_entry(self.tunnel, mac)),
            Change::SetNeighbour(address, mac) => add(neighbour(self.bridge, address, mac), set),
            Change::RemoveNeighbour(address) => remove(neighbour_to_remove(self.bridge, address)),
        }
    }
}

impl Entries for Kernel {
    fn change(&mut self, changes: &[Change]) -> io::Result<Vec<(usize, i32)>> {
        let requests: Vec<_> = changes.iter().map(|change| self.request(*change)).collect();
        let mut refused = self.batches.send(requests)?;
        refused.retain(|(position, errno)| changes.get(*position).is_none_or(|change| !is_so_already(*change, *errno)));
        Ok(refused)
    }
}

/// Whether the kernel says no more than that there is nothing to do.
fn is_so_already(change: Change, errno: i32) -> bool {
    match change {
        Change::AddFlood(_) => errno == libc::EEXIST,
        Change::SetTunnel(..) | Change::AddBehind(_) | Change::SetNeighbour(..) => false,
        _ => errno == libc::ENOENT,
    }
}

async fn read(netlink: &Netlink, tunnel: u32, bridge: u32) -> Result<Table> {
    let mut table = Table::default();
    for entry in netlink.neighbours(AddressFamily::Bridge).await? {
        let (mac, destination) = entry_facts(&entry);
        let (Some(mac), true) = (mac, entry.header.ifindex == tunnel) else { continue };
        let is_tunnels_own = entry.header.flags.contains(NeighbourFlags::Own);
        match (is_tunnels_own, destination) {
            (true, Some(vtep)) if mac == Mac::default() => drop(table.floods.insert(vtep)),
            (true, Some(vtep)) => drop(table.tunnels.insert(mac, vtep)),
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
            && let (Some(mac), Some(address)) = entry_facts(&entry)
        {
            table.neighbours.insert(address, mac);
        }
    }
    Ok(table)
}

/// The MAC and the IP address of an entry.
pub(crate) fn entry_facts(entry: &NeighbourMessage) -> (Option<Mac>, Option<IpAddr>) {
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
                let ipv4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
                found.1 = ipv4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from)).ok();
            }
            _ => {}
        }
    }
    found
}

/// A VXLAN device's forwarding entry (`bridge fdb … self permanent`).
pub(crate) fn tunnel_entry(tunnel: u32, mac: Mac, vtep: IpAddr) -> NeighbourMessage {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Bridge;
    entry.header.ifindex = tunnel;
    entry.header.state = NeighbourState::Permanent;
    entry.header.flags = NeighbourFlags::Own;
    entry.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    entry.attributes.push(NeighbourAttribute::Destination(vtep.into()));
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

/// What removes a neighbour.
pub(crate) fn neighbour_to_remove(index: u32, address: IpAddr) -> NeighbourMessage {
    let mut entry = neighbour(index, address, Mac::default());
    entry.header.state = NeighbourState::None;
    entry.header.flags = NeighbourFlags::empty();
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
