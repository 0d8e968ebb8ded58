//! The target's side: fetches one snapshot of one volume from another agent.

use std::io;
use std::net::SocketAddr;

use portolan_zfs::{
    DatasetName, ErrorKind, Guid, Property, ReceiveOptions, ReceiveProcess, Snapshot, SnapshotName, Zfs,
};
use tokio::io::{AsyncRead, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::error::TransferError;
use super::identity::{Identity, node_name, server_name};
use super::pace::{Brake, Pace};
use super::protocol::{MAX_FRAME, Reply, Request};
use super::wire::{Limits, prepare, read_frame, read_header, read_trailer, within, write_header};

/// What to fetch, from where to where.
#[derive(Clone, Debug)]
pub struct Fetch {
    /// The source's transfer server.
    pub address: SocketAddr,
    /// The source's node: its certificate must name it.
    pub node: String,
    /// What is wanted.
    pub request: Request,
    /// Our dataset: none yet, or one whose newest snapshot the source has too.
    pub target: DatasetName,
    /// Set on the dataset as it is received.
    pub properties: Vec<Property>,
    /// How fast.
    pub pace: Pace,
}

/// What was received.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Received {
    /// The snapshot, now ours; its GUID is the one asked for.
    pub snapshot: Snapshot,
    /// Bytes of ZFS stream; 0 if we had it already.
    pub bytes: u64,
    /// The snapshot of ours that the stream started from; none for a full one.
    pub base: Option<SnapshotName>,
}

/// How far a fetch is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SoFar {
    /// Bytes of ZFS stream that have come.
    pub bytes: u64,
    /// About how many it will be; none where the source's ZFS doesn't say.
    pub estimate: Option<u64>,
}

type Stream = BufReader<TlsStream<TcpStream>>;

/// Fetches a snapshot, and before it, a stream each, those that the source has between it and the newest that we have too. `progress` is told
/// how far it is after each frame. Can be called again after any failure, and may be dropped at any time: the target's dataset then has
/// what it had before, and each snapshot that had come whole.
pub async fn fetch(
    identity: &Identity,
    zfs: &impl Zfs,
    limits: Limits,
    what: Fetch,
    progress: impl Fn(SoFar) + Send + Sync,
) -> Result<Received, TransferError> {
    let mut brake = Brake::new(what.pace.clone());
    let mut so_far = 0;
    let mut first_base = None;
    loop {
        let ours = snapshots(zfs, &what.target).await?;
        if let Some(there) = ours.iter().flatten().find(|snapshot| snapshot.guid == what.request.guid) {
            if so_far == 0 {
                // What received it may have been stopped before it had set them.
                for property in &what.properties {
                    zfs.set_property(&what.target, property).await?;
                }
            }
            return Ok(Received { snapshot: there.clone(), bytes: so_far, base: first_base });
        }
        let told = |now: SoFar| {
            progress(SoFar { bytes: so_far + now.bytes, estimate: now.estimate.map(|left| so_far + left) });
        };
        let (bytes, base) = one(identity, zfs, limits, &what, ours, &mut brake, told).await?;
        if so_far == 0 {
            first_base = base;
        }
        so_far += bytes;
    }
}

