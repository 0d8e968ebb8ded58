//! Plugging a pod into a network, and unplugging it.

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{
        BridgePortState, InfoBridgePort, InfoData, InfoPortData, InfoVeth, LinkAttribute, LinkFlags, LinkInfo,
        LinkMessage,
    },
};
use rtnetlink::{
    LinkBridgePort, LinkUnspec, LinkVeth,
    packet_core::{NLM_F_CREATE, NLM_F_REPLACE},
};

use crate::{
    Allowed, BRIDGE, BRIDGE_MAC, Bandwidth, Dataplane, Mac, bandwidth, default_route,
    error::{Error, Result},
    forwarding::{bridge_entry, neighbour, neighbour_to_remove},
    guard,
    mac::is_port_name,
    namespace::Namespace,
    netlink::{Netlink, link_facts, link_name},
    removal, sysctl,
};

/// How long the kernel may take to let frames through a port that is up at both ends.
const FORWARDING_PATIENCE: Duration = Duration::from_secs(3);
/// The least MTU of an interface that carries IPv6, in bytes (RFC 8200, section 5).
pub(crate) const IPV6_LEAST_MTU: u32 = 1280;
/// How often it is asked.
const FORWARDING_POLL: Duration = Duration::from_millis(1);

/// One pod's port on a network.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PortSpec {
    /// The network.
    pub vni: u32,
    /// The port's name in the network's namespace ([`crate::port_name`]).
    pub port: String,
    /// The pod's network namespace, as the host sees it.
    pub netns: PathBuf,
    /// The interface's name in the pod.
    pub interface: String,
    /// The interface's MAC.
    pub mac: Mac,
    /// The interface's addresses, of either family, each with the prefix length of its subnet.
    pub addresses: Vec<IpNet>,
    /// The interface's MTU in bytes.
    pub mtu: u32,
    /// At which addresses the pod reaches the node's DNS server by this interface; none if it isn't its first one.
    pub resolvers: Vec<Ipv4Addr>,
    /// Whether frames with another source MAC than the port's own are dropped.
    pub locked: bool,
    /// What addresses the pod may use beside its own.
    pub allowed: Allowed,
    /// How fast the pod may receive and send by this interface.
    pub bandwidth: Bandwidth,
    /// By whom it reaches what is on none of its networks, at most one of a family: addresses on this one.
    pub gateways: Vec<IpAddr>,
}

impl Dataplane {
    /// Plugs a pod in. A port that is there already is made what the spec says, and stays whatever fails: its pod may be using
    /// it. Of a new one nothing is left after a failure.
    ///
    /// # Errors
    /// What the kernel refuses, or a namespace that isn't there.
    pub async fn add_port(&self, spec: &PortSpec) -> Result<()> {
        // A smaller one takes all IPv6 addresses from an interface that has some.
        if let Some(&address) = spec.addresses.iter().find(|a| matches!(a, IpNet::V6(_)))
            && spec.mtu < IPV6_LEAST_MTU
        {
            return Err(Error::MtuTooSmall { mtu: spec.mtu, address, interface: spec.interface.clone() });
        }
        let namespace = self.namespace(spec.vni)?;
        let network = Netlink::open(&namespace)?;
        let pod_namespace = Namespace::open(self.root(), &spec.netns)?;
        let pod = Netlink::open(&pod_namespace)?;
        let mut is_new = false;
        let added = async {
            is_new = ensure_veth(&network, &pod, &pod_namespace, spec).await?;
            plug(&network, spec).await?;
            configure_pod(&pod, &pod_namespace, spec).await?;
            wait_until_forwarding(&network, spec).await
        };
        let result = added.await;
        if let Err(e) = &result
            && is_new
            && let Err(second) = self.remove_links(spec.vni, &namespace, &spec.port).await
        {
            tracing::warn!(error = %second, cause = %e, port = spec.port, "a port that could not be set up could not be removed either");
        }
        result
    }

