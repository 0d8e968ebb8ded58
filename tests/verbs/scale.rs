//! A network of many nodes: who waits for its forwarding entries and who doesn't, and what is told if the kernel refuses some.
//! `make bench-scale` measures a large one.

use std::{
    net::{IpAddr, Ipv4Addr},
    thread,
};

use k8s_openapi::api::events::v1::Event;
use portolan_net::{BRIDGE_ADDRESS, endpoint_mac};
use portolan_tests::node::{Node, Pod};
use serde_json::{Value, json};

use super::{IPV4, addresses, answers, files, on_backend, port};

const NODES: u16 = 200;
/// On each.
const PODS: u16 = 30;
const ROUNDS: usize = 10;
const SLICES: &str = "/apis/portolan.dev/v1alpha1/networknodeslices";
const NETWORK: &str = "/apis/portolan.dev/v1alpha1/containernetworks/backend";

/// The address of a pod elsewhere: of none of the blocks that pods here may be given addresses of.
fn address_of(node: u16, pod: u16) -> IpAddr {
    let [c, d] = (node * 64 + pod).to_be_bytes();
    Ipv4Addr::new(10, 40, c, d).into()
}

fn endpoint(name: &str, address: IpAddr) -> Value {
    json!({"address": address, "mac": endpoint_mac("backend", address).to_string(), "interface": "eth1",
        "namespace": "shop", "pod": name, "ready": true})
}

fn endpoints(node: u16, pods: u16) -> Value {
    (0..pods).map(|pod| endpoint(&format!("web-{node}-{pod}"), address_of(node, pod))).collect()
}

fn slice_of(node: u16) -> String {
    format!("{SLICES}/backend.far-{node}")
}

fn make_slice(it: &Node, node: u16, endpoints: Value) {
    let [c, d] = (node + 256).to_be_bytes();
    let spec = json!({"network": "backend", "node": format!("far-{node}"), "vtep": format!("198.18.{c}.{d}"),
        "endpoints": endpoints});
    it.api.make(
        SLICES,
        json!({"apiVersion": "portolan.dev/v1alpha1", "kind": "NetworkNodeSlice",
            "metadata": {"name": format!("backend.far-{node}")}, "spec": spec}),
    );
}

/// What leads to other nodes, by kind: through which tunnel a MAC is reached, who gets broadcasts, which MACs are behind the tunnels, and whose
/// addresses the bridge answers for.
fn entries(node: &Node) -> [usize; 4] {
    let fdb = node.run_in("portolan-77", "bridge fdb show dev vx0");
    let count = |is_it: &dyn Fn(&str) -> bool| fdb.lines().filter(|line| is_it(line)).count();
    let neighbours = node.run_in("portolan-77", "ip neighbour show dev br0 nud permanent");
    [
        count(&|line| line.contains(" dst ") && !line.starts_with("00:00:00:00:00:00")),
        count(&|line| line.contains(" dst ") && line.starts_with("00:00:00:00:00:00")),
        count(&|line| line.contains("master br0") && line.contains("static")),
        neighbours.lines().filter(|line| line.starts_with("10.40.")).count(),
    ]
}

fn all_of(nodes: u16, pods: u16) -> [usize; 4] {
    [nodes * pods, nodes, nodes * pods, nodes * pods].map(usize::from)
}

/// Whether a name has an address, to a pod that asks its node.
fn is_answered(node: &Node, asking: &Pod, name: &str) -> bool {
    answers(node, asking, BRIDGE_ADDRESS, name).is_some_and(|all| !all.is_empty())
}

fn suppressing(subnets: &[&str]) -> Node {
    let node = Node::with_network(subnets);
    node.api.edit(NETWORK, json!({"spec": {"neighborSuppression": true}}));
    node.make_network("other", 78, &["10.33.0.0/16"]);
    node
}

/// Whether names and pods wait for the entries, which take seconds of networks that are larger still, `make bench-scale` shows.
#[test]
fn a_large_networks_names_and_entries_come_and_go() {
    let node = suppressing(IPV4);
    for far in 0..NODES {
        make_slice(&node, far, endpoints(far, PODS));
    }
    let pod = node.pod("here", on_backend(), json!({}));
    node.add(&pod).unwrap();
    node.wait_for("the last name", || is_answered(&node, &pod, &format!("web-{}-{}.backend.", NODES - 1, PODS - 1)));
    let others = ["one", "two"].map(|name| node.pod(name, json!({"portolan.dev/networks": "other"}), json!({})));
    let another = node.pod("another", on_backend(), json!({}));
    for pod in others.iter().chain([&another]) {
        node.add(pod).unwrap();
        node.check(pod).unwrap();
    }
    node.wait_for("all entries", || entries(&node) == all_of(NODES, PODS));

    for far in 0..NODES / 2 {
        node.api.remove(&slice_of(far));
    }
    node.wait_for("the entries of those who are gone to go", || entries(&node) == all_of(NODES / 2, PODS));
    for pod in others.iter().chain([&pod, &another]) {
        node.delete(pod).unwrap();
    }
    let is_network = |name: &String| name.starts_with("portolan-");
    node.wait_for("the networks to go", || !files(&node, "/run/netns").iter().any(is_network));
}

