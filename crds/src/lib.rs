//! The API of Portolan (group `portolan.dev`, version `v1alpha1`) as Rust types.
//!
//! The YAML beside this crate (`crds/*.yaml`) and the chart's copy are generated from these types by
//! `cargo run -p portolan-crds --bin generate-crds`; a test fails when they differ. This crate sees no client.

mod handoff;
mod migration;
mod network;
mod policy;
mod snapshot;
mod storage_node;
mod subnets;
mod volume;

pub use handoff::*;
pub use migration::*;
pub use network::*;
pub use policy::{PolicyNetworksError, is_network_name, policy_networks};
pub use snapshot::*;
pub use storage_node::*;
pub use subnets::{
    IPV6_LEAST_MTU, SubnetError, WIREGUARD_PADDING, capacity, gateway, pool, subnets, vxlan_overhead,
    wireguard_overhead,
};
pub use volume::*;

use kube::CustomResourceExt;
use kube::core::crd::merge_crds;

/// The API group of every kind here, and the name of the CSI driver and of its StorageClass provisioner.
pub const GROUP: &str = "portolan.dev";
/// The CSI driver's name (`CSIDriver.metadata.name`, `StorageClass.provisioner`).
pub const DRIVER: &str = "portolan.dev";
/// The only version served so far.
pub const VERSION: &str = "v1alpha1";

/// Pod annotation: the networks a pod is plugged into (`backend`, `backend, frontend@eth2`). NetworkPolicy annotation: those it is also about
/// (`backend, frontend`).
pub const NETWORKS_ANNOTATION: &str = "portolan.dev/networks";
/// Pod annotation: addresses that the pod may use on its networks beside its own (`10.32.0.100, fd32::/120`), or `any`.
pub const ALLOWED_ADDRESSES_ANNOTATION: &str = "portolan.dev/allowed-addresses";
/// Pod annotation: more names of the pod on its networks, DNS labels separated by commas (`cache, www`).
pub const DNS_NAMES_ANNOTATION: &str = "portolan.dev/dns-names";
/// Pod annotation: `"true"` puts the pod in DNS answers before it is Ready.
pub const PUBLISH_NOT_READY_ANNOTATION: &str = "portolan.dev/publish-not-ready";
/// Pod annotation: `"true"` makes pods of the same node get this pod's address, and not those of its like on other nodes.
pub const PREFER_SAME_NODE_ANNOTATION: &str = "portolan.dev/prefer-same-node";
/// Signer of the node agents' certificates (`CertificateSigningRequest.spec.signerName`).
pub const NODE_SIGNER: &str = "portolan.dev/node";
/// Secret (in the release's namespace) that holds the certificate authority: keys `tls.crt`, `tls.key`. Only the operator reads it.
pub const CA_SECRET: &str = "portolan-ca";
/// ConfigMap (in the release's namespace) with the authority's certificate, key `ca.crt`.
pub const CA_CONFIG_MAP: &str = "portolan-ca";
/// Node label and CSI topology key: which kind of pool a node has. A volume can go wherever such a pool is.
pub const TOPOLOGY_KEY: &str = "topology.portolan.dev/zone-of-pool";
/// Node label and CSI topology key: which pool a node has, by its GUID. No volume is bound to it; room is counted by it.
pub const POOL_TOPOLOGY_KEY: &str = "topology.portolan.dev/pool";
/// Claim annotation: the dataset that its volume is to be, as `<node>:<dataset>`.
pub const IMPORT_ANNOTATION: &str = "portolan.dev/import";
/// Finalizer of a PortableVolume: datasets may still exist on nodes.
pub const VOLUME_FINALIZER: &str = "portolan.dev/datasets";
/// Finalizer of a PortableSnapshot: nodes may still have it.
pub const SNAPSHOT_FINALIZER: &str = "portolan.dev/snapshots";
/// Finalizer of a VolumeMigration: its handoffs may still be under way, and end with it.
pub const MIGRATION_FINALIZER: &str = "portolan.dev/migration";
/// Label of a PortableSnapshot: its volume.
pub const VOLUME_LABEL: &str = "portolan.dev/volume";
/// Finalizer of a VolumeAttachment that Portolan has answered.
pub const ATTACH_FINALIZER: &str = "portolan.dev/attacher";
/// Finalizer of a PersistentVolume that Portolan has provisioned.
pub const PV_FINALIZER: &str = "portolan.dev/volume";
/// Finalizer of a ContainerNetwork: pods may still be plugged into it.
pub const NETWORK_FINALIZER: &str = "portolan.dev/endpoints";
/// The address of the DNS server on every node, reached by a pod through its first Portolan network.
pub const DNS_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 53, 53);
/// What a pod without an IPv4 address on its first network asks that server from: link-local addresses (RFC 3927) that mean something
/// between the pod and its own node only.
pub const RESOLVER_RANGE: ipnet::Ipv4Net = ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(169, 254, 56, 0), 21);

