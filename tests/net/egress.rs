//! The way outside: pods of two networks on two nodes, and a server that is on none of them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream},
    time::Duration,
};

use ipnet::IpNet;
use portolan_net::{
    Allowed, BRIDGE_ADDRESS, BRIDGE_MAC, Egress, Filter, NetworkSpec, Obstacle, PortFilter, PortSpec, Rule, gateway,
    port_name,
};

use super::{
    ECHO, Node, PATIENCE, Pod,
    families::pings,
    forward, ip,
    outside::{Outside, WEB},
    two_nodes, udp,
    wire::{ARP, BROADCAST, EXPERIMENTAL, Wire, advertisement, frame, gratuitous_arp, to_all_nodes},
};

const SHORT: Duration = Duration::from_millis(300);
/// Of the networks, whose addresses have this for their second byte, or group.
const FRONT: u32 = 32;
const BACK: u32 = 33;
/// Where the gateways of `FRONT` are.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 32, 0, 1);
const GATEWAY_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd32, 0, 0, 0, 0, 0, 0, 1);

fn subnets(vni: u32) -> Vec<IpNet> {
    vec![format!("10.{vni}.0.0/24").parse().unwrap(), format!("fd{vni}::/64").parse().unwrap()]
}

fn spec(node: &Node, vni: u32) -> NetworkSpec {
    NetworkSpec { subnets: subnets(vni), gateway: true, ..node.spec(vni, false) }
}

fn egress(vni: u32) -> Egress {
    Egress { vni, mtu: 1450, subnets: subnets(vni), tunnel_port: 7789 }
}

/// A network with its way outside.
async fn ensure(node: &Node, vni: u32) -> Vec<Obstacle> {
    node.dataplane.ensure_network(&spec(node, vni)).await.unwrap();
    node.dataplane.ensure_egress(&egress(vni)).await.unwrap()
}

/// A pod that goes outside by its network's gateways.
async fn plug<'a>(node: &'a Node, vni: u32, pod: &str, last: u8) -> Pod<'a> {
    let (address, ipv6): (Ipv4Addr, Ipv6Addr) =
        (format!("10.{vni}.0.{last}").parse().unwrap(), format!("fd{vni}::{last}").parse().unwrap());
    let gateways = subnets(vni).into_iter().map(gateway).collect();
    let port = PortSpec { gateways, ..node.port(vni, pod, address, ipv6) };
    node.dataplane.add_port(&port).await.unwrap();
    Pod { node, port, address, ipv6 }
}

/// All that the kernel has of networks' ways outside, of a network's namespace and the host's.
fn state(node: &Node, vni: u32) -> String {
    let network = format!("portolan-{vni}");
    let mut state = Vec::new();
    for netns in [&*network, "host"] {
        for question in [
            &["ip", "-o", "link", "show"][..],
            &["ip", "-o", "address", "show"],
            &["ip", "route", "show", "table", "all"],
            &["ip", "-6", "route", "show", "table", "all"],
            &["nft", "list", "ruleset"],
        ] {
            let text = node.enter(netns, question);
            // The kernel takes its time to say of links that they are up.
            let line = |line: &str| match question[2] {
                "link" => line.split_whitespace().nth(1).unwrap().to_owned(),
                _ => line.to_owned(),
            };
            // Nor is what the host has for its other links anything of ours: the kernel changes that on its own.
            let is_hosts = |line: &&str| {
                netns == "host" && question[0] == "ip" && (!line.contains("pgw") || line.contains("fe80:"))
            };
            let mut lines: Vec<String> = text.lines().filter(|line| !is_hosts(line)).map(line).collect();
            lines.sort();
            state.extend(lines);
        }
        for parameter in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            state.push(format!("{netns} {parameter} {}", node.get(netns, parameter)));
        }
    }
    state.push(node.get(&network, "ipv4/conf/br0/arp_ignore"));
    state.push(node.get(&network, "ipv6/conf/br0/disable_ipv6"));
    state.join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_seen_outside_as_their_node() {
    let (a, b) = two_nodes();
    for node in [&a, &b] {
        let outside = Outside::of(node);
        for vni in [FRONT, BACK] {
            assert_eq!(ensure(node, vni).await, []);
        }
        // One with the same subnets as another has on this node.
        node.dataplane.ensure_network(&NetworkSpec { subnets: subnets(FRONT), ..spec(node, 99) }).await.unwrap();
        node.dataplane.ensure_egress(&Egress { vni: 99, ..egress(FRONT) }).await.unwrap();
        let (front, back) = (plug(node, FRONT, "front", 5).await, plug(node, BACK, "back", 5).await);
        let twin =
            PortSpec { vni: 99, port: port_name("twin", "eth1"), netns: node.netns("twin"), ..front.port.clone() };
        node.dataplane.add_port(&twin).await.unwrap();
        let twin = Pod { node, port: twin, address: front.address, ipv6: front.ipv6 };
        for pod in [&front, &back, &twin] {
            assert_eq!(outside.sees(pod, PATIENCE), outside.node_has.map(Some), "{}", pod.port.netns.display());
            for server in outside.server {
                assert!(pings(pod, server), "{server} from {}", pod.port.netns.display());
            }
            node.dataplane.check_port(&pod.port).await.unwrap();
        }
        assert!(pings(&front, GATEWAY) && pings(&front, GATEWAY_IPV6));
        for gateway in [GATEWAY.to_string(), GATEWAY_IPV6.to_string()] {
            let known = ip(&front, &["neighbour", "show", &gateway]);
            assert!(known.contains(&BRIDGE_MAC.to_string()), "the same on every node: {known}");
        }

        // Again, as by an agent that starts anew: a connection that is open doesn't notice, and nothing changes.
        let listener = outside.listen(outside.server[0]);
        let client = front.inside(|| TcpStream::connect_timeout(&(outside.server[0], WEB).into(), PATIENCE));
        let (served, _) = listener.accept().unwrap();
        let before = state(node, FRONT);
        assert_eq!(ensure(node, FRONT).await, []);
        assert_eq!(state(node, FRONT), before);
        says(&client, &served);
        says(&served, &client);
    }
}

