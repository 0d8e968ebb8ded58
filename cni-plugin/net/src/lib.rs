//! Networks on one node: namespaces, bridges, VXLAN devices, ports, forwarding entries, addresses.
//!
//! A network is a namespace `portolan-<vni>` with the bridge `br0`, the VXLAN device `vx0` and one veth end per pod. The pod network of a
//! cluster without another plugin is routed, in the host's own namespace. This crate knows
//! nothing of Kubernetes. Every operation is idempotent: killed between any two of its steps and run again, it ends in the same state.

mod announcement;
mod bandwidth;
mod bpf;
mod conntrack;
mod dataplane;
mod default_route;
mod egress;
mod encryption;
mod error;
mod filter;
mod forwarding;
mod generation;
mod guard;
mod ipam;
mod mac;
mod multicast;
mod namespace;
mod netlink;
mod network;
mod nft;
mod path;
mod paths;
mod ping;
mod port;
mod primary;
mod removal;
mod sysctl;
mod underlay;
mod wireguard;

pub use bandwidth::{Bandwidth, Limit};
pub use dataplane::Dataplane;
pub use egress::{Egress, Obstacle, TRANSIT, TRANSIT_IPV6};
pub use encryption::{Encrypted, Encryption, encrypted_size};
pub use error::{Error, Result};
pub use filter::{Filter, PortFilter, Protocol, Rule, Service};
pub use forwarding::{Change, Forwarder, Forwarding, Here, Known, Peer};
pub use generation::Generation;
pub use guard::Allowed;
pub use ipam::{AddressError, block_of, block_prefix, blocks, free_address, free_block, gateway, next_address, usable};
pub use mac::{Mac, MacError, endpoint_mac, is_endpoint_mac, port_name};
pub use multicast::Multicast;
pub use namespace::Namespace;
pub use network::NetworkSpec;
pub use path::Outcome;
pub use paths::Paths;
pub use ping::{Heard, Pinger};
pub use port::PortSpec;
pub use primary::{
    HostPort, OtherNode, POD_GATEWAY, POD_GATEWAY_IPV6, POD_GATEWAY_MAC, PodNetwork, PodSpec, pod_link, pod_mac,
};
pub use underlay::{vxlan_overhead, wireguard_overhead};
pub use wireguard::{KeyError, PrivateKey, PublicKey};

use std::net::Ipv4Addr;

/// The address of `br0` on every node, where the node's DNS server answers.
pub const BRIDGE_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 53, 53);
/// The MAC of `br0` on every node: a pod that moves needs to learn nothing.
pub const BRIDGE_MAC: Mac = Mac([0x02, 0x50, 0xa9, 0xfe, 0x35, 0x35]);
/// The bridge in a network's namespace.
pub(crate) const BRIDGE: &str = "br0";
/// The VXLAN device in a network's namespace.
pub(crate) const TUNNEL: &str = "vx0";
