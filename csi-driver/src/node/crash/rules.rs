//! What must be so at any moment, whoever was killed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kube::ResourceExt;
use portolan_crds::{PortableSnapshot, PortableVolume};
use portolan_tests::api::FakeApi;
use portolan_zfs::Snapshot;
use portolan_zfs::memory::Contents;

use super::picture::{Pools, datasets};
use crate::handoff::{self, is_final_name};
use crate::volume::{self, UID_PROPERTY};

/// What somebody has written to each volume, by the volume's name.
pub(super) type Written = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// What is not as it must be.
pub(super) fn broken(api: &FakeApi, pools: &Pools, written: &Written) -> Vec<String> {
    let (volumes, snapshots) = (api.all::<PortableVolume>(), api.all::<PortableSnapshot>());
    let mut wrong = Vec::new();
    for (node, pool) in pools {
        for found in datasets(pool).iter().filter(|found| found.dataset.name.as_str().starts_with("tank/portolan/")) {
            let name = found.dataset.name.short();
            match volumes.iter().find(|volume| volume.name_any() == name) {
                None => wrong.push(format!("leak: {name} on {node} has no object")),
                // What was to be imported and never was is its maker's.
                Some(volume) if volume.spec.import.is_some() && volume::status(volume).owner.is_none() => {}
                Some(volume) if !volume::status(volume).replicas.iter().any(|replica| replica.node == *node) => {
                    wrong.push(format!("leak: {name} on {node} is not among its replicas"));
                }
                Some(_) => {}
            }
        }
    }
    for volume in &volumes {
        of_volume(volume, pools, &snapshots, written, &mut wrong);
    }
    wrong
}

/// What nobody writes can be written nowhere where it is mounted, and a copy that counts as complete is.
fn of_readers(volume: &PortableVolume, copies: &[(&str, Contents)], written: &Written, wrong: &mut Vec<String>) {
    let name = volume.name_any();
    let data = written.lock().unwrap().get(&name).cloned().unwrap_or_default();
    for (node, copy) in copies {
        let log = copy.dataset.user.get(volume::OPEN_PROPERTY).is_some_and(|open| open == "on");
        if copy.dataset.mounted && !copy.dataset.readonly {
            wrong.push(format!("write: {name} is mounted on {node} and not read-only"));
        }
        if log && !copy.snapshots.iter().all(|taken| !is_final_name(taken.name.short())) {
            wrong.push(format!("loss: a snapshot of {name} was taken on {node} before its log was played"));
        }
        if handoff::is_complete(volume, node) && volume.metadata.deletion_timestamp.is_none() && copy.data != data {
            wrong.push(format!("loss: {name} on {node} counts as complete and is not what was written"));
        }
    }
}

fn of_volume(
    volume: &PortableVolume,
    pools: &Pools,
    snapshots: &[PortableSnapshot],
    written: &Written,
    wrong: &mut Vec<String>,
) {
    let (name, status) = (volume.name_any(), volume::status(volume));
    let copies: Vec<(&str, Contents)> = pools
        .iter()
        .filter_map(|(node, pool)| {
            let found = datasets(pool).into_iter().find(|found| found.dataset.name.short() == name);
            Some((*node, found.filter(|found| found.dataset.user.get(UID_PROPERTY) == volume.uid().as_ref())?))
        })
        .collect();
    let writable: Vec<&str> = copies.iter().filter(|(_, copy)| !copy.dataset.readonly).map(|(node, _)| *node).collect();
    if writable.len() > 1 {
        wrong.push(format!("split: {name} can be written on {writable:?}"));
    }
    if volume.spec.is_shared() {
        of_readers(volume, &copies, written, wrong);
    }
    let Some(owner) = &status.owner else { return };
    if let Some(other) = writable.iter().find(|node| *node != owner) {
        wrong.push(format!("split: {name} can be written on {other}, and its owner is {owner}"));
    }
    let own = copies.iter().find(|(node, _)| node == owner).map(|(_, copy)| copy);
    // A volume that is deleted may go, but not before its snapshots.
    let wanted: Vec<&PortableSnapshot> = snapshots
        .iter()
        .filter(|snapshot| snapshot.spec.volume == name && snapshot.metadata.deletion_timestamp.is_none())
        .filter(|snapshot| snapshot.guid().is_some())
        .collect();
    let has = |guid: &str| own.is_some_and(|own| own.snapshots.iter().any(|taken| taken.guid.to_string() == guid));
    for snapshot in &wanted {
        if !has(snapshot.guid().unwrap()) {
            wrong.push(format!("loss: snapshot {} is not on {owner}", snapshot.name_any()));
        }
    }
    // What was there before the volume was is its maker's.
    let began_empty = volume.spec.import.is_none() && volume.spec.source.is_none();
    for (node, copy) in copies.iter().filter(|_| began_empty) {
        let short = |taken: &Snapshot| taken.name.short().to_owned();
        let left =
            copy.snapshots.iter().filter(|taken| !taken.defer_destroy).map(short).filter(|short| !is_final_name(short));
        let is_asked = |short: &String| snapshots.iter().any(|snapshot| snapshot.short_name() == *short);
        wrong.extend(
            left.filter(|short| !is_asked(short)).map(|short| format!("leak: {name}@{short} on {node} has no object")),
        );
    }
    let data = written.lock().unwrap().get(&name).cloned().unwrap_or_default();
    if volume.metadata.deletion_timestamp.is_none() && own.is_none_or(|own| own.data != data) {
        let found = own.map(|own| String::from_utf8_lossy(&own.data));
        wrong.push(format!("loss: {name} on {owner} has {found:?} and not what was written"));
    }
}
