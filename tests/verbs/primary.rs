//! A node without another plugin: Portolan gives pods their own interfaces, too.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
    time::{Duration, Instant},
};

use portolan_net::pod_link;
use portolan_tests::node::{Node, Pod, state_of_host};
use serde_json::{Value, json};

use super::{ECHO, Interface, PATIENCE, files, interface, interface_called, names, netns, on_backend, reaches, udp};

pub(super) const BLOCKS: &[&str] = &["10.244.1.0/24", "fd44:0:0:1::/64"];
const CONFLIST: &str = "/etc/cni/net.d/00-portolan.conflist";
/// Where the agent keeps what it knows of pods on the pod network.
const KEPT: &str = "/var/lib/portolan/network/pods";
/// The node's own address, if it isn't to be another one.
const HOST: &str = "192.0.2.1";
/// The node's own address and two others', of either family: none has any of the other one there.
const NODES: [[&str; 3]; 2] = [[HOST, "192.0.2.2", "192.0.2.3"], ["fd00::1", "fd00::2", "fd00::3"]];
const SHORT: Duration = Duration::from_millis(300);

fn eth0(node: &Node, pod: &Pod) -> Option<Interface> {
    interface_called("eth0", node, pod)
}

fn own(node: &Node, pod: &Pod) -> Vec<IpAddr> {
    eth0(node, pod).unwrap().addresses
}

fn plain(node: &Node, name: &str) -> Pod {
    node.pod(name, json!({}), json!({}))
}

fn added(node: &Node, name: &str) -> Pod {
    let pod = plain(node, name);
    node.add(&pod).unwrap();
    pod
}

/// What the node keeps of its pods on the pod network.
fn kept(node: &Node) -> usize {
    files(node, KEPT).len()
}

/// All that the host's kernel has of the pod network.
pub(super) fn state(node: &Node) -> String {
    state_of_host(|question| node.run_in("host", question))
}

