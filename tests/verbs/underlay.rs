//! A node whose address on the underlay is IPv6, and that has no IPv4 there, beside nodes of both families.

use std::net::{IpAddr, Ipv6Addr};

use portolan_crds::NetworkNodeSlice;
use portolan_net::{BRIDGE_ADDRESS, endpoint_mac};
use portolan_tests::node::{NODE, Node, Pod};
use serde_json::json;

use super::{
    DUAL, answers, interface, on_backend,
    primary::{BLOCKS, join, state},
    reaches,
};

const OWN: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1));
const SLICES: &str = "/apis/portolan.dev/v1alpha1/networknodeslices";

/// Another node, with a pod of `web`.
fn make_slice(node: &Node, name: &str, vtep: &str, address: &str) {
    let mac = endpoint_mac("backend", address.parse().unwrap()).to_string();
    let endpoint = json!({"address": address, "mac": mac, "interface": "eth1", "namespace": "shop",
        "pod": format!("web-{name}"), "owner": "web", "ready": true});
    let slice = json!({"apiVersion": "portolan.dev/v1alpha1", "kind": "NetworkNodeSlice",
        "metadata": {"name": format!("backend.{name}")},
        "spec": {"network": "backend", "node": name, "vtep": vtep, "endpoints": [endpoint]}});
    node.api.make(SLICES, slice);
}

/// The entries that lead to other nodes.
fn entries(node: &Node) -> String {
    node.run_in("portolan-77", "bridge fdb show dev vx0")
}

/// The IPv4 addresses of a name, to a pod that asks its node.
fn answer(node: &Node, asking: &Pod, name: &str) -> Vec<String> {
    let all = answers(node, asking, BRIDGE_ADDRESS, name).unwrap_or_default();
    all.iter().map(IpAddr::to_string).collect()
}

#[test]
fn a_node_without_ipv4_has_networks_of_both_families() {
    let node = Node::with_network_at(OWN, DUAL);
    let (one, two) = (node.pod("one", on_backend(), json!({})), node.pod("two", on_backend(), json!({})));
    for pod in [&one, &two] {
        node.add(pod).unwrap();
        node.check(pod).unwrap();
    }
    assert!(reaches(&node, &one, &two) && reaches(&node, &two, &one));
    assert_eq!(interface(&node, &one).unwrap().mtu, 1430, "the underlay's less what VXLAN over IPv6 adds");
    node.wait_for("the other nodes to be told", || {
        let slices = node.api.all::<NetworkNodeSlice>();
        slices.iter().any(|it| it.spec.node == NODE && it.spec.vtep == OWN.to_string() && it.spec.endpoints.len() == 2)
    });
    let tunnel = node.run_in("portolan-77", "ip -d link show vx0");
    assert!(tunnel.contains(&format!("local {OWN} ")), "{tunnel}");
}

/// Nobody gets there: its tunnels are of the other family. What can be reached beside it is, and is what names lead to.
#[test]
fn a_node_of_the_other_family_is_left_out() {
    let node = Node::with_network_at(OWN, DUAL);
    let [near, far] = ["10.32.9.1", "10.32.9.2"];
    make_slice(&node, "far", "192.0.2.9", far);
    make_slice(&node, "near", "fd00::2", near);
    let pod = node.pod("pod", on_backend(), json!({}));
    node.add(&pod).unwrap();
    node.wait_for("the reachable node", || entries(&node).contains("dst fd00::2"));
    node.wait_for("the name", || answer(&node, &pod, "web.backend.") == [near]);
    let made = entries(&node);
    let mac = |address: &str| endpoint_mac("backend", address.parse().unwrap()).to_string();
    assert!(made.contains(&mac(near)) && !made.contains(&mac(far)) && !made.contains("192.0.2.9"), "{made}");
    // It gets an address of this family (and a new agent): then it is a node like any other.
    node.api.edit(&format!("{SLICES}/backend.far"), json!({"spec": {"vtep": "fd00::9"}}));
    node.wait_for("the other node", || entries(&node).contains("dst fd00::9"));
    node.wait_for("both names", || answer(&node, &pod, "web.backend.").len() == 2);
    // Without any other there is no better answer.
    node.api.edit(&format!("{SLICES}/backend.far"), json!({"spec": {"vtep": "192.0.2.9"}}));
    node.wait_for("it to be left out again", || !entries(&node).contains(&mac(far)));
    node.api.remove(&format!("{SLICES}/backend.near"));
    node.wait_for("the name of who is left", || answer(&node, &pod, "web.backend.") == [far]);
}

/// Its tunnel would be of the other family.
#[test]
fn a_node_of_the_other_family_has_no_part_of_the_pod_network() {
    let node = Node::primary_at(OWN, BLOCKS);
    join(&node, "far", "192.0.2.4", &["10.244.4.0/24", "fd44:0:0:4::/64"]);
    join(&node, "near", "fd00::3", &["10.244.3.0/24", "fd44:0:0:3::/64"]);
    node.wait_for("the other one", || state(&node).contains("dst fd00::3"));
    let made = state(&node);
    for absent in ["192.0.2.4", "10.244.4.", "fd44:0:0:4:"] {
        assert!(!made.contains(absent), "{absent}: {made}");
    }
    // It gets the address that it is to have: the kubelet reports it.
    let addresses =
        json!([{"type": "InternalIP", "address": "fd00::4"}, {"type": "InternalIP", "address": "192.0.2.4"}]);
    node.api.edit("/api/v1/nodes/far/status", json!({"status": {"addresses": addresses}}));
    node.wait_for("it to be reached", || state(&node).contains("dst fd00::4"));
}
