//! A host's mounts in memory, and its mountpoints on a real disk: what they are outlives every process.

use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use portolan_zfs::memory::Memory;
use rustix::mount::MountFlags;

use super::fate::Life;
use crate::block::kernel::{Kernel, Linux};

/// One node's.
#[derive(Debug)]
pub(super) struct Host {
    root: PathBuf,
    pool: Memory,
    binds: Mutex<Vec<Bind>>,
}

#[derive(Clone, Debug)]
struct Bind {
    source: String,
    target: PathBuf,
    readonly: bool,
}

impl Host {
    pub(super) fn new(root: PathBuf, pool: Memory) -> Arc<Self> {
        std::fs::create_dir_all(&root).unwrap();
        Arc::new(Self { root, pool, binds: Mutex::default() })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// All that is mounted: datasets, then what is bound.
    fn mounts(&self) -> Vec<Bind> {
        let contents = self.pool.contents().unwrap();
        let mounted = contents.iter().map(|contents| &contents.dataset).filter(|dataset| dataset.mounted);
        let at = |path: &Path| self.root.join(path.strip_prefix("/").unwrap());
        let datasets = mounted.filter_map(|dataset| {
            let target = at(dataset.mountpoint.as_deref()?);
            Some(Bind { source: dataset.name.to_string(), target, readonly: dataset.readonly })
        });
        datasets.chain(self.binds.lock().unwrap().clone()).collect()
    }

    fn at(&self, target: &Path) -> Option<Bind> {
        self.mounts().into_iter().rev().find(|mount| mount.target == target)
    }

    /// Mounts, and what is left of mountpoints and pods' directories.
    pub(super) fn draw(&self, text: &mut String, node: &str) {
        let short = |path: &Path| path.strip_prefix(&self.root).unwrap().display().to_string();
        for Bind { source, target, readonly } in self.mounts() {
            writeln!(text, "{node}: {source} is mounted at {} readonly={readonly}", short(&target)).unwrap();
        }
        for of in ["kubelet/plugins/portolan.dev/volumes", "pods"] {
            let Ok(found) = std::fs::read_dir(self.root.join(of)) else { continue };
            let mut found: Vec<String> = found.map(|entry| short(&entry.unwrap().path())).collect();
            found.sort();
            found.iter().for_each(|path| writeln!(text, "{node}: {path} is there").unwrap());
        }
    }

    /// Volumes that pods have: no bind mount may be of the host's own disk.
    pub(super) fn broken(&self) -> Vec<String> {
        let binds = self.binds.lock().unwrap();
        let wrong = binds.iter().filter(|bind| !bind.source.starts_with("tank/"));
        wrong.map(|bind| format!("{} is mounted at {}", bind.source, bind.target.display())).collect()
    }
}

/// What one process sees and does of it.
#[derive(Debug)]
pub(super) struct Seen(pub(super) Arc<Host>, pub(super) Arc<Life>);

impl Seen {
    fn effect<T>(&self, what: &str, path: &Path, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let path = path.strip_prefix(&self.0.root).unwrap_or(path);
        self.1.effect_now(&format!("{what} {}", path.display()), act)
    }
}

impl Kernel for Seen {
    fn table(&self) -> io::Result<String> {
        let mut text = String::new();
        for (number, Bind { source, target, readonly }) in self.0.mounts().into_iter().enumerate() {
            let options = if readonly { "ro" } else { "rw" };
            writeln!(text, "{number} 1 0:50 / {} {options} - zfs {source} rw", target.display()).unwrap();
        }
        Ok(text)
    }

    fn bind(&self, source: &Path, target: &Path, flags: MountFlags) -> io::Result<()> {
        self.effect("bind", target, || {
            if !target.is_dir() || !source.is_dir() {
                return Err(io::ErrorKind::NotFound.into());
            }
            let of = self.0.at(source).map_or_else(|| source.display().to_string(), |mount| mount.source);
            let readonly = flags.contains(MountFlags::RDONLY);
            self.0.binds.lock().unwrap().push(Bind { source: of, target: target.to_owned(), readonly });
            Ok(())
        })
    }

    fn unmount(&self, target: &Path) -> io::Result<()> {
        self.effect("unbind", target, || {
            let mut binds = self.0.binds.lock().unwrap();
            let found = binds.iter().rposition(|bind| bind.target == target);
            binds.remove(found.ok_or(io::ErrorKind::InvalidInput)?);
            Ok(())
        })
    }

    fn make_directory(&self, path: &Path) -> io::Result<()> {
        self.effect("make directory", path, || Linux.make_directory(path))
    }

    fn make_file(&self, path: &Path) -> io::Result<()> {
        self.effect("make file", path, || Linux.make_file(path))
    }

    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        self.effect("remove directory", path, || match self.0.at(path) {
            Some(_) => Err(io::ErrorKind::ResourceBusy.into()),
            None => Linux.remove_directory(path),
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.effect("remove file", path, || Linux.remove_file(path))
    }
}
