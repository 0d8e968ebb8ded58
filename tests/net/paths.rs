//! Which packets get from node to node, and so which of the pods'.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, UdpSocket},
    time::Duration,
};

use portolan_net::{Heard, NetworkSpec, Outcome, Paths, vxlan_overhead};
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, set_ip_mtu_discover};
use tokio::time::timeout;

use super::{Node, PATIENCE, Pod, UNDERLAYS, Underlay, forward, ip, ping::pinger, two_nodes_over};

/// What pods need between nodes whose interfaces have that MTU.
const WANTED: u16 = 1500;
/// Seconds as the paths are told them: the first check is over by then, a further one has been made, and none is under way.
const SECONDS: u32 = 150;
/// Linux lets a link pass frames that are four bytes longer than its MTU, for a VLAN's tag.
const TAG: u16 = 4;

/// What a node finds of its path to another in so many seconds, as the agent would; they pass as soon as the answers are there. Returns
/// also how many large questions it took.
async fn found(from: &Node, to: IpAddr, paths: &mut Paths, seconds: u32) -> (Option<u16>, usize) {
    let pinger = pinger(from);
    let wanted = BTreeMap::from([(to, WANTED)]);
    let (mut answering, mut questions) = (BTreeSet::new(), 0);
    for _ in 0..seconds {
        for (node, size) in paths.tick(&wanted, &answering) {
            questions += 1;
            if !pinger.probe(node, size).await.unwrap() {
                paths.heard(node, size, Outcome::TooBig(None));
            }
        }
        answering.clear();
        // Down, or nowhere to send it to: no answer.
        if pinger.ask(to).await.is_err() {
            continue;
        }
        // The small one was asked last, and is the last to be answered.
        while let Ok(heard) = timeout(PATIENCE, pinger.answer()).await {
            match heard.unwrap() {
                Heard::Answer { node, size } if size < 100 => {
                    answering.insert(node);
                    break;
                }
                Heard::Answer { node, size } => paths.heard(node, size, Outcome::Passed),
                Heard::TooBig { node, size, carries } => paths.heard(node, size, Outcome::TooBig(carries)),
            }
        }
    }
    (paths.too_small().get(&to).copied(), questions)
}

fn new(node: &Node) -> Paths {
    Paths::new(node.vtep, BTreeMap::new())
}

