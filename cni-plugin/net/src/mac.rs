//! MAC addresses and names that derive from identities, so that they are the same on every node.

use std::{fmt, net::Ipv4Addr, str::FromStr};

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

/// The MAC of an endpoint: locally administered, one byte from the network's name, then the address itself.
///
/// The address is in it whole, so that two endpoints of one network never share a MAC, however many there are.
pub fn endpoint_mac(network: &str, address: Ipv4Addr) -> Mac {
    let hash = fnv1a(network.as_bytes());
    let [a, b, c, d] = address.octets();
    Mac([0x02, (hash ^ (hash >> 32)).to_le_bytes()[0], a, b, c, d])
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

    #[test]
    fn endpoint_macs_are_stable_and_local() {
        let mac = endpoint_mac("backend", Ipv4Addr::new(10, 32, 0, 5));
        assert_eq!(mac, endpoint_mac("backend", Ipv4Addr::new(10, 32, 0, 5)));
        assert_eq!(mac.0[0] & 0x03, 0x02, "locally administered, unicast");
        assert_ne!(mac, endpoint_mac("backend", Ipv4Addr::new(10, 32, 0, 6)));
        assert_ne!(mac, endpoint_mac("frontend", Ipv4Addr::new(10, 32, 0, 5)));
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
