//! MAC addresses and names that derive from identities, so that they are the same on every node.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// A text that isn't a MAC address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("MAC address {0:?}: six pairs of hexadecimal digits with colons are allowed, such as 02:1f:0a:20:00:05")]
pub struct MacError(String);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let refuse = || MacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(refuse)?, 16).map_err(|_| refuse())?;
        }
        parts.next().is_none().then_some(Self(bytes)).ok_or_else(refuse)
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// The MAC of an endpoint: locally administered, one byte from the network's name, then the last 32 bits of its first address, which is its
/// IPv4 address if it has one.
///
/// Two endpoints of one network never share a MAC, however many there are: an IPv4 address is in it whole, and of an IPv6 subnet only
/// addresses are given out that differ in these bits.
pub fn endpoint_mac(network: &str, first: IpAddr) -> Mac {
    let hash = fnv1a(network.as_bytes());
    let [a, b, c, d] = match first {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(address) => {
            let [.., a, b, c, d] = address.octets();
            [a, b, c, d]
        }
    };
    Mac([0x02, (hash ^ (hash >> 32)).to_le_bytes()[0], a, b, c, d])
}

/// The MAC of a node's tunnel, by the tunnel's name and the node's address. An IPv4 address is in it whole. Nodes' IPv6 addresses may differ in any bits
/// (racks that number their machines from ::1 are usual), so all of them are mixed into the 46 that a MAC has for that: of 5,000 nodes two have
/// the same in one cluster of five million.
pub(crate) fn node_mac(tunnel: &str, node: IpAddr) -> Mac {
    let IpAddr::V6(address) = node else { return endpoint_mac(tunnel, node) };
    let hash = fnv1a(&[tunnel.as_bytes(), &address.octets()].concat());
    let [a, b, c, d, e, f, ..] = (hash ^ (hash >> 48)).to_le_bytes();
    // Locally administered, unicast.
    Mac([a & 0xfc | 0x02, b, c, d, e, f])
}

/// Whether a MAC is one that [`endpoint_mac`] may make on a network.
pub fn is_endpoint_mac(network: &str, mac: Mac) -> bool {
    mac.0[..2] == endpoint_mac(network, IpAddr::from([0; 4])).0[..2]
}

/// The name of a port in its network's namespace: `p` and eight hexadecimal digits of the container's and interface's identity.
pub fn port_name(container: &str, interface: &str) -> String {
    let hash = fnv1a(format!("{container}/{interface}").as_bytes());
    let [a, b, c, d, ..] = (hash ^ (hash >> 32)).to_le_bytes();
    format!("p{:08x}", u32::from_be_bytes([a, b, c, d]))
}

/// Whether a link's name is one that `port_name` makes.
pub(crate) fn is_port_name(name: &str) -> bool {
    name.len() == 9
        && name.starts_with('p')
        && name.bytes().skip(1).all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// FNV-1a, 64 bits: a hash that stays the same over versions of Rust and of this program.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipam::{blocks, usable};

    /// The first and the last blocks of the largest subnets: all that is given out between them differs in the same bits.
    #[test]
    fn endpoints_of_a_network_never_share_a_mac() {
        for subnet in ["10.0.0.0/8", "fd32::/48", "fd32:0:0:ffff::/64", "fd32::/120"] {
            let subnet = subnet.parse().unwrap();
            let all = blocks(subnet).count();
            let some = blocks(subnet).enumerate().filter(|(n, _)| *n < 40 || n % 1021 == 0 || all - n < 40);
            let addresses: Vec<IpAddr> = some.flat_map(|(_, block)| usable(subnet, block)).collect();
            let macs: std::collections::BTreeSet<Mac> = addresses.iter().map(|a| endpoint_mac("n", *a)).collect();
            assert!(addresses.len() > 200 && macs.len() == addresses.len(), "{subnet}");
        }
    }

    #[test]
    fn tunnels_have_macs_of_their_own() {
        let of = |address: &str| node_mac("portolan0", address.parse().unwrap());
        assert_eq!(of("192.0.2.1"), endpoint_mac("portolan0", [192, 0, 2, 1].into()), "as nodes of earlier releases");
        let mut macs = std::collections::BTreeSet::new();
        for rack in 0..200u16 {
            for node in 1..=50u16 {
                let mac = of(&format!("2001:db8:{rack:x}::{node:x}"));
                assert_eq!(mac.0[0] & 0x03, 0x02, "locally administered, unicast");
                macs.insert(mac);
            }
        }
        assert_eq!(macs.len(), 200 * 50);
    }

    #[test]
    fn endpoint_macs_are_known() {
        let mac = endpoint_mac("backend", IpAddr::from([10, 32, 0, 5]));
        assert!(is_endpoint_mac("backend", mac) && !is_endpoint_mac("backend", Mac([6, 0, 0, 0, 0, 1])));
    }

    #[test]
    fn endpoint_macs_are_stable_and_local() {
        let of = |network: &str, address: &str| endpoint_mac(network, address.parse().unwrap());
        let mac = of("backend", "10.32.0.5");
        assert_eq!(mac, of("backend", "10.32.0.5"));
        assert_eq!(mac.0[0] & 0x03, 0x02, "locally administered, unicast");
        assert_eq!(mac.0[2..], [10, 32, 0, 5], "what it was before there was IPv6");
        assert_ne!(mac, of("backend", "10.32.0.6"));
        assert_ne!(mac, of("frontend", "10.32.0.5"));
        assert_eq!(of("backend", "fd32::12:3456").0[2..], [0, 0x12, 0x34, 0x56]);
        assert_eq!(mac.to_string().parse(), Ok(mac));
    }

    #[test]
    fn bad_macs_are_refused() {
        for text in [
            "",
            "02",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "2:0:0:0:0:0",
            "02:00:00:00:00:0g",
            "+2:00:00:00:00:00",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }

    #[test]
    fn port_names_fit_an_interface() {
        let name = port_name("0123456789abcdef", "eth1");
        assert!(is_port_name(&name), "{name}");
        assert_ne!(name, port_name("0123456789abcdef", "eth2"));
        assert!(!is_port_name("pod0"));
    }
}
