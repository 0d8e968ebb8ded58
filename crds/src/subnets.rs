//! A network's subnets: which are allowed, and how many addresses each has for pods.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};

/// Prefix lengths of IPv4 subnets, from the shortest to the longest.
const IPV4_PREFIXES: (u8, u8) = (8, 29);
/// Prefix lengths of IPv6 subnets, from the shortest to the longest.
const IPV6_PREFIXES: (u8, u8) = (48, 120);
/// Of a larger IPv6 subnet only the first part of this prefix length is given to pods: as many addresses as an IPv4 /8 has.
const IPV6_POOL: u8 = 104;
/// The least MTU of a link that carries IPv6, in bytes (RFC 8200, section 5).
pub const IPV6_LEAST_MTU: u32 = 1280;
/// WireGuard fills packets up to a multiple of so many bytes.
pub const WIREGUARD_PADDING: u32 = 16;

/// Bytes of an IP header between nodes: 20 (RFC 791, section 3.1) or 40 (RFC 8200, section 3).
const fn ip_header(vtep: IpAddr) -> u32 {
    if vtep.is_ipv4() { 20 } else { 40 }
}

/// What VXLAN adds to a pod's packet from a node with that address, in bytes (RFC 7348, section 5): Ethernet 14, VXLAN 8, UDP 8, IP 20 or 40.
pub const fn vxlan_overhead(vtep: IpAddr) -> u32 {
    ip_header(vtep) + 30
}

/// What WireGuard adds to that, in bytes: outer IP 20 or 40, UDP 8, header 16, authentication tag 16.
pub const fn wireguard_overhead(vtep: IpAddr) -> u32 {
    ip_header(vtep) + 40
}

/// What a network can't have as its subnets.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("spec.subnets: {given:?} {problem}; allowed: one IPv4 CIDR from /{} to /{}, one IPv6 CIDR from /{} to /{}, or one of each, without host bits, such as 10.32.0.0/16 and fd32::/64", IPV4_PREFIXES.0, IPV4_PREFIXES.1, IPV6_PREFIXES.0, IPV6_PREFIXES.1)]
pub struct SubnetError {
    given: String,
    problem: String,
}

/// Reads a network's subnets; returns them with the IPv4 one first.
///
/// # Errors
/// When one is no CIDR that pods can have addresses of, or there are none or two of one family.
pub fn subnets(given: &[String]) -> Result<Vec<IpNet>, SubnetError> {
    let mut subnets = given.iter().map(|one| subnet(one)).collect::<Result<Vec<_>, _>>()?;
    subnets.sort_by_key(is_ipv6);
    let refuse = |problem: &str| Err(SubnetError { given: given.join(", "), problem: problem.to_owned() });
    match subnets.iter().map(is_ipv6).collect::<Vec<_>>().as_slice() {
        [] => refuse("has no subnet"),
        [_] | [false, true] => Ok(subnets),
        _ => refuse("has more than one subnet of a family"),
    }
}

fn subnet(given: &str) -> Result<IpNet, SubnetError> {
    let refuse = |problem: String| SubnetError { given: given.to_owned(), problem };
    let net: IpNet = given.parse().map_err(|_| refuse("is not a CIDR".to_owned()))?;
    if net != net.trunc() {
        return Err(refuse(format!("has host bits (the subnet is {})", net.trunc())));
    }
    if !is_unicast(net) {
        return Err(refuse("holds addresses that no pod can have".to_owned()));
    }
    let (shortest, longest) = if is_ipv6(&net) { IPV6_PREFIXES } else { IPV4_PREFIXES };
    if !(shortest..=longest).contains(&net.prefix_len()) {
        return Err(refuse("is too large or too small".to_owned()));
    }
    Ok(net)
}

/// IPv4: neither "this network" nor loopback nor multicast nor reserved (RFC 6890). IPv6: global unicast that is delegated, or unique local
/// (RFC 4193); not link-local, not IPv4 in disguise.
fn is_unicast(net: IpNet) -> bool {
    match net {
        IpNet::V4(net) => {
            let (first, last) = (net.network().octets()[0], net.broadcast().octets()[0]);
            first != 0 && first != 127 && last < 224
        }
        IpNet::V6(net) => [("2000::", 3), ("fc00::", 7)].iter().any(|(address, prefix)| {
            let whole = address.parse::<Ipv6Addr>().ok().and_then(|address| Ipv6Net::new(address, *prefix).ok());
            whole.is_some_and(|whole| whole.contains(&net))
        }),
    }
}

fn is_ipv6(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(_))
}

