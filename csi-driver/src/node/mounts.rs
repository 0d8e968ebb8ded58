//! The host's mounts, as this process sees them below the host's root.
//!
//! That root is mounted here with propagation both ways, so our mount table has the host's mounts and the host gets ours.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};

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
}

/// Mounts at paths of the host.
#[derive(Clone, Debug)]
pub struct Mounts {
    host_root: PathBuf,
}

impl Mounts {
    /// The host's root is at `host_root` here.
    pub fn new(host_root: impl Into<PathBuf>) -> Self {
        Self { host_root: host_root.into() }
    }

    /// Where a path of the host is here.
    pub fn here(&self, path: &Path) -> PathBuf {
        self.host_root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The host's mounts (proc(5), `/proc/self/mountinfo`).
    pub fn table(&self) -> Result<Vec<Mount>, MountError> {
        let path = Path::new("/proc/self/mountinfo");
        let text = std::fs::read(path).map_err(failed("read", path))?;
        Ok(parse(&String::from_utf8_lossy(&text), &self.host_root))
    }

    /// The uppermost mount at `target`, if there is one.
    pub fn at(&self, target: &Path) -> Result<Option<Mount>, MountError> {
        Ok(self.table()?.into_iter().rev().find(|mount| mount.target == target))
    }

    /// Where `source` is mounted.
    pub fn of(&self, source: &str) -> Result<Vec<PathBuf>, MountError> {
        Ok(self.table()?.into_iter().filter(|mount| mount.source == source).map(|mount| mount.target).collect())
    }

    /// Makes a directory and its parents. Idempotent.
    pub fn make_directory(&self, path: &Path) -> Result<(), MountError> {
        let here = self.here(path);
        std::fs::create_dir_all(&here).map_err(failed("make directory", &here))
    }

    /// Removes an empty directory. Idempotent; never looks into it.
    pub fn remove_directory(&self, path: &Path) -> Result<(), MountError> {
        let here = self.here(path);
        match std::fs::remove_dir(&here) {
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

    /// Mounts `source`, a directory, at `target` too, with `flags`.
    pub fn bind(&self, source: &Path, target: &Path, flags: MountFlags) -> Result<(), MountError> {
        let (source, target) = (self.here(source), self.here(target));
        mount_bind(&source, &target).map_err(|e| failed("bind-mount", &target)(e.into()))?;
        if flags.is_empty() {
            return Ok(());
        }
        // A bind mount takes its flags only by a second call (mount(2)).
        mount_remount(&target, MountFlags::BIND | flags, "").map_err(|error| {
            let _ = unmount(&target, UnmountFlags::NOFOLLOW);
            failed("set the mount options of", &target)(error.into())
        })
    }

    /// Unmounts all that is mounted at `target`: never forced, never lazy. Idempotent.
    pub fn unmount(&self, target: &Path) -> Result<(), MountError> {
        let here = self.here(target);
        while self.at(target)?.is_some() {
            unmount(&here, UnmountFlags::NOFOLLOW).map_err(|e| failed("unmount", &here)(e.into()))?;
        }
        Ok(())
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MountError {
    let path = path.to_owned();
    move |source| MountError { operation, path, source }
}

fn parse(text: &str, host_root: &Path) -> Vec<Mount> {
    text.lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut left = left.split(' ').skip(4);
            let (target, options) = (unescape(left.next()?), left.next()?);
            let source = unescape(right.split(' ').nth(1)?);
            let target = Path::new("/").join(Path::new(&target).strip_prefix(host_root).ok()?);
            Some(Mount { target, source, readonly: options.split(',').any(|option| option == "ro") })
        })
        .collect()
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
broken line
";

    #[test]
    fn the_table_is_the_hosts() {
        let mounts = parse(TABLE, Path::new("/host"));
        let targets: Vec<_> = mounts.iter().map(|mount| mount.target.to_str().unwrap()).collect();
        assert_eq!(targets, ["/", "/var/lib/kubelet/plugins/portolan.dev/volumes/pvc-1", "/pods/with blank"]);
        assert_eq!(mounts[1].source, "portolan/pvc-1");
        assert_eq!(mounts.iter().map(|mount| mount.readonly).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(parse(TABLE, Path::new("/")).len(), 5);
    }

    #[test]
    fn host_paths() {
        assert_eq!(Mounts::new("/host").here(Path::new("/var/x")), Path::new("/host/var/x"));
        assert_eq!(Mounts::new("/").here(Path::new("/var/x")), Path::new("/var/x"));
    }
}
