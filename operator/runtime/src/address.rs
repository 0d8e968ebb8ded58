//! Addresses of this node and of what listens on it, of either family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

/// An address that can't be this node's.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "this node's address {given:?} {problem}; allowed: an IPv4 or IPv6 address that the other nodes have a route to, such as 192.0.2.1 or fd00::1"
)]
pub struct HostIpError {
    given: String,
    problem: &'static str,
}

/// Reads this node's address, as Kubernetes has it in a pod's `status.hostIP`.
///
/// # Errors
/// When it is none, or one at which other nodes can't reach this one.
pub fn host_ip(text: &str) -> Result<IpAddr, HostIpError> {
    let refuse = |problem| HostIpError { given: text.to_owned(), problem };
    let address: IpAddr = text.parse().map_err(|_| refuse("is no address"))?;
    match address {
        IpAddr::V6(it) if it.is_unicast_link_local() => {
            Err(refuse("is link-local: it means another interface on each node"))
        }
        _ if address.is_unspecified() || address.is_multicast() => Err(refuse("is not one node's")),
        _ => Ok(address),
    }
}

/// Where to listen to be reached at all addresses of a family, that of `own`. On a host this is better than [`everywhere`]: there it isn't ours to say
/// whether a socket of IPv6 hears IPv4, too (`net.ipv6.bindv6only`).
pub fn everywhere_like(own: IpAddr, port: u16) -> SocketAddr {
    let any = match own {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    SocketAddr::new(any, port)
}

/// Where to listen to be reached at all addresses of a pod, whatever families it has: at `::`, or at `0.0.0.0` where the kernel has no IPv6.
pub fn everywhere(port: u16) -> SocketAddr {
    let ipv6 = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let has_ipv6 = TcpListener::bind((ipv6, 0)).is_ok();
    everywhere_like(if has_ipv6 { ipv6 } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) }, port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_other_nodes_can_not_send_to_is_refused() {
        for good in ["192.0.2.1", "169.254.7.1", "127.0.0.1", "fd00::1", "fec0::1", "2001:db8::1"] {
            assert_eq!(host_ip(good).unwrap().to_string(), good);
        }
        for (bad, why) in [
            ("fe80::1", "link-local"),
            ("febf::1", "link-local"),
            ("::", "not one node's"),
            ("0.0.0.0", "not one node's"),
            ("ff05::1", "not one node's"),
            ("", "no address"),
            ("[fd00::1]", "no address"),
            ("fe80::1%eth0", "no address"),
        ] {
            let error = host_ip(bad).unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")) && error.contains(why) && error.contains("allowed"), "{error}");
        }
    }

    #[test]
    fn listeners_are_reached_in_the_family_of_their_node() {
        for own in ["127.0.0.1", "::1"] {
            let own: IpAddr = own.parse().unwrap();
            let listener = TcpListener::bind(everywhere_like(own, 0)).unwrap();
            std::net::TcpStream::connect((own, listener.local_addr().unwrap().port())).unwrap();
        }
        let listener = TcpListener::bind(everywhere(0)).unwrap();
        for own in ["127.0.0.1", "::1"] {
            let own: IpAddr = own.parse().unwrap();
            std::net::TcpStream::connect((own, listener.local_addr().unwrap().port())).unwrap();
        }
    }
}
