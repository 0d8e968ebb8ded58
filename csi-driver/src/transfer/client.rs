//! The target's side: fetches one snapshot of one volume from another agent.

use std::io;
use std::net::SocketAddr;

use portolan_zfs::{DatasetName, ErrorKind, Guid, Property, ReceiveOptions, Snapshot, SnapshotName, Zfs};
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::copy::copy;
use super::digest::Digest;
use super::error::TransferError;
use super::identity::{Identity, node_name, server_name, version_of};
use super::pace::{Brake, Pace};
use super::protocol::{OLDEST, Reply, Request};
use super::queue::Class;
use super::turns::{Place, Turns};
use super::wire::{Limits, prepare, read_header, within, write_header};

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
    /// How many streams come here at a time: those of all transfers that share it.
    pub turns: Turns,
    /// How urgent it is among them. The source finds out by itself.
    pub class: Class,
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

type Stream = TlsStream<BufReader<TcpStream>>;
/// How much is taken from a socket at a time: rustls alone takes 4 KiB.
const TAKEN: usize = 256 * 1024;

/// What a transfer waits for its turn behind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Waits {
    /// At the source; else here.
    pub at_source: bool,
    /// How many go before it.
    pub before: usize,
}

/// A transfer: a stream for each snapshot of the source's between the newest that we have too and the one that is wanted, and that one's.
/// Can be begun again after any failure, and may be dropped at any time: the target's dataset then has what it had before, and each snapshot that
/// had come whole.
pub struct Fetching<'a, Z> {
    identity: &'a Identity,
    zfs: &'a Z,
    limits: Limits,
    what: Fetch,
    brake: Brake,
    bytes: u64,
    /// Of the first stream.
    base: Option<SnapshotName>,
    place: Option<Place>,
    /// What was there when somebody else looked who has held the volume since.
    there: Option<There>,
    /// The snapshot that is wanted, once it has come and been seen.
    come: Option<Snapshot>,
    /// Whether our ZFS can go on with a stream that was cut, once it has been looked at.
    resumable: Option<bool>,
    /// Whether our pool takes compressed blocks, once it has been looked at.
    compressed: Option<bool>,
}

/// What a transfer does next.
pub enum Next {
    /// Nothing: all is there.
    Done(Received),
    /// To receive what the source has begun to send.
    Stream(Box<Offer>),
}

/// A stream that the source has begun to send. Dropped, it is called off.
pub struct Offer {
    stream: Stream,
    request: Request,
    reply: Reply,
    there: There,
    waited: bool,
}

/// What is on our disk.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct There {
    /// None if there is no such dataset.
    pub snapshots: Option<Vec<Snapshot>>,
    /// The token of a part of a stream. Where ZFS can't go on with a stream there is never a part of one.
    pub part: Option<String>,
}

impl There {
    /// Whether it has the same snapshots, and the same part of a stream.
    fn is_as(&self, before: &Self) -> bool {
        let names = |there: &Self| {
            let known = |snapshot: &Snapshot| (snapshot.name.clone(), snapshot.guid);
            there.snapshots.as_ref().map(|all| all.iter().map(known).collect::<Vec<_>>())
        };
        self.part == before.part && names(self) == names(before)
    }
}

impl Offer {
    /// Whether it had to wait for its turn, so that anything may have happened since it was asked for.
    pub fn has_waited(&self) -> bool {
        self.waited
    }
}

/// Fetches all of it. `progress` is told how far it is after each frame.
pub async fn fetch(
    identity: &Identity,
    zfs: &impl Zfs,
    limits: Limits,
    what: Fetch,
    progress: impl Fn(SoFar) + Send + Sync,
) -> Result<Received, TransferError> {
    let mut fetching = Fetching::new(identity, zfs, limits, what);
    loop {
        match fetching.next(|_| {}).await? {
            Next::Done(received) => return Ok(received),
            Next::Stream(offer) => fetching.receive(offer, &progress).await?,
        }
    }
}

impl<'a, Z: Zfs> Fetching<'a, Z> {
    /// A transfer that is about to begin.
    pub fn new(identity: &'a Identity, zfs: &'a Z, limits: Limits, what: Fetch) -> Self {
        let brake = Brake::new(what.pace.clone());
        Self {
            identity,
            zfs,
            limits,
            what,
            brake,
            bytes: 0,
            base: None,
            place: None,
            there: None,
            come: None,
            resumable: None,
            compressed: None,
        }
    }

    /// Begins with what is there, which it would look at otherwise: as it is now, and nobody else changes it.
    pub fn knowing(self, there: Option<There>) -> Self {
        Self { there, ..self }
    }

