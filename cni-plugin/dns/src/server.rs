//! The sockets of one server: of a network's, or of that for everyone.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::answer::{Audience, Decision, Forward, Transport, decide};
use crate::forward::{Asking, Forwarder, Upstream, read_message, write_message};
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

/// Who asks something, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asker {
    pub(crate) peer: SocketAddr,
    pub(crate) transport: Transport,
    /// When the question had come.
    pub(crate) begun: Instant,
}

impl Asker {
    fn source(&self) -> IpAddr {
        self.peer.ip().to_canonical()
    }
}

/// Answers pods of `network`: queries that come by `udp` and `tcp`, until `shutdown` resolves.
///
/// The sockets are those of `network`'s namespace. Queries for other names are forwarded by sockets that are opened in the
/// namespace of the runtime's own threads, or by threads that these start.
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

    /// What to do with a packet; a reply is counted already.
    pub(crate) fn decide(&self, asker: Asker, packet: &[u8]) -> Decision {
        if !self.rates.admit(asker.source(), asker.begun) {
            self.metrics.dropped(&self.network, Reason::Rate);
            return Decision::Drop;
        }
        let decision = decide(&self.zone.current(), &self.audience, asker.source(), asker.transport, packet);
        match &decision {
            Decision::Drop => self.metrics.dropped(&self.network, Reason::Malformed),
            Decision::Reply(reply) => self.answered(asker, Source::Own, reply),
            Decision::Forward(_) => {}
        }
        decision
    }

    /// A place for one more question of a pod to the upstreams.
    pub(crate) fn place(&self, asker: Asker) -> Option<Place> {
        self.forwards.take(asker.source())
    }

    /// The reply, if the upstreams need not be asked.
    pub(crate) fn kept(&self, query: &Forward, asker: Asker) -> Option<Vec<u8>> {
        self.forwarded(asker, self.forwarder.kept(query, asker.transport))
    }

    /// Begins to ask the upstreams, without waiting.
    pub(crate) fn begin(&self, query: &Forward, asker: Asker) -> Asking {
        self.forwarder.begin(query, asker.transport)
    }

    /// The reply of the upstreams, or that there is none.
    pub(crate) async fn forward(&self, query: &Forward, asker: Asker, asking: Asking) -> Option<Vec<u8>> {
        let answer = self.forwarder.answer(query, asker.transport, asking).await;
        self.forwarded(asker, answer.or_else(|| query.failed()))
    }

    /// The reply that there is none.
    pub(crate) fn failed(&self, query: &Forward, asker: Asker) -> Option<Vec<u8>> {
        self.forwarded(asker, query.failed())
    }

    fn forwarded(&self, asker: Asker, reply: Option<Vec<u8>>) -> Option<Vec<u8>> {
        reply.inspect(|reply| self.answered(asker, Source::Forwarded, reply))
    }

    /// Counts an answer, and logs it at level debug under the target `portolan_dns::query`.
    fn answered(&self, asker: Asker, source: Source, answer: &[u8]) {
        let took = asker.begun.elapsed();
        self.metrics.answered(&self.network, source, answer, took);
        tracing::debug!(
            target: "portolan_dns::query",
            network = self.network,
            pod = %asker.source(),
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
            let asker = Asker { peer, transport: Transport::Tcp, begun: Instant::now() };
            let reply = match self.decide(asker, &message?) {
                Decision::Drop => None,
                Decision::Reply(packet) => Some(packet),
                Decision::Forward(query) => match self.place(asker) {
                    Some(_place) => self.forward(&query, asker, self.begin(&query, asker)).await,
                    None => self.failed(&query, asker),
                },
            };
            let Some(reply) = reply else { return Ok(()) };
            timeout(IDLE, write_message(&mut stream, &reply)).await??;
        }
        Ok(())
    }
}
