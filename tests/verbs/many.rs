//! Many pods at once, again and again.

use std::{collections::BTreeSet, thread};

use portolan_crds::{IPBlock, NetworkNodeSlice};
use portolan_tests::node::{Node, Pod};
use serde_json::json;

use super::{DUAL, addresses, files, interface, journal, on_backend, state_of_network, told};

const AT_ONCE: usize = 50;
const ROUNDS: usize = 10;

fn at_once(pods: &[Pod], work: impl Fn(&Pod) + Sync) {
    thread::scope(|scope| {
        for pod in pods {
            scope.spawn(|| work(pod));
        }
    });
}

/// All that a node has of networks when there are no pods on them.
fn state_of_node(node: &Node) -> String {
    let directories = ["/run/netns", "/run/portolan", "/var/lib/portolan", "/var/lib/portolan/network", "/tmp"];
    format!("{:?} {}", directories.map(|directory| files(node, directory)), node.run_in("host", "ip -o link show"))
}

/// Waits until nothing of networks is left, here and in the API.
fn wait_until_empty(node: &Node) {
    node.wait_for("the pods to go", || journal(node).is_empty());
    node.wait_for("the network to go", || !files(node, "/run/netns").iter().any(|name| name.starts_with("portolan-")));
    node.wait_for("the slice to go", || node.api.all::<NetworkNodeSlice>().is_empty());
    node.wait_for("the blocks to be given back", || node.api.all::<IPBlock>().is_empty());
}

#[test]
fn five_hundred_pods_leave_nothing() {
    let node = Node::with_network(DUAL);
    // Half of the pods are isolated: rules come and go with them.
    super::policies::isolate(&node, "db");
    let labels = |number: usize| json!({"app": if number.is_multiple_of(2) { "db" } else { "web" }});
    let netns: Vec<String> = (0..AT_ONCE).map(|number| format!("sandbox-{number}")).collect();
    netns.iter().for_each(|netns| node.make_netns(netns));
    let resident = node.pod("resident", on_backend(), json!({}));
    node.add(&resident).unwrap();
    node.delete(&resident).unwrap();
    wait_until_empty(&node);
    let without = state_of_node(&node);
    node.add(&resident).unwrap();
    node.wait_for("the resident to be told of", || told(&node).len() == 1);
    let before = state_of_network(&node);

    for round in 0..ROUNDS {
        let pod = |(number, netns): (usize, &String)| {
            node.pod_in(netns, &format!("pod-{round}-{number}"), on_backend(), labels(number))
        };
        let pods: Vec<Pod> = netns.iter().enumerate().map(pod).collect();
        at_once(&pods, |pod| drop(node.add(pod).unwrap()));
        assert_eq!(journal(&node).len(), AT_ONCE + 1);
        let all: Vec<_> = pods.iter().flat_map(|pod| addresses(&node, pod)).collect();
        let distinct: BTreeSet<_> = all.iter().collect();
        assert_eq!((all.len(), distinct.len()), (2 * AT_ONCE, 2 * AT_ONCE), "round {round}: {all:?}");
        at_once(&pods, |pod| drop(node.delete(pod).unwrap()));
        assert_eq!(journal(&node).len(), 1);
        for pod in &pods {
            node.api.remove(&format!("/api/v1/namespaces/shop/pods/{}", pod.name));
        }
    }
    node.wait_for("nothing to be left on the network", || state_of_network(&node) == before);
    node.check(&resident).unwrap();
    for netns in &netns {
        assert_eq!(node.run_in(netns, "ip -o link show").lines().count(), 1, "only the loopback");
    }
    node.delete(&resident).unwrap();
    assert_eq!(interface(&node, &resident), None);
    wait_until_empty(&node);
    assert_eq!(state_of_node(&node), without);
}

/// Blocks that were taken for a pod which is gone before anything else was done for it.
#[test]
fn a_pod_that_comes_and_goes_at_once_leaves_no_block() {
    const SLICES: &str = "portolan.dev/networknodeslices";
    let node = Node::with_network(DUAL);
    node.make_network("other", 78, &["10.33.0.0/16"]);
    let resident = node.pod("resident", json!({"portolan.dev/networks": "other"}), json!({}));
    // The agent is busy telling the others of the resident.
    node.api.hold(SLICES);
    node.add(&resident).unwrap();
    let pod = node.pod("pod", on_backend(), json!({}));
    node.add(&pod).unwrap();
    let blocks = || node.api.all::<IPBlock>().into_iter().filter(|block| block.spec.network == "backend").count();
    assert_eq!(blocks(), 2);
    node.delete(&pod).unwrap();
    node.api.release(SLICES);
    node.wait_for("the blocks to be given back", || blocks() == 0);
    node.check(&resident).unwrap();
}