fn set_mtu(node: &Node, interface: &str, mtu: u16) {
    node.enter("host", &["ip", "link", "set", interface, "mtu", &mtu.to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_loses_large_packets_is_measured_exactly_and_seen_to_be_repaired() {
    for underlay in UNDERLAYS {
        let (a, b) = two_nodes_over(underlay);
        let (mut from_a, mut from_b) = (new(&a), new(&b));
        let (limit, questions) = found(&a, b.vtep, &mut from_a, SECONDS).await;
        assert_eq!(limit, None, "nothing is wrong");
        assert!((1..=4).contains(&questions), "{questions} in {SECONDS} s");
        // The wire takes less than both nodes believe: it says nothing about it.
        set_mtu(&b, "u0", 1420);
        assert_eq!(found(&a, b.vtep, &mut from_a, SECONDS).await.0, Some(1420 + TAG));
        // The node whose own interface it is can't even send more.
        assert_eq!(found(&b, a.vtep, &mut from_b, SECONDS).await.0, Some(1420));
        set_mtu(&b, "u0", 1500);
        assert_eq!(found(&a, b.vtep, &mut from_a, SECONDS).await.0, None);
        assert_eq!(found(&b, a.vtep, &mut from_b, SECONDS).await.0, None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_does_not_answer_has_no_small_path() {
    for underlay in UNDERLAYS {
        let (a, b) = two_nodes_over(underlay);
        let ignores = match underlay {
            Underlay::Ipv4 => "ipv4/icmp_echo_ignore_all",
            Underlay::Ipv6 => "ipv6/icmp/echo_ignore_all",
        };
        b.set("host", ignores, "1");
        let mut paths = new(&a);
        let pinger = pinger(&a);
        for _ in 0..60 {
            let asked = paths.tick(&BTreeMap::from([(b.vtep, WANTED)]), &BTreeSet::new());
            assert_eq!(asked, [], "it would be of no use");
            pinger.ask(b.vtep).await.unwrap();
        }
        let heard = timeout(Duration::from_millis(300), pinger.answer()).await;
        assert!(heard.is_err(), "{heard:?}");
        assert_eq!(paths.too_small(), BTreeMap::new());
    }
}

/// Two nodes with a router between them, whose link to the second takes 1400 bytes.
fn routed(underlay: Underlay) -> (Node, Node, Node) {
    let (a, b) = (Node::new(underlay.vtep(0, 1)), Node::new(underlay.vtep(1, 1)));
    let router = Node::new(underlay.vtep(0, 254));
    for (node, port, network) in [(&a, "r0", 0), (&b, "r1", 1)] {
        let other = node.file("host").display().to_string();
        router.enter("host", &["ip", "link", "add", port, "type", "veth", "peer", "name", "u0", "netns", &other]);
        let by = underlay.vtep(network, 254);
        underlay.give(&router, by, port);
        router.enter("host", &["ip", "link", "set", port, "up"]);
        underlay.give(node, node.vtep, "u0");
        node.enter("host", &["ip", "link", "set", "u0", "up"]);
        node.enter("host", &["ip", "route", "add", "default", "via", &by.to_string()]);
    }
    router.set("host", "ipv4/ip_forward", "1");
    router.set("host", "ipv6/conf/all/forwarding", "1");
    set_mtu(&router, "r1", 1400);
    (a, router, b)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_routers_word_is_heard_and_not_needed() {
    for underlay in UNDERLAYS {
        let (a, router, b) = routed(underlay);
        let (limit, told) = found(&a, b.vtep, &mut new(&a), 40).await;
        assert_eq!(limit, Some(1400));
        assert!(told <= 8, "{told} questions, though the router says what it can pass on");
        // What it says itself reaches the node no more.
        let to = a.vtep.to_string();
        let family = if underlay == Underlay::Ipv4 { "-4" } else { "-6" };
        router.enter("host", &["ip", family, "rule", "add", "priority", "1", "iif", "lo", "to", &to, "blackhole"]);
        let (limit, silent) = found(&a, b.vtep, &mut new(&a), SECONDS).await;
        assert_eq!(limit, Some(1400));
        assert!(silent > told, "{silent} questions without the router's word, {told} with it");
        // The kernel remembers what the router said (RFC 1191, section 6.3); we see that it was repaired.
        set_mtu(&router, "r1", 1500);
        assert_eq!(found(&a, b.vtep, &mut new(&a), SECONDS).await.0, None);
    }
}

/// Whether a packet of so many bytes gets from pod to pod.
fn gets_there(from: &Pod<'_>, to: &Pod<'_>, listener: &UdpSocket, size: u16) -> bool {
    let headers = 20 + 8;
    from.inside(|| {
        let socket = UdpSocket::bind((from.address, 0))?;
        set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::PROBE)?;
        socket.send_to(&vec![0; usize::from(size) - headers], (to.address, super::ECHO))?;
        // It comes after the other, if that comes at all.
        socket.send_to(b"end", (to.address, super::ECHO))
    });
    let mut buffer = [0; 2000];
    let first = listener.recv(&mut buffer).unwrap();
    if first + headers == usize::from(size) {
        assert_eq!(listener.recv(&mut buffer).unwrap(), 3);
        return true;
    }
    assert_eq!(first, 3);
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_with_the_mtu_that_is_advised_lose_nothing() {
    for underlay in UNDERLAYS {
        let (a, b) = two_nodes_over(underlay);
        for node in [&a, &b] {
            node.dataplane.ensure_network(&node.spec(77, false)).await.unwrap();
        }
        let (one, two) = (a.plug(77, "one", 5).await, b.plug(77, "two", 21).await);
        forward(&a, 77, &[&one], &b, &[&two], false).await;
        forward(&b, 77, &[&two], &a, &[&one], false).await;
        let listener = two.listen();
        let mtu = u16::try_from(a.mtu()).unwrap();
        assert!(gets_there(&one, &two, &listener, mtu), "what a healthy path carries");
        set_mtu(&b, "u0", 1420);
        let limit = found(&a, b.vtep, &mut new(&a), SECONDS).await.0.unwrap();
        let fits = limit - u16::try_from(vxlan_overhead(a.vtep)).unwrap();
        assert!(gets_there(&one, &two, &listener, fits));
        assert!(!gets_there(&one, &two, &listener, fits + 1), "the first that vanishes");
        assert!(!gets_there(&one, &two, &listener, mtu));
        // The network gets the MTU: a pod that was there before keeps its own, and what is too large for it is not sent.
        set_mtu(&b, "u0", 1500);
        assert!(gets_there(&one, &two, &listener, mtu));
        a.dataplane.ensure_network(&NetworkSpec { mtu: fits.into(), ..a.spec(77, false) }).await.unwrap();
        assert!(ip(&one, &["link", "show", "eth1"]).contains(&format!(" mtu {mtu} ")));
        assert!(!gets_there(&one, &two, &listener, mtu));
        assert!(gets_there(&one, &two, &listener, fits));
    }
}
