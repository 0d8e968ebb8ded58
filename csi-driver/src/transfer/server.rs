//! The source's side: answers other agents' requests with streams.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use portolan_zfs::{DatasetName, ErrorKind, Guid, SendOptions, SendStream, Snapshot, Zfs, ZfsError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::identity::{Identity, node_name};
use super::protocol::{Refusal, RefusalCode, Reply, Request, Trailer};
use super::wire::{Limits, prepare, read_header, within, write_header};

/// How much of a stream goes into one frame.
const CHUNK: usize = 256 * 1024;

/// Decides whether a node may have what it asks for.
pub trait Authorise: Send + Sync + 'static {
    /// The dataset to send from, or why not. `peer_node` is from the peer's verified certificate; `request` has been validated, but is
    /// otherwise only what the peer says.
    fn authorise(
        &self,
        peer_node: &str,
        request: &Request,
    ) -> impl Future<Output = Result<DatasetName, Refusal>> + Send;
}

struct Server<A, Z> {
    identity: watch::Receiver<Arc<Identity>>,
    authorise: Arc<A>,
    zfs: Arc<Z>,
    limits: Limits,
    streams: Semaphore,
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
    let server = Arc::new(Server { identity, authorise, zfs, limits, streams: Semaphore::new(limits.streams) });
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
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
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
            Err(error) => warn!(%peer, node, %error, "a transfer failed"),
        }
        // A peer that is gone has no use for a farewell.
        let _ = within(self.limits.idle, "closing", stream.shutdown()).await;
    }

    async fn handshake(&self, socket: TcpStream) -> io::Result<(TlsStream<TcpStream>, String)> {
        prepare(&socket)?;
        let acceptor = TlsAcceptor::from(self.identity.borrow().server());
        let stream = within(self.limits.handshake, "waiting for the TLS handshake", acceptor.accept(socket)).await?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let certificate = certificate.ok_or_else(|| io::Error::other("the peer has no certificate"))?;
        let node = node_name(certificate).map_err(io::Error::other)?;
        Ok((stream, node))
    }

    /// Reads the request and sends the stream or the refusal. What was sent, if it was.
    async fn answer(&self, stream: &mut TlsStream<TcpStream>, node: &str) -> io::Result<Option<(Request, u64)>> {
        let request: Request = within(self.limits.handshake, "waiting for the request", read_header(stream)).await?;
        match self.open(node, &request).await {
            Ok((_permit, base, source)) => {
                let reply = Reply::stream(base);
                within(self.limits.idle, "replying", write_header(stream, &reply)).await?;
                let bytes = self.pump(source, stream).await?;
                Ok(Some((request, bytes)))
            }
            Err(refusal) => {
                info!(node, volume = request.volume, %refusal, "refused a transfer");
                within(self.limits.idle, "replying", write_header(stream, &Reply::refusal(refusal))).await?;
                Ok(None)
            }
        }
    }

    /// From a request to a running `zfs send`, with its place among the streams.
    async fn open(
        &self,
        node: &str,
        request: &Request,
    ) -> Result<(tokio::sync::SemaphorePermit<'_>, Option<(Guid, String)>, SendStream), Refusal> {
        request.validate().map_err(|error| Refusal::new(RefusalCode::Invalid, error.to_string()))?;
        let dataset = self.authorise.authorise(node, request).await?;
        let busy = || Refusal::new(RefusalCode::Busy, format!("{} streams are running", self.limits.streams));
        let permit = self.streams.try_acquire().map_err(|_| busy())?;
        let snapshots = self.zfs.snapshots(&dataset).await.map_err(|error| refusal_of(&error))?;
        let wanted = snapshots.iter().find(|snapshot| snapshot.guid == request.guid);
        let wanted = wanted.filter(|snapshot| snapshot.name.short() == request.snapshot).ok_or_else(|| {
            let message = format!("{dataset} has no snapshot {} with GUID {}", request.snapshot, request.guid);
            Refusal::new(RefusalCode::NotFound, message)
        })?;
        let base = newest_common(&snapshots, wanted, &request.have);
        let options = SendOptions::since(base.map(|base| &base.name));
        let source = self.zfs.send(&wanted.name, &options).await.map_err(|error| refusal_of(&error))?;
        Ok((permit, base.map(|base| (base.guid, base.name.short().to_owned())), source))
    }

    /// Copies a stream into frames. The trailer is written only if `zfs send` ended well.
    async fn pump(&self, mut source: SendStream, stream: &mut TlsStream<TcpStream>) -> io::Result<u64> {
        let idle = self.limits.idle;
        let (mut buffer, mut hash, mut length) = (vec![0; CHUNK], blake3::Hasher::new(), 0u64);
        loop {
            let count = within(idle, "reading from zfs send", source.read(&mut buffer)).await?;
            if count == 0 {
                break;
            }
            hash.update(&buffer[..count]);
            length += count as u64;
            let head = u32::try_from(count).map_err(io::Error::other)?.to_be_bytes();
            within(idle, "sending", stream.write_all(&head)).await?;
            within(idle, "sending", stream.write_all(&buffer[..count])).await?;
        }
        source.finish().await.map_err(io::Error::other)?;
        let trailer = Trailer { length, hash: *hash.finalize().as_bytes() };
        within(idle, "sending the trailer", stream.write_all(&[0; 4])).await?;
        within(idle, "sending the trailer", stream.write_all(&trailer.to_bytes())).await?;
        within(idle, "sending the trailer", stream.flush()).await?;
        Ok(length)
    }
}

/// The newest snapshot older than `wanted` that the target has too. `snapshots` are in the order of their making.
fn newest_common<'a>(snapshots: &'a [Snapshot], wanted: &Snapshot, have: &[Guid]) -> Option<&'a Snapshot> {
    snapshots
        .iter()
        .take_while(|snapshot| snapshot.guid != wanted.guid)
        .filter(|snapshot| have.contains(&snapshot.guid))
        .last()
}

fn refusal_of(error: &ZfsError) -> Refusal {
    let code = if error.kind == ErrorKind::NotFound { RefusalCode::NotFound } else { RefusalCode::Failed };
    Refusal::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_is_the_newest_that_both_have() {
        let dataset = DatasetName::new("tank/v").unwrap();
        let snapshots: Vec<Snapshot> = (1..=4)
            .map(|n| Snapshot {
                name: dataset.snapshot(&format!("s{n}")).unwrap(),
                guid: Guid(n),
                created_txg: n,
                created: 0,
                holds: 0,
                defer_destroy: false,
            })
            .collect();
        let base = |have: &[u64]| {
            let have: Vec<Guid> = have.iter().copied().map(Guid).collect();
            newest_common(&snapshots, &snapshots[2], &have).map(|snapshot| snapshot.guid.0)
        };
        assert_eq!(base(&[]), None);
        assert_eq!(base(&[9]), None);
        assert_eq!(base(&[2, 1, 9]), Some(2));
        assert_eq!(base(&[1]), Some(1));
        assert_eq!(base(&[4]), None, "newer than what is wanted");
    }
}
