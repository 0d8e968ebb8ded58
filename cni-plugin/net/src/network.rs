//! Setting a network up on a node, and taking it down.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use netlink_packet_route::link::{InfoData, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVxlan};

use std::os::fd::AsRawFd;

use crate::{
    BRIDGE, BRIDGE_ADDRESS, BRIDGE_MAC, Dataplane, TUNNEL,
    bandwidth::is_shaper_name,
    dataplane::namespace_path,
    error::Result,
    mac::is_port_name,
    multicast::{self, Multicast},
    namespace::Namespace,
    netlink::{Netlink, link_name},
    sysctl,
};

/// What a network looks like on a node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NetworkSpec {
    /// The VXLAN network identifier.
    pub vni: u32,
    /// MTU of the pods' interfaces in bytes.
    pub mtu: u32,
    /// This node's address on the underlay.
    pub vtep: IpAddr,
    /// The network's subnets, of either family.
    pub subnets: Vec<IpNet>,
    /// UDP port of the tunnels, the same on all nodes.
    pub port: u16,
    /// Whether the bridge answers ARP and neighbour discovery for endpoints it knows, instead of flooding the question to the other
    /// nodes.
    pub suppression: bool,
    /// Where IP multicast goes.
    pub multicast: Multicast,
    /// Whether its packets leave by WireGuard alone ([`Dataplane::ensure_encryption`]).
    pub encrypted: bool,
    /// Whether it has a gateway, or is to get one ([`Dataplane::ensure_egress`]).
    pub gateway: bool,
}

impl NetworkSpec {
    /// UDP port of this network's tunnel. An encrypted network has another, so that a device that was made from the host's namespace is never
    /// taken for one that encrypts; no other node sees it.
    fn tunnel_port(&self) -> u16 {
        if self.encrypted { self.port ^ 1 } else { self.port }
    }
}

/// Before its interfaces: nobody is told of a shorter way than by the gateway, nothing has an IPv6 address (each node's bridge would have the same
/// link-local one), and frames are not sent through the host's firewall.
const NAMESPACE_SYSCTLS: [(&str, &str); 9] = [
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv6/conf/all/disable_ipv6", "1"),
    ("ipv6/conf/default/disable_ipv6", "1"),
    ("bridge/bridge-nf-call-iptables", "0"),
    ("bridge/bridge-nf-call-ip6tables", "0"),
    ("bridge/bridge-nf-call-arptables", "0"),
];

/// Nothing is routed. A namespace has the host's setting at first; one that has a gateway gets it when its rules are there.
pub(crate) const ROUTES_NOTHING: [(&str, &str); 2] = [("ipv4/ip_forward", "0"), ("ipv6/conf/all/forwarding", "0")];

/// The bridge answers no ARP at all: pods have a permanent neighbour for its address, and an answer to a pod of another node
/// would cross the tunnel with a source address that each node's bridge has. One that is a gateway does, by rules that keep it from there.
pub(crate) const ARP: &str = "ipv4/conf/br0/arp_ignore";
pub(crate) const NO_ARP: &str = "8";
pub(crate) const OWN_ARP: &str = "1";

/// For suppression it has IPv6, without which the kernel takes no neighbours of that family; but no address, nor ever gets one by itself. For
/// snooping, and as a gateway, it has IPv6 and a link-local address.
const BRIDGE_SYSCTLS: [(&str, &str); 4] = [
    ("ipv4/conf/br0/send_redirects", "0"),
    ("ipv4/conf/br0/rp_filter", "0"),
    ("ipv6/conf/br0/addr_gen_mode", "1"),
    ("ipv6/conf/br0/accept_ra", "0"),
];

impl Dataplane {
    /// Makes the network what the spec says.
    ///
    /// # Errors
    /// What the kernel refuses; what was made by then stays, for the next try.
    pub async fn ensure_network(&self, spec: &NetworkSpec) -> Result<()> {
        let namespace = Namespace::ensure(self.root(), &namespace_path(spec.vni))?;
        sysctl::set(&namespace, &NAMESPACE_SYSCTLS)?;
        let netlink = Netlink::open(&namespace)?;
        if !spec.gateway || netlink.link(BRIDGE).await?.is_none() {
            sysctl::set(&namespace, &ROUTES_NOTHING)?;
        }
        let loopback = netlink.index("lo").await?;
        netlink.set_link(LinkUnspec::new_with_index(loopback).up().build(), "bring lo up").await?;
        let bridge = ensure_bridge(&netlink, &namespace, spec).await?;
        let underlay = if spec.encrypted { self.encrypted_underlay()? } else { self.underlay()? };
        let underlay = Netlink::open(&underlay)?;
        ensure_tunnel(&netlink, &underlay, &namespace, spec, bridge).await?;
        start_bridge(&netlink, bridge, spec).await?;
        multicast::set(&netlink, bridge, spec.multicast, spec.gateway).await
    }

    /// Removes all that this node has of a network, ports included.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn remove_network(&self, vni: u32) -> Result<()> {
        let path = namespace_path(vni);
        if !Namespace::is_gone(self.root(), &path) {
            self.remove_egress(vni, &[]).await?;
            // By hand: a socket that is still open would keep the namespace, and with it the VNI, in use.
            let netlink = Netlink::open(&Namespace::open(self.root(), &path)?)?;
            for link in netlink.links().await? {
                let name = link_name(&link).unwrap_or_default();
                let is_pods = is_port_name(name) || is_shaper_name(name);
                if name == TUNNEL || name == BRIDGE || name == pending_name(vni) || is_pods {
                    netlink.remove_link(name).await?;
                }
            }
        }
        Namespace::remove(self.root(), &path)
    }
}

