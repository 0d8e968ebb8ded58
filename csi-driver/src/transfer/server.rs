//! The source's side: answers other agents' requests with streams.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use portolan_zfs::{
    DatasetName, ErrorKind, Guid, Rest, SendOptions, SendStream, Snapshot, SnapshotName, Zfs, ZfsError,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::digest::Digest;
use super::identity::{Identity, node_name};
use super::protocol::{OLDEST, Refusal, RefusalCode, Reply, Request, Trailer};
use super::queue::Class;
use super::turns::{Place, Turns};
use super::wire::{Limits, prepare, read_header_bytes, within, write_header};

/// How much of a stream goes into one frame.
const CHUNK: usize = 256 * 1024;
/// Bytes of the length before a frame.
const FRAME_HEAD: usize = 4;
/// How long a stream waits to be estimated.
const ESTIMATE_WITHIN: Duration = Duration::from_secs(1);
/// How often a target that waits for its turn is told so, in case nothing changes: it is not to take the source for dead.
const TELL_EVERY: Duration = Duration::from_secs(3);

/// What a node may have.
pub struct Grant {
    /// The dataset to send from.
    pub dataset: DatasetName,
    /// Whether it is encrypted: its blocks go as they are on disk, and neither end needs the key.
    pub raw: bool,
    /// How urgent it is.
    pub class: Class,
    /// Whether the target is told about how many bytes will come, which costs a look at the dataset before any does.
    pub estimated: bool,
    /// Whether a snapshot that lies on the way to the one asked for goes along.
    pub travels: Box<dyn Fn(&Snapshot) -> bool + Send + Sync>,
}

/// Decides whether a node may have what it asks for.
pub trait Authorise: Send + Sync + 'static {
    /// What to send, or why not. `peer_node` is from the peer's verified certificate; `request` has been validated, but is
    /// otherwise only what the peer says.
    fn authorise(&self, peer_node: &str, request: &Request) -> impl Future<Output = Result<Grant, Refusal>> + Send;
}

struct Server<A, Z> {
    identity: watch::Receiver<Arc<Identity>>,
    authorise: Arc<A>,
    zfs: Arc<Z>,
    limits: Limits,
    turns: Turns,
}

