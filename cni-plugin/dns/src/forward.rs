//! Asking the servers that know everything else.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::answer::{Forward, Transport, is_failure};
use crate::cache::{Cache, key};
use crate::flight::{Flights, Seat};
use crate::metrics::{Look, Metrics, Outcome};
use crate::sent::{Sent, with_random_id};

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
    flights: Arc<Flights>,
    metrics: Metrics,
}

/// A question under way.
#[derive(Debug)]
pub(crate) enum Asking {
    /// With all who ask the same.
    Shared(Seat),
    /// One whose answer can't be anybody else's, with what has been sent of it.
    Own(Option<Sent>),
}

impl Forwarder {
    pub(crate) fn new(upstream: Upstream, metrics: Metrics) -> Self {
        Self { upstream, metrics, ..Self::default() }
    }

    /// Begins to ask, without waiting: by UDP the first server has the question then, if nobody else has asked it.
    ///
    /// Sockets are opened in the namespace of the calling thread.
    pub(crate) fn begin(&self, query: &Forward, transport: Transport) -> Asking {
        let send = || {
            let server = self.upstream.servers.first().filter(|_| transport == Transport::Udp)?;
            // What can't be sent is tried again, and the error told, when it is waited for.
            Sent::send(*server, query).ok()
        };
        match key(&query.packet) {
            Some(key) => Asking::Shared(self.flights.board(key, send)),
            None => Asking::Own(send()),
        }
    }

    /// The answer to a query, with the asker's id; none when all servers have failed and nothing older can stand in.
    pub(crate) async fn answer(&self, query: &Forward, transport: Transport, asking: Asking) -> Option<Vec<u8>> {
        let seat = match asking {
            Asking::Shared(seat) => seat,
            Asking::Own(sent) => {
                self.metrics.looked(Look::Miss);
                return query.pass_on(self.ask(query, transport, sent).await?, transport);
            }
        };
        let (told, is_own) = seat.told(|sent| self.fetch(&seat.key, query, transport, sent)).await;
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
    async fn fetch(&self, key: &[u8], query: &Forward, transport: Transport, sent: Option<Sent>) -> Option<Vec<u8>> {
        // Another asker's answer may have come since this one looked.
        if sent.is_none()
            && let Some(kept) = self.look(key)
        {
            return Some(kept);
        }
        let Some(answer) = self.ask(query, transport, sent).await else {
            let old = self.cache.get_stale(key, Instant::now());
            self.metrics.looked(if old.is_some() { Look::Stale } else { Look::Miss });
            return old;
        };
        self.metrics.looked(Look::Miss);
        self.cache.put(key.to_vec(), &answer, Instant::now());
        Some(answer)
    }

    /// Asks each server in turn, the first by what has been sent to it; none when all have failed.
    async fn ask(&self, query: &Forward, transport: Transport, mut sent: Option<Sent>) -> Option<Vec<u8>> {
        let mut failure = None;
        for &server in &self.upstream.servers {
            let outcome = match timeout(PATIENCE, ask_one(server, query, transport, sent.take())).await {
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

async fn ask_one(server: SocketAddr, query: &Forward, transport: Transport, sent: Option<Sent>) -> io::Result<Vec<u8>> {
    // None: truncated, or by a server that doesn't keep the case of names, of which only a connection tells that it is the server.
    // Who asks by TCP may wait for what another one has sent by UDP.
    if (transport == Transport::Udp || sent.is_some())
        && let Some(answer) = by_udp(server, query, sent).await?
    {
        return Ok(answer);
    }
    by_tcp(server, query).await
}

async fn by_udp(server: SocketAddr, query: &Forward, sent: Option<Sent>) -> io::Result<Option<Vec<u8>>> {
    match sent {
        Some(sent) => sent,
        None => Sent::send(server, query)?,
    }
    .answer(query)
    .await
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