    /// Unplugs a port, from the network's side only: the pod's namespace may be gone. Neighbours of
    /// addresses that aren't given are left to [`Dataplane::forward`].
    ///
    /// # Errors
    /// What the kernel refuses. A network or a port that isn't there is no error.
    pub async fn remove_port(&self, vni: u32, port: &str, addresses: &[IpNet]) -> Result<()> {
        let namespace = match self.namespace(vni) {
            Err(Error::NoNetwork { .. }) => return Ok(()),
            other => other?,
        };
        self.remove_links(vni, &namespace, port).await?;
        let mut addresses = ipv4(addresses).peekable();
        if addresses.peek().is_none() {
            return Ok(());
        }
        let network = Netlink::open(&namespace)?;
        if let Some(bridge) = network.link(BRIDGE).await? {
            for address in addresses {
                remove_neighbour(&network, bridge.header.index, address).await?;
            }
        }
        Ok(())
    }

    async fn remove_links(&self, vni: u32, namespace: &Namespace, port: &str) -> Result<()> {
        let links = vec![port.to_owned(), bandwidth::shaper_name(port)];
        self.removals().remove(vni, namespace, links).await
    }

    /// The names of a network's ports; none if it isn't set up here.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn ports(&self, vni: u32) -> Result<Vec<String>> {
        let namespace = match self.namespace(vni) {
            Err(Error::NoNetwork { .. }) => return Ok(Vec::new()),
            other => other?,
        };
        let links = Netlink::open(&namespace)?.links().await?;
        Ok(links.iter().filter_map(link_name).filter(|n| is_port_name(n)).map(str::to_owned).collect())
    }

    /// Whether a pod's interface is there and up with its addresses, plugged in, locked, guarded and limited as the spec says, with the options of its port: what CNI's CHECK asks.
    ///
    /// # Errors
    /// What is missing, or what the kernel refuses.
    pub async fn check_port(&self, spec: &PortSpec) -> Result<()> {
        let network = Netlink::open(&self.namespace(spec.vni)?)?;
        let bridge = network.index(BRIDGE).await?;
        let missing =
            |link: &str, place: &Path| Error::NoLink { link: link.to_owned(), place: place.display().to_string() };
        let port = network.link(&spec.port).await?.filter(|l| link_facts(l).2 == Some(bridge));
        let port = port.ok_or_else(|| missing(&spec.port, Path::new(network.place())))?;
        check_up(&port, &spec.port, Path::new(network.place()))?;
        check_lock(&network, &port, spec)?;
        check_options(&network, &port, spec)?;
        let shaper = bandwidth::check(&network, port.header.index, spec).await?;
        guard::check(&network, port.header.index, spec, shaper).await?;
        let pod = Netlink::open(&Namespace::open(self.root(), &spec.netns)?)?;
        let inside = pod.link(&spec.interface).await?.filter(|l| link_facts(l).0 == Some(spec.mac.0.as_slice()));
        let inside = inside.ok_or_else(|| missing(&spec.interface, &spec.netns))?;
        check_up(&inside, &spec.interface, &spec.netns)?;
        default_route::check(&pod, inside.header.index, spec).await?;
        let present = pod.addresses(inside.header.index).await?;
        match spec.addresses.iter().find(|wanted| !present.contains(*wanted)) {
            Some(&address) => {
                Err(Error::NoAddress { address, interface: spec.interface.clone(), netns: spec.netns.clone() })
            }
            None => Ok(()),
        }
    }
}

/// Returns whether the port had to be made.
pub(crate) async fn ensure_veth(
    network: &Netlink,
    pod: &Netlink,
    namespace: &Namespace,
    spec: &PortSpec,
) -> Result<bool> {
    let inside = pod.link(&spec.interface).await?;
    let ours = inside.as_ref().is_some_and(|l| link_facts(l).0 == Some(spec.mac.0.as_slice()));
    if network.link(&spec.port).await?.is_some() {
        if ours {
            return Ok(false);
        }
        // Of an earlier try with another identity. The pod's end goes with it.
        network.remove_link(&spec.port).await?;
    }
    if pod.link(&spec.interface).await?.is_some() {
        return Err(Error::InterfaceTaken { interface: spec.interface.clone(), netns: spec.netns.clone() });
    }
    let peer = LinkUnspec::new_with_name(&spec.interface)
        .address(spec.mac.0.to_vec())
        .mtu(spec.mtu)
        .setns_by_fd(namespace.as_raw_fd())
        .build();
    let veth = LinkVeth::new(&spec.port, &spec.interface)
        .mtu(spec.mtu)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    let action = format!("make port {} with {} in {}", spec.port, spec.interface, spec.netns.display());
    network.add_link(veth, action).await?;
    Ok(true)
}

