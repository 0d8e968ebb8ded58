//! Asking the servers that know everything else.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::answer::{Forward, Transport, has_question, is_failure};
use crate::cache::{Cache, key};
use crate::flight::Flights;
use crate::metrics::{Look, Metrics, Outcome};
use crate::wire::{is_truncated, question_name};

/// For how long one server is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where queries go that are not ours. The servers are asked in this order.
#[derive(Clone, Debug, Default)]
pub struct Upstream {
    /// Addresses with ports, usually the cluster's DNS service.
    pub servers: Vec<SocketAddr>,
}

/// The way to the upstreams, with what they said lately and what they are being asked.
#[derive(Debug, Default)]
pub(crate) struct Forwarder {
    upstream: Upstream,
    cache: Cache,
    flights: Flights,
    metrics: Metrics,
}

impl Forwarder {
    pub(crate) fn new(upstream: Upstream, metrics: Metrics) -> Self {
        Self { upstream, metrics, ..Self::default() }
    }

    /// The answer to a query, with the asker's id; none when all servers have failed and nothing older can stand in.
    ///
    /// Sockets are opened in the namespace of the calling thread.
    pub(crate) async fn answer(&self, query: &Forward, transport: Transport) -> Option<Vec<u8>> {
        let Some(key) = key(&query.packet) else {
            self.metrics.looked(Look::Miss);
            return query.pass_on(self.ask(query, transport).await?, transport);
        };
        if let Some(kept) = self.look(&key) {
            return query.pass_on(kept, transport);
        }
        let (told, is_own) = self.flights.join(key.clone(), self.fetch(&key, query, transport)).await;
        if !is_own {
            self.metrics.looked(Look::Merged);
        }
        query.pass_on(told?, transport)
    }

    /// The answer, if nobody need be asked.
    pub(crate) fn kept(&self, query: &Forward, transport: Transport) -> Option<Vec<u8>> {
        query.pass_on(self.look(&key(&query.packet)?)?, transport)
    }

    /// What the cache has.
    fn look(&self, key: &[u8]) -> Option<Vec<u8>> {
        let kept = self.cache.get(key, Instant::now())?;
        self.metrics.looked(if kept.is_stale { Look::Stale } else { Look::Hit });
        Some(kept.message)
    }

    /// What the servers say, which is kept; what they said before, if they say nothing.
    async fn fetch(&self, key: &[u8], query: &Forward, transport: Transport) -> Option<Vec<u8>> {
        // Another asker's answer may have come since this one looked.
        if let Some(kept) = self.look(key) {
            return Some(kept);
        }
        let Some(answer) = self.ask(query, transport).await else {
            let old = self.cache.get_stale(key, Instant::now());
            self.metrics.looked(if old.is_some() { Look::Stale } else { Look::Miss });
            return old;
        };
        self.metrics.looked(Look::Miss);
        self.cache.put(key.to_vec(), &answer, Instant::now());
        Some(answer)
    }

    /// Asks each server in turn; none when all have failed.
    async fn ask(&self, query: &Forward, transport: Transport) -> Option<Vec<u8>> {
        let mut failure = None;
        for &server in &self.upstream.servers {
            let outcome = match timeout(PATIENCE, ask_one(server, query, transport)).await {
                Ok(Ok(answer)) if !is_failure(&answer) => {
                    self.metrics.asked(server, Outcome::Answered);
                    return Some(answer);
                }
                // The next one may know better.
                Ok(Ok(answer)) => {
                    failure = Some(answer);
                    Outcome::Refused
                }
                Ok(Err(error)) => {
                    tracing::debug!(%server, %error, "forwarding failed");
                    Outcome::Failed
                }
                Err(_) => {
                    tracing::debug!(%server, "no answer in time");
                    Outcome::Timeout
                }
            };
            self.metrics.asked(server, outcome);
        }
        failure
    }
}

async fn ask_one(server: SocketAddr, query: &Forward, transport: Transport) -> io::Result<Vec<u8>> {
    // None: truncated, or by a server that doesn't keep the case of names, of which only a connection tells that it is the server.
    if transport == Transport::Udp
        && let Some(answer) = by_udp(server, query).await?
    {
        return Ok(answer);
    }
    by_tcp(server, query).await
}

/// A socket of its own for each query: its port, the id and the case of the name are what a forger would have to guess (RFC 5452).
async fn by_udp(server: SocketAddr, query: &Forward) -> io::Result<Option<Vec<u8>>> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    let (id, mut packet) = with_random_id(&query.packet);
    let name = question_name(&packet);
    if let Some(name) = name.clone().and_then(|name| packet.get_mut(name)) {
        mix_case(name);
    }
    socket.send(&packet).await?;
    // One byte more than it may have, by which one that has is known.
    let mut buffer = vec![0; query.payload + 1];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = buffer.get(..length).unwrap_or_default();
        if !query.is_answered_by(answer, id) {
            continue;
        }
        let keeps_case = name.is_none_or(|name| !has_question(answer) || answer.get(name.clone()) == packet.get(name));
        let is_whole = length <= query.payload && !is_truncated(answer);
        return Ok((keeps_case && is_whole).then(|| answer.to_vec()));
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

async fn by_tcp(server: SocketAddr, query: &Forward) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let (id, packet) = with_random_id(&query.packet);
    write_message(&mut stream, &packet).await?;
    let answer = read_message(&mut stream).await?;
    if query.is_answered_by(&answer, id) {
        Ok(answer)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "the reply is not to this question"))
    }
}

fn with_random_id(packet: &[u8]) -> (u16, Vec<u8>) {
    let id: u16 = rand::random();
    let mut packet = packet.to_vec();
    if let Some(head) = packet.get_mut(..2) {
        head.copy_from_slice(&id.to_be_bytes());
    }
    (id, packet)
}

/// Reads a message with its length before it (RFC 1035, 4.2.2).
pub(crate) async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes a message with its length before it, in one piece.
pub(crate) async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a message is longer than 65535 bytes"))?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}
