//! A pod's default route by one of its networks.
//!
//! It has one already, of the cluster's own network, which stays: two routes, each to a half of all addresses, go before it, as the longer prefix
//! does. They go with the interface, and then all is as it was.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    PortSpec,
    error::{Error, Result},
    netlink::Netlink,
};

const IPV4_HALVES: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 1)),
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(128, 0, 0, 0), 1)),
];
const IPV6_HALVES: [IpNet; 2] = [
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 1)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0x8000, 0, 0, 0, 0, 0, 0, 0), 1)),
];

/// The routes that gateways stand for.
fn wanted(gateways: &[IpAddr]) -> impl Iterator<Item = (IpNet, IpAddr)> {
    let halves = |gateway: &IpAddr| if gateway.is_ipv4() { IPV4_HALVES } else { IPV6_HALVES };
    gateways.iter().flat_map(move |gateway| halves(gateway).map(|half| (half, *gateway)))
}

/// Makes the default routes by an interface what the spec says.
pub(crate) async fn set(pod: &Netlink, index: u32, spec: &PortSpec) -> Result<()> {
    let present = pod.gateways(index).await?;
    for (half, _) in present.iter().filter(|(to, _)| IPV4_HALVES.contains(to) || IPV6_HALVES.contains(to)) {
        if !wanted(&spec.gateways).any(|(to, _)| to == *half) {
            pod.remove_route(index, *half).await?;
        }
    }
    for route in wanted(&spec.gateways).filter(|route| !present.contains(route)) {
        pod.add_route(index, route.0, Some(route.1)).await?;
    }
    Ok(())
}

/// Whether they are there.
pub(crate) async fn check(pod: &Netlink, index: u32, spec: &PortSpec) -> Result<()> {
    if spec.gateways.is_empty() {
        return Ok(());
    }
    let present = pod.gateways(index).await?;
    match wanted(&spec.gateways).find(|route| !present.contains(route)) {
        Some((_, gateway)) => {
            Err(Error::NoDefaultRoute { gateway, interface: spec.interface.clone(), netns: spec.netns.clone() })
        }
        None => Ok(()),
    }
}
