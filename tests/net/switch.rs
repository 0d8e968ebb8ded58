//! What works on one switch works between pods of two nodes.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Instant,
};

use ipnet::IpNet;
use portolan_net::{Allowed, Mac};

use super::{
    ECHO, Node, PATIENCE, Pod, forward, ip, two_nodes, udp,
    wire::{ALL_NODES, BROADCAST, EXPERIMENTAL, Wire, advertisement, frame, gratuitous_arp},
};

const VNI: u32 = 77;
const FLOATING: Ipv4Addr = Ipv4Addr::new(10, 32, 0, 100);
const FLOATING_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd32, 0, 0, 0, 0, 0, 0, 0x100);

/// Two nodes with the network, with or without suppression.
async fn network(suppression: bool) -> (Node, Node) {
    let nodes = two_nodes();
    for node in [&nodes.0, &nodes.1] {
        node.dataplane.ensure_network(&node.spec(VNI, suppression)).await.unwrap();
    }
    nodes
}

/// A pod that may take the floating addresses.
async fn plug_holder<'a>(node: &'a Node, pod: &str, last: u8) -> Pod<'a> {
    let floating = [IpAddr::from(FLOATING), FLOATING_IPV6.into()].map(IpNet::from);
    node.plug_allowed(VNI, pod, last, Allowed::Further(floating.to_vec())).await
}

