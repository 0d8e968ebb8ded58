//! What may pass at a port, as its pod's neighbours see it.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use ipnet::IpNet;
use portolan_net::{BRIDGE_ADDRESS, Filter, PortFilter, Protocol, Rule, Service};

use super::{
    ECHO, Node, PATIENCE, Pod,
    families::pings,
    forward, ip, two_nodes, udp,
    wire::{BROADCAST, EXPERIMENTAL, Wire, advertisement, checksum, frame, gratuitous_arp},
};

const VNI: u32 = 77;
const WEB: u16 = 80;
const IPV4: u16 = 0x0800;
const VLAN: u16 = 0x8100;
/// How long nothing has to come before it is taken for denied. Whatever is denied here is let in at another place by the same way.
const SHORT: Duration = Duration::from_millis(300);

/// Two pods on one node, and on the other a server and its neighbour.
struct Scene<'a> {
    friend: Pod<'a>,
    stranger: Pod<'a>,
    server: Pod<'a>,
    neighbour: Pod<'a>,
}

impl<'a> Scene<'a> {
    async fn new(a: &'a Node, b: &'a Node) -> Self {
        for node in [a, b] {
            node.dataplane.ensure_network(&node.spec(VNI, false)).await.unwrap();
        }
        let (friend, stranger) = (a.plug(VNI, "friend", 5).await, a.plug(VNI, "stranger", 6).await);
        let (server, neighbour) = (b.plug(VNI, "server", 21).await, b.plug(VNI, "neighbour", 22).await);
        forward(a, VNI, &[&friend, &stranger], b, &[&server, &neighbour], false).await;
        forward(b, VNI, &[&server, &neighbour], a, &[&friend, &stranger], false).await;
        Self { friend, stranger, server, neighbour }
    }

    async fn hold(&self, filter: PortFilter) {
        hold(&self.server, filter).await;
    }
}

/// What may pass at this pod's port, all others of its node being open.
async fn hold(pod: &Pod<'_>, filter: PortFilter) {
    let filter = Filter { ports: [(pod.port.port.clone(), filter)].into() };
    pod.node.dataplane.filter(VNI, &filter).await.unwrap();
}

