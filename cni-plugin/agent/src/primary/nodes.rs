//! The pod network as the cluster's Nodes have it. Pure.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{api::core::v1::Node, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::ResourceExt;
use portolan_net::{OtherNode, PodNetwork};

use crate::underlay::Underlay;

/// Keeps what is needed of a Node: the rest is a hundred times as large.
pub(super) fn slim(node: &mut Node) {
    let metadata = std::mem::take(&mut node.metadata);
    let (name, uid, resource_version) = (metadata.name, metadata.uid, metadata.resource_version);
    node.metadata = ObjectMeta { name, uid, resource_version, ..ObjectMeta::default() };
    if let Some(status) = &mut node.status {
        let addresses = status.addresses.take();
        *status = k8s_openapi::api::core::v1::NodeStatus { addresses, ..Default::default() };
    }
}

/// A node's blocks of pods' addresses, at most one of a family, IPv4 first.
fn blocks(node: &Node) -> Vec<IpNet> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let given = spec.pod_cidrs.iter().flatten().chain(spec.pod_cidr.as_ref());
    let mut blocks: Vec<IpNet> =
        given.filter_map(|text| text.parse::<IpNet>().ok()).map(|block| block.trunc()).collect();
    blocks.sort_by_key(|block| block.addr().is_ipv6());
    blocks.dedup_by_key(|block| block.addr().is_ipv6());
    blocks
}

/// Where its agent has the end of its tunnel: the Pod API's `hostIP`, which is the first internal address.
fn vtep(node: &Node) -> Option<IpAddr> {
    let addresses = node.status.as_ref()?.addresses.as_ref()?;
    addresses.iter().filter(|it| it.type_ == "InternalIP").find_map(|it| it.address.parse().ok())
}

/// The nodes whose tunnels end at addresses of the other family, by name.
pub(super) fn unreachable(nodes: &[Arc<Node>], own: &str, underlay: Underlay) -> BTreeMap<String, IpAddr> {
    let others = nodes.iter().filter(|node| node.name_any() != own && !blocks(node).is_empty());
    let vteps = others.filter_map(|node| Some((node.name_any(), vtep(node)?)));
    vteps.filter(|(_, vtep)| !underlay.reaches(*vtep)).collect()
}

