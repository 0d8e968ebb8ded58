//! May a network have its subnets? Pure.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::ResourceExt;
use portolan_crds::{ContainerNetwork, DNS_ADDRESS, EGRESS_RANGES, IPV6_LEAST_MTU, RESOLVER_RANGE, subnets};

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
    range: IpNet,
    owner: String,
}

/// Everything that a network's subnets must keep clear of, of both families.
pub fn taken(nodes: &[Node], service_cidrs: &[ServiceCIDR]) -> Vec<Taken> {
    let dns = Taken { range: host(DNS_ADDRESS.into()), owner: format!("Portolan's DNS address {DNS_ADDRESS}") };
    let owner = format!("the addresses {RESOLVER_RANGE} that pods without IPv4 ask Portolan's DNS from");
    let mut taken = vec![dns, Taken { range: RESOLVER_RANGE.into(), owner }];
    taken.extend(nodes.iter().flat_map(of_node));
    let cidrs = service_cidrs.iter().flat_map(|it| &it.spec).flat_map(|spec| spec.cidrs.iter().flatten());
    let services = |range| Taken { range, owner: format!("the Services' range {range}") };
    taken.extend(cidrs.filter_map(|cidr| net(cidr)).map(services));
    taken
}

fn of_node(node: &Node) -> Vec<Taken> {
    let name = node.name_any();
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let addresses = addresses
        .filter(|address| address.type_ == "InternalIP")
        .filter_map(|address| address.address.parse::<IpAddr>().ok())
        .map(|address| Taken { range: host(address), owner: format!("{name}'s address {address}") });
    let ranges = node.spec.iter().flat_map(|spec| spec.pod_cidrs.iter().flatten());
    let ranges =
        ranges.filter_map(|cidr| net(cidr)).map(|range| Taken { range, owner: format!("{name}'s pod range {range}") });
    addresses.chain(ranges).collect()
}

fn host(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

fn net(cidr: &str) -> Option<IpNet> {
    cidr.parse().ok().map(|range: IpNet| range.trunc())
}

/// Checks the subnets of `network`; returns them, the IPv4 one first.
///
/// # Errors
/// When one isn't usable for pods, or overlaps something in `taken`.
pub fn check(network: &ContainerNetwork, taken: &[Taken]) -> Result<Vec<IpNet>, Refusal> {
    let spec = &network.spec;
    let subnets =
        subnets(&spec.subnets).map_err(|error| Refusal { reason: "SubnetInvalid", message: error.to_string() })?;
    for subnet in &subnets {
        if let Some(other) = taken.iter().find(|other| overlap(other.range, *subnet)) {
            let message = format!("spec.subnets: {subnet} overlaps {}: choose another subnet", other.owner);
            return Err(Refusal { reason: "SubnetOverlaps", message });
        }
    }
    if spec.egress_nat
        && let Some((subnet, range)) = first_overlap(&subnets, &EGRESS_RANGES)
    {
        let message = format!(
            "spec.subnets: {subnet} overlaps the addresses {range} between networks with spec.egressNAT and their nodes: choose another subnet, or egressNAT: false"
        );
        return Err(Refusal { reason: "SubnetOverlaps", message });
    }
    let has_ipv6 = subnets.iter().any(|subnet| matches!(subnet, IpNet::V6(_)));
    match spec.mtu {
        Some(mtu) if has_ipv6 && mtu < IPV6_LEAST_MTU => {
            let message =
                format!("spec.mtu: {mtu} is too small for an IPv6 subnet; allowed: {IPV6_LEAST_MTU} to 9000, or none");
            Err(Refusal { reason: "MTUTooSmall", message })
        }
        _ => Ok(subnets),
    }
}

fn first_overlap<'a>(subnets: &'a [IpNet], ranges: &'a [IpNet]) -> Option<(&'a IpNet, &'a IpNet)> {
    subnets.iter().flat_map(|subnet| ranges.iter().map(move |range| (subnet, range))).find(|(a, b)| overlap(**a, **b))
}

