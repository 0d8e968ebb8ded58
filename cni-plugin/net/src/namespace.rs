//! Network namespaces: opening by a path of the host, making, removing, and doing something inside one.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    thread,
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    mount::{UnmountFlags, mount_bind, unmount},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

use crate::error::{Error, Result};

/// `f_type` of a namespace's file (linux/magic.h, `NSFS_MAGIC`).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// An open network namespace.
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
    path: PathBuf,
}

impl Namespace {
    /// Opens the namespace that the host knows by `path`; `root` is where the host's root directory is seen.
    ///
    /// Symbolic links are followed as the host would (`/var/run` is often one to `/run`).
    ///
    /// # Errors
    /// When the path isn't there or isn't a namespace; [`Error::Namespace`]'s source then says which.
    pub fn open(root: &Path, path: &Path) -> Result<Self> {
        let fail = |source: io::Error| Error::Namespace { path: path.to_owned(), action: "open", source };
        let fd = open_in_root(root, path).map_err(fail)?;
        let found = rustix::fs::fstatfs(&fd).map_err(|e| fail(e.into()))?;
        if found.f_type != NSFS_MAGIC {
            return Err(Error::NotANamespace { path: path.to_owned() });
        }
        Ok(Self { fd, path: path.to_owned() })
    }

    /// The namespace of this process.
    ///
    /// # Errors
    /// When `/proc` isn't mounted.
    pub fn own() -> Result<Self> {
        Self::open(Path::new("/"), Path::new("/proc/thread-self/ns/net"))
    }

    /// Whether the namespace is gone for certain. One that merely can't be looked at is not.
    pub fn is_gone(root: &Path, path: &Path) -> bool {
        match Self::open(root, path) {
            Ok(_) => false,
            Err(Error::NotANamespace { .. }) => true,
            Err(Error::Namespace { source, .. }) => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
            }
            Err(_) => false,
        }
    }

    /// Opens the namespace, making it if it isn't there: a file with a namespace mounted on it, as `ip netns add` does.
    ///
    /// # Errors
    /// When it can't be made.
    pub(crate) fn ensure(root: &Path, path: &Path) -> Result<Self> {
        if !Self::is_gone(root, path) {
            return Self::open(root, path);
        }
        let fail = |action, source| Error::Namespace { path: path.to_owned(), action, source };
        let target = within(root, path);
        if let Some(directory) = target.parent() {
            std::fs::create_dir_all(directory).map_err(|e| fail("make the directory of", e))?;
        }
        std::fs::OpenOptions::new().create(true).append(true).open(&target).map_err(|e| fail("make the file of", e))?;
        in_thread(|| {
            // SAFETY: only CLONE_NEWNET; file descriptors stay shared with the other threads.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            mount_bind("/proc/thread-self/ns/net", &target)?;
            Ok(())
        })
        .map_err(|e| fail("make", e))?;
        Self::open(root, path)
    }

    /// Takes the namespace's name away. What is still open in it keeps it alive, so links are removed first.
    ///
    /// # Errors
    /// When it is there and can't be removed.
    pub(crate) fn remove(root: &Path, path: &Path) -> Result<()> {
        let target = within(root, path);
        let fail = |action, source| Error::Namespace { path: path.to_owned(), action, source };
        // EINVAL: nothing is mounted there any more.
        match unmount(&target, UnmountFlags::DETACH) {
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(e) => return Err(fail("unmount", e.into())),
        }
        match std::fs::remove_file(&target) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(fail("remove", e)),
            _ => Ok(()),
        }
    }

    /// Runs `work` on a thread of its own inside the namespace. Sockets opened there belong to it for good.
    ///
    /// # Errors
    /// When the namespace can't be entered, or what `work` returns.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> Result<T> {
        in_thread(|| {
            move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        })
        .map_err(|source| Error::Namespace { path: self.path.clone(), action: "work in", source })
    }

    /// The same namespace, once more.
    ///
    /// # Errors
    /// When there are too many open files.
    pub(crate) fn again(&self) -> Result<Self> {
        let fail = |source| Error::Namespace { path: self.path.clone(), action: "open", source };
        Ok(Self { fd: self.fd.try_clone().map_err(fail)?, path: self.path.clone() })
    }

    /// The namespace's path, as the host sees it.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Namespace {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A path of the host as this process sees it. Only for paths without symbolic links.
pub(crate) fn within(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn open_in_root(root: &Path, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    // RESOLVE_IN_ROOT refuses the magic links of /proc (openat2(2)); they lead out of the root anyway.
    if path.starts_with("/proc") {
        return Ok(rustix::fs::open(within(root, path), flags, Mode::empty())?);
    }
    let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?)
}

/// Runs `work` on a thread that ends with it: a changed namespace never comes back to a pool of threads.
fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, work)?
            .join()
            .map_err(|_| io::Error::other("the thread in the namespace panicked"))?
    })
}