/// Serves until `shutdown`; streams that then run are cut, and their targets will ask again. The identity is looked at for each connection.
pub async fn serve<A: Authorise, Z: Zfs>(
    listener: TcpListener,
    identity: watch::Receiver<Arc<Identity>>,
    authorise: Arc<A>,
    zfs: Arc<Z>,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let server = Arc::new(Server { identity, authorise, zfs, limits, turns: Turns::new(limits.streams) });
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((_, peer)) if connections.len() >= limits.connections => {
                warn!(%peer, limit = limits.connections, "too many connections: closing this one");
            }
            Ok((socket, peer)) => {
                let server = server.clone();
                connections.spawn(async move { server.connection(socket, peer).await });
            }
            // Out of file descriptors, most likely: others must end first.
            Err(error) => {
                warn!(%error, "could not accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// A running `zfs send`, with its place among the streams.
struct Opened {
    _place: Place,
    guid: Guid,
    base: Option<(Guid, String)>,
    resumes: bool,
    estimate: Option<u64>,
    source: SendStream,
}

impl<A: Authorise, Z: Zfs> Server<A, Z> {
    async fn connection(&self, socket: TcpStream, peer: SocketAddr) {
        let (mut stream, node) = match self.handshake(socket).await {
            Ok(ready) => ready,
            Err(error) => return warn!(%peer, %error, "no transfer: the connection was not established"),
        };
        match self.answer(&mut stream, &node).await {
            Ok(Some((request, bytes))) => {
                info!(%peer, node, volume = request.volume, snapshot = request.snapshot, bytes, "sent a volume");
            }
            Ok(None) => {}
            // Without a farewell: its place is another's at once, and a peer that is there still sees that there is no trailer.
            Err(error) => return warn!(%peer, node, %error, "a transfer failed"),
        }
        let _ = within(self.limits.idle, "closing", stream.shutdown()).await;
    }

    async fn handshake(&self, socket: TcpStream) -> io::Result<(TlsStream<TcpStream>, String)> {
        prepare(&socket, self.limits.silent)?;
        let acceptor = TlsAcceptor::from(self.identity.borrow().server());
        let stream = within(self.limits.handshake, "waiting for the TLS handshake", acceptor.accept(socket)).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let certificate = certificate.ok_or_else(|| io::Error::other("the peer has no certificate"))?;
        let node = node_name(certificate).map_err(io::Error::other)?;
        Ok((stream, node))
    }

    /// Reads the request and sends the stream or the refusal. What was sent, if it was.
    async fn answer(&self, stream: &mut TlsStream<TcpStream>, node: &str) -> io::Result<Option<(Request, u64)>> {
        let header = within(self.limits.handshake, "waiting for the request", read_header_bytes(stream)).await?;
        let request = match Request::parse(&header) {
            Ok(request) => request,
            Err(error) => {
                let refusal = Refusal::new(RefusalCode::Invalid, error.to_string());
                warn!(node, %refusal, "refused a transfer");
                within(self.limits.idle, "replying", write_header(stream, &Reply::refusal(refusal))).await?;
                return Ok(None);
            }
        };
        let opened = match self.authorise.authorise(node, &request).await {
            Ok(grant) => self.turn(stream, node, &request, grant).await?,
            Err(refusal) => Err(refusal),
        };
        match opened {
            Ok(opened) => {
                let reply = Reply::stream(opened.guid, opened.base, opened.resumes, opened.estimate);
                within(self.limits.idle, "replying", write_header(stream, &reply)).await?;
                let bytes = self.pump(opened.source, request.version, stream).await?;
                Ok(Some((request, bytes)))
            }
            Err(refusal) => {
                info!(node, volume = request.volume, %refusal, "refused a transfer");
                within(self.limits.idle, "replying", write_header(stream, &Reply::refusal(refusal))).await?;
                Ok(None)
            }
        }
    }

    /// Waits until it is the target's turn and starts to send. Nothing of the dataset is touched or held before. A target that goes away, or says
    /// anything, loses its place. Whether it may have the volume is asked again when its turn has come: much may have happened.
    async fn turn(
        &self,
        stream: &mut TlsStream<TcpStream>,
        node: &str,
        request: &Request,
        mut grant: Grant,
    ) -> io::Result<Result<Opened, Refusal>> {
        let place = self.turns.enter(grant.class);
        let mut waited = false;
        while let Some(before) = place.before() {
            if request.version == OLDEST {
                let message = "all places are taken, and version 1 of the protocol can't wait for one: ask again";
                return Ok(Err(Refusal::new(RefusalCode::Failed, message)));
            }
            if !waited {
                info!(node, volume = request.volume, class = ?grant.class, before, "a transfer waits for its turn");
            }
            waited = true;
            within(self.limits.idle, "telling a target that it waits", write_header(stream, &Reply::waits(before)))
                .await?;
            tokio::select! {
                () = place.changed_from(Some(before)) => {}
                () = tokio::time::sleep(TELL_EVERY) => {}
                said = stream.read_u8() => return Err(match said {
                    Ok(_) => io::Error::new(io::ErrorKind::InvalidData, "the target spoke while it waited for its turn"),
                    Err(error) => error,
                }),
            }
        }
        if waited {
            grant = match self.authorise.authorise(node, request).await {
                Ok(grant) => grant,
                Err(refusal) => return Ok(Err(refusal)),
            };
        }
        Ok(self.open(request, grant, place).await)
    }

    /// From a granted request to a running `zfs send`.
    async fn open(&self, request: &Request, grant: Grant, place: Place) -> Result<Opened, Refusal> {
        let Grant { dataset, raw, estimated, travels, .. } = grant;
        let snapshots = self.zfs.snapshots(&dataset).await.map_err(|error| refusal_of(&error))?;
        let wanted = snapshots.iter().find(|snapshot| snapshot.guid == request.guid);
        let wanted = wanted.filter(|snapshot| snapshot.name.short() == request.snapshot).ok_or_else(|| {
            let message = format!("{dataset} has no snapshot {} with GUID {}", request.snapshot, request.guid);
            Refusal::new(RefusalCode::NotFound, message)
        })?;
        let (base, next) = next_step(&snapshots, wanted, &request.have, &travels);
        // What is raw is compressed as it is.
        let compressed = request.compressed && !raw && self.sends_compressed().await?;
        let options = SendOptions { raw, compressed, ..SendOptions::since(base.map(|base| &base.name)) };
        let rest = self.rest(request, base, next, &options).await;
        let (source, estimate) = match &rest {
            // How much follows for other snapshots isn't asked.
            Some((token, rest)) => (self.zfs.send_resume(token).await, rest.bytes.filter(|_| next.guid == wanted.guid)),
            None if estimated => {
                tokio::join!(self.zfs.send(&next.name, &options), self.estimate(&wanted.name, &options))
            }
            None => (self.zfs.send(&next.name, &options).await, None),
        };
        let source = source.map_err(|error| refusal_of(&error))?;
        let base = base.map(|base| (base.guid, base.name.short().to_owned()));
        Ok(Opened { _place: place, guid: next.guid, base, resumes: rest.is_some(), estimate, source })
    }

    /// The target's token, if it is of the very stream that would be sent now: anything else is not gone on with. It is the target's word, and ZFS would
    /// send whatever it names.
    async fn rest<'a>(
        &self,
        request: &'a Request,
        base: Option<&Snapshot>,
        next: &Snapshot,
        options: &SendOptions,
    ) -> Option<(&'a str, Rest)> {
        let token = request.token.as_deref()?;
        let rest = self.zfs.rest_of(token).await;
        let rest = rest.inspect_err(|error| debug!(%error, "a target's token is of no use")).ok()?;
        is_rest_of(&rest, base, next, options).then_some((token, rest))
    }

    async fn sends_compressed(&self) -> Result<bool, Refusal> {
        let probe = self.zfs.probe().await.map_err(|error| refusal_of(&error))?;
        Ok(probe.capabilities.compressed_send)
    }

    /// About how many bytes of stream lead from the base to a snapshot. Nothing fails or waits long for want of it.
    async fn estimate(&self, wanted: &SnapshotName, options: &SendOptions) -> Option<u64> {
        let size = tokio::time::timeout(ESTIMATE_WITHIN, self.zfs.send_size(wanted, options));
        size.await.ok()?.inspect_err(|error| debug!(%error, "no estimate of a stream")).ok()?
    }

    /// Copies a stream into frames. The trailer is written only if `zfs send` ended well.
    async fn pump(&self, mut source: SendStream, version: u32, stream: &mut TlsStream<TcpStream>) -> io::Result<u64> {
        let idle = self.limits.idle;
        // A frame with its length before it: they go by one call.
        let (mut frame, mut digest, mut length) = (vec![0; FRAME_HEAD + CHUNK], Digest::of_version(version), 0u64);
        loop {
            let (head, payload) = frame.split_at_mut(FRAME_HEAD);
            let count = within(idle, "reading from zfs send", source.read(payload)).await?;
            if count == 0 {
                break;
            }
            digest.update(&payload[..count]);
            length += count as u64;
            head.copy_from_slice(&u32::try_from(count).map_err(io::Error::other)?.to_be_bytes());
            within(idle, "sending", stream.write_all(&frame[..FRAME_HEAD + count])).await?;
        }
        source.finish().await.map_err(io::Error::other)?;
        let trailer = Trailer { length, hash: digest.finish() };
        within(idle, "sending the trailer", stream.write_all(&[0; 4])).await?;
        within(idle, "sending the trailer", stream.write_all(&trailer.to_bytes())).await?;
        within(idle, "sending the trailer", stream.flush()).await?;
        Ok(length)
    }
}

/// The stream that brings the target one snapshot nearer to `wanted`, and its base: the newest snapshot that the target has too, else none.
/// One snapshot a stream, so that each is verified before ZFS keeps it. `snapshots` are in the order of their making; one that only a
/// clone still keeps is nobody's any more.
fn next_step<'a>(
    snapshots: &'a [Snapshot],
    wanted: &'a Snapshot,
    have: &[Guid],
    travels: impl Fn(&Snapshot) -> bool,
) -> (Option<&'a Snapshot>, &'a Snapshot) {
    let before: Vec<&Snapshot> = snapshots.iter().take_while(|snapshot| snapshot.guid != wanted.guid).collect();
    let base = before.iter().rposition(|snapshot| have.contains(&snapshot.guid));
    let rest = &before[base.map_or(0, |base| base + 1)..];
    let next = rest.iter().find(|snapshot| !snapshot.defer_destroy && travels(snapshot));
    (base.map(|base| before[base]), next.copied().unwrap_or(wanted))
}

/// Whether what a token names is the stream from `base` to `next` as it would be sent now.
fn is_rest_of(rest: &Rest, base: Option<&Snapshot>, next: &Snapshot, options: &SendOptions) -> bool {
    rest.snapshot.dataset() == next.name.dataset()
        && rest.guid == next.guid
        && rest.base == base.map(|base| base.guid)
        && rest.raw == options.raw
        // All blocks of what is raw are as they are on disk.
        && (rest.raw || rest.compressed == options.compressed)
}

fn refusal_of(error: &ZfsError) -> Refusal {
    let code = if error.kind == ErrorKind::NotFound { RefusalCode::NotFound } else { RefusalCode::Failed };
    Refusal::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn four() -> Vec<Snapshot> {
        let dataset = DatasetName::new("tank/v").unwrap();
        let snapshot = |n| Snapshot {
            name: dataset.snapshot(&format!("s{n}")).unwrap(),
            guid: Guid(n),
            created_txg: n,
            created: 0,
            used: 0,
            holds: 0,
            defer_destroy: false,
        };
        (1..=4).map(snapshot).collect()
    }

    #[test]
    fn only_the_rest_of_the_same_stream_is_gone_on_with() {
        let (snapshots, options) = (four(), SendOptions { compressed: true, ..SendOptions::default() });
        let rest = Rest {
            snapshot: snapshots[2].name.clone(),
            guid: Guid(3),
            base: Some(Guid(2)),
            raw: false,
            compressed: true,
            bytes: None,
        };
        let fits = |change: fn(&mut Rest)| {
            let mut rest = rest.clone();
            change(&mut rest);
            is_rest_of(&rest, Some(&snapshots[1]), &snapshots[2], &options)
        };
        assert!(fits(|_| ()));
        assert!(fits(|rest| rest.snapshot = "tank/v@renamed".parse().unwrap()), "the GUID tells");
        assert!(!fits(|rest| rest.snapshot = "tank/other@s3".parse().unwrap()));
        assert!(!fits(|rest| rest.guid = Guid(4)));
        assert!(!fits(|rest| rest.base = Some(Guid(1))));
        assert!(!fits(|rest| rest.base = None));
        assert!(!fits(|rest| rest.raw = true));
        assert!(!fits(|rest| rest.compressed = false));
        assert!(!is_rest_of(&rest, None, &snapshots[2], &options));
    }

    #[test]
    fn each_stream_brings_the_next_snapshot() {
        let snapshots = four();
        let all = |_: &Snapshot| true;
        let step = |have: &[u64]| {
            let have: Vec<Guid> = have.iter().copied().map(Guid).collect();
            let (base, next) = next_step(&snapshots, &snapshots[2], &have, all);
            (base.map(|base| base.guid.0), next.guid.0)
        };
        assert_eq!(step(&[]), (None, 1));
        assert_eq!(step(&[9]), (None, 1));
        assert_eq!(step(&[1]), (Some(1), 2));
        assert_eq!(step(&[2, 1, 9]), (Some(2), 3));
        assert_eq!(step(&[2]), (Some(2), 3), "what is older than the common one is not missed");
        assert_eq!(step(&[4]), (None, 1), "newer than what is wanted");
        let (base, next) = next_step(&snapshots, &snapshots[2], &[Guid(1)], |_| false);
        assert_eq!(
            (base.map(|base| base.guid.0), next.guid.0),
            (Some(1), 3),
            "what stays is passed by, and is a base if need be"
        );
    }
}
