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
    written: Option<(u64, Instant)>,
}

impl Keeper {
    pub fn new(path: PathBuf) -> Self {
        Self { path, written: None }
    }

    /// Writes a snapshot if it is another one than before. Returns whether it is up to a later call, as one was written just now.
    pub fn keep(&mut self, snapshot: &Snapshot) -> Result<bool, SnapshotError> {
        if self.written.is_some_and(|(_, at)| at.elapsed() < INTERVAL) {
            return Ok(true);
        }
        let fail = |source| SnapshotError { path: self.path.clone(), source };
        let bytes = serde_json::to_vec(snapshot).map_err(io::Error::from).map_err(fail)?;
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        let hash = hasher.finish();
        if self.written.is_none_or(|(before, _)| before != hash) {
            replace(&self.path, &bytes, MODE).map_err(fail)?;
            self.written = Some((hash, Instant::now()));
        }
        Ok(false)
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
        assert!(!keeper.keep(&snapshot()).unwrap());
        assert!(keeper.keep(&Snapshot::default()).unwrap());
        assert_eq!(Snapshot::read(&path), snapshot(), "too soon");
        keeper.written = keeper.written.map(|(hash, at)| (hash, at.checked_sub(INTERVAL).unwrap()));
        assert!(!keeper.keep(&Snapshot::default()).unwrap());
        assert_eq!(Snapshot::read(&path), Snapshot::default());
    }
}
