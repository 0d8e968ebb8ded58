//! A pod's link to its host.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::{
    LinkUnspec,
    packet_core::{NLM_F_CREATE, NLM_F_REPLACE},
};

use super::{POD_GATEWAY, POD_GATEWAY_IPV6, POD_GATEWAY_MAC};
use crate::{
    Allowed, Bandwidth, Dataplane, Mac, PortSpec,
    error::{Error, Result},
    forwarding::neighbour,
    guard,
    namespace::Namespace,
    netlink::{Netlink, link_facts},
    port::{check_up, configure_pod, ensure_veth},
    sysctl,
};

/// One pod on the pod network.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PodSpec {
    /// The host's end of its link ([`crate::pod_link`]).
    pub link: String,
    /// The pod's network namespace, as the host sees it.
    pub netns: PathBuf,
    /// The interface's name in the pod.
    pub interface: String,
    /// The interface's MAC.
    pub mac: Mac,
    /// The pod's addresses, at most one of a family.
    pub addresses: Vec<IpAddr>,
    /// The interface's MTU in bytes.
    pub mtu: u32,
    /// From where the host speaks to the pod in that address' family.
    pub host: IpAddr,
    /// Whom the pod always reaches by this interface, whatever default route it gets beside: its host and the host's pods.
    pub near: Vec<IpNet>,
}

impl PodSpec {
    fn port(&self) -> PortSpec {
        PortSpec {
            vni: super::VNI,
            port: self.link.clone(),
            netns: self.netns.clone(),
            interface: self.interface.clone(),
            mac: self.mac,
            addresses: self.addresses.iter().copied().map(IpNet::from).collect(),
            mtu: self.mtu,
            resolvers: Vec::new(),
            locked: false,
            allowed: Allowed::default(),
            bandwidth: Bandwidth::default(),
            gateways: Vec::new(),
        }
    }

    fn has_ipv6(&self) -> bool {
        self.addresses.iter().any(IpAddr::is_ipv6)
    }

    /// The gateway of each family that the pod has, and what it reaches by it.
    pub fn routes(&self) -> Vec<(IpNet, IpAddr)> {
        let everywhere = self.addresses.iter().map(|address| match address {
            IpAddr::V4(_) => IpNet::V4(Ipv4Net::default()),
            IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
        });
        let near = self.near.iter().copied();
        let near = near.filter(|to| self.addresses.iter().any(|own| own.is_ipv4() == to.addr().is_ipv4()));
        everywhere.chain(near).map(|to| (to, gateway(to.addr()))).collect()
    }
}

/// The gateway of a family.
fn gateway(of: IpAddr) -> IpAddr {
    if of.is_ipv4() { POD_GATEWAY.into() } else { POD_GATEWAY_IPV6.into() }
}

impl Dataplane {
    /// Gives a pod its link to the host. One that is there already is made what the spec says, and stays whatever fails. Of a new one
    /// nothing is left after a failure.
    ///
    /// # Errors
    /// What the kernel refuses, or a namespace that isn't there.
    pub async fn add_pod(&self, spec: &PodSpec) -> Result<()> {
        let namespace = self.underlay()?;
        let host = Netlink::open(&namespace)?;
        let pod_namespace = Namespace::open(self.root(), &spec.netns)?;
        let pod = Netlink::open(&pod_namespace)?;
        let port = spec.port();
        let mut is_new = false;
        let added = async {
            is_new = ensure_veth(&host, &pod, &pod_namespace, &port).await?;
            let index = begin(&namespace, &host, spec, &port).await?;
            configure_pod(&pod, &pod_namespace, &port).await?;
            route_pod(&pod, spec).await?;
            for address in &spec.addresses {
                host.add_route_from(index, (*address).into(), spec.host).await?;
            }
            Ok(())
        };
        let result = added.await;
        if result.is_err()
            && is_new
            && let Err(second) = self.remove_pod(&spec.link).await
        {
            tracing::warn!(error = %second, link = spec.link, "a pod's link that could not be set up could not be removed either");
        }
        result
    }

