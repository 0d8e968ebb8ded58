//! What this node's slices say of paths that carry less than its pods may send.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use kube::runtime::reflector::ObjectRef;
use portolan_crds::{NetworkNodeSlice, PathMtu, SmallPath};

use crate::{agent::Agent, journal::Endpoint, network::Network, underlay::Underlay};

/// Paths that a slice names before it only counts the rest.
const NAMED: usize = 16;
/// So many seconds pass between two news at least: slices are seen by all nodes.
const QUIET: u32 = 30;

/// The nodes to which less passes than pods may send, and how much, in bytes with the IP header.
pub(crate) type Small = BTreeMap<IpAddr, u16>;

/// What is told of the paths.
#[derive(Debug, Default)]
pub(crate) struct SmallPaths(Mutex<Told>);

#[derive(Debug, Default)]
struct Told {
    small: Small,
    /// Seconds since it changed.
    since: u32,
}

impl SmallPaths {
    /// Begins with what this node's agent told before, as its slices have it: nothing is taken for repaired because an agent starts anew.
    pub fn resume(&self, node: &str, slices: &[impl Borrow<NetworkNodeSlice>]) {
        let vteps =
            slices.iter().map(Borrow::borrow).map(|slice| (slice.spec.node.as_str(), slice.spec.vtep.parse().ok()));
        let vteps: BTreeMap<&str, Option<IpAddr>> = vteps.collect();
        let own = slices.iter().map(Borrow::borrow).filter(|slice| slice.spec.node == node);
        let told = own.filter_map(|slice| slice.spec.path_mtu.as_ref()).flat_map(|it| &it.small);
        let known =
            |path: &SmallPath| Some((vteps.get(path.node.as_str()).copied().flatten()?, u16::try_from(path.mtu).ok()?));
        *self.lock() = Told { small: told.filter_map(known).collect(), since: QUIET };
    }

    pub fn get(&self) -> Small {
        self.lock().small.clone()
    }

    /// Tells it at once.
    pub fn publish(&self, small: Small) {
        *self.lock() = Told { small, since: 0 };
    }

