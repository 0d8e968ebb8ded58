//! What is closed to a pod or slow for it, from its first frame on and while it runs.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use portolan_net::endpoint_mac;
use portolan_tests::node::Node;
use serde_json::json;

use super::{ECHO, IPV4, addresses, interface, names, netns, on_backend, on_backend_with, port, udp};

const KIND: &str = "networking.k8s.io/networkpolicies";
const POLICIES: &str = "/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies";
const ROUNDS: u8 = 10;
/// How long a pod that is closed is sent to after it was added.
pub const WHILE: Duration = Duration::from_millis(100);

/// Nothing comes in to pods with this label `app`.
pub fn isolate(node: &Node, app: &str) {
    let policy = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "deny", "annotations": {"portolan.dev/networks": "backend"}},
        "spec": {"podSelector": {"matchLabels": {"app": app}}, "policyTypes": ["Ingress"]}});
    node.api.make(POLICIES, policy);
}

/// The socket of a pod that isn't plugged in yet: it hears from the first frame on.
pub fn listen(node: &Node, pod: &str) -> UdpSocket {
    node.inside(pod, || udp(Ipv4Addr::UNSPECIFIED.into(), ECHO))
}

pub fn hears(listener: &UdpSocket) -> bool {
    match listener.recv_from(&mut [0; 10]) {
        Ok(_) => true,
        Err(e) => {
            assert!(matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{e}");
            false
        }
    }
}

/// Somebody who sends to an address all the time, whether it is there or not. Returns how often meanwhile, and what `work` does.
pub fn while_sent_to<T>(node: &Node, from: &str, to: Ipv4Addr, work: impl FnOnce() -> T) -> (usize, T) {
    let mac = endpoint_mac("backend", to.into());
    node.run_in(from, &format!("ip neighbour replace {to} lladdr {mac} dev eth1 nud permanent"));
    let socket = node.inside(from, || udp(Ipv4Addr::UNSPECIFIED.into(), 0));
    let (is_over, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
    let done = thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let _ = socket.send_to(b"hello", (to, ECHO));
                sent.fetch_add(1, Ordering::Relaxed);
            }
        });
        let done = work();
        is_over.store(true, Ordering::Relaxed);
        done
    });
    (sent.into_inner(), done)
}

#[test]
fn a_pod_is_closed_from_its_first_frame_until_its_policy_goes() {
    let node = Node::with_network(IPV4);
    let sender = node.pod("sender", on_backend(), json!({}));
    let probe = node.pod("probe", on_backend(), json!({"app": "db"}));
    for pod in [&sender, &probe] {
        node.add(pod).unwrap();
    }
    isolate(&node, "db");
    let rules = || node.run_in("portolan-77", "nft list ruleset");
    node.wait_for("the agent to know the policy", || rules().contains(&port(&probe)));
    node.make_netns("target");
    let listener = listen(&node, "target");

    let add = |number: u8, app: &str| {
        let address = Ipv4Addr::new(10, 32, 1, number);
        let wishes = on_backend_with(json!({"ips": [address]}));
        let pod = node.pod_in("target", &format!("target-{number}"), wishes, json!({"app": app}));
        listener.set_read_timeout(Some(WHILE)).unwrap();
        let (sent, heard) = while_sent_to(&node, "sender", address, || {
            node.add(&pod).unwrap();
            hears(&listener)
        });
        assert_eq!(addresses(&node, &pod), [IpAddr::from(address)]);
        assert!(sent > 100, "only {sent}");
        (pod, heard)
    };
    for round in 1..=ROUNDS {
        let (pod, heard) = add(round, "db");
        assert!(!heard, "round {round}: something got through");
        node.delete(&pod).unwrap();
    }
    let (pod, heard) = add(100, "web");
    assert!(heard, "no policy is about this one");
    node.delete(&pod).unwrap();
    while listener.set_nonblocking(true).is_ok() && hears(&listener) {}
    listener.set_nonblocking(false).unwrap();

    let (_pod, heard) = add(101, "db");
    assert!(!heard);
    node.api.remove(&format!("{POLICIES}/deny"));
    listener.set_read_timeout(Some(super::PATIENCE)).unwrap();
    let (_, heard) = while_sent_to(&node, "sender", Ipv4Addr::new(10, 32, 1, 101), || hears(&listener));
    assert!(heard, "the policy is gone");
}

