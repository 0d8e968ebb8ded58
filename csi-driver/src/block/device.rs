//! The block device of a zvol: whether it is there, what it holds, and whether anybody can write to it.
//!
//! What the kernel says about writers (OpenZFS 2.3.2, `zvol_first_open`, `zvol_setup_zv` and `zvol_request_impl`): a zvol reads its property `readonly` when
//! it is opened and nobody else has it open (a newer OpenZFS also when the property is set). It then shows as a read-only device (`BLKROGET`),
//! and refuses every write, whoever asks. So `zfs set readonly=on` alone stops nobody who has the device open; but a device that is
//! read-only after it has been opened can't be written, and one that isn't has been open since before. Nothing here sets that flag by
//! hand (`BLKROSET`): it would no longer prove anything.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, Mode, OFlags};
use rustix::ioctl::{Getter, Opcode, ioctl, opcode};

use super::mounts::{DeviceNumber, Mounts, number_at};

/// `BLKROGET` (linux/fs.h).
const BLKROGET: Opcode = opcode::none(0x12, 94);
/// Pause between two looks at a device that isn't as it should be yet.
const PAUSE: Duration = Duration::from_millis(50);
/// How much of a device's beginning and of its end is read to see whether it is blank: where filesystems, partition tables, RAID and volume
/// managers have their signatures.
const EDGE: u64 = 1 << 20;

