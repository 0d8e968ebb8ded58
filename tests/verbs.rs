//! CNI's verbs through a whole agent, as a pod and a person on its node see what they do.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    path::Path,
    time::Duration,
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RecordType},
};
use portolan_crds::NetworkNodeSlice;
use portolan_net::port_name;
use portolan_tests::node::{Node, Pod};
use serde_json::{Value, json};

mod alone;
mod asked_at_once;
mod egress;
mod encrypted;
mod many;
mod policies;
mod primary;
mod scale;
mod silent;
mod underlay;

const IPV4: &[&str] = &["10.32.0.0/16"];
const DUAL: &[&str] = &["10.32.0.0/16", "fd32::/64"];
const PATIENCE: Duration = Duration::from_secs(3);
const ECHO: u16 = 7;

/// The annotation of a pod on the network `backend`.
fn on_backend() -> Value {
    json!({"portolan.dev/networks": "backend"})
}

/// The same as a network selection element, with more wishes.
fn on_backend_with(mut wishes: Value) -> Value {
    wishes["name"] = json!("backend");
    json!({"portolan.dev/networks": json!([wishes]).to_string()})
}

/// The name of a pod's network namespace.
fn netns(pod: &Pod) -> &str {
    pod.netns.file_name().unwrap().to_str().unwrap()
}

fn port(pod: &Pod) -> String {
    port_name(&pod.container, "eth1")
}

/// A pod's interface, as the kernel has it.
#[derive(Debug, PartialEq)]
struct Interface {
    index: u64,
    mac: String,
    mtu: u64,
    /// IPv4 first, without those that the kernel makes from the MAC.
    addresses: Vec<IpAddr>,
}

/// None if it isn't there.
fn interface(node: &Node, pod: &Pod) -> Option<Interface> {
    interface_called("eth1", node, pod)
}

fn interface_called(name: &str, node: &Node, pod: &Pod) -> Option<Interface> {
    let all: Vec<Value> = serde_json::from_str(&node.run_in(netns(pod), "ip -j address show")).unwrap();
    let link = all.into_iter().find(|link| link["ifname"] == name)?;
    let global = link["addr_info"].as_array().unwrap().iter().filter(|it| it["scope"] == "global");
    Some(Interface {
        index: link["ifindex"].as_u64().unwrap(),
        mac: link["address"].as_str().unwrap().to_owned(),
        mtu: link["mtu"].as_u64().unwrap(),
        addresses: global.map(|it| it["local"].as_str().unwrap().parse().unwrap()).collect(),
    })
}

fn addresses(node: &Node, pod: &Pod) -> Vec<IpAddr> {
    interface(node, pod).unwrap().addresses
}

/// What the network's namespace has: links, forwarding entries, neighbours, rates, rules.
fn state_of_network(node: &Node) -> String {
    let questions =
        ["ip -o link show", "bridge fdb show", "ip neighbour show", "tc qdisc show", "nft --stateless list ruleset"];
    let answer = |question: &str| {
        let mut lines: Vec<_> = node.run_in("portolan-77", question).lines().map(str::to_owned).collect();
        lines.sort();
        lines.join("\n")
    };
    questions.map(answer).join("\n")
}

