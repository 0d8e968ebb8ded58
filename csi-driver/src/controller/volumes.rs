//! PortableVolumes: their finalizer, their deletion, and those that nobody wants any more.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use kube::api::{Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{Controller, watcher};
use kube::{Api, ResourceExt};
use portolan_crds::{HandoffPhase, PortableVolume, VOLUME_FINALIZER, VolumePhase, condition};
use portolan_runtime::conditions;
use serde_json::json;

use super::reading::end_copy;
use super::{Hub, PROVISIONED, RESYNC, exhaust, retry, set_finalizer, unless_gone};
use crate::volume;

/// How often a deletion that waits for nodes looks whether they still exist.
const DELETING: Duration = Duration::from_secs(15);

/// How often a running move is looked at for a source that is gone.
const MOVING: Duration = Duration::from_secs(10);

/// The name of the volume of a claim, and of its PersistentVolume.
pub(super) fn name_of(claim: &PersistentVolumeClaim) -> Option<String> {
    claim.uid().map(|uid| format!("pvc-{uid}"))
}

pub(super) async fn run(hub: Arc<Hub>) {
    let claims: Api<PersistentVolumeClaim> = Api::all(hub.client.clone());
    let stream = Controller::new(hub.volumes.clone(), watcher::Config::default())
        .watches(claims, watcher::Config::default(), |claim| name_of(&claim).map(|name| ObjectRef::new(&name)))
        .watches(hub.pvs.clone(), watcher::Config::default(), |pv: PersistentVolume| {
            pv.spec.and_then(|spec| spec.csi).map(|csi| ObjectRef::new(&csi.volume_handle))
        })
        .run(reconcile, retry, hub.clone());
    exhaust("volumes", stream).await;
}

/// Looks at one of them.
pub(crate) async fn reconcile(volume: Arc<PortableVolume>, hub: Arc<Hub>) -> kube::Result<Action> {
    if volume.metadata.deletion_timestamp.is_some() {
        return delete(&volume, &hub).await;
    }
    set_finalizer(&hub.volumes, volume.as_ref(), VOLUME_FINALIZER, true).await?;
    if !volume.annotations().contains_key(PROVISIONED) && !volume.spec.claim_uid.is_empty() {
        collect(&volume, &hub).await?;
    }
    if end_copy(&hub, &volume).await? {
        return Ok(Action::requeue(RESYNC));
    }
    if volume.status.as_ref().is_some_and(|status| status.handoff.is_some()) {
        name_dead_source(&volume, &hub).await?;
        return Ok(Action::requeue(MOVING));
    }
    Ok(Action::requeue(RESYNC))
}

/// Says so if a move can't begin or go on because its source is not there. It waits: the source may have the only copy of what
/// was written last, and an unreachable node may be writing still.
async fn name_dead_source(volume: &PortableVolume, hub: &Hub) -> kube::Result<()> {
    let mut status = volume::status(volume);
    let Some(handoff) = status.handoff.as_mut().filter(|handoff| handoff.phase < HandoffPhase::Activating) else {
        return Ok(());
    };
    let node = hub.nodes.get_opt(&handoff.from).await?;
    let why = match &node {
        None => "no longer exists",
        Some(node) if !is_ready(node) => "is not ready",
        Some(_) => return Ok(()),
    };
    let what = if volume.spec.is_shared() && handoff.phase == HandoffPhase::PreCopy { "copy" } else { "move" };
    let message = format!(
        "node {}, which has the data at epoch {}, {why}: the {what} goes on when it is back",
        handoff.from, status.epoch
    );
    if handoff.last_error.as_ref() == Some(&message) {
        return Ok(());
    }
    handoff.last_error = Some(message.clone());
    conditions::set(&mut status.conditions, condition::READY, condition::FALSE, "SourceNotReady", &message, None);
    let mut next = volume.clone();
    next.status = Some(status);
    hub.volumes.replace_status(&volume.name_any(), &PostParams::default(), &next).await?;
    hub.events.warning(&volume::reference(volume), "SourceNotReady", "Handoff", &message).await;
    Ok(())
}

/// Whether a node's kubelet says that it is well.
pub(super) fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True"))
}

/// Deletes a volume whose claim went before it had a PersistentVolume; marks it once it has one.
async fn collect(volume: &PortableVolume, hub: &Hub) -> kube::Result<()> {
    let name = volume.name_any();
    if hub.pvs.get_opt(&name).await?.is_some() {
        return mark(volume, hub).await;
    }
    let Some((namespace, claim)) = volume.spec.claim.split_once('/') else { return Ok(()) };
    let found = hub.claims(namespace).get_opt(claim).await?;
    if found.is_some_and(|found| found.uid().as_ref() == Some(&volume.spec.claim_uid)) {
        return Ok(());
    }
    tracing::info!(
        volume = name,
        claim = volume.spec.claim,
        "the claim is gone and there is no PersistentVolume: deleting"
    );
    let exactly = kube::api::DeleteParams {
        // A PersistentVolume that was made meanwhile has marked the volume, which makes it another version.
        preconditions: Some(Preconditions { uid: volume.uid(), resource_version: volume.resource_version() }),
        ..Default::default()
    };
    unless_gone(hub.volumes.delete(&name, &exactly).await)?;
    Ok(())
}

/// Marks a volume as one that has a PersistentVolume. Idempotent.
pub(super) async fn mark(volume: &PortableVolume, hub: &Hub) -> kube::Result<()> {
    if volume.annotations().contains_key(PROVISIONED) {
        return Ok(());
    }
    let patch = Patch::Merge(json!({ "metadata": { "annotations": { PROVISIONED: "true" } } }));
    unless_gone(hub.volumes.patch(&volume.name_any(), &PatchParams::default(), &patch).await)?;
    Ok(())
}

async fn delete(volume: &PortableVolume, hub: &Hub) -> kube::Result<Action> {
    let status = volume::status(volume);
    if status.replicas.is_empty() {
        // With the version that was read: no agent has recorded itself since.
        set_finalizer(&hub.volumes, volume, VOLUME_FINALIZER, false).await?;
        return Ok(Action::await_change());
    }
    let mut next = status.clone();
    let mut gone = Vec::new();
    for replica in &status.replicas {
        if hub.nodes.get_opt(&replica.node).await?.is_none() {
            gone.push(replica.node.clone());
        }
    }
    next.replicas.retain(|replica| !gone.contains(&replica.node));
    next.phase = VolumePhase::Deleting;
    let waiting: Vec<&str> = next.replicas.iter().map(|replica| replica.node.as_str()).collect();
    // An agent that has more to say, that it is still mounted or that its pool is gone, has said it here.
    let said = conditions::find(&status.conditions, condition::READY)
        .is_some_and(|ready| ["Deleting", volume::STEP_FAILED, volume::KEPT].contains(&ready.reason.as_str()));
    if !said || !gone.is_empty() {
        let message = format!("waiting for these nodes to destroy their copies: {}", waiting.join(", "));
        conditions::set(&mut next.conditions, condition::READY, condition::FALSE, "Deleting", &message, None);
    }
    if next != status {
        let mut written = volume.clone();
        written.status = Some(next);
        unless_gone(hub.volumes.replace_status(&volume.name_any(), &PostParams::default(), &written).await)?;
    }
    for node in gone {
        let message = format!("node {node} no longer exists: its copy of the volume is not waited for");
        hub.events.warning(&volume::reference(volume), "ReplicaLost", "Delete", &message).await;
    }
    Ok(Action::requeue(DELETING))
}
