//! Whole Ethernet frames, sent and seen at a pod's interface.

use std::{
    fs::File,
    io::{self, Read, Write},
    mem::size_of,
    net::{Ipv4Addr, Ipv6Addr},
    ptr,
    time::Instant,
};

use portolan_net::Mac;
use rustix::net::{
    AddressFamily, SocketType,
    addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque},
    eth, netdevice, socket,
    sockopt::{Timeout, set_socket_timeout},
};

use super::{PATIENCE, Pod};

pub const BROADCAST: Mac = Mac([0xff; 6]);
/// All nodes of a link, `ff02::1` (RFC 2464, section 7).
pub const ALL_NODES: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);
/// For local experiments (IEEE 802, section 9.2.4): no network stack takes notice of it.
pub const EXPERIMENTAL: u16 = 0x88b5;

pub const ARP: u16 = 0x0806;
pub const IPV6: u16 = 0x86dd;

/// A packet socket on a pod's interface.
pub struct Wire(File);

/// `struct sockaddr_ll` (packet(7)).
#[repr(C)]
struct LinkAddress {
    family: u16,
    protocol: u16,
    index: u32,
    hardware: u16,
    kind: u8,
    length: u8,
    address: [u8; 8],
}

// SAFETY: the pointer is to a whole `struct sockaddr_ll` of that length, which lives until `f` returns.
unsafe impl SocketAddrArg for LinkAddress {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f(ptr::from_ref(self).cast(), SocketAddrLen::try_from(size_of::<Self>()).unwrap())
    }
}

impl Wire {
    /// Opens the interface `eth1` of a pod. Frames that come from now on are kept.
    pub fn open(pod: &Pod<'_>) -> Self {
        pod.inside(|| Self::at("eth1"))
    }

    /// Opens an interface of the namespace that the thread is in.
    pub fn at(interface: &str) -> io::Result<Self> {
        let socket = socket(AddressFamily::PACKET, SocketType::RAW, Some(eth::ALL))?;
        let address = LinkAddress {
            family: AddressFamily::PACKET.as_raw(),
            protocol: u16::try_from(eth::ALL.as_raw().get()).unwrap(),
            index: netdevice::name_to_index(&socket, interface)?,
            hardware: 0,
            kind: 0,
            length: 0,
            address: [0; 8],
        };
        rustix::net::bind(&socket, &address)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        Ok(Self(File::from(socket)))
    }

    pub fn send(&mut self, frame: &[u8]) {
        self.0.write_all(frame).unwrap();
    }

    /// All frames until one is as wanted, which is the last of them; `None` if none is.
    pub fn until(&mut self, wanted: &[u8]) -> Option<Vec<Vec<u8>>> {
        let end = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        let mut buffer = [0; 2000];
        while Instant::now() < end {
            let length = match self.0.read(&mut buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                other => other.unwrap(),
            };
            seen.push(buffer[..length].to_vec());
            if buffer[..length].starts_with(wanted) {
                return Some(seen);
            }
        }
        None
    }

    /// All frames that have come by now.
    pub fn all(&mut self) -> Vec<Vec<u8>> {
        rustix::io::ioctl_fionbio(&self.0, true).unwrap();
        let mut seen = Vec::new();
        let mut buffer = [0; 2000];
        while let Ok(length) = self.0.read(&mut buffer) {
            seen.push(buffer[..length].to_vec());
        }
        seen
    }

    pub fn sees(&mut self, wanted: &[u8]) -> bool {
        self.until(wanted).is_some()
    }
}

/// A frame of at least the shortest length that Ethernet has.
pub fn frame(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&to.0[..], &from.0, &kind.to_be_bytes(), payload].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// A gratuitous ARP request, as keepalived sends it (RFC 5227, section 3).
pub fn gratuitous_arp(from: Mac, address: Ipv4Addr) -> Vec<u8> {
    let request = [0, 1, 8, 0, 6, 4, 0, 1];
    frame(BROADCAST, from, ARP, &[&request[..], &from.0, &address.octets(), &[0; 6], &address.octets()].concat())
}

/// An unsolicited neighbour advertisement with the override flag (RFC 4861, section 7.2.6).
pub fn advertisement(from: Mac, address: Ipv6Addr) -> Vec<u8> {
    to_all_nodes(from, address, &[&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &address.octets(), &[2, 1], &from.0].concat())
}

/// A router's advertisement: it is a default router, and addresses of `prefix`::/64 are to be made (RFC 4861, sections 4.2 and 4.6.2).
pub fn router_advertisement(from: Mac, prefix: Ipv6Addr) -> Vec<u8> {
    let router = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    let lifetimes = [0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0];
    let icmp = [&router[..], &[1, 1], &from.0, &[3, 4, 64, 0xc0], &lifetimes, &prefix.octets()].concat();
    to_all_nodes(from, link_local(from), &icmp)
}

/// The link-local address that an interface makes from its MAC (RFC 4291, appendix A).
pub fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// An ICMPv6 message, whose checksum is filled in.
pub fn to_all_nodes(from: Mac, source: Ipv6Addr, icmp: &[u8]) -> Vec<u8> {
    const ICMPV6: u8 = 58;
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let length = u8::try_from(icmp.len()).unwrap();
    let ends = [source.octets(), all_nodes.octets()].concat();
    let sum = checksum(&[&ends[..], &[0, 0, 0, length, 0, 0, 0, ICMPV6], icmp].concat());
    let header = [&[0x60, 0, 0, 0, 0, length, ICMPV6, 255][..], &ends].concat();
    frame(ALL_NODES, from, IPV6, &[&header[..], &icmp[..2], &sum.to_be_bytes(), &icmp[4..]].concat())
}

/// The internet checksum (RFC 1071).
pub fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()
}
