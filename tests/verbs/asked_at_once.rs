//! What only one can have, asked for by two at once.

use std::{sync::Barrier, thread};

use portolan_tests::node::{Node, Pod};
use serde_json::{Value, json};

use super::{IPV4, interface, names, on_backend, on_backend_with, reaches};

const ROUNDS: usize = 20;

fn add_at_once<'a>(node: &Node, pods: &[&'a Pod]) -> Vec<(&'a Pod, Result<Value, Value>)> {
    let start = Barrier::new(pods.len());
    thread::scope(|scope| {
        let add = |pod| {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                (pod, node.add(pod))
            })
        };
        let all: Vec<_> = pods.iter().map(|pod| add(*pod)).collect();
        all.into_iter().map(|asked| asked.join().unwrap()).collect()
    })
}

/// Those who ask while another pod is being plugged in all wait for the same, having seen that nobody has the MAC.
#[test]
fn one_of_two_pods_gets_a_mac() {
    let node = Node::with_network(IPV4);
    let resident = node.pod("resident", on_backend(), json!({}));
    node.add(&resident).unwrap();
    for netns in ["one", "two", "other"] {
        node.make_netns(netns);
    }
    for round in 0..ROUNDS {
        let mac = format!("06:00:00:00:00:{round:02x}");
        let asks = |netns: &str| {
            let annotation = on_backend_with(json!({"mac": mac}));
            node.pod_in(netns, &format!("{netns}-{round}"), annotation, json!({}))
        };
        let [one, two] = ["one", "two"].map(asks);
        let other = node.pod_in("other", &format!("other-{round}"), on_backend(), json!({}));
        let answers = add_at_once(&node, &[&other, &one, &two]);
        let [_, both @ ..] = &answers[..] else { panic!("three were asked for") };
        let (got, refused): (Vec<_>, Vec<_>) = both.iter().partition(|(_, answer)| answer.is_ok());
        assert_eq!((got.len(), refused.len()), (1, 1), "round {round}: {both:?}");
        let (winner, loser) = (got[0].0, refused[0].0);
        let told = format!("mac: {mac} was given for ContainerNetwork backend");
        let holder = format!("no other pod has: shop/{} has it", winner.name);
        names(refused[0].1.as_ref().unwrap_err(), 100, &[&told, &holder]);
        assert_eq!(interface(&node, winner).unwrap().mac, mac);
        assert_eq!(interface(&node, loser), None);
        assert!(reaches(&node, winner, &resident) && reaches(&node, &other, &resident));
        for (pod, _) in &answers {
            node.delete(pod).unwrap();
        }
    }
}

/// What this node told the others of a pod that has just gone is no reason to keep its successor waiting.
#[test]
fn a_mac_is_free_as_soon_as_its_pod_is_gone() {
    let node = Node::with_network(IPV4);
    node.make_netns("sandbox");
    for round in 0..5 {
        let annotation = on_backend_with(json!({"mac": "06:00:00:00:00:07"}));
        let pod = node.pod_in("sandbox", &format!("pod-{round}"), annotation, json!({}));
        node.add(&pod).unwrap();
        node.wait_for("the pod to be told of", || super::told(&node).len() == 1);
        node.delete(&pod).unwrap();
    }
}