/// The part of a subnet that pods get addresses of: all of an IPv4 subnet, the first /104 of a larger IPv6 subnet.
pub fn pool(subnet: IpNet) -> IpNet {
    match subnet {
        IpNet::V6(net) => Ipv6Net::new(net.network(), net.prefix_len().max(IPV6_POOL)).unwrap_or(net).into(),
        IpNet::V4(_) => subnet,
    }
}

/// The address of a subnet's gateway, where the network has some: its first host address.
pub fn gateway(subnet: IpNet) -> IpAddr {
    match subnet {
        IpNet::V4(net) => std::net::Ipv4Addr::from_bits(net.network().to_bits().saturating_add(1)).into(),
        IpNet::V6(net) => Ipv6Addr::from_bits(net.network().to_bits().saturating_add(1)).into(),
    }
}

/// How many addresses of a subnet pods can have. Its own is none of them, nor the first after it, nor an IPv4 subnet's broadcast
/// address.
pub fn capacity(subnet: IpNet) -> u64 {
    let pool = pool(subnet);
    let bits = u32::from(pool.max_prefix_len() - pool.prefix_len());
    let kept_free = if is_ipv6(&pool) { 2 } else { 3 };
    1u64.checked_shl(bits).unwrap_or(u64::MAX).saturating_sub(kept_free)
}

/// An address and a second one as texts, parsed; what is none is left out.
pub(crate) fn addresses<'a>(first: &'a str, second: Option<&'a str>) -> impl Iterator<Item = IpAddr> + use<'a> {
    [Some(first), second].into_iter().flatten().filter_map(|address| address.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(given: &[&str]) -> Result<String, String> {
        let given: Vec<String> = given.iter().map(|one| (*one).to_owned()).collect();
        let texts = |nets: Vec<IpNet>| nets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(" ");
        subnets(&given).map(texts).map_err(|error| error.to_string())
    }

    #[test]
    fn one_of_each_family_in_any_order() {
        assert_eq!(read(&["10.32.0.0/16"]).unwrap(), "10.32.0.0/16");
        assert_eq!(read(&["fd32::/64"]).unwrap(), "fd32::/64");
        assert_eq!(read(&["fd32::/64", "10.32.0.0/16"]).unwrap(), "10.32.0.0/16 fd32::/64");
        assert_eq!(read(&["10.32.0.0/29", "2001:db8::/48"]).unwrap(), "10.32.0.0/29 2001:db8::/48");
    }

    #[test]
    fn what_is_refused_is_named_with_what_is_allowed() {
        let cases: [(&[&str], &str); 20] = [
            (&[], "has no subnet"),
            (&["backend"], "is not a CIDR"),
            (&["10.32.0.0"], "is not a CIDR"),
            (&["10.32.0.5/16"], "has host bits (the subnet is 10.32.0.0/16)"),
            (&["fd32::5/64"], "has host bits (the subnet is fd32::/64)"),
            (&["10.32.0.0/30"], "is too large or too small"),
            (&["fd32::/121"], "is too large or too small"),
            (&["fd32::/47"], "is too large or too small"),
            (&["0.0.0.0/8"], "no pod can have"),
            (&["127.0.0.0/8"], "no pod can have"),
            (&["224.0.0.0/8"], "no pod can have"),
            (&["fe80::/64"], "no pod can have"),
            (&["ff02::/64"], "no pod can have"),
            (&["::/64"], "no pod can have"),
            (&["::ffff:10.32.0.0/112"], "no pod can have"),
            (&["4000::/64"], "no pod can have"),
            (&["10.32.0.0/16", "10.33.0.0/16"], "more than one subnet of a family"),
            (&["fd32::/64", "fd33::/64"], "more than one subnet of a family"),
            (&["10.32.0.0/16", "fd32::/64", "fd33::/64"], "more than one subnet of a family"),
            (&["10.32.0.0/16", "fd32::1/64"], "has host bits"),
        ];
        for (given, problem) in cases {
            let error = read(given).unwrap_err();
            assert!(error.starts_with("spec.subnets: ") && error.contains(problem), "{given:?}: {error}");
            assert!(error.contains("allowed: one IPv4 CIDR from /8 to /29, one IPv6 CIDR from /48 to /120"), "{error}");
        }
    }

    #[test]
    fn what_pods_can_have() {
        let of = |subnet: &str| capacity(subnet.parse().unwrap());
        assert_eq!((of("10.32.0.0/29"), of("10.0.0.0/8")), (5, (1 << 24) - 3));
        assert_eq!((of("fd32::/120"), of("fd32::/64"), of("fd32::/48")), (254, (1 << 24) - 2, (1 << 24) - 2));
        assert_eq!(pool("fd32::/64".parse().unwrap()).to_string(), "fd32::/104");
        assert_eq!(pool("fd32::/112".parse().unwrap()).to_string(), "fd32::/112");
    }
}