fn rule(peers: &[&Pod<'_>], services: &[(Protocol, u16)]) -> Rule {
    let peers = peers.iter().flat_map(|pod| pod.endpoints()).map(|(address, _)| IpNet::from(address)).collect();
    let service = |&(protocol, port)| Service { protocol, first: port, last: port };
    let services = (!services.is_empty()).then(|| services.iter().map(service).collect());
    Rule { peers: Some(peers), services }
}

fn lets_in(rules: &[Rule]) -> PortFilter {
    PortFilter { ingress: Some(rules.to_vec()), egress: None }
}

fn lets_out(rules: &[Rule]) -> PortFilter {
    PortFilter { ingress: None, egress: Some(rules.to_vec()) }
}

/// Listens on a port in both families.
fn serve(pod: &Pod<'_>, port: u16) -> [TcpListener; 2] {
    let at: [SocketAddr; 2] = [(pod.address, port).into(), (pod.ipv6, port).into()];
    at.map(|at| pod.inside(|| TcpListener::bind(at)))
}

fn connects(from: &Pod<'_>, to: impl Into<IpAddr>, port: u16) -> bool {
    let at = SocketAddr::new(to.into(), port);
    from.inside(|| Ok(TcpStream::connect_timeout(&at, PATIENCE).is_ok()))
}

/// The same, of what is expected not to.
fn is_kept_out(from: &Pod<'_>, to: impl Into<IpAddr>, port: u16) -> bool {
    let at = SocketAddr::new(to.into(), port);
    from.inside(|| Ok(TcpStream::connect_timeout(&at, SHORT).is_err()))
}

/// Whose datagram the listener gets first.
fn first_heard(listener: &UdpSocket, from: &[&Pod<'_>], to: impl Into<IpAddr>) -> Option<IpAddr> {
    let at = SocketAddr::new(to.into(), ECHO);
    for pod in from {
        let own: IpAddr = if at.is_ipv4() { pod.address.into() } else { pod.ipv6.into() };
        pod.inside(|| udp((own, 0))?.send_to(b"hello", at));
    }
    let heard = listener.recv_from(&mut [0; 100]).ok();
    heard.map(|(_, sender)| sender.ip())
}

fn rules_in_the_kernel(node: &Node) -> String {
    listed(node, &["ruleset"])
}

/// The IPv4 connections that are open as far as the kernel remembers.
fn remembered(node: &Node) -> String {
    listed(node, &["set", "bridge", "portolan", "flows4"])
}

fn listed(node: &Node, what: &[&str]) -> String {
    node.enter(&format!("portolan-{VNI}"), &[&["nft", "list"], what].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_is_let_in_comes_in() {
    let (a, b) = two_nodes();
    let scene = Scene::new(&a, &b).await;
    let Scene { friend, stranger, server, neighbour } = &scene;
    let _web = (serve(server, WEB), serve(server, 81));
    scene.hold(lets_in(&[rule(&[friend, neighbour], &[(Protocol::Tcp, WEB)])])).await;
    let addresses: [IpAddr; 2] = [server.address.into(), server.ipv6.into()];
    for to in addresses {
        for guest in [friend, neighbour] {
            assert!(connects(guest, to, WEB), "{to}");
            assert!(is_kept_out(guest, to, 81), "another port of {to}");
        }
        assert!(is_kept_out(stranger, to, WEB), "{to}");
        assert!(!pings(friend, to), "{to}: not by a port");
    }
    let _others = serve(friend, WEB);
    assert!(connects(server, friend.address, WEB), "it may go out as it likes, and is answered");
    assert!(pings(server, friend.address) && pings(server, friend.ipv6), "also by pings");

    scene.hold(lets_in(&[rule(&[friend], &[])])).await;
    for to in addresses {
        assert!(connects(friend, to, 81) && pings(friend, to), "all protocols, {to}");
        assert!(is_kept_out(neighbour, to, WEB), "of its own node, too: {to}");
    }

    scene.hold(PortFilter::default()).await;
    for to in addresses {
        assert!(connects(stranger, to, 81) && pings(neighbour, to), "open again, {to}");
    }
    assert_eq!(rules_in_the_kernel(&b), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_and_broadcasts_follow_the_rules() {
    let (a, b) = two_nodes();
    let scene = Scene::new(&a, &b).await;
    let Scene { friend, stranger, server, .. } = &scene;
    let (listener, ipv6) = (server.listen(), server.listen_ipv6());
    scene.hold(lets_in(&[rule(&[friend], &[(Protocol::Udp, ECHO)])])).await;
    assert_eq!(first_heard(&listener, &[stranger, friend], server.address), Some(friend.address.into()));
    assert_eq!(first_heard(&ipv6, &[stranger, friend], server.ipv6), Some(friend.ipv6.into()));
    for pod in [stranger, friend] {
        pod.inside(|| {
            let socket = udp((pod.address, 0))?;
            socket.set_broadcast(true)?;
            socket.send_to(b"all", (Ipv4Addr::new(10, 32, 0, 255), ECHO))
        });
    }
    let (_, from) = listener.recv_from(&mut [0; 10]).unwrap();
    assert_eq!(from.ip(), friend.address, "of broadcasts, by who sent them");

    // Nothing comes from it but answers.
    scene.hold(lets_out(&[])).await;
    let (at_friend, client) = (friend.listen(), friend.inside(|| udp((friend.address, 0))));
    client.send_to(b"question", (server.address, ECHO)).unwrap();
    let (_, asker) = listener.recv_from(&mut [0; 10]).unwrap();
    assert_eq!(first_heard(&at_friend, &[server, stranger], friend.address), Some(stranger.address.into()));
    for _ in 0..2 {
        listener.send_to(b"answer", asker).unwrap();
        client.recv_from(&mut [0; 10]).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_where_it_may_go_it_goes() {
    let (a, b) = two_nodes();
    let scene = Scene::new(&a, &b).await;
    let Scene { friend, stranger, server, neighbour } = &scene;
    let _web = [friend, stranger, neighbour, server].map(|pod| serve(pod, WEB));
    scene.hold(lets_out(&[rule(&[friend], &[(Protocol::Tcp, WEB)])])).await;
    assert!(connects(server, friend.address, WEB) && connects(server, friend.ipv6, WEB));
    for to in [stranger, neighbour] {
        assert!(is_kept_out(server, to.address, WEB) && is_kept_out(server, to.ipv6, WEB));
        assert!(connects(to, server.address, WEB) && connects(to, server.ipv6, WEB), "its answers pass");
        assert!(pings(to, server.address) && pings(to, server.ipv6), "also to pings");
    }
    assert!(!pings(server, friend.address), "not by a port");
    // Its own node's resolver is no pod.
    let resolver = b.dataplane.run_in(VNI, || udp((BRIDGE_ADDRESS, 53))).unwrap();
    let client = server.inside(|| udp((Ipv4Addr::UNSPECIFIED, 0)));
    client.send_to(b"question", (BRIDGE_ADDRESS, 53)).unwrap();
    let (_, asker) = resolver.recv_from(&mut [0; 10]).unwrap();
    resolver.send_to(b"answer", asker).unwrap();
    client.recv_from(&mut [0; 10]).unwrap();
}

/// On one node both ends' rules count.
#[tokio::test(flavor = "multi_thread")]
async fn between_two_isolated_pods_both_must_agree() {
    let (a, b) = two_nodes();
    let scene = Scene::new(&a, &b).await;
    let (server, client) = (&scene.server, &scene.neighbour);
    let _web = serve(server, WEB);
    let services = [(Protocol::Tcp, WEB)];
    let both = |at_server: &[Rule], at_client: &[Rule]| Filter {
        ports: [
            (server.port.port.clone(), PortFilter { ingress: Some(at_server.to_vec()), egress: Some(Vec::new()) }),
            (client.port.port.clone(), PortFilter { ingress: Some(Vec::new()), egress: Some(at_client.to_vec()) }),
        ]
        .into(),
    };
    let (to_server, from_client) = (rule(&[server], &services), rule(&[client], &services));
    for (at_server, at_client, passes) in [
        (vec![], vec![to_server.clone()], false),
        (vec![from_client.clone()], vec![], false),
        (vec![from_client], vec![to_server], true),
    ] {
        b.dataplane.filter(VNI, &both(&at_server, &at_client)).await.unwrap();
        match passes {
            true => assert!(connects(client, server.address, WEB)),
            false => assert!(is_kept_out(client, server.address, WEB)),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_outlive_the_rules_that_let_them_in() {
    let (a, b) = two_nodes();
    let scene = Scene::new(&a, &b).await;
    let Scene { friend, server, .. } = &scene;
    let [web, _ipv6] = serve(server, WEB);
    let isolated = |rules: &[Rule]| PortFilter { ingress: Some(rules.to_vec()), egress: Some(Vec::new()) };
    scene.hold(isolated(&[rule(&[friend], &[(Protocol::Tcp, WEB)])])).await;
    let mut client = friend.inside(|| TcpStream::connect_timeout(&(server.address, WEB).into(), PATIENCE));
    let (mut served, _) = web.accept().unwrap();
    for stream in [&client, &served] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    client.write_all(b"hello").unwrap();
    served.read_exact(&mut [0; 5]).unwrap();

    // Other rules, which let this one in no more: the server can still say something first, and so can the client.
    scene.hold(isolated(&[rule(&[friend], &[(Protocol::Tcp, 81)])])).await;
    assert!(is_kept_out(friend, server.address, WEB), "a new one");
    served.write_all(b"hello").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
    client.write_all(b"hello").unwrap();
    served.read_exact(&mut [0; 5]).unwrap();

    // A segment that begins a connection is no answer, whatever ports it is between.
    let port = client.local_addr().unwrap().port();
    let (mut at_server, mut at_friend) = (Wire::open(server), Wire::open(friend));
    let syn = tcp(server, friend, (WEB, port), 0x02);
    let answer = tcp(server, friend, (WEB, port), 0x10);
    at_server.send(&syn);
    at_server.send(&answer);
    let seen = at_friend.until(&answer).expect("the answer");
    assert!(!seen.contains(&syn), "a new connection");

    // Both learn that it ends, and what is remembered of it does not stay for long.
    assert!(remembered(&b).contains(&port.to_string()));
    drop(served);
    assert_eq!(client.read(&mut [0; 5]).unwrap(), 0);
    drop(client);
    assert!(!remembered(&b).contains(&port.to_string()));
}

/// A pod's rules are there before its port is: of all that is sent to it meanwhile, nothing comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_port_is_closed_from_its_first_frame() {
    let (a, _b) = two_nodes();
    a.dataplane.ensure_network(&a.spec(VNI, false)).await.unwrap();
    let stranger = a.plug(VNI, "stranger", 6).await;
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let socket = stranger.inside(|| udp((stranger.address, 0)));
            socket.set_broadcast(true).unwrap();
            while !is_over.load(Ordering::Relaxed) {
                socket.send_to(b"hello", (Ipv4Addr::new(10, 32, 0, 255), ECHO)).unwrap();
            }
        });
        let plugged = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                // Who listens in the pod is there before the interface.
                let (early, late) = (listen_before(&a, "early"), listen_before(&a, "late"));
                let early_port = portolan_net::port_name("early", "eth1");
                let filter = Filter { ports: [(early_port, lets_in(&[]))].into() };
                a.dataplane.filter(VNI, &filter).await.unwrap();
                let _early = a.plug(VNI, "early", 7).await;
                let _late = a.plug(VNI, "late", 8).await;
                // What is open hears it, so it was sent all the while.
                let heard = late.recv_from(&mut [0; 10]).is_ok();
                early.set_nonblocking(true).unwrap();
                (heard, early.recv_from(&mut [0; 10]).is_ok())
            })
        });
        is_over.store(true, Ordering::Relaxed);
        assert_eq!(plugged, (true, false), "whether the open and the closed one heard anything");
    });
}

fn listen_before(node: &Node, pod: &str) -> UdpSocket {
    let netns = node.netns(pod);
    let namespace = portolan_net::Namespace::open(node.root.path(), &netns).unwrap();
    namespace.run(|| udp((Ipv4Addr::UNSPECIFIED, ECHO))).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_are_replaced_as_a_whole() {
    let (a, b) = two_nodes();
    let scene = Scene::new(&a, &b).await;
    let Scene { friend, stranger, server, neighbour } = &scene;
    let listener = server.listen();
    let filters = [
        lets_in(&[rule(&[friend], &[(Protocol::Udp, ECHO)])]),
        lets_in(&[rule(&[friend, neighbour], &[(Protocol::Udp, ECHO)])]),
    ];
    scene.hold(filters[0].clone()).await;
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let [by_stranger, by_friend] = [stranger, friend].map(|pod| pod.inside(|| udp((pod.address, 0))));
            let mut sent = 0;
            while !is_over.load(Ordering::Relaxed) {
                by_stranger.send_to(b"no", (server.address, ECHO)).unwrap();
                by_friend.send_to(b"yes", (server.address, ECHO)).unwrap();
                // One at a time: what isn't heard is lost, and not late.
                let (_, heard) = listener.recv_from(&mut [0; 10]).expect("the friend is heard");
                assert_eq!(heard.ip(), friend.address, "and the stranger isn't");
                sent += 1;
            }
            sent
        });
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                for filter in filters.iter().cycle().take(20) {
                    scene.hold(filter.clone()).await;
                }
            });
        });
        is_over.store(true, Ordering::Relaxed);
        assert!(sending.join().unwrap() > 20);
    });

    // The same once more, as after a restart, is the same.
    let before = rules_in_the_kernel(&b);
    scene.hold(filters[1].clone()).await;
    let without_counts =
        |text: &str| text.lines().filter(|line| !line.contains("expires")).collect::<Vec<_>>().join("\n");
    assert_eq!(without_counts(&before), without_counts(&rules_in_the_kernel(&b)));

    // What is refused changes nothing.
    let wrong = Filter { ports: [("a name that is far too long".to_owned(), lets_in(&[]))].into() };
    let error = b.dataplane.filter(VNI, &wrong).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("nft (in /run/netns/portolan-{VNI}): ")), "{error}");
    assert_eq!(first_heard(&listener, &[stranger, friend], server.address), Some(friend.address.into()));

    for _ in 0..2 {
        b.dataplane.filter(VNI, &Filter::default()).await.unwrap();
    }
    assert_eq!(rules_in_the_kernel(&b), "", "nothing is left");
    // Without the host's program nothing can be isolated, and nothing else needs it.
    let bare = portolan_net::Dataplane::new(b.root.path());
    bare.filter(VNI, &Filter::default()).await.unwrap();
    let error = bare.filter(VNI, &wrong).await.unwrap_err().to_string();
    assert!(error.contains("did not start"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_are_no_ip_do_not_pass_but_neighbours_are_found() {
    let (a, b) = two_nodes();
    let scene = Scene::new(&a, &b).await;
    let Scene { friend, server, neighbour, .. } = &scene;
    scene.hold(lets_in(&[rule(&[friend], &[(Protocol::Tcp, WEB), (Protocol::Sctp, 5)])])).await;
    let mac = friend.port.mac;
    let tagged = [&[0, 5][..], &IPV4.to_be_bytes(), &ipv4(friend, server, 6, 0, &ports((9, WEB)))].concat();
    let cases = [
        ("another type", false, frame(BROADCAST, mac, EXPERIMENTAL, b"text")),
        ("with a tag", false, frame(server.port.mac, mac, VLAN, &tagged)),
        ("ARP", true, gratuitous_arp(mac, friend.address)),
        ("neighbour discovery", true, advertisement(mac, friend.ipv6)),
        ("IGMP", true, to(server, friend, &ipv4(friend, server, 2, 0, &[0x16, 0, 0, 0, 224, 1, 2, 3]))),
        ("SCTP to an open port", true, to(server, friend, &ipv4(friend, server, 132, 0, &ports((9, 5))))),
        ("SCTP to another", false, to(server, friend, &ipv4(friend, server, 132, 0, &ports((9, 6))))),
        ("a protocol without ports", false, to(server, friend, &ipv4(friend, server, 47, 0, &[0; 12]))),
        ("a fragment whose first wasn't let in", false, to(server, friend, &ipv4(friend, server, 6, 0x00b9, &[0; 12]))),
        ("the last", true, to(server, friend, &ipv4(friend, server, 6, 0, &ports((10, WEB))))),
    ];
    let (mut at_friend, mut at_server, mut at_neighbour) =
        (Wire::open(friend), Wire::open(server), Wire::open(neighbour));
    for (_, _, frame) in &cases {
        at_friend.send(frame);
    }
    let last = &cases.last().unwrap().2;
    let seen = at_server.until(last).expect("the last");
    for (name, passes, frame) in &cases {
        // The kernel takes a tag off and puts it beside the frame.
        let is_there = seen.iter().any(|one| one == frame || (*name == "with a tag" && one.ends_with(&tagged[4..])));
        assert_eq!(is_there, *passes, "{name}");
    }
    assert!(at_neighbour.sees(&cases[0].2), "nothing holds back what comes to an open port");
    // Whoever may come with whatever, it has to be IP.
    scene.hold(lets_in(&[Rule { peers: None, services: None }])).await;
    for (_, _, frame) in &cases {
        at_friend.send(frame);
    }
    let seen = at_server.until(last).expect("the last");
    assert!(
        seen.contains(&cases[7].2)
            && !seen.contains(&cases[0].2)
            && !seen.iter().any(|one| one.ends_with(&tagged[4..]))
    );
    for family in ["-4", "-6"] {
        ip(friend, &[family, "neighbour", "flush", "dev", "eth1"]);
    }
    let _web = serve(server, WEB);
    assert!(
        connects(friend, server.address, WEB) && connects(friend, server.ipv6, WEB),
        "who has it is asked and told"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn large_datagrams_come_whole() {
    let (a, b) = two_nodes();
    let scene = Scene::new(&a, &b).await;
    let Scene { friend, server, .. } = &scene;
    let isolated =
        PortFilter { ingress: Some(vec![rule(&[friend], &[(Protocol::Udp, ECHO)])]), egress: Some(Vec::new()) };
    scene.hold(isolated).await;
    let pairs: [(UdpSocket, UdpSocket, IpAddr); 2] = [
        (server.listen(), friend.inside(|| udp((friend.address, 0))), server.address.into()),
        (server.listen_ipv6(), friend.inside(|| udp((friend.ipv6, 0))), server.ipv6.into()),
    ];
    let large = vec![7; 4000];
    for (listener, client, to) in pairs {
        let mut buffer = vec![0; 5000];
        client.send_to(&large, (to, ECHO)).unwrap();
        let (length, asker) = listener.recv_from(&mut buffer).unwrap_or_else(|e| panic!("{to}: {e}"));
        assert_eq!(length, large.len(), "{to}");
        listener.send_to(&large, asker).unwrap();
        let (length, _) = client.recv_from(&mut buffer).unwrap_or_else(|e| panic!("from {to}: {e}"));
        assert_eq!(length, large.len(), "from {to}");
    }
}

fn ports((source, destination): (u16, u16)) -> Vec<u8> {
    [&source.to_be_bytes()[..], &destination.to_be_bytes(), &[0; 24]].concat()
}

fn to(pod: &Pod<'_>, from: &Pod<'_>, packet: &[u8]) -> Vec<u8> {
    frame(pod.port.mac, from.port.mac, IPV4, packet)
}

/// A packet of IPv4 (RFC 791, section 3.1) with these flags and fragment offset.
fn ipv4(from: &Pod<'_>, to: &Pod<'_>, protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap();
    let ends = [from.address.octets(), to.address.octets()].concat();
    let fields = [&[0x45, 0][..], &length.to_be_bytes(), &[0, 9], &fragment.to_be_bytes(), &[64, protocol]].concat();
    let sum = checksum(&[&fields[..], &[0, 0], &ends].concat());
    [&fields[..], &sum.to_be_bytes(), &ends, payload].concat()
}

/// A TCP segment without data (RFC 9293, section 3.1).
fn tcp(from: &Pod<'_>, to_pod: &Pod<'_>, (source, destination): (u16, u16), flags: u8) -> Vec<u8> {
    let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    let segment = [&ports[..], &[0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0, 0, 0, 0, 0, 0]].concat();
    to(to_pod, from, &ipv4(from, to_pod, 6, 0, &segment))
}
