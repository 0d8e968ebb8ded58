//! Sees to it that a zvol has a filesystem that can be mounted, killed anywhere and called again.

use portolan_zfs::{DatasetName, InvalidName, Property, Zfs, ZfsError};

use super::device::Device;
use super::filesystem::{self, Content, FilesystemError, Kind};
use super::tools::Tools;

/// User property of a zvol: the epoch at which this node has begun to make a filesystem on it, until that is done. It is set only when the
/// zvol is blank, and cleared before anything is mounted: while it is there nothing can be lost. The epoch, which grows whenever the
/// volume changes its node, keeps it from meaning anything after the volume has been elsewhere.
pub const FORMATTING: &str = "portolan:formatting";
/// Its value when nothing is being made.
const FORMATTED: &str = "no";

/// A zvol that can't be given its filesystem.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// What is on it is wrong, or a program failed.
    #[error(transparent)]
    Filesystem(#[from] FilesystemError),
    /// ZFS failed.
    #[error(transparent)]
    Zfs(#[from] ZfsError),
    /// A property that ZFS doesn't take.
    #[error(transparent)]
    Name(#[from] InvalidName),
}

/// Checks the filesystem on a zvol that isn't mounted, or makes one if the zvol is blank or if making one was cut short at this epoch.
/// True if it was made.
///
/// # Errors
/// When the zvol holds anything else, or what is on it is damaged. Nothing is changed then.
pub async fn prepare(
    tools: &impl Tools,
    zfs: &impl Zfs,
    dataset: &DatasetName,
    epoch: i64,
    device: &Device,
    kind: Kind,
) -> Result<bool, PrepareError> {
    let content = filesystem::look(tools, device).await?;
    let epoch = epoch.to_string();
    let interrupted = zfs.dataset(dataset).await?.user.get(FORMATTING) == Some(&epoch);
    if content != Content::Blank && !interrupted {
        filesystem::check(tools, device, kind, &content).await?;
        return Ok(false);
    }
    zfs.set_property(dataset, &Property::new(FORMATTING, epoch)?).await?;
    filesystem::format(tools, device, kind).await?;
    zfs.set_property(dataset, &Property::new(FORMATTING, FORMATTED)?).await?;
    Ok(true)
}
