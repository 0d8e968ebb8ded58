//! From the connection to `zfs recv`: nothing is whole before its trailer has proven it.

use std::io;

use portolan_zfs::ReceiveProcess;
use tokio::io::{AsyncRead, AsyncWriteExt};

use super::client::{Fetch, connection_error, refused_by_zfs};
use super::digest::Digest;
use super::error::TransferError;
use super::pace::Brake;
use super::protocol::MAX_FRAME;
use super::wire::{Limits, read_frame, read_trailer, within};

/// Copies frames to `zfs recv`, one behind: the last is written when the trailer has been verified. On failure the receive is cut.
pub(super) async fn copy(
    stream: &mut (impl AsyncRead + Unpin),
    digest: Digest,
    mut receive: ReceiveProcess,
    limits: Limits,
    what: &Fetch,
    brake: &mut Brake,
    progress: &(impl Fn(u64) + Send + Sync),
) -> Result<u64, TransferError> {
    match copy_frames(stream, digest, &mut receive, limits, what, brake, progress).await {
        Ok((bytes, last)) => {
            // If this fails `zfs recv` has ended by itself, and says why.
            let _ = within(limits.idle, "writing to zfs recv", receive.write_all(&last)).await;
            receive.finish().await.map_err(|error| refused_by_zfs(what, error))?;
            Ok(bytes)
        }
        Err(Cut::Stream(error)) => {
            receive.abort().await;
            Err(error)
        }
        // What it says of a stream that we have cut tells nothing.
        Err(Cut::Receive(source)) if source.kind() == io::ErrorKind::TimedOut => {
            receive.abort().await;
            Err(connection_error(what, "receiving", source))
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
    mut digest: Digest,
    receive: &mut ReceiveProcess,
    limits: Limits,
    what: &Fetch,
    brake: &mut Brake,
    progress: &(impl Fn(u64) + Send + Sync),
) -> Result<(u64, Vec<u8>), Cut> {
    let node = || what.node.clone();
    let mut bytes = 0u64;
    let (mut held, mut next) = (Vec::with_capacity(MAX_FRAME), Vec::with_capacity(MAX_FRAME));
    let cut = |source: io::Error, bytes| match source.kind() {
        io::ErrorKind::UnexpectedEof => Cut::Stream(TransferError::Truncated { node: node(), bytes }),
        _ => Cut::Stream(connection_error(what, "receiving", source)),
    };
    while within(limits.idle, "receiving", read_frame(stream, &mut next)).await.map_err(|error| cut(error, bytes))? {
        digest.update(&next);
        bytes += next.len() as u64;
        within(limits.idle, "writing to zfs recv", receive.write_all(&held)).await.map_err(Cut::Receive)?;
        std::mem::swap(&mut held, &mut next);
        progress(bytes);
        brake.took(held.len()).await;
    }
    let trailer = within(limits.idle, "receiving", read_trailer(stream)).await.map_err(|error| cut(error, bytes))?;
    if trailer.length != bytes || trailer.hash != digest.finish() {
        return Err(Cut::Stream(TransferError::Damaged { node: node(), bytes }));
    }
    Ok((bytes, held))
}
