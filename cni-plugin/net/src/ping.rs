//! ICMP echo (RFC 792): whether another node's kernel is there, whatever becomes of the processes on it, and which packets get there.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    io,
    net::{IpAddr, Ipv4Addr},
};

use rustix::net::{
    AddressFamily, SocketFlags, SocketType, ipproto, socket_with,
    sockopt::{Ipv4PathMtuDiscovery, set_ip_mtu_discover, set_socket_recv_buffer_size_force},
};
use tokio::net::UdpSocket;

use crate::error::{Error, Result};

/// Bytes of an IP header without options, which is how ours are.
const IP_HEADER: usize = 20;
/// Bytes of an echo message without what it carries: type, code, checksum, identifier, sequence number.
const HEADER: usize = 8;
/// Bytes of a question that tell it from others': the message's header, and the secret.
const HEAD: usize = HEADER + 8;
/// The smallest question, as an IP packet, in bytes.
const SMALLEST: u16 = (IP_HEADER + HEAD) as u16;
const ECHO: u8 = 8;
const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
/// Code of [`UNREACHABLE`]: the packet doesn't fit, and must not be fragmented (RFC 1191, section 4).
const FRAGMENTATION_NEEDED: u8 = 4;
/// Bytes that may wait to be heard: all nodes are asked at once, and an answer that finds no room is taken for one that never came.
const ROOM: usize = 4 << 20;

/// Asks nodes, and hears their answers. No question is ever fragmented, by whomever.
#[derive(Debug)]
pub struct Pinger {
    /// A raw ICMP socket: the runtime knows it as a socket of datagrams, which it is.
    socket: UdpSocket,
    /// What our questions carry and nobody else knows, so that an answer can't be made up without having seen one.
    secret: [u8; 8],
}

/// What became of a question.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Heard {
    /// The node answered.
    Answer {
        /// Who.
        node: Ipv4Addr,
        /// The size of the question, and of the answer, in bytes with the IP header.
        size: u16,
    },
    /// A router on the way can't pass it on.
    TooBig {
        /// Who was asked.
        node: Ipv4Addr,
        /// The size of the question in bytes with the IP header.
        size: u16,
        /// The size that the router could pass on, if it says so.
        carries: Option<u16>,
    },
}

impl Pinger {
    /// Opens a socket in this process's namespace.
    ///
    /// # Errors
    /// When the process may not (it needs `CAP_NET_RAW` and `CAP_NET_ADMIN`).
    pub fn open() -> Result<Self> {
        let fail = |source: io::Error| Error::Ping { source };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let raw = socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::ICMP));
        let raw = raw.map_err(|e| fail(e.into()))?;
        set_socket_recv_buffer_size_force(&raw, ROOM).map_err(|e| fail(e.into()))?;
        // Don't fragment, and don't believe what the kernel has learnt of the path before: it may be repaired (ip(7)).
        set_ip_mtu_discover(&raw, Ipv4PathMtuDiscovery::PROBE).map_err(|e| fail(e.into()))?;
        let socket = UdpSocket::from_std(raw.into()).map_err(fail)?;
        // The standard library's hasher is seeded by the operating system.
        Ok(Self { socket, secret: RandomState::new().build_hasher().finish().to_be_bytes() })
    }

    /// Sends one question, a small one.
    ///
    /// # Errors
    /// When there is no way there at this moment.
    pub async fn ask(&self, node: Ipv4Addr) -> io::Result<()> {
        self.send(node, SMALLEST).await
    }

    /// Sends one question of `size` bytes, the IP header included. Returns whether this node's own interface takes it. (A router's refusal is
    /// heard as an answer is; the socket isn't connected, and has no errors of that kind.)
    ///
    /// # Errors
    /// When there is no way there at this moment.
    pub async fn probe(&self, node: Ipv4Addr, size: u16) -> io::Result<bool> {
        match self.send(node, size.max(SMALLEST)).await {
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => Ok(false),
            other => other.map(|()| true),
        }
    }

    async fn send(&self, node: Ipv4Addr, size: u16) -> io::Result<()> {
        let mut message = self.head(ECHO, size).to_vec();
        message.resize(usize::from(size) - IP_HEADER, 0);
        self.socket.send_to(&message, (node, 0)).await.map(drop)
    }

    /// Waits until something is heard of any of our questions. May be dropped while it waits.
    ///
    /// # Errors
    /// When the socket fails.
    pub async fn answer(&self) -> io::Result<Heard> {
        // Of a large one only the beginning tells anything.
        let mut buffer = [0; 256];
        loop {
            let (length, from) = self.socket.recv_from(&mut buffer).await?;
            if let (IpAddr::V4(from), Some(packet)) = (from.ip(), buffer.get(..length))
                && let Some(heard) = self.understand(from, packet)
            {
                return Ok(heard);
            }
        }
    }

    /// `packet` has its IP header before it: that is what a raw socket gives (raw(7)).
    fn understand(&self, from: Ipv4Addr, packet: &[u8]) -> Option<Heard> {
        let icmp = payload(packet)?;
        match *icmp.first()? {
            ECHO_REPLY => {
                let size = word(icmp, 6)?;
                let is_ours = icmp.get(..HEAD)? == self.head(ECHO_REPLY, size);
                (is_ours && word(packet, 2)? == size).then_some(Heard::Answer { node: from, size })
            }
            UNREACHABLE if icmp.get(1) == Some(&FRAGMENTATION_NEEDED) => {
                let packet = icmp.get(HEADER..)?;
                let question = payload(packet)?;
                let size = word(question, 6)?;
                // A router need not quote more than the header, which has the checksum (RFC 792).
                let quoted = question.get(..question.len().min(HEAD))?;
                let is_ours = quoted.len() >= HEADER && self.head(ECHO, size).starts_with(quoted);
                let node = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(16..IP_HEADER)?).ok()?);
                let carries = word(icmp, 6).filter(|carries| *carries > 0);
                is_ours.then_some(Heard::TooBig { node, size, carries })
            }
            _ => None,
        }
    }

    /// How a message begins; what follows is zeros. The sequence number is the packet's size.
    fn head(&self, kind: u8, size: u16) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[0] = kind;
        head[6..HEADER].copy_from_slice(&size.to_be_bytes());
        head[HEADER..].copy_from_slice(&self.secret);
        let checksum = checksum(&head);
        head[2..4].copy_from_slice(&checksum.to_be_bytes());
        head
    }
}