/// Pods come and go, at addresses that another node still claims, while the entries of many nodes come and go.
#[test]
fn pods_that_come_while_entries_are_set_are_reached_here() {
    let node = suppressing(IPV4);
    let pod = node.pod("here", on_backend(), json!({}));
    node.add(&pod).unwrap();
    // A node that isn't heard any more says of each address of this node's block that it is there.
    let IpAddr::V4(own) = addresses(&node, &pod)[0] else { panic!("it has no IPv4 address") };
    let block = u32::from(own) & !63;
    let stale = |number: u32| {
        let mut endpoint = endpoint(&format!("was-{number}"), Ipv4Addr::from(block + number).into());
        endpoint["ready"] = json!(false);
        endpoint
    };
    make_slice(&node, NODES, json!([]));
    for far in 0..NODES {
        make_slice(&node, far, endpoints(far, PODS));
    }
    node.make_netns("comes");
    let mut seen = 0;
    thread::scope(|scope| {
        let churn = scope.spawn(|| {
            for round in 0..ROUNDS {
                let claims: Value = (0..64).filter(|_| round % 2 == 1).map(stale).collect();
                node.api.edit(&slice_of(NODES), json!({"spec": {"endpoints": claims}}));
                for far in 0..NODES {
                    let pods = if round % 2 == 0 { 1 } else { PODS };
                    node.api.edit(&slice_of(far), json!({"spec": {"endpoints": endpoints(far, pods)}}));
                }
            }
        });
        while !churn.is_finished() {
            let comes = node.pod_in("comes", &format!("comes-{seen}"), on_backend(), json!({}));
            node.add(&comes).unwrap();
            let mac = endpoint_mac("backend", addresses(&node, &comes)[0]).to_string();
            let fdb = node.run_in("portolan-77", "bridge fdb show br br0");
            let behind: Vec<_> = fdb.lines().filter(|line| line.starts_with(&mac) && line.contains("static")).collect();
            assert!(matches!(&behind[..], [one] if one.contains(&port(&comes))), "behind its port alone: {behind:?}");
            node.check(&comes).unwrap();
            node.delete(&comes).unwrap();
            seen += 1;
        }
    });
    assert!(seen > 1, "nothing was seen");
    let claimed = 64 - 1;
    let [endpoints, ..] = all_of(NODES, PODS);
    node.wait_for("all entries", || {
        let [tunnels, floods, behind, _] = entries(&node);
        (tunnels, floods, behind) == (endpoints + claimed, usize::from(NODES) + 1, endpoints + claimed)
    });
}

#[test]
fn entries_that_the_kernel_refuses_are_told_and_the_others_are_there() {
    let node = suppressing(IPV4);
    let pod = node.pod("here", on_backend(), json!({}));
    node.add(&pod).unwrap();
    node.wait_for("the node to be told of its pod", || !super::told(&node).is_empty());
    // A device that takes 20 entries (`maxaddress`, ip-link(8)), one of which is all broadcasts'.
    let vxlan = "ip link add vx0 type vxlan id 77 local 192.0.2.1 dstport 7789 nolearning maxaddress 20";
    for words in ["ip link del vx0", vxlan, "ip link set vx0 master br0", "ip link set vx0 up"] {
        node.run_in("portolan-77", words);
    }
    make_slice(&node, 1, endpoints(1, PODS));
    let told = || {
        let events = node.api.all::<Event>();
        let about = events.into_iter().filter(|it| it.reason.as_deref() == Some("NotForwarded"));
        about.filter_map(|it| it.note).collect::<Vec<_>>()
    };
    node.wait_for("an Event", || !told().is_empty());
    let note = told().remove(0);
    for part in ["node node1: ", "send 02:", " to 198.18.1.1 ", "No space left on device", "entries more"] {
        assert!(note.contains(part), "{note} should say {part:?}");
    }
    let [tunnels, _, behind, neighbours] = entries(&node);
    assert_eq!((tunnels, behind, neighbours), (20, 30, 30), "what can be there is");
    assert!(is_answered(&node, &pod, "web-1-29.backend."));
    node.api.edit(&slice_of(1), json!({"spec": {"endpoints": endpoints(1, 10)}}));
    node.wait_for("the entries that there is room for", || entries(&node) == all_of(1, 10));
}
