//! From what is there to what is to be written. Pure.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::ResourceExt;
use portolan_crds::{
    AddressCounts, ContainerNetwork, ContainerNetworkStatus, Endpoint, IPClaim, KeyGeneration, NETWORK_FINALIZER,
    NetworkNodeSlice, capacity, condition, subnets,
};
use portolan_runtime::conditions;

use super::validate::{self, Refusal};
use super::{egress, families, keys, narrow, vni};

/// Pods that a message names before it only counts the rest.
const NAMED_PODS: usize = 5;

/// What was read.
#[derive(Debug, Default)]
pub struct World {
    /// All networks, read from the API just now.
    pub networks: Vec<ContainerNetwork>,
    /// All nodes.
    pub nodes: Vec<Node>,
    /// All slices.
    pub slices: Vec<NetworkNodeSlice>,
    /// All claims.
    pub claims: Vec<IPClaim>,
    /// The generation of keys that encrypted networks are to have.
    pub keys: Option<KeyGeneration>,
    /// The ranges of Services, where the API tells them.
    pub service_cidrs: Vec<ServiceCIDR>,
}

/// What is to be done for one network.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Take responsibility for what pods leave behind.
    AddFinalizer(ContainerNetwork),
    /// Write the status.
    Status {
        /// The network as it was read.
        network: ContainerNetwork,
        /// What it shall say.
        status: ContainerNetworkStatus,
    },
    /// No pod is plugged in any more: delete what nodes have claimed, then let the network go.
    Release(ContainerNetwork),
}

/// The steps for all networks.
pub fn plan(world: &World) -> Vec<Step> {
    let taken = validate::taken(&world.nodes, &world.service_cidrs);
    let pods = plugged_pods(&world.slices, |_| true);
    let missed = plugged_pods(&world.slices, |it| it.not_admitted);
    let count = |name: &str| pods.get(name).map_or(0, Vec::len);
    let used = used_addresses(world);
    let usable: BTreeMap<String, Result<(), Refusal>> =
        world.networks.iter().map(|network| (network.name_any(), validate::check(network, &taken).map(drop))).collect();
    // A network that can't be used gets no VNI, but keeps the one it has: pods may be plugged in.
    let numbered: Vec<ContainerNetwork> = world
        .networks
        .iter()
        .filter(|network| {
            network.status.as_ref().is_some_and(|status| status.vni.is_some())
                || usable.get(&network.name_any()).is_some_and(Result::is_ok)
        })
        .cloned()
        .collect();
    let vnis = vni::assign(&numbered, count);

    let mut steps = Vec::new();
    for network in &world.networks {
        let name = network.name_any();
        let none = Vec::new();
        let plugged = pods.get(&name).unwrap_or(&none);
        let missed = missed.get(&name).unwrap_or(&none);
        let narrow = narrow::of_network(&world.slices, network);
        let keys = world.keys.clone().filter(|_| keys::is_encrypted(network));
        let egress = egress::of_network(&world.slices, network);
        let split = families::of_network(&world.slices, network);
        let seen = Seen { pods: plugged, missed, used: used.get(name.as_str()), narrow, split, keys, egress };
        if network.metadata.deletion_timestamp.is_some() {
            steps.extend(ending(network, &seen));
            continue;
        }
        if !network.finalizers().iter().any(|finalizer| finalizer == NETWORK_FINALIZER) {
            steps.push(Step::AddFinalizer(network.clone()));
        }
        let outcome = match (usable.get(&name), vnis.get(&name)) {
            (Some(Err(refusal)), _) | (_, Some(Err(refusal))) => Err(refusal.clone()),
            (_, Some(Ok(vni))) => Ok(*vni),
            (_, None) => continue,
        };
        steps.extend(status(network, outcome, &seen));
    }
    steps
}

/// Those that are plugged into each network and of whom `is` holds: `namespace/pod (node)`.
fn plugged_pods(slices: &[NetworkNodeSlice], is: impl Fn(&Endpoint) -> bool) -> BTreeMap<String, Vec<String>> {
    let mut pods: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for slice in slices {
        let endpoints = slice.spec.endpoints.iter().filter(|it| is(it));
        let names = endpoints.map(|it| format!("{}/{} ({})", it.namespace, it.pod, slice.spec.node));
        pods.entry(slice.spec.network.clone()).or_default().extend(names);
    }
    pods
}

