//! May a network have its subnet? Pure.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::ResourceExt;
use portolan_crds::{ContainerNetwork, DNS_ADDRESS};

/// Why a network can't be used: the Ready condition's reason and message.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// Reason of the condition and of the Event.
    pub reason: &'static str,
    /// What is wrong, and what to do.
    pub message: String,
}

/// A range that is in use elsewhere: a pod that reaches it through a network could not reach its true owner.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Taken {
    range: Ipv4Net,
    owner: String,
}

/// Everything that a network's subnet must keep clear of.
pub fn taken(nodes: &[Node], service_cidrs: &[ServiceCIDR]) -> Vec<Taken> {
    let mut taken = vec![Taken { range: host(DNS_ADDRESS), owner: format!("Portolan's DNS address {DNS_ADDRESS}") }];
    for node in nodes {
        taken.extend(of_node(node));
    }
    for service_cidr in service_cidrs {
        let cidrs = service_cidr.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten());
        taken.extend(
            cidrs
                .filter_map(|cidr| v4(cidr))
                .map(|range| Taken { range, owner: format!("the Services' range {range}") }),
        );
    }
    taken
}

fn of_node(node: &Node) -> impl Iterator<Item = Taken> {
    let name = node.name_any();
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let addresses = addresses
        .filter(|address| address.type_ == "InternalIP")
        .filter_map(|address| address.address.parse::<Ipv4Addr>().ok())
        .map(|address| Taken { range: host(address), owner: format!("{name}'s address {address}") })
        .collect::<Vec<_>>();
    let ranges = node.spec.iter().flat_map(|spec| spec.pod_cidrs.iter().flatten());
    let ranges = ranges
        .filter_map(|cidr| v4(cidr))
        .map(|range| Taken { range, owner: format!("{name}'s pod range {range}") })
        .collect::<Vec<_>>();
    addresses.into_iter().chain(ranges)
}

fn host(address: Ipv4Addr) -> Ipv4Net {
    Ipv4Net::from(address)
}

fn v4(cidr: &str) -> Option<Ipv4Net> {
    match cidr.parse() {
        Ok(IpNet::V4(range)) => Some(range.trunc()),
        _ => None,
    }
}

/// Checks the subnet of `network`.
///
/// # Errors
/// When it isn't usable for pods, or overlaps something in `taken`.
pub fn check(network: &ContainerNetwork, taken: &[Taken]) -> Result<(), Refusal> {
    for given in &network.spec.subnets {
        let subnet = v4(given).ok_or_else(|| Refusal {
            reason: "SubnetInvalid",
            message: format!("subnet {given} is not an IPv4 CIDR: give one such as 10.32.0.0/16"),
        })?;
        if !is_unicast(subnet) {
            let message =
                format!("subnet {subnet} holds addresses that no pod can have: give one such as 10.32.0.0/16");
            return Err(Refusal { reason: "SubnetInvalid", message });
        }
        if let Some(other) = taken.iter().find(|other| overlap(other.range, subnet)) {
            let message = format!("subnet {subnet} overlaps {}: choose another subnet", other.owner);
            return Err(Refusal { reason: "SubnetOverlaps", message });
        }
    }
    Ok(())
}

fn overlap(one: Ipv4Net, other: Ipv4Net) -> bool {
    one.contains(&other.network()) || other.contains(&one.network())
}

/// Neither "this network" nor loopback nor multicast nor reserved (RFC 6890).
fn is_unicast(subnet: Ipv4Net) -> bool {
    let (first, last) = (subnet.network(), subnet.broadcast());
    let octet = |address: Ipv4Addr| address.octets()[0];
    octet(first) != 0 && octet(last) < 224 && !IpAddr::V4(first).is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::ContainerNetworkSpec;
    use serde_json::json;

    fn network(subnet: &str) -> ContainerNetwork {
        ContainerNetwork::new("n", ContainerNetworkSpec { subnets: vec![subnet.to_owned()], ..Default::default() })
    }

    fn cluster() -> Vec<Taken> {
        let node = |name: &str, address: &str, pods: &str| -> Node {
            serde_json::from_value(json!({
                "metadata": {"name": name},
                "spec": {"podCIDRs": [pods, "fd00::/64"]},
                "status": {"addresses": [
                    {"type": "Hostname", "address": name},
                    {"type": "InternalIP", "address": address},
                    {"type": "InternalIP", "address": "fd01::1"},
                ]},
            }))
            .unwrap()
        };
        let services =
            serde_json::from_value(json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}}));
        let nodes = [node("node1", "10.89.0.11", "10.244.0.0/24"), node("node2", "10.89.0.12", "10.244.1.0/24")];
        taken(&nodes, &[services.unwrap()])
    }

    #[test]
    fn a_free_subnet_is_accepted() {
        assert_eq!(check(&network("10.32.0.0/16"), &cluster()), Ok(()));
    }

    #[test]
    fn what_is_taken_is_named_with_its_owner() {
        for (subnet, owner) in [
            ("10.89.0.0/24", "node1's address 10.89.0.11"),
            ("10.244.1.128/25", "node2's pod range 10.244.1.0/24"),
            ("10.244.0.0/15", "node1's pod range 10.244.0.0/24"),
            ("10.96.12.0/24", "the Services' range 10.96.0.0/16"),
            ("169.254.0.0/16", "Portolan's DNS address 169.254.53.53"),
        ] {
            let refusal = check(&network(subnet), &cluster()).unwrap_err();
            assert_eq!(refusal.reason, "SubnetOverlaps");
            assert_eq!(refusal.message, format!("subnet {subnet} overlaps {owner}: choose another subnet"));
        }
    }

    #[test]
    fn a_subnet_that_pods_cannot_use_is_invalid() {
        for subnet in ["127.0.0.0/8", "224.0.0.0/8", "0.0.0.0/8", "fd00::/64", "backend"] {
            let refusal = check(&network(subnet), &cluster()).unwrap_err();
            assert_eq!(refusal.reason, "SubnetInvalid", "{subnet}");
            assert!(refusal.message.contains(subnet), "{}", refusal.message);
        }
    }
}
