//! VolumeAttachments: answered when the node may write the volume, which may need a move first; or read it, which may need a copy.
//!
//! Detaching proves nothing about the node that had the volume and asks nothing of it: the proof that it writes no more is its
//! own agent's, in the handoff.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::PersistentVolume;
use k8s_openapi::api::storage::v1::VolumeAttachment;
use kube::ResourceExt;
use kube::api::{Patch, PatchParams};
use kube::runtime::controller::Action;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::{Controller, watcher};
use portolan_crds::{ATTACH_FINALIZER, DRIVER, PortableVolume};
use serde_json::json;

use super::decide::{self, Decision, Other};
use super::reading::ask_for_copy;
use super::wish::{Needs, no_pool};
use super::{Hub, RESYNC, exhaust, retry, set_finalizer};
use crate::handoff::{Ask, Event};
use crate::volume;
use crate::write::{self, WriteError};

/// How soon an attachment is looked at again that can't be answered yet: events come first.
const WAITING: std::time::Duration = std::time::Duration::from_secs(5);

pub(super) async fn run(hub: Arc<Hub>) {
    let controller = Controller::new(hub.attachments.clone(), watcher::Config::default());
    let (of_volume, of_siblings) = (controller.store(), controller.store());
    // The name of a volume that Portolan has provisioned is its PersistentVolume's.
    let stream = controller
        .watches(hub.volumes.clone(), watcher::Config::default(), move |volume: PortableVolume| {
            attachments_of(&of_volume, &volume.name_any())
        })
        .watches(hub.attachments.clone(), watcher::Config::default(), move |attachment: VolumeAttachment| {
            attachment
                .spec
                .source
                .persistent_volume_name
                .map(|pv| attachments_of(&of_siblings, &pv))
                .unwrap_or_default()
        })
        .run(reconcile, retry, hub.clone());
    exhaust("volume attachments", stream).await;
}

fn attachments_of(store: &Store<VolumeAttachment>, pv: &str) -> Vec<ObjectRef<VolumeAttachment>> {
    let of_pv = |attachment: &VolumeAttachment| {
        attachment.spec.attacher == DRIVER && attachment.spec.source.persistent_volume_name.as_deref() == Some(pv)
    };
    store
        .state()
        .iter()
        .filter(|attachment| of_pv(attachment))
        .map(|attachment| ObjectRef::from_obj(attachment.as_ref()))
        .collect()
}