/// What the pod network is to be on a node, or what is missing. Nobody else's block leads away what is this node's, and of two nodes with the
/// same addresses the first has them.
pub(super) fn network(nodes: &[Arc<Node>], own: &str, underlay: Underlay) -> Result<PodNetwork, String> {
    let itself = nodes.iter().find(|node| node.name_any() == own);
    let own_blocks = itself.map(|node| blocks(node)).unwrap_or_default();
    if own_blocks.is_empty() {
        let help = "does kube-controller-manager give nodes addresses (--allocate-node-cidrs, --cluster-cidr)?";
        return Err(format!("Node {own} has no spec.podCIDRs: {help}"));
    }
    let others = nodes.iter().filter(|node| node.name_any() != own);
    let others = others.filter_map(|node| Some((node.name_any(), vtep(node)?, blocks(node))));
    let others = others.filter(|(_, vtep, _)| *vtep != underlay.vtep && underlay.reaches(*vtep));
    let mut all: Vec<(IpNet, String, IpAddr)> = others
        .flat_map(|(name, vtep, blocks)| blocks.into_iter().map(move |block| (block, name.clone(), vtep)))
        .collect();
    all.sort();
    let overlap = |one: &IpNet, other: &IpNet| one.contains(other) || other.contains(one);
    all.retain(|(block, _, _)| !own_blocks.iter().any(|own| overlap(own, block)));
    // In their order what overlaps stands side by side.
    all.dedup_by(|next, kept| overlap(&next.0, &kept.0));
    all.sort_by_key(|(block, _, vtep)| (*vtep, *block));
    let mut others: Vec<OtherNode> = Vec::new();
    for (block, _, vtep) in all {
        match others.last_mut() {
            Some(last) if last.vtep == vtep => last.blocks.push(block),
            _ => others.push(OtherNode { vtep, blocks: vec![block] }),
        }
    }
    let mtu = underlay.mtu.saturating_sub(underlay.vxlan());
    Ok(PodNetwork { vtep: underlay.vtep, port: underlay.port, mtu, blocks: own_blocks, others })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const UNDERLAY: Underlay =
        Underlay { vtep: IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)), port: 7789, mtu: 1500 };

    fn node(name: &str, address: &str, blocks: &[&str]) -> Arc<Node> {
        let mut node: Node = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"a": "b"}},
            "spec": {"podCIDR": blocks.first(), "podCIDRs": blocks},
            "status": {"images": [{"names": ["x"]}], "addresses": [
                {"type": "Hostname", "address": name}, {"type": "ExternalIP", "address": "203.0.113.9"},
                {"type": "InternalIP", "address": address}, {"type": "InternalIP", "address": "fd00::99"}]},
        }))
        .unwrap();
        slim(&mut node);
        assert!(node.labels().is_empty() && node.status.as_ref().unwrap().images.is_none());
        Arc::new(node)
    }

    fn others(nodes: &[Arc<Node>]) -> Vec<(String, Vec<String>)> {
        let network = network(nodes, "a", UNDERLAY).unwrap();
        let texts = |node: &OtherNode| node.blocks.iter().map(IpNet::to_string).collect();
        network.others.iter().map(|node| (node.vtep.to_string(), texts(node))).collect()
    }

    #[test]
    fn a_node_knows_its_own_blocks_and_those_of_the_others() {
        let nodes = [
            node("b", "192.0.2.2", &["fd44:0:0:2::/64", "10.244.2.0/24"]),
            node("a", "192.0.2.1", &["10.244.1.0/24", "fd44:0:0:1::/64"]),
            node("new", "192.0.2.3", &[]),
        ];
        let made = network(&nodes, "a", UNDERLAY).unwrap();
        let own: Vec<String> = made.blocks.iter().map(IpNet::to_string).collect();
        assert_eq!((own, made.mtu), (vec!["10.244.1.0/24".into(), "fd44:0:0:1::/64".into()], 1450));
        let expected = vec!["10.244.2.0/24".to_owned(), "fd44:0:0:2::/64".to_owned()];
        assert_eq!(others(&nodes), [("192.0.2.2".to_owned(), expected)]);
        for missing in ["new", "gone"] {
            let error = network(&nodes, missing, UNDERLAY).unwrap_err();
            assert!(error.contains(missing) && error.contains("spec.podCIDRs"), "{error}");
        }
    }

    #[test]
    fn a_node_of_the_other_family_is_not_reached_and_known_by_name() {
        let nodes = [
            node("a", "fd00::1", &["10.244.1.0/24", "fd44:0:0:1::/64"]),
            node("b", "fd00::2", &["10.244.2.0/24", "fd44:0:0:2::/64"]),
            node("c", "192.0.2.3", &["10.244.3.0/24"]),
            node("new", "192.0.2.4", &[]),
        ];
        let underlay = Underlay { vtep: "fd00::1".parse().unwrap(), ..UNDERLAY };
        let made = network(&nodes, "a", underlay).unwrap();
        let vteps: Vec<String> = made.others.iter().map(|other| other.vtep.to_string()).collect();
        assert_eq!((vteps, made.mtu), (vec!["fd00::2".to_owned()], 1430));
        let unreachable = unreachable(&nodes, "a", underlay);
        assert_eq!(unreachable, BTreeMap::from([("c".to_owned(), "192.0.2.3".parse().unwrap())]));
    }

    #[test]
    fn nobody_leads_away_what_is_anothers() {
        let nodes = [
            node("a", "192.0.2.1", &["10.244.1.0/24"]),
            node("same", "192.0.2.2", &["10.244.1.0/24"]),
            node("larger", "192.0.2.3", &["10.244.0.0/16"]),
            node("within", "192.0.2.4", &["10.244.1.128/25"]),
            node("c", "192.0.2.5", &["10.245.0.0/24"]),
            node("d", "192.0.2.6", &["10.245.0.0/24"]),
            node("e", "192.0.2.7", &["10.245.0.128/25"]),
            node("before", "192.0.2.1", &["10.246.0.0/24"]),
        ];
        assert_eq!(others(&nodes), [("192.0.2.5".to_owned(), vec!["10.245.0.0/24".to_owned()])]);
    }
}
