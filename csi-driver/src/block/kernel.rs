//! What a node's agent asks of the kernel to change mounts, mountpoints and targets: one call for each change, so that tests can end the
//! agent between any two.

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};

/// The kernel, or what stands for it in a test. All paths are as this process sees them.
pub trait Kernel: fmt::Debug + Send + Sync {
    /// The text of the mount table (proc(5), `/proc/thread-self/mountinfo`).
    fn table(&self) -> io::Result<String>;

    /// Mounts `source` at `target` too, with `flags`: none of it is seen before they are set.
    fn bind(&self, source: &Path, target: &Path, flags: MountFlags) -> io::Result<()>;

    /// Unmounts the uppermost mount at `target`: never forced, never lazy.
    fn unmount(&self, target: &Path) -> io::Result<()>;

    /// Makes a directory and its parents. Idempotent.
    fn make_directory(&self, path: &Path) -> io::Result<()>;

    /// Makes an empty file; `AlreadyExists` if there is one.
    fn make_file(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    fn remove_directory(&self, path: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
}

/// The kernel that this process runs on.
#[derive(Debug)]
pub struct Linux;

impl Kernel for Linux {
    fn table(&self) -> io::Result<String> {
        std::fs::read("/proc/thread-self/mountinfo").map(|text| String::from_utf8_lossy(&text).into_owned())
    }

    /// What propagates to the host is the mount as it is when it is attached, and not what becomes of ours later (mount_namespaces(7)): so
    /// the flags are set before.
    fn bind(&self, source: &Path, target: &Path, flags: MountFlags) -> io::Result<()> {
        let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, source, clone)?;
        set_flags(&tree, flags)?;
        Ok(move_mount(tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
    }

    fn unmount(&self, target: &Path) -> io::Result<()> {
        Ok(unmount(target, UnmountFlags::NOFOLLOW)?)
    }

    fn make_directory(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)
    }

    fn make_file(&self, path: &Path) -> io::Result<()> {
        OpenOptions::new().write(true).create_new(true).open(path).map(drop)
    }

    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir(path)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }
}

/// Sets a detached mount's flags (mount_setattr(2), Linux 5.12).
fn set_flags(tree: &OwnedFd, flags: MountFlags) -> io::Result<()> {
    let set = [
        (MountFlags::RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MountFlags::NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MountFlags::NODEV, libc::MOUNT_ATTR_NODEV),
        (MountFlags::NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (MountFlags::NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
        (MountFlags::NOATIME, libc::MOUNT_ATTR_NOATIME),
        (MountFlags::STRICTATIME, libc::MOUNT_ATTR_STRICTATIME),
    ];
    let chosen = set.iter().filter(|(flag, _)| flags.contains(*flag));
    let attr_set = chosen.fold(0, |all, (_, attribute)| all | attribute);
    let atime = flags.intersects(MountFlags::NOATIME | MountFlags::STRICTATIME | MountFlags::RELATIME);
    let attr_clr = if atime { libc::MOUNT_ATTR__ATIME } else { 0 };
    let attributes = libc::mount_attr { attr_set, attr_clr, propagation: 0, userns_fd: 0 };
    // SAFETY: the empty path is a C string and `attributes` a mount_attr of the length given; the call only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
