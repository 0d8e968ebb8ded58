//! Two nodes as namespaces, joined by a veth pair; pods as namespaces on networks between them.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use ipnet::IpNet;
use portolan_net::{
    Allowed, BRIDGE_ADDRESS, Bandwidth, Dataplane, Forwarding, Mac, Multicast, Namespace, NetworkSpec, Peer, PortSpec,
    endpoint_mac, port_name, vxlan_overhead,
};

mod addresses;
mod bandwidth;
mod egress;
mod encrypted;
mod families;
mod leaks;
mod multicast;
mod outside;
mod paths;
mod ping;
mod policies;
mod primary;
mod spoofing;
mod switch;
mod underlay;
mod wire;

const PATIENCE: Duration = Duration::from_secs(3);
const ECHO: u16 = 7;

/// A root directory with namespaces in it, taken down again with everything that is mounted there.
struct Node {
    root: tempfile::TempDir,
    vtep: IpAddr,
    dataplane: Dataplane,
}

impl Node {
    fn new(vtep: impl Into<IpAddr>) -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("run/netns")).unwrap();
        let dataplane = Dataplane::new(root.path()).with_underlay("/run/netns/host").with_programs("/");
        let node = Self { root, vtep: vtep.into(), dataplane };
        node.netns("host");
        node
    }

    /// The MTU of pods on it in bytes, that of its interface being 1500.
    fn mtu(&self) -> u32 {
        1500 - vxlan_overhead(self.vtep)
    }

    /// The last byte of its address, by which tests tell nodes apart.
    fn number(&self) -> u8 {
        match self.vtep {
            IpAddr::V4(vtep) => vtep.octets()[3],
            IpAddr::V6(vtep) => vtep.octets()[15],
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.root.path().join("run/netns").join(name)
    }

    /// Makes a namespace and brings its loopback up; returns its path as the node sees it.
    fn netns(&self, name: &str) -> PathBuf {
        std::fs::write(self.file(name), "").unwrap();
        let make = format!("--net={}", self.file(name).display());
        let made = Command::new("unshare").args([&make, "ip", "link", "set", "lo", "up"]).status().unwrap();
        assert!(made.success(), "no namespace {name}");
        Path::new("/run/netns").join(name)
    }

    /// One of its namespaces, by its name.
    fn at(&self, netns: &str) -> Namespace {
        Namespace::open(self.root.path(), &Path::new("/run/netns").join(netns)).unwrap()
    }

    /// Runs a command in one of its namespaces; returns what it prints.
    fn enter(&self, netns: &str, command: &[&str]) -> String {
        let enter = format!("--net={}", self.file(netns).display());
        let output = Command::new("nsenter").arg(enter).args(command).output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Sets a kernel parameter in one of its namespaces.
    fn set(&self, netns: &str, parameter: &str, value: &str) {
        self.at(netns).run(|| std::fs::write(Path::new("/proc/sys/net").join(parameter), value)).unwrap();
    }

    /// What a kernel parameter is there.
    fn get(&self, netns: &str, parameter: &str) -> String {
        let read = || std::fs::read_to_string(Path::new("/proc/sys/net").join(parameter));
        self.at(netns).run(read).unwrap().trim().to_owned()
    }

    fn spec(&self, vni: u32, suppression: bool) -> NetworkSpec {
        let subnets = vec!["10.32.0.0/24".parse().unwrap(), "fd32::/64".parse().unwrap()];
        let multicast = Multicast::Flood;
        NetworkSpec {
            vni,
            mtu: self.mtu(),
            vtep: self.vtep,
            subnets,
            port: 7789,
            suppression,
            multicast,
            encrypted: false,
            gateway: false,
        }
    }

    /// What the port of a pod of that name is, in a namespace of its own.
    fn port(&self, vni: u32, pod: &str, address: Ipv4Addr, ipv6: Ipv6Addr) -> PortSpec {
        PortSpec {
            vni,
            port: port_name(pod, "eth1"),
            netns: if self.file(pod).exists() { Path::new("/run/netns").join(pod) } else { self.netns(pod) },
            interface: "eth1".into(),
            mac: endpoint_mac(&vni.to_string(), address.into()),
            addresses: vec![IpNet::new(address.into(), 24).unwrap(), IpNet::new(ipv6.into(), 64).unwrap()],
            mtu: self.mtu(),
            resolvers: vec![BRIDGE_ADDRESS],
            locked: true,
            allowed: Allowed::default(),
            bandwidth: Bandwidth::default(),
            gateways: Vec::new(),
        }
    }

    /// A pod of that name on a network; its addresses are 10.32.0.`last` and fd32::`last`.
    async fn plug(&self, vni: u32, pod: &str, last: u8) -> Pod<'_> {
        self.plug_allowed(vni, pod, last, Allowed::default()).await
    }

    /// The same, which may use further addresses.
    async fn plug_allowed(&self, vni: u32, pod: &str, last: u8, allowed: Allowed) -> Pod<'_> {
        let address = Ipv4Addr::new(10, 32, 0, last);
        let port = PortSpec { allowed, ..self.port(vni, pod, address, ipv6(last)) };
        self.dataplane.add_port(&port).await.unwrap();
        Pod { node: self, port, address, ipv6: ipv6(last) }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.root.path().join("run/netns")).unwrap().flatten() {
            let _ = Command::new("umount").arg("-l").arg(entry.path()).status();
        }
    }
}

