//! The other nodes and their pods, as the API has them.

use std::net::{IpAddr, Ipv4Addr};

use portolan_net::{Mac, endpoint_mac};
use portolan_tests::node::Node;
use serde_json::{Value, json};

/// The network, which all of them are on.
pub const NETWORK: &str = "backend";
/// Its subnet.
pub const SUBNET: &str = "10.64.0.0/10";
/// The VNI of it.
pub const VNI: u32 = 77;
const SLICES: &str = "/apis/portolan.dev/v1alpha1/networknodeslices";
const NETWORKS: &str = "/apis/portolan.dev/v1alpha1/containernetworks";
/// Addresses of each node.
const BLOCK: u32 = 64;

/// As many nodes, with as many pods on each.
#[derive(Clone, Copy, Debug)]
pub struct World {
    pub nodes: u32,
    pub pods: u32,
}

impl World {
    /// Tells the API of all of them.
    pub fn make(&self, node: &Node) {
        node.make_network(NETWORK, VNI, &[SUBNET]);
        node.api.edit(&format!("{NETWORKS}/{NETWORK}"), json!({"spec": {"neighborSuppression": true}}));
        node.make_network("other", VNI + 1, &["10.32.0.0/16"]);
        for far in 0..self.nodes {
            let [_, _, c, d] = (far + 256).to_be_bytes();
            let spec = json!({"network": NETWORK, "node": format!("far-{far}"), "vtep": format!("198.18.{c}.{d}"),
                "endpoints": self.endpoints(far, 0)});
            node.api.make(
                SLICES,
                json!({"apiVersion": "portolan.dev/v1alpha1", "kind": "NetworkNodeSlice",
                    "metadata": {"name": format!("{NETWORK}.far-{far}")}, "spec": spec}),
            );
        }
    }

    /// How many endpoints there are.
    pub fn endpoints_in_all(&self) -> u32 {
        self.nodes * self.pods
    }

    /// The address of a pod. The first pod of a node is another one in each generation, and has another address.
    pub fn address(&self, far: u32, pod: u32, generation: u32) -> Ipv4Addr {
        let number = if pod == 0 { (self.pods + generation) % BLOCK } else { pod };
        // The first blocks are for pods that are plugged in here.
        Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 80, 0, 0)) + far * BLOCK + number)
    }

    /// The MAC that comes with it.
    pub fn mac(&self, address: Ipv4Addr) -> Mac {
        endpoint_mac(NETWORK, IpAddr::from(address))
    }

    fn endpoints(&self, far: u32, generation: u32) -> Value {
        let endpoint = |pod: u32| {
            let address = self.address(far, pod, generation);
            let name = if pod == 0 { format!("web-{far}-0-{generation}") } else { format!("web-{far}-{pod}") };
            json!({"address": address, "mac": self.mac(address).to_string(), "interface": "eth1", "namespace": "shop", "pod": name,
                "owner": format!("web-{}", far / 10), "labels": {"app": "web", "pod-template-hash": "5d4f8c7b9"}, "ready": true})
        };
        (0..self.pods).map(endpoint).collect()
    }

    /// The first pod of a node goes, and another one comes; returns the MAC of the latter.
    pub fn change(&self, node: &Node, far: u32, generation: u32) -> Mac {
        let patch = json!({"spec": {"endpoints": self.endpoints(far, generation)}});
        node.api.edit(&format!("{SLICES}/{NETWORK}.far-{far}"), patch);
        self.mac(self.address(far, 0, generation))
    }

    /// The name of the last pod of the last node.
    pub fn last_name(&self) -> String {
        format!("web-{}-{}.{NETWORK}", self.nodes - 1, self.pods - 1)
    }
}