    /// Takes a pod its link, from the host's side only: the pod's namespace may be gone. It is right if there is none.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn remove_pod(&self, link: &str) -> Result<()> {
        self.removals().remove(super::VNI, &self.underlay()?, vec![link.to_owned()]).await
    }

    /// Whether a pod has its link, up, guarded, with its addresses and routes: what CNI's CHECK asks.
    ///
    /// # Errors
    /// What is missing, or what the kernel refuses.
    pub async fn check_pod(&self, spec: &PodSpec) -> Result<()> {
        let host = Netlink::open(&self.underlay()?)?;
        let missing =
            |link: &str, place: &Path| Error::NoLink { link: link.to_owned(), place: place.display().to_string() };
        let place = Path::new(host.place());
        let outer = host.link(&spec.link).await?.ok_or_else(|| missing(&spec.link, place))?;
        check_up(&outer, &spec.link, place)?;
        guard::check(&host, outer.header.index, &spec.port(), None).await?;
        let leads = host.destinations(outer.header.index).await?;
        if let Some(address) = spec.addresses.iter().find(|address| !leads.contains(&IpNet::from(**address))) {
            return Err(Error::NoPodRoute { address: *address, link: spec.link.clone() });
        }
        let pod = Netlink::open(&Namespace::open(self.root(), &spec.netns)?)?;
        let inner = pod.link(&spec.interface).await?.filter(|l| link_facts(l).0 == Some(spec.mac.0.as_slice()));
        let inner = inner.ok_or_else(|| missing(&spec.interface, &spec.netns))?;
        check_up(&inner, &spec.interface, &spec.netns)?;
        let (interface, netns) = (spec.interface.clone(), spec.netns.clone());
        let present = pod.addresses(inner.header.index).await?;
        let own = |address: &IpAddr| IpNet::from(*address);
        if let Some(address) = spec.addresses.iter().map(own).find(|wanted| !present.contains(wanted)) {
            return Err(Error::NoAddress { address, interface, netns });
        }
        let present = pod.gateways(inner.header.index).await?;
        match spec.routes().into_iter().find(|route| !present.contains(route)) {
            Some((_, gateway)) => Err(Error::NoDefaultRoute { gateway, interface, netns }),
            None => Ok(()),
        }
    }
}

/// The host's end, with its guard before the first frame can come. Returns its index.
async fn begin(namespace: &Namespace, host: &Netlink, spec: &PodSpec, port: &PortSpec) -> Result<u32> {
    let index = host.index(&spec.link).await?;
    guard::set(host, index, port, None).await?;
    let (ipv4, ipv6) =
        (|key: &str| format!("ipv4/conf/{}/{key}", spec.link), |key: &str| format!("ipv6/conf/{}/{key}", spec.link));
    let without = if spec.has_ipv6() { "0" } else { "1" };
    // Who asks a host port at the host's loopback address comes from there. (Pods can't get to it: `rules`.)
    let (localnet, generation) = (ipv4("route_localnet"), ipv6("addr_gen_mode"));
    let (router, disabled) = (ipv6("accept_ra"), ipv6("disable_ipv6"));
    sysctl::set(namespace, &[(&localnet, "1"), (&generation, "1"), (&router, "0"), (&disabled, without)])?;
    let up = LinkUnspec::new_with_index(index).address(POD_GATEWAY_MAC.0.to_vec()).mtu(spec.mtu).up().build();
    host.set_link(up, format!("bring {} up", spec.link)).await?;
    for address in &spec.addresses {
        set_neighbour(host, index, *address, spec.mac).await?;
    }
    Ok(index)
}

async fn set_neighbour(netlink: &Netlink, index: u32, address: IpAddr, mac: Mac) -> Result<()> {
    let entry = RouteNetlinkMessage::NewNeighbour(neighbour(index, address, mac));
    netlink.send(entry, NLM_F_CREATE | NLM_F_REPLACE, format!("add neighbour {address}")).await
}

/// All that the pod sends goes to the host.
async fn route_pod(pod: &Netlink, spec: &PodSpec) -> Result<()> {
    let index = pod.index(&spec.interface).await?;
    for address in &spec.addresses {
        set_neighbour(pod, index, gateway(*address), POD_GATEWAY_MAC).await?;
        if address.is_ipv4() {
            pod.add_link_route(index, Ipv4Net::from(POD_GATEWAY)).await?;
        }
    }
    for (to, via) in spec.routes() {
        pod.add_route(index, to, Some(via)).await?;
    }
    Ok(())
}
