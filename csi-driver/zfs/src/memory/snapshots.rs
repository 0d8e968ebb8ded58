//! Snapshots, clones and what they keep from being destroyed.

use super::Result;
use super::state::{Entry, State, Taken, failure};
use crate::error::ErrorKind;
use crate::model::Snapshot;
use crate::name::{DatasetName, InvalidName, Property, SnapshotName};

impl State {
    pub(super) fn taken(&mut self, name: &SnapshotName, operation: &str) -> Result<&mut Taken> {
        let snapshots = &mut self.entry(name.dataset(), operation)?.snapshots;
        let found = snapshots.iter_mut().find(|taken| taken.short == name.short());
        found.ok_or_else(|| failure(ErrorKind::NotFound, operation, name, "snapshot does not exist"))
    }

    pub(super) fn take(&mut self, name: &SnapshotName, txg: u64) -> Result<Snapshot> {
        let guid = self.next();
        let entry = self.entry(name.dataset(), "snapshot")?;
        if entry.snapshots.iter().any(|taken| taken.short == name.short()) {
            return Err(failure(ErrorKind::AlreadyExists, "snapshot", name, "dataset already exists"));
        }
        entry.modified = false;
        let taken = Taken {
            short: name.short().to_owned(),
            guid,
            txg,
            holds: Vec::new(),
            deferred: false,
            marked: false,
            size: entry.size,
            data: entry.data.clone(),
        };
        let snapshot = taken.snapshot(name.dataset());
        entry.snapshots.push(taken);
        snapshot
    }

    pub(super) fn take_all(
        &mut self,
        parent: &DatasetName,
        datasets: &[DatasetName],
        short: &str,
    ) -> Result<Vec<Snapshot>> {
        let refused = |kind, why: &str| failure(kind, "snapshot_all", &format!("{parent}@{short}"), why);
        let (mut names, mut found) = (Vec::new(), Vec::new());
        for dataset in datasets {
            if !dataset.is_below(parent) {
                return Err(refused(ErrorKind::Other, &format!("{dataset} is not below {parent}")));
            }
            let snapshots = &self.entry(dataset, "snapshot_all")?.snapshots;
            let name = dataset.snapshot(short).map_err(|error| refused(ErrorKind::Other, &error.to_string()))?;
            if names.contains(&name) {
                continue;
            }
            names.push(name);
            if let Some(taken) = snapshots.iter().find(|taken| taken.short == short) {
                found.push(taken.snapshot(dataset)?);
            }
        }
        let together = found.windows(2).all(|pair| pair[0].created_txg == pair[1].created_txg);
        match found.len() {
            _ if names.is_empty() => Err(refused(ErrorKind::Other, "no datasets are named")),
            0 => {
                let txg = self.next();
                let taken = names.iter().map(|name| self.take(name, txg)).collect();
                if !self.capabilities.several_snapshots {
                    self.take_others(parent, short, txg)?;
                }
                taken
            }
            count if count == names.len() && together => Ok(found),
            _ => Err(refused(ErrorKind::AlreadyExists, "some of them are there already")),
        }
    }

    /// What `zfs snapshot -r` takes besides. All that it takes is marked.
    fn take_others(&mut self, parent: &DatasetName, short: &str, txg: u64) -> Result<()> {
        let below: Vec<DatasetName> = self.datasets.keys().filter(|name| is_in(name, parent)).cloned().collect();
        for dataset in below {
            let there = self.entry(&dataset, "snapshot_all")?.snapshots.iter().any(|taken| taken.short == short);
            if let (false, Ok(name)) = (there, dataset.snapshot(short)) {
                self.take(&name, txg)?;
            }
            let snapshots = &mut self.entry(&dataset, "snapshot_all")?.snapshots;
            snapshots.iter_mut().filter(|taken| taken.txg == txg).for_each(|taken| taken.marked = true);
        }
        Ok(())
    }

    /// The marked snapshots of this name below `parent`, but for those of `wanted`.
    pub(super) fn others(&self, parent: &DatasetName, wanted: &[DatasetName], short: &str) -> Vec<SnapshotName> {
        let marked = |entry: &Entry| entry.snapshots.iter().any(|taken| taken.short == short && taken.marked);
        let all = self.datasets.iter().filter(|(name, entry)| is_in(name, parent) && marked(entry));
        all.filter(|(name, _)| !wanted.contains(name)).filter_map(|(name, _)| name.snapshot(short).ok()).collect()
    }

    pub(super) fn clone_to(
        &mut self,
        snapshot: &SnapshotName,
        target: &DatasetName,
        properties: &[Property],
    ) -> Result<()> {
        let taken = self.taken(snapshot, "clone")?;
        let (size, data) = (taken.size, taken.data.clone());
        let clone = self.create(target, "clone")?;
        clone.size = size;
        clone.data = data;
        clone.modified = true;
        clone.origin = Some(snapshot.clone());
        clone.set(properties);
        clone.mount_if_automatic();
        Ok(())
    }

