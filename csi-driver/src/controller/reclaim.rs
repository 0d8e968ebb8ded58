//! PersistentVolumes that were released: theirs is the say over whether the data go.

use std::sync::Arc;

use k8s_openapi::api::core::v1::PersistentVolume;
use kube::ResourceExt;
use kube::api::{DeleteParams, Preconditions};
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{Controller, watcher};
use portolan_crds::{DRIVER, PV_FINALIZER, PortableVolume};

use super::{Hub, PROVISIONED_BY, RESYNC, exhaust, retry, set_finalizer, unless_gone, volumes};
use crate::volume;

pub(super) async fn run(hub: Arc<Hub>) {
    let stream = Controller::new(hub.pvs.clone(), watcher::Config::default())
        .watches(hub.volumes.clone(), watcher::Config::default(), |volume: PortableVolume| {
            Some(ObjectRef::new(&volume.name_any()))
        })
        .run(reconcile, retry, hub.clone());
    exhaust("persistent volumes", stream).await;
}

/// What becomes of a PersistentVolume.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fate {
    /// It stays.
    Keep,
    /// It goes and the data stay.
    Release,
    /// It goes and the data go first.
    Destroy,
}

fn fate(pv: &PersistentVolume) -> Fate {
    let spec = pv.spec.as_ref();
    let deletes = spec.and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref()) == Some("Delete");
    let phase = pv.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending");
    let going = pv.metadata.deletion_timestamp.is_some();
    match (phase, deletes, going) {
        ("Bound", _, _) => Fate::Keep,
        ("Released" | "Failed", true, _) | (_, true, true) => Fate::Destroy,
        (_, false, true) => Fate::Release,
        _ => Fate::Keep,
    }
}

async fn reconcile(pv: Arc<PersistentVolume>, hub: Arc<Hub>) -> kube::Result<Action> {
    let csi = pv.spec.as_ref().and_then(|spec| spec.csi.as_ref()).filter(|csi| csi.driver == DRIVER);
    let Some(handle) = csi.map(|csi| csi.volume_handle.clone()) else { return Ok(Action::await_change()) };
    // One that a person has made is theirs to clean up.
    if pv.annotations().get(PROVISIONED_BY).map(String::as_str) != Some(DRIVER) {
        return Ok(Action::await_change());
    }
    match fate(&pv) {
        Fate::Keep => {}
        Fate::Release => {
            if let Some(volume) = hub.volumes.get_opt(&handle).await? {
                // Else it would count as left over once its PersistentVolume is gone.
                volumes::mark(&volume, &hub).await?;
            }
            set_finalizer(&hub.pvs, pv.as_ref(), PV_FINALIZER, false).await?;
        }
        Fate::Destroy => {
            // Asked for once more, of the API: a claim may have taken it since.
            let Some(now) = hub.pvs.get_opt(&pv.name_any()).await? else { return Ok(Action::await_change()) };
            if fate(&now) == Fate::Destroy {
                destroy(&now, &handle, &hub).await?;
            }
        }
    }
    Ok(Action::requeue(RESYNC))
}

async fn destroy(pv: &PersistentVolume, handle: &str, hub: &Hub) -> kube::Result<()> {
    if let Some(volume) = hub.volumes.get_opt(handle).await? {
        if volume.metadata.deletion_timestamp.is_none() {
            tracing::info!(volume = handle, "its PersistentVolume was released: deleting");
            let exactly = DeleteParams {
                preconditions: Some(Preconditions { uid: volume.uid(), resource_version: None }),
                ..DeleteParams::default()
            };
            unless_gone(hub.volumes.delete(handle, &exactly).await)?;
        }
        // Its end is an event. One that is only kept for its snapshots is gone for those who had it.
        if !volume::is_kept(&volume) {
            return Ok(());
        }
    }
    if pv.metadata.deletion_timestamp.is_none() {
        let exactly = DeleteParams {
            preconditions: Some(Preconditions { uid: pv.uid(), resource_version: pv.resource_version() }),
            ..DeleteParams::default()
        };
        unless_gone(hub.pvs.delete(&pv.name_any(), &exactly).await)?;
        // Which is an event too, and the next step.
        return Ok(());
    }
    set_finalizer(&hub.pvs, pv, PV_FINALIZER, false).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fates() {
        for (phase, policy, going, wanted) in [
            ("Bound", "Delete", false, Fate::Keep),
            ("Bound", "Delete", true, Fate::Keep),
            ("Available", "Delete", false, Fate::Keep),
            ("Available", "Delete", true, Fate::Destroy),
            ("Released", "Delete", false, Fate::Destroy),
            ("Released", "Delete", true, Fate::Destroy),
            ("Failed", "Delete", false, Fate::Destroy),
            ("Released", "Retain", false, Fate::Keep),
            ("Released", "Retain", true, Fate::Release),
        ] {
            let mut pv: PersistentVolume = serde_json::from_value(serde_json::json!({
                "metadata": {}, "spec": { "persistentVolumeReclaimPolicy": policy }, "status": { "phase": phase },
            }))
            .unwrap();
            if going {
                let epoch = jiff::Timestamp::UNIX_EPOCH;
                pv.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(epoch));
            }
            assert_eq!(fate(&pv), wanted, "{phase} {policy} {going}");
        }
    }
}
