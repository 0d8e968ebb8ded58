//! Saying unasked at which MAC an address is: who knows another one believes it at once, and not only when he asks again.

use std::{
    io,
    mem::size_of,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    ptr,
    time::Duration,
};

use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType,
    addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque},
    sendto, socket_with,
};

use crate::{
    Mac,
    error::{Error, Result},
    guard::{ADVERTISEMENT, ARP, ICMPV6, IPV6},
    namespace::Namespace,
    ping::checksum,
};

/// How often it is said: a port that has no room drops what comes.
const TIMES: u32 = 3;
/// From one time to the next. The RFCs' second or two are for links that are slow to come up.
const PAUSE: Duration = Duration::from_millis(20);
/// The shortest frame in bytes, without its checksum (IEEE 802.3).
const SHORTEST: usize = 60;
const BROADCAST: Mac = Mac([0xff; 6]);
/// All nodes of a link, and their MAC (RFC 4291, section 2.7.1; RFC 2464, section 7).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);
/// ARP's request between Ethernet and IPv4 addresses (RFC 826).
const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
/// Flags of a neighbour advertisement: who sends it is a router, and what was known of it counts no more (RFC 4861, section 4.4).
const ROUTER: u8 = 0x80;
const OVERRIDE: u8 = 0x20;

/// `struct sockaddr_ll`: a link (packet(7)).
struct Link(libc::sockaddr_ll);

// SAFETY: the pointer is to a whole `struct sockaddr_ll` of that length, which lives until `f` returns.
unsafe impl SocketAddrArg for Link {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f(ptr::from_ref(&self.0).cast(), size_of::<libc::sockaddr_ll>() as SocketAddrLen)
    }
}

/// Tells a link of a namespace that a router with these addresses is at a MAC. What is said leaves by the link as all that the host sends by it.
///
/// # Errors
/// When this process may not (it needs `CAP_NET_RAW`), or the link isn't up.
pub(crate) async fn announce(namespace: &Namespace, link: u32, mac: Mac, addresses: &[IpAddr]) -> Result<()> {
    let fail = |source: io::Error| Error::Announcement { mac, place: namespace.path().display().to_string(), source };
    // Of no protocol: nothing is heard.
    let open = || Ok(socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, None)?);
    let socket = namespace.run(open)?;
    for time in 0..TIMES {
        if time > 0 {
            tokio::time::sleep(PAUSE).await;
        }
        for address in addresses {
            send(&socket, link, mac, *address).map_err(fail)?;
        }
    }
    Ok(())
}

fn send(socket: &OwnedFd, link: u32, mac: Mac, address: IpAddr) -> io::Result<()> {
    let to = Link(libc::sockaddr_ll {
        sll_family: AddressFamily::PACKET.as_raw(),
        // The frame says which.
        sll_protocol: 0,
        sll_ifindex: i32::try_from(link).map_err(io::Error::other)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    });
    sendto(socket, &announcement(mac, address), SendFlags::empty(), &to)?;
    Ok(())
}

/// The frame that says it.
fn announcement(mac: Mac, address: IpAddr) -> Vec<u8> {
    let (to, kind, packet) = match address {
        IpAddr::V4(address) => (BROADCAST, ARP, arp(mac, address)),
        IpAddr::V6(address) => (ALL_NODES_MAC, IPV6, advertisement(mac, address)),
    };
    let mut frame = [&to.0[..], &mac.0, &kind.to_be_bytes()[2..], &packet].concat();
    frame.resize(frame.len().max(SHORTEST), 0);
    frame
}

/// A request for the own address (RFC 5227, section 3).
fn arp(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    [&REQUEST[..], &mac.0, &address.octets(), &[0; 6], &address.octets()].concat()
}

/// An unsolicited neighbour advertisement (RFC 4861, section 7.2.6), with the MAC as its option, in an IPv6 packet.
fn advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    let flags = ROUTER | OVERRIDE;
    let mut message =
        [&[ADVERTISEMENT as u8, 0, 0, 0, flags, 0, 0, 0][..], &address.octets(), &[2, 1], &mac.0].concat();
    let (length, ends) = (message.len() as u8, [address.octets(), ALL_NODES.octets()].concat());
    let sum = checksum(&[&ends[..], &[0, 0, 0, length, 0, 0, 0, ICMPV6 as u8], &message].concat());
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    [&[0x60, 0, 0, 0, 0, length, ICMPV6 as u8, 255][..], &ends, &message].concat()
}
