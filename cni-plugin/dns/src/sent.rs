//! One question that is on its way to one server by UDP.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use crate::answer::{Forward, has_question};
use crate::wire::{is_truncated, question_name};

/// A socket of its own: its port, the id and the case of the name are what a forger would have to guess (RFC 5452).
#[derive(Debug)]
pub(crate) struct Sent {
    socket: UdpSocket,
    id: u16,
    packet: Vec<u8>,
}

impl Sent {
    /// Sends the question without waiting, by a socket in the namespace of the calling thread.
    pub(crate) fn send(server: SocketAddr, query: &Forward) -> io::Result<Self> {
        let any: SocketAddr = match server {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any)?;
        socket.set_nonblocking(true)?;
        socket.connect(server)?;
        let (id, mut packet) = with_random_id(&query.packet);
        if let Some(name) = question_name(&packet).and_then(|name| packet.get_mut(name)) {
            mix_case(name);
        }
        socket.send(&packet)?;
        Ok(Self { socket, id, packet })
    }

    /// Waits for the answer; none if it is truncated, or by a server that doesn't keep the case of names.
    pub(crate) async fn answer(self, query: &Forward) -> io::Result<Option<Vec<u8>>> {
        let socket = tokio::net::UdpSocket::from_std(self.socket)?;
        let name = question_name(&self.packet);
        // One byte more than it may have, by which one that has is known.
        let mut buffer = vec![0; query.payload + 1];
        loop {
            let length = socket.recv(&mut buffer).await?;
            let answer = buffer.get(..length).unwrap_or_default();
            if !query.is_answered_by(answer, self.id) {
                continue;
            }
            let keeps_case =
                name.is_none_or(|name| !has_question(answer) || answer.get(name.clone()) == self.packet.get(name));
            let is_whole = length <= query.payload && !is_truncated(answer);
            return Ok((keeps_case && is_whole).then(|| answer.to_vec()));
        }
    }
}

/// Letters in upper or lower case at random (draft-vixie-dnsext-dns0x20). Lengths of labels are below the letters.
fn mix_case(name: &mut [u8]) {
    for byte in name.iter_mut().filter(|byte| byte.is_ascii_alphabetic()) {
        if rand::random() {
            *byte ^= 0x20;
        }
    }
}

/// The packet with an id of its own, and that.
pub(crate) fn with_random_id(packet: &[u8]) -> (u16, Vec<u8>) {
    let id: u16 = rand::random();
    let mut packet = packet.to_vec();
    if let Some(head) = packet.get_mut(..2) {
        head.copy_from_slice(&id.to_be_bytes());
    }
    (id, packet)
}
