//! Many requests to the kernel by one call.
//!
//! The kernel takes all requests of a datagram one after the other, before the call that sends it returns (netlink(7)). It answers each that it
//! refuses, and of the others only those that ask for it: here that is the last one, whose answer so says that all have been tried.

use std::{io, time::Duration};

use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::{error::Result, namespace::Namespace};

/// How many requests go together at most. If the kernel refuses all of them its answers have to fit into the socket's buffer, of which each takes about
/// 1 KiB: by default there are 208 KiB (`net.core.rmem_default`).
pub const BATCH: usize = 128;
/// How long an answer is waited for that is there before we ask for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A socket in a network's namespace, which it holds alive.
pub(super) struct Batches {
    socket: Socket,
    /// The sequence number of the last request.
    last: u32,
    bytes: Vec<u8>,
}

impl Batches {
    /// Opens it.
    pub fn open(namespace: &Namespace) -> Result<Self> {
        let socket = namespace.run(|| {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            // Its answers to what it refuses needn't repeat the request.
            socket.set_cap_ack(true)?;
            set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
            Ok(socket)
        })?;
        Ok(Self { socket, last: 0, bytes: Vec::new() })
    }

    /// Sends requests, each with its flags, and returns the error numbers of those that the kernel refused, by their position. All are tried.
    ///
    /// # Errors
    /// When the kernel's answers are lost: then it isn't known what was done.
    pub fn send(&mut self, requests: Vec<(RouteNetlinkMessage, u16)>) -> io::Result<Vec<(usize, i32)>> {
        let mut refused = Vec::new();
        let (mut requests, mut done) = (requests.into_iter().peekable(), 0);
        while requests.peek().is_some() {
            let some: Vec<_> = requests.by_ref().take(BATCH).collect();
            let count = some.len();
            let those = self.send_together(some)?;
            refused.extend(those.into_iter().map(|(position, errno)| (done + position, errno)));
            done += count;
        }
        Ok(refused)
    }

    fn send_together(&mut self, requests: Vec<(RouteNetlinkMessage, u16)>) -> io::Result<Vec<(usize, i32)>> {
        let (first, count) = (self.last.wrapping_add(1), requests.len());
        self.bytes.clear();
        for (position, (message, flags)) in requests.into_iter().enumerate() {
            self.last = self.last.wrapping_add(1);
            let mut request = NetlinkMessage::from(message);
            let asks = if position + 1 == count { NLM_F_ACK } else { 0 };
            request.header.flags = NLM_F_REQUEST | asks | flags;
            request.header.sequence_number = self.last;
            request.finalize();
            let start = self.bytes.len();
            // Each begins at a multiple of four (NLMSG_ALIGN, netlink(3)).
            self.bytes.resize(start + request.buffer_len().next_multiple_of(4), 0);
            request.serialize(&mut self.bytes[start..]);
        }
        self.socket.send(&self.bytes, 0)?;
        let mut refused = Vec::new();
        loop {
            let (answers, _) = self.socket.recv_from_full()?;
            for (sequence, errno) in parse(&answers)? {
                // What is none of these is an answer to a request whose answers weren't waited for.
                let position = sequence.wrapping_sub(first) as usize;
                if position < count && errno != 0 {
                    refused.push((position, errno));
                }
                if sequence == self.last {
                    return Ok(refused);
                }
            }
        }
    }
}

/// The answers in a datagram: the request's sequence number, and the error number, or zero.
fn parse(mut datagram: &[u8]) -> io::Result<Vec<(u32, i32)>> {
    let mut answers = Vec::new();
    while !datagram.is_empty() {
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram).map_err(io::Error::other)?;
        let length = (answer.header.length as usize).next_multiple_of(4);
        if let NetlinkPayload::Error(error) = &answer.payload {
            // The kernel's number is negative.
            answers.push((answer.header.sequence_number, error.code.map_or(0, |code| -code.get())));
        }
        datagram = datagram.get(length..).unwrap_or_default();
    }
    Ok(answers)
}
