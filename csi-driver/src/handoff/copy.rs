//! A copy of a volume on a node's disk, and whose it is.

use kube::ResourceExt;
use portolan_crds::{HandoffOutcome, PortableVolume, PortableVolumeStatus};

use super::{Known, retired_name};
use crate::volume;

/// A copy of a volume on this node's disk.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Local {
    /// The dataset's name in full.
    pub dataset: String,
    /// What identifies the dataset on this pool, in decimal.
    pub guid: String,
    /// Whose it is: the UID of a PortableVolume. None on a received copy whose properties haven't been set yet.
    pub uid: Option<String>,
    /// The epoch at which it was last writable.
    pub epoch: Option<i64>,
    /// Whether nothing can be written to it.
    pub readonly: bool,
    /// Whether it is mounted anywhere on this node.
    pub mounted: bool,
    /// Whether it is encrypted and its key isn't loaded.
    pub sealed: bool,
    /// Whether it was not unmounted in order since it was mounted last: what was written then may be in its log only.
    pub open: bool,
    /// The GUID of the snapshot that was taken of it after it had been unmounted in order, if it hasn't been mounted since.
    pub rests_at: Option<String>,
    /// Bytes that it uses, snapshots included.
    pub used: i64,
    /// Its snapshots, oldest first; not those that only a clone still keeps.
    pub snapshots: Vec<Known>,
    /// What it is a clone of: dataset and snapshot by their short names.
    pub origin: Option<(String, String)>,
}

impl Local {
    pub(super) fn has(&self, guid: &str) -> bool {
        self.snapshots.iter().any(|snapshot| snapshot.guid == guid)
    }

    /// Whether nothing can write to it before a pod comes anew, and nothing of what was written is in its log only.
    pub(super) fn rests(&self) -> bool {
        !self.mounted && !self.open
    }

    /// Its newest snapshot, if that has all that is in it.
    pub(super) fn resting(&self) -> Option<&Known> {
        self.snapshots.last().filter(|newest| self.rests() && self.rests_at.as_ref() == Some(&newest.guid))
    }

    /// The newest snapshot that Portolan took.
    pub(super) fn newest(&self) -> Option<&Known> {
        self.snapshots.iter().rev().find(|snapshot| snapshot.is_ours())
    }
}

/// Whether a volume is any of this node's business.
pub fn concerns(me: &str, volume: &PortableVolume) -> bool {
    let status = volume.status.as_ref();
    let handoff = status.and_then(|status| status.handoff.as_ref());
    let owner = status.and_then(|status| status.owner.as_deref());
    owner == Some(me)
        || (owner.is_none() && volume.spec.placement.node == me)
        || handoff.is_some_and(|handoff| handoff.to == me || handoff.from == me)
        || status.is_some_and(|status| status.replicas.iter().any(|replica| replica.node == me))
}

/// Whether a dataset is a copy of this volume: by its UID, or, received but not yet marked, by the GUID of a snapshot.
pub fn is_copy(volume: &PortableVolume, local: &Local) -> bool {
    match &local.uid {
        Some(uid) => volume.uid().as_ref() == Some(uid),
        None => is_received(volume, local) || is_restored(volume, local) || is_imported(volume, local),
    }
}

/// Whether a dataset without a mark has come from the volume's owner: an interrupted handoff has left it. What it was to bring may be
/// known no more, but the names of our snapshots are nobody else's.
fn is_received(volume: &PortableVolume, local: &Local) -> bool {
    let status = volume::status(volume);
    let known = known_guids(&status);
    let of_volume = |snapshot: &Known| known.contains(&snapshot.guid) || (status.owner.is_some() && snapshot.is_ours());
    local.snapshots.iter().any(of_volume)
}

/// Whether a dataset without a mark is the one that the spec names, at its place already: by the GUID that was written down before it was
/// renamed, or because it was made at that place.
fn is_imported(volume: &PortableVolume, local: &Local) -> bool {
    let Some(import) = &volume.spec.import else { return false };
    let status = volume::status(volume);
    let is_it = match &status.import_guid {
        Some(guid) => *guid == local.guid,
        None => import.dataset == local.dataset,
    };
    status.owner.is_none() && is_it
}

/// Whether a dataset without a mark is what an interrupted [`Action::Restore`] has left.
fn is_restored(volume: &PortableVolume, local: &Local) -> bool {
    let Some(source) = &volume.spec.source else { return false };
    // What is cloned may have been retired since.
    let names = [source.short_name.clone(), retired_name(&source.guid)];
    let of = |(dataset, snapshot): &(String, String)| *dataset == source.volume && names.contains(snapshot);
    let cloned = local.origin.as_ref().is_some_and(of);
    let received = local.snapshots.len() == 1 && local.has(&source.guid);
    volume::status(volume).owner.is_none() && (cloned || received)
}

/// The GUIDs that a volume's status names: of the newest snapshot that each copy is known to share, and of those that the running
/// handoff's target may have received, or the newest one's if that was aborted, without having said so.
pub fn known_guids(status: &PortableVolumeStatus) -> Vec<String> {
    let copies = status.replicas.iter().map(|replica| &replica.guid);
    let handoff = status.handoff.iter().flat_map(|handoff| [&handoff.guid, &handoff.round_guid]);
    // One that is done has said what its target has.
    let aborted = status.last_handoff.iter().filter(|report| report.outcome == HandoffOutcome::Aborted);
    let last = aborted.flat_map(|report| [&report.guid, &report.round_guid]);
    copies.chain(handoff).chain(last).flatten().cloned().collect()
}

/// The GUIDs of the snapshots that copies of a volume are known to share.
pub fn shared_guids(status: &PortableVolumeStatus) -> Vec<String> {
    status.replicas.iter().filter_map(|replica| replica.guid.clone()).collect()
}
