//! ICMP echo, of either family: whether another node's kernel is there, whatever becomes of the processes on it, and which packets get there.

mod packet;

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrAny, SocketFlags, SocketType, ipproto, recvfrom, socket_with,
    sockopt::{
        Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
        set_socket_recv_buffer_size_force,
    },
};
use tokio::{io::Interest, net::UdpSocket};

use crate::error::{Error, Result};

pub(crate) use packet::checksum;
use packet::{Family, Questions};

/// Bytes that may wait to be heard: all nodes are asked at once, and an answer that finds no room is taken for one that never came.
const ROOM: usize = 4 << 20;
/// linux/icmpv6.h `ICMPV6_FILTER`.
const ICMPV6_FILTER: libc::c_int = 1;

/// Asks nodes, and hears their answers. No question is ever fragmented, by whomever.
#[derive(Debug)]
pub struct Pinger {
    /// A raw ICMP socket: the runtime knows it as a socket of datagrams, which it is.
    socket: UdpSocket,
    questions: Questions,
}

/// What became of a question.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Heard {
    /// The node answered.
    Answer {
        /// Who.
        node: IpAddr,
        /// The size of the question, and of the answer, in bytes with the IP header.
        size: u16,
    },
    /// A router on the way can't pass it on.
    TooBig {
        /// Who was asked.
        node: IpAddr,
        /// The size of the question in bytes with the IP header.
        size: u16,
        /// The size that the router could pass on, if it says so.
        carries: Option<u16>,
    },
}

impl Pinger {
    /// Opens a socket in this process's namespace, to ask nodes whose addresses are of the same family as its `own`.
    ///
    /// # Errors
    /// When the process may not (it needs `CAP_NET_RAW` and `CAP_NET_ADMIN`).
    pub fn open(own: IpAddr) -> Result<Self> {
        let family = Family::of(own);
        let open = || {
            let raw = socket(family)?;
            set_socket_recv_buffer_size_force(&raw, ROOM)?;
            UdpSocket::from_std(raw.into())
        };
        let socket = open().map_err(|source: io::Error| Error::Ping { source })?;
        // The standard library's hasher is seeded by the operating system.
        let secret = RandomState::new().build_hasher().finish().to_be_bytes();
        Ok(Self { socket, questions: Questions { family, secret } })
    }

    /// Sends one question, a small one.
    ///
    /// # Errors
    /// When there is no way there at this moment.
    pub async fn ask(&self, node: IpAddr) -> io::Result<()> {
        self.send(node, 0).await
    }

    /// Sends one question of `size` bytes, the IP header included. Returns whether this node's own interface takes it. (A router's refusal is
    /// heard as an answer is; the socket isn't connected, and has no errors of that kind.)
    ///
    /// # Errors
    /// When there is no way there at this moment.
    pub async fn probe(&self, node: IpAddr, size: u16) -> io::Result<bool> {
        match self.send(node, size).await {
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => Ok(false),
            other => other.map(|()| true),
        }
    }

    async fn send(&self, node: IpAddr, size: u16) -> io::Result<()> {
        match self.socket.send_to(&self.questions.question(size), (node, 0)).await {
            // It found no room on its way out. In IPv4 the kernel says nothing of that, as of one that is lost later (raw(7)).
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Waits until something is heard of any of our questions. May be dropped while it waits.
    ///
    /// # Errors
    /// When the socket fails.
    pub async fn answer(&self) -> io::Result<Heard> {
        // Of a large one only the beginning tells anything, and how long it is.
        let mut buffer = [0; 256];
        loop {
            let receive = || Ok(recvfrom(&self.socket, &mut buffer, RecvFlags::TRUNC)?);
            let (received, length, from) = self.socket.async_io(Interest::READABLE, receive).await?;
            if let (Some(from), Some(packet)) = (from.and_then(address), buffer.get(..received))
                && let Some(heard) = self.questions.understand(from, packet, length)
            {
                return Ok(heard);
            }
        }
    }
}

/// A raw socket that doesn't fragment, and doesn't believe what the kernel has learnt of the path before: it may be repaired (ip(7), ipv6(7)).
fn socket(family: Family) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    match family {
        Family::Ipv4 => {
            let raw = socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::ICMP))?;
            set_ip_mtu_discover(&raw, Ipv4PathMtuDiscovery::PROBE)?;
            Ok(raw)
        }
        Family::Ipv6 => {
            let raw = socket_with(AddressFamily::INET6, SocketType::RAW, flags, Some(ipproto::ICMPV6))?;
            hear_only(&raw, &[family.answer(), family.refusal()])?;
            set_ipv6_mtu_discover(&raw, Ipv6PathMtuDiscovery::PROBE)?;
            Ok(raw)
        }
    }
}

/// Keeps all other messages from a socket: neighbour discovery's, of all that the host has to do with, would take answers their room.
fn hear_only(socket: &OwnedFd, kinds: &[u8]) -> io::Result<()> {
    // A bit that is set keeps its type away (linux/icmpv6.h).
    let mut filter = [u32::MAX; 8];
    for kind in kinds {
        filter[usize::from(kind >> 5)] &= !(1 << (kind & 31));
    }
    let length = size_of_val(&filter) as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes at the pointer, which is what the filter has, and keeps none of it.
    let set = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_ICMPV6, ICMPV6_FILTER, filter.as_ptr().cast(), length)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn address(from: SocketAddrAny) -> Option<IpAddr> {
    std::net::SocketAddr::try_from(from).ok().map(|from| from.ip())
}
