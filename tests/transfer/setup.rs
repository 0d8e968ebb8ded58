//! What the transfer tests stand on: an authority, servers, a proxy that cuts.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use portolan_csi::transfer::{
    Authorise, Class, Fetch, Grant, Identity, IdentityError, Limits, Pace, Refusal, RefusalCode, Request, Turns, serve,
};
use portolan_zfs::{DatasetName, SendOptions, Snapshot, Zfs};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::zfs::Real;
use portolan_tests::contract::Node;

/// A node on a real pool.
pub fn real() -> Real {
    Real::start()
}

/// A certificate authority like the operator's.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "portolan");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A node's identity.
    pub fn identity(&self, node: &str) -> Identity {
        self.try_identity(&format!("node:{node}"), node).unwrap()
    }

    /// An identity with a common name and a DNS name of our choice.
    pub fn try_identity(&self, common_name: &str, dns: &str) -> Result<Identity, IdentityError> {
        let (certificate, key) = self.issue(common_name, dns);
        Identity::new(certificate.as_bytes(), key.as_bytes(), self.pem.as_bytes())
    }

    /// A node's identity by this authority that trusts another one.
    pub fn identity_trusting(&self, node: &str, other: &Self) -> Identity {
        let (certificate, key) = self.issue(&format!("node:{node}"), node);
        Identity::new(certificate.as_bytes(), key.as_bytes(), other.pem.as_bytes()).unwrap()
    }

    fn issue(&self, common_name: &str, dns: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![format!("{dns}.node.portolan.dev")]).unwrap();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

/// The volume that is encrypted, where one is.
pub const SEALED: &str = "pvc-sealed";

/// How the names of volumes begin whose pods are down: they may be sent as finals.
pub const AWAITED: &str = "pvc-awaited";

/// Lets one node have every volume of a pool, and counts who asks.
struct Only {
    node: &'static str,
    pool: DatasetName,
    asked: Arc<AtomicUsize>,
    closed: Arc<AtomicBool>,
}

impl Authorise for Only {
    async fn authorise(&self, peer_node: &str, request: &Request) -> Result<Grant, Refusal> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if peer_node != self.node {
            return Err(Refusal::new(RefusalCode::NotAuthorised, format!("{peer_node} is not the target")));
        }
        if self.closed.load(Ordering::Relaxed) {
            return Err(Refusal::new(RefusalCode::NotAuthorised, "the handoff has ended"));
        }
        let (raw, is_final) = (request.volume == SEALED, request.volume.starts_with(AWAITED));
        let class = if is_final { Class::Final } else { Class::Background };
        Ok(Grant {
            dataset: self.pool.child(&request.volume).unwrap(),
            raw,
            class,
            estimated: true,
            travels: Box::new(|_| true),
        })
    }
}

/// A running transfer server; ends when dropped.
pub struct Server {
    pub address: SocketAddr,
    pub identity: watch::Sender<Arc<Identity>>,
    pub shutdown: CancellationToken,
    /// Set, nobody may have anything any more.
    pub closed: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
}

impl Server {
    pub async fn start(identity: &Identity, node: &impl Node<Zfs: Clone>, allow: &'static str) -> Self {
        Self::start_with(identity, node, allow, Limits::default()).await
    }

    pub async fn start_with(
        identity: &Identity,
        node: &impl Node<Zfs: Clone>,
        allow: &'static str,
        limits: Limits,
    ) -> Self {
        Self::start_at(TcpListener::bind("127.0.0.1:0").await.unwrap(), identity, node, allow, limits)
    }

    pub fn start_at(
        listener: TcpListener,
        identity: &Identity,
        node: &impl Node<Zfs: Clone>,
        allow: &'static str,
        limits: Limits,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let (sender, receiver) = watch::channel(Arc::new(identity.clone()));
        let (shutdown, asked) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
        let closed = Arc::new(AtomicBool::new(false));
        let authorise = Arc::new(Only { node: allow, pool: node.pool(), asked: asked.clone(), closed: closed.clone() });
        let zfs = Arc::new(node.zfs().clone());
        tokio::spawn(serve(listener, receiver, authorise, zfs, limits, shutdown.clone()));
        Self { address, identity: sender, shutdown, closed, asked }
    }

    /// How many requests got as far as being judged.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// A request for a snapshot, to the dataset of the same name in the target's pool.
pub fn fetching(address: SocketAddr, from: &str, snapshot: &Snapshot, target: &impl Node) -> Fetch {
    let volume = snapshot.name.dataset().short();
    Fetch {
        address,
        node: from.into(),
        request: Request::new(volume, 2, snapshot.name.short(), snapshot.guid),
        target: target.pool().child(volume).unwrap(),
        properties: Vec::new(),
        pace: Pace::default(),
        turns: Turns::new(usize::MAX),
        class: Class::Background,
    }
}

/// A proxy that passes so many bytes from the server, and then cuts the connection.
pub async fn cut_after(server: SocketAddr, bytes: u64) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let server = TcpStream::connect(server).await.unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (from_server, mut to_server) = server.into_split();
        let up = tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
        let _ = tokio::io::copy(&mut from_server.take(bytes), &mut to_client).await;
        let _ = to_client.shutdown().await;
        up.abort();
    });
    address
}

/// Reads all of a stream.
pub async fn read_all(zfs: &impl Zfs, snapshot: &portolan_zfs::SnapshotName) -> Vec<u8> {
    let mut stream = zfs.send(snapshot, &SendOptions::default()).await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    stream.finish().await.unwrap();
    bytes
}
