//! What happens to a volume. What its status is then: [`transition`](super::transition).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use portolan_crds::{AskedBy, PortableVolumeSpec};

use super::Known;

/// Somebody wants a volume on a node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Ask {
    /// The node.
    pub to: String,
    /// Who wants it.
    pub by: AskedBy,
    /// The VolumeMigration, `namespace/name`.
    pub migration: Option<String>,
    /// Whether the volume is to stay where it is, in use, while most of it is copied.
    pub warm: bool,
    /// See [`Handoff::target_downtime_milliseconds`].
    pub target_downtime_milliseconds: Option<i64>,
    /// See [`Handoff::limit_bytes_per_second`].
    pub limit_bytes_per_second: Option<i64>,
}

/// What a node has received in a round of PreCopy.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Round {
    /// Bytes of ZFS stream.
    pub bytes: i64,
    /// In how many milliseconds they came.
    pub milliseconds: i64,
}

/// Something that happens to a volume. `node` is whose event it is.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The controller: somebody wants it on another node.
    Asked(Ask, MicroTime),
    /// The controller: the handoff is not wanted any more. The source is writable again.
    Aborted {
        /// Why, for people.
        why: String,
        /// When.
        at: MicroTime,
    },
    /// The controller: one more round of PreCopy, because the newest is old.
    Refresh,
    /// A node holds a dataset, or is about to; and the newest snapshot that it shares with others.
    Recorded {
        /// The node.
        node: String,
        /// The snapshot; none changes nothing.
        snapshot: Option<Known>,
    },
    /// A node's dataset has been put out of the way: what it has in common with others is nothing any more.
    Quarantined {
        /// The node.
        node: String,
        /// Where the dataset is now, and what to do with it, for people.
        message: String,
    },
    /// A node holds no dataset any more.
    Forgotten {
        /// The node.
        node: String,
    },
    /// A node owns a volume that it has just made.
    Owned {
        /// The node.
        node: String,
        /// What it has made it by.
        spec: Box<PortableVolumeSpec>,
    },
    /// The source has taken the snapshot of a round of PreCopy.
    RoundTaken {
        /// The source.
        node: String,
        /// The handoff.
        epoch: i64,
        /// The snapshot.
        snapshot: Known,
        /// When.
        at: MicroTime,
    },
    /// The target has received it.
    RoundReceived {
        /// The target.
        node: String,
        /// The handoff.
        epoch: i64,
        /// The snapshot's GUID.
        guid: String,
        /// Its figures; none if they were lost with the process that had them.
        round: Option<Round>,
    },
    /// The source's last word: the volume as it is in this snapshot.
    Published {
        /// The source.
        node: String,
        /// The handoff.
        epoch: i64,
        /// The final snapshot.
        snapshot: Known,
        /// Since when nothing could write.
        quiesced_at: MicroTime,
    },
    /// The target becomes the owner: from here on the volume is what its copy says.
    TookOver {
        /// The target.
        node: String,
        /// The handoff.
        epoch: i64,
        /// The GUID of the newest snapshot of its copy.
        guid: String,
        /// Bytes of ZFS stream that it took to get there, as far as is known.
        bytes: i64,
        /// The common snapshot that they started from; none for a full stream.
        base: Option<String>,
    },
    /// The new owner's dataset is writable.
    Finished {
        /// The new owner.
        node: String,
        /// The handoff.
        epoch: i64,
        /// When.
        at: MicroTime,
    },
}

/// An event that can't happen to a volume as it is: somebody has decided otherwise meanwhile.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{event} can't happen now: {why}")]
pub struct Refused {
    /// The event.
    pub event: &'static str,
    /// Why not, for people.
    pub why: String,
}

impl Event {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Asked(..) => "Asked",
            Self::Aborted { .. } => "Aborted",
            Self::Refresh => "Refresh",
            Self::Recorded { .. } => "Recorded",
            Self::Quarantined { .. } => "Quarantined",
            Self::Forgotten { .. } => "Forgotten",
            Self::Owned { .. } => "Owned",
            Self::RoundTaken { .. } => "RoundTaken",
            Self::RoundReceived { .. } => "RoundReceived",
            Self::Published { .. } => "Published",
            Self::TookOver { .. } => "TookOver",
            Self::Finished { .. } => "Finished",
        }
    }
}
