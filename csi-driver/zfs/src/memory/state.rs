//! What the pool in memory holds, and what each operation does to it.

use std::collections::BTreeMap;

use super::keys::fingerprint;
use super::stream::Partial;
use super::{Fault, Result};
use crate::error::{ErrorKind, ZfsError};
use crate::key::Key;
use crate::model::{Dataset, Kind, PoolHealth};
use crate::name::{DatasetName, Guid, Property, SnapshotName};
use crate::probe::{Capabilities, Implementation, Probe};

/// What a dataset that holds nothing uses, in bytes.
const EMPTY: u64 = 1024;

#[derive(Debug)]
pub(super) struct State {
    pub(super) pool: String,
    pub(super) capacity: u64,
    pub(super) health: PoolHealth,
    pub(super) imported: bool,
    pub(super) capabilities: Capabilities,
    pub(super) last: u64,
    pub(super) guid: u64,
    pub(super) datasets: BTreeMap<DatasetName, Entry>,
    pub(super) faults: Vec<(&'static str, u32, Fault)>,
    pub(super) calls: Vec<String>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Entry {
    pub(super) guid: u64,
    pub(super) properties: BTreeMap<String, String>,
    pub(super) mounted: bool,
    pub(super) open: bool,
    pub(super) origin: Option<SnapshotName>,
    /// What its key is known by, if it is an encryption root.
    pub(super) key: Option<u64>,
    pub(super) key_loaded: bool,
    /// Of a volume, in bytes.
    pub(super) size: Option<u64>,
    pub(super) data: Vec<u8>,
    pub(super) modified: bool,
    pub(super) snapshots: Vec<Taken>,
    pub(super) bookmarks: Vec<Mark>,
    pub(super) partial: Option<Partial>,
}

#[derive(Clone, Debug)]
pub(super) struct Taken {
    pub(super) short: String,
    pub(super) guid: u64,
    pub(super) txg: u64,
    pub(super) holds: Vec<String>,
    /// Destroyed as soon as nothing holds or clones it.
    pub(super) deferred: bool,
    /// Taken together with others, as zfs-fuse does it.
    pub(super) marked: bool,
    pub(super) size: Option<u64>,
    pub(super) data: Vec<u8>,
}

/// A bookmark.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    pub(super) short: String,
    pub(super) guid: u64,
    pub(super) txg: u64,
}

impl State {
    pub(super) fn fault(&mut self, operation: &str) -> Option<Fault> {
        let mut due = None;
        for (index, (of, nth, fault)) in self.faults.iter_mut().enumerate() {
            if *of == operation {
                *nth = nth.saturating_sub(1);
                if *nth == 0 && due.is_none() {
                    due = Some((index, *fault));
                }
            }
        }
        let (index, fault) = due?;
        self.faults.remove(index);
        Some(fault)
    }

    pub(super) fn probe(&self) -> Probe {
        Probe { implementation: Implementation::Memory, version: "0".into(), capabilities: self.capabilities }
    }

    pub(super) fn need(
        &self,
        capability: &str,
        can: impl Fn(&Capabilities) -> bool,
        operation: &str,
        about: &impl ToString,
    ) -> Result<()> {
        match can(&self.capabilities) {
            true => Ok(()),
            false => {
                Err(ZfsError::unsupported(format!("{operation} {}", about.to_string()), &self.probe(), capability))
            }
        }
    }

    /// A new dataset, not mounted yet.
    pub(super) fn make(
        &mut self,
        name: &DatasetName,
        properties: &[Property],
        key: Option<&Key>,
    ) -> Result<&mut Entry> {
        if key.is_some() {
            self.need("encryption", |can| can.encryption, "create", name)?;
        }
        let entry = self.create(name, "create")?;
        entry.modified = true;
        entry.set(properties);
        if let Some(key) = key {
            entry.properties.entry("encryption".to_owned()).or_insert_with(|| "aes-256-gcm".to_owned());
            entry.key = Some(fingerprint(key));
            entry.key_loaded = true;
        }
        Ok(entry)
    }

    /// A number that none of the earlier ones equals.
    pub(super) fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    pub(super) fn entry(&mut self, name: &DatasetName, operation: &str) -> Result<&mut Entry> {
        if name.pool() != self.pool {
            return Err(failure(ErrorKind::PoolUnavailable, operation, name, "no such pool"));
        }
        self.datasets
            .get_mut(name)
            .ok_or_else(|| failure(ErrorKind::NotFound, operation, name, "dataset does not exist"))
    }