/// Whether two ranges have an address in common; those of different families have none.
fn overlap(one: IpNet, other: IpNet) -> bool {
    one.contains(&other) || other.contains(&one)
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::ContainerNetworkSpec;
    use serde_json::json;

    fn network(subnets: &[&str]) -> ContainerNetwork {
        let subnets = subnets.iter().map(|subnet| (*subnet).to_owned()).collect();
        ContainerNetwork::new("n", ContainerNetworkSpec { subnets, ..Default::default() })
    }

    fn cluster() -> Vec<Taken> {
        let node = |name: &str, address: &str, pods: &str, last: u8| -> Node {
            serde_json::from_value(json!({
                "metadata": {"name": name},
                "spec": {"podCIDRs": [pods, format!("fd00:0:0:{last}::/64")]},
                "status": {"addresses": [
                    {"type": "Hostname", "address": name},
                    {"type": "InternalIP", "address": address},
                    {"type": "InternalIP", "address": format!("fd01::{last}")},
                ]},
            }))
            .unwrap()
        };
        let services = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16", "fd02::/108"]}});
        let nodes = [node("node1", "10.89.0.11", "10.244.0.0/24", 1), node("node2", "10.89.0.12", "10.244.1.0/24", 2)];
        taken(&nodes, &[serde_json::from_value(services).unwrap()])
    }

    #[test]
    fn free_subnets_are_accepted() {
        let both: Vec<IpNet> = vec!["10.32.0.0/16".parse().unwrap(), "fd32::/64".parse().unwrap()];
        assert_eq!(check(&network(&["fd32::/64", "10.32.0.0/16"]), &cluster()), Ok(both.clone()));
        assert_eq!(check(&network(&["10.32.0.0/16"]), &cluster()), Ok(both[..1].to_vec()));
        assert_eq!(check(&network(&["fd32::/64"]), &cluster()), Ok(both[1..].to_vec()));
    }

    #[test]
    fn what_is_taken_is_named_with_its_owner() {
        for (subnet, owner) in [
            ("10.89.0.0/24", "node1's address 10.89.0.11"),
            ("10.244.1.128/25", "node2's pod range 10.244.1.0/24"),
            ("10.244.0.0/15", "node1's pod range 10.244.0.0/24"),
            ("10.96.12.0/24", "the Services' range 10.96.0.0/16"),
            ("169.254.0.0/16", "Portolan's DNS address 169.254.53.53"),
            ("169.254.57.0/24", "the addresses 169.254.56.0/21 that pods without IPv4 ask Portolan's DNS from"),
            ("fd01::/64", "node1's address fd01::1"),
            ("fd00:0:0:2::/96", "node2's pod range fd00:0:0:2::/64"),
            ("fd00::/48", "node1's pod range fd00:0:0:1::/64"),
            ("fd02::/64", "the Services' range fd02::/108"),
        ] {
            let other = if subnet.contains(':') { "10.32.0.0/16" } else { "fd32::/64" };
            for subnets in [&[subnet][..], &[subnet, other], &[other, subnet]] {
                let refusal = check(&network(subnets), &cluster()).unwrap_err();
                assert_eq!(refusal.reason, "SubnetOverlaps");
                assert_eq!(refusal.message, format!("spec.subnets: {subnet} overlaps {owner}: choose another subnet"));
            }
        }
    }

    #[test]
    fn subnets_that_pods_cannot_use_are_invalid() {
        for subnets in [&["127.0.0.0/8"][..], &["fe80::/64"], &["backend"], &["10.32.0.0/16", "10.33.0.0/16"], &[]] {
            let refusal = check(&network(subnets), &cluster()).unwrap_err();
            assert_eq!(refusal.reason, "SubnetInvalid", "{subnets:?}");
            assert!(refusal.message.starts_with("spec.subnets: "), "{}", refusal.message);
            assert!(refusal.message.contains(&subnets.join(", ")), "{}", refusal.message);
        }
    }

    #[test]
    fn a_way_outside_needs_its_own_addresses() {
        for subnet in ["169.254.64.0/24", "fd70:6f72:746f:6c00::/64", "fd70:6f72:746f::/48"] {
            let mut network = network(&[subnet]);
            assert!(check(&network, &cluster()).is_ok(), "{subnet} of a network without a gateway");
            network.spec.egress_nat = true;
            let refusal = check(&network, &cluster()).unwrap_err();
            assert_eq!(refusal.reason, "SubnetOverlaps");
            assert!(refusal.message.contains(subnet) && refusal.message.contains("egressNAT"), "{refusal:?}");
        }
    }

    #[test]
    fn ipv6_needs_its_least_mtu() {
        let with_mtu = |subnets: &[&str], mtu| {
            let mut network = network(subnets);
            network.spec.mtu = Some(mtu);
            check(&network, &cluster()).map(drop)
        };
        let refusal = with_mtu(&["10.32.0.0/16", "fd32::/64"], 1279).unwrap_err();
        assert_eq!(refusal.reason, "MTUTooSmall");
        assert!(refusal.message.starts_with("spec.mtu: 1279 ") && refusal.message.contains("1280"), "{refusal:?}");
        assert_eq!(with_mtu(&["fd32::/64"], 1280), Ok(()));
        assert_eq!(with_mtu(&["10.32.0.0/16"], 576), Ok(()));
    }
}
