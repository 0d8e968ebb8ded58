//! From what the nodes say to what this node does: who is where, and who has which name. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use portolan_crds::{Endpoint, NetworkNodeSlice};
use portolan_dns::{Member, NetworkZone, Record};
use portolan_net::{Forwarding, Mac, Peer};

/// An endpoint of this node, as the API knows its pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Local {
    /// The endpoint, as the slice has it.
    pub endpoint: Endpoint,
    /// Whether its pod is wanted here: it is in the API by this UID, and not being deleted.
    pub current: bool,
}

/// Who is on a network, and where.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    local: Vec<Endpoint>,
    remote: BTreeMap<Ipv4Addr, Vec<Endpoint>>,
}

/// Which of two endpoints with the same address is the right one; the greater wins. A pod that is wanted here is: its address
/// was given to it here, last. Else a ready one, else the one that was written last.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Rank {
    wanted_here: bool,
    ready: bool,
    written: u64,
}

impl View {
    /// Puts together what the slices of one network and this node's own endpoints say.
    ///
    /// `own` is this node's name; its slice is not asked, being made from `local`.
    pub fn new<'a>(own: &str, local: &[Local], slices: impl IntoIterator<Item = &'a NetworkNodeSlice>) -> Self {
        let mut winners: BTreeMap<Ipv4Addr, (Rank, Option<Ipv4Addr>, &Endpoint)> = BTreeMap::new();
        let mut view = Self::default();
        let mut offer = |endpoint, place, rank| {
            let Some((address, _)) = identity(endpoint) else { return };
            if winners.get(&address).is_none_or(|(best, ..)| rank > *best) {
                winners.insert(address, (rank, place, endpoint));
            }
        };
        for Local { endpoint, current } in local {
            offer(endpoint, None, Rank { wanted_here: *current, ready: endpoint.ready && *current, written: 0 });
        }
        for slice in slices.into_iter().filter(|s| s.spec.node != own) {
            let Ok(vtep) = slice.spec.vtep.parse::<Ipv4Addr>() else { continue };
            // Even a node whose endpoints all lost takes part in broadcasts.
            view.remote.entry(vtep).or_default();
            // Versions order the writes of one API server; they are compared for no other purpose.
            let written = slice.metadata.resource_version.as_deref().and_then(|v| v.parse().ok()).unwrap_or(0);
            for endpoint in &slice.spec.endpoints {
                offer(endpoint, Some(vtep), Rank { wanted_here: false, ready: endpoint.ready, written });
            }
        }
        for (_, place, endpoint) in winners.into_values() {
            match place {
                None => view.local.push(endpoint.clone()),
                Some(vtep) => view.remote.entry(vtep).or_default().push(endpoint.clone()),
            }
        }
        view
    }

    /// Where frames go.
    pub fn forwarding(&self, suppression: bool) -> Forwarding {
        let identities = |endpoints: &[Endpoint]| {
            endpoints.iter().filter_map(identity).map(|(address, mac)| (address.into(), mac)).collect()
        };
        let peer =
            |(vtep, endpoints): (&Ipv4Addr, &Vec<Endpoint>)| Peer { vtep: *vtep, endpoints: identities(endpoints) };
        Forwarding { local: identities(&self.local), peers: self.remote.iter().map(peer).collect(), suppression }
    }

    /// Who has which name, `members` being the pods of this node that may ask.
    ///
    /// Short names belong to the first namespace, in alphabetical order, that has a ready pod or workload of that name; the
    /// names with a namespace are always unambiguous.
    pub fn zone(&self, network: &str, members: Vec<Member>) -> NetworkZone {
        let ready = self.local.iter().chain(self.remote.values().flatten()).filter(|e| e.ready);
        let mut names: BTreeMap<(&str, &str), BTreeSet<Ipv4Addr>> = BTreeMap::new();
        for endpoint in ready {
            let Some((address, _)) = identity(endpoint) else { continue };
            for name in [Some(endpoint.pod.as_str()), endpoint.owner.as_deref()].into_iter().flatten() {
                names.entry((name, endpoint.namespace.as_str())).or_default().insert(address);
            }
        }
        let mut records = Vec::new();
        let mut last = None;
        for ((name, namespace), addresses) in names {
            let is_first = last.replace(name) != Some(name);
            for address in addresses {
                records.push(Record { name: format!("{name}.{namespace}.{network}"), address });
                if is_first {
                    records.push(Record { name: format!("{name}.{network}"), address });
                }
            }
        }
        NetworkZone { name: network.to_owned(), records, members }
    }
}