/// Which addresses of which network are somebody's: a pod's, or kept for one.
fn used_addresses(world: &World) -> BTreeMap<&str, HashSet<IpAddr>> {
    let mut used: BTreeMap<&str, HashSet<IpAddr>> = BTreeMap::new();
    for slice in &world.slices {
        let addresses = slice.spec.endpoints.iter().flat_map(|endpoint| endpoint.addresses());
        used.entry(&slice.spec.network).or_default().extend(addresses);
    }
    for claim in &world.claims {
        used.entry(&claim.spec.network).or_default().extend(claim.spec.addresses());
    }
    used
}

/// What the nodes say of one network.
struct Seen<'a> {
    /// Who is plugged in.
    pods: &'a [String],
    /// Who of them doesn't get the network's names.
    missed: &'a [String],
    /// Which addresses are somebody's.
    used: Option<&'a HashSet<IpAddr>>,
    /// Which paths are too small, and what to do; none if no such path is known.
    narrow: Option<String>,
    /// Which nodes don't reach each other for their addresses' families; none if all are of one.
    split: Option<String>,
    /// Which keys nodes are to have, if the network is encrypted.
    keys: Option<KeyGeneration>,
    /// Whether pods reach the outside, if they are to.
    egress: Option<egress::Finding>,
}

impl Seen<'_> {
    fn counts(&self, subnet: IpNet) -> AddressCounts {
        let used = self.used.map_or(0, |used| used.iter().filter(|address| subnet.contains(*address)).count());
        let used = i64::try_from(used).unwrap_or(i64::MAX);
        let all = i64::try_from(capacity(subnet)).unwrap_or(i64::MAX);
        AddressCounts { used, free: all.saturating_sub(used).max(0) }
    }
}

/// The first of them in order, and how many more there are.
fn listed(pods: &[String]) -> String {
    let mut named = pods.to_vec();
    named.sort();
    let rest = named.len().saturating_sub(NAMED_PODS);
    named.truncate(NAMED_PODS);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    format!("{}{more}", named.join(", "))
}

fn ending(network: &ContainerNetwork, seen: &Seen<'_>) -> Option<Step> {
    if seen.pods.is_empty() {
        let ours = network.finalizers().iter().any(|finalizer| finalizer == NETWORK_FINALIZER);
        return ours.then(|| Step::Release(network.clone()));
    }
    let message = format!("deletion waits for the pods that are plugged in: {}", listed(seen.pods));
    let vni = network.status.as_ref().and_then(|status| status.vni);
    let refusal = Refusal { reason: "Deleting", message };
    written(network, vni, Err(refusal), seen)
}

fn status(network: &ContainerNetwork, outcome: Result<u32, Refusal>, seen: &Seen<'_>) -> Option<Step> {
    let held = network.status.as_ref().and_then(|status| status.vni);
    let vni = outcome.as_ref().ok().copied().or(held);
    written(network, vni, outcome.map(|_| ()), seen)
}

