//! An agent that starts while the API server is away: pods that were here before are plugged out, looked at, and plugged in again.

use std::{collections::BTreeSet, net::IpAddr, path::Path};

use portolan_tests::node::{CLUSTER_DNS, Node, Pod};
use serde_json::json;

use super::{
    DUAL, IPV4, addresses, answers, interface, journal, names, on_backend, on_backend_with, policies, reaches, told,
};

const KNOWN: &str = "/run/portolan/known";

/// What the next agent will know of a pod.
fn known(node: &Node, pod: &Pod) -> String {
    let file = Path::new(KNOWN).join("pods").join(format!("{}.json", pod.uid));
    std::fs::read_to_string(node.on_host(&file)).unwrap_or_default()
}

/// Adds a pod, and waits until its addresses are known to the next agent.
fn added(node: &Node, pod: &Pod) -> Vec<IpAddr> {
    node.add(pod).unwrap();
    let given = addresses(node, pod);
    node.wait_for("the pod to be known", || given.iter().all(|it| known(node, pod).contains(&format!("\"{it}\""))));
    given
}

/// Kills the agent, and starts another one that hears nothing of the API server.
fn start_alone(node: &mut Node) {
    node.kill();
    node.api.go_away();
    node.start();
}

/// A pod whose addresses are kept for it.
fn of_a_set(node: &Node, name: &str) -> Pod {
    let pod = node.pod(name, on_backend(), json!({}));
    let owner = json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db", "uid": "u", "controller": true});
    node.api.edit(&format!("/api/v1/namespaces/shop/pods/{name}"), json!({"metadata": {"ownerReferences": [owner]}}));
    pod
}

#[test]
fn pods_that_were_here_are_plugged_in_again_and_no_others() {
    let mut node = Node::with_network(DUAL);
    let (resident, web, db) = (
        node.pod("resident", on_backend(), json!({})),
        node.pod("web", on_backend(), json!({})),
        of_a_set(&node, "db-0"),
    );
    let plain = node.pod("plain", json!({}), json!({}));
    node.add(&plain).unwrap();
    added(&node, &resident);
    let given = [added(&node, &web), added(&node, &db)];
    start_alone(&mut node);
    node.wait_for("the agent to serve", || node.status().is_ok());

    node.check(&resident).unwrap();
    let (web_again, db_again) = (node.another_sandbox(&web, "web-again"), node.another_sandbox(&db, "db-again"));
    // A runtime asks for either first.
    node.delete(&web).unwrap();
    assert_eq!(interface(&node, &web), None);
    for (again, given) in [&web_again, &db_again].into_iter().zip(&given) {
        for _ in 0..2 {
            node.add(again).unwrap();
            assert_eq!(addresses(&node, again), *given, "{}", again.name);
        }
        node.check(again).unwrap();
        assert!(reaches(&node, again, &resident) && reaches(&node, &resident, again));
    }
    assert_eq!(interface(&node, &db), None, "the earlier sandbox has given it up");
    node.delete(&db).unwrap();
    node.add(&node.another_sandbox(&plain, "plain-again")).unwrap();
    let stranger = node.pod("stranger", on_backend(), json!({}));
    names(&node.add(&stranger).unwrap_err(), 11, &["has not heard from the API server yet"]);
    assert_eq!(journal(&node).len(), 3);

    node.api.come_back();
    node.wait_for("the agent to have heard from the API", || node.add(&stranger).is_ok());
    let all = [&resident, &web_again, &db_again, &stranger].map(|pod| addresses(&node, pod)[0]);
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 4, "{all:?}");
    node.wait_for("all to be told of", || told(&node).len() == 4);
    assert!(reaches(&node, &web_again, &stranger) && reaches(&node, &db_again, &web_again));
}

/// An agent that goes on running asks for claims and blocks, of which nobody tells.
#[test]
fn pods_get_another_sandbox_while_the_api_is_away() {
    let node = Node::with_network(IPV4);
    let pods = [of_a_set(&node, "db-0"), node.pod("web", on_backend(), json!({}))];
    let given = [added(&node, &pods[0]), added(&node, &pods[1])];
    node.api.go_away();
    // The last ones on the network: its blocks could be given back.
    pods.iter().for_each(|pod| drop(node.delete(pod).unwrap()));
    std::thread::sleep(policies::WHILE);
    for (pod, given) in pods.iter().zip(given) {
        let again = node.another_sandbox(pod, &format!("{}-again", pod.name));
        node.add(&again).unwrap();
        assert_eq!(addresses(&node, &again), given);
    }
}

