//! ICMP echo (RFC 792): whether another node's kernel is there, whatever becomes of the processes on it.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    io,
    net::{IpAddr, Ipv4Addr},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use tokio::net::UdpSocket;

use crate::error::{Error, Result};

/// Bytes of an echo message without what it carries: type, code, checksum, identifier, sequence number.
const HEADER: usize = 8;
const ECHO: u8 = 8;
const ECHO_REPLY: u8 = 0;

/// Asks nodes, and hears their answers.
#[derive(Debug)]
pub struct Pinger {
    /// A raw ICMP socket: the runtime knows it as a socket of datagrams, which it is.
    socket: UdpSocket,
    /// What our questions carry and nobody else knows, so that an answer can't be made up without having seen one.
    secret: [u8; 8],
}

impl Pinger {
    /// Opens a socket in this process's namespace.
    ///
    /// # Errors
    /// When the process may not (it needs `CAP_NET_RAW`).
    pub fn open() -> Result<Self> {
        let fail = |source: io::Error| Error::Ping { source };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let raw = socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::ICMP));
        let socket = UdpSocket::from_std(raw.map_err(|e| fail(e.into()))?.into()).map_err(fail)?;
        // The standard library's hasher is seeded by the operating system.
        Ok(Self { socket, secret: RandomState::new().build_hasher().finish().to_be_bytes() })
    }

    /// Sends one question.
    ///
    /// # Errors
    /// When there is no way there at this moment.
    pub async fn ask(&self, node: Ipv4Addr) -> io::Result<()> {
        self.socket.send_to(&message(ECHO, self.secret), (node, 0)).await.map(drop)
    }

    /// Waits for the next answer to any of our questions; returns who gave it. May be dropped while it waits.
    ///
    /// # Errors
    /// When the socket fails.
    pub async fn answer(&self) -> io::Result<Ipv4Addr> {
        let mut buffer = [0; 256];
        loop {
            let (length, from) = self.socket.recv_from(&mut buffer).await?;
            if let (IpAddr::V4(node), Some(packet)) = (from.ip(), buffer.get(..length))
                && self.is_answer(packet)
            {
                return Ok(node);
            }
        }
    }

    /// `packet` has its IP header before it: that is what a raw socket gives (raw(7)).
    fn is_answer(&self, packet: &[u8]) -> bool {
        let words = packet.first().map_or(0, |first| usize::from(first & 0x0f));
        packet.get(4 * words..).is_some_and(|icmp| icmp == message(ECHO_REPLY, self.secret))
    }
}

fn message(kind: u8, secret: [u8; 8]) -> [u8; HEADER + 8] {
    let mut message = [0; HEADER + 8];
    message[0] = kind;
    message[HEADER..].copy_from_slice(&secret);
    let checksum = checksum(&message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    message
}

/// The Internet checksum (RFC 1071) of a message of even length.
fn checksum(message: &[u8]) -> u16 {
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

    #[test]
    fn a_message_sums_up_to_nothing() {
        for kind in [ECHO, ECHO_REPLY] {
            assert_eq!(checksum(&message(kind, [0xff, 0xff, 0xfe, 1, 2, 3, 4, 5])), 0);
        }
    }
}
