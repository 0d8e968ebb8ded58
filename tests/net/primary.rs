//! The pod network of a cluster whose only plugin this is: pods on two nodes, the nodes themselves, and a server that is outside.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use portolan_net::{HostPort, Namespace, OtherNode, PodNetwork, PodSpec, Protocol, pod_link, pod_mac};
use portolan_tests::node::state_of_host;

use super::{Node, PATIENCE, UNDERLAYS, Underlay, two_nodes, two_nodes_over, udp, wire::Wire};

const WEB: u16 = 80;
const TUNNEL: u16 = 7789;
const SHORT: Duration = Duration::from_millis(300);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// A node's block of each family; nodes are known by the last byte of their addresses.
fn blocks(node: &Node) -> Vec<IpNet> {
    let k = node.number();
    vec![format!("10.244.{k}.0/24").parse().unwrap(), format!("fd44:0:0:{k}::/64").parse().unwrap()]
}

fn network(node: &Node, others: &[&Node]) -> PodNetwork {
    let others = others.iter().map(|other| OtherNode { vtep: other.vtep, blocks: blocks(other) });
    PodNetwork { vtep: node.vtep, port: TUNNEL, mtu: node.mtu(), blocks: blocks(node), others: others.collect() }
}

async fn join(node: &Node, others: &[&Node], ports: &[HostPort]) {
    let network = network(node, others);
    node.dataplane.ensure_pod_network(&network).await.unwrap();
    node.dataplane.set_pod_rules(&network, ports, &[]).await.unwrap();
}

async fn two_joined() -> (Node, Node) {
    two_joined_over(Underlay::Ipv4).await
}

async fn two_joined_over(underlay: Underlay) -> (Node, Node) {
    let (a, b) = two_nodes_over(underlay);
    join(&a, &[&b], &[]).await;
    join(&b, &[&a], &[]).await;
    (a, b)
}

struct Pod<'a> {
    node: &'a Node,
    spec: PodSpec,
    name: String,
}

impl Pod<'_> {
    fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> T {
        at(self.node, &self.name).run(work).unwrap()
    }

    /// A socket at its IPv4 address.
    fn udp(&self, port: u16) -> UdpSocket {
        bind(self.node, &self.name, || udp((self.address(0), port)))
    }

    fn address(&self, family: usize) -> IpAddr {
        self.spec.addresses[family]
    }
}

fn at(node: &Node, netns: &str) -> Namespace {
    Namespace::open(node.root.path(), &Path::new("/run/netns").join(netns)).unwrap()
}

fn spec(node: &Node, netns: PathBuf, name: &str, last: u8) -> PodSpec {
    let k = node.number();
    let addresses: Vec<IpAddr> =
        [format!("10.244.{k}.{last}"), format!("fd44:0:0:{k}::{last}")].map(|it| it.parse().unwrap()).into();
    let near = blocks(node).into_iter().chain([IpNet::from(node.vtep)]).collect();
    let mac = pod_mac(addresses[0]);
    let interface = "eth0".to_owned();
    PodSpec { link: pod_link(name, "eth0"), netns, interface, mac, addresses, mtu: node.mtu(), host: node.vtep, near }
}

async fn plug<'a>(node: &'a Node, name: &str, last: u8) -> Pod<'a> {
    let spec = spec(node, node.netns(name), name, last);
    node.dataplane.add_pod(&spec).await.unwrap();
    Pod { node, spec, name: name.to_owned() }
}

