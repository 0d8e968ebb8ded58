//! What changes in the kernel from one forwarding to the next, without a look at all that stays.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use super::{Change, Forwarding, Peer, Table, plan};
use crate::Mac;

/// MACs and addresses of which an entry may be another one.
#[derive(Default)]
struct Touched {
    macs: HashSet<Mac>,
    addresses: HashSet<IpAddr>,
}

impl Touched {
    fn add(&mut self, endpoints: &[(IpAddr, Mac)]) {
        self.addresses.extend(endpoints.iter().map(|(address, _)| *address));
        self.macs.extend(endpoints.iter().map(|(_, mac)| *mac));
    }

    /// Adds those that only one of the two has.
    fn add_difference(&mut self, one: &[(IpAddr, Mac)], other: &[(IpAddr, Mac)]) {
        if one == other {
            return;
        }
        let (before, after): (HashSet<_>, HashSet<_>) =
            (one.iter().copied().collect(), other.iter().copied().collect());
        self.add(&before.symmetric_difference(&after).copied().collect::<Vec<_>>());
    }

    /// The part of a table that is about them, and all floods.
    fn of(&self, table: &Table) -> Table {
        let tunnels = self.macs.iter().filter_map(|mac| Some((*mac, *table.tunnels.get(mac)?)));
        let neighbours = self.addresses.iter().filter_map(|it| Some((*it, *table.neighbours.get(it)?)));
        Table {
            tunnels: tunnels.collect(),
            floods: table.floods.clone(),
            behind: self.macs.iter().filter(|mac| table.behind.contains(*mac)).copied().collect(),
            doubted: self.macs.iter().filter(|mac| table.doubted.contains(*mac)).copied().collect(),
            neighbours: neighbours.collect(),
        }
    }
}

/// What takes the kernel from `have`, which is what `before` wants, to what `after` wants: the same as a plan of all of it.
pub(super) fn changes(have: &Table, before: &Forwarding, after: &Forwarding) -> Vec<Change> {
    let touched = match (by_vtep(&before.peers), by_vtep(&after.peers)) {
        (Some(old), Some(new)) if before.suppression == after.suppression && have.doubted.is_empty() => {
            touched(before, after, &old, &new)
        }
        _ => return plan(have, &after.wanted()),
    };
    let is_mac = |mac: &Mac| touched.macs.contains(mac);
    let is_address = |address: &IpAddr| touched.addresses.contains(address);
    plan(&touched.of(have), &after.wanted_of(is_mac, is_address))
}

type ByVtep<'a> = BTreeMap<IpAddr, &'a [(IpAddr, Mac)]>;

/// None if a node is there twice.
fn by_vtep(peers: &[Peer]) -> Option<ByVtep<'_>> {
    let all: ByVtep<'_> = peers.iter().map(|peer| (peer.vtep, &*peer.endpoints)).collect();
    (all.len() == peers.len()).then_some(all)
}

fn touched(before: &Forwarding, after: &Forwarding, old: &ByVtep<'_>, new: &ByVtep<'_>) -> Touched {
    let mut touched = Touched::default();
    for (vtep, endpoints) in old {
        touched.add_difference(endpoints, new.get(vtep).copied().unwrap_or_default());
    }
    new.iter().filter(|(vtep, _)| !old.contains_key(vtep)).for_each(|(_, endpoints)| touched.add(endpoints));
    let mut here = Touched::default();
    here.add_difference(&before.local, &after.local);
    if !here.macs.is_empty() {
        // What is plugged in here is sent nowhere, whatever its other addresses are.
        let peers = before.peers.iter().chain(&after.peers).flat_map(|peer| &peer.endpoints);
        let of_same = peers.filter(|(_, mac)| here.macs.contains(mac)).map(|(address, _)| *address);
        touched.addresses.extend(of_same);
    }
    touched.addresses.extend(here.addresses);
    touched.macs.extend(here.macs);
    touched
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Few addresses and MACs, so that they meet.
    fn forwarding() -> impl Strategy<Value = Forwarding> {
        let endpoint = || {
            (0..12u8, 0..10u8).prop_map(|(address, mac)| {
                let address = match address {
                    0..8 => IpAddr::from([10, 32, 0, address]),
                    _ => IpAddr::from([0xfd32, 0, 0, 0, 0, 0, 0, u16::from(address)]),
                };
                (address, Mac([2, 0, 0, 0, 0, mac]))
            })
        };
        let endpoints = || proptest::collection::vec(endpoint(), 0..4);
        let peers = proptest::collection::btree_map(1..6u8, endpoints(), 0..5);
        (endpoints(), peers, prop::bool::weighted(0.8)).prop_map(|(local, peers, suppression)| {
            let peer = |(last, endpoints)| Peer { vtep: IpAddr::from([192, 0, 2, last]), endpoints };
            Forwarding { local, peers: peers.into_iter().map(peer).collect(), suppression }
        })
    }

    /// For a moment two nodes may both tell of it.
    #[test]
    fn what_is_plugged_in_here_is_sent_to_no_node_though_another_has_begun_to_tell_of_it() {
        let (pod, address) = (Mac([2, 0, 0, 0, 0, 5]), |last| IpAddr::from([10, 32, 0, last]));
        let peer = |last, address| Peer { vtep: IpAddr::from([192, 0, 2, last]), endpoints: vec![(address, pod)] };
        let before = Forwarding { local: Vec::new(), peers: vec![peer(5, address(7))], suppression: true };
        let peers = vec![peer(1, address(2)), peer(5, address(7))];
        let after = Forwarding { local: vec![(address(2), pod)], peers, suppression: true };
        let have = before.wanted();
        assert!(changes(&have, &before, &after).contains(&Change::RemoveNeighbour(address(7))));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4000) })]
        #[test]
        fn it_is_what_a_plan_of_all_is(before in forwarding(), after in forwarding(), part in 0..4usize) {
            // Most of it stays, as a rule.
            let mut next = before.clone();
            match part {
                0 => next = after,
                1 => next.local = after.local,
                2 => next.peers = after.peers,
                _ => if let (Some(peer), Some(other)) = (next.peers.first_mut(), after.peers.into_iter().next()) {
                    peer.endpoints = other.endpoints;
                },
            }
            let have = before.wanted();
            prop_assert_eq!(changes(&have, &before, &next), plan(&have, &next.wanted()));
        }
    }
}
