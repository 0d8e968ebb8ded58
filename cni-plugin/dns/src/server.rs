//! The sockets of one server: of a network's, or of that for everyone.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::answer::{Audience, Decision, Forward, Transport, decide};
use crate::forward::{Forwarder, Upstream, read_message, write_message};
use crate::limit::{Place, Places, Rates};
use crate::metrics::{self, Metrics, Reason, Source};
use crate::zone::ZoneHandle;
use crate::{udp, wire};

/// Forwards that may be under way at once, and for one pod; more are refused (SERVFAIL).
const FORWARDS: (usize, usize) = (512, 64);
/// TCP connections that may be open at once, and for one pod; more are closed at once.
const CONNECTIONS: (usize, usize) = (256, 16);
/// How long a TCP connection may take for a query, from the end of the one before, or to accept an answer. Tests don't wait as long.
const IDLE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 10 });
/// How long to wait after a socket failed (`EMFILE`, `ENOBUFS`), so that the loop doesn't spin.
pub(crate) const AFTER_FAILURE: Duration = Duration::from_millis(100);
/// What the server for everyone is called where a network's is called like the network: nothing that a network could be called.
const EVERYONE: &str = "*";

/// The server could not use the sockets it was given.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The UDP socket can't be used.
    #[error("the DNS server of network {network} can't use its UDP socket")]
    Udp {
        /// The network; `*` for the server for everyone.
        network: String,
        /// Why.
        source: io::Error,
    },
    /// The TCP socket can't be used.
    #[error("the DNS server of network {network} can't use its TCP socket")]
    Tcp {
        /// The network; `*` for the server for everyone.
        network: String,
        /// Why.
        source: io::Error,
    },
}

pub(crate) struct Server {
    /// The network, for logs and metrics.
    pub(crate) network: String,
    audience: Audience,
    zone: ZoneHandle,
    forwarder: Forwarder,
    forwards: Arc<Places>,
    rates: Rates,
    metrics: Metrics,
}

/// Answers pods of `network`: queries that come by `udp` and `tcp`, until `shutdown` resolves.
///
/// The sockets are those of `network`'s namespace. Queries for other names are forwarded by sockets that are opened in the
/// namespace of the runtime's own threads.
///
/// # Errors
/// When a socket can't be registered with the runtime. What a packet or a peer does wrong is no error.
pub async fn run(
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
    network: String,
    zone: ZoneHandle,
    upstream: Upstream,
    metrics: Metrics,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let network = network.to_ascii_lowercase();
    let forwarder = Forwarder::new(upstream, metrics.clone());
    let audience = Audience::Network(network.clone());
    serve(udp, tcp, Server::new(network, audience, zone, forwarder, metrics), shutdown).await
}

/// Answers whoever asks: full names with namespace, of all networks in `zone`. Refuses all others, until `shutdown` resolves.
///
/// # Errors
/// When a socket can't be registered with the runtime. What a packet or a peer does wrong is no error.
pub async fn run_for_everyone(
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
    zone: ZoneHandle,
    metrics: Metrics,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let forwarder = Forwarder::new(Upstream::default(), metrics.clone());
    serve(udp, tcp, Server::new(EVERYONE.to_owned(), Audience::Everyone, zone, forwarder, metrics), shutdown).await
}

async fn serve(
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
    server: Server,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let udp_failed = |source| ServeError::Udp { network: server.network.clone(), source };
    udp.set_nonblocking(false).map_err(udp_failed)?;
    let tcp_failed = |source| ServeError::Tcp { network: server.network.clone(), source };
    tcp.set_nonblocking(true).map_err(tcp_failed)?;
    let tcp = TcpListener::from_std(tcp).map_err(tcp_failed)?;

    let server = Arc::new(server);
    tokio::select! {
        () = shutdown => Ok(()),
        ended = udp::serve(Arc::clone(&server), udp) => {
            ended.map_err(|source| ServeError::Udp { network: server.network.clone(), source })
        }
        () = serve_tcp(Arc::clone(&server), tcp) => Ok(()),
    }
}