#[test]
fn what_was_given_to_another_pod_is_not_given_again() {
    let mut node = Node::with_network(IPV4);
    let wishes = || on_backend_with(json!({"ips": ["10.32.0.9"]}));
    let (resident, first) = (node.pod("resident", on_backend(), json!({})), node.pod("first", wishes(), json!({})));
    added(&node, &resident);
    added(&node, &first);
    // Its sandbox has ended, and another pod was faster.
    node.delete(&first).unwrap();
    let second = node.pod("second", wishes(), json!({}));
    added(&node, &second);
    start_alone(&mut node);
    node.wait_for("the agent to serve", || node.status().is_ok());
    let again = node.another_sandbox(&first, "again");
    names(&node.add(&again).unwrap_err(), 11, &["backend", "address isn't known"]);
    // That one may be a pod's elsewhere by now which keeps it.
    node.delete(&second).unwrap();
    names(&node.add(&again).unwrap_err(), 11, &["backend", "address isn't known"]);
    assert_eq!(interface(&node, &again), None);
}

#[test]
fn addresses_of_blocks_that_were_given_back_are_not_given_again() {
    let mut node = Node::with_network(IPV4);
    let pod = node.pod("pod", on_backend(), json!({}));
    added(&node, &pod);
    node.delete(&pod).unwrap();
    node.wait_for("the block to be given back", || node.api.all::<portolan_crds::IPBlock>().is_empty());
    start_alone(&mut node);
    node.wait_for("the agent to serve", || node.status().is_ok());
    let error = node.add(&node.another_sandbox(&pod, "again")).unwrap_err();
    names(&error, 11, &["backend", "block that was given back"]);
}

/// While a machine is off, its blocks may become others'.
#[test]
fn nothing_is_known_after_a_start_of_the_machine() {
    let mut node = Node::with_network(IPV4);
    let pod = node.pod("pod", on_backend(), json!({}));
    added(&node, &pod);
    node.kill();
    std::fs::write(node.on_host(&Path::new(KNOWN).join("boot")), "another").unwrap();
    start_alone(&mut node);
    let error = node.add(&node.another_sandbox(&pod, "again"));
    names(&node.status().unwrap_err(), 50, &["has not heard"]);
    node.check(&pod).unwrap();
    node.delete(&pod).unwrap();
    assert_eq!((interface(&node, &pod), journal(&node).len()), (None, 0));
    assert!(error.is_err());
}

#[test]
fn a_closed_pod_is_closed_in_another_sandbox() {
    let mut node = Node::with_network(IPV4);
    let sender = node.pod("sender", on_backend(), json!({}));
    let wishes = on_backend_with(json!({"ips": ["10.32.1.1"]}));
    let pod = node.pod("pod", wishes, json!({"app": "db"}));
    policies::isolate(&node, "db");
    for pod in [&sender, &pod] {
        added(&node, pod);
    }
    node.wait_for("its policy to be known", || known(&node, &pod).contains("ingress"));
    start_alone(&mut node);
    node.wait_for("the agent to serve", || node.status().is_ok());
    node.delete(&pod).unwrap();
    let again = node.another_sandbox(&pod, "again");
    let listener = policies::listen(&node, "again");
    listener.set_read_timeout(Some(policies::WHILE)).unwrap();
    let (_, heard) = policies::while_sent_to(&node, "sender", [10, 32, 1, 1].into(), || {
        node.add(&again).unwrap();
        policies::hears(&listener)
    });
    assert!(!heard, "it is closed");
    assert!(reaches_back(&node, &again, &sender));
    // A policy that has changed meanwhile is followed.
    node.api.remove("/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies/deny");
    node.api.come_back();
    node.wait_for("it to be open", || {
        policies::while_sent_to(&node, "sender", [10, 32, 1, 1].into(), || policies::hears(&listener)).1
    });
}

/// Whether an answer to what a pod sends reaches it.
fn reaches_back(node: &Node, from: &Pod, to: &Pod) -> bool {
    let at = addresses(node, to)[0];
    let listener = node.inside(super::netns(to), || super::udp(at, super::ECHO));
    let asking = node.inside(super::netns(from), || super::udp(addresses(node, from)[0], 0));
    asking.send_to(b"hello", (at, super::ECHO)).unwrap();
    let (_, sender) = listener.recv_from(&mut [0; 10]).unwrap();
    listener.send_to(b"hello", sender).unwrap();
    asking.recv_from(&mut [0; 10]).is_ok()
}