/// A socket in a namespace. A process that another test is just starting may hold a former one open for a moment.
fn listen(node: &Node, netns: &str, at: SocketAddr) -> UdpSocket {
    let end = Instant::now() + PATIENCE;
    loop {
        match node.inside(netns, || Ok(udp(at.ip(), at.port()))) {
            Ok(socket) => return socket,
            Err(error) => assert!(Instant::now() < end, "{netns} at {at}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a datagram gets from a namespace to an address at which somebody in another one listens.
fn gets_to(node: &Node, from: &str, server: &str, at: SocketAddr, to: SocketAddr) -> bool {
    let listener = listen(node, server, at);
    listener.set_read_timeout(Some(SHORT)).unwrap();
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let sent = node.inside(from, || Ok(UdpSocket::bind((any, 0))?.send_to(b"hello", to)));
    sent.is_ok() && listener.recv_from(&mut [0; 10]).is_ok()
}

/// Whether both pods, and their node, reach a pod at all of its addresses.
fn is_reached(node: &Node, pod: &Pod, by: &[&str]) -> bool {
    own(node, pod).into_iter().all(|address| {
        let at = SocketAddr::new(address, ECHO);
        by.iter().all(|from| gets_to(node, from, netns(pod), at, at))
    })
}

#[test]
fn a_pod_is_given_its_interface_and_nothing_of_it_is_left() {
    for [host, _, _] in NODES {
        let node = Node::primary_at(host.parse().unwrap(), BLOCKS);
        let resident = added(&node, "resident");
        let before = state(&node);

        let pod = plain(&node, "pod");
        let result = node.add(&pod).unwrap();
        let made = eth0(&node, &pod).unwrap();
        let [four, six] = made.addresses[..] else { panic!("{made:?}") };
        for (block, address) in BLOCKS.iter().zip([four, six]) {
            assert!(block.parse::<ipnet::IpNet>().unwrap().contains(&address), "{address}");
        }
        let address: IpAddr = host.parse().unwrap();
        let near = if address.is_ipv4() { "169.254.1.1" } else { "fe80::1" };
        let expected = json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": pod_link(&pod.container, "eth0"), "mac": "02:50:a9:fe:01:01"},
                {"name": "eth0", "mac": made.mac, "sandbox": "/run/netns/pod"},
            ],
            "ips": [
                {"address": format!("{four}/32"), "gateway": "169.254.1.1", "interface": 1},
                {"address": format!("{six}/128"), "gateway": "fe80::1", "interface": 1},
            ],
            "routes": [
                {"dst": "0.0.0.0/0", "gw": "169.254.1.1"},
                {"dst": "::/0", "gw": "fe80::1"},
                {"dst": BLOCKS[0], "gw": "169.254.1.1"},
                {"dst": BLOCKS[1], "gw": "fe80::1"},
                {"dst": ipnet::IpNet::from(address).to_string(), "gw": near},
            ],
            "dns": {},
        });
        assert_eq!(result, expected);
        assert_eq!(made.mtu, if address.is_ipv4() { 1450 } else { 1430 });
        assert!(is_reached(&node, &pod, &["resident", "host"]) && is_reached(&node, &resident, &["pod", "host"]));
        let host = SocketAddr::new(address, ECHO);
        assert!(gets_to(&node, "pod", "host", host, host), "the pod reaches its node");
        node.check(&pod).unwrap();

        assert_eq!(node.add(&pod).unwrap(), expected, "asked again it is the same");
        assert_eq!(eth0(&node, &pod).unwrap(), made);
        for _ in 0..2 {
            assert_eq!(node.delete(&pod), Ok(Value::Null));
            assert_eq!(eth0(&node, &pod), None);
            assert_eq!(kept(&node), 1);
        }
        assert_eq!(state(&node), before);
        names(&node.check(&pod).unwrap_err(), 103, &["has no interface eth0"]);
        node.check(&resident).unwrap();
    }
}

#[test]
fn the_runtime_is_told_once_pods_can_be_served() {
    let mut node = Node::without_plugin();
    std::fs::write(
        node.on_host(Path::new("/etc/cni/net.d/10-other.conflist")),
        r#"{"cniVersion":"1.0.0","name":"other","plugins":[{"type":"bridge"}]}"#,
    )
    .unwrap();
    node.start();
    let conflist = node.on_host(Path::new(CONFLIST));
    node.wait_for("the reason", || {
        node.status().is_err_and(|error| error["msg"].as_str().unwrap().contains("podCIDRs"))
    });
    names(&node.status().unwrap_err(), 50, &["Node node1 has no spec.podCIDRs"]);
    let pod = plain(&node, "pod");
    names(&node.add(&pod).unwrap_err(), 11, &["Node node1 has no spec.podCIDRs"]);
    assert!(!conflist.exists() && kept(&node) == 0);

    node.give_blocks(BLOCKS);
    node.wait_for("the configuration", || conflist.exists());
    let written: Value = serde_json::from_str(&std::fs::read_to_string(&conflist).unwrap()).unwrap();
    let plugin = json!({"type": "portolan", "primary": true, "agentSocket": "/run/portolan/cni.sock",
        "capabilities": {"portMappings": true}});
    assert_eq!(written, json!({"cniVersion": "1.0.0", "name": "portolan", "plugins": [plugin]}));
    node.status().unwrap();
    node.add(&pod).unwrap();
}

#[test]
fn an_address_that_was_given_back_is_not_given_at_once() {
    let mut node = Node::primary(&["10.244.1.0/28"]);
    let first = added(&node, "first");
    let given = own(&node, &first);
    node.delete(&first).unwrap();
    let second = added(&node, "second");
    assert_ne!(own(&node, &second), given);
    let before = own(&node, &second);
    node.delete(&second).unwrap();
    node.stop();
    node.start();
    node.wait_for("the agent to be ready", || node.status().is_ok());
    let third = added(&node, "third");
    assert!(![&given, &before].contains(&&own(&node, &third)));

    let mut others: Vec<Pod> = (0..12).map(|number| added(&node, &format!("pod-{number}"))).collect();
    let full = plain(&node, "full");
    names(&node.add(&full).unwrap_err(), 101, &["10.244.1.0/28"]);
    let free = others.pop().unwrap();
    let address = own(&node, &free);
    node.delete(&free).unwrap();
    node.add(&full).unwrap();
    assert_eq!(own(&node, &full), address, "the only one");
    let mut all: Vec<_> = others.iter().chain([&full, &third]).flat_map(|pod| own(&node, pod)).collect();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 13, "nobody shares one");
}

pub(super) fn join(node: &Node, name: &str, address: &str, blocks: &[&str]) {
    node.api.make(
        "/api/v1/nodes",
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"podCIDRs": blocks},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]}}),
    );
}

