//! The snapshots that somebody wants of the volume.

use kube::ResourceExt;
use portolan_crds::{PortableSnapshot, PortableSnapshotSpec};

use super::World;
use crate::controller::snapshots::is_nowhere;
use crate::handoff::Known;

impl World {
    pub(super) fn want_snapshot(&mut self) {
        self.snapshots_wanted += 1;
        let spec = PortableSnapshotSpec { volume: self.volume.name_any(), ..PortableSnapshotSpec::default() };
        self.snapshots.push(PortableSnapshot::new(&format!("snapshot-{}", self.snapshots_wanted), spec));
    }

    pub(super) fn object(&mut self, name: &str) -> Option<&mut PortableSnapshot> {
        self.snapshots.iter_mut().find(|snapshot| snapshot.name_any() == name)
    }

    pub(super) fn record_taken(&mut self, node: usize, name: &str, snapshot: Known) {
        let content = self.disk(node).frozen(&snapshot.guid).unwrap_or_default();
        let Some(object) = self.object(name) else { return };
        let status = object.status.get_or_insert_default();
        let before = status.guid.replace(snapshot.guid.clone());
        self.taken.insert(snapshot.guid.clone(), content);
        if before.is_some_and(|before| before != snapshot.guid) {
            self.note("two snapshots were taken for one object");
        }
    }

    /// What nobody has any more is gone, and is nowhere then.
    pub(super) fn let_go(&mut self) {
        let volume = self.volume.clone();
        let of = (!self.is_gone()).then_some(&volume);
        let (gone, kept) = std::mem::take(&mut self.snapshots)
            .into_iter()
            .partition(|snapshot| snapshot.metadata.deletion_timestamp.is_some() && is_nowhere(snapshot, of));
        self.snapshots = kept;
        let gone: Vec<PortableSnapshot> = gone;
        let guids: Vec<&str> = gone.iter().filter_map(|snapshot| snapshot.guid()).collect();
        let is_left = |there: &Known| !there.is_ours() && guids.contains(&there.guid.as_str());
        if self.disks.iter().flatten().flat_map(|disk| &disk.local.snapshots).any(is_left) {
            self.note("a snapshot is left whose object is gone");
        }
        if self.is_gone() && self.disks.iter().flatten().count() > 0 {
            self.note("a copy is left of a volume that is gone");
        }
    }

    /// A snapshot that was taken, is wanted, and isn't where it has to be.
    pub(super) fn lost_snapshots(&self, found: impl Fn(&Self, &str) -> Option<u32>) -> Option<String> {
        let wanted = self.snapshots.iter().filter(|snapshot| snapshot.metadata.deletion_timestamp.is_none());
        wanted.filter_map(PortableSnapshot::guid).find_map(|guid| {
            let (content, found) = (self.taken.get(guid).copied(), found(self, guid));
            (content != found).then(|| format!("snapshot {guid} had {content:?} in it, and now {found:?}"))
        })
    }
}