async fn ensure_bridge(netlink: &Netlink, namespace: &Namespace, spec: &NetworkSpec) -> Result<u32> {
    let mac = BRIDGE_MAC.0.to_vec();
    if netlink.link(BRIDGE).await?.is_none() {
        let bridge = LinkBridge::new(BRIDGE).address(mac.clone()).build();
        netlink.add_link(bridge, "make bridge br0").await?;
    }
    let index = netlink.index(BRIDGE).await?;
    let wanted = LinkUnspec::new_with_index(index).address(mac).mtu(spec.mtu).build();
    netlink.set_link(wanted, format!("set bridge br0's MTU to {}", spec.mtu)).await?;
    sysctl::set(namespace, &BRIDGE_SYSCTLS)?;
    if !spec.gateway || sysctl::get(namespace, ARP)?.as_deref() != Some(OWN_ARP) {
        sysctl::set(namespace, &[(ARP, NO_ARP)])?;
    }
    let has_ipv6_gateway = spec.gateway && spec.subnets.iter().any(|subnet| matches!(subnet, IpNet::V6(_)));
    let needs_ipv6 = spec.suppression || spec.multicast == Multicast::Snooping || has_ipv6_gateway;
    let without_ipv6 = if needs_ipv6 { "0" } else { "1" };
    sysctl::set(namespace, &[("ipv6/conf/br0/disable_ipv6", without_ipv6)])?;
    netlink.add_address(index, Ipv4Net::from(BRIDGE_ADDRESS).into()).await?;
    Ok(index)
}

/// Last, with vx0 in it: a bridge that comes up empty has no carrier, and the kernel then takes up to a second to let it send.
async fn start_bridge(netlink: &Netlink, index: u32, spec: &NetworkSpec) -> Result<()> {
    netlink.set_link(LinkUnspec::new_with_index(index).up().build(), "bring br0 up").await?;
    // Only IPv4: that is what the resolver answers in.
    for subnet in &spec.subnets {
        if let IpNet::V4(subnet) = subnet {
            netlink.add_link_route(index, *subnet).await?;
        }
    }
    Ok(())
}

async fn ensure_tunnel(
    netlink: &Netlink,
    underlay: &Netlink,
    namespace: &Namespace,
    spec: &NetworkSpec,
    bridge: u32,
) -> Result<()> {
    let pending = pending_name(spec.vni);
    if let Some(link) = netlink.link(TUNNEL).await?
        && !is_vxlan(&link, spec.vni, spec.vtep, spec.tunnel_port())
    {
        netlink.remove_link(TUNNEL).await?;
    }
    if netlink.link(TUNNEL).await?.is_none() {
        netlink.remove_link(&pending).await?;
        // Made from the underlay's namespace, which stays the one its packets leave by, straight into the network's. Kernels before
        // 6.14 look for the name in the former, hence the name that can't be there, and the second step.
        let tunnel = vxlan(&pending, spec.vni, spec.vtep, spec.tunnel_port());
        let tunnel = tunnel.mtu(spec.mtu).setns_by_fd(namespace.as_raw_fd()).build();
        let action =
            format!("make VXLAN device with VNI {} from {} to port {}", spec.vni, spec.vtep, spec.tunnel_port());
        underlay.add_link(tunnel, action).await?;
        let index = netlink.index(&pending).await?;
        netlink.set_link(LinkUnspec::new_with_index(index).name(TUNNEL).build(), "name the VXLAN device vx0").await?;
    }
    let index = netlink.index(TUNNEL).await?;
    let wanted = LinkUnspec::new_with_index(index).mtu(spec.mtu).controller(bridge).up().build();
    netlink.set_link(wanted, format!("plug vx0 into br0 with MTU {}", spec.mtu)).await?;
    // What is behind the tunnel is told by the forwarding entries, never learnt.
    let port = LinkBridgePort::new(index).learning(false).neigh_suppress(spec.suppression).build();
    let set = netlink.handle().link().set_port(port).execute().await;
    set.map_err(|e| netlink.error("set vx0's bridge port", e))
}

/// The name of a VXLAN device while it is being made.
fn pending_name(vni: u32) -> String {
    format!("pvx{vni}")
}

/// A VXLAN device that sends from an address to those of the same family. Over IPv6 its packets have UDP checksums, as they have to (RFC 8200,
/// section 8.1): the kernel drops those that come without.
pub(crate) fn vxlan(name: &str, vni: u32, vtep: IpAddr, port: u16) -> LinkMessageBuilder<LinkVxlan> {
    let device = LinkVxlan::new(name, vni).port(port).learning(false);
    match vtep {
        IpAddr::V4(vtep) => device.local(vtep),
        IpAddr::V6(vtep) => device.local6(vtep),
    }
}

/// Whether a link is a VXLAN device that is so; what can be changed in place isn't compared.
pub(crate) fn is_vxlan(link: &LinkMessage, vni: u32, vtep: IpAddr, port: u16) -> bool {
    let facts = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|i| match i {
            LinkInfo::Data(InfoData::Vxlan(facts)) => Some(facts),
            _ => None,
        }),
        _ => None,
    });
    let Some(facts) = facts else { return false };
    let local = match vtep {
        IpAddr::V4(vtep) => InfoVxlan::Local(vtep),
        IpAddr::V6(vtep) => InfoVxlan::Local6(vtep),
    };
    facts.contains(&InfoVxlan::Id(vni)) && facts.contains(&local) && facts.contains(&InfoVxlan::Port(port))
}