/// The names of a directory's files; none if it isn't there.
fn files(node: &Node, directory: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(node.on_host(Path::new(directory))).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// What the agent keeps on disk of a node's pods.
fn journal(node: &Node) -> BTreeSet<String> {
    files(node, "/var/lib/portolan/network/endpoints")
}

/// What the other nodes are told: each pod's address and MAC.
fn told(node: &Node) -> BTreeSet<(String, String)> {
    let slices = node.api.all::<NetworkNodeSlice>();
    slices.into_iter().flat_map(|slice| slice.spec.endpoints).map(|e| (e.address, e.mac)).collect()
}

fn udp(address: IpAddr, port: u16) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((address, port))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn reaches(node: &Node, from: &Pod, to: &Pod) -> bool {
    addresses(node, from).into_iter().zip(addresses(node, to)).all(|(own, other)| {
        let listener = node.inside(netns(to), || udp(other, ECHO));
        node.inside(netns(from), || udp(own, 0)?.send_to(b"hello", (other, ECHO)));
        listener.recv_from(&mut [0; 10]).is_ok_and(|(_, sender)| sender.ip() == own)
    })
}

/// What a pod is answered that asks a DNS server for a name's IPv4 addresses; none if it hears nothing for a second.
fn answers(node: &Node, pod: &Pod, server: Ipv4Addr, name: &str) -> Option<Vec<IpAddr>> {
    let mut question = Message::new(4711, MessageType::Query, OpCode::Query);
    question.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    let mut buffer = [0; 4096];
    let socket = node.inside(netns(pod), || UdpSocket::bind("0.0.0.0:0"));
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    socket.send_to(&question.to_vec().unwrap(), (server, 53)).ok()?;
    let length = socket.recv(&mut buffer).ok()?;
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    Some(answer.answers.iter().map(|record| record.data.to_string().parse().unwrap()).collect())
}

fn names(error: &Value, code: u32, texts: &[&str]) {
    assert_eq!(error["code"], code, "{error}");
    for text in texts {
        assert!(error["msg"].as_str().unwrap().contains(text), "{error} should say {text:?}");
    }
}

#[test]
fn what_is_added_is_there_and_what_is_deleted_is_not() {
    let node = Node::with_network(DUAL);
    let resident = node.pod("resident", on_backend(), json!({}));
    node.add(&resident).unwrap();
    node.wait_for("the resident to be told of", || told(&node).len() == 1);
    let before = state_of_network(&node);

    let pod = node.pod("pod", on_backend(), json!({}));
    assert_eq!(node.add(&pod).unwrap(), json!({"cniVersion": "1.1.0"}), "the result of the plugin before it");
    let made = interface(&node, &pod).unwrap();
    let given = &made.addresses;
    let subnets: Vec<ipnet::IpNet> = DUAL.iter().map(|subnet| subnet.parse().unwrap()).collect();
    assert!(given.len() == 2 && subnets.iter().zip(given).all(|(subnet, address)| subnet.contains(address)));
    assert!(reaches(&node, &pod, &resident) && reaches(&node, &resident, &pod));
    node.check(&pod).unwrap();
    let entry = (given[0].to_string(), made.mac.clone());
    node.wait_for("the pod to be told of", || told(&node).contains(&entry));

    node.add(&pod).unwrap();
    assert_eq!(interface(&node, &pod).unwrap(), made, "the same interface with the same addresses");
    assert!(reaches(&node, &pod, &resident));

    for _ in 0..2 {
        assert_eq!(node.delete(&pod), Ok(Value::Null));
        assert_eq!(interface(&node, &pod), None);
        assert_eq!(journal(&node).len(), 1);
    }
    node.wait_for("the pod not to be told of", || !told(&node).contains(&entry));
    node.wait_for("nothing of the pod to be left", || state_of_network(&node) == before);
    node.check(&resident).unwrap();
}

#[test]
fn a_pod_whose_namespace_is_gone_is_deleted() {
    let node = Node::with_network(DUAL);
    let resident = node.pod("resident", on_backend(), json!({}));
    node.add(&resident).unwrap();
    node.wait_for("the resident to be told of", || told(&node).len() == 1);
    let before = state_of_network(&node);
    let pod = node.pod("pod", on_backend(), json!({}));
    node.add(&pod).unwrap();
    node.remove_netns(&pod.netns);
    for _ in 0..2 {
        assert_eq!(node.delete(&pod), Ok(Value::Null));
        assert_eq!(journal(&node).len(), 1, "now, and not when it is collected");
    }
    node.wait_for("nothing of the pod to be left", || state_of_network(&node) == before);
    names(&node.add(&pod).unwrap_err(), 102, &["/run/netns/pod"]);
    assert_eq!(journal(&node).len(), 1, "nothing of what was refused");
}

#[test]
fn a_check_names_what_is_missing_and_an_add_mends_it() {
    let node = Node::with_network(IPV4);
    let pod = node.pod("pod", on_backend(), json!({}));
    node.add(&pod).unwrap();
    let (port, address) = (port(&pod), addresses(&node, &pod)[0].to_string());
    let in_pod = |words: &str| node.run_in("pod", words);
    let in_network = |words: &str| node.run_in("portolan-77", words);
    let (guard, lock) = (format!("tc filter del dev {port} ingress"), format!("bridge link set dev {port} locked off"));
    let option = |option: &str| format!("bridge link set dev {port} {option}");
    let (learning, leaving) = (option("learning on"), option("fastleave off"));
    let (out, down) = (format!("ip link set {port} nomaster"), format!("ip link set {port} down"));
    let cases: [(&dyn Fn(), &[&str]); 9] = [
        (&|| drop(in_pod("ip address flush dev eth1")), &[&address, "eth1", "/run/netns/pod"]),
        (&|| drop(in_pod("ip link set eth1 down")), &["link eth1 is down", "/run/netns/pod"]),
        (&|| drop(in_pod("ip link del eth1")), &[&port, "is not there"]),
        (&|| drop(in_network(&guard)), &[&port, "not held to its pod's addresses"]),
        (&|| drop(in_network(&lock)), &[&port, "not locked to its MAC"]),
        (&|| drop(in_network(&learning)), &[&port, "does not have learning off"]),
        (&|| drop(in_network(&leaving)), &[&port, "does not have mcast_fast_leave on"]),
        (&|| drop(in_network(&out)), &[&port, "is not there"]),
        (&|| drop(in_network(&down)), &[&port, "is down"]),
    ];
    for (tamper, named) in cases {
        node.check(&pod).unwrap();
        tamper();
        names(&node.check(&pod).unwrap_err(), 103, named);
        node.add(&pod).unwrap();
    }
    node.check(&pod).unwrap();
    assert_eq!(addresses(&node, &pod)[0].to_string(), address);
}

#[test]
fn a_collection_unplugs_what_is_not_listed() {
    let node = Node::with_network(IPV4);
    let [stays, goes] = ["stays", "goes"].map(|name| node.pod(name, on_backend(), json!({})));
    for pod in [&stays, &goes] {
        node.add(pod).unwrap();
    }
    let made = interface(&node, &stays);
    for _ in 0..2 {
        assert_eq!(node.collect_all_but(&[&stays]), Ok(Value::Null));
        assert_eq!(interface(&node, &goes), None);
    }
    assert_eq!(interface(&node, &stays), made);
    node.check(&stays).unwrap();
}
