//! The host's mounts, as this process sees them below the host's root.
//!
//! That root is mounted here with propagation both ways, so our mount table has the host's mounts and the host gets ours.

use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::mount::MountFlags;

use super::kernel::{Kernel, Linux};

/// A mount operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("can't {operation} {}", path.display())]
pub struct MountError {
    operation: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// One line of the mount table.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Mount {
    /// Where, as the host sees it.
    pub target: PathBuf,
    /// What: a dataset's name for ZFS.
    pub source: String,
    /// Whether this mount is read-only.
    pub readonly: bool,
    /// The filesystem's type.
    pub kind: String,
    /// What of the filesystem is seen here: `/` is all of it, a bind mount of one file is that file.
    pub root: PathBuf,
    /// The filesystem's number: that of its block device if it is on one.
    pub number: DeviceNumber,
}

/// The number of a block device, or of a filesystem that has none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DeviceNumber {
    /// The driver.
    pub major: u32,
    /// Which of the driver's devices.
    pub minor: u32,
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The number of the block device whose node is at `path`, which is not followed; none if something else is there, or nothing.
pub(super) fn number_at(path: &Path) -> io::Result<Option<DeviceNumber>> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
        Ok(found) if found.file_type().is_block_device() => {
            let number = found.rdev();
            Ok(Some(DeviceNumber { major: rustix::fs::major(number), minor: rustix::fs::minor(number) }))
        }
        Ok(_) => Ok(None),
    }
}

/// Mounts at paths of the host.
#[derive(Clone, Debug)]
pub struct Mounts {
    host_root: PathBuf,
    kernel: Arc<dyn Kernel>,
}

impl Mounts {
    /// The host's root is at `host_root` here.
    pub fn new(host_root: impl Into<PathBuf>) -> Self {
        Self { host_root: host_root.into(), kernel: Arc::new(Linux) }
    }

    /// With another kernel than the real one.
    #[cfg(test)]
    pub(crate) fn with_kernel(host_root: impl Into<PathBuf>, kernel: Arc<dyn Kernel>) -> Self {
        Self { host_root: host_root.into(), kernel }
    }

    /// Where a path of the host is here.
    pub fn here(&self, path: &Path) -> PathBuf {
        self.host_root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The host's mounts (proc(5), `/proc/thread-self/mountinfo`).
    pub fn table(&self) -> Result<Vec<Mount>, MountError> {
        let text = self.kernel.table().map_err(failed("read the mount table of", &self.host_root))?;
        Ok(parse(&text, &self.host_root))
    }

    /// The uppermost mount at `target`, if there is one.
    pub fn at(&self, target: &Path) -> Result<Option<Mount>, MountError> {
        Ok(self.table()?.into_iter().rev().find(|mount| mount.target == target))
    }

    /// Where `source` is mounted.
    pub fn of(&self, source: &str) -> Result<Vec<PathBuf>, MountError> {
        Ok(self.table()?.into_iter().filter(|mount| mount.source == source).map(|mount| mount.target).collect())
    }

    /// Where a block device is mounted, and where its node is bind-mounted.
    pub fn of_device(&self, number: DeviceNumber) -> Result<Vec<PathBuf>, MountError> {
        let of = |mount: &Mount| mount.number == number || self.node_at(mount) == Some(number);
        Ok(self.table()?.into_iter().filter(of).map(|mount| mount.target).collect())
    }

    /// The block device whose node a mount is.
    pub fn node_at(&self, mount: &Mount) -> Option<DeviceNumber> {
        // To look at a mount of something else may take for ever.
        let candidate = mount.root != Path::new("/") && matches!(mount.kind.as_str(), "devtmpfs" | "tmpfs");
        let found = candidate.then(|| number_at(&self.here(&mount.target)));
        found.and_then(Result::ok).flatten()
    }

    /// Makes an empty file, and its parents, on which a device's node can be mounted. Idempotent.
    pub fn make_file(&self, path: &Path) -> Result<(), MountError> {
        if let Some(parent) = path.parent() {
            self.make_directory(parent)?;
        }
        let here = self.here(path);
        match self.kernel.make_file(&here) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("make file", &here)(error)),
            _ => Ok(()),
        }
    }

    /// Removes what [`make_file`](Self::make_file) or [`make_directory`](Self::make_directory) has made, if it is still empty. Idempotent.
    pub fn remove_target(&self, path: &Path) -> Result<(), MountError> {
        let here = self.here(path);
        match std::fs::symlink_metadata(&here) {
            Ok(found) if found.is_file() && found.len() == 0 => {
                self.kernel.remove_file(&here).map_err(failed("remove file", &here))
            }
            Ok(found) if found.is_file() => {
                Err(failed("remove file", &here)(io::Error::other("it is not empty: it is no target of a volume")))
            }
            _ => self.remove_directory(path),
        }
    }

    /// Makes a directory and its parents. Idempotent.
    pub fn make_directory(&self, path: &Path) -> Result<(), MountError> {
        let here = self.here(path);
        self.kernel.make_directory(&here).map_err(failed("make directory", &here))
    }

    /// Removes an empty directory. Idempotent; never looks into it.
    pub fn remove_directory(&self, path: &Path) -> Result<(), MountError> {
        let here = self.here(path);
        match self.kernel.remove_directory(&here) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove directory", &here)(error)),
            _ => Ok(()),
        }
    }

    /// The directories in `path`, of which nothing is looked into; none if it isn't there.
    pub fn directories(&self, path: &Path) -> Result<Vec<PathBuf>, MountError> {
        let here = self.here(path);
        let entries = match std::fs::read_dir(&here) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed("read directory", &here))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("read directory", &here))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(path.join(entry.file_name()));
            }
        }
        Ok(found)
    }

    /// Whether there is nothing in a directory.
    pub fn is_empty(&self, path: &Path) -> Result<bool, MountError> {
        let here = self.here(path);
        Ok(std::fs::read_dir(&here).map_err(failed("read directory", &here))?.next().is_none())
    }

    /// Mounts `source`, a directory or a device's node, at `target` too, with `flags`.
    pub fn bind(&self, source: &Path, target: &Path, flags: MountFlags) -> Result<(), MountError> {
        let (source, target) = (self.here(source), self.here(target));
        self.kernel.bind(&source, &target, flags).map_err(failed("bind-mount", &target))
    }

    /// Unmounts all that is mounted at `target`: never forced, never lazy. Idempotent.
    pub fn unmount(&self, target: &Path) -> Result<(), MountError> {
        let here = self.here(target);
        while self.at(target)?.is_some() {
            self.kernel.unmount(&here).map_err(failed("unmount", &here))?;
        }
        Ok(())
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MountError {
    let path = path.to_owned();
    move |source| MountError { operation, path, source }
}

fn parse(text: &str, host_root: &Path) -> Vec<Mount> {
    text.lines().filter_map(|line| parse_line(line, host_root)).collect()
}

/// `36 35 98:0 /root /target options optional... - type source options` (proc(5)).
fn parse_line(line: &str, host_root: &Path) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(2);
    let (major, minor) = left.next()?.split_once(':')?;
    let (root, target, options) = (left.next()?, left.next()?, left.next()?);
    let mut right = right.split(' ');
    let (kind, source) = (right.next()?, right.next()?);
    Some(Mount {
        target: Path::new("/").join(Path::new(&unescape(target)).strip_prefix(host_root).ok()?),
        source: unescape(source),
        readonly: options.split(',').any(|option| option == "ro"),
        kind: kind.to_owned(),
        root: unescape(root).into(),
        number: DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? },
    })
}

