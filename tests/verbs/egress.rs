//! A network's way outside: from its field to its pods, and back.

use std::{
    net::{Ipv4Addr, TcpListener, TcpStream},
    time::Duration,
};

use portolan_crds::NetworkNodeSlice;
use portolan_tests::node::{Node, Pod};
use serde_json::json;

use super::{IPV4, PATIENCE, interface, names, netns, on_backend, on_backend_with};

const BACKEND: &str = "/apis/portolan.dev/v1alpha1/containernetworks/backend";
const SLICES: &str = "/apis/portolan.dev/v1alpha1/networknodeslices";
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const SHORT: Duration = Duration::from_millis(300);

/// A node that forwards, and a server outside.
fn node() -> Node {
    let node = Node::with_network(IPV4);
    node.make_netns("outside");
    let other = node.on_host("/run/netns/outside".as_ref()).display().to_string();
    node.run_in("host", &format!("ip link add o0 type veth peer name o0 netns {other}"));
    for (netns, last) in [("outside", 1), ("host", 2)] {
        node.run_in(netns, &format!("ip address add 198.51.100.{last}/24 dev o0"));
        node.run_in(netns, "ip link set o0 up");
    }
    forward(&node, "1");
    node
}

fn forward(node: &Node, value: &str) {
    node.inside("host", || std::fs::write("/proc/sys/net/ipv4/ip_forward", value));
}

fn switch(node: &Node, egress: bool) {
    node.api.edit(BACKEND, json!({"spec": {"egressNAT": egress}}));
}

/// As whom the server sees a pod that connects to it.
fn seen(node: &Node, pod: &Pod, patience: Duration) -> Option<String> {
    let listener = node.inside("outside", || TcpListener::bind((SERVER, 80)));
    let client = node.inside(netns(pod), || Ok(TcpStream::connect_timeout(&(SERVER, 80).into(), patience).ok()));
    client.map(|_| listener.accept().unwrap().1.ip().to_string())
}

fn gets_out(node: &Node, pod: &Pod) -> bool {
    (0..4).any(|_| seen(node, pod, PATIENCE).as_deref() == Some("198.51.100.2"))
}

fn has_way(node: &Node) -> bool {
    node.run_in("host", "ip -o link show").contains("pgw77")
}

fn problem(node: &Node) -> Option<String> {
    node.api.all::<NetworkNodeSlice>().into_iter().find_map(|slice| slice.spec.egress_problem)
}

#[test]
fn a_gateways_own_rules_are_not_taken_for_somebody_elses() {
    let node = node();
    super::policies::isolate(&node, "db");
    let pod = node.pod("pod", on_backend(), json!({"app": "db"}));
    node.add(&pod).unwrap();
    let is_closed = || node.run_in("portolan-77", "nft list ruleset").contains(&super::port(&pod));
    node.wait_for("the policy's rules", is_closed);
    for egress in [true, false, true] {
        switch(&node, egress);
        node.wait_for("the gateway to come or go", || has_way(&node) == egress);
        node.check(&pod).unwrap();
        assert!(is_closed());
    }
}

#[test]
fn a_network_gets_and_loses_its_way_outside() {
    let mut node = node();
    let by = |gateway: &str| on_backend_with(json!({"default-route": [gateway]}));
    let early = node.pod("early", by("10.32.0.1"), json!({}));
    names(&node.add(&early).unwrap_err(), 100, &["default-route: 10.32.0.1", "egressNAT"]);
    let bystander = node.pod("bystander", on_backend(), json!({}));
    node.add(&bystander).unwrap();
    assert!(!has_way(&node));

    switch(&node, true);
    node.wait_for("the gateway", || has_way(&node));
    let wrong = node.pod("wrong", by("10.33.0.1"), json!({}));
    names(&node.add(&wrong).unwrap_err(), 100, &["default-route: 10.33.0.1", "its gateway 10.32.0.1"]);
    let pod = node.pod("pod", by("10.32.0.1"), json!({}));
    node.add(&pod).unwrap();
    node.check(&pod).unwrap();
    assert!(gets_out(&node, &pod));
    let routed = |pod: &Pod| node.run_in(netns(pod), "ip route show").contains("0.0.0.0/1 via 10.32.0.1");
    assert!(routed(&pod) && !routed(&bystander), "only who asks for it");
    let made = interface(&node, &bystander);
    let object = "/api/v1/namespaces/shop/pods/bystander";
    node.api.edit(&format!("{object}/status"), json!({"status": {"phase": "Running", "podIP": "10.244.1.7"}}));
    node.api.edit(object, json!({"metadata": {"annotations": by("10.32.0.1")}}));
    node.wait_for("the default route of a running pod", || routed(&bystander));
    assert!(gets_out(&node, &bystander) && interface(&node, &bystander) == made);

    // Without the agent, and by the next one.
    node.stop();
    assert!(gets_out(&node, &pod));
    forward(&node, "0");
    node.start();
    node.wait_for("the obstacle to be told of", || problem(&node).is_some());
    assert!(problem(&node).unwrap().contains("net.ipv4.ip_forward is not 1"));
    assert_eq!(seen(&node, &pod, SHORT), None, "the host's setting is left alone");

    switch(&node, false);
    node.wait_for("the way to be gone", || !has_way(&node) && problem(&node).is_none());
    let left = node.run_in("host", "nft list ruleset") + &node.run_in("portolan-77", "nft list ruleset");
    assert_eq!(left, "");
    assert!(!node.run_in("portolan-77", "ip -o address show").contains("10.32.0.1/"));
    assert_eq!(node.run_in("portolan-77", "cat /proc/sys/net/ipv4/ip_forward"), "0\n");
}

#[test]
fn there_is_no_gateway_while_a_pod_has_its_address() {
    let node = node();
    let pod = node.pod("pod", on_backend(), json!({}));
    node.add(&pod).unwrap();
    let slice = json!({"apiVersion": "portolan.dev/v1alpha1", "kind": "NetworkNodeSlice",
        "metadata": {"name": "backend.other"},
        "spec": {"network": "backend", "node": "other", "vtep": "192.0.2.9", "endpoints": [
            {"address": "10.32.0.1", "mac": "02:00:0a:20:00:01", "namespace": "shop", "pod": "first"}]}});
    node.api.make(SLICES, slice);
    let known = || node.run_in("portolan-77", "bridge fdb show").contains("02:00:0a:20:00:01");
    node.wait_for("the agent to know it", known);
    switch(&node, true);
    let later = node.pod("later", on_backend_with(json!({"default-route": ["10.32.0.1"]})), json!({}));
    // The agent knows the field by now.
    node.wait_for("the pod to start", || node.add(&later).is_ok());
    assert!(!has_way(&node));
    node.api.remove(&format!("{SLICES}/backend.other"));
    node.wait_for("the gateway", || has_way(&node));
    assert!(gets_out(&node, &later));
}