#[test]
fn other_nodes_are_followed() {
    for [host, second, third] in NODES {
        let mut node = Node::primary_at(host.parse().unwrap(), BLOCKS);
        let before = state(&node);
        let knows = |node: &Node, what: &str| state(node).contains(what);
        join(&node, "node2", second, &["10.244.2.0/24", "fd44:0:0:2::/64"]);
        join(&node, "node3", third, &["10.244.3.0/24"]);
        node.wait_for("the routes", || {
            [
                "10.244.2.0/24 via 10.244.2.0 dev portolan0",
                "fd44:0:0:2::/64 via",
                "10.244.3.0/24 via",
                &format!("dst {third}"),
            ]
            .iter()
            .all(|what| knows(&node, what))
        });
        // Nothing leaves for them as the node.
        node.wait_for("the rules", || knows(&node, "ip daddr 10.244.2.0/23 return"));
        node.api.remove("/api/v1/nodes/node3");
        node.wait_for("one to be forgotten", || !knows(&node, "10.244.3.") && !knows(&node, third));
        let with_one = state(&node);

        // One that goes while nobody looks.
        node.stop();
        assert_eq!(state(&node), with_one);
        node.api.remove("/api/v1/nodes/node2");
        node.start();
        node.wait_for("the other to be forgotten", || state(&node) == before);
    }
}

/// By mistake: what is this node's goes to no other, and of two others with the same the first has it.
#[test]
fn nodes_with_the_same_addresses_take_nothing_away() {
    let node = Node::primary(BLOCKS);
    let pods = ["one", "two"].map(|name| added(&node, name));
    let before = state(&node);
    join(&node, "larger", "192.0.2.7", &["10.244.0.0/16"]);
    join(&node, "same", "192.0.2.8", BLOCKS);
    join(&node, "within", "192.0.2.9", &["10.244.1.128/25"]);
    for (name, address) in [("first", "192.0.2.2"), ("second", "192.0.2.3")] {
        join(&node, name, address, &["10.245.0.0/24"]);
    }
    join(&node, "last", "192.0.2.4", &["10.246.0.0/24"]);
    node.wait_for("the last one", || state(&node).contains("10.246.0.0/24 via"));
    assert!(state(&node).contains("10.245.0.0/24 via") && state(&node).contains("192.0.2.2"));
    for absent in ["192.0.2.3 ", "192.0.2.7", "192.0.2.8", "192.0.2.9", "10.244.0.0/16", "10.244.1.128"] {
        assert!(!state(&node).contains(absent), "{absent} in {}", state(&node));
    }
    assert!(is_reached(&node, &pods[0], &["two", "host"]) && is_reached(&node, &pods[1], &["one", "host"]));
    let gone = SocketAddr::from(([10, 244, 1, 200], 80));
    let refused = node.inside("one", || Ok(TcpStream::connect_timeout(&gone, PATIENCE))).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::HostUnreachable, "a pod that isn't there is on no other node");
    for name in ["larger", "same", "within", "first", "second", "last"] {
        node.api.remove(&format!("/api/v1/nodes/{name}"));
    }
    node.wait_for("them to be forgotten", || state(&node) == before);
}

/// An agent that doesn't know the Nodes yet takes none for gone.
#[test]
fn what_goes_on_without_the_agent_goes_on_with_a_new_one() {
    let mut node = Node::primary(BLOCKS);
    join(&node, "node2", "192.0.2.2", &["10.244.2.0/24"]);
    node.wait_for("the route", || state(&node).contains("10.244.2.0/24 via"));
    let (one, two) = (plain(&node, "one"), added(&node, "two"));
    node.add_with_ports(&one, &json!([{"hostPort": 8080, "containerPort": ECHO, "protocol": "udp"}])).unwrap();
    let before = state(&node);
    let goes_on = |node: &Node| {
        let (at, to) = (SocketAddr::new(own(node, &one)[0], ECHO), SocketAddr::new(HOST.parse().unwrap(), 8080));
        assert!(is_reached(node, &one, &["two", "host"]) && is_reached(node, &two, &["one", "host"]));
        assert!(gets_to(node, "two", "one", at, to), "the host's port");
        assert_eq!(state(node), before);
    };
    node.kill();
    goes_on(&node);
    names(&node.add(&one).unwrap_err(), 11, &["agent"]);
    node.api.hold("/nodes");
    node.start();
    // Nothing is said of a Node that wasn't seen.
    names(&node.add(&one).unwrap_err(), 11, &["not made on this node yet: the cluster's Nodes are not known"]);
    std::thread::sleep(SHORT);
    names(&node.status().unwrap_err(), 50, &["the cluster's Nodes are not known"]);
    goes_on(&node);
    node.api.release("/nodes");
    node.wait_for("the agent to be ready", || node.status().is_ok());
    goes_on(&node);
    node.check(&one).unwrap();
    node.delete(&one).unwrap();
    node.delete(&two).unwrap();
    assert!(!state(&node).contains("8080") && kept(&node) == 0);
}