/// The network's side: the port into the bridge, and fixed entries, so that frames for the pod are never flooded and the
/// bridge never asks for it.
async fn plug(network: &Netlink, spec: &PortSpec) -> Result<()> {
    let bridge = network.index(BRIDGE).await?;
    let index = network.index(&spec.port).await?;
    // Before the first frame can come.
    let shaper = bandwidth::ensure_shaper(network, spec).await?;
    guard::set(network, index, spec, shaper).await?;
    bandwidth::set(network, index, spec).await?;
    // It may have been about to go when the agent ended.
    let up = LinkUnspec::new_with_index(index).mtu(spec.mtu).controller(bridge).link_group(removal::STAYS).up().build();
    network.set_link(up, format!("plug {} into br0", spec.port)).await?;
    let entry = bridge_entry(index, spec.mac);
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    network
        .send(RouteNetlinkMessage::NewNeighbour(entry), flags, format!("forward {} to {}", spec.mac, spec.port))
        .await?;
    lock(network, index, spec).await?;
    for resolver in &spec.resolvers {
        network.add_address(bridge, Ipv4Net::from(*resolver).into()).await?;
    }
    for address in ipv4(&spec.addresses) {
        let entry = neighbour(bridge, address, spec.mac);
        network.send(RouteNetlinkMessage::NewNeighbour(entry), flags, format!("add neighbour {address}")).await?;
    }
    Ok(())
}

/// Holds a port to its MAC: a locked one drops frames whose source the forwarding entries don't have behind it, and learns
/// nothing (`locked` in bridge(8); Linux 5.18); what it learnt before is forgotten. An older kernel takes the request and does
/// nothing, so it is asked again.
///
/// One MAC is one host: when it leaves a group, there is nobody else to be asked whether he stays (`mcast_fast_leave`).
async fn lock(network: &Netlink, index: u32, spec: &PortSpec) -> Result<()> {
    let port = LinkBridgePort::new(index)
        .locked(spec.locked)
        .learning(!spec.locked)
        .mcast_fast_leave(spec.locked)
        .fdb_flush()
        .build();
    let set = network.handle().link().set_port(port).execute().await;
    set.map_err(|e| network.error(format!("set the lock of port {}", spec.port), e))?;
    let link = network.link(&spec.port).await?;
    link.map_or(Ok(()), |link| check_lock(network, &link, spec))
}

fn check_lock(network: &Netlink, link: &LinkMessage, spec: &PortSpec) -> Result<()> {
    if !spec.locked || has(link, &InfoBridgePort::Locked(true)) {
        return Ok(());
    }
    Err(Error::NotLocked { port: spec.port.clone(), place: network.place().to_owned() })
}

/// What else [`lock`] sets.
fn check_options(network: &Netlink, link: &LinkMessage, spec: &PortSpec) -> Result<()> {
    let wanted = [
        ("learning", !spec.locked, InfoBridgePort::Learning(!spec.locked)),
        ("mcast_fast_leave", spec.locked, InfoBridgePort::FastLeave(spec.locked)),
    ];
    let Some((option, wanted, _)) = wanted.into_iter().find(|(_, _, property)| !has(link, property)) else {
        return Ok(());
    };
    Err(Error::PortOption { port: spec.port.clone(), option, wanted, place: network.place().to_owned() })
}

/// The addresses that the bridge has neighbours for: it speaks IPv4 only.
fn ipv4(addresses: &[IpNet]) -> impl Iterator<Item = IpAddr> {
    addresses.iter().map(IpNet::addr).filter(IpAddr::is_ipv4)
}

