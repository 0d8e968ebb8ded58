//! This node's private keys for encrypted networks: a file that only root reads. They are nowhere else, but in the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
};

use portolan_net::PrivateKey;
use serde::{Deserialize, Serialize};

use crate::snapshot::replace;

/// The keys can't be read or kept.
#[derive(Debug, thiserror::Error)]
#[error("keys {path}: {action}: {source}")]
pub(crate) struct KeysError {
    path: PathBuf,
    action: &'static str,
    source: io::Error,
}

/// Keys by their generation.
pub(crate) type Keys = BTreeMap<u32, PrivateKey>;

/// One as the file has it.
#[derive(Deserialize, Serialize)]
struct Written {
    generation: u32,
    private: String,
}

/// The file.
#[derive(Clone, Debug)]
pub(crate) struct KeyFile(pub PathBuf);

impl KeyFile {
    /// The keys; none if there is no file, or one that has no keys: then others are made.
    pub fn read(&self) -> Result<Keys, KeysError> {
        let bytes = match fs::read(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Keys::new()),
            other => other.map_err(|source| self.error("read", source))?,
        };
        let written: Vec<Written> = serde_json::from_slice(&bytes).unwrap_or_default();
        let key = |it: Written| Some((it.generation, it.private.parse().ok()?));
        let keys: Keys = written.into_iter().filter_map(key).collect();
        if keys.is_empty() {
            tracing::warn!(path = %self.0.display(), "no keys can be read there: new ones are made");
        }
        Ok(keys)
    }

    /// Makes `keys` those of the generations that are wanted, in the file first.
    pub fn keep(&self, keys: &mut Keys, wanted: &BTreeSet<u32>) -> Result<(), KeysError> {
        if keys.keys().eq(wanted) {
            return Ok(());
        }
        let mut next = Keys::new();
        for generation in wanted {
            let key = match keys.get(generation) {
                Some(key) => key.clone(),
                None => PrivateKey::generate().map_err(|source| self.error("make a key for", source))?,
            };
            next.insert(*generation, key);
        }
        let write = |(generation, key): (&u32, &PrivateKey)| Written { generation: *generation, private: key.reveal() };
        let written: Vec<Written> = next.iter().map(write).collect();
        let bytes = serde_json::to_vec(&written).map_err(io::Error::from);
        let replaced = bytes.and_then(|bytes| replace(&self.0, &bytes, 0o600));
        replaced.map_err(|source| self.error("write", source))?;
        *keys = next;
        Ok(())
    }

    /// Forgets all keys.
    pub fn remove(&self) -> Result<(), KeysError> {
        match fs::remove_file(&self.0) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(self.error("remove", e)),
            _ => Ok(()),
        }
    }

    fn error(&self, action: &'static str, source: io::Error) -> KeysError {
        KeysError { path: self.0.clone(), action, source }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_stay_until_they_are_not_wanted_any_more() {
        let directory = tempfile::tempdir().unwrap();
        let file = KeyFile(directory.path().join("network/keys.json"));
        let mut keys = file.read().unwrap();
        file.keep(&mut keys, &BTreeSet::from([1])).unwrap();
        assert_eq!(file.read().unwrap(), keys);
        let mode = fs::metadata(&file.0).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "nobody else reads it");
        let first = keys[&1].clone();
        file.keep(&mut keys, &BTreeSet::from([1, 2])).unwrap();
        assert_eq!((&keys[&1], file.read().unwrap()), (&first, keys.clone()));
        assert_ne!(keys[&2], first);
        file.keep(&mut keys, &BTreeSet::from([2])).unwrap();
        assert!(!fs::read_to_string(&file.0).unwrap().contains(&first.reveal()));
        file.remove().unwrap();
        file.remove().unwrap();
        assert_eq!(file.read().unwrap(), Keys::new());
    }

    #[test]
    fn what_can_not_be_written_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("network"), "a file, not a directory").unwrap();
        let file = KeyFile(directory.path().join("network/keys.json"));
        let mut keys = Keys::new();
        assert!(file.keep(&mut keys, &BTreeSet::from([1])).is_err());
        assert_eq!(keys, Keys::new());
    }

    #[test]
    fn what_is_no_key_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let file = KeyFile(directory.path().join("keys.json"));
        for text in ["", "{", r#"[{"generation": 1, "private": "short"}]"#] {
            fs::write(&file.0, text).unwrap();
            assert_eq!(file.read().unwrap(), Keys::new(), "{text}");
        }
    }
}