#[test]
fn a_pod_that_goes_while_the_agent_is_away_leaves_nothing() {
    let mut node = Node::primary(BLOCKS);
    let before = state(&node);
    let pod = plain(&node, "pod");
    node.add_with_ports(&pod, &json!([{"hostPort": 8080, "containerPort": 80}])).unwrap();
    let quiet = added(&node, "quiet");
    node.stop();
    assert_eq!(node.delete(&pod), Ok(Value::Null));
    for pod in [&pod, &quiet] {
        node.remove_netns(&pod.netns);
    }
    node.start();
    node.wait_for("nothing to be left", || state(&node) == before && kept(&node) == 0);

    // Of one that an agent was killed about before its journal knew of it.
    node.run_in("host", "ip link add plp00000000 type veth peer name lost");
    node.wait_for("the link to be collected", || state(&node) == before);
}

/// The pod that it was killed about is asked for again, or given up, or gone by the time there is another agent.
#[test]
fn an_agent_may_be_killed_at_any_moment() {
    let mut node = Node::primary(BLOCKS);
    let resident = added(&node, "resident");
    let before = state(&node);
    let ports = json!([{"hostPort": 8080, "containerPort": ECHO, "protocol": "udp"}]);
    let mut was_cut = 0;
    for round in 0..18u64 {
        let pod = plain(&node, &format!("pod-{round}"));
        let said = node.kill_while_adding(&pod, Duration::from_micros(150 * round * round));
        was_cut += u32::from(said.is_err() && kept(&node) == 2);
        assert!(is_reached(&node, &resident, &["host"]));
        if round % 3 == 0 {
            node.remove_netns(&pod.netns);
        }
        node.start();
        node.wait_for("the agent to be ready", || node.status().is_ok());
        if round % 3 == 1 {
            let again = node.add_with_ports(&pod, &ports).unwrap();
            assert!(said.is_err() || said == Ok(again));
            node.check(&pod).unwrap();
        }
        if round % 3 != 0 {
            node.delete(&pod).unwrap();
            assert_eq!(eth0(&node, &pod), None);
        }
        node.wait_for("nothing to be left", || state(&node) == before && kept(&node) == 1);
    }
    assert!(was_cut > 0, "it was never killed while it added a pod");
}

#[test]
fn a_pod_may_be_on_networks_beside() {
    let node = Node::primary(BLOCKS);
    node.make_network("backend", 77, &["10.32.0.0/16"]);
    let before = state(&node);
    let [one, two] = ["one", "two"].map(|name| node.pod(name, on_backend(), json!({})));
    for pod in [&one, &two] {
        node.add(pod).unwrap();
        node.check(pod).unwrap();
    }
    assert!(reaches(&node, &one, &two) && is_reached(&node, &two, &["one", "host"]));

    // All of it or nothing; but what is there stays.
    let wrong = node.pod("wrong", json!({"portolan.dev/networks": "bckend"}), json!({}));
    names(&node.add(&wrong).unwrap_err(), 100, &["bckend", "backend"]);
    assert!(eth0(&node, &wrong).is_none() && kept(&node) == 2);
    node.api.edit(
        "/api/v1/namespaces/shop/pods/one",
        json!({"metadata": {"annotations": {"portolan.dev/networks": "bckend"}}}),
    );
    node.wait_for("the change to be seen", || node.add(&one).is_err());
    assert!(is_reached(&node, &one, &["two"]));
    for pod in [&one, &two] {
        node.delete(pod).unwrap();
        assert!(eth0(&node, pod).is_none() && interface(&node, pod).is_none());
    }
    node.wait_for("nothing to be left", || state(&node) == before);
}