/// The pod's side. Nothing is announced: an address has the same MAC wherever it is, so no neighbour has anything to learn.
pub(crate) async fn configure_pod(pod: &Netlink, namespace: &Namespace, spec: &PortSpec) -> Result<()> {
    let link = pod.link(&spec.interface).await?;
    let index = match link {
        Some(link) => link.header.index,
        None => return Err(Error::NoLink { link: spec.interface.clone(), place: spec.netns.display().to_string() }),
    };
    for address in spec.addresses.iter().filter(|a| matches!(a, IpNet::V4(_))) {
        pod.add_address(index, *address).await?;
    }
    let ipv6: Vec<_> = spec.addresses.iter().filter(|a| matches!(a, IpNet::V6(_))).collect();
    if !ipv6.is_empty() {
        enable_ipv6(namespace, &spec.interface)?;
    }
    pod.set_link(up(index, spec.mtu), format!("bring {} up", spec.interface)).await?;
    // After it is up: the kernel takes IPv6 addresses from an interface that goes down, and routes to none that is.
    for address in &ipv6 {
        pod.add_address(index, **address).await?;
    }
    wait_until_settled(pod, &ipv6, spec).await?;
    for resolver in &spec.resolvers {
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        let entry = neighbour(index, (*resolver).into(), BRIDGE_MAC);
        pod.send(RouteNetlinkMessage::NewNeighbour(entry), flags, format!("add neighbour {resolver}")).await?;
        pod.add_link_route(index, Ipv4Net::from(*resolver)).await?;
    }
    default_route::set(pod, index, spec).await
}

/// Runtimes make pods of IPv4 clusters without IPv6. A pod reaches its own addresses by its loopback interface, so that needs it too.
///
/// Addresses and routes are what we give: no other pod may add some by advertising itself as a router (RFC 4861, section 6.2).
fn enable_ipv6(namespace: &Namespace, interface: &str) -> Result<()> {
    let (advertisements, disabled) =
        (format!("ipv6/conf/{interface}/accept_ra"), format!("ipv6/conf/{interface}/disable_ipv6"));
    sysctl::set(namespace, &[(&advertisements, "0"), ("ipv6/conf/lo/disable_ipv6", "0"), (&disabled, "0")])
}

/// Waits until the kernel takes what is for the addresses for its own. It makes these routes on its own time, also without duplicate
/// detection; a connection that is opened to an own address before never finds its way.
async fn wait_until_settled(pod: &Netlink, addresses: &[&IpNet], spec: &PortSpec) -> Result<()> {
    let end = Instant::now() + FORWARDING_PATIENCE;
    while !addresses.is_empty() {
        let local = pod.local_addresses().await?;
        let Some(&&address) = addresses.iter().find(|address| !local.contains(&address.addr())) else { break };
        if Instant::now() > end {
            return Err(Error::NoAddress { address, interface: spec.interface.clone(), netns: spec.netns.clone() });
        }
        tokio::time::sleep(FORWARDING_POLL).await;
    }
    Ok(())
}

/// Waits until the bridge lets frames through the port. The kernel turns "both ends are up" into that on its own time, and a
/// pod's first packets would be lost. (The pod's end sends as soon as it is up; its operational state follows up to a second
/// later and stands for nothing.)
async fn wait_until_forwarding(network: &Netlink, spec: &PortSpec) -> Result<()> {
    let end = Instant::now() + FORWARDING_PATIENCE;
    while !network.link(&spec.port).await?.is_some_and(|link| is_forwarding(&link)) {
        if Instant::now() > end {
            let (port, place) = (spec.port.clone(), network.place().to_owned());
            return Err(Error::NotForwarding { port, place, seconds: FORWARDING_PATIENCE.as_secs() });
        }
        tokio::time::sleep(FORWARDING_POLL).await;
    }
    Ok(())
}

pub(crate) fn check_up(link: &LinkMessage, name: &str, place: &Path) -> Result<()> {
    if link.header.flags.contains(LinkFlags::Up) {
        return Ok(());
    }
    Err(Error::Down { link: name.to_owned(), place: place.display().to_string() })
}

fn is_forwarding(link: &LinkMessage) -> bool {
    has(link, &InfoBridgePort::State(BridgePortState::Forwarding))
}

/// Whether a link is a bridge's port with this property.
fn has(link: &LinkMessage, property: &InfoBridgePort) -> bool {
    let infos = link.attributes.iter().filter_map(|a| match a {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    infos.flatten().any(|info| match info {
        LinkInfo::PortData(InfoPortData::BridgePort(facts)) => facts.contains(property),
        _ => false,
    })
}

fn up(index: u32, mtu: u32) -> LinkMessage {
    LinkUnspec::new_with_index(index).mtu(mtu).up().build()
}

async fn remove_neighbour(network: &Netlink, bridge: u32, address: IpAddr) -> Result<()> {
    let entry = neighbour_to_remove(bridge, address);
    let action = format!("remove neighbour {address}");
    crate::netlink::ok_if(network.send(RouteNetlinkMessage::DelNeighbour(entry), 0, action).await, libc::ENOENT)
}
