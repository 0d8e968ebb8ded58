//! Why a pod can't be plugged in, and what the container runtime is told.

use std::net::IpAddr;

use ipnet::IpNet;
use portolan_cni::Failure;
use portolan_crds::{NETWORKS_ANNOTATION, RESOLVER_RANGE};
use portolan_net::{AddressError, Mac};

use crate::{annotation::AnnotationError, collect::UnplugError, encryption::EncryptionError, journal::JournalError};

/// A request of the API server that failed.
#[derive(Debug, thiserror::Error)]
#[error("{action}: {source}")]
pub(crate) struct ApiError {
    pub action: String,
    pub source: Box<kube::Error>,
}

impl ApiError {
    pub fn new(action: impl Into<String>, source: kube::Error) -> Self {
        Self { action: action.into(), source: Box::new(source) }
    }
}

/// Why a pod can't be plugged in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlugError {
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    #[error("annotation {NETWORKS_ANNOTATION} names {given:?}: no such ContainerNetwork (there are: {known})")]
    NoSuchNetwork { given: String, known: String },
    #[error("ContainerNetwork {network} is not ready: {reason}")]
    NotReady { network: String, reason: String },
    #[error("ContainerNetwork {network}: {source}")]
    NoAddress { network: String, source: AddressError },
    #[error("IPClaim {claim} holds {address}, which is not in {subnets}: delete the IPClaim to get another address")]
    ForeignClaim { claim: String, address: String, subnets: String },
    #[error(
        "ContainerNetwork {network}: pods of this node ask the DNS server from all of {RESOLVER_RANGE}: no address is left"
    )]
    ResolverRangeFull { network: String },
    #[error("address {address} of ContainerNetwork {network} is still in use here by pod {holder}")]
    AddressInUse { network: String, address: IpAddr, holder: String },
    #[error(
        "annotation {NETWORKS_ANNOTATION}: ips: {address} was given for ContainerNetwork {network}; allowed: an address of {subnets} that pods are given (not a subnet's own, the first after it, or the broadcast address; of IPv6 one of the first /104)"
    )]
    NoPodsAddress { network: String, address: IpAddr, subnets: String },
    #[error(
        "annotation {NETWORKS_ANNOTATION}: ips: {address} of ContainerNetwork {network} is of block {block}, which is node {node}'s to give; allowed: an address of a block of this node or of no node (kubectl get ipblocks)"
    )]
    ForeignBlock { network: String, address: IpAddr, block: IpNet, node: String },
    #[error(
        "annotation {NETWORKS_ANNOTATION}: ips: {address} of ContainerNetwork {network} is given already: to {holder}"
    )]
    AddressTaken { network: String, address: IpAddr, holder: String },
    #[error(
        "annotation {NETWORKS_ANNOTATION}: ips: {asked} was given, but IPClaim {claim} keeps {held} for this pod; allowed: that, or delete the IPClaim"
    )]
    ClaimDiffers { claim: String, held: IpAddr, asked: IpAddr },
    #[error(
        "annotation {NETWORKS_ANNOTATION}: mac: {mac} was given for ContainerNetwork {network}; allowed: one that {reason}"
    )]
    MacTaken { network: String, mac: Mac, reason: String },
    #[error(
        "annotation {NETWORKS_ANNOTATION}: default-route: {gateway} was given for ContainerNetwork {network}; allowed: on networks with spec.egressNAT, which this one has not"
    )]
    NoEgress { network: String, gateway: IpAddr },
    #[error(
        "annotation {NETWORKS_ANNOTATION}: default-route: {gateway} was given for ContainerNetwork {network}; allowed: its gateway {gateways}, or another pod's address on it"
    )]
    ForeignGateway { network: String, gateway: IpAddr, gateways: String },
    #[error("ContainerNetwork {network}: {address} is its gateway (spec.egressNAT), and no pod's: {help}")]
    GatewaysAddress { network: String, address: IpAddr, help: String },
    #[error("annotation {NETWORKS_ANNOTATION}: the subnets of {one} and {other} overlap; a pod can't be on both")]
    Overlap { one: String, other: String },
    #[error("pod {0} is not in the API (yet, or any more)")]
    NoPod(String),
    #[error("the agent has not heard from the API server yet")]
    NotSynced,
    #[error("ContainerNetwork {network}: the agent has not heard from the API server since it started, and {reason}")]
    Alone { network: String, reason: &'static str },
    #[error("the pod network is not made on this node yet: {reason}")]
    NoPodNetwork { reason: String },
    #[error("each pod's address of {block}, which Node's spec.podCIDRs gives this node, is in use")]
    NoPodAddress { block: IpNet },
    #[error(
        "the configuration says primary, but this node's agent is to leave the pod network to another plugin (network.primary.enabled)"
    )]
    NotPrimary,
    #[error("the pod's networks are being changed")]
    Busy,
    #[error("network {network}: its nftables rules are not those that its policies need; they are put back now")]
    RulesChanged { network: String },
    #[error("no network namespace in /run/netns has the pod's address {0}, or several have it")]
    NoNamespace(IpAddr),
    #[error("ContainerNetwork {network} is encrypted, which can't be on this node: {source}")]
    Encryption { network: String, source: EncryptionError },
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Net(#[from] portolan_net::Error),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Unplug(#[from] UnplugError),
}

impl PlugError {
    fn code(&self) -> u32 {
        match self {
            Self::Annotation(_)
            | Self::NoSuchNetwork { .. }
            | Self::NoPodsAddress { .. }
            | Self::ClaimDiffers { .. }
            | Self::MacTaken { .. }
            | Self::NoEgress { .. }
            | Self::ForeignGateway { .. }
            | Self::Overlap { .. } => Failure::ANNOTATION,
            Self::NotPrimary => Failure::INVALID_CONFIG,
            Self::NoAddress { .. }
            | Self::NoPodAddress { .. }
            | Self::ForeignClaim { .. }
            | Self::ForeignBlock { .. }
            | Self::GatewaysAddress { .. }
            | Self::AddressTaken { .. }
            | Self::ResolverRangeFull { .. } => Failure::NO_ADDRESS,
            Self::NotReady { .. }
            | Self::AddressInUse { .. }
            | Self::NoPod(_)
            | Self::NotSynced
            | Self::Alone { .. }
            | Self::NoPodNetwork { .. }
            | Self::Busy
            | Self::NoNamespace(_)
            | Self::Api(_) => Failure::TRY_AGAIN,
            Self::RulesChanged { .. } => Failure::NOT_PLUGGED,
            Self::Encryption { .. } | Self::Net(_) | Self::Journal(_) | Self::Unplug(_) => Failure::SETUP,
        }
    }

    pub fn failure(&self) -> Failure {
        Failure::new(self.code(), self.to_string(), "")
    }
}