struct Pod<'a> {
    node: &'a Node,
    port: PortSpec,
    address: Ipv4Addr,
    ipv6: Ipv6Addr,
}

impl Pod<'_> {
    fn endpoints(&self) -> impl Iterator<Item = (IpAddr, Mac)> {
        self.port.addresses.iter().map(|a| (a.addr(), self.port.mac))
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> T {
        self.try_inside(work).unwrap()
    }

    fn try_inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> portolan_net::Result<T> {
        Namespace::open(self.node.root.path(), &self.port.netns)?.run(work)
    }

    /// A socket that waits for datagrams on the echo port.
    fn listen(&self) -> UdpSocket {
        self.inside(|| udp((Ipv4Addr::UNSPECIFIED, ECHO)))
    }

    /// The same in IPv6.
    fn listen_ipv6(&self) -> UdpSocket {
        self.inside(|| udp((self.ipv6, ECHO)))
    }

    /// Sends a datagram, and says whether the listener got it from this pod.
    fn reaches(&self, to: impl Into<IpAddr>, listener: &UdpSocket) -> bool {
        let to = to.into();
        let from: IpAddr = if to.is_ipv4() { self.address.into() } else { self.ipv6.into() };
        let text = format!("from {from} to {to}");
        self.inside(|| {
            let socket = udp((from, 0))?;
            if to.is_ipv4() {
                socket.set_broadcast(true)?;
            }
            socket.send_to(text.as_bytes(), (to, ECHO))
        });
        let mut buffer = [0; 100];
        match listener.recv_from(&mut buffer) {
            Ok((length, sender)) => buffer[..length] == *text.as_bytes() && sender.ip() == from,
            Err(_) => false,
        }
    }
}

fn ipv6(last: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd32, 0, 0, 0, 0, 0, 0, last.into())
}

fn udp(at: impl Into<SocketAddr>) -> io::Result<UdpSocket> {
    let at = at.into();
    let socket = UdpSocket::bind(at)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Runs `ip` in a pod's namespace; returns what it prints.
fn ip(pod: &Pod<'_>, arguments: &[&str]) -> String {
    pod.node.enter(pod.port.netns.file_name().unwrap().to_str().unwrap(), &[&["ip"], arguments].concat())
}

/// Which addresses nodes have on the network between them; no node has any of the other family there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Underlay {
    Ipv4,
    Ipv6,
}

const UNDERLAYS: [Underlay; 2] = [Underlay::Ipv4, Underlay::Ipv6];

impl Underlay {
    /// A node's address, on one of the networks that a router may be between.
    fn vtep(self, network: u8, last: u8) -> IpAddr {
        match self {
            Self::Ipv4 => [192, 0, 2 + network, last].into(),
            Self::Ipv6 => [0xfd00, 0, 0, u16::from(network), 0, 0, 0, u16::from(last)].into(),
        }
    }

    /// Gives an interface of a namespace an address, which it may use at once.
    fn give(self, node: &Node, vtep: IpAddr, interface: &str) {
        let (address, rest): (_, &[&str]) = match self {
            Self::Ipv4 => (format!("{vtep}/24"), &[]),
            Self::Ipv6 => (format!("{vtep}/64"), &["nodad"]),
        };
        node.enter("host", &[&["ip", "address", "add", &address, "dev", interface], rest].concat());
    }
}