fn written(
    network: &ContainerNetwork,
    vni: Option<u32>,
    outcome: Result<(), Refusal>,
    seen: &Seen<'_>,
) -> Option<Step> {
    let before = network.status.clone().unwrap_or_default();
    let mut status = before.clone();
    status.vni = vni;
    status.keys.clone_from(&seen.keys);
    status.endpoints = i64::try_from(seen.pods.len()).unwrap_or(i64::MAX);
    for subnet in subnets(&network.spec.subnets).unwrap_or_default() {
        let counts = Some(seen.counts(subnet));
        match subnet {
            IpNet::V4(_) => status.ipv4 = counts,
            IpNet::V6(_) => status.ipv6 = counts,
        }
    }
    let (state, reason, message) = match &outcome {
        Ok(()) => (condition::TRUE, "Accepted", "pods can be plugged in"),
        Err(refusal) => (condition::FALSE, refusal.reason, refusal.message.as_str()),
    };
    let generation = network.metadata.generation;
    conditions::set(&mut status.conditions, condition::READY, state, reason, message, generation);
    let (state, reason, message) = names_injected(seen.missed);
    conditions::set(&mut status.conditions, condition::NAMES_INJECTED, state, reason, &message, generation);
    let (state, reason, message) = match &seen.narrow {
        Some(message) => (condition::TRUE, narrow::REASON, message.as_str()),
        None => (condition::FALSE, "PathsSuffice", "no path between nodes is known to carry less than pods may send"),
    };
    conditions::set(&mut status.conditions, condition::MTU_MISMATCH, state, reason, message, generation);
    match &seen.split {
        Some(message) => {
            let kind = condition::FAMILY_MISMATCH;
            conditions::set(&mut status.conditions, kind, condition::TRUE, families::REASON, message, generation);
        }
        None => status.conditions.retain(|it| it.type_ != condition::FAMILY_MISMATCH),
    }
    match &seen.egress {
        Some((state, reason, message)) => {
            conditions::set(&mut status.conditions, condition::EGRESS_READY, state, reason, message, generation);
        }
        None => status.conditions.retain(|it| it.type_ != condition::EGRESS_READY),
    }
    (status != before).then(|| Step::Status { network: network.clone(), status })
}