fn says(from: &TcpStream, to: &TcpStream) {
    use std::io::{Read, Write};
    to.set_read_timeout(Some(PATIENCE)).unwrap();
    { from }.write_all(b"hello").unwrap();
    { to }.read_exact(&mut [0; 5]).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_moves_keeps_its_way() {
    let (a, b) = two_nodes();
    let outsides = [Outside::of(&a), Outside::of(&b)];
    for node in [&a, &b] {
        ensure(node, FRONT).await;
    }
    for outside in &outsides {
        let pod = plug(outside.node, FRONT, "pod", 5).await;
        assert!(outside.is_reached_by(&pod));
        outside.node.dataplane.remove_port(FRONT, &pod.port.port, &pod.port.addresses).await.unwrap();
    }
}

/// The default route goes before the cluster's own, which is there again afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn a_pods_other_default_route_stays() {
    let (a, _b) = two_nodes();
    let outside = Outside::of(&a);
    ensure(&a, FRONT).await;
    let netns = a.netns("pod");
    a.enter("pod", &["ip", "link", "add", "eth0", "type", "bridge"]);
    a.enter("pod", &["ip", "address", "add", "10.244.0.5/24", "dev", "eth0"]);
    a.enter("pod", &["ip", "link", "set", "eth0", "up"]);
    a.enter("pod", &["ip", "route", "add", "default", "via", "10.244.0.1"]);
    let routes = || a.enter("pod", &["ip", "route", "show"]);
    let before = routes();
    let pod = plug(&a, FRONT, "pod", 5).await;
    assert_eq!(pod.port.netns, netns);
    assert!(outside.is_reached_by(&pod));
    assert!(routes().contains("default via 10.244.0.1 dev eth0"));
    // Somebody took a half of it.
    a.enter("pod", &["ip", "route", "del", "128.0.0.0/1"]);
    let error = a.dataplane.check_port(&pod.port).await.unwrap_err().to_string();
    assert!(error.starts_with("interface eth1 has no default route by 10.32.0.1"), "{error}");
    a.dataplane.add_port(&pod.port).await.unwrap();
    a.dataplane.check_port(&pod.port).await.unwrap();
    // By another pod, and by nobody.
    let by_pod = PortSpec { gateways: vec![[10, 32, 0, 9].into()], ..pod.port.clone() };
    a.dataplane.add_port(&by_pod).await.unwrap();
    let text = routes();
    assert_eq!(
        (text.matches("via 10.32.0.9 dev eth1").count(), text.matches("via 10.32.0.1 ").count()),
        (2, 0),
        "{text}"
    );
    a.dataplane.add_port(&PortSpec { gateways: Vec::new(), ..pod.port.clone() }).await.unwrap();
    assert!(!routes().contains("0.0.0.0/1") && !routes().contains("128.0.0.0/1"));
    a.dataplane.add_port(&pod.port).await.unwrap();
    a.dataplane.remove_port(FRONT, &pod.port.port, &pod.port.addresses).await.unwrap();
    assert_eq!(routes(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_pod_is_reached_by_a_gateway() {
    let (a, b) = two_nodes();
    let outside = Outside::of(&a);
    for vni in [FRONT, BACK] {
        ensure(&a, vni).await;
    }
    ensure(&b, FRONT).await;
    let (pod, back) = (plug(&a, FRONT, "pod", 5).await, plug(&a, BACK, "back", 6).await);
    let (neighbour, remote) = (plug(&a, FRONT, "neighbour", 7).await, plug(&b, FRONT, "remote", 21).await);
    forward(&a, FRONT, &[&pod, &neighbour], &b, &[&remote], false).await;
    forward(&b, FRONT, &[&remote], &a, &[&pod, &neighbour], false).await;
    assert!(outside.is_reached_by(&pod) && outside.is_reached_by(&back));

    // The host knows where the other network is: as bad as it can be.
    a.enter("host", &["ip", "route", "add", "10.33.0.0/24", "dev", "pgw33", "via", "169.254.64.3"]);
    a.enter("host", &["ip", "-6", "route", "add", "fd33::/64", "dev", "pgw33", "via", "fd70:6f72:746f:6c00::3"]);
    let transit = ["169.254.64.2", "169.254.64.3", "fd70:6f72:746f:6c00::2", "fd70:6f72:746f:6c00::3"];
    let others = [back.address.to_string(), back.ipv6.to_string()];
    for address in transit.iter().copied().chain(others.iter().map(String::as_str)) {
        assert!(!pings(&pod, address.parse::<IpAddr>().unwrap()), "{address}");
    }
    // Pods of its own network it reaches as ever, and not by the gateway, where the rules at their ports would not be asked.
    for other in [&neighbour, &remote] {
        let (listener, ipv6) = (other.listen(), other.listen_ipv6());
        assert!(pod.reaches(other.address, &listener) && pod.reaches(other.ipv6, &ipv6));
        ip(&pod, &["route", "add", &format!("{}/32", other.address), "via", "10.32.0.1"]);
        ip(&pod, &["-6", "route", "add", &format!("{}/128", other.ipv6), "via", "fd32::1"]);
        for socket in [&listener, &ipv6] {
            socket.set_read_timeout(Some(SHORT)).unwrap();
        }
        assert!(!pod.reaches(other.address, &listener) && !pod.reaches(other.ipv6, &ipv6));
    }
}

/// A node takes VXLAN from whoever sends it, with a frame of any network in it.
#[tokio::test(flavor = "multi_thread")]
async fn no_tunnel_begins_at_a_pod() {
    let (a, _b) = two_nodes();
    let outside = Outside::of(&a);
    ensure(&a, FRONT).await;
    a.dataplane.ensure_egress(&Egress { tunnel_port: 7788, ..egress(FRONT) }).await.unwrap();
    let pod = plug(&a, FRONT, "pod", 5).await;
    for family in [0, 1] {
        let (node, server) = (outside.node_has[family], outside.server[family]);
        let own: IpAddr = if family == 0 { pod.address.into() } else { pod.ipv6.into() };
        let [tunnel, other] = [7788, 7787].map(|port| a.at("host").run(|| udp((node, port))).unwrap());
        let [far, far_other] = [7788, 7787].map(|port| outside.inside(|| udp((server, port))));
        let client = pod.inside(|| udp((own, 0)));
        for port in [7788, 7787] {
            client.send_to(b"hello", (node, port)).unwrap();
            client.send_to(b"hello", (server, port)).unwrap();
        }
        other.recv_from(&mut [0; 10]).unwrap();
        far_other.recv_from(&mut [0; 10]).unwrap();
        for socket in [&tunnel, &far] {
            socket.set_nonblocking(true).unwrap();
            assert!(socket.recv_from(&mut [0; 10]).is_err(), "to {node} and {server}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_passes_for_the_gateway() {
    let (a, b) = two_nodes();
    let outside = Outside::of(&a);
    ensure(&a, FRONT).await;
    // The other node has no rules yet, and lets everything out.
    b.dataplane.ensure_network(&NetworkSpec { gateway: false, ..spec(&b, FRONT) }).await.unwrap();
    let (pod, liar) = (plug(&a, FRONT, "pod", 5).await, plug(&a, FRONT, "liar", 6).await);
    let remote = plug(&b, FRONT, "remote", 21).await;
    forward(&a, FRONT, &[&pod, &liar], &b, &[&remote], false).await;
    forward(&b, FRONT, &[&remote], &a, &[&pod, &liar], false).await;
    for it in [&liar, &remote] {
        let port = PortSpec { allowed: Allowed::Any, locked: false, ..it.port.clone() };
        it.node.dataplane.add_port(&port).await.unwrap();
        let mut wire = Wire::open(it);
        let mac = it.port.mac;
        let reply = [&[0, 1, 8, 0, 6, 4, 0, 2][..], &mac.0, &GATEWAY.octets(), &pod.port.mac.0, &pod.address.octets()];
        let lies = [
            frame(BROADCAST, mac, ARP, &reply.concat()),
            gratuitous_arp(mac, GATEWAY),
            gratuitous_arp(BRIDGE_MAC, GATEWAY),
            advertisement(mac, GATEWAY_IPV6),
            to_all_nodes(
                mac,
                it.ipv6,
                &[&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &GATEWAY_IPV6.octets(), &[2, 1], &mac.0].concat(),
            ),
            frame(BROADCAST, BRIDGE_MAC, EXPERIMENTAL, b"lie"),
        ];
        let honest = frame(BROADCAST, mac, EXPERIMENTAL, b"honest");
        let mut heard = Wire::open(&pod);
        for frame in lies.iter().chain([&honest]) {
            wire.send(frame);
        }
        let seen = heard.until(&honest).expect("the honest frame");
        let believed: Vec<_> = lies.iter().filter(|lie| seen.contains(lie)).collect();
        assert!(believed.is_empty(), "from {}: {believed:?}", it.port.netns.display());
        assert!(outside.is_reached_by(&pod), "it still has its way");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_for_the_gateway_stays_on_its_node() {
    let (a, b) = two_nodes();
    let outside = Outside::of(&a);
    for node in [&a, &b] {
        ensure(node, FRONT).await;
    }
    let (pod, neighbour) = (plug(&a, FRONT, "pod", 5).await, plug(&a, FRONT, "neighbour", 6).await);
    let remote = plug(&b, FRONT, "remote", 21).await;
    forward(&a, FRONT, &[&pod, &neighbour], &b, &[&remote], false).await;
    forward(&b, FRONT, &[&remote], &a, &[&pod, &neighbour], false).await;
    let mut tunnel = a.at("portolan-32").run(|| Wire::at("vx0")).unwrap();
    let mut wires = [Wire::open(&neighbour), Wire::open(&remote)];
    ip(&pod, &["neighbour", "flush", "dev", "eth1"]);
    assert!(pings(&pod, GATEWAY) && pings(&pod, GATEWAY_IPV6) && outside.is_reached_by(&pod));
    // Somebody who isn't there, whom the gateway is asked for by an answer from outside, is looked for here only.
    a.dataplane
        .run_in(FRONT, || udp((Ipv4Addr::UNSPECIFIED, 0))?.send_to(b"?", (Ipv4Addr::new(10, 32, 0, 77), ECHO)))
        .unwrap();
    let mut sender = Wire::open(&pod);
    let honest = frame(BROADCAST, pod.port.mac, EXPERIMENTAL, b"honest");
    sender.send(&honest);
    let is_about = |frame: &[u8]| {
        let asks =
            frame.get(12..14) == Some(&ARP.to_be_bytes()[..]) && frame.get(38..42) == Some(&GATEWAY.octets()[..]);
        let discovers = frame.get(20) == Some(&58)
            && frame.get(54) == Some(&135)
            && frame.get(62..78) == Some(&GATEWAY_IPV6.octets()[..]);
        asks || discovers || frame.get(6..12) == Some(&BRIDGE_MAC.0[..]) || frame.get(..6) == Some(&BRIDGE_MAC.0[..])
    };
    for wire in &mut wires {
        let seen = wire.until(&honest).expect("the honest frame");
        // The gateway's own question for somebody who isn't there is for all pods of its node.
        let strays = seen.iter().filter(|frame| is_about(frame) && frame.get(6..12) != Some(&BRIDGE_MAC.0[..]));
        assert_eq!(strays.count(), 0);
    }
    let crossed: Vec<_> = tunnel.all().into_iter().filter(|frame| is_about(frame)).collect();
    assert!(crossed.is_empty(), "{crossed:?}");
}

/// A pod had the gateway's address before: who knows its MAC is told at once where the gateway is, and the other node's pods hear nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_says_that_it_is_there() {
    let (a, b) = two_nodes();
    let outside = Outside::of(&a);
    for node in [&a, &b] {
        node.dataplane.ensure_network(&NetworkSpec { gateway: false, ..spec(node, FRONT) }).await.unwrap();
    }
    let (pod, remote) = (plug(&a, FRONT, "pod", 5).await, plug(&b, FRONT, "remote", 21).await);
    forward(&a, FRONT, &[&pod], &b, &[&remote], false).await;
    forward(&b, FRONT, &[&remote], &a, &[&pod], false).await;
    let gone = "02:00:00:00:00:99";
    let gateways = [GATEWAY.to_string(), GATEWAY_IPV6.to_string()];
    let from = |pod: &Pod<'_>| frame(BROADCAST, pod.port.mac, EXPERIMENTAL, b"honest");
    let names_gateway = |frame: &[u8]| {
        let has = |address: &[u8]| frame.windows(address.len()).any(|bytes| bytes == address);
        has(&GATEWAY.octets()) || has(&GATEWAY_IPV6.octets())
    };
    for comes_back in [false, true] {
        if comes_back {
            a.dataplane.remove_egress(FRONT, &subnets(FRONT)).await.unwrap();
        }
        for gateway in &gateways {
            ip(&pod, &["neighbour", "replace", gateway, "lladdr", gone, "dev", "eth1", "nud", "reachable"]);
        }
        let mut wires = [Wire::open(&remote), a.at("portolan-32").run(|| Wire::at("vx0")).unwrap()];
        assert_eq!(ensure(&a, FRONT).await, []);
        assert_eq!(outside.sees(&pod, PATIENCE), outside.node_has.map(Some), "comes back: {comes_back}");
        Wire::open(&pod).send(&from(&pod));
        for wire in &mut wires {
            let seen = wire.until(&from(&pod)).expect("the honest frame");
            let strays: Vec<_> = seen.iter().filter(|frame| names_gateway(frame)).collect();
            assert!(strays.is_empty(), "{strays:?}");
        }
    }
    // Who is there already doesn't say so every minute.
    let mut wire = Wire::open(&pod);
    ensure(&a, FRONT).await;
    Wire::open(&remote).send(&from(&remote));
    let seen = wire.until(&from(&remote)).expect("the honest frame");
    assert!(!seen.iter().any(|frame| names_gateway(frame)));
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_hold_outside_too() {
    let (a, _b) = two_nodes();
    let outside = Outside::of(&a);
    ensure(&a, FRONT).await;
    let (pod, free) = (plug(&a, FRONT, "pod", 5).await, plug(&a, FRONT, "free", 6).await);
    let hold = async |egress: Option<Vec<Rule>>, ingress: Option<Vec<Rule>>| {
        let filter = Filter { ports: [(pod.port.port.clone(), PortFilter { ingress, egress })].into() };
        a.dataplane.filter(FRONT, &filter).await.unwrap();
    };
    let to = |nets: &[&str]| {
        let peers = nets.iter().map(|net| net.parse().unwrap()).collect();
        Some(vec![Rule { peers: Some(peers), services: None }])
    };
    assert!(outside.is_reached_by(&pod));
    hold(Some(Vec::new()), None).await;
    assert!(outside.is_cut_off_from(&pod) && outside.is_reached_by(&free));
    assert!(outside.server.iter().all(|server| !pings(&pod, *server)));
    let resolver = a.dataplane.run_in(FRONT, || udp((BRIDGE_ADDRESS, 53))).unwrap();
    let client = pod.inside(|| udp((Ipv4Addr::UNSPECIFIED, 0)));
    client.send_to(b"question", (BRIDGE_ADDRESS, 53)).unwrap();
    let (_, asker) = resolver.recv_from(&mut [0; 10]).unwrap();
    resolver.send_to(b"answer", asker).unwrap();
    client.recv_from(&mut [0; 10]).expect("its node's resolver is no peer");
    hold(to(&["203.0.113.0/24", "2001:db8:1::/64"]), None).await;
    assert!(outside.is_cut_off_from(&pod), "another block");
    hold(to(&["198.51.100.0/24", "2001:db8::/64"]), Some(Vec::new())).await;
    assert!(outside.is_reached_by(&pod) && pings(&pod, outside.server[0]), "answers need no rule");

    // What passed goes on under rules that let it pass no more.
    let listener = outside.listen(outside.server[0]);
    let client = pod.inside(|| TcpStream::connect_timeout(&(outside.server[0], WEB).into(), PATIENCE));
    let (served, _) = listener.accept().unwrap();
    says(&client, &served);
    hold(Some(Vec::new()), Some(Vec::new())).await;
    says(&served, &client);
    says(&client, &served);
    drop(listener);
    assert!(outside.is_cut_off_from(&pod), "a new one");
    hold(None, None).await;
    assert!(outside.is_reached_by(&pod));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_it() {
    let (a, _b) = two_nodes();
    let outside = Outside::of(&a);
    for vni in [FRONT, BACK] {
        a.dataplane.ensure_network(&NetworkSpec { gateway: false, ..spec(&a, vni) }).await.unwrap();
    }
    let pod = plug(&a, FRONT, "pod", 5).await;
    let before = state(&a, FRONT);
    let off = async |vni| {
        a.dataplane.ensure_network(&NetworkSpec { gateway: false, ..spec(&a, vni) }).await.unwrap();
        a.dataplane.remove_egress(vni, &subnets(vni)).await.unwrap();
    };
    for _ in 0..2 {
        ensure(&a, FRONT).await;
        assert!(outside.is_reached_by(&pod));
        // As after a crash between any two of its steps: each part is missing once.
        for (netns, part) in [
            ("portolan-32", &["ip", "link", "del", "gw0"][..]),
            ("portolan-32", &["ip", "address", "flush", "dev", "gw0"]),
            ("portolan-32", &["ip", "link", "set", "gw0", "down"]),
            ("host", &["ip", "address", "flush", "dev", "pgw32"]),
            ("portolan-32", &["ip", "address", "del", "10.32.0.1/32", "dev", "br0"]),
            ("portolan-32", &["nft", "flush", "ruleset"]),
            ("host", &["nft", "flush", "ruleset"]),
            ("portolan-32", &["sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward"]),
        ] {
            a.enter(netns, part);
            ip(&pod, &["neighbour", "flush", "dev", "eth1"]);
            assert_ne!(outside.sees(&pod, SHORT), outside.node_has.map(Some), "{part:?} is needed");
            assert_eq!(ensure(&a, FRONT).await, []);
            assert!(outside.is_reached_by(&pod), "{part:?} is made anew");
        }
        // Another one needs the host's rules still.
        ensure(&a, BACK).await;
        off(FRONT).await;
        let back = plug(&a, BACK, "back", 5).await;
        assert!(outside.is_cut_off_from(&pod) && outside.is_reached_by(&back));
        off(BACK).await;
        off(BACK).await;
        assert_eq!(state(&a, FRONT), before);
    }
    // The network leaves the node with it.
    ensure(&a, FRONT).await;
    a.dataplane.remove_network(FRONT).await.unwrap();
    let host = a.enter("host", &["ip", "-o", "link"]) + &a.enter("host", &["nft", "list", "ruleset"]);
    assert!(!host.contains("pgw") && !host.contains("portolan"), "{host}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_forwards_nothing_is_told_and_left_alone() {
    let (a, _b) = two_nodes();
    let outside = Outside::of(&a);
    a.set("host", "ipv4/ip_forward", "0");
    assert_eq!(ensure(&a, FRONT).await, [Obstacle::Ipv4Forwarding]);
    a.set("host", "ipv6/conf/all/forwarding", "0");
    let found = ensure(&a, FRONT).await;
    assert_eq!(found, [Obstacle::Ipv4Forwarding, Obstacle::Ipv6Forwarding]);
    let text = found[0].to_string();
    assert!(text.contains("net.ipv4.ip_forward is not 1"), "{text}");
    assert_eq!((a.get("host", "ipv4/ip_forward"), a.get("host", "ipv6/conf/all/forwarding")), ("0".into(), "0".into()));
    let pod = plug(&a, FRONT, "pod", 5).await;
    assert!(outside.is_cut_off_from(&pod));
    for parameter in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        a.set("host", parameter, "1");
    }
    assert!(outside.is_reached_by(&pod), "it needs nothing else");
    assert_eq!(ensure(&a, FRONT).await, []);
}