fn two_nodes() -> (Node, Node) {
    two_nodes_over(Underlay::Ipv4)
}

fn two_nodes_over(underlay: Underlay) -> (Node, Node) {
    let (a, b) = (Node::new(underlay.vtep(0, 1)), Node::new(underlay.vtep(0, 2)));
    let other = b.file("host").display().to_string();
    a.enter("host", &["ip", "link", "add", "u0", "type", "veth", "peer", "name", "u0", "netns", &other]);
    for node in [&a, &b] {
        underlay.give(node, node.vtep, "u0");
        node.enter("host", &["ip", "link", "set", "u0", "up"]);
    }
    (a, b)
}

async fn forward(
    node: &Node,
    vni: u32,
    local: &[&Pod<'_>],
    peer: &Node,
    remote: &[&Pod<'_>],
    suppression: bool,
) -> usize {
    let endpoints = |pods: &[&Pod<'_>]| pods.iter().flat_map(|p| p.endpoints()).collect::<Vec<_>>();
    let peers = vec![Peer { vtep: peer.vtep, endpoints: endpoints(remote) }];
    node.dataplane.forward(vni, &Forwarding { local: endpoints(local), peers, suppression }).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_reach_each_other_across_nodes() {
    for (underlay, suppression) in UNDERLAYS.into_iter().flat_map(|it| [(it, false), (it, true)]) {
        let (a, b) = two_nodes_over(underlay);
        for node in [&a, &b] {
            node.dataplane.ensure_network(&node.spec(77, suppression)).await.unwrap();
        }
        let (one, two) = (a.plug(77, "one", 5).await, b.plug(77, "two", 21).await);
        forward(&a, 77, &[&one], &b, &[&two], suppression).await;
        forward(&b, 77, &[&two], &a, &[&one], suppression).await;

        let what = format!("over {underlay:?}, suppression {suppression}");
        let (at_one, at_two) = (one.listen(), two.listen());
        assert!(one.reaches(two.address, &at_two), "unicast {what}");
        assert!(two.reaches(one.address, &at_one), "and back {what}");
        assert!(one.reaches(Ipv4Addr::new(10, 32, 0, 255), &at_two), "the subnet's broadcast {what}");

        let (ipv6_at_one, ipv6_at_two) = (one.listen_ipv6(), two.listen_ipv6());
        assert!(one.reaches(two.ipv6, &ipv6_at_two), "IPv6 unicast {what}");
        assert!(two.reaches(one.ipv6, &ipv6_at_one), "and back {what}");

        let server = two.inside(|| TcpListener::bind((two.address, 80)));
        one.inside(|| TcpStream::connect_timeout(&(two.address, 80).into(), PATIENCE));
        drop(server);

        assert_eq!(forward(&a, 77, &[&one], &b, &[&two], suppression).await, 0, "a second time changes nothing {what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_pod_is_reached_at_its_new_node() {
    for underlay in UNDERLAYS {
        let (a, b) = two_nodes_over(underlay);
        for node in [&a, &b] {
            node.dataplane.ensure_network(&node.spec(77, false)).await.unwrap();
        }
        let (resident, moving) = (a.plug(77, "resident", 5).await, b.plug(77, "moving", 21).await);
        forward(&a, 77, &[&resident], &b, &[&moving], false).await;
        forward(&b, 77, &[&moving], &a, &[&resident], false).await;
        let there = moving.listen();
        assert!(resident.reaches(moving.address, &there));

        // To the resident's own node, and away again.
        b.dataplane.remove_port(77, &moving.port.port, &moving.port.addresses).await.unwrap();
        let here = a.plug(77, "moved", 21).await;
        forward(&a, 77, &[&resident, &here], &b, &[], false).await;
        let listener = here.listen();
        assert!(resident.reaches(here.address, &listener), "same node");
        a.dataplane.remove_port(77, &here.port.port, &here.port.addresses).await.unwrap();
        let back = b.plug(77, "back", 21).await;
        forward(&b, 77, &[&back], &a, &[&resident], false).await;
        forward(&a, 77, &[&resident], &b, &[&back], false).await;
        let listener = back.listen();
        assert!(resident.reaches(back.address, &listener), "other node again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_with_the_same_subnet_do_not_mix() {
    let node = Node::new(Ipv4Addr::LOCALHOST);
    for vni in [77, 78] {
        node.dataplane.ensure_network(&node.spec(vni, false)).await.unwrap();
    }
    let (asking, right) = (node.plug(77, "asking", 5).await, node.plug(77, "right", 6).await);
    let wrong = node.plug(78, "wrong", 6).await;
    let (at_right, at_wrong) = (right.listen(), wrong.listen());
    at_wrong.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(asking.reaches(right.address, &at_right));
    assert!(!asking.reaches(Ipv4Addr::new(10, 32, 0, 255), &at_wrong), "a broadcast stays in its network");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_resolver_of_the_own_node_answers() {
    let (a, b) = two_nodes();
    for node in [&a, &b] {
        node.dataplane.ensure_network(&node.spec(77, false)).await.unwrap();
    }
    let pod = a.plug(77, "pod", 5).await;
    forward(&a, 77, &[&pod], &b, &[], false).await;
    forward(&b, 77, &[], &a, &[&pod], false).await;
    let resolver = |node: &Node| node.dataplane.run_in(77, || udp((BRIDGE_ADDRESS, 53))).unwrap();
    let (own, others) = (resolver(&a), resolver(&b));
    others.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let client = pod.inside(|| udp((Ipv4Addr::UNSPECIFIED, 0)));
    client.send_to(b"question", (BRIDGE_ADDRESS, 53)).unwrap();
    let mut buffer = [0; 20];
    let (_, from) = own.recv_from(&mut buffer).unwrap();
    assert_eq!(from.ip(), pod.address);
    own.send_to(b"answer", from).unwrap();
    let (length, from) = client.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from.ip()), (&b"answer"[..], BRIDGE_ADDRESS.into()));
    assert!(others.recv_from(&mut buffer).is_err(), "the other node's resolver must hear nothing");
}

/// What a pod is told by others is the DNS server's address can be ours, too, for it alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_can_reach_the_resolver_at_another_address() {
    let cluster_dns = Ipv4Addr::new(10, 96, 0, 10);
    let (a, _b) = two_nodes();
    a.dataplane.ensure_network(&a.spec(77, false)).await.unwrap();
    let (pod, other) = (a.plug(77, "pod", 5).await, a.plug(77, "other", 6).await);
    let port = PortSpec { resolvers: vec![BRIDGE_ADDRESS, cluster_dns], ..pod.port.clone() };
    for _ in 0..2 {
        a.dataplane.add_port(&port).await.unwrap();
    }
    let server = a.dataplane.run_in(77, || udp((cluster_dns, 53))).unwrap();
    let client = pod.inside(|| udp((Ipv4Addr::UNSPECIFIED, 0)));
    client.send_to(b"question", (cluster_dns, 53)).unwrap();
    let mut buffer = [0; 20];
    let (_, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(from.ip(), pod.address, "the server knows pods by their addresses");
    server.send_to(b"answer", from).unwrap();
    let (length, from) = client.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from.ip()), (&b"answer"[..], cluster_dns.into()));
    let sent = other.inside(|| udp((Ipv4Addr::UNSPECIFIED, 0))).send_to(b"question", (cluster_dns, 53));
    assert!(sent.is_err(), "who wasn't asked for it has no way there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_namespace_is_found_by_its_address() {
    let (a, _b) = two_nodes();
    a.dataplane.ensure_network(&a.spec(77, false)).await.unwrap();
    let pod = a.plug(77, "pod", 5).await;
    let found = async |address| a.dataplane.namespace_with(address).await.unwrap();
    assert_eq!(found(pod.address.into()).await.as_deref(), Some(pod.port.netns.as_path()));
    assert_eq!(found(pod.ipv6.into()).await.as_deref(), Some(pod.port.netns.as_path()));
    assert_eq!(found([10, 32, 0, 6].into()).await, None);
    assert_eq!(found(BRIDGE_ADDRESS.into()).await, None, "a network's own namespace is no pod's");
    let twin = a.plug(77, "twin", 7).await;
    ip(&twin, &["address", "add", "10.32.0.5/32", "dev", "eth1"]);
    assert_eq!(found(pod.address.into()).await, None, "one of the two is on its way out");
    assert_eq!(found(twin.address.into()).await.as_deref(), Some(twin.port.netns.as_path()));
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_can_be_done_twice_and_nothing_is_left() {
    let (a, _b) = two_nodes();
    let vxlans = || a.enter("host", &["ip", "-o", "link", "show"]).lines().filter(|l| l.contains("vx")).count();
    for _ in 0..2 {
        a.dataplane.ensure_network(&a.spec(77, false)).await.unwrap();
    }
    let pod = a.plug(77, "pod", 5).await;
    // As after a crash in the middle: the address is missing and the port is down.
    ip(&pod, &["address", "flush", "dev", "eth1"]);
    assert!(a.dataplane.check_port(&pod.port).await.is_err());
    ip(&pod, &["link", "set", "eth1", "down"]);
    let pod = a.plug(77, "pod", pod.address.octets()[3]).await;
    a.dataplane.check_port(&pod.port).await.unwrap();
    assert_eq!(a.dataplane.ports(77).await.unwrap(), std::slice::from_ref(&pod.port.port));
    let second = a.plug(77, "second", 6).await;
    let listener = second.listen();
    assert!(pod.reaches(second.address, &listener));

    for _ in 0..2 {
        a.dataplane.remove_port(77, &pod.port.port, &pod.port.addresses).await.unwrap();
    }
    assert_eq!(a.dataplane.ports(77).await.unwrap(), std::slice::from_ref(&second.port.port));
    assert!(a.dataplane.check_port(&pod.port).await.is_err());
    assert!(pod.try_inside(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap().find("eth1").is_none());

    assert_eq!(a.dataplane.networks().unwrap(), [77]);
    for _ in 0..2 {
        a.dataplane.remove_network(77).await.unwrap();
    }
    assert_eq!(a.dataplane.networks().unwrap(), Vec::<u32>::new());
    assert!(!a.file("portolan-77").exists());
    assert_eq!(vxlans(), 0);
    assert!(second.try_inside(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap().find("eth1").is_none());
    // The VNI is free again.
    a.dataplane.ensure_network(&a.spec(77, false)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_port_leaves_nothing() {
    let node = Node::new(Ipv4Addr::LOCALHOST);
    node.dataplane.ensure_network(&node.spec(77, false)).await.unwrap();
    let pod = node.plug(77, "pod", 5).await;
    let mut other = pod.port.clone();
    other.port = port_name("another", "eth1");
    other.mac = Mac([2, 0, 0, 0, 0, 9]);
    let error = node.dataplane.add_port(&other).await.unwrap_err().to_string();
    assert_eq!(error, "interface eth1 is already there in /run/netns/pod");
    let mut nowhere = pod.port.clone();
    nowhere.port = port_name("nowhere", "eth1");
    nowhere.netns = "/run/netns/nowhere".into();
    assert!(node.dataplane.add_port(&nowhere).await.is_err());
    let mut refused = pod.port.clone();
    refused.port = port_name("refused", "eth1");
    refused.netns = node.netns("refused");
    let multicast = "ff02::5/64".parse().unwrap();
    refused.addresses.push(multicast);
    let error = node.dataplane.add_port(&refused).await.unwrap_err().to_string();
    assert!(error.starts_with("add address ff02::5/64"), "nobody's address (RFC 4291, section 2.7): {error}");
    // What is there, and may be in use, stays.
    let mut changed = pod.port.clone();
    changed.addresses.push(multicast);
    assert!(node.dataplane.add_port(&changed).await.is_err());
    let mut small = pod.port.clone();
    small.mtu = 1000;
    let error = node.dataplane.add_port(&small).await.unwrap_err().to_string();
    assert_eq!(error, "MTU 1000 of interface eth1 is too small for its address fd32::5/64; allowed: 1280 or more");
    assert_eq!(node.dataplane.ports(77).await.unwrap(), std::slice::from_ref(&pod.port.port));
    let missing = node.dataplane.check_port(&changed).await.unwrap_err().to_string();
    assert!(missing.contains("does not have the address ff02::5/64"), "and nothing else is: {missing}");
    node.dataplane.add_port(&pod.port).await.unwrap();
    node.dataplane.check_port(&pod.port).await.unwrap();
}