/// Looks at one of them.
pub(super) async fn reconcile(attachment: Arc<VolumeAttachment>, hub: Arc<Hub>) -> kube::Result<Action> {
    if attachment.spec.attacher != DRIVER {
        return Ok(Action::await_change());
    }
    if attachment.metadata.deletion_timestamp.is_some() {
        set_finalizer(&hub.attachments, attachment.as_ref(), ATTACH_FINALIZER, false).await?;
        return Ok(Action::await_change());
    }
    if attachment.status.as_ref().is_some_and(|status| status.attached) {
        return Ok(Action::requeue(RESYNC));
    }
    let volume = match find(&hub, &attachment).await? {
        Ok(volume) => volume,
        Err(why) => return refuse(&hub, &attachment, &why).await,
    };
    let node = &attachment.spec.node_name;
    let mut decision = decide::decide(&volume, node, &[]);
    if matches!(decision, Decision::Move | Decision::Stay | Decision::Place) {
        // Only then does it matter who else has it; asking is a list.
        let pv = attachment.spec.source.persistent_volume_name.as_deref().unwrap_or_default();
        decision = decide::decide(&volume, node, &elsewhere(&hub, pv, node).await?);
    }
    tracing::debug!(volume = volume.name_any(), node, ?decision, "attachment");
    match decision {
        Decision::Attached => {
            set_finalizer(&hub.attachments, attachment.as_ref(), ATTACH_FINALIZER, true).await?;
            let patch = json!({ "status": { "attached": true, "attachError": null } });
            hub.attachments.patch_status(&attachment.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await?;
            tracing::info!(volume = volume.name_any(), node, "attached");
            if !volume.spec.is_shared() {
                place(&hub, &volume, node).await?;
            }
            Ok(Action::requeue(RESYNC))
        }
        Decision::Copy => match ask_for_copy(&hub, &volume, node).await? {
            Some(why) => refuse(&hub, &attachment, &why).await,
            None => Ok(Action::requeue(WAITING)),
        },
        Decision::Move => start_move(&hub, &attachment, &volume).await,
        Decision::Place => {
            if let Some(why) = no_pool(&hub.storage_nodes, node, Needs::of(&volume.spec)).await? {
                return refuse(&hub, &attachment, &why).await;
            }
            place(&hub, &volume, node).await?;
            Ok(Action::requeue(WAITING))
        }
        Decision::Stay => {
            end_move(&hub, &volume, node).await?;
            Ok(Action::requeue(WAITING))
        }
        Decision::Wait => Ok(Action::requeue(WAITING)),
        Decision::Refuse(why) => refuse(&hub, &attachment, &format!("volume {}: {why}", volume.name_any())).await,
    }
}

async fn find(hub: &Hub, attachment: &VolumeAttachment) -> kube::Result<Result<PortableVolume, String>> {
    let Some(name) = &attachment.spec.source.persistent_volume_name else {
        return Ok(Err("the attachment names no PersistentVolume: inline volumes are not possible".to_owned()));
    };
    // Nearly always the volume's name: one look-up instead of two.
    if let Some(volume) = hub.volumes.get_opt(name).await? {
        return Ok(Ok(volume));
    }
    let pv: Option<PersistentVolume> = hub.pvs.get_opt(name).await?;
    let Some(handle) = pv.and_then(|pv| pv.spec?.csi).map(|csi| csi.volume_handle) else {
        return Ok(Err(format!("there is no PersistentVolume {name} with a CSI volume")));
    };
    let volume = hub.volumes.get_opt(&handle).await?;
    Ok(volume.ok_or_else(|| format!("there is no PortableVolume {handle}")))
}

/// The other attachments of a PersistentVolume, asked of the API: a watch may be behind. Without those that are being deleted before
/// anybody was told anything.
pub(super) async fn elsewhere(hub: &Hub, pv: &str, node: &str) -> kube::Result<Vec<Other>> {
    let all = hub.attachments.list(&Default::default()).await?;
    let other = |it: VolumeAttachment| {
        let ours = it.spec.attacher == DRIVER && it.spec.source.persistent_volume_name.as_deref() == Some(pv);
        let attached = it.status.as_ref().is_some_and(|status| status.attached);
        let counts = ours && it.spec.node_name != node && (attached || it.metadata.deletion_timestamp.is_none());
        counts.then_some(Other { node: it.spec.node_name, attached })
    };
    Ok(all.items.into_iter().filter_map(other).collect())
}

async fn start_move(hub: &Hub, attachment: &VolumeAttachment, volume: &PortableVolume) -> kube::Result<Action> {
    let node = &attachment.spec.node_name;
    if let Some(why) = no_pool(&hub.storage_nodes, node, Needs::of(&volume.spec)).await? {
        return refuse(hub, attachment, &why).await;
    }
    ask_for_move(hub, volume, node).await?;
    set_finalizer(&hub.attachments, attachment, ATTACH_FINALIZER, true).await?;
    Ok(Action::requeue(WAITING))
}

/// Writes that the volume moves to `node`, whose pod waits for it.
pub(super) async fn ask_for_move(hub: &Hub, volume: &PortableVolume, node: &str) -> kube::Result<()> {
    let ask = Ask { to: node.to_owned(), ..Ask::default() };
    if !happen(hub, volume, Event::Asked(ask, write::now())).await? {
        return Ok(());
    }
    hub.moves.inc();
    let from = volume::status(volume).owner.unwrap_or_default();
    tracing::info!(volume = volume.name_any(), from, to = node, "asked for a move");
    // The move goes on without what follows; what fails here is done when it has ended.
    place(hub, volume, node).await
}

/// Writes that the volume stays on its `node`.
pub(super) async fn end_move(hub: &Hub, volume: &PortableVolume, node: &str) -> kube::Result<()> {
    let why = format!("the volume is wanted on node {node} again");
    happen(hub, volume, Event::Aborted { why, at: write::now() }).await?;
    place(hub, volume, node).await
}

/// Writes an event, whoever else writes meanwhile: whether it can happen still is checked on each object anew. False if it can't, so that the
/// volume has to be looked at again.
pub(super) async fn happen(hub: &Hub, volume: &PortableVolume, event: Event) -> kube::Result<bool> {
    let mut read = volume.clone();
    loop {
        match write::event(&hub.volumes, &read, event.clone()).await {
            Ok(_) => return Ok(true),
            Err(WriteError::Refused(refused)) => {
                tracing::info!(volume = volume.name_any(), %refused);
                return Ok(false);
            }
            Err(WriteError::Api(error)) if write::is_conflict(&error) => {
                read = hub.volumes.get(&volume.name_any()).await?;
            }
            Err(WriteError::Api(error)) => return Err(error),
        }
    }
}

/// Says where the volume is wanted now.
pub(super) async fn place(hub: &Hub, volume: &PortableVolume, node: &str) -> kube::Result<()> {
    if volume.spec.placement.node == node {
        return Ok(());
    }
    let patch = Patch::Merge(json!({ "spec": { "placement": { "node": node } } }));
    hub.volumes.patch(&volume.name_any(), &PatchParams::default(), &patch).await?;
    Ok(())
}

async fn refuse(hub: &Hub, attachment: &VolumeAttachment, why: &str) -> kube::Result<Action> {
    let said = attachment.status.as_ref().and_then(|status| status.attach_error.as_ref()?.message.as_deref());
    if said != Some(why) {
        tracing::warn!(attachment = attachment.name_any(), node = attachment.spec.node_name, why, "can't attach");
        let error = json!({ "message": why, "time": Timestamp::now().to_string() });
        let patch = json!({ "status": { "attached": false, "attachError": error } });
        hub.attachments.patch_status(&attachment.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await?;
    }
    Ok(Action::requeue(WAITING))
}
