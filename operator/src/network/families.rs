//! Can a network's nodes reach each other by their addresses? A tunnel has one IP family. Pure.

use std::net::IpAddr;

use portolan_crds::{ContainerNetwork, NetworkNodeSlice};

/// Why `IPFamilyMismatch` is `True`.
pub const REASON: &str = "NodesOfBothFamilies";
/// Nodes of a family that a message names before it only counts the rest.
const NAMED_NODES: usize = 5;

/// What there is to say of a network whose nodes have addresses of both families; none of one whose nodes have the same.
pub fn of_network(slices: &[NetworkNodeSlice], network: &ContainerNetwork) -> Option<String> {
    let name = network.metadata.name.as_deref();
    let ours = slices.iter().filter(|slice| Some(slice.spec.network.as_str()) == name);
    let vteps = ours.filter_map(|slice| Some((slice.spec.vtep.parse().ok()?, slice.spec.node.as_str())));
    let (ipv4, ipv6): (Vec<_>, Vec<_>) = vteps.partition(|(vtep, _): &(IpAddr, _)| vtep.is_ipv4());
    if ipv4.is_empty() || ipv6.is_empty() {
        return None;
    }
    let (ipv4, ipv6) = (listed(ipv4), listed(ipv6));
    Some(format!(
        "pods on {ipv4} and pods on {ipv6} don't reach each other: their nodes' addresses are of different IP families. Let the first InternalIP of all nodes be of the same family (the kubelet's --node-ip)"
    ))
}

fn listed(mut nodes: Vec<(IpAddr, &str)>) -> String {
    nodes.sort_by_key(|(_, node)| *node);
    let more = nodes.len().saturating_sub(NAMED_NODES);
    nodes.truncate(NAMED_NODES);
    let named: Vec<String> = nodes.iter().map(|(vtep, node)| format!("{node} ({vtep})")).collect();
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", named.join(", "))
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

    fn said(slices: &[NetworkNodeSlice]) -> Option<String> {
        of_network(slices, &ContainerNetwork::new("a", Default::default()))
    }

    #[test]
    fn nodes_of_one_family_are_fine() {
        assert_eq!(said(&[]), None);
        assert_eq!(
            said(&[slice("a", "x", "192.0.2.1"), slice("a", "y", "192.0.2.2"), slice("b", "z", "fd00::3")]),
            None
        );
        assert_eq!(said(&[slice("a", "x", "fd00::1"), slice("a", "y", "fd00::2"), slice("a", "z", "")]), None);
    }

    #[test]
    fn those_who_do_not_reach_each_other_are_named() {
        let mut slices: Vec<_> = (1..=7).map(|n| slice("a", &format!("n{n}"), &format!("192.0.2.{n}"))).collect();
        slices.push(slice("a", "six", "fd00::6"));
        let said = said(&slices).unwrap();
        assert!(said.starts_with("pods on n1 (192.0.2.1), n2 "), "{said}");
        assert!(
            said.contains("n5 (192.0.2.5) and 2 more and pods on six (fd00::6) don't reach each other: "),
            "{said}"
        );
    }
}
