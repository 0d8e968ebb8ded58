//! A dataset in miniature, with the log that ZFS keeps of synchronous writes.

use crate::handoff::{Known, Local};

/// What is in a dataset, and what was when each snapshot was taken. The content is how often somebody wrote to it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Disk {
    /// What a plan sees of it.
    pub local: Local,
    /// What the pool has.
    content: u32,
    /// Acknowledged writes that are in the log only: ZFS plays it when it mounts the dataset, and at no other time.
    logged: u32,
    frozen: Vec<u32>,
    /// Mounted so that a pod can write.
    pub writable: bool,
}

impl Disk {
    /// One that is there and not more.
    pub fn new(local: Local) -> Self {
        Self { local, ..Self::default() }
    }

    /// What a pod would find in it.
    pub fn acknowledged(&self) -> u32 {
        self.content + self.logged
    }

    /// What a snapshot would have if it were taken now. One of a dataset that is in use has all: taking it ends ZFS's transaction.
    pub fn frozen_now(&self) -> u32 {
        if self.local.mounted { self.acknowledged() } else { self.content }
    }

    /// What one of its snapshots has.
    pub fn frozen(&self, guid: &str) -> Option<u32> {
        let at = self.local.snapshots.iter().position(|there| there.guid == guid)?;
        self.frozen.get(at).copied()
    }

    /// Mounts it, which plays its log. It is marked as open before.
    pub fn mount(&mut self) {
        self.sync();
        (self.local.open, self.local.mounted, self.writable) = (true, true, !self.local.readonly);
        self.local.rests_at = None;
    }

    /// Unmounts it in order.
    pub fn unmount(&mut self) {
        if self.local.mounted {
            self.sync();
            (self.local.open, self.local.mounted, self.writable) = (false, false, false);
            self.local.rests_at = None;
        }
    }

    /// Its node is off, and on again: what was in memory is in the log only.
    pub fn lose_power(&mut self) {
        (self.local.mounted, self.writable) = (false, false);
    }

    /// A pod's write is acknowledged.
    pub fn write(&mut self) {
        self.logged += 1;
    }

    fn sync(&mut self) {
        self.content += std::mem::take(&mut self.logged);
    }

    /// Takes a snapshot.
    pub fn freeze(&mut self, snapshot: Known) {
        if self.local.mounted {
            self.sync();
        }
        self.frozen.push(self.content);
        self.local.snapshots.push(snapshot);
    }

    /// Destroys one, if it is there.
    pub fn thaw(&mut self, snapshot: &Known) {
        if let Some(at) = self.local.snapshots.iter().position(|there| there == snapshot) {
            self.local.snapshots.remove(at);
            self.frozen.remove(at);
        }
    }

    /// Calls one by another name, if it is there.
    pub fn rename(&mut self, snapshot: &Known, name: String) {
        if let Some(there) = self.local.snapshots.iter_mut().find(|there| *there == snapshot) {
            there.name = name;
        }
    }

    /// Receives a snapshot with this in it; cut short it has the snapshot and not what is in it.
    pub fn receive(&mut self, snapshot: Known, content: u32, cut: bool) {
        if !cut {
            self.content = content;
        }
        self.local.readonly = true;
        self.frozen.push(self.content);
        self.local.snapshots.push(snapshot);
    }

    /// Where its newest snapshot is among those of the source, if nothing was written since: where a stream can begin.
    pub fn common(&self, source: &[Known]) -> Option<usize> {
        let newest = self.local.snapshots.last()?;
        let at = source.iter().position(|it| it.guid == newest.guid)?;
        (self.frozen.last() == Some(&self.acknowledged())).then_some(at)
    }
}