    pub(super) fn used(&self) -> u64 {
        self.datasets.values().map(Entry::used).sum()
    }

    pub(super) fn has_children(&self, name: &DatasetName) -> bool {
        let below = format!("{name}/");
        self.datasets.keys().any(|other| other.as_str().starts_with(&below))
    }

    pub(super) fn create(&mut self, name: &DatasetName, operation: &str) -> Result<&mut Entry> {
        if self.datasets.contains_key(name) {
            return Err(failure(ErrorKind::AlreadyExists, operation, name, "dataset already exists"));
        }
        let parent = name.as_str().rsplit_once('/').and_then(|(parent, _)| DatasetName::new(parent).ok());
        let parent = parent.ok_or_else(|| failure(ErrorKind::PoolUnavailable, operation, name, "no such pool"))?;
        self.entry(&parent, operation)?;
        let guid = self.next();
        Ok(self.datasets.entry(name.clone()).or_insert(Entry { guid, ..Entry::default() }))
    }

    pub(super) fn dataset(&self, name: &DatasetName, entry: &Entry) -> Dataset {
        let available = self.capacity.saturating_sub(self.used());
        let root = self.encryption_root(name).and_then(|root| self.datasets.get(&root));
        let refquota = entry.get("refquota").and_then(|text| text.parse().ok());
        Dataset {
            name: name.clone(),
            guid: Guid(entry.guid),
            kind: entry.kind(),
            used: entry.used(),
            available: refquota.map_or(available, |quota: u64| available.min(quota.saturating_sub(entry.referenced()))),
            referenced: entry.referenced(),
            refquota,
            readonly: entry.get("readonly") == Some("on"),
            mounted: entry.mounted,
            mountpoint: entry.get("mountpoint").filter(|path| path.starts_with('/')).map(Into::into),
            origin: entry.origin.clone(),
            resume_token: entry.partial.as_ref().map(Partial::token),
            encryption: root.and_then(|root| root.get("encryption")).map(str::to_owned),
            encryption_root: self.encryption_root(name),
            key_available: self.key_available(name),
            user: entry
                .properties
                .iter()
                .filter(|(name, _)| name.contains(':'))
                .map(|(n, v)| (n.clone(), v.clone()))
                .collect(),
        }
    }

    pub(super) fn unmount(&mut self, name: &DatasetName) -> Result<()> {
        let entry = self.entry(name, "unmount")?;
        if entry.mounted && entry.open {
            return Err(failure(ErrorKind::Busy, "unmount", name, "dataset is busy"));
        }
        entry.mounted = false;
        Ok(())
    }
}

impl Entry {
    pub(super) fn set(&mut self, properties: &[Property]) {
        for property in properties {
            match (self.size.as_mut(), property.name()) {
                (Some(size), "volsize") => *size = property.value().parse().unwrap_or(*size),
                (_, name) => drop(self.properties.insert(name.to_owned(), property.value().to_owned())),
            }
        }
    }

    pub(super) fn kind(&self) -> Kind {
        self.size.map_or(Kind::Filesystem, |size| Kind::Volume { size })
    }

    pub(super) fn is_volume(&self) -> bool {
        self.kind() != Kind::Filesystem
    }

    /// What `zfs` does with a new filesystem.
    pub(super) fn mount_if_automatic(&mut self) {
        self.mounted = !self.is_volume()
            && self.get("canmount") != Some("noauto")
            && self.get("mountpoint").is_some_and(|path| path.starts_with('/'));
    }

    pub(super) fn get(&self, property: &str) -> Option<&str> {
        self.properties.get(property).map(String::as_str)
    }

    pub(super) fn referenced(&self) -> u64 {
        EMPTY + self.data.len() as u64
    }

    pub(super) fn used(&self) -> u64 {
        self.referenced() + self.snapshots.iter().map(|taken| taken.data.len() as u64).sum::<u64>()
    }
}

pub(super) fn failure(kind: ErrorKind, operation: &str, about: &impl ToString, why: &str) -> ZfsError {
    ZfsError::new(kind, format!("{operation} {}", about.to_string()), why)
}