/// What is wrong with a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// It isn't there.
    #[error(
        "there is no block device {}: does udev run on this node, with the rules of OpenZFS, and is the volume's property volmode `default`?",
        .0.display()
    )]
    Missing(PathBuf),
    /// It can't be written although it should.
    #[error("block device {} is still read-only: something has had it open since before the volume became writable", .0.display())]
    StillReadOnly(PathBuf),
    /// It may be written although it should not.
    #[error("block device {} can still be written: something has had it open since before the volume became read-only", .0.display())]
    StillWritable(PathBuf),
    /// Somebody has it for himself.
    #[error("block device {} is mounted or in use", .0.display())]
    Held(PathBuf),
    /// Something else is where it should be.
    #[error("{} is not a block device", .0.display())]
    Odd(PathBuf),
    /// The kernel says no.
    #[error("can't {operation} block device {}: {source}", path.display())]
    Io {
        /// What was to be done.
        operation: &'static str,
        /// To which device.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A block device of the host.
#[derive(Clone, Debug)]
pub struct Device {
    path: PathBuf,
    here: PathBuf,
    number: DeviceNumber,
}

impl Device {
    /// The device that is at `path` on the host, or that a link there points to; none if there is none.
    ///
    /// # Errors
    /// When something else is there, or it can't be looked at.
    pub fn find(mounts: &Mounts, path: &Path) -> Result<Option<Self>, DeviceError> {
        let failed = |source| DeviceError::Io { operation: "find", path: path.to_owned(), source };
        let path = match std::fs::read_link(mounts.here(path)) {
            // The link is the host's: what is absolute in it begins at the host's root.
            Ok(to) => plain(&path.parent().unwrap_or(Path::new("/")).join(to)),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => path.to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let here = mounts.here(&path);
        match number_at(&here).map_err(failed)? {
            Some(number) => Ok(Some(Self { path, here, number })),
            None if here.exists() => Err(DeviceError::Odd(path)),
            None => Ok(None),
        }
    }

    /// Waits until the device is there and can be written. udev makes its link some time after ZFS has made the volume, and what looks
    /// at new devices, udev for one, may have it open from when it was read-only.
    ///
    /// # Errors
    /// When it isn't so `within` that time.
    pub async fn wait_writable(mounts: &Mounts, path: &Path, within: Duration) -> Result<Self, DeviceError> {
        let (mounts, path) = (mounts.clone(), path.to_owned());
        until(within, move || match Self::find(&mounts, &path)? {
            None => Err(DeviceError::Missing(path.clone())),
            Some(device) if device.is_readonly(OFlags::empty())? => Err(DeviceError::StillReadOnly(device.path)),
            Some(device) => Ok(device),
        })
        .await
    }

    /// Makes sure that nobody can write to the device at `path`, after its volume has been made read-only.
    ///
    /// # Errors
    /// When that can't be proved `within` that time: the device isn't there, it is mounted, or somebody has had it open since before.
    pub async fn check_unwritable(mounts: &Mounts, path: &Path, within: Duration) -> Result<(), DeviceError> {
        let (mounts, path) = (mounts.clone(), path.to_owned());
        until(within, move || match Self::find(&mounts, &path)? {
            None => Err(DeviceError::Missing(path.clone())),
            Some(device) if device.is_readonly(OFlags::EXCL)? => Ok(()),
            Some(device) => Err(DeviceError::StillWritable(device.path)),
        })
        .await
    }

    /// Where it is on the host: `/dev/zd16`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its number.
    pub fn number(&self) -> DeviceNumber {
        self.number
    }

    /// Its size in bytes.
    ///
    /// # Errors
    /// When it can't be opened.
    pub async fn size(&self) -> Result<u64, DeviceError> {
        let this = self.clone();
        blocking(move || this.open(OFlags::empty())?.seek(SeekFrom::End(0)).map_err(this.failed("measure"))).await
    }

    /// Whether it begins and ends with nothing but zeros, by what is on it now, not in the kernel's cache.
    ///
    /// # Errors
    /// When it is in use or can't be read.
    pub async fn is_blank(&self) -> Result<bool, DeviceError> {
        let this = self.clone();
        blocking(move || this.has_blank_edges()).await
    }

    fn has_blank_edges(&self) -> Result<bool, DeviceError> {
        let mut device = self.open(OFlags::EXCL)?;
        rustix::fs::fadvise(&device, 0, None, Advice::DontNeed).map_err(|e| self.failed("read")(e.into()))?;
        let size = device.seek(SeekFrom::End(0)).map_err(self.failed("measure"))?;
        let mut bytes = Vec::new();
        for start in [0, size.saturating_sub(EDGE)] {
            device.seek(SeekFrom::Start(start)).map_err(self.failed("read"))?;
            (&mut device).take(EDGE).read_to_end(&mut bytes).map_err(self.failed("read"))?;
        }
        Ok(size > 0 && bytes.iter().all(|byte| *byte == 0))
    }

    fn is_readonly(&self, flags: OFlags) -> Result<bool, DeviceError> {
        let device = self.open(flags)?;
        // SAFETY: BLKROGET writes one int to where it is told.
        let readonly = unsafe { ioctl(&device, Getter::<BLKROGET, i32>::new()) };
        Ok(readonly.map_err(|error| self.failed("look at")(error.into()))? != 0)
    }

    fn open(&self, flags: OFlags) -> Result<std::fs::File, DeviceError> {
        let all = OFlags::RDONLY | OFlags::CLOEXEC | flags;
        match rustix::fs::open(&self.here, all, Mode::empty()) {
            Ok(device) => Ok(device.into()),
            Err(rustix::io::Errno::BUSY) => Err(DeviceError::Held(self.path.clone())),
            // Its volume was destroyed between the look and this.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NXIO) => Err(DeviceError::Missing(self.path.clone())),
            Err(error) => Err(self.failed("open")(error.into())),
        }
    }

    fn failed(&self, operation: &'static str) -> impl FnOnce(io::Error) -> DeviceError {
        let path = self.path.clone();
        move |source| DeviceError::Io { operation, path, source }
    }
}

/// Asks again until the answer is good or the time is over.
async fn until<T: Send + 'static>(
    within: Duration,
    look: impl Fn() -> Result<T, DeviceError> + Clone + Send + 'static,
) -> Result<T, DeviceError> {
    let begin = Instant::now();
    loop {
        match blocking(look.clone()).await {
            Err(error) if begin.elapsed() >= within || matches!(error, DeviceError::Odd(_)) => return Err(error),
            Err(_) => tokio::time::sleep(PAUSE).await,
            good => return good,
        }
    }
}

/// Does it where it may wait for a disk.
async fn blocking<T: Send + 'static>(
    act: impl FnOnce() -> Result<T, DeviceError> + Send + 'static,
) -> Result<T, DeviceError> {
    let ended = |error: tokio::task::JoinError| DeviceError::Io {
        operation: "look at",
        path: PathBuf::new(),
        source: io::Error::other(error),
    };
    tokio::task::spawn_blocking(act).await.map_err(ended)?
}

/// A path without `..`: udev's links have no other links on their way.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_the_hosts() {
        assert_eq!(plain(Path::new("/dev/zvol/tank/../../zd16")), Path::new("/dev/zd16"));
        let folder = std::env::temp_dir().join(format!("portolan-device-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("dev/zvol")).unwrap();
        let mounts = Mounts::new(&folder);
        let at = |path: &str| Device::find(&mounts, Path::new(path));
        assert!(at("/dev/zvol/a").unwrap().is_none());
        // There is a /dev/null here, and none below that root.
        std::os::unix::fs::symlink("/dev/null", folder.join("dev/zvol/a")).unwrap();
        assert!(at("/dev/zvol/a").unwrap().is_none());
        std::fs::write(folder.join("dev/null"), "").unwrap();
        assert!(matches!(at("/dev/zvol/a"), Err(DeviceError::Odd(path)) if path == Path::new("/dev/null")));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
