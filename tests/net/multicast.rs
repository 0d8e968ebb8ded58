//! Where IP multicast goes on a network that snoops, and that all else goes where it went before.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    time::{Duration, Instant},
};

use portolan_net::{Mac, Multicast, NetworkSpec};
use rustix::net::sockopt::set_ip_add_source_membership;

use super::{
    Node, PATIENCE, Pod, UNDERLAYS, forward, ip, two_nodes, two_nodes_over, udp,
    wire::{ALL_NODES, BROADCAST, EXPERIMENTAL, IPV6, Wire, checksum, frame, gratuitous_arp, to_all_nodes},
};

const VNI: u32 = 77;
const IPV4: u16 = 0x0800;
/// Protocol numbers (IANA).
const UDP: u8 = 17;
const VRRP: u8 = 112;
const GROUP: IpAddr = IpAddr::V4(Ipv4Addr::new(239, 1, 2, 3));
const GROUP_IPV6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xff05, 0, 0, 0, 0, 0, 0, 0x123));

fn spec(node: &Node, multicast: Multicast) -> NetworkSpec {
    NetworkSpec { multicast, ..node.spec(VNI, false) }
}

async fn set(node: &Node, multicast: Multicast) {
    node.dataplane.ensure_network(&spec(node, multicast)).await.unwrap();
}

async fn connect(a: (&Node, &[&Pod<'_>]), b: (&Node, &[&Pod<'_>])) {
    forward(a.0, VNI, a.1, b.0, b.1, false).await;
    forward(b.0, VNI, b.1, a.0, a.1, false).await;
}

/// A packet to a group, by the group's MAC (RFC 1112, section 6.4; RFC 2464, section 7).
fn to_group(from: &Pod<'_>, group: IpAddr, protocol: u8, text: &str) -> Vec<u8> {
    let payload = [&[0, 9, 0, 9, 0, u8::try_from(text.len() + 8).unwrap(), 0, 0], text.as_bytes()].concat();
    let length = u8::try_from(payload.len()).unwrap();
    match group {
        IpAddr::V4(group) => {
            let [_, b, c, d] = group.octets();
            let ends = [from.address.octets(), group.octets()].concat();
            let header = [&[0x45, 0, 0, length + 20, 0, 0, 0, 0, 1, protocol, 0, 0][..], &ends].concat();
            let sum = checksum(&header).to_be_bytes();
            let packet = [&header[..10], &sum, &header[12..], &payload].concat();
            frame(Mac([1, 0, 0x5e, b & 0x7f, c, d]), from.port.mac, IPV4, &packet)
        }
        IpAddr::V6(group) => {
            let [.., c, d, e, f] = group.octets();
            let header = [0x60, 0, 0, 0, 0, length, protocol, 1];
            let packet = [&header[..], &from.ipv6.octets(), &group.octets(), &payload].concat();
            frame(Mac([0x33, 0x33, c, d, e, f]), from.port.mac, IPV6, &packet)
        }
    }
}

/// A sender, and others who are watched for what they get of it.
struct Watch {
    from: Wire,
    mac: Mac,
    to: Vec<Wire>,
    sent: usize,
}

