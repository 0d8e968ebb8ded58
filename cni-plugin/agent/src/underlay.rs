//! This node's part of the nodes' own network, and which of the other nodes it reaches: a tunnel has one family, that of its node's address.

use std::{
    borrow::Borrow,
    collections::BTreeMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use portolan_crds::NetworkNodeSlice;
use portolan_net::{vxlan_overhead, wireguard_overhead};

use crate::agent::Agent;

/// What is the same for all networks of a node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Underlay {
    pub vtep: IpAddr,
    pub port: u16,
    /// The MTU in bytes of the interface that has that address.
    pub mtu: u32,
}

impl Underlay {
    /// Whether tunnels of this node can go to that address.
    pub fn reaches(&self, vtep: IpAddr) -> bool {
        self.vtep.is_ipv4() == vtep.is_ipv4()
    }

    /// What VXLAN adds to a frame, in bytes.
    pub fn vxlan(&self) -> u32 {
        vxlan_overhead(self.vtep)
    }

    /// What WireGuard adds to that, in bytes.
    pub fn wireguard(&self) -> u32 {
        wireguard_overhead(self.vtep)
    }

    /// The nodes among them that have this node's networks and an address of the other family, by name.
    pub fn unreachable(
        &self,
        own: &str,
        is_ours: impl Fn(&str) -> bool,
        slices: &[impl Borrow<NetworkNodeSlice>],
    ) -> BTreeMap<String, IpAddr> {
        let others = slices.iter().map(|slice| &slice.borrow().spec);
        let others = others.filter(|spec| spec.node != own && is_ours(&spec.network));
        let vteps = others.filter_map(|spec| Some((spec.node.clone(), spec.vtep.parse().ok()?)));
        vteps.filter(|(_, vtep)| !self.reaches(*vtep)).collect()
    }
}

/// The nodes that aren't reached, as they were told last.
#[derive(Debug, Default)]
pub(crate) struct Unreachable(Mutex<BTreeMap<String, IpAddr>>);

impl Unreachable {
    /// Says which have come and gone since the last time.
    pub fn tell(&self, own: IpAddr, nodes: &BTreeMap<String, IpAddr>) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (node, vtep) in nodes.iter().filter(|(node, vtep)| told.get(*node) != Some(vtep)) {
            tracing::warn!(
                node, %vtep, %own,
                "a node is not reached: its address is of the other IP family; the first InternalIP of all nodes has to be of the same"
            );
        }
        for node in told.keys().filter(|node| !nodes.contains_key(*node)) {
            tracing::info!(
                node,
                "a node is gone that had an address of the other IP family, or it has another one now"
            );
        }
        told.clone_from(nodes);
    }
}

impl Agent {
    /// Says which nodes with networks of this one it can't send to; returns their addresses.
    pub(crate) fn tell_unreachable(
        &self,
        is_ours: impl Fn(&str) -> bool,
        slices: &[impl Borrow<NetworkNodeSlice>],
    ) -> Vec<IpAddr> {
        let nodes = self.underlay.unreachable(&self.cluster.node, is_ours, slices);
        self.metrics.unreachable_nodes.set(i64::try_from(nodes.len()).unwrap_or(i64::MAX));
        self.unreachable.tell(self.underlay.vtep, &nodes);
        nodes.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::NetworkNodeSliceSpec;

    fn slice(network: &str, node: &str, vtep: &str) -> NetworkNodeSlice {
        let (network, node, vtep) = (network.to_owned(), node.to_owned(), vtep.to_owned());
        let name = format!("{network}.{node}");
        NetworkNodeSlice::new(&name, NetworkNodeSliceSpec { network, node, vtep, ..Default::default() })
    }

    #[test]
    fn nodes_of_the_other_family_are_known() {
        let slices = [
            slice("a", "own", "fd00::1"),
            slice("a", "near", "fd00::2"),
            slice("a", "far", "192.0.2.3"),
            slice("b", "elsewhere", "192.0.2.4"),
            slice("a", "odd", "nowhere"),
        ];
        let of = |vtep: &str| {
            let underlay = Underlay { vtep: vtep.parse().unwrap(), port: 7789, mtu: 1500 };
            underlay.unreachable("own", |network| network == "a", &slices).into_keys().collect::<Vec<_>>()
        };
        assert_eq!(of("fd00::1"), ["far"]);
        assert_eq!(of("192.0.2.1"), ["near"]);
    }
}