#[test]
fn rules_that_somebody_takes_away_are_missed_and_put_back() {
    let node = Node::with_network(IPV4);
    let (sender, pod) =
        (node.pod("sender", on_backend(), json!({})), node.pod("pod", on_backend(), json!({"app": "db"})));
    for pod in [&sender, &pod] {
        node.add(pod).unwrap();
    }
    let to = addresses(&node, &pod)[0];
    let is_closed = || {
        let listener = node.inside(netns(&pod), || udp(to, ECHO));
        listener.set_read_timeout(Some(WHILE)).unwrap();
        node.inside(netns(&sender), || udp(Ipv4Addr::UNSPECIFIED.into(), 0)?.send_to(b"hello", (to, ECHO)));
        !hears(&listener)
    };
    assert!(!is_closed());
    isolate(&node, "db");
    let rules = || node.run_in("portolan-77", "nft --stateless list ruleset");
    node.wait_for("the agent to know the policy", || rules().contains(&port(&pod)));
    let before = rules();
    for tampering in ["flush ruleset", "flush table bridge portolan", "delete table bridge portolan"] {
        assert!(is_closed());
        node.check(&pod).unwrap();
        node.run_in("portolan-77", &format!("nft {tampering}"));
        names(&node.check(&pod).unwrap_err(), 103, &["network backend", "put back"]);
        node.wait_for("the rules to be back", || rules() == before);
        node.wait_for("CHECK to be content", || node.check(&pod).is_ok());
    }
    // Or who comes next finds it.
    node.run_in("portolan-77", "nft flush ruleset");
    node.add(&node.pod("next", on_backend(), json!({}))).unwrap();
    assert_eq!(rules(), before);
    assert!(is_closed());
    // A table of somebody else's is theirs, and changes nothing for long.
    node.run_in("portolan-77", "nft add table bridge other");
    node.wait_for("CHECK to be content", || node.check(&pod).is_ok());
    assert!(rules().contains("table bridge other"));
}

#[test]
fn no_pod_is_plugged_in_while_the_policies_are_not_known() {
    let mut node = Node::new();
    node.make_network("backend", 77, IPV4);
    isolate(&node, "db");
    node.api.hold(KIND);
    node.start();
    let sender = node.pod("sender", on_backend(), json!({}));
    let wishes = on_backend_with(json!({"ips": ["10.32.1.1"]}));
    let pod = node.pod("pod", wishes, json!({"app": "db"}));
    // Whatever the other watches bring meanwhile.
    for _ in 0..5 {
        names(&node.add(&pod).unwrap_err(), 11, &["the agent has not heard from the API server yet"]);
        names(&node.status().unwrap_err(), 50, &["has not heard"]);
        thread::sleep(WHILE);
    }
    assert_eq!(interface(&node, &pod), None);
    node.api.release(KIND);
    node.wait_for("the agent to be ready", || node.status().is_ok());
    node.add(&sender).unwrap();
    let listener = listen(&node, "pod");
    listener.set_read_timeout(Some(WHILE)).unwrap();
    let (_, heard) = while_sent_to(&node, "sender", Ipv4Addr::new(10, 32, 1, 1), || {
        node.add(&pod).unwrap();
        hears(&listener)
    });
    assert!(!heard, "it is closed");
}

#[test]
fn a_running_pod_gets_another_bandwidth() {
    let node = Node::with_network(IPV4);
    let of = |rate: u64| on_backend_with(json!({"bandwidth": {"ingressRate": rate}}));
    let pod = node.pod("pod", of(8_000_000), json!({}));
    node.add(&pod).unwrap();
    let object = format!("/api/v1/namespaces/shop/pods/{}", pod.name);
    node.api.edit(&format!("{object}/status"), json!({"status": {"phase": "Running", "podIP": "10.244.1.7"}}));
    let rates = || node.run_in("portolan-77", &format!("tc qdisc show dev {}", port(&pod)));
    assert!(rates().contains("rate 8Mbit"), "{}", rates());
    let made = interface(&node, &pod);
    node.api.edit(&object, json!({"metadata": {"annotations": of(16_000_000)}}));
    node.wait_for("the new rate", || rates().contains("rate 16Mbit"));
    node.api.edit(&object, json!({"metadata": {"annotations": on_backend()}}));
    node.wait_for("no limit", || !rates().contains("rate"));
    node.check(&pod).unwrap();
    assert_eq!(interface(&node, &pod), made, "the same interface");
    assert!(node.on_host(Path::new("/run/netns")).join(netns(&pod)).exists());
}