fn identity(endpoint: &Endpoint) -> Option<(Ipv4Addr, Mac)> {
    Some((endpoint.address.parse().ok()?, endpoint.mac.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::NetworkNodeSliceSpec;

    fn endpoint(namespace: &str, pod: &str, owner: Option<&str>, last: u8, ready: bool) -> Endpoint {
        Endpoint {
            address: format!("10.32.0.{last}"),
            mac: format!("02:00:00:00:00:{last:02x}"),
            namespace: namespace.into(),
            pod: pod.into(),
            owner: owner.map(str::to_owned),
            ready,
        }
    }

    fn slice(node: &str, vtep: u8, version: &str, endpoints: Vec<Endpoint>) -> NetworkNodeSlice {
        let vtep = format!("192.0.2.{vtep}");
        let spec = NetworkNodeSliceSpec { network: "backend".into(), node: node.into(), vtep, endpoints };
        let mut slice = NetworkNodeSlice::new(&format!("backend.{node}"), spec);
        slice.metadata.resource_version = Some(version.into());
        slice
    }

    fn places(view: &View) -> Vec<(u8, usize)> {
        view.remote.iter().map(|(vtep, endpoints)| (vtep.octets()[3], endpoints.len())).collect()
    }

    fn names(view: &View) -> Vec<String> {
        let mut names: Vec<String> = view
            .zone("backend", vec![])
            .records
            .iter()
            .map(|r| format!("{} {}", r.name, r.address.octets()[3]))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_ready_ones_have_names() {
        let local = [Local { endpoint: endpoint("shop", "db-0", Some("db"), 5, true), current: true }];
        let there = slice(
            "b",
            2,
            "9",
            vec![endpoint("shop", "db-1", Some("db"), 6, true), endpoint("shop", "db-2", Some("db"), 7, false)],
        );
        let view = View::new("a", &local, [&there]);
        let wanted = [
            "db-0.backend 5",
            "db-0.shop.backend 5",
            "db-1.backend 6",
            "db-1.shop.backend 6",
            "db.backend 5",
            "db.backend 6",
            "db.shop.backend 5",
            "db.shop.backend 6",
        ];
        assert_eq!(names(&view), wanted);
        let forwarding = view.forwarding(false);
        assert_eq!((forwarding.local.len(), forwarding.peers[0].endpoints.len()), (1, 2), "unready pods are reachable");
    }

    #[test]
    fn short_names_belong_to_the_first_namespace() {
        let there =
            slice("b", 2, "9", vec![endpoint("zoo", "db", None, 6, true), endpoint("shop", "db", None, 7, true)]);
        assert_eq!(names(&View::new("a", &[], [&there])), ["db.backend 7", "db.shop.backend 7", "db.zoo.backend 6"]);
    }

    #[test]
    fn the_own_slice_is_not_asked() {
        let own = slice("a", 1, "9", vec![endpoint("shop", "gone", None, 9, true)]);
        assert_eq!(View::new("a", &[], [&own]), View::default());
    }

    #[test]
    fn a_moved_pod_is_where_it_is_wanted() {
        // The old node can't be reached: its slice says "ready" for ever.
        let stale = slice("old", 2, "9", vec![endpoint("shop", "db-0", None, 5, true)]);
        let mut here = Local { endpoint: endpoint("shop", "db-0", None, 5, false), current: true };
        let view = View::new("a", std::slice::from_ref(&here), [&stale]);
        assert_eq!((view.local.len(), places(&view)), (1, vec![(2, 0)]), "wanted here, though not ready yet");
        assert!(names(&view).is_empty());
        // A third node: the later of two ready ones.
        let new = slice("new", 3, "12", vec![endpoint("shop", "db-0", None, 5, true)]);
        assert_eq!(places(&View::new("c", &[], [&new, &stale])), [(2, 0), (3, 1)]);
        assert_eq!(places(&View::new("c", &[], [&stale, &new])), [(2, 0), (3, 1)]);
        // On its way out here, and ready there.
        here.current = false;
        here.endpoint.ready = true;
        assert_eq!(places(&View::new("a", &[here], [&new])), [(3, 1)]);
    }

    #[test]
    fn what_can_not_be_read_is_left_out() {
        let mut odd = endpoint("shop", "odd", None, 5, true);
        odd.mac = "no mac".into();
        let view = View::new("a", &[], [&slice("b", 2, "9", vec![odd])]);
        assert!(names(&view).is_empty());
        assert!(view.forwarding(true).peers[0].endpoints.is_empty());
    }
}
