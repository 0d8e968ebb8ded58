//! A pod says of itself what is true: its IP addresses, and which MAC they are at.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use portolan_net::{Allowed, BRIDGE_ADDRESS, Mac};

use super::{
    Node, Pod, forward, ipv6, two_nodes,
    wire::{ALL_NODES, ARP, BROADCAST, EXPERIMENTAL, IPV6, Wire, checksum, frame, link_local, to_all_nodes},
};

const VNI: u32 = 77;
const IPV4: u16 = 0x0800;
const VLAN: u16 = 0x8100;
const OWN: Ipv4Addr = Ipv4Addr::new(10, 32, 0, 5);
const FLOATING: Ipv4Addr = Ipv4Addr::new(10, 32, 0, 100);
const FLOATING_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd32, 0, 0, 0, 0, 0, 0, 0x100);
/// IPv6 headers (RFC 8200, section 4): hop-by-hop options, routing, fragment, ICMPv6, destination options.
const HOPS: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;
const OPTIONS: u8 = 60;

type Case = (String, Vec<u8>);

/// A frame that is known by what is at its end, whatever becomes of its tags on the way.
fn case(name: &str, frame: Vec<u8>) -> Case {
    let name = format!("<{name}>");
    let frame = [&frame, name.as_bytes()].concat();
    (name, frame)
}

/// A broadcast datagram of IPv4 (RFC 791, section 3.1).
fn ipv4_payload(source: Ipv4Addr) -> Vec<u8> {
    let start = [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17];
    let ends = [source.octets(), [255; 4]].concat();
    let sum = checksum(&[&start[..], &[0, 0], &ends].concat());
    // From the port of DHCP's clients to that of its servers.
    [&start[..], &sum.to_be_bytes(), &ends, &[0, 68, 0, 67, 0, 8, 0, 0]].concat()
}

fn ipv4(mac: Mac, source: Ipv4Addr) -> Vec<u8> {
    frame(BROADCAST, mac, IPV4, &ipv4_payload(source))
}

/// ARP of an operation, 1 to ask and 2 to answer (RFC 826).
fn arp(mac: Mac, operation: u8, hardware: Mac, sender: Ipv4Addr) -> Vec<u8> {
    let start = [0, 1, 8, 0, 6, 4, 0, operation];
    frame(BROADCAST, mac, ARP, &[&start[..], &hardware.0, &sender.octets(), &[0; 6], &sender.octets()].concat())
}

