//! Datagrams by the batch: one system call for all that have come (recvmmsg(2)), and one for all answers to them (sendmmsg(2)).
//!
//! Of a small query's time most goes to the kernel.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg};
use rustix::io::retry_on_intr;
use rustix::net::addr::SocketAddrArg;
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, SocketAddrAny, sendmmsg};

/// Datagrams that are taken at once.
const BATCH: usize = 16;
/// The largest datagram that is read; a longer query is malformed anyway.
const DATAGRAM: usize = 4096;

/// Datagrams that have come.
#[derive(Debug)]
pub(crate) struct Inbox {
    buffer: Vec<u8>,
    /// How long each of the buffer's parts is, and from whom it came.
    received: Vec<(usize, SocketAddr)>,
}

impl Default for Inbox {
    fn default() -> Self {
        Self { buffer: vec![0; BATCH * DATAGRAM], received: Vec::with_capacity(BATCH) }
    }
}

impl Inbox {
    /// Waits until there is a datagram, and takes it and those that have come with it.
    pub(crate) fn fill(&mut self, socket: &UdpSocket) -> io::Result<()> {
        self.received.clear();
        let mut parts: Vec<_> = self.buffer.chunks_exact_mut(DATAGRAM).map(|part| [IoSliceMut::new(part)]).collect();
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(parts.len(), None);
        let taken = recvmmsg(socket.as_raw_fd(), &mut headers, &mut parts, MsgFlags::MSG_WAITFORONE, None)?;
        // One without an address can't be answered, nor can it come from a socket of IP that isn't shut.
        let nobody = SocketAddr::from(([0; 4], 0));
        let of = |address: Option<SockaddrStorage>| address.as_ref().and_then(to_std).unwrap_or(nobody);
        self.received.extend(taken.map(|datagram| (datagram.bytes, of(datagram.address))));
        Ok(())
    }

    /// Those that were taken.
    pub(crate) fn datagrams(&self) -> impl Iterator<Item = (&[u8], SocketAddr)> {
        let parts = self.buffer.chunks_exact(DATAGRAM).zip(&self.received);
        parts.map(|(part, (length, peer))| (part.get(..*length).unwrap_or_default(), *peer))
    }
}

/// Datagrams to be sent.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    packets: Vec<(Vec<u8>, SocketAddrAny)>,
}

impl Outbox {
    /// With one datagram.
    pub(crate) fn of(packet: Vec<u8>, peer: SocketAddr) -> Self {
        let mut outbox = Self::default();
        outbox.put(packet, peer);
        outbox
    }

    pub(crate) fn put(&mut self, packet: Vec<u8>, peer: SocketAddr) {
        self.packets.push((packet, peer.as_any()));
    }

    /// Sends all, waiting for room if need be, and is empty then. What can't be sent is left out: whoever asked will ask again.
    pub(crate) fn send(&mut self, socket: &UdpSocket) {
        self.give(socket, SendFlags::empty());
    }

    /// The same without waiting: what there is no room for is left out, too.
    pub(crate) fn send_now(&mut self, socket: &UdpSocket) {
        self.give(socket, SendFlags::DONTWAIT);
    }

    fn give(&mut self, socket: &UdpSocket, flags: SendFlags) {
        let parts: Vec<_> = self.packets.iter().map(|(packet, _)| [IoSlice::new(packet)]).collect();
        let mut nothing_else: Vec<_> = self.packets.iter().map(|_| SendAncillaryBuffer::default()).collect();
        let both = self.packets.iter().zip(&parts).zip(&mut nothing_else);
        let mut headers: Vec<_> =
            both.map(|(((_, peer), part), control)| MMsgHdr::new_with_addr(peer, part, control)).collect();
        let mut rest = headers.as_mut_slice();
        while !rest.is_empty() {
            // It ends at the first that can't be sent; the error, if that is the first of all, is that one's.
            let done = retry_on_intr(|| sendmmsg(socket, rest, flags)).unwrap_or_else(|error| {
                tracing::debug!(%error, "an answer could not be sent");
                1
            });
            rest = rest.get_mut(done..).unwrap_or_default();
        }
        self.packets.clear();
    }
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|address| SocketAddrV4::from(*address).into());
    v4.or_else(|| address.as_sockaddr_in6().map(|address| SocketAddrV6::from(*address).into()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn socket() -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
        socket
    }

    #[test]
    fn what_cannot_be_sent_does_not_hold_up_the_rest() {
        let (server, pod) = (socket(), socket());
        // Broadcasting is not allowed unless the socket was told so.
        let nowhere = SocketAddr::from(([255; 4], 9));
        for send in [Outbox::send, Outbox::send_now] {
            let mut outbox = Outbox::default();
            for number in 0..5 {
                outbox.put(vec![number], if number % 2 == 0 { pod.local_addr().unwrap() } else { nowhere });
            }
            send(&mut outbox, &server);
            for number in [0, 2, 4] {
                let mut buffer = [0; 2];
                assert_eq!((pod.recv(&mut buffer).unwrap(), buffer[0]), (1, number));
            }
            outbox.put(vec![9], pod.local_addr().unwrap());
            send(&mut outbox, &server);
            let mut inbox = Inbox::default();
            inbox.fill(&pod).unwrap();
            let datagrams: Vec<_> = inbox.datagrams().collect();
            assert_eq!(datagrams, [(&[9][..], server.local_addr().unwrap())], "what was sent is sent once");
        }
    }

    #[test]
    fn more_than_fit_at_once_come_one_batch_after_the_other() {
        let (server, pod) = (socket(), socket());
        let count = 2 * BATCH + 3;
        for number in 0..count {
            pod.send_to(&[u8::try_from(number).unwrap()], server.local_addr().unwrap()).unwrap();
        }
        let (mut inbox, mut seen) = (Inbox::default(), Vec::new());
        while seen.len() < count {
            inbox.fill(&server).unwrap();
            seen.extend(inbox.datagrams().map(|(packet, _)| usize::from(packet[0])));
        }
        assert_eq!(seen, (0..count).collect::<Vec<_>>());
    }
}
