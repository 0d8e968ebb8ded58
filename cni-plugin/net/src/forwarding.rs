//! Where frames go: forwarding entries, head-end replication and neighbours. What is wanted is compared with what the kernel
//! has, and only the difference is applied, so that traffic that isn't concerned sees nothing. What the kernel has is known from what was
//! applied before; it is asked at first, and whenever it isn't known.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use crate::Mac;

mod batch;
mod difference;
mod following;
mod kernel;

pub use following::{Forwarder, Known};
pub(crate) use kernel::{bridge_entry, entry_facts, neighbour, neighbour_to_remove, tunnel_entry};

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
    pub vtep: IpAddr,
    /// Its endpoints: address and MAC. One that has several addresses is here with each.
    pub endpoints: Vec<(IpAddr, Mac)>,
}

/// Entries, as the kernel has them or as they are wanted.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Table {
    /// On vx0: through which tunnel a MAC is reached.
    tunnels: BTreeMap<Mac, IpAddr>,
    /// On vx0: the tunnels that broadcasts and unknown frames are copied to.
    floods: BTreeSet<IpAddr>,
    /// On br0: MACs that are behind vx0.
    behind: BTreeSet<Mac>,
    /// MACs of which it isn't known whether they are.
    doubted: BTreeSet<Mac>,
    /// On br0: neighbours.
    neighbours: BTreeMap<IpAddr, Mac>,
}

/// One entry to be made or removed: one request to the kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Change {
    /// A MAC is reached through the tunnel to a node.
    SetTunnel(Mac, IpAddr),
    /// It isn't any more.
    RemoveTunnel(Mac, IpAddr),
    /// Broadcasts are copied to a node.
    AddFlood(IpAddr),
    /// They aren't any more.
    RemoveFlood(IpAddr),
    /// A MAC is behind the tunnels.
    AddBehind(Mac),
    /// It isn't any more.
    RemoveBehind(Mac),
    /// The bridge knows an address' MAC.
    SetNeighbour(IpAddr, Mac),
    /// It doesn't any more.
    RemoveNeighbour(IpAddr),
}

/// What is plugged in on this node.
#[derive(Clone, Debug, Default)]
pub struct Here {
    addresses: BTreeMap<IpAddr, Mac>,
    macs: BTreeSet<Mac>,
}

impl FromIterator<(IpAddr, Mac)> for Here {
    fn from_iter<T: IntoIterator<Item = (IpAddr, Mac)>>(endpoints: T) -> Self {
        let addresses: BTreeMap<IpAddr, Mac> = endpoints.into_iter().collect();
        let macs = addresses.values().copied().collect();
        Self { addresses, macs }
    }
}

impl Change {
    fn is_removal(&self) -> bool {
        matches!(self, Self::RemoveTunnel(..) | Self::RemoveFlood(_) | Self::RemoveBehind(_) | Self::RemoveNeighbour(_))
    }

    /// Whether it would send away what is plugged in here by now: it was asked for before that was.
    pub fn is_against(&self, here: &Here) -> bool {
        match self {
            Self::SetTunnel(mac, _) | Self::AddBehind(mac) => here.macs.contains(mac),
            Self::SetNeighbour(address, mac) => here.addresses.get(address).is_some_and(|there| there != mac),
            Self::RemoveNeighbour(address) => here.addresses.contains_key(address),
            _ => false,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetTunnel(mac, vtep) => write!(f, "send {mac} to {vtep}"),
            Self::RemoveTunnel(mac, vtep) => write!(f, "send {mac} to {vtep} no more"),
            Self::AddFlood(vtep) => write!(f, "copy broadcasts to {vtep}"),
            Self::RemoveFlood(vtep) => write!(f, "copy broadcasts to {vtep} no more"),
            Self::AddBehind(mac) => write!(f, "forward {mac} to vx0"),
            Self::RemoveBehind(mac) => write!(f, "forward {mac} to vx0 no more"),
            Self::SetNeighbour(address, _) => write!(f, "add neighbour {address}"),
            Self::RemoveNeighbour(address) => write!(f, "remove neighbour {address}"),
        }
    }
}