async fn serve_tcp(server: Arc<Server>, listener: TcpListener) {
    let connections = Places::new(CONNECTIONS.0, CONNECTIONS.1);
    let mut serving = JoinSet::new();
    loop {
        while serving.try_join_next().is_some() {}
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(network = server.network, %error, "accepting failed");
                tokio::time::sleep(AFTER_FAILURE).await;
                continue;
            }
        };
        let Some(place) = connections.take(peer.ip().to_canonical()) else {
            server.metrics.dropped(&server.network, Reason::Connections);
            continue;
        };
        let server = Arc::clone(&server);
        serving.spawn(async move {
            if let Err(error) = server.converse(stream, peer).await {
                tracing::debug!(%peer, %error, "a connection ended");
            }
            drop(place);
        });
    }
}

impl Server {
    fn new(network: String, audience: Audience, zone: ZoneHandle, forwarder: Forwarder, metrics: Metrics) -> Self {
        let forwards = Places::new(FORWARDS.0, FORWARDS.1);
        Self { network, audience, zone, forwarder, forwards, rates: Rates::default(), metrics }
    }

    pub(crate) fn decide(&self, peer: SocketAddr, transport: Transport, packet: &[u8], now: Instant) -> Decision {
        let source = peer.ip().to_canonical();
        if !self.rates.admit(source, now) {
            self.metrics.dropped(&self.network, Reason::Rate);
            return Decision::Drop;
        }
        let decision = decide(&self.zone.current(), &self.audience, source, transport, packet);
        if matches!(decision, Decision::Drop) {
            self.metrics.dropped(&self.network, Reason::Malformed);
        }
        decision
    }

    /// A place for one more question of a pod to the upstreams.
    pub(crate) fn place(&self, peer: SocketAddr) -> Option<Place> {
        self.forwards.take(peer.ip().to_canonical())
    }

    /// The reply, if the upstreams need not be asked.
    pub(crate) fn kept(
        &self,
        query: &Forward,
        peer: SocketAddr,
        transport: Transport,
        begun: Instant,
    ) -> Option<Vec<u8>> {
        let reply = self.forwarder.kept(query, transport)?;
        self.answered(peer, Source::Forwarded, &reply, begun);
        Some(reply)
    }

    /// The reply of the upstreams, or that there is none.
    pub(crate) async fn forward(
        &self,
        query: &Forward,
        peer: SocketAddr,
        transport: Transport,
        begun: Instant,
    ) -> Option<Vec<u8>> {
        let Some(answer) = self.forwarder.answer(query, transport).await else {
            return self.failed(query, peer, begun);
        };
        self.answered(peer, Source::Forwarded, &answer, begun);
        Some(answer)
    }

    /// The reply that there is none.
    pub(crate) fn failed(&self, query: &Forward, peer: SocketAddr, begun: Instant) -> Option<Vec<u8>> {
        let reply = query.failed()?;
        self.answered(peer, Source::Forwarded, &reply, begun);
        Some(reply)
    }

    /// Counts an answer, and logs it at level debug under the target `portolan_dns::query`.
    pub(crate) fn answered(&self, peer: SocketAddr, source: Source, answer: &[u8], begun: Instant) {
        let took = begun.elapsed();
        self.metrics.answered(&self.network, source, answer, took);
        tracing::debug!(
            target: "portolan_dns::query",
            network = self.network,
            pod = %peer.ip().to_canonical(),
            name = wire::question_text(answer),
            r#type = metrics::type_of(answer),
            result = metrics::result_of(answer),
            %source,
            microseconds = took.as_micros(),
            "answered"
        );
    }

    /// Answers one connection's queries, one after the other, until the peer closes it or is silent.
    async fn converse(&self, mut stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
        while let Ok(message) = timeout(IDLE, read_message(&mut stream)).await {
            let begun = Instant::now();
            let reply = match self.decide(peer, Transport::Tcp, &message?, begun) {
                Decision::Drop => return Ok(()),
                Decision::Reply(packet) => {
                    self.answered(peer, Source::Own, &packet, begun);
                    packet
                }
                Decision::Forward(query) => {
                    let reply = match self.place(peer) {
                        Some(_place) => self.forward(&query, peer, Transport::Tcp, begun).await,
                        None => self.failed(&query, peer, begun),
                    };
                    let Some(packet) = reply else { return Ok(()) };
                    packet
                }
            };
            timeout(IDLE, write_message(&mut stream, &reply)).await??;
        }
        Ok(())
    }
}