impl Watch {
    fn new(from: &Pod<'_>, to: &[&Pod<'_>]) -> Self {
        let to = to.iter().map(|pod| Wire::open(pod)).collect();
        Self { from: Wire::open(from), mac: from.port.mac, to, sent: 0 }
    }

    /// Who of the others gets this frame, by a broadcast after it, which all have to get.
    fn who(&mut self, sent: &[u8]) -> Vec<bool> {
        self.sent += 1;
        let marker = frame(BROADCAST, self.mac, EXPERIMENTAL, format!("marker {}", self.sent).as_bytes());
        self.from.send(sent);
        self.from.send(&marker);
        let seen = self.to.iter_mut().map(|wire| wire.until(&marker).expect("the broadcast"));
        seen.map(|seen| seen.iter().any(|frame| frame == sent)).collect()
    }

    /// Waits until those get this frame who are to.
    fn until(&mut self, sent: &[u8], wanted: &[bool]) {
        let end = Instant::now() + PATIENCE * 2;
        loop {
            let who = self.who(sent);
            if who == wanted {
                return;
            }
            assert!(Instant::now() < end, "it reaches {who:?}, and should {wanted:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Whether a frame asks who has joined what: IGMP behind a header with a router alert, or MLD behind one of hop-by-hop options.
fn asks(frame: &[u8]) -> bool {
    match u16::from_be_bytes([frame[12], frame[13]]) {
        IPV4 => frame[23] == 2 && frame[14 + 4 * usize::from(frame[14] & 15)] == 0x11,
        IPV6 => frame[20] == 0 && frame[54] == 58 && frame[62] == 130,
        _ => false,
    }
}

fn join(pod: &Pod<'_>, group: IpAddr) -> UdpSocket {
    pod.inside(|| {
        let socket = udp((Ipv6Addr::UNSPECIFIED, 0))?;
        match group {
            IpAddr::V4(group) => {
                let socket = udp((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.join_multicast_v4(&group, &pod.address)?;
                Ok(socket)
            }
            IpAddr::V6(group) => {
                let index = rustix::net::netdevice::name_to_index(&socket, "eth1")?;
                socket.join_multicast_v6(&group, index)?;
                Ok(socket)
            }
        }
    })
}

/// Makes a pod speak one version of IGMP and MLD only.
fn speak(pod: &Pod<'_>, igmp: &str, mld: &str) {
    pod.inside(|| {
        std::fs::write("/proc/sys/net/ipv4/conf/eth1/force_igmp_version", igmp)?;
        std::fs::write("/proc/sys/net/ipv6/conf/eth1/force_mld_version", mld)
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_goes_where_it_was_joined() {
    for underlay in UNDERLAYS {
        let (a, b) = two_nodes_over(underlay);
        for node in [&a, &b] {
            set(node, Multicast::Snooping).await;
        }
        let (sender, here, idle) =
            (a.plug(VNI, "s", 5).await, a.plug(VNI, "here", 6).await, a.plug(VNI, "idle", 7).await);
        let (there, idle_there) = (b.plug(VNI, "there", 21).await, b.plug(VNI, "idle", 22).await);
        connect((&a, &[&sender, &here, &idle]), (&b, &[&there, &idle_there])).await;
        for (igmp, mld) in [("2", "1"), ("3", "2")] {
            speak(&here, igmp, mld);
            speak(&there, igmp, mld);
            for group in [GROUP, GROUP_IPV6] {
                let mut watch = Watch::new(&sender, &[&here, &idle, &there, &idle_there]);
                let stream = to_group(&sender, group, UDP, "stream");
                watch.until(&stream, &[false; 4]);
                let there = join(&there, group);
                watch.until(&stream, &[false, false, true, false]);
                let here = join(&here, group);
                watch.until(&stream, &[true, false, true, false]);
                drop(there);
                watch.until(&stream, &[true, false, false, false]);
                drop(here);
                watch.until(&stream, &[false; 4]);
            }
        }
    }
}

/// IGMP version 3 joins a group as far as it comes from a source (RFC 4607).
#[tokio::test(flavor = "multi_thread")]
async fn a_group_goes_where_it_was_joined_for_its_source() {
    let (a, b) = two_nodes();
    for node in [&a, &b] {
        set(node, Multicast::Snooping).await;
    }
    let sender = a.plug(VNI, "sender", 5).await;
    let (there, other) = (b.plug(VNI, "there", 21).await, b.plug(VNI, "other", 22).await);
    connect((&a, &[&sender]), (&b, &[&there, &other])).await;
    let mut watch = Watch::new(&sender, &[&there, &other]);
    let group = Ipv4Addr::new(232, 1, 2, 3);
    let stream = to_group(&sender, group.into(), UDP, "stream");
    watch.until(&stream, &[false; 2]);
    let join = |pod: &Pod<'_>, source: Ipv4Addr| {
        let socket = pod.inside(|| udp((Ipv4Addr::UNSPECIFIED, 0)));
        set_ip_add_source_membership(&socket, &group, &pod.address, &source).unwrap();
        socket
    };
    let _joined = [join(&there, sender.address), join(&other, Ipv4Addr::new(10, 32, 0, 99))];
    watch.until(&stream, &[true, false]);
}

/// RFC 4541, section 2.1.2: what is for a link's own protocols goes to all, whether they say that they listen or not.
#[tokio::test(flavor = "multi_thread")]
async fn what_all_need_goes_to_all() {
    let (a, b) = two_nodes();
    for node in [&a, &b] {
        set(node, Multicast::Snooping).await;
    }
    let (one, here, there) =
        (a.plug(VNI, "one", 5).await, a.plug(VNI, "here", 6).await, b.plug(VNI, "there", 21).await);
    connect((&a, &[&one, &here]), (&b, &[&there])).await;
    let mut watch = Watch::new(&one, &[&here, &there]);
    watch.until(&to_group(&one, GROUP, UDP, "settled"), &[false; 2]);
    watch.until(&to_group(&one, GROUP_IPV6, UDP, "settled"), &[false; 2]);
    let all = [
        ("VRRP", to_group(&one, [224, 0, 0, 18].into(), VRRP, "vrrp")),
        ("mDNS", to_group(&one, [224, 0, 0, 251].into(), UDP, "mdns")),
        ("all hosts", to_group(&one, [224, 0, 0, 1].into(), UDP, "hosts")),
        ("all nodes", to_all_nodes(one.port.mac, one.ipv6, &[128, 0, 0, 0])),
        ("all nodes, not IP", frame(ALL_NODES, one.port.mac, EXPERIMENTAL, b"not IP")),
        ("a group's MAC, not IP", frame(Mac([1, 0, 0x5e, 1, 2, 3]), one.port.mac, EXPERIMENTAL, b"not IP")),
        ("gratuitous ARP", gratuitous_arp(one.port.mac, one.address)),
    ];
    for (what, frame) in all {
        assert_eq!(watch.who(&frame), [true; 2], "{what}");
    }

    // Neighbour discovery: of pods that are asked for at once, and of an address that comes later.
    let (late, late_there) = (a.plug(VNI, "late", 7).await, b.plug(VNI, "late", 22).await);
    connect((&a, &[&one, &here, &late]), (&b, &[&there, &late_there])).await;
    for pod in [&late, &late_there, &there] {
        let listener = pod.listen_ipv6();
        assert!(one.reaches(pod.ipv6, &listener), "{} is not found by neighbour discovery", pod.ipv6);
    }
    ip(&one, &["address", "add", &format!("{}/64", there.ipv6), "dev", "eth1"]);
    let end = Instant::now() + PATIENCE;
    while ip(&one, &["-6", "address", "show", "dadfailed"]).is_empty() {
        assert!(Instant::now() < end, "the duplicate was not detected");
        std::thread::sleep(PATIENCE / 100);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_in_use_changes_without_loss() {
    let (a, b) = two_nodes();
    // With suppression a bridge has IPv6 in any case, and the address that it asks from has to go by itself.
    let set = async |node: &Node, multicast| {
        node.dataplane.ensure_network(&NetworkSpec { suppression: true, ..spec(node, multicast) }).await.unwrap();
    };
    for node in [&a, &b] {
        set(node, Multicast::Flood).await;
    }
    let (sender, here) = (a.plug(VNI, "sender", 5).await, a.plug(VNI, "here", 6).await);
    let (there, twin, idle) =
        (b.plug(VNI, "there", 21).await, b.plug(VNI, "twin", 22).await, b.plug(VNI, "idle", 23).await);
    connect((&a, &[&sender, &here]), (&b, &[&there, &twin, &idle])).await;
    let before = [settings(&a), settings(&b)];
    for group in [GROUP, GROUP_IPV6] {
        // The bridges hear nothing of it, or have forgotten it.
        for node in [&a, &b] {
            hear(node, "0");
        }
        let sockets = [join(&here, group), join(&there, group), join(&twin, group)];
        for node in [&a, &b] {
            hear(node, "1");
        }
        let mut watch = Watch::new(&sender, &[&here, &there, &twin, &idle]);
        let stream = to_group(&sender, group, UDP, "stream");
        assert_eq!(watch.who(&stream), [true; 4], "it is flooded");
        for node in [&a, &b] {
            set(node, Multicast::Snooping).await;
        }
        let end = Instant::now() + PATIENCE;
        let mut settled = 0;
        while settled < 50 {
            let who = watch.who(&stream);
            assert_eq!(who[..3], [true; 3], "those who joined lose nothing");
            settled = if who[3] { 0 } else { settled + 1 };
            assert!(Instant::now() < end, "it goes on to flood");
            std::thread::sleep(Duration::from_millis(10));
        }
        let snooping = settings(&a);
        set(&a, Multicast::Snooping).await;
        assert_eq!(settings(&a), snooping, "a second time changes nothing");
        assert_eq!(watch.who(&stream), [true, true, true, false], "nor does the agent's next start");
        // As the kernel does with a table that is full.
        hear(&b, "0");
        assert_eq!(watch.who(&stream), [true; 4]);
        set(&b, Multicast::Snooping).await;
        watch.until(&stream, &[true, true, true, false]);
        for node in [&a, &b] {
            set(node, Multicast::Flood).await;
        }
        drop(sockets);
        assert_eq!(watch.who(&stream), [true; 4], "it is flooded at once");
        assert_eq!([settings(&a), settings(&b)], before, "nothing is left");
    }
}

/// As it is with a node whose agent is of an older release, or that has not heard of the change yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_floods_is_served_by_one_that_snoops() {
    let (a, b) = two_nodes();
    set(&a, Multicast::Snooping).await;
    set(&b, Multicast::Flood).await;
    let (one, idle) = (a.plug(VNI, "one", 5).await, a.plug(VNI, "idle", 6).await);
    let (two, other) = (b.plug(VNI, "two", 21).await, b.plug(VNI, "other", 22).await);
    connect((&a, &[&one, &idle]), (&b, &[&two, &other])).await;
    for group in [GROUP, GROUP_IPV6] {
        let _joined = [join(&one, group), join(&two, group)];
        let mut watch = Watch::new(&one, &[&idle, &two, &other]);
        watch.until(&to_group(&one, group, UDP, "from the snooping one"), &[false, true, true]);
        let mut watch = Watch::new(&two, &[&one, &idle, &other]);
        watch.until(&to_group(&two, group, UDP, "from the flooding one"), &[true, false, true]);
    }
    // To ask is each node's own matter: who were asked by another would leave it to that, and begin to snoop.
    let mut at_two = Wire::open(&two);
    set(&a, Multicast::Flood).await;
    set(&a, Multicast::Snooping).await;
    let mut watch = Watch::new(&one, &[&idle]);
    watch.until(&to_group(&one, [239, 9, 9, 9].into(), UDP, "settled"), &[false]);
    let marker = frame(BROADCAST, one.port.mac, EXPERIMENTAL, b"after the questions");
    Wire::open(&one).send(&marker);
    let seen = at_two.until(&marker).expect("the broadcast");
    assert!(!seen.iter().any(|frame| asks(frame)), "the bridge's questions cross");
}

/// Whether a frame says who has joined what, or asks for it: IGMP, or MLD behind a header of hop-by-hop options.
fn is_membership(frame: &[u8]) -> bool {
    match u16::from_be_bytes([frame[12], frame[13]]) {
        IPV4 => frame[23] == 2,
        IPV6 => frame[20] == 0 && frame[54] == 58 && [130, 131, 132, 143].contains(&frame[62]),
        _ => false,
    }
}

/// What is said of groups stays on its node, in each version of IGMP and MLD: a node that hears of others' members would send them what they get
/// from their own.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_joined_is_told_to_the_own_node_only() {
    let (a, b) = two_nodes();
    for node in [&a, &b] {
        set(node, Multicast::Snooping).await;
    }
    let (pod, there) = (a.plug(VNI, "pod", 5).await, b.plug(VNI, "there", 21).await);
    connect((&a, &[&pod]), (&b, &[&there])).await;
    let mut own = Wire::open(&pod);
    for (igmp, mld, kinds) in [("2", "1", &[131, 132][..]), ("3", "2", &[143])] {
        speak(&pod, igmp, mld);
        for group in [GROUP, GROUP_IPV6] {
            let mut tunnel = a.at(&format!("portolan-{VNI}")).run(|| Wire::at("vx0")).unwrap();
            let mut at_there = Wire::open(&there);
            let mut said = Vec::new();
            // Joined and left until it was said: the kernel takes its time for some, and says nothing of what was left before.
            let end = Instant::now() + 10 * PATIENCE;
            let is_all_said = |said: &[Vec<u8>]| match group {
                IpAddr::V4(_) => said.iter().any(|frame| frame[12..14] == IPV4.to_be_bytes()),
                IpAddr::V6(_) => kinds.iter().all(|kind| said.iter().any(|frame| frame.get(62) == Some(kind))),
            };
            while !is_all_said(&said) {
                assert!(Instant::now() < end, "the pod said {said:?} of {group} only");
                let joined = join(&pod, group);
                std::thread::sleep(PATIENCE / 100);
                drop(joined);
                std::thread::sleep(PATIENCE / 100);
                // Each node's bridge says the same of itself, of the same address.
                let is_own = |frame: &Vec<u8>| frame[6..12] == pod.port.mac.0 && is_membership(frame);
                said.extend(own.all().into_iter().filter(is_own));
            }
            let marker = frame(BROADCAST, pod.port.mac, EXPERIMENTAL, format!("{igmp} {mld} {group}").as_bytes());
            own.send(&marker);
            for (place, wire) in [("vx0", &mut tunnel), ("the other node", &mut at_there)] {
                let seen = wire.until(&marker).expect("the broadcast");
                let crossed: Vec<_> = seen.iter().filter(|frame| said.contains(frame)).collect();
                assert!(crossed.is_empty(), "{crossed:?} at {place}");
            }
        }
    }
}

/// Whether the bridge listens to what pods join.
fn hear(node: &Node, on: &str) {
    node.enter(&format!("portolan-{VNI}"), &["ip", "link", "set", "br0", "type", "bridge", "mcast_snooping", on]);
}

/// What is set of the network for multicast, without what was learnt.
fn settings(node: &Node) -> String {
    let show = |command: &[&str]| node.enter(&format!("portolan-{VNI}"), command);
    let links = show(&["ip", "-d", "-o", "link", "show"]);
    let words: Vec<_> = links.split_whitespace().collect();
    let names = ["mcast_snooping", "mcast_querier", "mcast_router"];
    let of_links = words.windows(2).filter(|pair| names.contains(&pair[0])).map(|pair| pair.join(" "));
    let others = [show(&["ip", "-o", "address", "show"]), show(&["tc", "qdisc", "show"])];
    of_links.chain(others).collect::<Vec<_>>().join("\n")
}
