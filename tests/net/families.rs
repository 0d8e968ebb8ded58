//! IPv4 and IPv6 on the same port, and IPv6 alone.

use std::{
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
};

use ipnet::IpNet;
use portolan_net::{
    Allowed, BRIDGE_ADDRESS, Bandwidth, Forwarding, NetworkSpec, Peer, PortSpec, blocks, endpoint_mac, port_name,
    usable,
};
use rustix::net::{AddressFamily, SocketType, ipproto, socket};

use super::{
    Node, PATIENCE, Pod, UNDERLAYS, forward, ip, ipv6, two_nodes, two_nodes_over, udp,
    wire::{BROADCAST, EXPERIMENTAL, Wire, checksum, frame, router_advertisement},
};

const VNI: u32 = 77;
/// What pods of IPv6-only networks ask the DNS server from: only their own node knows it.
const ASKS_FROM: Ipv4Addr = Ipv4Addr::new(169, 254, 56, 1);

/// A network without IPv4, as the agent makes it.
fn ipv6_only(node: &Node, suppression: bool) -> NetworkSpec {
    let subnets = vec!["fd32::/64".parse().unwrap(), "169.254.56.0/21".parse().unwrap()];
    NetworkSpec { subnets, ..node.spec(VNI, suppression) }
}

/// The port of a pod without IPv4, as the agent makes it.
fn ipv6_port(node: &Node, pod: &str, last: u8) -> PortSpec {
    let netns = if node.file(pod).exists() { PathBuf::from("/run/netns").join(pod) } else { node.netns(pod) };
    PortSpec {
        vni: VNI,
        port: port_name(pod, "eth1"),
        netns,
        interface: "eth1".into(),
        mac: endpoint_mac("77", ipv6(last).into()),
        addresses: vec![IpNet::new(ipv6(last).into(), 64).unwrap(), IpNet::from(IpAddr::from(ASKS_FROM))],
        mtu: node.mtu(),
        resolvers: vec![BRIDGE_ADDRESS],
        locked: true,
        allowed: Allowed::default(),
        bandwidth: Bandwidth::default(),
        gateways: Vec::new(),
    }
}

async fn plug_ipv6<'a>(node: &'a Node, pod: &str, last: u8) -> Pod<'a> {
    let port = ipv6_port(node, pod, last);
    node.dataplane.add_port(&port).await.unwrap();
    Pod { node, port, address: ASKS_FROM, ipv6: ipv6(last) }
}

/// As the agent does it: other nodes are told of a pod's addresses on the network only.
async fn connect(node: &Node, local: &[&Pod<'_>], peer: &Node, remote: &[&Pod<'_>], suppression: bool) -> usize {
    let told = remote.iter().flat_map(|pod| pod.endpoints()).filter(|(address, _)| address.is_ipv6());
    let peers = vec![Peer { vtep: peer.vtep, endpoints: told.collect() }];
    let local = local.iter().flat_map(|pod| pod.endpoints()).collect();
    node.dataplane.forward(VNI, &Forwarding { local, peers, suppression }).await.unwrap()
}