    /// Looks at what is there, waits for a place here and at the source, and asks for the next stream. Nothing is changed here but the
    /// properties of what is there already. `waits` is told at each change of the queues, and now and then.
    pub async fn next(&mut self, waits: impl Fn(Waits) + Send + Sync) -> Result<Next, TransferError> {
        let what = &self.what;
        if let Some(snapshot) = self.come.take() {
            return Ok(Next::Done(Received { snapshot, bytes: self.bytes, base: self.base.take() }));
        }
        let resumable = match self.resumable {
            Some(known) => known,
            None => *self.resumable.insert(self.zfs.probe().await?.capabilities.resume),
        };
        let mut there = match self.there.take() {
            Some(known) => known,
            None => look(self.zfs, &what.target, resumable).await?,
        };
        let whole = there.snapshots.iter().flatten().find(|snapshot| snapshot.guid == what.request.guid);
        if let Some(whole) = whole {
            if self.bytes == 0 {
                // What received it may have been stopped before it had set them.
                for property in &what.properties {
                    self.zfs.set_property(&what.target, property).await?;
                }
            }
            let (snapshot, base) = (whole.clone(), self.base.take());
            return Ok(Next::Done(Received { snapshot, bytes: self.bytes, base }));
        }
        let here = self.place.get_or_insert_with(|| what.turns.enter(what.class));
        let mut waited = false;
        if here.before().is_some() {
            here.turn(|before| waits(Waits { at_source: false, before })).await;
            there = look(self.zfs, &what.target, resumable).await?;
            waited = true;
        }
        let mut request = what.request.clone().having(there.snapshots.iter().flatten().map(|snapshot| snapshot.guid));
        request.validate().map_err(|error| TransferError::Protocol(error.to_string()))?;
        let (stream, compressed) = tokio::join!(
            connect(self.identity, self.limits, what),
            takes_compressed(self.zfs, &what.target, &mut self.compressed)
        );
        let mut stream = stream?;
        request.version = version_of(stream.get_ref().1.alpn_protocol());
        request.compressed = compressed && request.version > OLDEST;
        request.token = there.part.clone().filter(|_| request.version > OLDEST);
        let told = |before| waits(Waits { at_source: true, before });
        let (reply, waited_there) = ask(&mut stream, self.limits, what, &request, told).await?;
        waited |= waited_there;
        Ok(Next::Stream(Box::new(Offer { stream, request, reply, there, waited })))
    }

    /// Receives a stream.
    pub async fn receive(
        &mut self,
        offer: Box<Offer>,
        progress: impl Fn(SoFar) + Send + Sync,
    ) -> Result<(), TransferError> {
        let so_far = self.bytes;
        let told = |now: SoFar| {
            progress(SoFar { bytes: so_far + now.bytes, estimate: now.estimate.map(|left| so_far + left) });
        };
        let resumable = self.resumable.unwrap_or_default();
        let came = one(self.zfs, self.limits, &self.what, resumable, *offer, &mut self.brake, told).await?;
        if so_far == 0 {
            self.base = came.base;
        }
        self.bytes += came.bytes;
        self.come = Some(came.snapshot).filter(|snapshot| snapshot.guid == self.what.request.guid);
        Ok(())
    }
}

