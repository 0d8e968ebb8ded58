//! Keys and bookmarks.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::Result;
use super::state::{Mark, State, failure};
use crate::error::ErrorKind;
use crate::key::Key;
use crate::model::Bookmark;
use crate::name::{BookmarkName, DatasetName, Guid, SnapshotName};

/// What a key is known by here.
pub(super) fn fingerprint(key: &Key) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key.format(), key.material()).hash(&mut hasher);
    hasher.finish()
}

impl State {
    /// The dataset whose key it is sealed with: that which it was cloned from, else itself.
    pub(super) fn encryption_root(&self, name: &DatasetName) -> Option<DatasetName> {
        let entry = self.datasets.get(name)?;
        match &entry.origin {
            Some(origin) => self.encryption_root(origin.dataset()),
            None => entry.key.map(|_| name.clone()),
        }
    }

    pub(super) fn key_available(&self, name: &DatasetName) -> bool {
        let root = self.encryption_root(name).and_then(|root| self.datasets.get(&root));
        root.is_none_or(|root| root.key_loaded)
    }

    /// The cipher it is sealed by and what its key is known by.
    pub(super) fn seal_of(&mut self, name: &DatasetName) -> Result<Option<(String, u64)>> {
        self.entry(name, "encryption")?;
        let root = self.encryption_root(name).and_then(|root| self.datasets.get(&root));
        let cipher = |text: Option<&str>| text.unwrap_or_default().to_owned();
        Ok(root.and_then(|root| root.key.map(|key| (cipher(root.get("encryption")), key))))
    }

    pub(super) fn load_key(&mut self, name: &DatasetName, key: &Key) -> Result<()> {
        self.check_root(name, "load_key")?;
        let entry = self.entry(name, "load_key")?;
        if entry.key != Some(fingerprint(key)) {
            return Err(failure(ErrorKind::WrongKey, "load_key", name, "Incorrect key provided"));
        }
        entry.key_loaded = true;
        Ok(())
    }

    pub(super) fn unload_key(&mut self, name: &DatasetName) -> Result<()> {
        self.check_root(name, "unload_key")?;
        let sealed = |(other, _): &(&DatasetName, _)| self.encryption_root(other).as_ref() == Some(name);
        if self.datasets.iter().filter(sealed).any(|(_, entry)| entry.mounted) {
            return Err(failure(ErrorKind::Busy, "unload_key", name, "is busy"));
        }
        self.entry(name, "unload_key")?.key_loaded = false;
        Ok(())
    }

    fn check_root(&mut self, name: &DatasetName, operation: &str) -> Result<()> {
        self.need("encryption", |can| can.encryption, operation, name)?;
        self.entry(name, operation)?;
        match self.encryption_root(name) {
            None => Err(failure(ErrorKind::Other, operation, name, "is not encrypted")),
            Some(root) if root != *name => {
                let why = format!("Keys must be loaded for encryption root of '{name}' ({root}).");
                Err(failure(ErrorKind::KeyNotLoaded, operation, name, &why))
            }
            Some(_) => Ok(()),
        }
    }

    pub(super) fn mark(&mut self, name: &BookmarkName) -> Result<&mut Mark> {
        let marks = &mut self.entry(name.dataset(), "bookmark")?.bookmarks;
        let found = marks.iter_mut().find(|mark| mark.short == name.short());
        found.ok_or_else(|| failure(ErrorKind::NotFound, "bookmark", name, "bookmark does not exist"))
    }

    pub(super) fn bookmark(&mut self, snapshot: &SnapshotName, name: &BookmarkName) -> Result<()> {
        self.need("bookmarks", |can| can.bookmarks, "bookmark", name)?;
        let taken = self.taken(snapshot, "bookmark")?;
        let (guid, txg) = (taken.guid, taken.txg);
        if snapshot.dataset() != name.dataset() {
            return Err(failure(ErrorKind::Other, "bookmark", name, "source is not an ancestor"));
        }
        if let Ok(mark) = self.mark(name) {
            return match mark.guid == guid {
                true => Ok(()),
                false => Err(failure(ErrorKind::AlreadyExists, "bookmark", name, "bookmark exists")),
            };
        }
        self.entry(name.dataset(), "bookmark")?.bookmarks.push(Mark { short: name.short().to_owned(), guid, txg });
        Ok(())
    }

    pub(super) fn bookmarks(&mut self, dataset: &DatasetName) -> Result<Vec<Bookmark>> {
        self.need("bookmarks", |can| can.bookmarks, "bookmarks", dataset)?;
        let odd = |error: crate::InvalidName| failure(ErrorKind::Other, "bookmarks", dataset, &error.to_string());
        let mut found = Vec::new();
        for mark in &self.entry(dataset, "bookmarks")?.bookmarks {
            let name = dataset.bookmark(&mark.short).map_err(odd)?;
            found.push(Bookmark { name, guid: Guid(mark.guid), created_txg: mark.txg });
        }
        found.sort_by_key(|bookmark| bookmark.created_txg);
        Ok(found)
    }

    pub(super) fn destroy_bookmark(&mut self, name: &BookmarkName) -> Result<()> {
        self.need("bookmarks", |can| can.bookmarks, "bookmark", name)?;
        self.mark(name)?;
        self.entry(name.dataset(), "bookmark")?.bookmarks.retain(|mark| mark.short != name.short());
        Ok(())
    }
}
