//! An API server that takes connections and never answers: what the agent does without it goes on.

use std::net::Ipv4Addr;

use portolan_tests::node::{Node, Pod};
use serde_json::json;

use super::{IPV4, addresses, answers, interface, on_backend, reaches, told};

const RESOLVER: Ipv4Addr = Ipv4Addr::new(169, 254, 53, 53);

/// A pod whose name is answered at once.
fn published(node: &Node, name: &str) -> Pod {
    let mut annotations = on_backend();
    annotations["portolan.dev/publish-not-ready"] = json!("true");
    node.pod(name, annotations, json!({}))
}

fn resolves(node: &Node, asker: &Pod, name: &str) -> bool {
    answers(node, asker, RESOLVER, &format!("{name}.backend.")).is_some_and(|all| !all.is_empty())
}

/// A node with pods `stays` and `goes`, whose API server stays silent while that is to be told that `goes` is gone.
fn waiting() -> (Node, [Pod; 3]) {
    let node = Node::with_network(IPV4);
    let pods = ["stays", "goes", "comes"].map(|name| published(&node, name));
    node.add(&pods[0]).unwrap();
    node.add(&pods[1]).unwrap();
    node.wait_for("both to be told of", || told(&node).len() == 2);
    node.wait_for("the name", || resolves(&node, &pods[0], "goes"));
    node.api.go_away();
    node.delete(&pods[1]).unwrap();
    node.wait_for("the pass to have begun", || !resolves(&node, &pods[0], "goes"));
    (node, pods)
}

#[test]
fn pods_and_names_and_networks_come_and_go() {
    let (node, [stays, _, comes]) = waiting();
    node.add(&comes).unwrap();
    assert!(reaches(&node, &comes, &stays) && reaches(&node, &stays, &comes));
    node.wait_for("the new pod's name", || resolves(&node, &stays, "comes"));
    let address = addresses(&node, &comes)[0].to_string();
    node.delete(&stays).unwrap();
    node.wait_for("the other's name to go", || !resolves(&node, &comes, "stays"));
    node.api.come_back();
    node.wait_for("what is there to be told", || {
        let told = told(&node);
        told.len() == 1 && told.iter().all(|(it, _)| *it == address)
    });

    node.api.go_away();
    node.delete(&comes).unwrap();
    let network = node.root().join("run/netns/portolan-77");
    node.wait_for("the network without pods to go", || !network.exists());
    assert_eq!(interface(&node, &comes), None);
    node.api.come_back();
    node.wait_for("nothing to be told", || told(&node).is_empty());
    node.wait_for("its block to be given back", || node.api.all::<portolan_crds::IPBlock>().is_empty());
}

#[test]
fn the_agent_ends_when_it_is_asked_to() {
    let (mut node, [stays, ..]) = waiting();
    node.stop();
    // What it left is taken up by the next one.
    node.api.come_back();
    node.start();
    node.wait_for("what is there to be told", || told(&node).len() == 1);
    node.check(&stays).unwrap();
}
