//! What the agent counts.

use std::sync::Arc;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct NetworkLabel {
    network: String,
}

/// The agent's metrics.
#[derive(Clone)]
pub(crate) struct Metrics {
    pub cni_add: Histogram,
    pub dns: portolan_dns::Metrics,
    endpoints: Family<NetworkLabel, Gauge>,
    names: Family<NetworkLabel, Gauge>,
    pub silent_nodes: Gauge,
    pub small_paths: Gauge,
    pub waiting_nodes: Gauge,
    pub unreachable_nodes: Gauge,
    pub unreachable_pod_nodes: Gauge,
    pub blocked_networks: Gauge,
}

impl Metrics {
    pub fn new() -> (Self, Arc<Registry>) {
        let buckets = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
        let metrics = Self {
            cni_add: Histogram::new(buckets),
            dns: portolan_dns::Metrics::default(),
            endpoints: Family::default(),
            names: Family::default(),
            silent_nodes: Gauge::default(),
            small_paths: Gauge::default(),
            waiting_nodes: Gauge::default(),
            unreachable_nodes: Gauge::default(),
            unreachable_pod_nodes: Gauge::default(),
            blocked_networks: Gauge::default(),
        };
        let mut registry = Registry::with_prefix("portolan");
        let help = "Time to plug a pod in, those without networks included";
        registry.register_with_unit("cni_add", help, Unit::Seconds, metrics.cni_add.clone());
        registry.register("network_endpoints", "Pods of this node on a network", metrics.endpoints.clone());
        let help = "Pods of all nodes whose names this node's DNS servers answer";
        registry.register("dns_pods", help, metrics.names.clone());
        let help = "Nodes on this node's networks that answered once and don't any more";
        registry.register("network_silent_nodes", help, metrics.silent_nodes.clone());
        let help = "Nodes on this node's networks to which the path carries less than pods may send";
        registry.register("network_small_paths", help, metrics.small_paths.clone());
        let help = "Nodes on this node's encrypted networks with which there has been no handshake by their newest key";
        registry.register("network_nodes_without_handshake", help, metrics.waiting_nodes.clone());
        let help = "Nodes on this node's networks that it doesn't reach, as their addresses are of the other IP family";
        registry.register("network_unreachable_nodes", help, metrics.unreachable_nodes.clone());
        let help = "Nodes whose part of the pod network this node doesn't reach, as their addresses are of the other IP family";
        registry.register("pod_network_unreachable_nodes", help, metrics.unreachable_pod_nodes.clone());
        let help = "Networks with egressNAT whose pods on this node don't reach the outside";
        registry.register("network_egress_blocked", help, metrics.blocked_networks.clone());
        metrics.dns.register(&mut registry);
        (metrics, Arc::new(registry))
    }

    /// Tells how many pods of this node are on each network; networks that aren't named are gone.
    pub fn set_endpoints(&self, counts: impl Iterator<Item = (String, usize)>) {
        set(&self.endpoints, counts);
    }

    /// Tells how many pods are named on each network; networks that aren't named are gone.
    pub fn set_names(&self, counts: impl Iterator<Item = (String, usize)>) {
        set(&self.names, counts);
    }
}

fn set(gauges: &Family<NetworkLabel, Gauge>, counts: impl Iterator<Item = (String, usize)>) {
    gauges.clear();
    for (network, count) in counts {
        gauges.get_or_create(&NetworkLabel { network }).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}