/// One stream: its bytes, and the snapshot of ours that it started from.
async fn one(
    identity: &Identity,
    zfs: &impl Zfs,
    limits: Limits,
    what: &Fetch,
    ours: Option<Vec<Snapshot>>,
    brake: &mut Brake,
    progress: impl Fn(SoFar) + Send + Sync,
) -> Result<(u64, Option<SnapshotName>), TransferError> {
    let request = what.request.clone().having(ours.iter().flatten().map(|snapshot| snapshot.guid));
    request.validate().map_err(|error| TransferError::Protocol(error.to_string()))?;

    let mut stream = connect(identity, limits, what).await?;
    let reply = ask(&mut stream, limits, what, &request).await?;
    let coming = reply.guid.unwrap_or(request.guid);
    if request.have.contains(&coming) {
        return Err(TransferError::Protocol(format!("a stream of {coming}, which we have")));
    }
    let base = base_of(what, ours.as_deref(), reply.base)?;
    let receive = zfs.receive(&what.target, &ReceiveOptions::with(&what.properties)).await?;
    let told = |bytes| progress(SoFar { bytes, estimate: reply.estimate });
    let copied = copy(&mut stream, receive, limits, what, brake, &told).await;

    let now = snapshots(zfs, &what.target).await;
    let snapshot = now.map(|found| found.into_iter().flatten().find(|snapshot| snapshot.guid == coming));
    match (copied, snapshot) {
        (Ok(bytes), Ok(Some(_))) => Ok((bytes, base)),
        (Ok(_), Ok(None)) => {
            Err(TransferError::WrongGuid { snapshot: what.target.snapshot(&request.snapshot)?, expected: coming })
        }
        (Ok(_), Err(error)) => Err(error),
        (Err(cause), Ok(Some(snapshot))) if must_not_count(&cause) => {
            Err(TransferError::LeftBehind { snapshot: snapshot.name, cause: cause.into() })
        }
        (Err(cause), _) => Err(cause),
    }
}

/// Whether ZFS keeping anything of a stream that failed like this breaks the promise that a stream without its trailer never counts. After a
/// failure of our own ZFS, a deadline for one, all of the verified stream may be there, and the next attempt finds it.
fn must_not_count(cause: &TransferError) -> bool {
    !matches!(cause, TransferError::Zfs(_))
}

