//! What on a node's disk has no owner: a pure function of the disk and of what the API knows.

use std::path::PathBuf;

use kube::ResourceExt;
use portolan_crds::{Orphan, PortableSnapshot, PortableVolume};
use portolan_zfs::{Dataset, DatasetName, Snapshot};

use crate::block::mounts::Mount;
use crate::handoff;
use crate::volume::{self, EPOCH_PROPERTY, UID_PROPERTY, VOLUME_PROPERTY};

/// What a dataset refers to at most, in bytes, in which nothing was ever written.
const EMPTY_AT_MOST: u64 = 128 << 10;
/// How the names of snapshots begin that are taken for a PortableSnapshot; a UUID ends them.
const ASKED_PREFIXES: [&str; 3] = ["snapshot-", "groupsnapshot-", "clone-"];
const UUID_LENGTH: usize = 36;

/// What is on the disk.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    /// The datasets directly below the volumes' own, with their snapshots.
    pub(super) datasets: Vec<(Dataset, Vec<Snapshot>)>,
    pub(super) mounts: Vec<Mount>,
    /// The directories for volumes of which there is neither a dataset nor a mount, and whether they are empty.
    pub(super) directories: Vec<(PathBuf, bool)>,
}

/// What the API has said, all of it, after the disk was looked at.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub(super) volumes: Vec<PortableVolume>,
    pub(super) snapshots: Vec<PortableSnapshot>,
}

impl Known {
    fn by_uid(&self, uid: &str) -> Option<&PortableVolume> {
        self.volumes.iter().find(|volume| volume.uid().as_deref() == Some(uid))
    }

    fn by_name(&self, name: &str) -> Option<&PortableVolume> {
        self.volumes.iter().find(|volume| volume.name_any() == name)
    }

    /// Whether a snapshot of a volume has its object.
    fn asks_for(&self, volume: &str, snapshot: &Snapshot) -> bool {
        let guid = snapshot.guid.to_string();
        self.snapshots.iter().filter(|asked| asked.spec.volume == volume).any(|asked| match asked.guid() {
            Some(known) => known == guid,
            None => asked.short_name() == snapshot.name.short(),
        })
    }
}

/// What can go without anybody being asked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Collect {
    /// A dataset that was never used.
    Dataset(Box<Dataset>),
    /// An empty directory.
    Directory(PathBuf),
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Verdict {
    /// What a person must look at.
    pub(super) orphans: Vec<Orphan>,
    /// What holds nobody's data.
    pub(super) collect: Vec<Collect>,
    /// Datasets that Portolan did not make.
    pub(super) foreign: i64,
}

/// Looks for what nobody owns.
pub(super) fn judge(me: &str, pool: &DatasetName, disk: &Disk, known: &Known) -> Verdict {
    let mut verdict = Verdict::default();
    let mut unused = Vec::new();
    for (dataset, snapshots) in &disk.datasets {
        let name = dataset.name.short();
        match (dataset.user.get(UID_PROPERTY), dataset.user.get(VOLUME_PROPERTY)) {
            // The agent's: being received, restored or imported, or in its way.
            (None, _) if known.by_name(name).is_some() => {}
            (None, None) => verdict.foreign += 1,
            (None, Some(_)) => verdict.orphans.push(lost(me, dataset, None)),
            (Some(uid), _) => match known.by_uid(uid) {
                None if never_used(dataset, snapshots) => unused.push(dataset),
                None => verdict.orphans.push(lost(me, dataset, Some(uid))),
                Some(volume) => verdict.orphans.extend(of_volume(me, pool, dataset, snapshots, volume, known)),
            },
        }
    }
    // A copy with data whose volume is gone: the API may be one that was restored, and what it doesn't know proves nothing.
    let trusted = verdict.orphans.iter().all(|orphan| orphan.reason != "VolumeGone") && !known.volumes.is_empty();
    for dataset in unused {
        match trusted {
            true => verdict.collect.push(Collect::Dataset(Box::new(dataset.clone()))),
            false => verdict.orphans.push(lost(me, dataset, dataset.user.get(UID_PROPERTY))),
        }
    }
    verdict.orphans.extend(mounted(me, disk, known));
    directories(disk, &mut verdict);
    verdict
}

/// Whether nobody can ever have written to a dataset: no node has owned it, and there is nothing in it.
pub(super) fn never_used(dataset: &Dataset, snapshots: &[Snapshot]) -> bool {
    let untouched = !dataset.user.contains_key(EPOCH_PROPERTY)
        && snapshots.is_empty()
        && dataset.origin.is_none()
        && !dataset.mounted;
    // A copy is read-only until it is owned: what is in it came by a stream. A part of a stream is of no use to anybody.
    let nothing = !dataset.readonly && dataset.referenced <= EMPTY_AT_MOST;
    untouched && (nothing || dataset.resume_token.is_some())
}

fn orphan(name: impl ToString, reason: &str, bytes: Option<u64>, message: String) -> Orphan {
    let bytes = bytes.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
    Orphan { name: name.to_string(), reason: reason.to_owned(), bytes, message }
}

fn lost(me: &str, dataset: &Dataset, uid: Option<&String>) -> Orphan {
    let (name, of) = (&dataset.name, dataset.user.get(VOLUME_PROPERTY));
    let whose = format!(
        "PortableVolume {} (UID {})",
        of.map_or("of unknown name", String::as_str),
        uid.map_or("unknown", String::as_str)
    );
    let message = format!(
        "dataset {name} on node {me} is of {whose}, which is gone. To keep its data run there `zfs inherit portolan:uid {name}` \
         and import it as a volume; to destroy them `zfs destroy -r {name}`"
    );
    orphan(name, "VolumeGone", Some(dataset.used), message)
}

