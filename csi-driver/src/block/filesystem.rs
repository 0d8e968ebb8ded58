//! ext4 and XFS on a block device: made only where nothing is, checked, mounted, grown. What kubelet's own drivers do by mount-utils, but
//! stricter: what is not known for sure to be nothing is never formatted, and what can't be repaired without loss is left to a person.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use super::device::{Device, DeviceError};
use super::tools::{ToolError, Tools};

/// How long what doesn't depend on the amount of data may take.
const QUICK: Duration = Duration::from_secs(60);
/// How long a check or a format may take.
const LONG: Duration = Duration::from_secs(30 * 60);

/// A filesystem's type.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

impl Kind {
    /// As `mount -t` and `blkid` call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is on a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Content {
    /// Nothing: no signature that blkid(8) knows, and zeros where signatures are.
    Blank,
    /// This, by its signature: a filesystem's type, or a partition table's.
    Signed(String),
    /// Something without a signature, or with several.
    Unknown,
}

/// What is wrong with a filesystem.
#[derive(Debug, thiserror::Error)]
pub enum FilesystemError {
    /// The device can't be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A program failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// Something else is on the device.
    #[error("block device {device} holds {found} and should hold {wanted}: nothing was changed")]
    Foreign {
        /// The device.
        device: String,
        /// What it holds.
        found: String,
        /// What it should hold.
        wanted: Kind,
    },
    /// It is damaged.
    #[error(
        "the filesystem on block device {device} is damaged and can't be repaired without a decision: run `e2fsck {device}` on the node ({cause})"
    )]
    Damaged {
        /// The device.
        device: String,
        /// What the check said.
        cause: ToolError,
    },
}

/// Finds out what is on a device. Changes nothing.
///
/// # Errors
/// When the device is in use or can't be read.
pub async fn look(tools: &impl Tools, device: &Device) -> Result<Content, FilesystemError> {
    let blank = device.is_blank().await?;
    let path = device.path().to_string_lossy();
    let words = ["blkid", "-p", "-o", "export", "-s", "TYPE", "-s", "PTTYPE", &path];
    let output = tools.run(&words, QUICK).await?;
    match output.status {
        Some(0) => Ok(signature(&output.stdout)),
        // blkid(8): nothing was found. It ends so too when it can't read.
        Some(2) if blank => Ok(Content::Blank),
        // 8: ambivalent.
        Some(2 | 8) => Ok(Content::Unknown),
        _ => Err(output.failure(&words).into()),
    }
}

/// From `NAME=value` lines.
fn signature(export: &str) -> Content {
    let of = |name: &str| export.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    match (of("TYPE"), of("PTTYPE")) {
        (Some(kind), None) => Content::Signed(kind.to_owned()),
        (None, Some(table)) => Content::Signed(format!("a partition table ({table})")),
        _ => Content::Unknown,
    }
}

/// Makes a filesystem. Whoever calls has made sure that nothing is lost; what is mounted or in use is refused by the programs themselves.
///
/// # Errors
/// When `mkfs` fails. The device then holds something between nothing and a filesystem.
pub async fn format(tools: &impl Tools, device: &Device, kind: Kind) -> Result<(), FilesystemError> {
    let path = device.path().to_string_lossy();
    let words = match kind {
        // No blocks only for root: nobody mends a volume from inside.
        Kind::Ext4 => ["mkfs.ext4", "-q", "-F", "-m0", &path],
        Kind::Xfs => ["mkfs.xfs", "-q", "-f", "--", &path],
    };
    tools.succeed(&words, LONG).await?;
    Ok(())
}

/// Makes sure that what is on the device is a filesystem of this type that can be mounted: replays ext4's journal and repairs what can be
/// repaired without a decision (`e2fsck -p`). XFS does so itself when it is mounted.
///
/// # Errors
/// When something else is on it, or it is damaged.
pub async fn check(tools: &impl Tools, device: &Device, kind: Kind, content: &Content) -> Result<(), FilesystemError> {
    let path = device.path().to_string_lossy();
    let foreign =
        |found: &str| Err(FilesystemError::Foreign { device: path.to_string(), found: found.to_owned(), wanted: kind });
    match content {
        Content::Signed(found) if found == kind.name() => {}
        Content::Signed(found) => return foreign(found),
        Content::Blank => return foreign("nothing"),
        Content::Unknown => return foreign("data that are no filesystem that blkid knows"),
    }
    if kind == Kind::Xfs {
        return Ok(());
    }
    let words = ["e2fsck", "-p", &path];
    let output = tools.run(&words, LONG).await?;
    match output.status {
        // e2fsck(8): bits of what was corrected.
        Some(0..=3) => Ok(()),
        Some(status) if status & 4 != 0 => {
            Err(FilesystemError::Damaged { device: path.to_string(), cause: output.failure(&words) })
        }
        _ => Err(output.failure(&words).into()),
    }
}

/// Mounts it at a path of the host.
///
/// # Errors
/// When `mount` fails.
pub async fn mount(
    tools: &impl Tools,
    device: &Device,
    kind: Kind,
    at: &Path,
    options: &[String],
) -> Result<(), FilesystemError> {
    let mut all: Vec<&str> = options.iter().map(String::as_str).collect();
    if kind == Kind::Xfs && !all.contains(&"nouuid") {
        // A clone or a copy has its source's UUID, and both may be mounted here.
        all.push("nouuid");
    }
    if all.is_empty() {
        all.push("defaults");
    }
    let (path, at, all) = (device.path().to_string_lossy(), at.to_string_lossy(), all.join(","));
    tools.succeed(&["mount", "-t", kind.name(), "-o", &all, &path, &at], QUICK).await?;
    Ok(())
}

/// Grows a mounted filesystem to the size of its device. Does nothing if it has that size.
///
/// # Errors
/// When the program fails.
pub async fn grow(tools: &impl Tools, device: &Device, kind: Kind, at: &Path) -> Result<(), FilesystemError> {
    let (path, at) = (device.path().to_string_lossy(), at.to_string_lossy());
    match kind {
        Kind::Ext4 => tools.succeed(&["resize2fs", &path], LONG).await?,
        Kind::Xfs => tools.succeed(&["xfs_growfs", "-d", &at], LONG).await?,
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures() {
        assert_eq!(signature("DEVNAME=/dev/zd0\nTYPE=ext4\n"), Content::Signed("ext4".into()));
        assert_eq!(signature("DEVNAME=/dev/zd0\nPTTYPE=gpt\n"), Content::Signed("a partition table (gpt)".into()));
        // Both, or neither although blkid found something: nobody knows.
        assert_eq!(signature("TYPE=vfat\nPTTYPE=dos\n"), Content::Unknown);
        assert_eq!(signature("DEVNAME=/dev/zd0\n"), Content::Unknown);
    }
}