/// Blanks and backslashes are written as three octal digits (proc(5)).
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (escaped, plain)| text.replace(escaped, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
36 35 98:0 / / rw,noatime master:1 - ext3 /dev/root rw,errors=continue
40 36 0:50 / /host rw,relatime shared:1 - ext4 /dev/sda rw
41 40 0:51 / /host/var/lib/kubelet/plugins/portolan.dev/volumes/pvc-1 rw shared:7 - fuse.zfs portolan/pvc-1 rw
42 40 0:51 / /host/pods/with\\040blank ro,relatime shared:7 - zfs portolan/pvc-1 rw
43 36 0:52 / /hosts rw - tmpfs tmpfs rw
44 40 0:6 /zd16 /host/pods/block rw shared:2 - devtmpfs udev rw
broken line
";

    #[test]
    fn the_table_is_the_hosts() {
        let mounts = parse(TABLE, Path::new("/host"));
        let targets: Vec<_> = mounts.iter().map(|mount| mount.target.to_str().unwrap()).collect();
        assert_eq!(
            targets,
            ["/", "/var/lib/kubelet/plugins/portolan.dev/volumes/pvc-1", "/pods/with blank", "/pods/block"]
        );
        assert_eq!(mounts[1].source, "portolan/pvc-1");
        assert_eq!(mounts.iter().map(|mount| mount.readonly).collect::<Vec<_>>(), [false, false, true, false]);
        assert_eq!((mounts[1].number.to_string().as_str(), mounts[1].kind.as_str()), ("0:51", "fuse.zfs"));
        assert_eq!(mounts.iter().map(|mount| mount.root.to_str().unwrap()).collect::<String>(), "////zd16");
        assert_eq!(parse(TABLE, Path::new("/")).len(), 6);
    }

    #[test]
    fn only_what_is_empty_is_removed() {
        let folder = std::env::temp_dir().join(format!("portolan-mounts-{}", std::process::id()));
        let mounts = Mounts::new(&folder);
        let target = Path::new("/a/target");
        mounts.make_file(target).unwrap();
        mounts.make_file(target).unwrap();
        mounts.remove_target(target).unwrap();
        mounts.remove_target(target).unwrap();
        mounts.make_file(target).unwrap();
        std::fs::write(mounts.here(target), "data").unwrap();
        assert!(mounts.remove_target(target).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn host_paths() {
        assert_eq!(Mounts::new("/host").here(Path::new("/var/x")), Path::new("/host/var/x"));
        assert_eq!(Mounts::new("/").here(Path::new("/var/x")), Path::new("/var/x"));
    }
}