#[test]
fn ports_of_the_host_lead_to_a_pod_as_long_as_it_is_there() {
    let node = Node::primary(BLOCKS);
    let (pod, client) = (plain(&node, "pod"), added(&node, "client"));
    let before = state(&node);
    let ports = json!([
        {"hostPort": 8080, "containerPort": ECHO, "protocol": "UDP", "hostIP": ""},
        {"hostPort": 8081, "containerPort": ECHO, "protocol": "udp", "hostIP": "127.0.0.1"},
    ]);
    node.add_with_ports(&pod, &ports).unwrap();
    let host: IpAddr = HOST.parse().unwrap();
    let leads = |from: &str, port: u16| {
        gets_to(&node, from, "pod", SocketAddr::new(own(&node, &pod)[0], ECHO), SocketAddr::new(host, port))
    };
    assert!(leads("client", 8080) && leads("host", 8080) && !leads("client", 8081));
    let changed = json!([{"hostPort": 8082, "containerPort": ECHO, "protocol": "udp"}]);
    node.add_with_ports(&pod, &changed).unwrap();
    assert!(leads("client", 8082) && !leads("client", 8080));
    node.delete(&pod).unwrap();
    assert_eq!(state(&node), before);
    node.check(&client).unwrap();

    for wrong in [
        json!([{"hostPort": 0, "containerPort": 80}]),
        json!([{"hostPort": 80, "containerPort": 65536}]),
        json!([{"hostPort": 80, "containerPort": 80, "protocol": "icmp"}]),
        json!([{"hostPort": 80, "containerPort": 80, "hostIP": "x"}]),
        json!([80]),
        json!(7),
    ] {
        names(&node.add_with_ports(&pod, &wrong).unwrap_err(), 7, &["runtimeConfig.portMappings"]);
    }
    assert_eq!((eth0(&node, &pod), kept(&node)), (None, 1));
}

/// From one port of its own, to one of the host's, all the time.
#[test]
fn who_goes_on_sending_to_a_port_of_the_host_reaches_whoever_has_it_now() {
    let mut node = Node::primary(BLOCKS);
    added(&node, "client");
    let ports = json!([{"hostPort": 8080, "containerPort": ECHO, "protocol": "UDP"}]);
    let client = node.inside("client", || udp([0; 4].into(), 0));
    let host = SocketAddr::new(HOST.parse().unwrap(), 8080);
    for (round, name) in ["first", "second", "third", "fourth"].into_iter().enumerate() {
        // The host's own, as long as no pod has it.
        let itself = listen(&node, "host", host);
        client.send_to(b"hello", host).unwrap();
        itself.recv(&mut [0; 10]).unwrap();
        let pod = plain(&node, name);
        node.add_with_ports(&pod, &ports).unwrap();
        let server = listen(&node, name, SocketAddr::new(own(&node, &pod)[0], ECHO));
        client.send_to(b"hello", host).unwrap();
        let (_, from) = server.recv_from(&mut [0; 10]).unwrap();
        server.send_to(b"hello", from).unwrap();
        assert_eq!(client.recv_from(&mut [0; 10]).unwrap().1, host);
        if round == 1 {
            // As by an agent that was killed right after it had noted that the pod leaves.
            node.stop();
            let file = node.on_host(Path::new(KEPT)).join(format!("{}.eth0.json", pod.container));
            let mut record: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
            record["leaving"] = json!(true);
            std::fs::write(&file, record.to_string()).unwrap();
            node.remove_netns(&pod.netns);
            node.start();
            node.wait_for("it to be taken off", || kept(&node) == 1);
        } else {
            node.delete(&pod).unwrap();
        }
    }
}

#[test]
fn a_check_names_what_is_missing_and_an_add_mends_it() {
    let node = Node::primary(BLOCKS);
    let pod = added(&node, "pod");
    let link = pod_link(&pod.container, "eth0");
    let address = own(&node, &pod)[0];
    let cases = [
        ("pod", "ip route del default".to_owned(), "no default route by 169.254.1.1"),
        ("pod", "ip link set eth0 down".to_owned(), "link eth0 is down"),
        ("host", format!("ip link del {link}"), "is not there"),
        ("host", format!("tc filter del dev {link} ingress"), "not held to its pod's addresses"),
    ];
    for (netns, tamper, named) in cases {
        node.check(&pod).unwrap();
        node.run_in(netns, &tamper);
        names(&node.check(&pod).unwrap_err(), 103, &[named]);
        node.add(&pod).unwrap();
    }
    node.check(&pod).unwrap();
    assert_eq!(own(&node, &pod)[0], address);
}