fn enter(node: &Node, netns: &str, command: &str) -> String {
    let net = format!("--net={}", node.file(netns).display());
    let output = Command::new("nsenter").arg(net).args(command.split(' ')).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A server that knows the node's address only.
fn outside(node: &Node) {
    node.netns("outside");
    let other = node.file("outside").display().to_string();
    enter(node, "host", &format!("ip link add o0 type veth peer name o0 netns {other}"));
    for (netns, last) in [("outside", 1), ("host", 2)] {
        enter(node, netns, &format!("ip address add 198.51.100.{last}/24 dev o0"));
        enter(node, netns, "ip link set o0 up");
    }
}

/// What another test's process that is just starting holds open for a moment is free again soon.
fn bind<T: Send>(node: &Node, netns: &str, try_it: impl Fn() -> io::Result<T> + Send + Sync) -> T {
    let begun = Instant::now();
    loop {
        match at(node, netns).run(&try_it) {
            Ok(socket) => return socket,
            Err(error) if begun.elapsed() > PATIENCE => panic!("{netns}: {error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// As whom a server at an address sees a client in a namespace that connects there; none if it doesn't get there.
fn seen(
    server: (&Node, &str),
    address: SocketAddr,
    client: (&Node, &str),
    to: SocketAddr,
    patience: Duration,
) -> Option<IpAddr> {
    let listener = bind(server.0, server.1, || TcpListener::bind(address));
    let stream = at(client.0, client.1).run(|| Ok(TcpStream::connect_timeout(&to, patience).ok())).unwrap()?;
    let (mut served, from) = listener.accept().unwrap();
    served.write_all(b"hello").unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    { &stream }.read_exact(&mut [0; 5]).unwrap();
    Some(from.ip())
}

/// As whom a pod's server sees a client.
fn seen_by(pod: &Pod<'_>, family: usize, client: (&Node, &str)) -> Option<IpAddr> {
    let address = SocketAddr::new(pod.address(family), WEB);
    seen((pod.node, &pod.name), address, client, address, PATIENCE)
}

/// All that the kernel has of the pod network.
fn state(node: &Node) -> String {
    state_of_host(|question| enter(node, "host", question))
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_reach_each_other_by_their_own_addresses() {
    for underlay in UNDERLAYS {
        let (a, b) = two_joined_over(underlay).await;
        let (one, two, far) = (plug(&a, "one", 5).await, plug(&a, "two", 6).await, plug(&b, "far", 7).await);
        for (client, server) in [(&one, &two), (&one, &far), (&far, &one), (&one, &one)] {
            for family in [0, 1] {
                let as_whom = seen_by(server, family, (client.node, &client.name));
                assert_eq!(as_whom, Some(client.address(family)), "{} to {}", client.name, server.name);
            }
        }
        for pod in [&one, &two, &far] {
            pod.node.dataplane.check_pod(&pod.spec).await.unwrap();
        }
        // Large packets pass, too.
        let (near, there) = (one.udp(0), far.udp(7));
        near.send_to(&[7; 1400], (far.address(0), 7)).unwrap();
        assert_eq!(there.recv(&mut [0; 2000]).unwrap(), 1400);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_reach_pods_and_pods_reach_nodes() {
    for underlay in UNDERLAYS {
        let (a, b) = two_joined_over(underlay).await;
        let pod = plug(&a, "pod", 5).await;
        // By its address where it has one of that family, else as it is known on the tunnel.
        let itself = |node: &Node, family: usize| Some(blocks(node)[family].addr());
        let as_whom = match underlay {
            Underlay::Ipv4 => [Some(a.vtep), seen_by(&pod, 1, (&a, "host"))],
            Underlay::Ipv6 => [itself(&a, 0), Some(a.vtep)],
        };
        for family in [0, 1] {
            let seen = seen_by(&pod, family, (&a, "host"));
            assert!(seen.is_some() && seen == as_whom[family], "its own node {seen:?} over {underlay:?}");
            assert_eq!(seen_by(&pod, family, (&b, "host")), itself(&b, family), "another one over {underlay:?}");
        }
        for node in [&a, &b] {
            let address = SocketAddr::from((node.vtep, WEB));
            assert!(seen((node, "host"), address, (&a, "pod"), address, PATIENCE).is_some());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_seen_outside_as_their_node() {
    let (a, _b) = two_joined().await;
    outside(&a);
    let pod = plug(&a, "pod", 5).await;
    let server = SocketAddr::from((SERVER, WEB));
    let as_whom = || seen((&a, "outside"), server, (&a, "pod"), server, PATIENCE);
    assert_eq!(as_whom(), Some([198, 51, 100, 2].into()));

    // An agent that starts anew changes nothing, and a connection that is open doesn't notice.
    let listener = bind(&a, "outside", || TcpListener::bind(server));
    let client = pod.inside(|| TcpStream::connect_timeout(&server, PATIENCE));
    let (mut served, _) = listener.accept().unwrap();
    drop(listener);
    let before = state(&a);
    join(&a, &[&_b], &[]).await;
    a.dataplane.add_pod(&pod.spec).await.unwrap();
    assert_eq!(state(&a), before);
    served.write_all(b"hello").unwrap();
    { &client }.read_exact(&mut [0; 5]).unwrap();
    assert_eq!(as_whom(), Some([198, 51, 100, 2].into()));
}

/// It would go by the default route otherwise, and come back.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_for_a_pod_that_is_not_there_goes_nowhere() {
    let (a, _b) = two_joined().await;
    outside(&a);
    enter(&a, "host", &format!("ip route add default via {SERVER}"));
    plug(&a, "pod", 5).await;
    let gone = SocketAddr::from(([10, 244, 1, 77], WEB));
    let refused = at(&a, "pod").run(|| Ok(TcpStream::connect_timeout(&gone, PATIENCE))).unwrap();
    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::HostUnreachable);
}

#[tokio::test(flavor = "multi_thread")]
async fn host_ports_lead_to_their_pods() {
    let (a, b) = two_nodes();
    outside(&a);
    let pod = plug(&a, "pod", 5).await;
    let neighbour = plug(&a, "neighbour", 6).await;
    let port = |at: Option<&str>, protocol, port| HostPort {
        at: at.map(|at| at.parse().unwrap()),
        protocol,
        port,
        pod: pod.spec.addresses.clone(),
        pod_port: WEB,
    };
    let ports = [
        port(None, Protocol::Tcp, 8080),
        port(Some("127.0.0.1"), Protocol::Tcp, 8081),
        port(None, Protocol::Udp, 8082),
    ];
    join(&a, &[&b], &ports).await;
    join(&b, &[&a], &[]).await;
    let far = plug(&b, "far", 7).await;
    let server = SocketAddr::from(([0, 0, 0, 0], WEB));
    let reach = |client: (&Node, &str), to: (IpAddr, u16)| seen((&a, "pod"), server, client, to.into(), SHORT);
    let (node, loopback): (IpAddr, IpAddr) = (a.vtep, Ipv4Addr::LOCALHOST.into());
    let outsider = reach((&a, "outside"), ([198, 51, 100, 2].into(), 8080));
    assert_eq!(outsider, Some(SERVER.into()), "who comes from outside is seen as himself");
    assert_eq!(reach((&a, "neighbour"), (node, 8080)), Some(neighbour.address(0)));
    for client in [(&a, "pod"), (&a, "host"), (&b, "host"), (&b, &*far.name)] {
        assert!(reach(client, (node, 8080)).is_some(), "{}", client.1);
    }
    assert!(reach((&a, "host"), (loopback, 8080)).is_some() && reach((&a, "host"), (loopback, 8081)).is_some());
    assert_eq!(reach((&b, "host"), (node, 8081)), None, "only at the address that was asked for");
    assert_eq!(reach((&b, "host"), (node, 8083)), None);

    let listener = pod.udp(WEB);
    let client = bind(&b, "host", || udp((b.vtep, 0)));
    client.send_to(b"hello", (node, 8082)).unwrap();
    let (_, from) = listener.recv_from(&mut [0; 10]).unwrap();
    listener.send_to(b"hello", from).unwrap();
    assert_eq!(client.recv_from(&mut [0; 10]).unwrap().1, SocketAddr::new(node, 8082));

    join(&a, &[&b], &[]).await;
    assert_eq!(reach((&b, "host"), (node, 8080)), None, "no more");
}

/// The kernel sends on what belongs to a flow as it sent the flow's first packet.
#[tokio::test(flavor = "multi_thread")]
async fn who_goes_on_sending_to_a_host_port_is_led_to_whoever_has_it() {
    let (a, b) = two_joined().await;
    outside(&a);
    let (one, two) = (plug(&a, "one", 5).await, plug(&a, "two", 6).await);
    let port = |pod: &Pod<'_>| {
        let pod = pod.spec.addresses.clone();
        vec![HostPort { at: None, protocol: Protocol::Udp, port: 8082, pod, pod_port: WEB }]
    };
    let servers = [one.udp(WEB), two.udp(WEB)];
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 8082));
    let clients = [
        (bind(&b, "host", || udp((b.vtep, 0))), SocketAddr::from((a.vtep, 8082))),
        (bind(&a, "host", || udp((Ipv4Addr::LOCALHOST, 0))), loopback),
    ];
    // Another flow to a port of the same number, which is seen to be the same by the port that it has outside.
    let (far, near) = (bind(&a, "outside", || udp((SERVER, 8082))), two.udp(7));
    let seen_outside = || {
        near.send_to(b"hello", (SERVER, 8082)).unwrap();
        far.recv_from(&mut [0; 10]).unwrap().1
    };
    let as_whom = seen_outside();
    let mut before = Vec::new();
    for leads_to in [Some(&one), None, Some(&two), Some(&one), None, None, Some(&one)] {
        let ports = leads_to.map(port).unwrap_or_default();
        a.dataplane.set_pod_rules(&network(&a, &[&b]), &ports, &before).await.unwrap();
        for (client, to) in &clients {
            client.send_to(b"hello", to).unwrap();
            for (pod, server) in [&one, &two].into_iter().zip(&servers) {
                let has_it = leads_to.is_some_and(|it| it.name == pod.name);
                server.set_read_timeout(Some(if has_it { PATIENCE } else { SHORT })).unwrap();
                let heard = server.recv_from(&mut [0; 10]);
                assert_eq!(heard.is_ok(), has_it, "{} by {to} with {:?}", pod.name, leads_to.map(|it| &it.name));
                if let Ok((_, from)) = heard {
                    server.send_to(b"hello", from).unwrap();
                    assert_eq!(client.recv_from(&mut [0; 10]).unwrap().1, *to);
                }
            }
        }
        before = ports;
    }
    assert_eq!(seen_outside(), as_whom);
}

/// Whether a datagram with such a source gets from a pod to another one.
fn gets_through(from: &Pod<'_>, to: &Pod<'_>, source: Ipv4Addr) -> bool {
    let listener = to.udp(7);
    listener.set_read_timeout(Some(SHORT)).unwrap();
    let IpAddr::V4(address) = to.address(0) else { panic!() };
    send_raw(from, source, address, 7);
    listener.recv(&mut [0; 10]).is_ok()
}

/// A UDP datagram of the pod's own making, to the host's end of its link.
fn send_raw(from: &Pod<'_>, source: Ipv4Addr, to: Ipv4Addr, port: u16) {
    let gateway = [0x02, 0x50, 0xa9, 0xfe, 0x01, 0x01];
    let mut ip = vec![0x45, 0, 0, 33, 0, 0, 0, 0, 64, 17, 0, 0];
    ip.extend(source.octets());
    ip.extend(to.octets());
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    // Without a checksum (RFC 768).
    let udp = [&7u16.to_be_bytes()[..], &port.to_be_bytes(), &13u16.to_be_bytes(), &[0, 0], b"hello"].concat();
    let frame = [&gateway[..], &from.spec.mac.0, &[8, 0], &ip, &udp].concat();
    from.inside(|| Wire::at("eth0")).send(&frame);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_sends_by_its_own_address_only() {
    let (a, b) = two_joined().await;
    let (liar, other, far) = (plug(&a, "liar", 5).await, plug(&a, "other", 6).await, plug(&b, "far", 7).await);
    for to in [&other, &far] {
        assert!(gets_through(&liar, to, [10, 244, 1, 5].into()));
        for source in [[10, 244, 1, 6], [10, 244, 1, 9], [192, 0, 2, 1], [10, 244, 2, 9]] {
            assert!(!gets_through(&liar, to, source.into()), "{source:?} to {}", to.name);
        }
    }
    let link = &liar.spec.link;
    enter(&a, "host", &format!("tc filter del dev {link} ingress"));
    let error = a.dataplane.check_pod(&liar.spec).await.unwrap_err().to_string();
    assert!(error.contains("not held to its pod's addresses"), "{error}");
    a.dataplane.add_pod(&liar.spec).await.unwrap();
    assert!(!gets_through(&liar, &other, [10, 244, 1, 9].into()));
}

/// Links to pods let loopback addresses pass, for the sake of host ports.
#[tokio::test(flavor = "multi_thread")]
async fn the_hosts_loopback_is_its_own() {
    let (a, _b) = two_joined().await;
    let pod = plug(&a, "pod", 5).await;
    let [own, other] =
        [[127, 0, 0, 1], [192, 0, 2, 1]].map(|address| bind(&a, "host", || udp((Ipv4Addr::from(address), 7))));
    own.set_read_timeout(Some(SHORT)).unwrap();
    send_raw(&pod, [10, 244, 1, 5].into(), Ipv4Addr::LOCALHOST, 7);
    assert!(own.recv(&mut [0; 10]).is_err());
    send_raw(&pod, [10, 244, 1, 5].into(), [192, 0, 2, 1].into(), 7);
    other.recv(&mut [0; 10]).unwrap();
}

/// A node takes VXLAN from whoever sends it, with a frame of any network in it.
#[tokio::test(flavor = "multi_thread")]
async fn no_tunnel_begins_at_a_pod() {
    for underlay in UNDERLAYS {
        let (a, b) = two_nodes_over(underlay);
        // So that the port can be listened at.
        for (node, other) in [(&a, &b), (&b, &a)] {
            let network = network(node, &[other]);
            node.dataplane.ensure_pod_network(&network).await.unwrap();
            node.dataplane.set_pod_rules(&PodNetwork { port: 7788, ..network }, &[], &[]).await.unwrap();
        }
        let pod = plug(&a, "pod", 5).await;
        let clients = [0, 1].map(|family| bind(&a, "pod", || udp((pod.address(family), 0))));
        let itself = |node: &Node| blocks(node).into_iter().map(|block| block.addr());
        let addresses = [&a, &b].into_iter().flat_map(|node| itself(node).chain([node.vtep]).map(move |it| (node, it)));
        for (node, address) in addresses {
            let client = &clients[usize::from(address.is_ipv6())];
            let [tunnel, other] = [7788, 7787].map(|port| bind(node, "host", || udp((address, port))));
            for port in [7788, 7787] {
                client.send_to(b"hello", (address, port)).unwrap();
            }
            other.recv(&mut [0; 10]).unwrap();
            tunnel.set_nonblocking(true).unwrap();
            assert!(tunnel.recv(&mut [0; 10]).is_err(), "{address} over {underlay:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_can_be_done_twice_and_nothing_is_left() {
    for underlay in UNDERLAYS {
        let (a, b) = two_joined_over(underlay).await;
        let empty = {
            let bare = Node::new(Ipv4Addr::LOCALHOST);
            enter(&bare, "host", "nft list ruleset")
        };
        let far = plug(&b, "far", 7).await;
        let before = state(&a);
        let pod = plug(&a, "pod", 5).await;
        a.dataplane.add_pod(&pod.spec).await.unwrap();
        assert!(seen_by(&far, 0, (&a, "pod")).is_some());
        assert_eq!(a.dataplane.pods().await.unwrap(), std::slice::from_ref(&pod.spec.link));
        for _ in 0..2 {
            a.dataplane.remove_pod(&pod.spec.link).await.unwrap();
        }
        assert_eq!(state(&a), before);
        let error = a.dataplane.check_pod(&pod.spec).await.unwrap_err().to_string();
        assert!(error.contains(&pod.spec.link) && error.contains("is not there"), "{error}");
        assert!(!enter(&a, "pod", "ip -o link show").contains("eth0"));

        // A node that is gone is forgotten; one that comes back with another address is followed.
        join(&a, &[], &[]).await;
        let without = state(&a);
        assert!(
            !without.contains("10.244.2.")
                && !without.contains(&format!("{} ", b.vtep))
                && !without.contains("fd44:0:0:2:"),
            "{without}"
        );
        join(&a, &[&b], &[]).await;
        assert_eq!(state(&a), before);
        for _ in 0..2 {
            a.dataplane.remove_pod_network().await.unwrap();
        }
        let left = state(&a);
        assert!(!left.contains("portolan0") && !left.contains("10.244.") && !left.contains("fd44:"), "{left}");
        assert_eq!(enter(&a, "host", "nft list ruleset"), empty);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_names_what_is_missing_and_an_add_mends_it() {
    let (a, _b) = two_joined().await;
    let pod = plug(&a, "pod", 5).await;
    let link = &pod.spec.link;
    let cases = [
        ("pod", "ip route del default".to_owned(), "no default route by 169.254.1.1"),
        ("pod", "ip -6 route del default".to_owned(), "no default route by fe80::1"),
        ("pod", "ip address flush dev eth0 scope global".to_owned(), "does not have the address"),
        ("pod", "ip link set eth0 down".to_owned(), "link eth0 is down"),
        ("pod", "ip link del eth0".to_owned(), "is not there"),
        ("host", format!("ip link set {link} down"), "is down"),
        ("host", format!("ip route del 10.244.1.5 dev {link}"), "no route to 10.244.1.5"),
        ("host", format!("ip -6 route del fd44:0:0:1::5 dev {link}"), "no route to fd44:0:0:1::5"),
    ];
    for (netns, tamper, named) in cases {
        a.dataplane.check_pod(&pod.spec).await.unwrap();
        enter(&a, netns, &tamper);
        let error = a.dataplane.check_pod(&pod.spec).await.unwrap_err().to_string();
        assert!(error.contains(named), "{tamper}: {error}");
        a.dataplane.add_pod(&pod.spec).await.unwrap();
    }
    a.dataplane.check_pod(&pod.spec).await.unwrap();
    assert!(seen_by(&pod, 0, (&a, "host")).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_pod_leaves_nothing() {
    let (a, _b) = two_joined().await;
    let before = state(&a);
    let taken = spec(&a, a.netns("taken"), "taken", 5);
    enter(&a, "taken", "ip link add eth0 type bridge");
    let error = a.dataplane.add_pod(&taken).await.unwrap_err().to_string();
    assert_eq!(error, "interface eth0 is already there in /run/netns/taken");
    let nowhere = PodSpec { netns: "/run/netns/nowhere".into(), ..taken.clone() };
    assert!(a.dataplane.add_pod(&nowhere).await.is_err());
    let mut refused = spec(&a, a.netns("refused"), "refused", 5);
    refused.addresses.push("ff02::5".parse().unwrap());
    assert!(a.dataplane.add_pod(&refused).await.is_err());
    assert_eq!(a.dataplane.pods().await.unwrap(), Vec::<String>::new());
    assert_eq!(state(&a), before);
}