/// Whether all pods got their DNS settings; if not, which ones didn't and what helps.
fn names_injected(missed: &[String]) -> (&'static str, &'static str, String) {
    if missed.is_empty() {
        let message = "all pods ask Portolan's DNS server, but for those with DNS settings of their own";
        return (condition::TRUE, "Admitted", message.to_owned());
    }
    let message = format!(
        "{} of the pods were made while the webhook could not be reached, and don't resolve the network's names: {}. Make them again: kubectl rollout restart their workloads, or kubectl delete pod",
        missed.len(),
        listed(missed)
    );
    (condition::FALSE, "PodsNotAdmitted", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
    use portolan_crds::{ContainerNetworkSpec, IPClaimSpec, NetworkNodeSliceSpec, PathMtu, SmallPath};

    fn network(name: &str) -> ContainerNetwork {
        let spec = ContainerNetworkSpec { subnets: vec!["10.32.0.0/16".to_owned()], ..Default::default() };
        ContainerNetwork::new(name, spec)
    }

    fn slice(network: &str, pods: usize) -> NetworkNodeSlice {
        let endpoint = |n| Endpoint { namespace: "default".into(), pod: format!("db-{n}"), ..Default::default() };
        let spec = NetworkNodeSliceSpec {
            network: network.to_owned(),
            node: "node1".to_owned(),
            endpoints: (0..pods).map(endpoint).collect(),
            ..Default::default()
        };
        NetworkNodeSlice::new(&format!("{network}.node1"), spec)
    }

    #[test]
    fn nodes_of_both_families_are_told_as_long_as_there_are() {
        let mut world = World { networks: vec![network("a")], slices: vec![slice("a", 1)], ..World::default() };
        let mut other = slice("a", 1);
        (other.spec.node, other.spec.vtep) = ("node2".to_owned(), "192.0.2.2".to_owned());
        world.slices[0].spec.vtep = "fd00::1".to_owned();
        let told = |world: &World| {
            let mut statuses = plan(world).into_iter().filter_map(|step| match step {
                Step::Status { status, .. } => Some(status),
                _ => None,
            });
            statuses.next_back()
        };
        let of = |status: &ContainerNetworkStatus| {
            status.conditions.iter().find(|it| it.type_ == condition::FAMILY_MISMATCH).cloned()
        };
        assert_eq!(of(&told(&world).unwrap()), None);
        world.slices.push(other);
        let status = told(&world).unwrap();
        let condition = of(&status).unwrap();
        assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("True", "NodesOfBothFamilies"));
        assert!(condition.message.contains("node1 (fd00::1)"), "{}", condition.message);
        world.networks[0].status = Some(status);
        world.slices.pop();
        assert_eq!(of(&told(&world).unwrap()), None, "it is mended");
    }

    #[test]
    fn encrypted_networks_are_told_the_generation_of_keys() {
        let mut secret = network("secret");
        secret.spec.encryption = portolan_crds::Encryption::WireGuard;
        let mut open = network("open");
        open.spec.subnets = vec!["10.33.0.0/16".to_owned()];
        let keys = Some(KeyGeneration { generation: 7, since: None });
        let world = World { networks: vec![secret, open], keys: keys.clone(), ..Default::default() };
        let told = plan(&world).into_iter().filter_map(|step| match step {
            Step::Status { network, status } => Some((network.name_any(), status.keys)),
            _ => None,
        });
        assert_eq!(told.collect::<Vec<_>>(), [("secret".to_owned(), keys), ("open".to_owned(), None)]);
    }

    fn ready(status: &ContainerNetworkStatus) -> (&str, &str) {
        let condition = conditions::find(&status.conditions, condition::READY).unwrap();
        (&condition.status, &condition.reason)
    }

    #[test]
    fn a_new_network_gets_finalizer_number_and_condition() {
        let world = World { networks: vec![network("a")], slices: vec![slice("a", 2)], ..Default::default() };
        let steps = plan(&world);
        assert!(matches!(&steps[0], Step::AddFinalizer(_)));
        let Step::Status { status, .. } = &steps[1] else { panic!("{steps:?}") };
        assert_eq!((status.vni, status.endpoints), (Some(vni::FIRST), 2));
        assert_eq!(ready(status), ("True", "Accepted"));
    }

    #[test]
    fn addresses_are_counted_by_family() {
        let mut dual = network("a");
        dual.spec.subnets = vec!["fd32::/120".to_owned(), "10.32.0.0/24".to_owned()];
        let mut plugged = slice("a", 0);
        let endpoint = |last: u8, second: Option<&str>| Endpoint {
            address: format!("10.32.0.{last}"),
            second_address: second.map(str::to_owned),
            ..Default::default()
        };
        plugged.spec.endpoints = vec![endpoint(5, Some("fd32::5")), endpoint(6, None)];
        let claim = |address: &str, second: Option<&str>| {
            let (network, second_address) = ("a".to_owned(), second.map(str::to_owned));
            let spec = IPClaimSpec { network, address: address.to_owned(), second_address, ..Default::default() };
            IPClaim::new(address, spec)
        };
        // One that is plugged in, and one that isn't; and another network's.
        let mut claims = vec![claim("10.32.0.5", Some("fd32::5")), claim("10.32.0.9", Some("fd32::9"))];
        claims.push(claim("10.32.0.77", None));
        claims[2].spec.network = "b".to_owned();
        let world = World { networks: vec![dual], slices: vec![plugged], claims, ..Default::default() };
        let Step::Status { status, .. } = &plan(&world)[1] else { panic!() };
        assert_eq!(status.ipv4, Some(AddressCounts { used: 3, free: 250 }));
        assert_eq!(status.ipv6, Some(AddressCounts { used: 2, free: 252 }));
        let only_ipv4 = World { networks: vec![network("a")], ..Default::default() };
        let Step::Status { status, .. } = &plan(&only_ipv4)[1] else { panic!() };
        assert_eq!((status.ipv4, status.ipv6), (Some(AddressCounts { used: 0, free: 65533 }), None));
    }

    #[test]
    fn nothing_is_written_twice() {
        let mut done = network("a");
        done.metadata.finalizers = Some(vec![NETWORK_FINALIZER.to_owned()]);
        let steps = plan(&World { networks: vec![done.clone()], ..Default::default() });
        let Step::Status { status, .. } = &steps[0] else { panic!("{steps:?}") };
        done.status = Some(status.clone());
        assert_eq!(plan(&World { networks: vec![done], ..Default::default() }), []);
    }

    #[test]
    fn a_network_that_cannot_be_used_keeps_its_number() {
        let mut bad = network("a");
        bad.spec.subnets = vec!["169.254.0.0/16".to_owned()];
        let world = |network: &ContainerNetwork| World { networks: vec![network.clone()], ..Default::default() };
        let Step::Status { status, .. } = &plan(&world(&bad))[1] else { panic!() };
        assert_eq!((status.vni, ready(status)), (None, ("False", "SubnetOverlaps")));
        bad.status = Some(ContainerNetworkStatus { vni: Some(5000), ..Default::default() });
        let Step::Status { status, .. } = &plan(&world(&bad))[1] else { panic!() };
        assert_eq!((status.vni, ready(status)), (Some(5000), ("False", "SubnetOverlaps")));
    }

    #[test]
    fn pods_that_admission_missed_are_named_until_they_are_made_again() {
        let mut network = network("a");
        network.metadata.finalizers = Some(vec![NETWORK_FINALIZER.to_owned()]);
        let mut told = |missed: usize| {
            let mut slices = [slice("a", 9), slice("b", 3)];
            slices[0].spec.endpoints.iter_mut().take(missed).for_each(|it| it.not_admitted = true);
            slices[1].spec.endpoints[0].not_admitted = true;
            let steps = plan(&World { networks: vec![network.clone()], slices: slices.to_vec(), ..Default::default() });
            let Some(Step::Status { status, .. }) = steps.first() else { return None };
            assert_eq!(ready(status), ("True", "Accepted"), "they are plugged in all the same");
            network.status = Some(status.clone());
            conditions::find(&status.conditions, condition::NAMES_INJECTED).cloned()
        };
        assert_eq!(told(0).unwrap().status, "True");
        let some = told(7).unwrap();
        assert_eq!((some.status.as_str(), some.reason.as_str()), ("False", "PodsNotAdmitted"));
        assert!(
            some.message.starts_with("7 of the pods") && some.message.contains(" default/db-0 (node1), "),
            "{some:?}"
        );
        assert!(some.message.contains("default/db-4 (node1) and 2 more. Make them again: kubectl rollout restart"));
        assert_eq!(told(7), None, "nothing is written twice");
        assert_eq!(told(0).unwrap().status, "True");
    }

    #[test]
    fn a_path_that_is_too_small_is_told_until_it_is_repaired() {
        let mut network = network("a");
        network.metadata.finalizers = Some(vec![NETWORK_FINALIZER.to_owned()]);
        let mut told = |mtu: Option<u32>| {
            let mut plugged = slice("a", 1);
            let small = mtu.map(|mtu| vec![SmallPath { node: "node2".to_owned(), mtu }]);
            plugged.spec.path_mtu = small.map(|small| PathMtu { needed: 1500, small, more: 0 });
            let steps = plan(&World { networks: vec![network.clone()], slices: vec![plugged], ..Default::default() });
            let Some(Step::Status { status, .. }) = steps.first() else { return None };
            assert_eq!(ready(status), ("True", "Accepted"), "it can be used all the same");
            network.status = Some(status.clone());
            conditions::find(&status.conditions, condition::MTU_MISMATCH).cloned()
        };
        let status_of = |condition: Option<Condition>| condition.map(|it| (it.status, it.reason));
        let fine = Some(("False".to_owned(), "PathsSuffice".to_owned()));
        assert_eq!(status_of(told(None)), fine);
        let small = told(Some(1420)).unwrap();
        assert_eq!((small.status.as_str(), small.reason.as_str()), ("True", "PathTooSmall"));
        assert!(small.message.contains("from node1 to node2 1420 pass: set spec.mtu to 1370 or less"), "{small:?}");
        assert_eq!(told(Some(1420)), None, "nothing is written twice");
        assert_eq!(status_of(told(None)), fine);
    }

    #[test]
    fn deletion_waits_for_pods_and_says_for_whom() {
        let mut going = network("a");
        going.metadata.deletion_timestamp = Some(Time(jiff::Timestamp::now()));
        going.metadata.finalizers = Some(vec![NETWORK_FINALIZER.to_owned()]);
        let waiting = plan(&World { networks: vec![going.clone()], slices: vec![slice("a", 7)], ..Default::default() });
        let Step::Status { status, .. } = &waiting[0] else { panic!("{waiting:?}") };
        assert_eq!(ready(status), ("False", "Deleting"));
        assert!(status.conditions[0].message.ends_with("default/db-4 (node1) and 2 more"), "{:?}", status.conditions);
        let free = plan(&World { networks: vec![going], slices: vec![slice("a", 0)], ..Default::default() });
        assert!(matches!(free[..], [Step::Release(_)]));
    }
}