#[test]
fn a_node_without_another_plugin_goes_on() {
    let mut node = Node::primary(&["10.244.1.0/24"]);
    node.make_network("backend", 77, IPV4);
    let (resident, pod) = (node.pod("resident", on_backend(), json!({})), node.pod("pod", on_backend(), json!({})));
    let ports = json!([{"hostPort": 8080, "containerPort": 80}]);
    added(&node, &resident);
    node.add_with_ports(&pod, &ports).unwrap();
    let given = added(&node, &pod);
    start_alone(&mut node);
    node.wait_for("the agent to serve", || node.status().is_ok());
    node.wait_for("the pod network to be served", || node.check(&resident).is_ok());
    node.delete(&pod).unwrap();
    let rules = || node.run_in("host", "nft list ruleset");
    assert!(!rules().contains("8080"));
    let again = node.another_sandbox(&pod, "again");
    let result = node.add_with_ports(&again, &ports).unwrap();
    assert!(result["ips"][0]["address"].as_str().unwrap().starts_with("10.244.1."), "{result}");
    assert_eq!(addresses(&node, &again), given);
    assert!(rules().contains("8080") && reaches(&node, &again, &resident));
    node.check(&again).unwrap();
}

/// A node with a pod `db` and a pod that admission has missed, which is answered where it asks; and their names are known to the next agent.
fn with_missed() -> (Node, Pod, Pod) {
    let mut node = Node::new();
    node.redirect();
    node.make_network("backend", 77, IPV4);
    node.start();
    node.wait_for("the agent to be ready", || node.status().is_ok());
    let mut published = on_backend();
    published["portolan.dev/publish-not-ready"] = json!("true");
    let (db, pod) = (node.pod("db", published, json!({})), node.pod("pod", on_backend(), json!({})));
    let missed = json!({"spec": {"dnsPolicy": "ClusterFirst", "dnsConfig": null}});
    node.api.edit("/api/v1/namespaces/shop/pods/pod", missed);
    let address = added(&node, &db)[0].to_string();
    node.wait_for("the pod to be one that asks the cluster's DNS", || {
        let _ = node.delete(&pod);
        added(&node, &pod);
        resolves_db(&node, &pod, &db)
    });
    node.wait_for("where it asks to be known", || known(&node, &pod).contains(&CLUSTER_DNS.to_string()));
    let names = node.on_host(Path::new("/var/lib/portolan/network/names.json"));
    let has_db = || std::fs::read_to_string(&names).is_ok_and(|text| text.contains(&format!("\"{address}\"")));
    node.wait_for("the names to be kept", has_db);
    (node, db, pod)
}

/// Whether a pod that asks the cluster's DNS finds `db`.
fn resolves_db(node: &Node, pod: &Pod, db: &Pod) -> bool {
    answers(node, pod, CLUSTER_DNS, "db.backend.").is_some_and(|all| all == addresses(node, db))
}

#[test]
fn a_pod_that_admission_missed_finds_names_in_another_sandbox() {
    let (mut node, db, pod) = with_missed();
    start_alone(&mut node);
    node.wait_for("the agent to serve", || node.status().is_ok());
    assert!(resolves_db(&node, &pod, &db), "as it is");
    node.delete(&pod).unwrap();
    let again = node.another_sandbox(&pod, "again");
    node.add(&again).unwrap();
    node.wait_for("the name", || resolves_db(&node, &again, &db));
    node.api.come_back();
    let once_more = node.another_sandbox(&pod, "once-more");
    node.wait_for("the agent to have heard from the API", || node.add(&once_more).is_ok());
    node.wait_for("the name", || resolves_db(&node, &once_more, &db));
}

/// No pod of the journal asks there then.
#[test]
fn a_pod_that_admission_missed_finds_names_if_its_sandbox_ended_before_the_agent() {
    let (mut node, db, pod) = with_missed();
    node.delete(&pod).unwrap();
    start_alone(&mut node);
    node.wait_for("the agent to serve", || node.status().is_ok());
    let again = node.another_sandbox(&pod, "again");
    node.add(&again).unwrap();
    node.wait_for("the name", || resolves_db(&node, &again, &db));
}
