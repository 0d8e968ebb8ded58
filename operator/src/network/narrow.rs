//! Which paths between nodes carry less than a network's pods may send, and what helps. Pure.

use std::net::{IpAddr, Ipv4Addr};

use portolan_crds::{
    ContainerNetwork, Encryption, IPV6_LEAST_MTU, NetworkNodeSlice, PathMtu, WIREGUARD_PADDING, vxlan_overhead,
    wireguard_overhead,
};

/// Why `MTUMismatch` is `True`; of the Event, too.
pub const REASON: &str = "PathTooSmall";
/// Paths that a message names before it only counts the rest.
const NAMED_PATHS: usize = 5;
/// The smallest `spec.mtu` of a network without an IPv6 subnet.
const LEAST_MTU: u32 = 576;

/// What there is to say of a network's paths; none if no path is known to be too small.
pub fn of_network(slices: &[NetworkNodeSlice], network: &ContainerNetwork) -> Option<String> {
    let name = network.metadata.name.as_deref();
    let ours = slices.iter().filter(|slice| Some(slice.spec.network.as_str()) == name);
    let told: Vec<(&NetworkNodeSlice, &PathMtu)> =
        ours.filter_map(|slice| Some((slice, slice.spec.path_mtu.as_ref()?))).collect();
    let needed = told.iter().map(|(_, it)| it.needed).max()?;
    let most = told.iter().map(|(from, it)| most(network, vtep(from), it.needed)).max()?;
    let paths = || told.iter().flat_map(|(from, it)| it.small.iter().map(move |to| (*from, to)));
    let fits = paths().map(|(from, to)| fits(network, vtep(from), to.mtu)).min()?;
    let mut paths: Vec<(u32, &str, &str)> =
        paths().map(|(from, to)| (to.mtu, from.spec.node.as_str(), to.node.as_str())).collect();
    paths.sort_unstable();
    let named: Vec<String> =
        paths.iter().take(NAMED_PATHS).map(|(mtu, from, to)| format!("from {from} to {to} {mtu} pass")).collect();
    let counted: u32 = told.iter().map(|(_, it)| it.more).sum();
    Some(format!(
        "pods' MTU is {most}, which needs {needed} bytes between nodes; {}{}: {}",
        named.join(", "),
        rest(paths.len().saturating_sub(NAMED_PATHS), counted),
        advice(network, fits),
    ))
}

/// The MTU of pods whose packets are `size` bytes between nodes; the largest if there are several.
fn most(network: &ContainerNetwork, vtep: IpAddr, size: u32) -> u32 {
    let encryption = if is_encrypted(network) { wireguard_overhead(vtep) } else { 0 };
    size.saturating_sub(vxlan_overhead(vtep) + encryption)
}

