//! A ContainerNetwork, parsed into what a node needs of it.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use kube::ResourceExt;
use portolan_crds::{ContainerNetwork, condition};
use portolan_net::NetworkSpec;

use crate::error::PlugError;

/// A network that pods can be plugged into.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Network {
    pub name: String,
    pub vni: u32,
    pub subnet: Ipv4Net,
    pub suppression: bool,
    mtu: Option<u32>,
}

/// What is the same for all networks of a node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Underlay {
    pub vtep: Ipv4Addr,
    pub port: u16,
    /// The MTU of networks that ask for none.
    pub mtu: u32,
}

impl Network {
    /// Parses a ContainerNetwork, or says why it can't be used now.
    pub fn new(object: &ContainerNetwork) -> Result<Self, PlugError> {
        let name = object.name_any();
        let not_ready = |reason: &str| PlugError::NotReady { network: name.clone(), reason: reason.to_owned() };
        if object.metadata.deletion_timestamp.is_some() {
            return Err(not_ready("it is being deleted"));
        }
        let status = object.status.clone().unwrap_or_default();
        let ready = status.conditions.iter().find(|c| c.type_ == condition::READY);
        if let Some(refused) = ready.filter(|c| c.status == condition::FALSE) {
            return Err(not_ready(&refused.message));
        }
        let vni = status.vni.ok_or_else(|| not_ready("it has no VNI yet; is portolan-operator running?"))?;
        let subnet = object.spec.subnets.first().and_then(|s| s.parse().ok());
        let subnet = subnet.ok_or_else(|| not_ready("spec.subnets has no IPv4 subnet"))?;
        let (suppression, mtu) = (object.spec.neighbor_suppression, object.spec.mtu);
        Ok(Self { name, vni, subnet, suppression, mtu })
    }

    pub fn mtu(&self, underlay: Underlay) -> u32 {
        self.mtu.unwrap_or(underlay.mtu)
    }

    pub fn spec(&self, underlay: Underlay) -> NetworkSpec {
        NetworkSpec {
            vni: self.vni,
            mtu: self.mtu(underlay),
            vtep: underlay.vtep,
            subnets: vec![self.subnet.into()],
            port: underlay.port,
            suppression: self.suppression,
        }
    }
}
