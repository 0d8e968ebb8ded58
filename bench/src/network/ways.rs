//! The ways from pod to pod that are compared: Portolan's, made by its own code, and those made by hand with `ip`.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use ipnet::IpNet;
use portolan_net::{
    Allowed, BRIDGE_ADDRESS, Bandwidth, Forwarding, Mac, Multicast, NetworkSpec, Peer, PortSpec, endpoint_mac,
    port_name,
};

use crate::nodes::{End, Node, path};

/// What pods have behind VXLAN on an Ethernet of 1500 bytes.
const MTU: u32 = 1450;
const VNI: u32 = 77;

/// A way between two ends.
pub struct Way {
    pub name: &'static str,
    pub from: End,
    pub to: End,
}

/// Portolan's between two nodes and on one node: its bridge, its tunnel, its ports with their locks and guards, its forwarding entries.
pub async fn portolan(nodes: &[Node; 2]) -> Result<[Way; 2]> {
    let subnet: IpNet = "10.32.0.0/24".parse()?;
    for node in nodes {
        let spec = NetworkSpec {
            vni: VNI,
            mtu: MTU,
            vtep: node.address,
            subnets: vec![subnet],
            port: 7789,
            suppression: false,
            multicast: Multicast::Flood,
            encrypted: false,
            gateway: false,
        };
        node.dataplane.ensure_network(&spec).await?;
    }
    let here = [plug(&nodes[0], "one", 5).await?, plug(&nodes[0], "neighbour", 6).await?];
    let there = [plug(&nodes[1], "two", 21).await?];
    tell(&nodes[0], &here, &nodes[1], &there).await?;
    tell(&nodes[1], &there, &nodes[0], &here).await?;
    let [one, neighbour] = [("one", 5), ("neighbour", 6)].map(|(pod, last)| nodes[0].end(pod, address(last)));
    Ok([
        Way { name: "Portolan", from: one.clone(), to: nodes[1].end("two", address(21)) },
        Way { name: "Portolan", from: one, to: neighbour },
    ])
}

fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 32, 0, last)
}

/// As the agent does it.
async fn plug(node: &Node, pod: &str, last: u8) -> Result<(IpAddr, Mac)> {
    node.netns(pod)?;
    let address: IpAddr = address(last).into();
    let mac = endpoint_mac(&VNI.to_string(), address);
    let port = PortSpec {
        vni: VNI,
        port: port_name(pod, "eth1"),
        netns: path(pod),
        interface: "eth1".into(),
        mac,
        addresses: vec![IpNet::new(address, 24)?],
        mtu: MTU,
        resolvers: vec![BRIDGE_ADDRESS],
        locked: true,
        allowed: Allowed::default(),
        bandwidth: Bandwidth::default(),
        gateways: Vec::new(),
    };
    node.dataplane.add_port(&port).await?;
    Ok((address, mac))
}

async fn tell(node: &Node, local: &[(IpAddr, Mac)], peer: &Node, remote: &[(IpAddr, Mac)]) -> Result<()> {
    let peers = vec![Peer { vtep: peer.address, endpoints: remote.to_vec() }];
    node.dataplane.forward(VNI, &Forwarding { local: local.to_vec(), peers, suppression: false }).await?;
    Ok(())
}

/// The same shape by hand, between two nodes and on one node: a bridge in a namespace of its own, VXLAN to the other node,
/// and a forwarding entry for each MAC of the other node.
pub fn by_hand(nodes: &[Node; 2]) -> Result<[Way; 2]> {
    for (node, peer) in [(&nodes[0], &nodes[1]), (&nodes[1], &nodes[0])] {
        node.netns("hand")?;
        let inside = node.file("hand").display().to_string();
        node.ip("host", &format!("link add pvx type vxlan id 78 local {} dstport 7790 nolearning", node.address))?;
        node.ip("host", &format!("link set pvx netns {inside} name vx0"))?;
        node.ip("hand", "link add br0 type bridge")?;
        node.ip("hand", &format!("link set vx0 mtu {MTU} master br0 up"))?;
        node.ip("hand", "link set br0 up")?;
        node.run_in("hand", &format!("bridge fdb append 00:00:00:00:00:00 dev vx0 dst {}", peer.address))?;
    }
    for (node, pod, last) in [(0, "hand-one", 5), (0, "hand-neighbour", 6), (1, "hand-two", 21)] {
        let mac = format!("02:00:00:00:00:{last:02x}");
        pod_by_hand(&nodes[node], "hand", pod, &format!("10.33.0.{last}"), Some(&mac))?;
        let [near, far] = [&nodes[node], &nodes[1 - node]];
        far.run_in("hand", &format!("bridge fdb add {mac} dev vx0 dst {} self", near.address))?;
        far.run_in("hand", &format!("bridge fdb add {mac} dev vx0 master static"))?;
    }
    let end = |node: &Node, pod: &str, last| node.end(pod, Ipv4Addr::new(10, 33, 0, last));
    let one = end(&nodes[0], "hand-one", 5);
    Ok([
        Way { name: "bridge and VXLAN by hand", from: one.clone(), to: end(&nodes[1], "hand-two", 21) },
        Way { name: "bridge by hand", from: one, to: end(&nodes[0], "hand-neighbour", 6) },
    ])
}

