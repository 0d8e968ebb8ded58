//! Do a network's pods reach the outside, if they are to? Pure.

use std::net::IpAddr;

use kube::ResourceExt;
use portolan_crds::{ContainerNetwork, NetworkNodeSlice, condition, gateway, subnets};

/// The condition's state, reason and message.
pub type Finding = (&'static str, &'static str, String);

/// Nodes that a message names before it only counts the rest.
const NAMED_NODES: usize = 5;

/// What is to be said of one network; nothing if it has no `egressNAT`. A pod that has a gateway's address keeps it, and then there is no gateway:
/// nodes see to that themselves, by the same slices.
pub fn of_network(slices: &[NetworkNodeSlice], network: &ContainerNetwork) -> Option<Finding> {
    if !network.spec.egress_nat {
        return None;
    }
    let name = network.name_any();
    let gateways: Vec<IpAddr> = subnets(&network.spec.subnets).unwrap_or_default().into_iter().map(gateway).collect();
    let slices: Vec<&NetworkNodeSlice> = slices.iter().filter(|slice| slice.spec.network == name).collect();
    if let Some((address, holder)) = holder(&slices, &gateways) {
        let message = format!(
            "{address} would be the gateway, and {holder} has it: there is no gateway on any node. Give the pod another address (kubectl delete ipclaim, if it has one, and the pod), or set spec.egressNAT to false"
        );
        return Some((condition::FALSE, "GatewayTaken", message));
    }
    let problem = |slice: &&NetworkNodeSlice| {
        slice.spec.egress_problem.as_ref().map(|problem| format!("{}: {problem}", slice.spec.node))
    };
    let mut problems: Vec<String> = slices.iter().filter_map(problem).collect();
    if problems.is_empty() {
        let gateways: Vec<String> = gateways.iter().map(IpAddr::to_string).collect();
        return Some((condition::TRUE, "GatewayOnEachNode", format!("by {}", gateways.join(" and "))));
    }
    problems.sort();
    let more = problems.len().saturating_sub(NAMED_NODES);
    problems.truncate(NAMED_NODES);
    let more = if more > 0 { format!("; and {more} more nodes") } else { String::new() };
    Some((condition::FALSE, "NodesDoNotForward", format!("no way outside from {}{more}", problems.join("; "))))
}

/// The pod that has a gateway's address. One that isn't plugged in, and for which it is kept, is refused when it comes.
fn holder(slices: &[&NetworkNodeSlice], gateways: &[IpAddr]) -> Option<(IpAddr, String)> {
    let is_gateway = |address: &IpAddr| gateways.contains(address);
    let plugged = slices.iter().flat_map(|slice| slice.spec.endpoints.iter().map(move |it| (it, &slice.spec.node)));
    let holders = plugged.filter_map(|(it, node)| {
        Some((it.addresses().find(is_gateway)?, format!("pod {}/{} ({node})", it.namespace, it.pod)))
    });
    holders.min_by(|a, b| a.1.cmp(&b.1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::{ContainerNetworkSpec, Endpoint, NetworkNodeSliceSpec};

    fn network(egress_nat: bool) -> ContainerNetwork {
        let subnets = vec!["10.32.0.0/16".to_owned(), "fd32::/64".to_owned()];
        ContainerNetwork::new("a", ContainerNetworkSpec { subnets, egress_nat, ..Default::default() })
    }

    fn slice(network: &str, node: &str, addresses: &[&str], problem: Option<&str>) -> NetworkNodeSlice {
        let endpoint = |address: &&str| Endpoint {
            address: (*address).to_owned(),
            namespace: "shop".to_owned(),
            pod: format!("at-{address}"),
            ..Default::default()
        };
        let spec = NetworkNodeSliceSpec {
            network: network.to_owned(),
            node: node.to_owned(),
            endpoints: addresses.iter().map(endpoint).collect(),
            egress_problem: problem.map(str::to_owned),
            ..Default::default()
        };
        NetworkNodeSlice::new(&format!("{network}.{node}"), spec)
    }

    #[test]
    fn nothing_is_said_unless_it_is_asked_for() {
        assert_eq!(of_network(&[slice("a", "n1", &["10.32.0.1"], Some("x"))], &network(false)), None);
        let fine = of_network(&[slice("a", "n1", &["10.32.0.5"], None)], &network(true)).unwrap();
        assert_eq!(fine, ("True", "GatewayOnEachNode", "by 10.32.0.1 and fd32::1".to_owned()));
    }

    #[test]
    fn a_pod_that_has_the_gateways_address_is_named() {
        for address in ["10.32.0.1", "fd32::1"] {
            let slices = [slice("a", "n1", &["10.32.0.5"], None), slice("a", "n2", &[address], None)];
            let (state, reason, message) = of_network(&slices, &network(true)).unwrap();
            assert_eq!((state, reason), ("False", "GatewayTaken"));
            let named = format!("{address} would be the gateway, and pod shop/at-{address} (n2) has it");
            assert!(message.starts_with(&named), "{message}");
        }
        let other = [slice("b", "n1", &["10.32.0.1"], None)];
        assert_eq!(of_network(&other, &network(true)).unwrap().0, "True", "another network's");
    }

    #[test]
    fn nodes_that_forward_nothing_are_named() {
        let problem = Some("net.ipv4.ip_forward is not 1");
        let mut slices: Vec<NetworkNodeSlice> = (1..8).map(|n| slice("a", &format!("n{n}"), &[], problem)).collect();
        let (state, reason, message) = of_network(&slices[..1], &network(true)).unwrap();
        assert_eq!((state, reason), ("False", "NodesDoNotForward"));
        assert_eq!(message, "no way outside from n1: net.ipv4.ip_forward is not 1");
        let many = of_network(&slices, &network(true)).unwrap().2;
        assert!(many.contains("n5: ") && !many.contains("n6: ") && many.ends_with("; and 2 more nodes"), "{many}");
        slices.iter_mut().for_each(|slice| slice.spec.egress_problem = None);
        assert_eq!(of_network(&slices, &network(true)).unwrap().0, "True");
    }
}