/// What the addresses between a network with `egressNAT` and its node are taken from: they mean something on that node only.
pub const EGRESS_RANGES: [ipnet::IpNet; 2] = [
    ipnet::IpNet::V4(ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(169, 254, 64, 0), 20)),
    ipnet::IpNet::V6(ipnet::Ipv6Net::new_assert(
        std::net::Ipv6Addr::new(0xfd70, 0x6f72, 0x746f, 0x6c00, 0, 0, 0, 0),
        64,
    )),
];

/// Name of the IPClaim of a pod's address on a network: at most 253 characters, one per (network, namespace, pod).
pub fn claim_name(network: &str, namespace: &str, pod: &str) -> String {
    format!("{network}.{namespace}.{pod}")
}

/// Name of the NetworkNodeSlice of a network on a node.
pub fn slice_name(network: &str, node: &str) -> String {
    format!("{network}.{node}")
}

/// A condition's two honest states; an unknown one is written `Unknown`.
pub mod condition {
    /// The condition holds.
    pub const TRUE: &str = "True";
    /// The condition does not hold; reason and message say why.
    pub const FALSE: &str = "False";
    /// Whether it holds can't be told now.
    pub const UNKNOWN: &str = "Unknown";
    /// Of a StorageNode: its pool works, with all the redundancy that it should have.
    pub const POOL_HEALTHY: &str = "PoolHealthy";
    /// Of a StorageNode: less than a tenth of its room is free.
    pub const SPACE_LOW: &str = "SpaceLow";
    /// Of a StorageNode: each dataset, snapshot and mount of ours has its object.
    pub const NO_ORPHANS: &str = "NoOrphans";
    /// Of a ContainerNetwork: all pods that shall ask Portolan's DNS server do.
    pub const NAMES_INJECTED: &str = "NamesInjected";
    /// Of a ContainerNetwork: a path between two of its nodes is known to carry less than its pods may send.
    pub const MTU_MISMATCH: &str = "MTUMismatch";
    /// Of a ContainerNetwork: its nodes have addresses of both IP families, and those of one don't reach those of the other. Not there else.
    pub const FAMILY_MISMATCH: &str = "IPFamilyMismatch";
    /// Of a ContainerNetwork with `egressNAT`: its pods reach the outside from all of its nodes.
    pub const EGRESS_READY: &str = "EgressReady";
    /// The type every kind here has: all is as the spec wants it.
    pub const READY: &str = "Ready";
}

/// Every custom resource definition, with the file name it is kept under.
pub fn definitions()
-> Vec<(String, k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition)> {
    let all = [
        PortableVolume::crd(),
        PortableSnapshot::crd(),
        StorageNode::crd(),
        VolumeMigration::crd(),
        ContainerNetwork::crd(),
        NetworkNodeSlice::crd(),
        IPBlock::crd(),
        IPClaim::crd(),
    ];
    all.into_iter()
        .filter_map(|crd| {
            let file = format!("{}.yaml", crd.spec.names.plural);
            merge_crds(vec![crd], VERSION).ok().map(|crd| (file, crd))
        })
        .collect()
}

/// A definition as the YAML text that is kept in the tree.
///
/// # Errors
/// When the type can't be serialised, which would be a defect of the type.
pub fn to_yaml(
    crd: &k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
) -> Result<String, serde_saphyr::ser::Error> {
    let header = "# Generated from crds/src by `make generate`: change the types, not this file.\n";
    Ok(format!("{header}{}", serde_saphyr::to_string(crd)?))
}
