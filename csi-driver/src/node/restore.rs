//! The dataset of a volume that begins as a snapshot: a clone where this node has that snapshot, else a copy from a node that has.

use kube::ResourceExt;
use portolan_crds::{PortableVolume, VolumeSource, condition};
use portolan_runtime::conditions;
use portolan_zfs::{DatasetName, ErrorKind, Property, SnapshotName, Zfs};

use super::fetch;
use super::steps::{StepError, Steps, ignore_missing};
use crate::transfer::Request;
use crate::volume::{self, UID_PROPERTY};

/// Makes the dataset, or goes on with one that an earlier attempt has begun.
pub(super) async fn run<Z: Zfs>(steps: &mut Steps<'_, Z>) -> Result<(), StepError> {
    let Some(source) = steps.volume.spec.source.clone() else { return Ok(()) };
    let zfs = steps.node.zfs.clone();
    let own = steps.volume.uid();
    let found = match zfs.dataset(&steps.dataset).await {
        Err(error) if error.kind == ErrorKind::NotFound => None,
        found => Some(found?),
    };
    match found {
        None => match here(steps, &source).await? {
            Some(snapshot) => zfs.clone_snapshot(&snapshot, &steps.dataset, &steps.new_properties()?).await?,
            None => copy(steps, &source).await?,
        },
        // Complete, and its snapshot may be gone: the mark comes with the copy or last, and a copy is read-only until it is whole.
        Some(found) if found.user.get(UID_PROPERTY).is_some_and(|uid| own.as_ref() == Some(uid)) && !found.readonly => {
        }
        // A clone, or a copy that has come whole: what it lacks are properties.
        Some(found) if found.origin.is_some() || received(steps, &source).await?.is_some() => set_all(steps).await?,
        // A copy of which snapshots have come that lie before the one asked for.
        Some(_) => copy(steps, &source).await?,
    }
    if steps.volume.spec.is_zvol() && zfs.dataset(&steps.dataset).await?.key_available {
        // The source may be smaller. One that is sealed grows when it is mounted.
        for property in volume::changeable(&steps.volume)? {
            zfs.set_property(&steps.dataset, &property).await?;
        }
    }
    let Some(copied) = received(steps, &source).await? else { return Ok(()) };
    zfs.set_readonly(&steps.dataset, false).await?;
    // The new volume has a history of its own.
    for snapshot in zfs.snapshots(&steps.dataset).await? {
        ignore_missing(zfs.destroy_snapshot(&snapshot.name).await)?;
    }
    tracing::info!(volume = steps.volume.name_any(), snapshot = %copied, "made a volume from a copy of a snapshot");
    Ok(())
}

/// The snapshot on this node, in the dataset of the volume that it is of.
async fn here<Z: Zfs>(steps: &Steps<'_, Z>, source: &VolumeSource) -> Result<Option<SnapshotName>, StepError> {
    of(steps, &volume::dataset(&steps.node.pool, &source.volume)?, source).await
}

/// The snapshot in the new volume's own dataset: it came as a copy.
async fn received<Z: Zfs>(steps: &Steps<'_, Z>, source: &VolumeSource) -> Result<Option<SnapshotName>, StepError> {
    of(steps, &steps.dataset, source).await
}

async fn of<Z: Zfs>(
    steps: &Steps<'_, Z>,
    dataset: &DatasetName,
    source: &VolumeSource,
) -> Result<Option<SnapshotName>, StepError> {
    match steps.node.zfs.snapshots(dataset).await {
        Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
        Ok(found) => {
            let is_it = |guid: &str| guid == source.guid;
            Ok(found.into_iter().find(|snapshot| is_it(&snapshot.guid.to_string())).map(|snapshot| snapshot.name))
        }
    }
}

/// Gives a dataset all that a new volume's has. The mark comes last, so that one without it gets all of them again.
async fn set_all<Z: Zfs>(steps: &Steps<'_, Z>) -> Result<(), StepError> {
    for property in steps.new_properties()? {
        steps.node.zfs.set_property(&steps.dataset, &property).await?;
    }
    Ok(())
}

/// Copies the snapshot from a node that has it: the owner of its volume if that is well, else any.
async fn copy<Z: Zfs>(steps: &mut Steps<'_, Z>, source: &VolumeSource) -> Result<(), StepError> {
    let failed = |why: String| StepError::Source { snapshot: source.snapshot.clone(), why };
    let of = steps.node.volumes.get_opt(&source.volume).await?;
    let of =
        of.ok_or_else(|| failed(format!("is of a volume that is gone: there is no PortableVolume {}", source.volume)))?;
    let mut properties = vec![Property::readonly(true)];
    properties.extend(steps.new_properties()?);
    let epoch = volume::status(&of).epoch.max(1);
    let mut request = Request::new(&source.volume, epoch, &source.short_name, source.guid.parse()?);
    request.restore = Some(steps.volume.name_any());
    let mut last = failed("is on no other node that is ready".to_owned());
    for node in holders(&of) {
        if node == steps.node.name || !is_ready(steps, &node).await? {
            continue;
        }
        match fetch::transfer(steps, &node, request.clone(), properties.clone()).await {
            Ok(received) => {
                tracing::info!(
                    volume = steps.volume.name_any(),
                    from = node,
                    bytes = received.bytes,
                    "copied a snapshot"
                );
                return Ok(());
            }
            Err(StepError::Deleted) => return Err(StepError::Deleted),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The nodes that have copies of a volume, its owner first.
fn holders(volume: &PortableVolume) -> Vec<String> {
    let status = volume::status(volume);
    let others = status.replicas.iter().map(|replica| replica.node.clone());
    let others = others.filter(|node| status.owner.as_ref() != Some(node)).collect::<Vec<_>>();
    status.owner.iter().cloned().chain(others).collect()
}

async fn is_ready<Z: Zfs>(steps: &Steps<'_, Z>, node: &str) -> Result<bool, StepError> {
    let found = steps.node.storage_nodes.get_opt(node).await?;
    let ready = found.and_then(|found| found.status).and_then(|status| {
        conditions::find(&status.conditions, condition::READY).map(|ready| ready.status == condition::TRUE)
    });
    Ok(ready.unwrap_or(false))
}
