//! What is so on this node, on disk: one file a thing, which is there wholly or not at all whenever the agent is killed.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Serialize, de::DeserializeOwned};

/// A journal can't be read or written.
#[derive(Debug, thiserror::Error)]
#[error("journal {path}: {action}: {source}")]
pub struct JournalError {
    path: PathBuf,
    action: &'static str,
    source: io::Error,
}

impl JournalError {
    pub(crate) fn new(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self { path: path.to_owned(), action, source }
    }
}

/// Something that is kept.
pub(crate) trait Kept: Clone + DeserializeOwned + Serialize {
    /// What it is known by: a part of a file's name.
    fn id(&self) -> String;
}

/// All things of a kind.
#[derive(Debug)]
pub(crate) struct Store<T> {
    directory: PathBuf,
    all: Mutex<BTreeMap<String, T>>,
}

impl<T: Kept> Store<T> {
    /// Reads a directory, which is made if it isn't there. A file that is none of the kind is an error: it is never taken for nothing.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, JournalError> {
        let directory = directory.into();
        let fail = JournalError::new;
        fs::create_dir_all(&directory).map_err(|e| fail(&directory, "make directory", e))?;
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(&directory).map_err(|e| fail(&directory, "list", e))? {
            let path = entry.map_err(|e| fail(&directory, "list", e))?.path();
            if path.extension().is_none_or(|e| e != "json") {
                // Left by a writer that was killed: it was never kept.
                fs::remove_file(&path).map_err(|e| fail(&path, "remove", e))?;
                continue;
            }
            let bytes = fs::read(&path).map_err(|e| fail(&path, "read", e))?;
            let thing: T = serde_json::from_slice(&bytes).map_err(|e| fail(&path, "read", e.into()))?;
            all.insert(thing.id(), thing);
        }
        Ok(Self { directory, all: Mutex::new(all) })
    }

    /// Adds or replaces one; it is on disk when this returns. If it can't be written it isn't kept.
    pub fn put(&self, thing: T) -> Result<(), JournalError> {
        let path = self.path(&thing.id());
        let temporary = path.with_extension("new");
        let write = || {
            let mut file = fs::File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(&thing)?)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            fs::File::open(&self.directory)?.sync_all()
        };
        write().map_err(|source| JournalError::new(&path, "write", source))?;
        self.lock().insert(thing.id(), thing);
        Ok(())
    }

    /// Forgets one, and returns it if it was there. If its file can't be removed it stays.
    pub fn remove(&self, id: &str) -> Result<Option<T>, JournalError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(JournalError::new(&path, "remove", source)),
            _ => Ok(self.lock().remove(id)),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// All of them, or those that are chosen.
    pub fn select(&self, chosen: impl Fn(&T) -> bool) -> Vec<T> {
        self.lock().values().filter(|thing| chosen(thing)).cloned().collect()
    }

    fn path(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, T>> {
        // Every change under this lock is a single insertion or removal: a panic can't leave half of one.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
