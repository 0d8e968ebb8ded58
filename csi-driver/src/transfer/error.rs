//! Why a transfer failed, from the target's point of view.

use std::net::SocketAddr;

use portolan_zfs::{Guid, InvalidName, SnapshotName, ZfsError};

use super::protocol::Refusal;

/// A transfer that didn't succeed. In each case the target's dataset is as it was before, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// No connection, or one that broke.
    #[error("node {node} at {address}: {what}: {source}")]
    Connection {
        /// The source node.
        node: String,
        /// Its address.
        address: SocketAddr,
        /// What was being done.
        what: &'static str,
        /// What the system or TLS said.
        source: std::io::Error,
    },
    /// The peer's certificate is good, but names somebody else.
    #[error("{address} is {found:?} by its certificate, not node {expected:?}")]
    WrongPeer {
        /// Where we connected to.
        address: SocketAddr,
        /// The node that we meant to reach.
        expected: String,
        /// The name in the certificate.
        found: String,
    },
    /// The source refused.
    #[error("node {node} refused: {refusal}")]
    Refused {
        /// The source node.
        node: String,
        /// Its answer.
        refusal: Refusal,
    },
    /// Nothing moved for too long.
    #[error("node {node}: {why}")]
    Idle {
        /// The source node.
        node: String,
        /// For how long, and while what was being done.
        why: String,
    },
    /// The stream ended before its trailer: `zfs send` failed or the connection was cut.
    #[error("the stream from node {node} ended after {bytes} bytes without its trailer")]
    Truncated {
        /// The source node.
        node: String,
        /// How much had come.
        bytes: u64,
    },
    /// Length or hash of what came isn't what the trailer says.
    #[error("the stream from node {node} is damaged: {bytes} bytes don't match the length or hash in its trailer")]
    Damaged {
        /// The source node.
        node: String,
        /// How much had come.
        bytes: u64,
    },
    /// The peer sent what the protocol doesn't allow.
    #[error("protocol error: {0}")]
    Protocol(String),
    /// Our copy has changed since it was last in step, or has nothing in common with the source's. Nothing was received.
    #[error("{target} has diverged from its source: {why}")]
    Diverged {
        /// Our dataset.
        target: String,
        /// In what.
        why: String,
    },
    /// Our dataset is there without any snapshot: a receive into it has not ended yet (ours, that was called off, for one), or somebody made it.
    #[error("{target} has no snapshot: either an earlier receive has not ended yet, or it is no copy of this volume")]
    Unsettled {
        /// Our dataset.
        target: String,
    },
    /// Our dataset is another than when we asked: somebody had it while the transfer waited for its turn.
    #[error("{target} has changed while its transfer waited for its turn")]
    Changed {
        /// Our dataset.
        target: String,
    },
    /// All was received, but the snapshot's GUID is not the one that was asked for.
    #[error("received {snapshot} does not have GUID {expected}")]
    WrongGuid {
        /// The snapshot.
        snapshot: SnapshotName,
        /// What was asked for.
        expected: Guid,
    },
    /// A stream that must not count was nevertheless kept by ZFS.
    #[error("{snapshot} is there although its stream failed: {cause}")]
    LeftBehind {
        /// The snapshot.
        snapshot: SnapshotName,
        /// Why the stream failed.
        cause: Box<TransferError>,
    },
    /// ZFS failed here.
    #[error(transparent)]
    Zfs(#[from] ZfsError),
    /// A name that can't be.
    #[error(transparent)]
    Name(#[from] InvalidName),
}

impl TransferError {
    /// Whether trying again may succeed without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Connection { .. }
            | Self::Idle { .. }
            | Self::Truncated { .. }
            | Self::Damaged { .. }
            | Self::Unsettled { .. }
            | Self::Changed { .. } => true,
            Self::Refused { refusal, .. } => refusal.code.is_retryable(),
            Self::Zfs(error) => error.is_retryable(),
            Self::WrongPeer { .. }
            | Self::Protocol(_)
            | Self::Diverged { .. }
            | Self::WrongGuid { .. }
            | Self::LeftBehind { .. }
            | Self::Name(_) => false,
        }
    }
}