/// One stream: what has come by it.
async fn one(
    zfs: &impl Zfs,
    limits: Limits,
    what: &Fetch,
    resumable: bool,
    offer: Offer,
    brake: &mut Brake,
    progress: impl Fn(SoFar) + Send + Sync,
) -> Result<Received, TransferError> {
    let Offer { mut stream, request, reply, mut there, waited } = offer;
    if waited && !look(zfs, &what.target, resumable).await?.is_as(&there) {
        return Err(TransferError::Changed { target: what.target.to_string() });
    }
    if reply.resumes && request.token.is_none() {
        return Err(TransferError::Protocol("the rest of a stream of which we have nothing".into()));
    }
    if !reply.resumes && there.part.is_some() {
        // Of another stream than what is wanted now.
        zfs.abort_receive(&what.target).await?;
        there = look(zfs, &what.target, resumable).await?;
    }
    let coming = reply.guid.unwrap_or(request.guid);
    if request.have.contains(&coming) {
        return Err(TransferError::Protocol(format!("a stream of {coming}, which we have")));
    }
    let base = base_of(what, &there, reply.base)?;
    let options = ReceiveOptions { properties: what.properties.clone(), resumable };
    let receive = zfs.receive(&what.target, &options).await?;
    let told = |bytes| progress(SoFar { bytes, estimate: reply.estimate });
    let copied = copy(&mut stream, Digest::of_version(request.version), receive, limits, what, brake, &told).await;

    if let (true, Err(cause)) = (resumable, &copied) {
        keep_or_drop(zfs, &what.target, cause, request.token.as_ref()).await;
    }
    let now = snapshots(zfs, &what.target).await;
    let snapshot = now.map(|found| found.into_iter().flatten().find(|snapshot| snapshot.guid == coming));
    match (copied, snapshot) {
        (Ok(bytes), Ok(Some(snapshot))) => Ok(Received { snapshot, bytes, base }),
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

/// After a stream that failed: what came of it is kept for the next attempt only if it was cut, and is more than what was there before. What ZFS refused
/// would be refused again, may fill the pool, or was damaged.
async fn keep_or_drop(zfs: &impl Zfs, target: &DatasetName, cause: &TransferError, before: Option<&String>) {
    let was_cut = matches!(
        cause,
        TransferError::Truncated { .. } | TransferError::Idle { .. } | TransferError::Connection { .. }
    );
    let now = look(zfs, target, true).await;
    let part = now.as_ref().ok().and_then(|now| now.part.as_ref());
    if was_cut && part != before {
        return;
    }
    // What can't be dropped now is offered to the source again.
    if let Err(error) = zfs.abort_receive(target).await {
        tracing::debug!(%target, %error, "a part of a stream stays behind");
    }
}

/// What is on our disk.
async fn look(zfs: &impl Zfs, target: &DatasetName, resumable: bool) -> Result<There, TransferError> {
    // At once: a pod may wait for it.
    let part = async {
        match resumable {
            true => zfs.dataset(target).await.map(|dataset| dataset.resume_token),
            false => Ok(None),
        }
    };
    let (snapshots, part) = tokio::join!(snapshots(zfs, target), part);
    match snapshots? {
        Some(snapshots) => Ok(There { snapshots: Some(snapshots), part: part? }),
        None => Ok(There { snapshots: None, part: None }),
    }
}

/// Whether our pool takes compressed blocks: looked at once, and not worth a failure.
async fn takes_compressed(zfs: &impl Zfs, target: &DatasetName, known: &mut Option<bool>) -> bool {
    if let Some(known) = known {
        return *known;
    }
    let takes = zfs.receives_compressed(target).await;
    let takes = takes.inspect_err(|error| tracing::debug!(%error, "no compressed stream")).unwrap_or(false);
    *known.insert(takes)
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
    let socket = BufReader::with_capacity(TAKEN, socket);
    let handshake = TlsConnector::from(identity.client()).connect(name, socket);
    let stream = within(limits.handshake, "TLS handshake", handshake).await.map_err(failed("TLS handshake"))?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let found = certificate.map(node_name).transpose().map_err(|error| TransferError::Protocol(error.to_string()))?;
    match found {
        Some(found) if found == what.node => Ok(stream),
        found => Err(TransferError::WrongPeer {
            address: what.address,
            expected: what.node.clone(),
            found: found.unwrap_or_default(),
        }),
    }
}

/// Asks, and waits for its turn as long as the source says that it has to: what the source answers in the end, and whether it waited.
async fn ask(
    stream: &mut Stream,
    limits: Limits,
    what: &Fetch,
    request: &Request,
    waits: impl Fn(usize) + Send + Sync,
) -> Result<(Reply, bool), TransferError> {
    let failed = |source| connection_error(what, "asking", source);
    within(limits.idle, "asking", write_header(stream, request)).await.map_err(failed)?;
    let mut waited = false;
    loop {
        let reply: Reply = within(limits.idle, "waiting for the reply", read_header(stream)).await.map_err(failed)?;
        match reply {
            Reply { ok: true, error: None, .. } => return Ok((reply, waited)),
            Reply { error: Some(refusal), .. } => {
                return Err(TransferError::Refused { node: what.node.clone(), refusal });
            }
            Reply { before: Some(before), .. } => waits(before),
            Reply { .. } => return Err(TransferError::Protocol("a refusal without a reason".into())),
        }
        waited = true;
    }
}

/// The snapshot of ours that the source starts from. It must be our newest, and a full stream needs that we have nothing: `zfs recv` would
/// refuse everything else after all of it had been sent.
fn base_of(what: &Fetch, there: &There, base: Option<Guid>) -> Result<Option<SnapshotName>, TransferError> {
    let diverged = |why: String| Err(TransferError::Diverged { target: what.target.to_string(), why });
    let Some(ours) = &there.snapshots else {
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
        // All that there is is a part of the stream that goes on now.
        (None, None) if there.part.is_some() => Ok(None),
        (None, _) => Err(TransferError::Unsettled { target: what.target.to_string() }),
    }
}

pub(super) fn connection_error(what: &Fetch, doing: &'static str, source: io::Error) -> TransferError {
    match source.kind() {
        io::ErrorKind::TimedOut => TransferError::Idle { node: what.node.clone(), why: source.to_string() },
        io::ErrorKind::InvalidData if source.get_ref().is_some_and(|inner| !inner.is::<rustls::Error>()) => {
            TransferError::Protocol(source.to_string())
        }
        _ => TransferError::Connection { node: what.node.clone(), address: what.address, what: doing, source },
    }
}

/// What `zfs recv` says of a destination that was changed is the same as what we say of one before we start.
pub(super) fn refused_by_zfs(what: &Fetch, error: portolan_zfs::ZfsError) -> TransferError {
    match error.kind {
        ErrorKind::Diverged | ErrorKind::AlreadyExists => {
            TransferError::Diverged { target: what.target.to_string(), why: error.to_string() }
        }
        _ => error.into(),
    }
}