/// A neighbour advertisement (136) or solicitation (135) for a target (RFC 4861, section 4).
fn discovery(kind: u8, mac: Mac, target: Ipv6Addr) -> Vec<u8> {
    [&[kind, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &mac.0].concat()
}

/// A packet to all nodes, with these headers of eight bytes each before the message, or before what comes last.
fn packet(mac: Mac, source: Ipv6Addr, headers: &[u8], last: u8, message: &[u8]) -> Vec<u8> {
    let mut kinds: Vec<u8> = headers.to_vec();
    kinds.push(last);
    // The options are padding of four bytes; a fragment is the first, and others are to come.
    let extension = |(kind, next): (&u8, &u8)| match *kind {
        FRAGMENT => [*next, 0, 0, 1, 0, 0, 0, 7],
        ROUTING => [*next, 0, 253, 0, 0, 0, 0, 0],
        _ => [*next, 0, 1, 4, 0, 0, 0, 0],
    };
    let extensions: Vec<u8> = headers.iter().zip(&kinds[1..]).flat_map(extension).collect();
    let all_nodes: Ipv6Addr = "ff02::1".parse().unwrap();
    let length = u8::try_from(extensions.len() + message.len()).unwrap();
    let header = [0x60, 0, 0, 0, 0, length, kinds[0], 255];
    let ends = [source.octets(), all_nodes.octets()].concat();
    let mut message = message.to_vec();
    // The bridge drops some multicasts with a wrong checksum itself.
    if last == ICMPV6 {
        let start = [0, 0, 0, u8::try_from(message.len()).unwrap(), 0, 0, 0, ICMPV6];
        let sum = checksum(&[&ends[..], &start, &message].concat());
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    frame(ALL_NODES, mac, IPV6, &[&header[..], &ends, &extensions, &message].concat())
}

/// A frame in these VLANs, the outermost first (IEEE 802.1Q).
fn tagged(vlans: &[u8], inner: &[u8]) -> Vec<u8> {
    let tags = vlans.iter().flat_map(|vlan| [VLAN.to_be_bytes(), [0, *vlan]].concat());
    [&inner[..12], &tags.collect::<Vec<_>>(), &inner[12..]].concat()
}

/// What an honest pod sends.
fn truthful(pod: &Pod<'_>, victim: &Pod<'_>) -> Vec<Case> {
    let (mac, own, local) = (pod.port.mac, pod.ipv6, link_local(pod.port.mac));
    let nobody = Ipv6Addr::UNSPECIFIED;
    let later = [&[ICMPV6, 0, 0, 8, 0, 0, 0, 7][..], &[136; 24]].concat();
    vec![
        case("its IPv4 address", ipv4(mac, OWN)),
        case("no IPv4 address yet", ipv4(mac, Ipv4Addr::UNSPECIFIED)),
        case("an ARP request", arp(mac, 1, mac, OWN)),
        case("an ARP reply", arp(mac, 2, mac, OWN)),
        case("an ARP probe", arp(mac, 1, mac, Ipv4Addr::UNSPECIFIED)),
        case("its IPv6 address", packet(mac, own, &[], 17, &[0; 8])),
        case("its link-local address", packet(mac, local, &[], 17, &[0; 8])),
        case("an advertisement", to_all_nodes(mac, own, &discovery(136, mac, own))),
        case(
            "an advertisement of its link-local address",
            packet(mac, local, &[], ICMPV6, &discovery(136, mac, local)),
        ),
        case("an advertisement after options", packet(mac, own, &[HOPS, OPTIONS], ICMPV6, &discovery(136, mac, own))),
        case("duplicate detection", packet(mac, nobody, &[], ICMPV6, &discovery(135, mac, victim.ipv6))),
        case("a question for a neighbour", packet(mac, own, &[], ICMPV6, &discovery(135, mac, victim.ipv6))),
        case("a listener's report", packet(mac, nobody, &[HOPS], ICMPV6, &[143, 0, 0, 0, 0, 0, 0, 0])),
        case("many headers", packet(mac, own, &[HOPS, OPTIONS, ROUTING, FRAGMENT], 17, &[0; 8])),
        case("a later fragment", packet(mac, own, &[], FRAGMENT, &later)),
        case("no IP", frame(BROADCAST, mac, EXPERIMENTAL, b"")),
        case("PROFINET", frame(BROADCAST, mac, 0x8892, b"")),
        case("a length for a type", frame(BROADCAST, mac, 46, &[0x42, 0x42, 3])),
        case("its address in a VLAN", tagged(&[5], &ipv4(mac, OWN))),
    ]
}

/// What passes for another pod, `victim`.
fn forged(pod: &Pod<'_>, victim: &Pod<'_>) -> Vec<Case> {
    let (mac, own, theirs) = (pod.port.mac, pod.ipv6, victim.port.mac);
    let (address, ipv6) = (victim.address, victim.ipv6);
    let advertisement = discovery(136, mac, ipv6);
    let behind = |headers: &[u8]| packet(mac, own, headers, ICMPV6, &advertisement);
    let mut endless = behind(&[OPTIONS]);
    // The options' length in units of eight bytes, less the first.
    endless[55] = 255;
    // Its sender's IP address is two bytes further on than where an honest one has it.
    let mut long_hardware = arp(mac, 2, mac, OWN);
    long_hardware[18] = 8;
    vec![
        case("an IPv4 address", ipv4(mac, address)),
        case("an IPv4 address of nobody", ipv4(mac, FLOATING)),
        case("an IPv4 address of elsewhere", ipv4(mac, Ipv4Addr::new(192, 0, 2, 7))),
        case("the resolver's address", ipv4(mac, BRIDGE_ADDRESS)),
        case("an ARP request", arp(mac, 1, mac, address)),
        case("an ARP reply", arp(mac, 2, mac, address)),
        case("an ARP reply for the resolver", arp(mac, 2, mac, BRIDGE_ADDRESS)),
        case("an ARP reply with another MAC", arp(mac, 2, theirs, OWN)),
        case("an ARP reply with hardware of 8 bytes", long_hardware),
        case("an IPv6 address", packet(mac, ipv6, &[], 17, &[0; 8])),
        case("an IPv6 address of nobody", packet(mac, FLOATING_IPV6, &[], 17, &[0; 8])),
        case("a link-local address", packet(mac, link_local(theirs), &[], 17, &[0; 8])),
        case("an advertisement by the other", to_all_nodes(mac, ipv6, &advertisement)),
        case("an advertisement", to_all_nodes(mac, own, &advertisement)),
        case(
            "an advertisement of its link-local address",
            packet(mac, own, &[], ICMPV6, &discovery(136, mac, link_local(theirs))),
        ),
        case("an advertisement after hop-by-hop options", behind(&[HOPS])),
        case("an advertisement after options", behind(&[OPTIONS])),
        case("an advertisement after a routing header", behind(&[ROUTING])),
        case("an advertisement in a fragment", behind(&[FRAGMENT])),
        case("an advertisement after four headers", behind(&[HOPS, OPTIONS, ROUTING, FRAGMENT])),
        case("an advertisement after five headers", behind(&[HOPS, OPTIONS, ROUTING, FRAGMENT, OPTIONS])),
        case("an advertisement after options without end", endless),
        case("in VLAN 0", tagged(&[0], &ipv4(mac, address))),
        case("in VLAN 5", tagged(&[5], &packet(mac, ipv6, &[], 17, &[0; 8]))),
        case("in VLAN 0 in VLAN 0", tagged(&[0, 0], &arp(mac, 2, mac, address))),
    ]
}

/// Sends frames, and says which of them arrive at each pod before an honest one that comes last.
fn arrived(from: &Pod<'_>, to: &[&Pod<'_>], cases: &[Case]) -> Vec<Vec<String>> {
    let mut wires: Vec<_> = to.iter().map(|pod| Wire::open(pod)).collect();
    let mut wire = Wire::open(from);
    let last = frame(BROADCAST, from.port.mac, EXPERIMENTAL, b"after all");
    for frame in cases.iter().map(|(_, frame)| frame).chain([&last]) {
        wire.send(frame);
    }
    let seen_by = |wire: &mut Wire| {
        let seen = wire.until(&last).expect("the last frame");
        let is_seen = |name: &str| seen.iter().any(|frame| frame.windows(name.len()).any(|w| w == name.as_bytes()));
        cases.iter().map(|(name, _)| name.clone()).filter(|name| is_seen(name)).collect()
    };
    wires.iter_mut().map(seen_by).collect()
}

fn names(cases: &[Case]) -> Vec<String> {
    cases.iter().map(|(name, _)| name.clone()).collect()
}

/// Two nodes with the network, and what is done with a pod of the first, a neighbour of its and a pod of the other.
async fn on_two_nodes(allowed: Allowed, work: impl AsyncFnOnce(&Node, &Pod<'_>, [&Pod<'_>; 2])) {
    let (a, b) = two_nodes();
    for node in [&a, &b] {
        node.dataplane.ensure_network(&node.spec(VNI, false)).await.unwrap();
    }
    let pod = a.plug_allowed(VNI, "pod", 5, allowed).await;
    let (neighbour, remote) = (a.plug(VNI, "neighbour", 6).await, b.plug(VNI, "remote", 21).await);
    forward(&a, VNI, &[&pod, &neighbour], &b, &[&remote], false).await;
    forward(&b, VNI, &[&remote], &a, &[&pod, &neighbour], false).await;
    work(&a, &pod, [&neighbour, &remote]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_does_not_pass_for_another() {
    on_two_nodes(Allowed::default(), async |node, pod, others| {
        for victim in others {
            let (truthful, forged) = (truthful(pod, victim), forged(pod, victim));
            assert_eq!(arrived(pod, &others, &truthful), [names(&truthful), names(&truthful)]);
            assert_eq!(arrived(pod, &others, &forged), [vec![], Vec::<String>::new()]);
            // The same pod without its guard: the frames do arrive, so their absence above was the guard's doing.
            let mut free = pod.port.clone();
            free.allowed = Allowed::Any;
            for port in [&free, &pod.port] {
                node.dataplane.add_port(port).await.unwrap();
                node.dataplane.check_port(port).await.unwrap();
                let expected = if *port == free { names(&forged) } else { vec![] };
                assert_eq!(arrived(pod, &others, &forged), [expected.clone(), expected]);
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_are_allowed_can_be_used_and_no_others() {
    let further: Vec<IpNet> = vec!["10.32.0.96/28".parse().unwrap(), IpNet::from(IpAddr::from(FLOATING_IPV6))];
    on_two_nodes(Allowed::Further(further), async |_, pod, others| {
        let mac = pod.port.mac;
        let of = |address: Ipv4Addr, second: Ipv6Addr| {
            vec![
                case("IPv4", ipv4(mac, address)),
                case("gratuitous ARP", arp(mac, 1, mac, address)),
                case("ARP reply", arp(mac, 2, mac, address)),
                case("IPv6", packet(mac, second, &[], 17, &[0; 8])),
                case("advertisement", to_all_nodes(mac, second, &discovery(136, mac, second))),
                case("advertisement from elsewhere", to_all_nodes(mac, pod.ipv6, &discovery(136, mac, second))),
            ]
        };
        let allowed = of(FLOATING, FLOATING_IPV6);
        assert_eq!(arrived(pod, &others, &allowed), [names(&allowed), names(&allowed)]);
        let beside = of(Ipv4Addr::new(10, 32, 0, 112), ipv6(0xff));
        assert_eq!(arrived(pod, &others, &beside), [vec![], Vec::<String>::new()]);
        let own = truthful(pod, others[1]);
        assert_eq!(arrived(pod, &others, &own), [names(&own), names(&own)], "and its own as before");
        let forged = forged(pod, others[1]).into_iter().filter(|(name, _)| !name.contains("of nobody"));
        assert_eq!(arrived(pod, &others, &forged.collect::<Vec<_>>()), [vec![], Vec::<String>::new()]);
    })
    .await;
}

/// As many as the annotation may have, each as long as can be: the kernel takes the program, and shows it.
#[tokio::test(flavor = "multi_thread")]
async fn the_longest_list_and_the_widest_subnets_work() {
    let (a, _b) = two_nodes();
    a.dataplane.ensure_network(&a.spec(VNI, false)).await.unwrap();
    let listener = a.plug(VNI, "listener", 6).await;
    let eight = (1..=8).map(|n| IpNet::from(IpAddr::from(Ipv6Addr::new(0xfd33, 1, 2, 3, 4, 5, 6, n)))).collect();
    let pod = a.plug_allowed(VNI, "pod", 5, Allowed::Further(eight)).await;
    a.dataplane.check_port(&pod.port).await.unwrap();
    let of = |n| case("one", packet(pod.port.mac, Ipv6Addr::new(0xfd33, 1, 2, 3, 4, 5, 6, n), &[], 17, &[0; 8]));
    assert_eq!(arrived(&pod, &[&listener], &[of(8)]), [["<one>"]]);
    assert_eq!(arrived(&pod, &[&listener], &[of(9)]), [Vec::<String>::new()]);
    let all = vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()];
    let pod = a.plug_allowed(VNI, "pod", 5, Allowed::Further(all)).await;
    let cases = [of(9), case("two", ipv4(pod.port.mac, BRIDGE_ADDRESS))];
    assert_eq!(arrived(&pod, &[&listener], &cases), [["<one>", "<two>"]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_misses_each_part_of_the_guard() {
    let (a, _b) = two_nodes();
    a.dataplane.ensure_network(&a.spec(VNI, false)).await.unwrap();
    let pod = a.plug(VNI, "pod", 5).await;
    let network = format!("portolan-{VNI}");
    let port = pod.port.port.as_str();
    let mut free = pod.port.clone();
    // As a port that a release before the guard has made.
    free.allowed = Allowed::Any;
    let mut wider = pod.port.clone();
    wider.allowed = Allowed::Further(vec![IpNet::from(IpAddr::from(FLOATING))]);
    let tamper: [&[&str]; 4] = [
        &["qdisc", "del", "dev", port, "ingress"],
        &["filter", "del", "dev", port, "ingress", "prio", "1"],
        &["filter", "del", "dev", port, "ingress", "prio", "2"],
        &[
            "filter",
            "replace",
            "dev",
            port,
            "ingress",
            "prio",
            "1",
            "protocol",
            "all",
            "handle",
            "1",
            "bpf",
            "bytecode",
            "1,6 0 0 4294967295,",
        ],
    ];
    let expected = format!("port {port} is not held to its pod's addresses (in /run/netns/portolan-{VNI})");
    let refused = async |spec| a.dataplane.check_port(spec).await.unwrap_err().to_string();
    for arguments in tamper {
        a.enter(&network, &[&["tc"], arguments].concat());
        assert_eq!(refused(&pod.port).await, expected, "{arguments:?}");
        a.dataplane.add_port(&pod.port).await.unwrap();
        a.dataplane.check_port(&pod.port).await.unwrap();
    }
    for other in [&free, &wider] {
        assert_eq!(refused(other).await, expected);
        a.dataplane.add_port(other).await.unwrap();
        a.dataplane.check_port(other).await.unwrap();
        assert_eq!(refused(&pod.port).await, expected);
        for _ in 0..2 {
            a.dataplane.add_port(&pod.port).await.unwrap();
        }
        a.dataplane.check_port(&pod.port).await.unwrap();
    }
    // It goes with the port.
    a.dataplane.remove_port(VNI, port, &pod.port.addresses).await.unwrap();
    let left = a.enter(&network, &["tc", "qdisc", "show"]);
    assert!(!left.contains("ingress"), "{left}");
}