#[test]
fn a_collection_takes_off_what_is_not_listed() {
    let node = Node::primary(BLOCKS);
    let [stays, goes] = ["stays", "goes"].map(|name| added(&node, name));
    let made = eth0(&node, &stays);
    for _ in 0..2 {
        assert_eq!(node.collect_all_but(&[&stays]), Ok(Value::Null));
        assert_eq!((eth0(&node, &goes), kept(&node)), (None, 1));
    }
    assert_eq!(eth0(&node, &stays), made);
    node.check(&stays).unwrap();
}

#[test]
fn what_the_kernel_lost_is_there_again_after_a_start() {
    let mut node = Node::primary(BLOCKS);
    let (bare, lost) = (added(&node, "bare"), plain(&node, "lost"));
    let result = node.add_with_ports(&lost, &json!([{"hostPort": 8080, "containerPort": 80}])).unwrap();
    let before = state(&node);
    node.stop();
    let link = |pod: &Pod| pod_link(&pod.container, "eth0");
    node.run_in("host", &format!("tc filter del dev {} ingress", link(&bare)));
    for gone in [&link(&lost), "portolan0"] {
        node.run_in("host", &format!("ip link del {gone}"));
    }
    node.run_in("host", "nft delete table inet portolan_pods");
    node.start();
    node.wait_for("both pods to be as they were", || [&bare, &lost].iter().all(|pod| node.check(pod).is_ok()));
    let without_numbers = |state: &str| {
        state.lines().map(|line| line.split_once(": ").map_or(line, |(_, rest)| rest).to_owned()).collect::<Vec<_>>()
    };
    let mut states = [before, state(&node)].map(|state| without_numbers(&state));
    states.iter_mut().for_each(|state| state.sort_unstable());
    assert_eq!(states[0], states[1]);
    assert!(is_reached(&node, &lost, &["bare", "host"]));
    let ips = |result: &Value| result["ips"].clone();
    assert_eq!(ips(&node.add(&lost).unwrap()), ips(&result));
}

/// Whoever gives the pod network to another plugin: what runs goes on, what ends leaves nothing.
#[test]
fn pods_of_before_outlive_a_change_of_plugins() {
    let mut node = Node::primary(BLOCKS);
    let [one, two] = ["one", "two"].map(|name| added(&node, name));
    node.stop();
    node.set_primary(false);
    node.start();
    node.wait_for("the agent to be ready", || node.status().is_ok());
    assert!(is_reached(&node, &one, &["two", "host"]));
    node.wait_for("its configuration to go", || !node.on_host(Path::new(CONFLIST)).exists());
    let config = json!({"cniVersion": "1.1.0", "name": "portolan", "type": "portolan", "primary": true,
        "agentSocket": node.socket()});
    let environment = portolan_tests::node::variables("ADD", Some(&plain(&node, "three"))).into_iter().collect();
    let mut said = Vec::new();
    portolan_cni::run(&environment, &mut config.to_string().as_bytes(), &mut said);
    names(&serde_json::from_slice(&said).unwrap(), 7, &["primary"]);
    node.delete(&one).unwrap();
    node.remove_netns(&two.netns);
    node.wait_for("the pods to go", || kept(&node) == 0);
    node.stop();
    node.start();
    node.wait_for("the network to go", || !state(&node).contains("portolan"));
}

/// A pod can't lie about itself, nor be somebody else's way in.
#[test]
fn a_pod_sends_by_its_own_address_only() {
    let node = Node::primary(&BLOCKS[..1]);
    let (liar, other) = (added(&node, "liar"), added(&node, "other"));
    node.run_in("liar", "ip address add 10.244.1.77/32 dev eth0");
    let to = SocketAddr::new(own(&node, &other)[0], ECHO);
    let listener = listen(&node, "other", to);
    listener.set_read_timeout(Some(SHORT)).unwrap();
    node.inside("liar", || UdpSocket::bind(("10.244.1.77", 0))?.send_to(b"lie", to));
    assert_eq!(listener.recv(&mut [0; 10]).unwrap_err().kind(), ErrorKind::WouldBlock);
    listener.set_read_timeout(Some(PATIENCE)).unwrap();
    let own = own(&node, &liar)[0];
    node.inside("liar", || UdpSocket::bind((own, 0))?.send_to(b"truth", to));
    listener.recv(&mut [0; 10]).unwrap();
}