/// The node's address, of which the family counts.
fn vtep(slice: &NetworkNodeSlice) -> IpAddr {
    slice.spec.vtep.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

/// The largest MTU of pods whose packets get through where `size` bytes do.
fn fits(network: &ContainerNetwork, vtep: IpAddr, size: u32) -> u32 {
    if !is_encrypted(network) {
        return most(network, vtep, size);
    }
    let inside = size.saturating_sub(wireguard_overhead(vtep));
    (inside - inside % WIREGUARD_PADDING).saturating_sub(vxlan_overhead(vtep))
}

fn is_encrypted(network: &ContainerNetwork) -> bool {
    network.spec.encryption == Encryption::WireGuard
}

/// Paths that aren't named: slices count some of them exactly, and of the others a part.
fn rest(exactly: usize, at_least: u32) -> String {
    match (exactly, at_least) {
        (0, 0) => String::new(),
        (exactly, 0) => format!(", and {exactly} more paths are too small"),
        (exactly, at_least) => {
            let all = u64::try_from(exactly).unwrap_or(u64::MAX).saturating_add(at_least.into());
            format!(", and at least {all} more paths are too small")
        }
    }
}

/// What helps, where pods may have no larger MTU than `fits`.
fn advice(network: &ContainerNetwork, fits: u32) -> String {
    let has_ipv6 = network.spec.subnets.iter().any(|subnet| subnet.contains(':'));
    let allowed = if has_ipv6 { IPV6_LEAST_MTU } else { LEAST_MTU };
    if fits < allowed {
        return format!("repair the underlay (spec.mtu can't be less than {allowed})");
    }
    if network.spec.mtu.is_some_and(|mtu| mtu <= fits) {
        return "spec.mtu is small enough by now, but some pods were made before: make them again (kubectl rollout restart)".to_owned();
    }
    format!("set spec.mtu to {fits} or less and make the pods again (kubectl rollout restart), or repair the underlay")
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::{ContainerNetworkSpec, NetworkNodeSliceSpec, SmallPath};

    fn network(subnet: &str, mtu: Option<u32>) -> ContainerNetwork {
        ContainerNetwork::new("a", ContainerNetworkSpec { subnets: vec![subnet.into()], mtu, ..Default::default() })
    }

    fn slice(network: &str, node: &str, small: &[(&str, u32)], more: u32) -> NetworkNodeSlice {
        let small: Vec<_> = small.iter().map(|(node, mtu)| SmallPath { node: (*node).into(), mtu: *mtu }).collect();
        let path_mtu = (!small.is_empty()).then_some(PathMtu { needed: 1500, small, more });
        let spec = NetworkNodeSliceSpec { network: network.into(), node: node.into(), path_mtu, ..Default::default() };
        NetworkNodeSlice::new(&format!("{network}.{node}"), spec)
    }

    #[test]
    fn the_path_and_what_helps_are_told() {
        let slices = [slice("a", "node-a", &[("node-b", 1420)], 0), slice("a", "node-b", &[], 0)];
        assert_eq!(
            of_network(&slices, &network("10.32.0.0/16", None)).unwrap(),
            "pods' MTU is 1450, which needs 1500 bytes between nodes; from node-a to node-b 1420 pass: set spec.mtu to 1370 or less and make the pods again (kubectl rollout restart), or repair the underlay"
        );
    }

    #[test]
    fn encryption_counts() {
        let slices = [slice("a", "node-a", &[("node-b", 1420)], 0)];
        let mut network = network("10.32.0.0/16", None);
        network.spec.encryption = Encryption::WireGuard;
        let message = of_network(&slices, &network).unwrap();
        // 1360 are a multiple of 16, of which VXLAN needs 50.
        assert!(message.starts_with("pods' MTU is 1390, which needs 1500 bytes between nodes; "), "{message}");
        assert!(message.contains(": set spec.mtu to 1310 or less "), "{message}");
        let less = [slice("a", "node-a", &[("node-b", 1419)], 0)];
        let message = of_network(&less, &network).unwrap();
        assert!(message.contains(": set spec.mtu to 1294 or less "), "{message}");
    }

    #[test]
    fn headers_of_ipv6_count() {
        let mut slices = [slice("a", "node-a", &[("node-b", 1420)], 0)];
        slices[0].spec.vtep = "fd00::1".into();
        let mut network = network("10.32.0.0/16", None);
        let message = of_network(&slices, &network).unwrap();
        assert!(message.starts_with("pods' MTU is 1430, which needs 1500 bytes between nodes; "), "{message}");
        assert!(message.contains(": set spec.mtu to 1350 or less "), "{message}");
        network.spec.encryption = Encryption::WireGuard;
        let message = of_network(&slices, &network).unwrap();
        // 1328 are a multiple of 16, of which VXLAN needs 70.
        assert!(message.starts_with("pods' MTU is 1350, which needs 1500 bytes between nodes; "), "{message}");
        assert!(message.contains(": set spec.mtu to 1258 or less "), "{message}");
    }

    #[test]
    fn a_network_hears_of_its_own_paths_only() {
        let slices = [slice("b", "node-a", &[("node-b", 1420)], 0), slice("a", "node-b", &[], 0)];
        assert_eq!(of_network(&slices, &network("10.32.0.0/16", None)), None);
    }

    #[test]
    fn the_smallest_path_counts_and_is_named_first() {
        let slices = [
            slice("a", "x", &[("y", 1420), ("z", 1430)], 0),
            slice("a", "y", &[("x", 1300)], 0),
            slice("a", "z", &[], 0),
        ];
        let message = of_network(&slices, &network("10.32.0.0/16", None)).unwrap();
        assert!(
            message.contains(
                "; from y to x 1300 pass, from x to y 1420 pass, from x to z 1430 pass: set spec.mtu to 1250 "
            ),
            "{message}"
        );
    }

    #[test]
    fn many_paths_are_counted() {
        let six = [("b", 1400), ("c", 1400), ("d", 1400), ("e", 1400), ("f", 1400), ("g", 1400)];
        let of = |more| of_network(&[slice("a", "a", &six, more)], &network("10.32.0.0/16", None)).unwrap();
        assert!(of(0).contains("from a to f 1400 pass, and 1 more paths are too small: set"), "{}", of(0));
        assert!(of(64).contains("from a to f 1400 pass, and at least 65 more paths are too small: set"), "{}", of(64));
    }

    #[test]
    fn nothing_is_advised_that_does_not_help() {
        let slices = |mtu| [slice("a", "node-a", &[("node-b", mtu)], 0)];
        let told = |mtu, subnet, given| of_network(&slices(mtu), &network(subnet, given)).unwrap();
        assert!(told(1320, "fd32::/64", None).ends_with(": repair the underlay (spec.mtu can't be less than 1280)"));
        assert!(told(1330, "fd32::/64", None).contains("set spec.mtu to 1280 or less"));
        assert!(told(1320, "10.32.0.0/16", None).contains("set spec.mtu to 1270 or less"));
        assert!(told(600, "10.32.0.0/16", None).ends_with(": repair the underlay (spec.mtu can't be less than 576)"));
        // The pods that were there before keep their MTU.
        assert!(told(1420, "10.32.0.0/16", Some(1370)).ends_with("make them again (kubectl rollout restart)"));
        assert!(told(1420, "10.32.0.0/16", Some(1371)).contains("set spec.mtu to 1370 or less"));
    }
}