/// What is left over of a volume that there is.
fn of_volume(
    me: &str,
    pool: &DatasetName,
    dataset: &Dataset,
    snapshots: &[Snapshot],
    volume: &PortableVolume,
    known: &Known,
) -> Vec<Orphan> {
    let (name, of) = (&dataset.name, volume.name_any());
    if volume::is_quarantined(name.short(), &of) {
        let message = format!(
            "dataset {name} on node {me} was a copy of volume {of} that is not from its history: look at what it has; if nobody needs that, \
             run there `zfs destroy -r {name}`"
        );
        return vec![orphan(name, "Quarantined", Some(dataset.used), message)];
    }
    if name.short() != of {
        let message = format!(
            "dataset {name} on node {me} is volume {of}'s and was renamed by hand: run there `zfs rename {name} {pool}/{of}`"
        );
        return vec![orphan(name, "Renamed", Some(dataset.used), message)];
    }
    if !handoff::concerns(me, volume) {
        return vec![unrecorded(me, dataset, volume)];
    }
    // One that nobody owns yet may begin as a snapshot of another volume.
    match volume::status(volume).owner {
        None => Vec::new(),
        Some(_) => snapshots.iter().filter_map(|snapshot| of_snapshot(me, snapshot, &of, known)).collect(),
    }
}

/// A copy that the volume doesn't know of.
fn unrecorded(me: &str, dataset: &Dataset, volume: &PortableVolume) -> Orphan {
    let (name, status) = (&dataset.name, volume::status(volume));
    let epoch = dataset.user.get(EPOCH_PROPERTY).and_then(|epoch| epoch.parse::<i64>().ok()).unwrap_or_default();
    let owner = status.owner.clone().unwrap_or_else(|| "nobody".to_owned());
    let which = match epoch > status.epoch {
        true => "it is NEWER than what the API knows: was that restored from a backup? Look before you do anything",
        false => "it is no newer than the owner's",
    };
    let message = format!(
        "dataset {name} on node {me} is a copy (epoch {epoch}) that PortableVolume {} (epoch {}, owner {owner}) does not list: {which}. \
         To destroy it run there `zfs destroy -r {name}`",
        volume.name_any(),
        status.epoch
    );
    orphan(name, "NotListed", Some(dataset.used), message)
}

/// Snapshots of ours that no object asks for, or that somebody holds. What people have taken by hand is theirs; final snapshots are let go
/// of by the handoff.
fn of_snapshot(me: &str, snapshot: &Snapshot, volume: &str, known: &Known) -> Option<Orphan> {
    let (name, short) = (&snapshot.name, snapshot.name.short());
    let asked_for = is_asked_name(short);
    if snapshot.defer_destroy || !(asked_for || handoff::is_final_name(short)) {
        return None;
    }
    if snapshot.holds > 0 {
        let message = format!(
            "snapshot {name} on node {me} is held, which Portolan never does: see there `zfs holds {name}`, then \
             `zfs release <tag> {name}`"
        );
        return Some(orphan(name, "Held", None, message));
    }
    if !asked_for || known.asks_for(volume, snapshot) {
        return None;
    }
    let message = format!(
        "snapshot {name} on node {me} has no PortableSnapshot: if nobody needs it run there `zfs destroy {name}`"
    );
    Some(orphan(name, "SnapshotGone", None, message))
}

fn is_asked_name(short: &str) -> bool {
    let is_uuid = |text: &str| {
        text.len() == UUID_LENGTH
            && text.bytes().enumerate().all(|(at, byte)| match at {
                8 | 13 | 18 | 23 => byte == b'-',
                _ => byte.is_ascii_hexdigit(),
            })
    };
    let tail = short.len().checked_sub(UUID_LENGTH).and_then(|at| short.get(at..));
    ASKED_PREFIXES.iter().any(|prefix| short.starts_with(prefix)) && tail.is_some_and(is_uuid)
}

/// Mounts of datasets whose volumes aren't this node's to write, nor to read.
fn mounted(me: &str, disk: &Disk, known: &Known) -> Vec<Orphan> {
    let ours = |source: &str| {
        let (dataset, _) = disk.datasets.iter().find(|(dataset, _)| dataset.name.as_str() == source)?;
        let uid = dataset.user.get(UID_PROPERTY)?;
        match known.by_uid(uid) {
            None => Some("is gone".to_owned()),
            Some(volume) => {
                let status = volume::status(volume);
                let here = status.owner.as_deref() == Some(me)
                    || status.handoff.is_some_and(|handoff| handoff.from == me)
                    || (volume.spec.is_shared() && handoff::is_complete(volume, me));
                (!here).then(|| format!("is node {}'s", status.owner.unwrap_or_else(|| "no".to_owned())))
            }
        }
    };
    let say = |mount: &Mount| {
        let why = ours(&mount.source)?;
        let target = mount.target.display();
        let message = format!(
            "dataset {} is mounted at {target} on node {me} and its volume {why}: end what uses it, then run there `umount {target}`",
            mount.source
        );
        Some(orphan(target, "Mounted", None, message))
    };
    disk.mounts.iter().filter_map(say).collect()
}

/// Directories at which nothing can be mounted any more.
fn directories(disk: &Disk, verdict: &mut Verdict) {
    for (path, empty) in &disk.directories {
        match empty {
            true => verdict.collect.push(Collect::Directory(path.clone())),
            false => {
                let path = path.display();
                let message = format!(
                    "directory {path} has files though there is no dataset for it: look at them, then move or remove them"
                );
                verdict.orphans.push(orphan(path, "FilesLeft", None, message));
            }
        }
    }
}
