//! Names of addresses: `in-addr.arpa` (RFC 1035, 3.5) and `ip6.arpa` (RFC 3596, 2.5).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Labels of a whole IPv6 address: one a nibble.
const NIBBLES: usize = 32;

/// The address that `name` (lower case, without trailing dot) stands for; none if it is no whole address.
pub(crate) fn address(name: &str) -> Option<IpAddr> {
    if let Some(labels) = name.strip_suffix(".in-addr.arpa") {
        let reversed: Vec<&str> = labels.rsplit('.').collect();
        // The parser refuses leading zeros: 010 is another name than 10.
        return reversed.join(".").parse::<Ipv4Addr>().ok().map(IpAddr::V4);
    }
    let labels = name.strip_suffix(".ip6.arpa")?;
    if labels.split('.').count() != NIBBLES {
        return None;
    }
    let mut bits = 0u128;
    for label in labels.rsplit('.') {
        let nibble = u128::from_str_radix(label, 16).ok().filter(|_| label.len() == 1)?;
        bits = bits << 4 | nibble;
    }
    Some(IpAddr::V6(Ipv6Addr::from_bits(bits)))
}

/// The top of the reverse zone that a subnet's addresses are in: the longest name that all of them end in.
pub(crate) fn apex(subnet: &IpNet) -> String {
    let (mut labels, top, bits): (Vec<String>, _, _) = match subnet.network() {
        IpAddr::V4(address) => (address.octets().iter().map(u8::to_string).collect(), "in-addr.arpa", 8),
        IpAddr::V6(address) => {
            (format!("{:032x}", address.to_bits()).chars().map(String::from).collect(), "ip6.arpa", 4)
        }
    };
    labels.truncate((subnet.prefix_len() / bits).into());
    labels.reverse();
    labels.push(top.to_owned());
    labels.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_addresses() {
        assert_eq!(address("5.0.32.10.in-addr.arpa"), Some("10.32.0.5".parse().unwrap()));
        let long = format!("{}.ip6.arpa", "5.0.0.0.".repeat(8).trim_end_matches('.'));
        assert_eq!(address(&long), Some("5:5:5:5:5:5:5:5".parse().unwrap()));
        for other in ["0.32.10.in-addr.arpa", "05.0.32.10.in-addr.arpa", "1.5.0.32.10.in-addr.arpa", "in-addr.arpa"] {
            assert_eq!(address(other), None, "{other}");
        }
        for nibble in ["+", "g", "10", ""] {
            assert_eq!(address(&long.replacen('5', nibble, 1)), None, "{nibble:?}");
        }
    }

    #[test]
    fn tops_of_reverse_zones() {
        let of = |subnet: &str| apex(&subnet.parse().unwrap());
        assert_eq!(of("10.32.0.0/16"), "32.10.in-addr.arpa");
        assert_eq!(of("10.32.16.0/20"), "32.10.in-addr.arpa");
        assert_eq!(of("fd00:32::/32"), "2.3.0.0.0.0.d.f.ip6.arpa");
    }
}
