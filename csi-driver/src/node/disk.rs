//! Reading a volume's copy from the pool.

use std::path::PathBuf;

use portolan_zfs::{DatasetName, ErrorKind, Zfs, ZfsError};

use crate::block::device::{Device, DeviceError};
use crate::block::mounts::{MountError, Mounts};
use crate::handoff::{Known, Local};
use crate::transfer::There;
use crate::volume::{EPOCH_PROPERTY, OPEN_PROPERTY, UID_PROPERTY};

/// The copy could not be read; nothing is known of it.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// ZFS said no.
    #[error(transparent)]
    Zfs(#[from] ZfsError),
    /// The mount table could not be read.
    #[error(transparent)]
    Mounts(#[from] MountError),
    /// The zvol's device could not be looked at.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Where a volume is mounted: its dataset, or its zvol's device, or that device's node.
///
/// # Errors
/// When the mount table or the device can't be read: then nothing is known.
pub fn mounts(mounts: &Mounts, dataset: &DatasetName) -> Result<Vec<PathBuf>, ReadError> {
    let mut at = mounts.of(dataset.as_str())?;
    if let Some(device) = Device::find(mounts, &dataset.device())? {
        at.extend(mounts.of_device(device.number())?);
    }
    Ok(at)
}

/// What a node has of a volume.
#[derive(Debug, Default)]
pub struct Found {
    /// Its copy.
    pub copy: Option<Local>,
    /// All snapshots, and the part of a stream that was cut, which counts for nothing.
    pub there: There,
}

/// The copy in `dataset`; none if its pool is there and has no such dataset, or one that has nothing but a part of a stream.
///
/// # Errors
/// When the pool or the mount table can't be read: then nothing is known.
pub async fn read(zfs: &impl Zfs, table: &Mounts, dataset: &DatasetName) -> Result<Option<Local>, ReadError> {
    Ok(look(zfs, table, dataset).await?.copy)
}

/// The same, and whether there is a part of a stream.
///
/// # Errors
/// As for [`read`].
pub async fn look(zfs: &impl Zfs, table: &Mounts, dataset: &DatasetName) -> Result<Found, ReadError> {
    let (found, snapshots) = tokio::join!(zfs.dataset(dataset), zfs.snapshots(dataset));
    let found = match found {
        Err(error) if error.kind == ErrorKind::NotFound => return Ok(Found::default()),
        found => found?,
    };
    let snapshots = snapshots?;
    let there = There { snapshots: Some(snapshots.clone()), part: found.resume_token };
    if there.part.is_some() && snapshots.is_empty() {
        return Ok(Found { copy: None, there });
    }
    let snapshots = snapshots
        .into_iter()
        // Nobody's any more but its clones'.
        .filter(|snapshot| !snapshot.defer_destroy)
        .map(|snapshot| Known { name: snapshot.name.short().to_owned(), guid: snapshot.guid.to_string() })
        .collect();
    let open = found.user.get(OPEN_PROPERTY);
    let copy = Local {
        dataset: found.name.to_string(),
        guid: found.guid.to_string(),
        uid: found.user.get(UID_PROPERTY).cloned(),
        epoch: found.user.get(EPOCH_PROPERTY).and_then(|epoch| epoch.parse().ok()),
        readonly: found.readonly,
        mounted: found.mounted || !mounts(table, dataset)?.is_empty(),
        sealed: !found.key_available,
        open: open.is_some_and(|open| open == "on"),
        rests_at: open.filter(|open| !matches!(open.as_str(), "on" | "off")).cloned(),
        used: i64::try_from(found.used).unwrap_or(i64::MAX),
        snapshots,
        origin: found.origin.map(|origin| (origin.dataset().short().to_owned(), origin.short().to_owned())),
    };
    Ok(Found { copy: Some(copy), there })
}
