//! What the DNS servers answered last: an agent that starts answers from it until it has heard everything from the API server.

use std::{
    collections::hash_map::DefaultHasher,
    fs,
    hash::{Hash, Hasher},
    io::{self, Write},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use portolan_dns::NetworkZone;
use serde::{Deserialize, Serialize};

/// How often it is written at most: a large zone changes with each pod of the cluster.
const INTERVAL: Duration = Duration::from_secs(5);
/// How many times as long as it took to write one passes at least until the next.
const SELDOM: u32 = 50;
/// Who may read it: names are no secret on the node.
const MODE: u32 = 0o644;

/// All names of this node's networks, and where the others are asked for.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Snapshot {
    /// The cluster's DNS servers.
    pub upstream: Vec<SocketAddr>,
    /// The networks.
    pub zones: Vec<NetworkZone>,
}

/// The snapshot can't be written.
#[derive(Debug, thiserror::Error)]
#[error("names {path}: write: {source}")]
pub struct SnapshotError {
    path: PathBuf,
    source: io::Error,
}

impl Snapshot {
    /// What was written last; nothing if there is none that can be read, as it is only good until the API server answers.
    pub fn read(path: &Path) -> Self {
        let parsed = fs::read(path).and_then(|bytes| serde_json::from_slice(&bytes).map_err(Into::into));
        parsed.unwrap_or_else(|error: io::Error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), %error, "the names that were known last can't be read");
            }
            Self::default()
        })
    }

    /// Replaces what was written last; a reader sees the one or the other, whole.
    ///
    /// # Errors
    /// When it can't be written; then the old one stays.
    pub fn write(&self, path: &Path) -> Result<(), SnapshotError> {
        let bytes = serde_json::to_vec(self).map_err(io::Error::from);
        bytes
            .and_then(|bytes| replace(path, &bytes, MODE))
            .map_err(|source| SnapshotError { path: path.to_owned(), source })
    }
}

/// Replaces a file, durably and at once; who may read it is what `mode` says from the beginning.
pub(crate) fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let temporary = path.with_extension("new");
    // One that was left over may have another mode.
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    fs::File::open(directory)?.sync_all()
}

/// Writes snapshots, and only those that are new.
pub(crate) struct Keeper {
    path: PathBuf,
    written: Option<Written>,
}

/// What was written last.
struct Written {
    hash: u64,
    at: Instant,
    took: Duration,
}

impl Keeper {
    pub fn new(path: PathBuf) -> Self {
        Self { path, written: None }
    }

    /// How long it is until one may be written again: large ones take long, and are written the more seldom.
    pub fn due_in(&self) -> Duration {
        let of = |it: &Written| INTERVAL.max(it.took * SELDOM).saturating_sub(it.at.elapsed());
        self.written.as_ref().map_or(Duration::ZERO, of)
    }

    /// Writes a snapshot if it is another one than before.
    pub fn keep(&mut self, snapshot: &Snapshot) -> Result<(), SnapshotError> {
        let at = Instant::now();
        let fail = |source| SnapshotError { path: self.path.clone(), source };
        let bytes = serde_json::to_vec(snapshot).map_err(io::Error::from).map_err(fail)?;
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        let hash = hasher.finish();
        if self.written.as_ref().is_none_or(|before| before.hash != hash) {
            replace(&self.path, &bytes, MODE).map_err(fail)?;
            self.written = Some(Written { hash, at, took: at.elapsed() });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        let zone = NetworkZone {
            name: "backend".into(),
            subnets: vec!["10.32.0.0/16".parse().unwrap()],
            ..NetworkZone::default()
        };
        Snapshot { upstream: vec!["10.96.0.10:53".parse().unwrap()], zones: vec![zone] }
    }

    #[test]
    fn survives_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("network/names.json");
        assert_eq!(Snapshot::read(&path), Snapshot::default());
        snapshot().write(&path).unwrap();
        // Killed while it wrote.
        fs::write(path.with_extension("new"), "{\"ups").unwrap();
        assert_eq!(Snapshot::read(&path), snapshot());
        snapshot().write(&path).unwrap();
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_broken_one_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("names.json");
        fs::write(&path, "{").unwrap();
        assert_eq!(Snapshot::read(&path), Snapshot::default());
    }

    #[test]
    fn is_written_when_it_changes_and_not_all_the_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("names.json");
        let mut keeper = Keeper::new(path.clone());
        assert!(keeper.due_in().is_zero());
        keeper.keep(&snapshot()).unwrap();
        assert!(!keeper.due_in().is_zero(), "too soon");
        assert_eq!(Snapshot::read(&path), snapshot());
        let earlier = |keeper: &mut Keeper, time| {
            let written = keeper.written.take().unwrap();
            keeper.written = Some(Written { at: written.at.checked_sub(time).unwrap(), ..written });
        };
        earlier(&mut keeper, INTERVAL);
        assert!(keeper.due_in().is_zero());
        keeper.keep(&Snapshot::default()).unwrap();
        assert_eq!(Snapshot::read(&path), Snapshot::default());
        // One that takes long.
        keeper.written.as_mut().unwrap().took = INTERVAL;
        earlier(&mut keeper, INTERVAL * (SELDOM - 1));
        assert!(!keeper.due_in().is_zero());
        earlier(&mut keeper, INTERVAL);
        assert!(keeper.due_in().is_zero());
    }
}