    /// A second has passed: takes over what is known by now, unless something was only just told. Returns whether there is news.
    pub fn is_due(&self, small: Small) -> bool {
        let mut told = self.lock();
        told.since = told.since.saturating_add(1);
        if told.small == small || told.since <= QUIET {
            return false;
        }
        for (node, carries) in small.iter().filter(|(node, carries)| told.small.get(node) != Some(carries)) {
            tracing::warn!(%node, carries, "the path to a node carries less than pods may send");
        }
        for node in told.small.keys().filter(|node| !small.contains_key(node)) {
            tracing::info!(%node, "the path to a node carries what pods may send");
        }
        *told = Told { small, since: 0 };
        true
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    /// The other nodes that have pods on this node's networks, by tunnel endpoint, each with the largest packet that pods of this node
    /// may send there, in bytes with the outer IP header.
    pub(crate) fn wanted_sizes(&self) -> BTreeMap<IpAddr, u16> {
        let mut pods: BTreeMap<String, Vec<Endpoint>> = BTreeMap::new();
        for endpoint in self.journal.select(|_| true) {
            pods.entry(endpoint.network.clone()).or_default().push(endpoint);
        }
        let needed = pods.iter().map(|(network, pods)| (network.as_str(), self.needed(network, pods))).collect();
        let mut wanted = wanted(&self.cluster.node, &needed, &self.cluster.slices.state());
        wanted.retain(|vtep, _| self.underlay.reaches(*vtep));
        wanted
    }

    /// The largest packet that pods of this node may send on a network, as it is between nodes.
    pub(crate) fn needed(&self, network: &str, pods: &[Endpoint]) -> u16 {
        let object = self.cluster.networks.get(&ObjectRef::new(network));
        needed(object.and_then(|it| Network::new(&it).ok()).as_ref(), pods, self.underlay)
    }
}

/// Pods keep the MTU that they were plugged in with, and those to come get the network's.
fn needed(network: Option<&Network>, pods: &[Endpoint], underlay: Underlay) -> u16 {
    let to_come = network.map(|network| network.mtu(underlay));
    let mtu = pods.iter().map(|pod| pod.mtu).chain(to_come).max().unwrap_or(0);
    // Of a network that isn't there any more it isn't known whether it was encrypted; then less is asked for.
    let size = network.map_or(mtu + underlay.vxlan(), |network| network.size(mtu, underlay));
    u16::try_from(size).unwrap_or(u16::MAX)
}

fn wanted(own: &str, needed: &BTreeMap<&str, u16>, slices: &[impl Borrow<NetworkNodeSlice>]) -> BTreeMap<IpAddr, u16> {
    let mut wanted = BTreeMap::new();
    for slice in slices.iter().map(Borrow::borrow).filter(|slice| slice.spec.node != own) {
        if let (Some(needed), Ok(vtep)) = (needed.get(slice.spec.network.as_str()), slice.spec.vtep.parse()) {
            let size = wanted.entry(vtep).or_insert(*needed);
            *size = (*size).max(*needed);
        }
    }
    wanted
}

/// What a network's slice says, `others` being the slices of the same network, this node's own among them, which says what was told before.
pub(crate) fn of_network<'a>(
    own: &str,
    needed: u16,
    small: &Small,
    others: impl IntoIterator<Item = &'a NetworkNodeSlice>,
) -> Option<PathMtu> {
    let (mut before, mut paths) = (BTreeSet::new(), Vec::new());
    for slice in others {
        if slice.spec.node == own {
            before.extend(slice.spec.path_mtu.iter().flat_map(|it| &it.small).map(|path| path.node.as_str()));
        } else if let Some(mtu) = slice.spec.vtep.parse().ok().and_then(|vtep| small.get(&vtep))
            && *mtu < needed
        {
            paths.push(SmallPath { node: slice.spec.node.clone(), mtu: (*mtu).into() });
        }
    }
    if paths.is_empty() {
        return None;
    }
    // Those that are named already stay, that a slice isn't written anew with each path that is found.
    paths.sort_by_cached_key(|path| (path.mtu, !before.contains(path.node.as_str()), path.node.clone()));
    let rest = paths.split_off(paths.len().min(NAMED));
    Some(PathMtu { needed: needed.into(), small: paths, more: at_least(rest.len()) })
}