/// Our snapshots, or none if we have no such dataset.
async fn snapshots(zfs: &impl Zfs, target: &DatasetName) -> Result<Option<Vec<Snapshot>>, TransferError> {
    match zfs.snapshots(target).await {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn connect(identity: &Identity, limits: Limits, what: &Fetch) -> Result<Stream, TransferError> {
    let failed = |doing| move |source| connection_error(what, doing, source);
    let name = server_name(&what.node).map_err(|error| {
        TransferError::Protocol(format!("node name {:?} is not valid: allowed is a DNS name: {error}", what.node))
    })?;
    let socket =
        within(limits.handshake, "connecting", TcpStream::connect(what.address)).await.map_err(failed("connecting"))?;
    prepare(&socket, limits.silent).map_err(failed("preparing the socket"))?;
    let handshake = TlsConnector::from(identity.client()).connect(name, socket);
    let stream = within(limits.handshake, "TLS handshake", handshake).await.map_err(failed("TLS handshake"))?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let found = certificate.map(node_name).transpose().map_err(|error| TransferError::Protocol(error.to_string()))?;
    match found {
        Some(found) if found == what.node => Ok(BufReader::with_capacity(64 * 1024, stream)),
        found => Err(TransferError::WrongPeer {
            address: what.address,
            expected: what.node.clone(),
            found: found.unwrap_or_default(),
        }),
    }
}

async fn ask(stream: &mut Stream, limits: Limits, what: &Fetch, request: &Request) -> Result<Reply, TransferError> {
    let failed = |source| connection_error(what, "asking", source);
    within(limits.idle, "asking", write_header(stream, request)).await.map_err(failed)?;
    let reply: Reply = within(limits.idle, "waiting for the reply", read_header(stream)).await.map_err(failed)?;
    match reply {
        Reply { ok: true, error: None, .. } => Ok(reply),
        Reply { error: Some(refusal), .. } => Err(TransferError::Refused { node: what.node.clone(), refusal }),
        Reply { .. } => Err(TransferError::Protocol("a refusal without a reason".into())),
    }
}

/// The snapshot of ours that the source starts from. It must be our newest, and a full stream needs that we have nothing: `zfs recv` would
/// refuse everything else after all of it had been sent.
fn base_of(what: &Fetch, ours: Option<&[Snapshot]>, base: Option<Guid>) -> Result<Option<SnapshotName>, TransferError> {
    let diverged = |why: String| Err(TransferError::Diverged { target: what.target.to_string(), why });
    let Some(ours) = ours else {
        return match base {
            None => Ok(None),
            Some(guid) => Err(TransferError::Protocol(format!("a stream based on {guid}, which we don't have"))),
        };
    };
    match (ours.last(), base) {
        (Some(newest), Some(guid)) if newest.guid == guid => Ok(Some(newest.name.clone())),
        (Some(newest), Some(guid)) => {
            diverged(format!("{} is newer than the newest common snapshot ({guid})", newest.name))
        }
        (Some(newest), None) => {
            diverged(format!("the source has none of its snapshots, the newest of which is {}", newest.name))
        }
        (None, _) => Err(TransferError::Unsettled { target: what.target.to_string() }),
    }
}

/// Copies frames to `zfs recv`, one behind: the last is written when the trailer has been verified. On failure the receive is cut.
async fn copy(
    stream: &mut (impl AsyncRead + Unpin),
    mut receive: ReceiveProcess,
    limits: Limits,
    what: &Fetch,
    brake: &mut Brake,
    progress: &(impl Fn(u64) + Send + Sync),
) -> Result<u64, TransferError> {
    match copy_frames(stream, &mut receive, limits, what, brake, progress).await {
        Ok((bytes, last)) => {
            // If this fails `zfs recv` has ended by itself, and says why.
            let _ = within(limits.idle, "writing to zfs recv", receive.write_all(&last)).await;
            receive.finish().await?;
            Ok(bytes)
        }
        Err(Cut::Stream(error)) => {
            receive.abort().await;
            Err(error)
        }
        Err(Cut::Receive(source)) => Err(receive.abort().await.map_or_else(
            || TransferError::Protocol(format!("zfs recv took no more: {source}")),
            |error| refused_by_zfs(what, error),
        )),
    }
}

/// Which side a copy failed on.
enum Cut {
    Stream(TransferError),
    Receive(io::Error),
}

async fn copy_frames(
    stream: &mut (impl AsyncRead + Unpin),
    receive: &mut ReceiveProcess,
    limits: Limits,
    what: &Fetch,
    brake: &mut Brake,
    progress: &(impl Fn(u64) + Send + Sync),
) -> Result<(u64, Vec<u8>), Cut> {
    let node = || what.node.clone();
    let (mut hash, mut bytes) = (blake3::Hasher::new(), 0u64);
    let (mut held, mut next) = (Vec::with_capacity(MAX_FRAME), Vec::with_capacity(MAX_FRAME));
    let cut = |source: io::Error, bytes| match source.kind() {
        io::ErrorKind::UnexpectedEof => Cut::Stream(TransferError::Truncated { node: node(), bytes }),
        _ => Cut::Stream(connection_error(what, "receiving", source)),
    };
    while within(limits.idle, "receiving", read_frame(stream, &mut next)).await.map_err(|error| cut(error, bytes))? {
        hash.update(&next);
        bytes += next.len() as u64;
        within(limits.idle, "writing to zfs recv", receive.write_all(&held)).await.map_err(Cut::Receive)?;
        std::mem::swap(&mut held, &mut next);
        progress(bytes);
        brake.took(held.len()).await;
    }
    let trailer = within(limits.idle, "receiving", read_trailer(stream)).await.map_err(|error| cut(error, bytes))?;
    if trailer.length != bytes || trailer.hash != *hash.finalize().as_bytes() {
        return Err(Cut::Stream(TransferError::Damaged { node: node(), bytes }));
    }
    Ok((bytes, held))
}

fn connection_error(what: &Fetch, doing: &'static str, source: io::Error) -> TransferError {
    match source.kind() {
        io::ErrorKind::TimedOut => TransferError::Idle { node: what.node.clone(), why: source.to_string() },
        io::ErrorKind::InvalidData if source.get_ref().is_some_and(|inner| !inner.is::<rustls::Error>()) => {
            TransferError::Protocol(source.to_string())
        }
        _ => TransferError::Connection { node: what.node.clone(), address: what.address, what: doing, source },
    }
}

/// What `zfs recv` says of a destination that was changed is the same as what we say of one before we start.
fn refused_by_zfs(what: &Fetch, error: portolan_zfs::ZfsError) -> TransferError {
    match error.kind {
        ErrorKind::Diverged | ErrorKind::AlreadyExists => {
            TransferError::Diverged { target: what.target.to_string(), why: error.to_string() }
        }
        _ => error.into(),
    }
}