    /// The clones of a dataset's snapshots.
    fn clones_of<'a>(&'a self, name: &'a DatasetName) -> impl Iterator<Item = (&'a DatasetName, &'a SnapshotName)> {
        let with_origin =
            |(clone, entry): (&'a DatasetName, &'a Entry)| entry.origin.as_ref().map(|origin| (clone, origin));
        self.datasets.iter().filter_map(with_origin).filter(move |(_, origin)| origin.dataset() == name)
    }

    /// Clones stay clones of a dataset that was renamed.
    pub(super) fn move_origins(&mut self, from: &DatasetName, to: &DatasetName) {
        for origin in self.datasets.values_mut().filter_map(|entry| entry.origin.as_mut()) {
            if origin.dataset() == from
                && let Ok(moved) = to.snapshot(origin.short())
            {
                *origin = moved;
            }
        }
    }

    pub(super) fn rename_snapshot(&mut self, name: &SnapshotName, short: &str) -> Result<()> {
        let dataset = name.dataset();
        let invalid = |error: InvalidName| failure(ErrorKind::Other, "rename", name, &error.to_string());
        let to = dataset.snapshot(short).map_err(invalid)?;
        self.taken(name, "rename")?;
        if self.taken(&to, "rename").is_ok() {
            return Err(failure(ErrorKind::AlreadyExists, "rename", &to, "dataset already exists"));
        }
        self.taken(name, "rename")?.short = short.to_owned();
        for origin in self.datasets.values_mut().filter_map(|entry| entry.origin.as_mut()) {
            if origin == name {
                *origin = to.clone();
            }
        }
        Ok(())
    }

    pub(super) fn destroy_snapshot(&mut self, name: &SnapshotName) -> Result<()> {
        if !self.taken(name, "destroy")?.holds.is_empty() {
            return Err(failure(ErrorKind::Busy, "destroy", name, "dataset is busy"));
        }
        if self.clones_of(name.dataset()).any(|(_, origin)| origin == name) {
            return Err(failure(ErrorKind::HasClones, "destroy", name, "snapshot has dependent clones"));
        }
        // It builds in a hidden clone of its base.
        let guid = self.taken(name, "destroy")?.guid;
        if self.entry(name.dataset(), "destroy")?.partial.as_ref().is_some_and(|part| part.base() == Some(guid)) {
            return Err(failure(ErrorKind::HasClones, "destroy", name, "snapshot has dependent clones"));
        }
        self.entry(name.dataset(), "destroy")?.snapshots.retain(|taken| taken.short != name.short());
        Ok(())
    }

    /// Destroys a snapshot whose destruction was deferred, once nothing stands in its way.
    pub(super) fn reap(&mut self, name: &SnapshotName) {
        if self.taken(name, "destroy").is_ok_and(|taken| taken.deferred) {
            // Refused as long as something holds or clones it.
            let _ = self.destroy_snapshot(name);
        }
    }

    pub(super) fn destroy(&mut self, name: &DatasetName) -> Result<()> {
        let children = self.has_children(name);
        let entry = self.entry(name, "destroy")?;
        if entry.mounted || (entry.is_volume() && entry.open) {
            return Err(failure(ErrorKind::Busy, "destroy", name, "dataset is busy"));
        }
        if children || !entry.snapshots.is_empty() {
            return Err(failure(ErrorKind::Other, "destroy", name, "filesystem has children"));
        }
        if let Some(Entry { origin: Some(origin), .. }) = self.datasets.remove(name) {
            self.reap(&origin);
        }
        Ok(())
    }

    /// The snapshots that go with a dataset, if nothing stands in its way.
    pub(super) fn all_to_destroy(&mut self, name: &DatasetName) -> Result<Vec<SnapshotName>> {
        let children = self.has_children(name);
        let entry = self.entry(name, "destroy")?;
        if children {
            return Err(failure(ErrorKind::Other, "destroy", name, "there are datasets below it"));
        }
        if entry.snapshots.iter().any(|taken| !taken.holds.is_empty()) {
            return Err(failure(ErrorKind::Busy, "destroy", name, "a snapshot is held"));
        }
        let snapshots: Result<Vec<SnapshotName>> =
            entry.snapshots.iter().map(|taken| Ok(taken.snapshot(name)?.name)).collect();
        let clones: Vec<String> = self.clones_of(name).map(|(clone, origin)| format!("{clone} of {origin}")).collect();
        if !clones.is_empty() {
            let why = format!("there are clones of it: {}", clones.join(", "));
            return Err(failure(ErrorKind::HasClones, "destroy", name, &why));
        }
        snapshots
    }
}

/// Whether a dataset is `parent` or below it.
fn is_in(name: &DatasetName, parent: &DatasetName) -> bool {
    name == parent || name.is_below(parent)
}

impl Taken {
    pub(super) fn snapshot(&self, of: &DatasetName) -> Result<Snapshot> {
        let name =
            of.snapshot(&self.short).map_err(|error| failure(ErrorKind::Other, "snapshot", of, &error.to_string()))?;
        Ok(Snapshot {
            name,
            guid: crate::Guid(self.guid),
            created_txg: self.txg,
            created: 0,
            used: 0,
            holds: self.holds.len() as u64,
            defer_destroy: self.deferred,
        })
    }
}
