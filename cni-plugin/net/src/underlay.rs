//! The nodes' own network, of either family: each node has one address on it, and tunnels go between addresses of the same family.

use std::net::IpAddr;

use futures::TryStreamExt;
use netlink_packet_route::{address::AddressAttribute, link::LinkAttribute};

use crate::{
    Dataplane,
    error::{Error, Result},
    netlink::Netlink,
};

/// Bytes of an IP header as tunnels send it: 20 without options (RFC 791, section 3.1), 40 without extensions (RFC 8200, section 3).
pub(crate) const fn ip_header(of: IpAddr) -> u32 {
    match of {
        IpAddr::V4(_) => 20,
        IpAddr::V6(_) => 40,
    }
}

/// What VXLAN from a node with that address adds to a frame, in bytes: outer IP 20 or 40, UDP 8, VXLAN 8, inner Ethernet 14 (RFC 7348, section 5).
pub const fn vxlan_overhead(vtep: IpAddr) -> u32 {
    ip_header(vtep) + 30
}

/// What WireGuard from a node with that address adds to a packet, in bytes: outer IP 20 or 40, UDP 8, header 16, authentication tag 16.
pub const fn wireguard_overhead(vtep: IpAddr) -> u32 {
    ip_header(vtep) + 40
}

/// Whether an address means something only together with an interface (RFC 4291, section 2.5.6): no other node can send there.
pub(crate) fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

impl Dataplane {
    /// The MTU in bytes of the interface that has the tunnel endpoint's address.
    ///
    /// # Errors
    /// [`Error::LinkLocalUnderlay`] for an address that other nodes can't send to; [`Error::NoUnderlay`] when no interface has it.
    pub async fn underlay_mtu(&self, vtep: IpAddr) -> Result<u32> {
        if is_link_local(vtep) {
            return Err(Error::LinkLocalUnderlay(vtep));
        }
        let netlink = Netlink::open(&self.underlay()?)?;
        let listed = netlink.handle().address().get().execute().try_collect::<Vec<_>>().await;
        let addresses = listed.map_err(|e| netlink.error("list addresses", e))?;
        let is_vtep =
            |a: &AddressAttribute| matches!(a, AddressAttribute::Local(x) | AddressAttribute::Address(x) if *x == vtep);
        let index = addresses.iter().find(|a| a.attributes.iter().any(is_vtep)).map(|a| a.header.index);
        let links = netlink.links().await?;
        let link = links.iter().find(|l| Some(l.header.index) == index).ok_or(Error::NoUnderlay(vtep))?;
        link.attributes
            .iter()
            .find_map(|a| match a {
                LinkAttribute::Mtu(mtu) => Some(*mtu),
                _ => None,
            })
            .ok_or(Error::NoUnderlay(vtep))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_ipv6_are_larger_by_twenty_bytes() {
        let [ipv4, ipv6] = ["192.0.2.1", "fd00::1"].map(|text| text.parse::<IpAddr>().unwrap());
        assert_eq!((vxlan_overhead(ipv4), wireguard_overhead(ipv4)), (50, 60));
        assert_eq!((vxlan_overhead(ipv6), wireguard_overhead(ipv6)), (70, 80));
    }

    #[test]
    fn only_an_interface_makes_something_of_a_link_local_address() {
        for (text, expected) in
            [("fe80::1", true), ("febf::1", true), ("fec0::1", false), ("fd00::1", false), ("169.254.1.1", false)]
        {
            assert_eq!(is_link_local(text.parse().unwrap()), expected, "{text}");
        }
    }
}