/// The largest power of two that is no more than `count`, for the same reason.
fn at_least(count: usize) -> u32 {
    count.checked_ilog2().and_then(|bits| 1u32.checked_shl(bits)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::NetworkNodeSliceSpec;

    fn slice(network: &str, node: u8) -> NetworkNodeSlice {
        let spec = NetworkNodeSliceSpec {
            network: network.into(),
            node: format!("node-{node}"),
            vtep: vtep(node).to_string(),
            ..Default::default()
        };
        NetworkNodeSlice::new(&format!("{network}.node-{node}"), spec)
    }

    fn vtep(node: u8) -> IpAddr {
        [192, 0, 2, node].into()
    }

    #[test]
    fn the_operator_counts_with_the_same_overhead() {
        for vtep in [vtep(1), "fd00::1".parse().unwrap()] {
            assert_eq!(portolan_crds::vxlan_overhead(vtep), portolan_net::vxlan_overhead(vtep));
            assert_eq!(portolan_crds::wireguard_overhead(vtep), portolan_net::wireguard_overhead(vtep));
        }
    }

    #[test]
    fn a_node_needs_what_the_largest_network_in_common_does() {
        let slices = [slice("a", 1), slice("a", 2), slice("b", 2), slice("a", 3), slice("c", 4)];
        let needed = BTreeMap::from([("a", 1500), ("b", 9050)]);
        let wanted = wanted("node-1", &needed, &slices);
        assert_eq!(wanted, BTreeMap::from([(vtep(2), 9050), (vtep(3), 1500)]));
    }

    #[test]
    fn pods_need_their_own_mtu_until_they_are_made_again() {
        let underlay = Underlay { vtep: vtep(1), port: 7789, mtu: 1500 };
        let pod = |mtu: u32| -> Endpoint {
            let text = format!(
                r#"{{"container":"c","interface":"eth1","network":"backend","vni":77,"netns":"/run/netns/x","address":"10.32.0.5",
                "prefix":16,"mac":"02:00:00:00:00:01","mtu":{mtu},"resolver":true,"namespace":"shop","pod":"db-0","uid":"u"}}"#
            );
            serde_json::from_str(&text).unwrap()
        };
        let network = |mtu: Option<u32>| {
            let spec =
                portolan_crds::ContainerNetworkSpec { subnets: vec!["10.32.0.0/16".into()], mtu, ..Default::default() };
            let mut object = portolan_crds::ContainerNetwork::new("backend", spec);
            object.status = Some(portolan_crds::ContainerNetworkStatus { vni: Some(77), ..Default::default() });
            Network::new(&object).unwrap()
        };
        assert_eq!(needed(Some(&network(None)), &[pod(1450)], underlay), 1500);
        assert_eq!(needed(Some(&network(Some(1370))), &[pod(1370), pod(1450)], underlay), 1500, "one is left");
        assert_eq!(needed(Some(&network(Some(1370))), &[pod(1370)], underlay), 1420);
        assert_eq!(needed(Some(&network(Some(9000))), &[pod(1450)], underlay), 9050, "the next one sends more");
        assert_eq!(needed(None, &[pod(1450)], underlay), 1500, "a network that is being deleted");
    }

    #[test]
    fn a_slice_names_the_paths_that_its_network_needs() {
        let slices = [slice("a", 1), slice("a", 2), slice("a", 3)];
        let small = Small::from([(vtep(2), 1420), (vtep(3), 1300), (vtep(4), 1000)]);
        let named = |needed| of_network("node-1", needed, &small, &slices);
        let path = |node: u8, mtu| SmallPath { node: format!("node-{node}"), mtu };
        assert_eq!(named(1500), Some(PathMtu { needed: 1500, small: vec![path(3, 1300), path(2, 1420)], more: 0 }));
        assert_eq!(named(1420), Some(PathMtu { needed: 1420, small: vec![path(3, 1300)], more: 0 }));
        assert_eq!(named(1300), None, "all that is needed passes");
        assert_eq!(of_network("node-1", 1500, &Small::new(), &slices), None);
    }

    #[test]
    fn a_slice_stays_small_and_is_not_written_with_each_path() {
        let mut slices: Vec<_> = (1..=200).map(|node| slice("a", node)).collect();
        let mut small = Small::new();
        let mut written = 0;
        for node in (2..=200).rev() {
            small.insert(vtep(node), 1420);
            let told = of_network("node-1", 1500, &small, &slices);
            written += u32::from(slices[0].spec.path_mtu != told);
            slices[0].spec.path_mtu = told;
        }
        let told = slices[0].spec.path_mtu.clone().unwrap();
        assert_eq!((told.small.len(), told.more), (NAMED, 128));
        assert_eq!(written, 16 + 8);
        small.insert(vtep(77), 1300);
        let worst = of_network("node-1", 1500, &small, &slices).unwrap().small[0].clone();
        assert_eq!(worst, SmallPath { node: "node-77".into(), mtu: 1300 }, "the smallest is always named");
    }

    #[test]
    fn a_new_agent_begins_with_what_the_slices_say() {
        let mut slices = [slice("a", 1), slice("a", 2), slice("a", 3)];
        let small = Small::from([(vtep(2), 1420), (vtep(3), 1300)]);
        slices[0].spec.path_mtu = of_network("node-1", 1500, &small, &slices);
        let paths = SmallPaths::default();
        paths.resume("node-1", &slices);
        assert_eq!(paths.get(), small);
        paths.resume("node-2", &slices);
        assert_eq!(paths.get(), Small::new(), "another node's");
    }

    #[test]
    fn news_are_told_at_once_and_then_not_more_often_than_slices_bear() {
        let paths = SmallPaths::default();
        paths.resume("node-1", &[slice("a", 1)]);
        assert!(!paths.is_due(Small::new()));
        let small = Small::from([(vtep(2), 1420)]);
        assert!(paths.is_due(small.clone()) && !paths.is_due(small.clone()));
        let more = Small::from([(vtep(2), 1420), (vtep(3), 1420)]);
        let waited = (1..=60).find(|_| paths.is_due(more.clone()));
        assert_eq!((waited, paths.get()), (Some(QUIET), more));
    }
}
