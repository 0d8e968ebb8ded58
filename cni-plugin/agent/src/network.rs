//! A ContainerNetwork, parsed into what a node needs of it.

use std::net::IpAddr;

use ipnet::IpNet;
use kube::ResourceExt;
use portolan_crds::{ContainerNetwork, RESOLVER_RANGE, condition};
use portolan_net::{Multicast, NetworkSpec, encrypted_size};
use serde::{Deserialize, Serialize};

use crate::{error::PlugError, underlay::Underlay};

/// A network that pods can be plugged into.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Network {
    pub name: String,
    pub vni: u32,
    /// At most one of each family, IPv4 first.
    pub subnets: Vec<IpNet>,
    pub suppression: bool,
    /// Whether it reaches other nodes by WireGuard alone.
    pub encrypted: bool,
    /// Whether it is to have gateways.
    pub egress: bool,
    multicast: Multicast,
    mtu: Option<u32>,
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
        let subnets = portolan_crds::subnets(&object.spec.subnets).map_err(|e| not_ready(&e.to_string()))?;
        let (suppression, mtu) = (object.spec.neighbor_suppression, object.spec.mtu);
        let multicast = match object.spec.multicast {
            portolan_crds::Multicast::Flood => Multicast::Flood,
            portolan_crds::Multicast::Snooping => Multicast::Snooping,
        };
        let encrypted = object.spec.encryption == portolan_crds::Encryption::WireGuard;
        if encrypted && status.keys.is_none() {
            return Err(not_ready("it has no generation of keys yet; is portolan-operator running, of this release?"));
        }
        let egress = object.spec.egress_nat;
        Ok(Self { name, vni, subnets, suppression, encrypted, egress, multicast, mtu })
    }

    pub fn mtu(&self, underlay: Underlay) -> u32 {
        let encryption = if self.encrypted { underlay.wireguard() } else { 0 };
        self.mtu.unwrap_or(underlay.mtu.saturating_sub(underlay.vxlan() + encryption))
    }

    /// The largest packet between nodes, in bytes with the outer IP header, of pods with that MTU.
    pub fn size(&self, mtu: u32, underlay: Underlay) -> u32 {
        if self.encrypted { encrypted_size(mtu, underlay.vtep, underlay.mtu) } else { mtu + underlay.vxlan() }
    }

    /// Whether pods have IPv4 addresses on it, from which they ask the DNS server.
    pub fn has_ipv4(&self) -> bool {
        self.subnets.iter().any(|subnet| matches!(subnet, IpNet::V4(_)))
    }

    /// Addresses of it, each with its subnet's prefix length, IPv4 first; what is in none of its subnets is left out.
    pub fn with_prefixes(&self, addresses: &[IpAddr]) -> impl Iterator<Item = IpNet> {
        let of = |subnet: &IpNet| addresses.iter().find(|address| subnet.contains(*address));
        self.subnets.iter().filter_map(move |subnet| IpNet::new(*of(subnet)?, subnet.prefix_len()).ok())
    }

    pub fn spec(&self, underlay: Underlay) -> NetworkSpec {
        let mut subnets = self.subnets.clone();
        if !self.has_ipv4() {
            subnets.push(RESOLVER_RANGE.into());
        }
        NetworkSpec {
            vni: self.vni,
            mtu: self.mtu(underlay),
            vtep: underlay.vtep,
            subnets,
            port: underlay.port,
            suppression: self.suppression,
            multicast: self.multicast,
            encrypted: self.encrypted,
            gateway: self.egress,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::{ContainerNetworkSpec, ContainerNetworkStatus};

    fn underlay(vtep: &str) -> Underlay {
        Underlay { vtep: vtep.parse().unwrap(), port: 7789, mtu: 1500 }
    }

    fn network(subnets: &[&str]) -> Result<Network, PlugError> {
        let subnets = subnets.iter().map(|subnet| (*subnet).to_owned()).collect();
        let mut object = ContainerNetwork::new("backend", ContainerNetworkSpec { subnets, ..Default::default() });
        object.status = Some(ContainerNetworkStatus { vni: Some(77), ..Default::default() });
        Network::new(&object)
    }

    #[test]
    fn what_a_node_makes_of_the_subnets() {
        let underlay = underlay("192.0.2.1");
        let made = |subnets: &[&str]| {
            let spec = network(subnets).unwrap().spec(underlay);
            spec.subnets.iter().map(IpNet::to_string).collect::<Vec<_>>()
        };
        assert_eq!(made(&["10.32.0.0/16"]), ["10.32.0.0/16"]);
        assert_eq!(made(&["fd32::/64", "10.32.0.0/16"]), ["10.32.0.0/16", "fd32::/64"]);
        assert_eq!(made(&["fd32::/64"]), ["fd32::/64", "169.254.56.0/21"], "where pods without IPv4 ask from");
        let error = network(&["10.32.0.0/16", "10.33.0.0/16"]).unwrap_err().to_string();
        assert!(error.starts_with("ContainerNetwork backend is not ready: spec.subnets: "), "{error}");
    }

    #[test]
    fn multicast_is_flooded_unless_it_is_to_be_snooped() {
        let underlay = underlay("192.0.2.1");
        let made = |spec: &str| {
            let mut object = ContainerNetwork::new("backend", serde_json::from_str(spec).unwrap());
            object.status = Some(ContainerNetworkStatus { vni: Some(77), ..Default::default() });
            Network::new(&object).unwrap().spec(underlay).multicast
        };
        assert_eq!(made(r#"{"subnets":["10.32.0.0/16"]}"#), Multicast::Flood, "as releases before the field wrote it");
        assert_eq!(made(r#"{"subnets":["10.32.0.0/16"],"multicast":"Flood"}"#), Multicast::Flood);
        assert_eq!(made(r#"{"subnets":["10.32.0.0/16"],"multicast":"Snooping"}"#), Multicast::Snooping);
    }

    #[test]
    fn an_encrypted_network_has_smaller_packets() {
        let made_over = |vtep: &str, spec: &str| {
            let underlay = underlay(vtep);
            let mut object = ContainerNetwork::new("backend", serde_json::from_str(spec).unwrap());
            let keys = Some(portolan_crds::KeyGeneration { generation: 1, since: None });
            object.status = Some(ContainerNetworkStatus { vni: Some(77), keys, ..Default::default() });
            let network = Network::new(&object).unwrap();
            let spec = network.spec(underlay);
            (spec.encrypted, spec.mtu, network.size(spec.mtu, underlay))
        };
        let made = |spec: &str| made_over("192.0.2.1", spec);
        assert_eq!(
            made(r#"{"subnets":["10.32.0.0/16"]}"#),
            (false, 1450, 1500),
            "as releases before the field wrote it"
        );
        assert_eq!(made(r#"{"subnets":["10.32.0.0/16"],"encryption":"None"}"#), (false, 1450, 1500));
        assert_eq!(made(r#"{"subnets":["10.32.0.0/16"],"encryption":"WireGuard"}"#), (true, 1390, 1500));
        assert_eq!(made(r#"{"subnets":["10.32.0.0/16"],"encryption":"WireGuard","mtu":1300}"#), (true, 1300, 1420));
        // Each outer header is larger by 20 bytes over IPv6.
        let made = |spec: &str| made_over("fd00::1", spec);
        assert_eq!(made(r#"{"subnets":["10.32.0.0/16"]}"#), (false, 1430, 1500));
        assert_eq!(made(r#"{"subnets":["10.32.0.0/16"],"encryption":"WireGuard"}"#), (true, 1350, 1500));
        assert_eq!(made(r#"{"subnets":["10.32.0.0/16"],"encryption":"WireGuard","mtu":1300}"#), (true, 1300, 1456));
    }

    #[test]
    fn addresses_have_their_subnets_prefixes() {
        let network = network(&["fd32::/64", "10.32.0.0/16"]).unwrap();
        let addresses = ["fd32::5", "10.32.0.5", "192.0.2.1"].map(|address| address.parse().unwrap());
        let with_prefixes: Vec<String> = network.with_prefixes(&addresses).map(|it| it.to_string()).collect();
        assert_eq!(with_prefixes, ["10.32.0.5/16", "fd32::5/64"]);
    }
}
