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

/// One of Portolan's networks.
pub struct Network {
    pub name: &'static str,
    pub vni: u32,
    pub mtu: u32,
    pub encrypted: bool,
    /// What its addresses begin with.
    pub addresses: [u8; 3],
    /// What its pods' names begin with.
    pub pods: &'static str,
}

/// As most are.
pub const OPEN: Network =
    Network { name: "Portolan", vni: 77, mtu: MTU, encrypted: false, addresses: [10, 32, 0], pods: "open" };

impl Network {
    fn address(&self, last: u8) -> Ipv4Addr {
        let [a, b, c] = self.addresses;
        Ipv4Addr::new(a, b, c, last)
    }

    fn pod(&self, last: u8) -> String {
        format!("{}-{last}", self.pods)
    }
}

/// A way between two ends.
#[derive(Clone)]
pub struct Way {
    pub name: &'static str,
    pub from: End,
    pub to: End,
}

/// Portolan's between two nodes and on one node: its bridge, its tunnel, its ports with their locks and guards, its forwarding entries.
pub async fn portolan(nodes: &[Node; 2], network: &Network) -> Result<[Way; 2]> {
    for node in nodes {
        let spec = NetworkSpec {
            vni: network.vni,
            mtu: network.mtu,
            vtep: node.address.into(),
            subnets: vec![IpNet::new(network.address(0).into(), 24)?],
            port: 7789,
            suppression: false,
            multicast: Multicast::Flood,
            encrypted: network.encrypted,
            gateway: false,
        };
        node.dataplane.ensure_network(&spec).await?;
    }
    let here = [plug(&nodes[0], network, 5).await?, plug(&nodes[0], network, 6).await?];
    let there = [plug(&nodes[1], network, 21).await?];
    tell(network, &nodes[0], &here, &nodes[1], &there).await?;
    tell(network, &nodes[1], &there, &nodes[0], &here).await?;
    let end = |node: &Node, last| node.end(&network.pod(last), network.address(last));
    let (name, one) = (network.name, end(&nodes[0], 5));
    Ok([Way { name, from: one.clone(), to: end(&nodes[1], 21) }, Way { name, from: one, to: end(&nodes[0], 6) }])
}

/// As the agent does it.
async fn plug(node: &Node, network: &Network, last: u8) -> Result<(IpAddr, Mac)> {
    let (pod, address) = (network.pod(last), IpAddr::from(network.address(last)));
    node.netns(&pod)?;
    let mac = endpoint_mac(&network.vni.to_string(), address);
    let port = PortSpec {
        vni: network.vni,
        port: port_name(&pod, "eth1"),
        netns: path(&pod),
        interface: "eth1".into(),
        mac,
        addresses: vec![IpNet::new(address, 24)?],
        mtu: network.mtu,
        resolvers: vec![BRIDGE_ADDRESS],
        locked: true,
        allowed: Allowed::default(),
        bandwidth: Bandwidth::default(),
        gateways: Vec::new(),
    };
    node.dataplane.add_port(&port).await?;
    Ok((address, mac))
}

async fn tell(
    network: &Network,
    node: &Node,
    local: &[(IpAddr, Mac)],
    peer: &Node,
    remote: &[(IpAddr, Mac)],
) -> Result<()> {
    let peers = vec![Peer { vtep: peer.address.into(), endpoints: remote.to_vec() }];
    node.dataplane.forward(network.vni, &Forwarding { local: local.to_vec(), peers, suppression: false }).await?;
    Ok(())
}

/// The same shape by hand, between two nodes and on one node: a bridge in a namespace of its own, VXLAN to the other node,
/// and a forwarding entry for each MAC of the other node.
pub fn by_hand(nodes: &[Node; 2]) -> Result<[Way; 2]> {
    for node in nodes {
        node.netns("hand")?;
        let inside = node.file("hand").display().to_string();
        node.ip("host", &format!("link add pvx type vxlan id 78 local {} dstport 7790 nolearning", node.address))?;
        node.ip("host", &format!("link set pvx netns {inside} name vx0"))?;
    }
    let [across, within] = bridged_by_hand(nodes, "hand", MTU, [10, 33, 0], nodes.each_ref().map(|node| node.address))?;
    Ok([Way { name: "bridge and VXLAN by hand", ..across }, Way { name: "bridge by hand", ..within }])
}

/// A bridge in a namespace of each node, with the VXLAN device `vx0` that is there already, and pods on it; the devices send to these addresses of
/// the nodes.
pub fn bridged_by_hand(
    nodes: &[Node; 2],
    namespace: &str,
    mtu: u32,
    addresses: [u8; 3],
    tunnels: [Ipv4Addr; 2],
) -> Result<[Way; 2]> {
    let [a, b, c] = addresses;
    let pod = |last: u8| (format!("{namespace}-{last}"), Ipv4Addr::new(a, b, c, last));
    for (node, tunnel) in [(&nodes[0], tunnels[1]), (&nodes[1], tunnels[0])] {
        node.ip(namespace, "link add br0 type bridge")?;
        node.ip(namespace, &format!("link set vx0 mtu {mtu} master br0 up"))?;
        node.ip(namespace, "link set br0 up")?;
        node.run_in(namespace, &format!("bridge fdb append 00:00:00:00:00:00 dev vx0 dst {tunnel}"))?;
    }
    for (node, last) in [(0, 5), (0, 6), (1, 21)] {
        let (mac, (pod, address)) = (format!("02:00:00:00:00:{last:02x}"), pod(last));
        pod_by_hand(&nodes[node], namespace, &pod, (address, mtu), Some(&mac))?;
        let far = &nodes[1 - node];
        far.run_in(namespace, &format!("bridge fdb add {mac} dev vx0 dst {} self", tunnels[node]))?;
        far.run_in(namespace, &format!("bridge fdb replace {mac} dev vx0 master static"))?;
    }
    let end = |node: &Node, last| {
        let (pod, address) = pod(last);
        node.end(&pod, address)
    };
    let (name, one) = ("by hand", end(&nodes[0], 5));
    Ok([Way { name, from: one.clone(), to: end(&nodes[1], 21) }, Way { name, from: one, to: end(&nodes[0], 6) }])
}

/// A pod on the bridge `br0` of a namespace.
fn pod_by_hand(
    node: &Node,
    namespace: &str,
    pod: &str,
    (address, mtu): (Ipv4Addr, u32),
    mac: Option<&str>,
) -> Result<()> {
    node.netns(pod)?;
    let inside = node.file(pod).display().to_string();
    let port = format!("p{}", address.to_string().replace('.', ""));
    node.ip(namespace, &format!("link add {port} mtu {mtu} type veth peer name eth1 mtu {mtu} netns {inside}"))?;
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
        pod_by_hand(node, "host", "routed", (Ipv4Addr::new(10, 34, number as u8, 2), MTU), None)?;
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
