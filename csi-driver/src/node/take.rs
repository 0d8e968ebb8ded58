//! Snapshots that somebody asked for: taken by the volume's owner, destroyed on each node that has them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ListParams, PostParams};
use kube::{Api, ResourceExt};
use portolan_crds::{PortableSnapshot, PortableSnapshotStatus, SnapshotGroup, VolumePhase, condition};
use portolan_runtime::conditions;
use portolan_zfs::{DatasetName, Guid, Zfs};

use super::steps::{self, StepError, Steps};
use super::write::is_conflict;
use super::{Node, disk};
use crate::handoff::{Asked, Known};
use crate::quantity::Human;
use crate::volume;

/// How often a status that somebody else writes too is written again.
const TRIES: usize = 5;

/// Takes a snapshot, or all of its group's.
pub(super) async fn run<Z: Zfs>(steps: &mut Steps<'_, Z>, asked: &Asked) -> Result<(), StepError> {
    match &asked.group {
        Some(group) => take_group(steps, group, asked).await,
        None => {
            steps.node.zfs.snapshot(&steps.dataset.snapshot(&asked.short)?).await?;
            Ok(())
        }
    }
}

/// Takes the snapshots of all volumes of a group in one step. They are this node's, as the group's maker has checked; one that has
/// moved away since makes the group impossible, and is named.
async fn take_group<Z: Zfs>(steps: &mut Steps<'_, Z>, group: &SnapshotGroup, asked: &Asked) -> Result<(), StepError> {
    let failed = |why: String| StepError::Group { group: group.name.clone(), why };
    let node = steps.node;
    let members = members(node, group).await?;
    if members.len() != group.members as usize {
        return Err(failed(format!("{} of {} snapshots are asked for so far", members.len(), group.members)));
    }
    let own = steps.volume.name_any();
    let (mut datasets, mut locks) = (vec![steps.dataset.clone()], Vec::new());
    for member in members {
        let name = &member.spec.volume;
        if *name == own {
            continue;
        }
        if member.guid().is_some() || member.metadata.deletion_timestamp.is_some() {
            return Err(failed(format!("{} is of another moment or is being deleted", member.name_any())));
        }
        // Two volumes of the group may be looked at at once: neither waits for the other.
        let lock = node.locks.try_lock(name).ok_or_else(|| failed(format!("volume {name} is busy")))?;
        locks.push(lock);
        let found = node.volumes.get_opt(name).await?;
        let status = found.as_ref().map(volume::status).unwrap_or_default();
        if status.owner.as_ref() != Some(&node.name) || status.phase != VolumePhase::Ready {
            let owner = status.owner.unwrap_or_else(|| "nobody".to_owned());
            return Err(failed(format!("volume {name} is {:?} on {owner}, not on node {}", status.phase, node.name)));
        }
        datasets.push(volume::dataset(&node.pool, name)?);
    }
    for dataset in &datasets {
        play_log(node, dataset).await?;
    }
    node.zfs.snapshot_all(&node.pool, &datasets, &asked.short).await?;
    for dataset in &datasets {
        node.nudge(dataset.short());
    }
    Ok(())
}

/// What was acknowledged before the node failed is in the snapshot, too: see the plan's own step for a single one.
async fn play_log<Z: Zfs>(node: &Node<Z>, dataset: &DatasetName) -> Result<(), StepError> {
    let found = disk::read(node.zfs.as_ref(), &node.mounts, dataset).await?;
    match found.filter(|local| local.open && !local.mounted) {
        Some(local) if local.sealed => Err(StepError::NeedsKey(dataset.clone())),
        Some(_) => {
            node.zfs.set_readonly(dataset, true).await?;
            steps::replay(node, dataset).await?;
            Ok(node.zfs.set_readonly(dataset, false).await?)
        }
        None => Ok(()),
    }
}

/// Destroys what taking the group's snapshots has left on the datasets of other volumes, if it was cut short.
pub(super) async fn clean_up<Z: Zfs>(steps: &Steps<'_, Z>, asked: &Asked) -> Result<(), StepError> {
    let Some(group) = &asked.group else { return Ok(()) };
    let node = steps.node;
    let members = members(node, group).await?;
    let datasets: Result<Vec<_>, _> =
        members.iter().map(|member| volume::dataset(&node.pool, &member.spec.volume)).collect();
    Ok(node.zfs.clean_up_snapshot_all(&node.pool, &datasets?, &asked.short).await?)
}

async fn members<Z>(node: &Node<Z>, group: &SnapshotGroup) -> kube::Result<Vec<PortableSnapshot>> {
    let of_group = ListParams::default().fields(&format!("spec.group.name={}", group.name));
    Ok(node.snapshots.list(&of_group).await?.items)
}

/// Writes what was taken into the object's status.
pub(super) async fn record<Z: Zfs>(steps: &Steps<'_, Z>, object: &str, taken: &Known) -> Result<(), StepError> {
    let found = steps.node.zfs.snapshots(&steps.dataset).await?;
    let guid: Guid = taken.guid.parse()?;
    let created = found.iter().find(|snapshot| snapshot.guid == guid).map_or(0, |snapshot| snapshot.created);
    let at = jiff::Timestamp::from_second(created).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    let size = steps.volume.spec.size_bytes;
    let node = steps.node.name.clone();
    write(&steps.node.snapshots, object, |status| {
        status.guid = Some(taken.guid.clone());
        status.taken_at = Some(MicroTime(at));
        status.size_bytes = Some(size);
        status.size = Some(Human(size).to_string());
        let message = format!("taken on node {node}");
        status.node = Some(node);
        conditions::set(&mut status.conditions, condition::READY, condition::TRUE, "Taken", &message, None);
    })
    .await?;
    tracing::info!(volume = steps.volume.name_any(), snapshot = taken.name, "took a snapshot");
    Ok(())
}

/// Writes that this node has no such snapshot any more.
pub(super) async fn record_destroyed<Z: Zfs>(node: &Node<Z>, object: &str) -> Result<(), StepError> {
    let me = node.name.clone();
    write(&node.snapshots, object, |status| {
        if !status.destroyed_on.contains(&me) {
            status.destroyed_on.push(me);
        }
    })
    .await
}

/// Changes an object's status by compare-and-set; other nodes write theirs at the same time. One that is gone needs none.
async fn write(
    snapshots: &Api<PortableSnapshot>,
    object: &str,
    change: impl FnOnce(&mut PortableSnapshotStatus) + Clone,
) -> Result<(), StepError> {
    for attempt in 1.. {
        let Some(mut now) = snapshots.get_opt(object).await? else { return Ok(()) };
        let mut status = now.status.clone().unwrap_or_default();
        (change.clone())(&mut status);
        if now.status.as_ref() == Some(&status) {
            return Ok(());
        }
        now.status = Some(status);
        match snapshots.replace_status(object, &PostParams::default(), &now).await {
            Err(error) if is_conflict(&error) && attempt < TRIES => {}
            Err(kube::Error::Api(gone)) if gone.is_not_found() => return Ok(()),
            result => return Ok(result.map(drop)?),
        }
    }
    Ok(())
}