/// What is behind a packet's IP header.
fn payload(packet: &[u8]) -> Option<&[u8]> {
    packet.get(4 * usize::from(packet.first()? & 0x0f)..)
}

/// The sixteen bits at a place.
fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// The Internet checksum (RFC 1071) of a message of even length.
pub(crate) fn checksum(message: &[u8]) -> u16 {
    let words = message.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
    const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);

    fn pinger() -> Pinger {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        socket.set_nonblocking(true).unwrap();
        Pinger { socket: UdpSocket::from_std(socket).unwrap(), secret: [0xff, 0xff, 0xfe, 1, 2, 3, 4, 5] }
    }

    /// An IP packet to [`NODE`] that says it is so long.
    fn packet(length: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; IP_HEADER];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet[16..].copy_from_slice(&NODE.octets());
        [packet, payload.to_vec()].concat()
    }

    #[tokio::test]
    async fn a_message_sums_up_to_nothing() {
        for kind in [ECHO, ECHO_REPLY] {
            for size in [SMALLEST, 1500, 9050, u16::MAX] {
                assert_eq!(checksum(&pinger().head(kind, size)), 0);
            }
        }
    }

    #[tokio::test]
    async fn an_answer_counts_if_it_is_ours_and_whole() {
        let own = pinger();
        let reply = own.head(ECHO_REPLY, 1500);
        assert_eq!(own.understand(NODE, &packet(1500, &reply)), Some(Heard::Answer { node: NODE, size: 1500 }));
        assert_eq!(own.understand(NODE, &packet(1400, &reply)), None, "it was cut on its way");
        assert_eq!(own.understand(NODE, &packet(1500, &own.head(ECHO, 1500))), None, "a question");
        let other = Pinger { secret: [7; 8], ..pinger() };
        assert_eq!(other.understand(NODE, &packet(1500, &reply)), None);
    }

    #[tokio::test]
    async fn a_router_is_believed_that_quotes_our_question() {
        let own = pinger();
        let told = |carries: u16, quoted: &[u8]| {
            let mut icmp = vec![UNREACHABLE, FRAGMENTATION_NEEDED, 0, 0, 0, 0];
            icmp.extend(carries.to_be_bytes());
            icmp.extend(packet(1500, quoted));
            own.understand(ROUTER, &packet(0, &icmp))
        };
        let question = own.head(ECHO, 1500);
        let too_big = |carries| Some(Heard::TooBig { node: NODE, size: 1500, carries });
        assert_eq!(told(1420, &question), too_big(Some(1420)));
        assert_eq!(told(1420, &question[..HEADER]), too_big(Some(1420)), "the least that is quoted");
        assert_eq!(told(0, &question), too_big(None), "a router from before RFC 1191");
        assert_eq!(told(1420, &question[..HEADER - 1]), None);
        assert_eq!(told(1420, &Pinger { secret: [7; 8], ..pinger() }.head(ECHO, 1500)), None);
    }
}
