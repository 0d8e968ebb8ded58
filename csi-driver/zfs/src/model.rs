//! What ZFS says of pools, datasets and snapshots.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use crate::name::{BookmarkName, DatasetName, Guid, SnapshotName};

/// What a dataset holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Files.
    Filesystem,
    /// A block device (zvol), at [`DatasetName::device`].
    Volume {
        /// Property `volsize`, in bytes.
        size: u64,
    },
}

/// A filesystem or volume and its state. Sizes are in bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Dataset {
    /// Its name.
    pub name: DatasetName,
    /// Identifies it on this pool; a received copy has one of its own.
    pub guid: Guid,
    /// A filesystem or a volume.
    pub kind: Kind,
    /// Used by it and all below it, snapshots included. May lag behind writes by some seconds.
    pub used: u64,
    /// What can still be written.
    pub available: u64,
    /// What its live data refer to.
    pub referenced: u64,
    /// The limit of `referenced`; none if there is no limit.
    pub refquota: Option<u64>,
    /// Property `readonly` as it is stored, whatever a mount's options say.
    pub readonly: bool,
    /// Whether it is mounted.
    pub mounted: bool,
    /// Where it is mounted when it is; none for `none` and `legacy`.
    pub mountpoint: Option<PathBuf>,
    /// The snapshot it is a clone of.
    pub origin: Option<SnapshotName>,
    /// By which a receive that was interrupted can go on (`send -t`); it holds a part of a stream until then.
    pub resume_token: Option<String>,
    /// Property `encryption`, such as `aes-256-gcm`; none if it isn't encrypted.
    pub encryption: Option<String>,
    /// The dataset whose key it is sealed with: itself, or what it inherits from or was cloned from. None if it isn't encrypted.
    pub encryption_root: Option<DatasetName>,
    /// Whether it can be read: its key is loaded, or it isn't encrypted.
    pub key_available: bool,
    /// User properties set on it; not those inherited from its parent.
    pub user: BTreeMap<String, String>,
}

/// What a [`Dataset::resume_token`] is the rest of. The receiver's word: it proves nothing but what ZFS would send for it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rest {
    /// The snapshot, as it was called when the stream began.
    pub snapshot: SnapshotName,
    /// What identifies it.
    pub guid: Guid,
    /// The GUID of the snapshot that the stream started from; none for a full one.
    pub base: Option<Guid>,
    /// Whether the stream is raw.
    pub raw: bool,
    /// Whether its blocks are as they are compressed at the sender, which all of a raw one are.
    pub compressed: bool,
    /// About how many bytes are to come.
    pub bytes: Option<u64>,
}

/// A snapshot.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Snapshot {
    /// Its name.
    pub name: SnapshotName,
    /// The same on every pool that has it.
    pub guid: Guid,
    /// The transaction that made it on this pool: grows from snapshot to snapshot of a dataset.
    pub created_txg: u64,
    /// When it was made, in seconds since 1970.
    pub created: i64,
    /// Bytes that only it has: of the newest one 0 as long as the dataset is as it was.
    pub used: u64,
    /// How many holds it has.
    pub holds: u64,
    /// To be destroyed by ZFS itself when its last hold or clone is gone.
    pub defer_destroy: bool,
}

/// What is left of a snapshot that an incremental stream may start from when it is gone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Bookmark {
    /// Its name.
    pub name: BookmarkName,
    /// The snapshot's.
    pub guid: Guid,
    /// The transaction that made the snapshot.
    pub created_txg: u64,
}

/// Room in a dataset, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Space {
    /// Used by it and all below it.
    pub used: u64,
    /// What can still be written.
    pub available: u64,
}

impl Space {
    /// What would fit into it if it were empty.
    pub fn capacity(&self) -> u64 {
        self.used.saturating_add(self.available)
    }
}

/// A pool's health (zpoolconcepts(7), "Device Failure and Recovery").
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PoolHealth {
    /// All devices work.
    Online,
    /// Works with less redundancy than it should have.
    Degraded,
    /// Can't be opened or has lost too many devices.
    Faulted,
    /// Taken offline by its administrator.
    Offline,
    /// A device was removed.
    Removed,
    /// Devices can't be opened.
    Unavailable,
    /// I/O is suspended after a failure (OpenZFS).
    Suspended,
    /// A word that this version doesn't know.
    Unknown(String),
}

impl PoolHealth {
    pub(crate) fn parse(text: &str) -> Self {
        match text {
            "ONLINE" => Self::Online,
            "DEGRADED" => Self::Degraded,
            "FAULTED" => Self::Faulted,
            "OFFLINE" => Self::Offline,
            "REMOVED" => Self::Removed,
            "UNAVAIL" => Self::Unavailable,
            "SUSPENDED" => Self::Suspended,
            other => Self::Unknown(other.to_owned()),
        }
    }

    /// Whether volumes can be read and written.
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Online | Self::Degraded)
    }
}

impl fmt::Display for PoolHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Online => "ONLINE",
            Self::Degraded => "DEGRADED",
            Self::Faulted => "FAULTED",
            Self::Offline => "OFFLINE",
            Self::Removed => "REMOVED",
            Self::Unavailable => "UNAVAIL",
            Self::Suspended => "SUSPENDED",
            Self::Unknown(word) => word,
        })
    }
}