/// Whether an echo request is answered (RFC 792, RFC 4443 section 4).
pub fn pings(from: &Pod<'_>, to: impl Into<IpAddr>) -> bool {
    let to = to.into();
    let (family, protocol, kinds) = match to {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, [8, 0]),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, [128, 129]),
    };
    let message = |kind: u8| {
        let mut message = [&[kind, 0, 0, 0, 7, 7, 0, 1][..], b"are you there"].concat();
        // In IPv6 the kernel does it (RFC 3542, section 3.1).
        if to.is_ipv4() {
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        message
    };
    from.inside(|| {
        let socket = UdpSocket::from(socket(family, SocketType::RAW, Some(protocol))?);
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect((to, 0))?;
        socket.send(&message(kinds[0]))?;
        let mut buffer = [0; 200];
        while let Ok(length) = socket.recv(&mut buffer) {
            // raw(7): in IPv4 with the IP header.
            let icmp = &buffer[if to.is_ipv4() { 20 } else { 0 }..length];
            if icmp[0] == kinds[1] && icmp[4..] == message(kinds[1])[4..] {
                return Ok(true);
            }
        }
        Ok(false)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn both_families_are_answered_across_nodes() {
    for (underlay, suppression) in UNDERLAYS.into_iter().flat_map(|it| [(it, false), (it, true)]) {
        let (a, b) = two_nodes_over(underlay);
        for node in [&a, &b] {
            node.dataplane.ensure_network(&node.spec(VNI, suppression)).await.unwrap();
        }
        let (one, two) = (a.plug(VNI, "one", 5).await, b.plug(VNI, "two", 21).await);
        forward(&a, VNI, &[&one], &b, &[&two], suppression).await;
        forward(&b, VNI, &[&two], &a, &[&one], suppression).await;
        for (from, to) in [(&one, &two), (&two, &one)] {
            assert!(pings(from, to.address), "IPv4 over {underlay:?}, suppression {suppression}");
            assert!(pings(from, to.ipv6), "IPv6 over {underlay:?}, suppression {suppression}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_without_ipv4_works_across_nodes_and_has_a_resolver() {
    for (underlay, suppression) in UNDERLAYS.into_iter().flat_map(|it| [(it, false), (it, true)]) {
        let (a, b) = two_nodes_over(underlay);
        for node in [&a, &b] {
            node.dataplane.ensure_network(&ipv6_only(node, suppression)).await.unwrap();
        }
        // Both ask from the same address: it means nothing beyond their own nodes.
        let (one, two) = (plug_ipv6(&a, "one", 5).await, plug_ipv6(&b, "two", 21).await);
        let connect = async || {
            let changes = connect(&a, &[&one], &b, &[&two], suppression).await;
            changes + connect(&b, &[&two], &a, &[&one], suppression).await
        };
        connect().await;
        assert_eq!(connect().await, 0, "a second time changes nothing");
        assert!(pings(&one, two.ipv6) && pings(&two, one.ipv6), "suppression {suppression}");

        for (node, pod) in [(&a, &one), (&b, &two)] {
            let resolver = node.dataplane.run_in(VNI, || udp((BRIDGE_ADDRESS, 53))).unwrap();
            let client = pod.inside(|| udp((Ipv4Addr::UNSPECIFIED, 0)));
            client.send_to(b"question", (BRIDGE_ADDRESS, 53)).unwrap();
            let mut buffer = [0; 20];
            let (_, from) = resolver.recv_from(&mut buffer).unwrap();
            assert_eq!(from.ip(), ASKS_FROM);
            resolver.send_to(b"answer", from).unwrap();
            let (length, from) = client.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], from.ip()), (&b"answer"[..], BRIDGE_ADDRESS.into()));
        }
    }
}

/// Sandboxes don't wait for duplicate detection: the first packet may leave with the address.
#[tokio::test(flavor = "multi_thread")]
async fn an_ipv6_address_can_be_used_at_once() {
    let (a, _b) = two_nodes();
    a.dataplane.ensure_network(&ipv6_only(&a, false)).await.unwrap();
    let pod = plug_ipv6(&a, "pod", 5).await;
    pod.inside(|| UdpSocket::bind((pod.ipv6, 0)));
    assert_eq!(ip(&pod, &["-6", "address", "show", "dev", "eth1", "scope", "global", "tentative"]), "");
}

/// Container runtimes make pods of IPv4 clusters without IPv6, its loopback interface included.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_of_an_ipv4_cluster_reaches_itself() {
    let (a, _b) = two_nodes();
    a.dataplane.ensure_network(&ipv6_only(&a, false)).await.unwrap();
    a.netns("pod");
    for name in ["all", "default", "lo"] {
        a.set("pod", &format!("ipv6/conf/{name}/disable_ipv6"), "1");
    }
    let pod = plug_ipv6(&a, "pod", 5).await;
    let server = pod.inside(|| TcpListener::bind((pod.ipv6, 80)));
    pod.inside(|| TcpStream::connect_timeout(&(pod.ipv6, 80).into(), PATIENCE));
    drop(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_misses_each_address() {
    let (a, _b) = two_nodes();
    a.dataplane.ensure_network(&a.spec(VNI, false)).await.unwrap();
    let pod = a.plug(VNI, "pod", 5).await;
    for address in ["10.32.0.5/24", "fd32::5/64"] {
        a.dataplane.check_port(&pod.port).await.unwrap();
        ip(&pod, &["address", "delete", address, "dev", "eth1"]);
        let error = a.dataplane.check_port(&pod.port).await.unwrap_err().to_string();
        assert_eq!(error, format!("interface eth1 does not have the address {address} (in /run/netns/pod)"));
        a.dataplane.add_port(&pod.port).await.unwrap();
    }
    a.dataplane.check_port(&pod.port).await.unwrap();
}

/// A pod can't become the others' router, nor give them addresses.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_says_it_is_a_router_is_not_believed() {
    let (a, _b) = two_nodes();
    a.dataplane.ensure_network(&a.spec(VNI, false)).await.unwrap();
    let (rogue, victim) = (a.plug(VNI, "rogue", 5).await, a.plug(VNI, "victim", 6).await);
    let believe = |value: &str| a.set("victim", "ipv6/conf/eth1/accept_ra", value);
    let advertise = || {
        let (mut from, mut to) = (Wire::open(&rogue), Wire::open(&victim));
        from.send(&router_advertisement(rogue.port.mac, "fd99::".parse().unwrap()));
        let marker = frame(BROADCAST, rogue.port.mac, EXPERIMENTAL, b"after it");
        from.send(&marker);
        assert!(to.sees(&marker));
        let routes = ip(&victim, &["-6", "route", "show", "default"]);
        routes + &ip(&victim, &["-6", "address", "show", "to", "fd99::/64"])
    };
    assert_eq!(advertise(), "");
    // That it was well formed is seen by a pod that believes it.
    believe("2");
    assert!(advertise().contains("default via fe80::"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ipv6_port_leaves_nothing() {
    for suppression in [false, true] {
        let (a, b) = two_nodes();
        a.dataplane.ensure_network(&ipv6_only(&a, suppression)).await.unwrap();
        let remote = Pod { node: &b, port: ipv6_port(&b, "remote", 21), address: ASKS_FROM, ipv6: ipv6(21) };
        connect(&a, &[], &b, &[&remote], suppression).await;
        let before = super::leaks::state(&a);
        let pod = plug_ipv6(&a, "pod", 5).await;
        assert_ne!(super::leaks::state(&a), before);
        for _ in 0..2 {
            a.dataplane.remove_port(VNI, &pod.port.port, &pod.port.addresses).await.unwrap();
        }
        assert_eq!(super::leaks::state(&a), before, "suppression {suppression}");
        assert_eq!(connect(&a, &[], &b, &[&remote], suppression).await, 0);
        assert!(a.dataplane.check_port(&pod.port).await.is_err());
    }
}

/// The operator counts what is free by the same rule by which nodes give addresses.
#[test]
fn what_is_counted_is_what_can_be_given() {
    for subnet in ["10.32.0.0/29", "10.32.0.0/24", "10.32.0.0/20", "fd32::/120", "fd32::/116", "fd32::/108"] {
        let subnet: IpNet = subnet.parse().unwrap();
        let given = blocks(subnet).flat_map(|block| usable(subnet, block)).count();
        assert_eq!(u64::try_from(given).unwrap(), portolan_crds::capacity(subnet), "{subnet}");
    }
    for subnet in ["fd32::/64", "fd32::/48"] {
        let subnet: IpNet = subnet.parse().unwrap();
        let (pool, last) = (portolan_crds::pool(subnet), blocks(subnet).last().unwrap());
        assert!(pool.contains(&last) && last.broadcast() == pool.broadcast(), "{subnet}");
    }
}
