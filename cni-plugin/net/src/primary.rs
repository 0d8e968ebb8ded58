//! The network of all pods of a cluster, where no other plugin makes one.
//!
//! Each node has blocks of addresses. A pod is at one end of a pair of veth, whose other end is in the host's own namespace: the host
//! routes to each of its pods, and to the blocks of other nodes by one VXLAN device. Nothing is learnt: each node's tunnel has a MAC that
//! derives from its address, so that to know a node's address and blocks is enough.

mod flows;
mod pod;
mod rules;
mod tunnel;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    Dataplane, Mac, Protocol,
    error::Result,
    mac::{endpoint_mac, port_name},
    netlink::{Netlink, link_name},
    nft, sysctl,
};

pub use pod::PodSpec;

/// The tunnel's device in the host's namespace.
const DEVICE: &str = "portolan0";
/// Its VXLAN identifier: one that no other network can have.
const VNI: u32 = 0;
/// How the hosts' ends of pods' links are called, before eight hexadecimal digits.
const LINKS: &str = "plp";
/// By whom a pod sends everything. Nobody has this address: pods know the MAC (RFC 3927, section 2.1: link-local).
pub const POD_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same in IPv6.
pub const POD_GATEWAY_IPV6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The MAC of the host's end of every pod's link.
pub const POD_GATEWAY_MAC: Mac = Mac([0x02, 0x50, 0xa9, 0xfe, 0x01, 0x01]);

/// The pod network as one node has it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PodNetwork {
    /// This node's address on the underlay.
    pub vtep: IpAddr,
    /// UDP port of the tunnel, the same on all nodes.
    pub port: u16,
    /// MTU of the pods' interfaces in bytes.
    pub mtu: u32,
    /// This node's blocks, at most one of a family.
    pub blocks: Vec<IpNet>,
    /// The other nodes.
    pub others: Vec<OtherNode>,
}

/// Another node.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct OtherNode {
    /// Its address on the underlay.
    pub vtep: IpAddr,
    /// Its blocks.
    pub blocks: Vec<IpNet>,
}

/// A port of the host that leads to a pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostPort {
    /// At which of the host's addresses; at all if none is given or it is unspecified (then of that family).
    pub at: Option<IpAddr>,
    /// Of which protocol.
    pub protocol: Protocol,
    /// The host's port.
    pub port: u16,
    /// The pod's addresses.
    pub pod: Vec<IpAddr>,
    /// The pod's port.
    pub pod_port: u16,
}

/// What the host's end of a pod's link is called.
pub fn pod_link(container: &str, interface: &str) -> String {
    format!("{LINKS}{}", &port_name(container, interface)[1..])
}

/// The MAC of a pod's interface on the pod network.
pub fn pod_mac(first: IpAddr) -> Mac {
    endpoint_mac("", first)
}

fn is_pod_link(name: &str) -> bool {
    let digits = name.strip_prefix(LINKS).unwrap_or_default();
    digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

impl Dataplane {
    /// Makes this host a part of the pod network. What is right already stays.
    ///
    /// # Errors
    /// What the kernel refuses; what was made by then stays, for the next try.
    pub async fn ensure_pod_network(&self, wanted: &PodNetwork) -> Result<()> {
        let host = self.underlay()?;
        // Also on links that are there: of those to come it is the default.
        sysctl::set(&host, &[("ipv4/ip_forward", "1")])?;
        if wanted.blocks.iter().any(|block| block.addr().is_ipv6()) {
            sysctl::set(&host, &[("ipv6/conf/all/forwarding", "1")])?;
        }
        tunnel::ensure(&host, wanted).await
    }

    /// Makes the host's rules for the pod network what they are to be, in one step: what leaves it is masqueraded, and these ports lead to
    /// pods. So do datagrams of who has been sending to such a port all the time, or to one that led somewhere `before`. Needs the host's `nft`.
    ///
    /// # Errors
    /// What `nft` refuses; then all stays as it was.
    pub async fn set_pod_rules(&self, network: &PodNetwork, ports: &[HostPort], before: &[HostPort]) -> Result<()> {
        nft::run(self.programs(), self.underlay()?, rules::of_host(network, ports)).await?;
        if let Err(error) = flows::follow(self.underlay()?, before, ports).await {
            tracing::warn!(%error, "who has been sending datagrams to a port of this host may still be led to a pod that is gone");
        }
        Ok(())
    }

    /// Removes all of the pod network from this host but its pods; it is right if there is nothing.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn remove_pod_network(&self) -> Result<()> {
        let host = self.underlay()?;
        if Netlink::open(&host)?.link(DEVICE).await?.is_none() {
            return Ok(());
        }
        nft::remove_table(self.programs(), host.again()?, &rules::TABLE).await?;
        tunnel::remove(&host).await
    }

    /// What the host's ends of its pods' links are called.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub async fn pods(&self) -> Result<Vec<String>> {
        let links = Netlink::open(&self.underlay()?)?.links().await?;
        Ok(links.iter().filter_map(link_name).filter(|name| is_pod_link(name)).map(str::to_owned).collect())
    }
}
