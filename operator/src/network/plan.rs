//! From what is there to what is to be written. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::ResourceExt;
use portolan_crds::{ContainerNetwork, ContainerNetworkStatus, NETWORK_FINALIZER, NetworkNodeSlice, condition};
use portolan_runtime::conditions;

use super::validate::{self, Refusal};
use super::vni;

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
    let pods = plugged_pods(&world.slices);
    let count = |name: &str| pods.get(name).map_or(0, Vec::len);
    let usable: BTreeMap<String, Result<(), Refusal>> =
        world.networks.iter().map(|network| (network.name_any(), validate::check(network, &taken))).collect();
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
        if network.metadata.deletion_timestamp.is_some() {
            steps.extend(ending(network, plugged));
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
        steps.extend(status(network, outcome, plugged.len()));
    }
    steps
}

/// Who is plugged into which network: `namespace/pod (node)`.
fn plugged_pods(slices: &[NetworkNodeSlice]) -> BTreeMap<String, Vec<String>> {
    let mut pods: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for slice in slices {
        let names = slice.spec.endpoints.iter().map(|it| format!("{}/{} ({})", it.namespace, it.pod, slice.spec.node));
        pods.entry(slice.spec.network.clone()).or_default().extend(names);
    }
    pods
}

fn ending(network: &ContainerNetwork, plugged: &[String]) -> Option<Step> {
    if plugged.is_empty() {
        let ours = network.finalizers().iter().any(|finalizer| finalizer == NETWORK_FINALIZER);
        return ours.then(|| Step::Release(network.clone()));
    }
    let mut named = plugged.to_vec();
    named.sort();
    let rest = named.len().saturating_sub(NAMED_PODS);
    named.truncate(NAMED_PODS);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    let message = format!("deletion waits for the pods that are plugged in: {}{more}", named.join(", "));
    let vni = network.status.as_ref().and_then(|status| status.vni);
    let refusal = Refusal { reason: "Deleting", message };
    written(network, vni, Err(refusal), plugged.len())
}

fn status(network: &ContainerNetwork, outcome: Result<u32, Refusal>, endpoints: usize) -> Option<Step> {
    let held = network.status.as_ref().and_then(|status| status.vni);
    let vni = outcome.as_ref().ok().copied().or(held);
    written(network, vni, outcome.map(|_| ()), endpoints)
}

fn written(
    network: &ContainerNetwork,
    vni: Option<u32>,
    outcome: Result<(), Refusal>,
    endpoints: usize,
) -> Option<Step> {
    let before = network.status.clone().unwrap_or_default();
    let mut status = before.clone();
    status.vni = vni;
    status.endpoints = i64::try_from(endpoints).unwrap_or(i64::MAX);
    let (state, reason, message) = match &outcome {
        Ok(()) => (condition::TRUE, "Accepted", "pods can be plugged in"),
        Err(refusal) => (condition::FALSE, refusal.reason, refusal.message.as_str()),
    };
    conditions::set(&mut status.conditions, condition::READY, state, reason, message, network.metadata.generation);
    (status != before).then(|| Step::Status { network: network.clone(), status })
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use portolan_crds::{ContainerNetworkSpec, Endpoint, NetworkNodeSliceSpec};

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