/// A pod on the bridge `br0` of a namespace.
fn pod_by_hand(node: &Node, namespace: &str, pod: &str, address: &str, mac: Option<&str>) -> Result<()> {
    node.netns(pod)?;
    let inside = node.file(pod).display().to_string();
    let port = format!("p{}", address.replace('.', ""));
    node.ip(namespace, &format!("link add {port} mtu {MTU} type veth peer name eth1 mtu {MTU} netns {inside}"))?;
    node.ip(namespace, &format!("link set {port} master br0 up"))?;
    if let Some(mac) = mac {
        node.ip(pod, &format!("link set eth1 address {mac}"))?;
    }
    node.ip(pod, &format!("address add {address}/24 dev eth1"))?;
    node.ip(pod, "link set eth1 up")
}

/// As Flannel's backend `vxlan` does it: a bridge and a subnet per node, and routes to the other nodes' subnets by a VXLAN device
/// of the node.
pub fn routed(nodes: &[Node; 2]) -> Result<Way> {
    for (number, node) in [(1, &nodes[0]), (2, &nodes[1])] {
        let (other, peer) = (3 - number, &nodes[2 - number]);
        node.run_in("host", "sysctl -qw net.ipv4.ip_forward=1")?;
        node.ip("host", &format!("link add fl type vxlan id 1 local {} dstport 8472 nolearning", node.address))?;
        node.ip("host", &format!("link set fl address 02:00:00:00:01:{number:02x} mtu {MTU} up"))?;
        node.ip("host", &format!("address add 10.34.{number}.0/32 dev fl"))?;
        node.ip("host", "link add br0 type bridge")?;
        node.ip("host", &format!("address add 10.34.{number}.1/24 dev br0"))?;
        node.ip("host", "link set br0 up")?;
        let mac = format!("02:00:00:00:01:{other:02x}");
        node.ip("host", &format!("route add 10.34.{other}.0/24 via 10.34.{other}.0 dev fl onlink"))?;
        node.ip("host", &format!("neighbour add 10.34.{other}.0 lladdr {mac} dev fl nud permanent"))?;
        node.run_in("host", &format!("bridge fdb add {mac} dev fl dst {} self", peer.address))?;
        pod_by_hand(node, "host", "routed", &format!("10.34.{number}.2"), None)?;
        node.ip("routed", &format!("route add default via 10.34.{number}.1"))?;
    }
    let [from, to] = [1, 2].map(|number| nodes[number - 1].end("routed", Ipv4Addr::new(10, 34, number as u8, 2)));
    Ok(Way { name: "routed VXLAN per node", from, to })
}

/// The least that a way between pods of two nodes can do that carries frames as they are: a pair of veth for each pod, a wire of its own between the
/// nodes, and each packet is sent on where it comes out (tc-mirred(8)), without bridge, route, lock or guard.
pub fn redirected(nodes: &[Node; 2]) -> Result<Way> {
    let other = nodes[1].file("host").display().to_string();
    nodes[0].ip("host", &format!("link add u1 mtu {MTU} type veth peer name u1 mtu {MTU} netns {other}"))?;
    let (pod, port) = ("redirected", "r1");
    let [address, mac] = [|last| format!("10.35.0.{last}"), |last| format!("02:00:00:00:02:{last:02x}")];
    for (own, others, node) in [(1, 2, &nodes[0]), (2, 1, &nodes[1])] {
        node.netns(pod)?;
        let inside = node.file(pod).display().to_string();
        node.ip("host", &format!("link add {port} mtu {MTU} type veth peer name eth1 mtu {MTU} netns {inside}"))?;
        node.ip(pod, &format!("link set eth1 address {} up", mac(own)))?;
        node.ip(pod, &format!("address add {}/24 dev eth1", address(own)))?;
        node.ip(pod, &format!("neighbour add {} lladdr {} dev eth1 nud permanent", address(others), mac(others)))?;
        for (from, to, which) in [(port, "u1", address(others)), ("u1", port, address(own))] {
            node.ip("host", &format!("link set {from} up"))?;
            node.run_in("host", &format!("tc qdisc add dev {from} clsact"))?;
            let filter = format!("tc filter add dev {from} ingress protocol ip u32 match ip dst {which}/32");
            node.run_in("host", &format!("{filter} action mirred egress redirect dev {to}"))?;
        }
    }
    let [from, to] = [1, 2].map(|number| nodes[number - 1].end(pod, Ipv4Addr::new(10, 35, 0, number as u8)));
    Ok(Way { name: "redirected, without encapsulation", from, to })
}

/// The wire itself, from node to node.
pub fn raw(nodes: &[Node; 2]) -> Way {
    let [from, to] = [0, 1].map(|number| nodes[number].end("host", nodes[number].address));
    Way { name: "raw veth pair", from, to }
}
