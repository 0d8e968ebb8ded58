//! Datagrams by the batch: one system call for all that have come (recvmmsg(2)), and one for all answers to them (sendmmsg(2)).
//!
//! Of a small query's time most goes to the kernel.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg};
use rustix::io::retry_on_intr;
use rustix::net::addr::SocketAddrArg;
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, SocketAddrAny, sendmmsg};
use tokio::io::Interest;
use tokio::net::UdpSocket;

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
    /// Waits until there are datagrams, and takes them.
    pub(crate) async fn fill(&mut self, socket: &UdpSocket) -> io::Result<()> {
        self.received.clear();
        while self.received.is_empty() {
            socket.readable().await?;
            let taken = socket.try_io(Interest::READABLE, || {
                self.take(socket)?;
                // Fewer than there was room for: there are no more, and the next one will be told of.
                if self.received.len() < BATCH { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
            });
            match taken {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn take(&mut self, socket: &UdpSocket) -> io::Result<()> {
        let mut parts: Vec<_> = self.buffer.chunks_exact_mut(DATAGRAM).map(|part| [IoSliceMut::new(part)]).collect();
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(parts.len(), None);
        let taken = recvmmsg(socket.as_raw_fd(), &mut headers, &mut parts, MsgFlags::MSG_DONTWAIT, None)?;
        // One without an address can't be answered, nor can it come from a socket of IP.
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

    /// Sends all, and is empty then. What can't be sent is left out: whoever asked will ask again.
    pub(crate) async fn send(&mut self, socket: &UdpSocket) {
        let mut sent = 0;
        while sent < self.packets.len() {
            match socket.async_io(Interest::WRITABLE, || self.give(socket, sent)).await {
                Ok(count) => sent += count,
                Err(error) => {
                    tracing::debug!(%error, "an answer could not be sent");
                    sent += 1;
                }
            }
        }
        self.packets.clear();
    }

    /// Sends as many as it can without waiting, from one on; the error is that one's.
    fn give(&self, socket: &UdpSocket, from: usize) -> io::Result<usize> {
        let packets = self.packets.get(from..).unwrap_or_default();
        let parts: Vec<_> = packets.iter().map(|(packet, _)| [IoSlice::new(packet)]).collect();
        let mut nothing_else: Vec<_> = packets.iter().map(|_| SendAncillaryBuffer::default()).collect();
        let both = packets.iter().zip(&parts).zip(&mut nothing_else);
        let mut headers: Vec<_> =
            both.map(|(((_, peer), part), control)| MMsgHdr::new_with_addr(peer, part, control)).collect();
        Ok(retry_on_intr(|| sendmmsg(socket, &mut headers, SendFlags::DONTWAIT))?)
    }
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|address| SocketAddrV4::from(*address).into());
    v4.or_else(|| address.as_sockaddr_in6().map(|address| SocketAddrV6::from(*address).into()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn what_cannot_be_sent_does_not_hold_up_the_rest() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let pod = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        // Broadcasting is not allowed unless the socket was told so.
        let nowhere = SocketAddr::from(([255; 4], 9));
        let mut outbox = Outbox::default();
        for number in 0..5 {
            outbox.put(vec![number], if number % 2 == 0 { pod.local_addr().unwrap() } else { nowhere });
        }
        outbox.send(&socket).await;
        for number in [0, 2, 4] {
            let mut buffer = [0; 2];
            let received = timeout(Duration::from_secs(8), pod.recv(&mut buffer)).await;
            assert_eq!((received.expect("in time").unwrap(), buffer[0]), (1, number));
        }
        outbox.put(vec![9], pod.local_addr().unwrap());
        outbox.send(&socket).await;
        let mut inbox = Inbox::default();
        inbox.fill(&pod).await.unwrap();
        let datagrams: Vec<_> = inbox.datagrams().collect();
        assert_eq!(datagrams, [(&[9][..], socket.local_addr().unwrap())], "what was sent is sent once");
    }
}