async fn connect(suppression: bool, a: (&Node, &[&Pod<'_>]), b: (&Node, &[&Pod<'_>])) {
    forward(a.0, VNI, a.1, b.0, b.1, suppression).await;
    forward(b.0, VNI, b.1, a.0, a.1, suppression).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_kinds_of_frames_cross() {
    for suppression in [false, true] {
        let (a, b) = network(suppression).await;
        let (one, neighbour) = (a.plug(VNI, "one", 5).await, a.plug(VNI, "neighbour", 6).await);
        let (two, bystander) = (b.plug(VNI, "two", 21).await, b.plug(VNI, "bystander", 22).await);
        connect(suppression, (&a, &[&one, &neighbour]), (&b, &[&two, &bystander])).await;
        let mut from = Wire::open(&one);
        let mut others = [&neighbour, &two, &bystander].map(Wire::open);
        // A broadcast, multicasts that nobody joined, and those that every IPv4 and IPv6 host has joined.
        let groups = [BROADCAST, Mac([1, 0, 0x5e, 1, 2, 3]), Mac([1, 0, 0x5e, 0, 0, 1]), ALL_NODES];
        let unicast = frame(two.port.mac, one.port.mac, EXPERIMENTAL, b"for two only");
        from.send(&unicast);
        for group in groups {
            let sent = frame(group, one.port.mac, EXPERIMENTAL, b"for all");
            from.send(&sent);
            for (to, pod) in others.iter_mut().zip(["neighbour", "two", "bystander"]) {
                let seen = to.until(&sent);
                let seen = seen.unwrap_or_else(|| panic!("{group} is not seen by {pod}, suppression {suppression}"));
                if group == BROADCAST {
                    assert_eq!(seen.contains(&unicast), pod == "two", "unicast to two at {pod}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_multicast_group_reaches_the_other_node() {
    let (a, b) = network(false).await;
    let (one, two) = (a.plug(VNI, "one", 5).await, b.plug(VNI, "two", 21).await);
    connect(false, (&a, &[&one]), (&b, &[&two])).await;
    let group = Ipv4Addr::new(239, 1, 2, 3);
    let listener = two.listen();
    listener.join_multicast_v4(&group, &two.address).unwrap();
    // A pod has no default route on this network: the group is told its interface.
    ip(&one, &["route", "add", "239.0.0.0/8", "dev", "eth1"]);
    assert!(one.reaches(group, &listener));

    let group: Ipv6Addr = "ff05::123".parse().unwrap();
    let index = two.inside(|| {
        let socket = udp((Ipv6Addr::UNSPECIFIED, 0))?;
        Ok(rustix::net::netdevice::name_to_index(&socket, "eth1")?)
    });
    let listener = two.inside(|| udp((Ipv6Addr::UNSPECIFIED, ECHO + 1)));
    listener.join_multicast_v6(&group, index).unwrap();
    one.inside(|| udp((one.ipv6, 0))?.send_to(b"to the group", (group, ECHO + 1)));
    let mut buffer = [0; 20];
    let (length, from) = listener.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from.ip()), (&b"to the group"[..], one.ipv6.into()));
}

/// With suppression, a node answers for the other's pods: the question stays at home.
#[tokio::test(flavor = "multi_thread")]
async fn suppression_answers_neighbour_solicitations() {
    for suppression in [false, true] {
        let (a, b) = network(suppression).await;
        let (one, two) = (a.plug(VNI, "one", 5).await, b.plug(VNI, "two", 21).await);
        connect(suppression, (&a, &[&one]), (&b, &[&two])).await;
        let mut to = Wire::open(&two);
        one.inside(|| udp((one.ipv6, 0))?.send_to(b"asked for first", (two.ipv6, ECHO)));
        let from_one = [&two.port.mac.0[..], &one.port.mac.0, &[0x86, 0xdd]].concat();
        let seen = to.until(&from_one).expect("the datagram");
        // The group of the solicited node (RFC 4291, section 2.7.1), as a MAC.
        let questions = seen.iter().filter(|f| f.starts_with(&[0x33, 0x33, 0xff, 0, 0, 21]));
        assert_eq!(questions.count() == 0, suppression);
        for node in [&a, &b] {
            let addresses = node.dataplane.run_in(VNI, || std::fs::read_to_string("/proc/thread-self/net/if_inet6"));
            let addresses = addresses.unwrap();
            assert!(!addresses.contains("br0"), "the bridge is no IPv6 host: {addresses}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ipv6_address_that_another_node_has_is_detected() {
    let (a, b) = network(false).await;
    let (one, two) = (a.plug(VNI, "one", 5).await, b.plug(VNI, "two", 21).await);
    connect(false, (&a, &[&one]), (&b, &[&two])).await;
    // By hand, so that the kernel asks first (RFC 4862, section 5.4).
    ip(&one, &["address", "add", &format!("{}/64", two.ipv6), "dev", "eth1"]);
    let end = Instant::now() + PATIENCE * 3;
    while ip(&one, &["-6", "address", "show", "dadfailed"]).is_empty() {
        assert!(Instant::now() < end, "the duplicate was not detected");
        tokio::time::sleep(PATIENCE / 100).await;
    }
}

/// VRRP without a virtual MAC: the new holder announces the address, and is asked for it at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_failover_to_another_node_is_honoured_at_once() {
    let (a, b) = network(false).await;
    let (client, first) = (a.plug(VNI, "client", 5).await, plug_holder(&a, "first", 6).await);
    let second = plug_holder(&b, "second", 21).await;
    connect(false, (&a, &[&client, &first]), (&b, &[&second])).await;
    let take = |pod: &Pod<'_>, verb: &str| {
        ip(pod, &["address", verb, &format!("{FLOATING}/24"), "dev", "eth1"]);
        ip(pod, &["address", verb, &format!("{FLOATING_IPV6}/64"), "dev", "eth1", "nodad"]);
    };
    // There and back: to the other node, and to the client's own.
    let mut before: Option<&Pod<'_>> = None;
    for holder in [&first, &second, &first] {
        if let Some(before) = before.replace(holder) {
            take(before, "delete");
        }
        take(holder, "add");
        let mut watched = Wire::open(&client);
        let mut wire = Wire::open(holder);
        let announcements = [gratuitous_arp(holder.port.mac, FLOATING), advertisement(holder.port.mac, FLOATING_IPV6)];
        for announcement in &announcements {
            wire.send(announcement);
            assert!(watched.sees(announcement), "an announcement of {} is lost", holder.port.netns.display());
        }
        let listener = holder.listen();
        assert!(client.reaches(FLOATING, &listener), "IPv4 at {}", holder.port.netns.display());
        let listener = holder.inside(|| udp((FLOATING_IPV6, ECHO)));
        assert!(client.reaches(FLOATING_IPV6, &listener), "IPv6 at {}", holder.port.netns.display());
    }
}

/// Why suppression is off unless it is asked for (`net/bridge/br_arp_nd_proxy.c`): documented, and known to be so.
#[tokio::test(flavor = "multi_thread")]
async fn suppression_hides_announcements_from_other_nodes() {
    let (a, b) = network(true).await;
    let (one, two) = (plug_holder(&a, "one", 5).await, b.plug(VNI, "two", 21).await);
    connect(true, (&a, &[&one]), (&b, &[&two])).await;
    let (mut from, mut to) = (Wire::open(&one), Wire::open(&two));
    let announcement = gratuitous_arp(one.port.mac, FLOATING);
    let marker = frame(BROADCAST, one.port.mac, EXPERIMENTAL, b"after it");
    from.send(&announcement);
    from.send(&marker);
    let seen = to.until(&marker).expect("the frame after the announcement");
    assert!(!seen.contains(&announcement));
}