impl Table {
    /// The entries after a change.
    fn follow(&mut self, change: Change) {
        match change {
            Change::SetTunnel(mac, vtep) => drop(self.tunnels.insert(mac, vtep)),
            Change::RemoveTunnel(mac, _) => drop(self.tunnels.remove(&mac)),
            Change::AddFlood(vtep) => drop(self.floods.insert(vtep)),
            Change::RemoveFlood(vtep) => drop(self.floods.remove(&vtep)),
            Change::AddBehind(mac) => {
                self.doubted.remove(&mac);
                self.behind.insert(mac);
            }
            Change::RemoveBehind(mac) => {
                self.doubted.remove(&mac);
                self.behind.remove(&mac);
            }
            Change::SetNeighbour(address, mac) => drop(self.neighbours.insert(address, mac)),
            Change::RemoveNeighbour(address) => drop(self.neighbours.remove(&address)),
        }
    }
}

impl Forwarding {
    fn wanted(&self) -> Table {
        self.wanted_of(|_| true, |_| true)
    }

    /// The entries of those MACs and addresses alone, and all floods.
    fn wanted_of(&self, is_mac: impl Fn(&Mac) -> bool, is_address: impl Fn(&IpAddr) -> bool) -> Table {
        let local: BTreeSet<Mac> = self.local.iter().map(|(_, mac)| *mac).collect();
        // The bridge itself speaks IPv4 only: it needs no other neighbours than those it answers for.
        let spoken_to = self.local.iter().filter(|(address, _)| address.is_ipv4() && is_address(address));
        let remote = self.peers.iter().flat_map(|peer| peer.endpoints.iter().map(|it| (peer.vtep, it)));
        let remote = remote.filter(|(_, (_, mac))| !local.contains(mac));
        let answered_for = remote.clone().filter(|(_, (address, _))| self.suppression && is_address(address));
        let answered_for = answered_for.map(|(_, endpoint)| endpoint);
        let remote = remote.filter(|(_, (_, mac))| is_mac(mac));
        Table {
            tunnels: remote.clone().map(|(vtep, (_, mac))| (*mac, vtep)).collect(),
            floods: self.peers.iter().map(|peer| peer.vtep).collect(),
            behind: remote.map(|(_, (_, mac))| *mac).collect(),
            doubted: BTreeSet::new(),
            neighbours: spoken_to.chain(answered_for).copied().collect(),
        }
    }
}

/// What takes the kernel from `have` to `want`. Additions come first: a moved endpoint is never unreachable in between.
fn plan(have: &Table, want: &Table) -> Vec<Change> {
    let mut changes = Vec::new();
    let news = |have: Option<&IpAddr>, vtep: &IpAddr| have != Some(vtep);
    changes.extend(
        want.tunnels.iter().filter(|(m, v)| news(have.tunnels.get(m), v)).map(|(m, v)| Change::SetTunnel(*m, *v)),
    );
    let is_behind = |mac: &Mac| have.behind.contains(mac) && !have.doubted.contains(mac);
    changes.extend(want.behind.iter().filter(|m| !is_behind(m)).map(|m| Change::AddBehind(*m)));
    changes.extend(want.floods.difference(&have.floods).map(|v| Change::AddFlood(*v)));
    let stale = want.neighbours.iter().filter(|(a, m)| have.neighbours.get(a) != Some(m));
    changes.extend(stale.map(|(a, m)| Change::SetNeighbour(*a, *m)));
    let behind = have.behind.union(&have.doubted);
    changes.extend(behind.filter(|m| !want.behind.contains(m)).map(|m| Change::RemoveBehind(*m)));
    let gone = have.tunnels.iter().filter(|(m, _)| !want.tunnels.contains_key(m));
    changes.extend(gone.map(|(m, v)| Change::RemoveTunnel(*m, *v)));
    changes.extend(have.floods.difference(&want.floods).map(|v| Change::RemoveFlood(*v)));
    let gone = have.neighbours.keys().filter(|a| !want.neighbours.contains_key(a));
    changes.extend(gone.map(|a| Change::RemoveNeighbour(*a)));
    changes
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

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

    fn vtep(last: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, last).into()
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
