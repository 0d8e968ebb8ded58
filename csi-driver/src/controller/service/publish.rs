//! ControllerPublishVolume: the volume is brought to the node.

use std::time::Instant;

use kube::ResourceExt;
use portolan_crds::PortableVolume;
use tonic::Status;

use super::super::attach::{ask_for_move, elsewhere, end_move, place};
use super::super::decide::{self, Decision};
use super::super::reading::ask_for_copy;
use super::super::wish::{Needs, no_pool};
use super::volumes::why_not;
use super::{PATIENCE, Service, api_failed, required, until};
use crate::proto::csi::ControllerPublishVolumeRequest;

/// Answers when the node may write the volume, or read it if nobody writes it.
pub(super) async fn publish(service: &Service, request: &ControllerPublishVolumeRequest) -> Result<(), Status> {
    let id = required("volume_id", &request.volume_id)?;
    let node = required("node_id", &request.node_id)?;
    let Some(capability) = &request.volume_capability else {
        return Err(Status::invalid_argument("volume_capability is missing"));
    };
    let hub = &service.hub;
    let mut volume = service.volume(id).await?;
    if let Some(why) = why_not(&volume.spec, std::slice::from_ref(capability), false) {
        return Err(Status::invalid_argument(why));
    }
    if hub.storage_nodes.get_opt(node).await.map_err(api_failed)?.is_none() {
        return Err(Status::not_found(format!("node {node} has no StorageNode: the storage agent has not run there")));
    }
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        let mut decision = decide::decide(&volume, node, &[]);
        if matches!(decision, Decision::Move | Decision::Stay | Decision::Place) {
            let others = elsewhere(hub, id, node).await.map_err(api_failed)?;
            decision = decide::decide(&volume, node, &others);
        }
        match decision {
            Decision::Attached if volume.spec.is_shared() => return Ok(()),
            Decision::Attached => return place(hub, &volume, node).await.map_err(api_failed),
            Decision::Copy => {
                if let Some(why) = ask_for_copy(hub, &volume, node).await.map_err(api_failed)? {
                    return Err(Status::unavailable(why));
                }
            }
            // Not that another node has it, which is what FAILED_PRECONDITION says here: it is to be tried again.
            Decision::Refuse(why) if volume.spec.is_shared() => {
                return Err(Status::unavailable(format!("volume {id}: {why}")));
            }
            Decision::Refuse(why) => return Err(Status::failed_precondition(format!("volume {id}: {why}"))),
            Decision::Move | Decision::Place => {
                let needs = Needs::of(&volume.spec);
                if let Some(why) = no_pool(&hub.storage_nodes, node, needs).await.map_err(api_failed)? {
                    return Err(Status::failed_precondition(why));
                }
                let asked = match decision {
                    Decision::Place => place(hub, &volume, node).await,
                    _ => ask_for_move(hub, &volume, node).await,
                };
                asked.map_err(api_failed)?;
            }
            Decision::Stay => end_move(hub, &volume, node).await.map_err(api_failed)?,
            Decision::Wait => {}
        }
        let read = volume.resource_version();
        let changed = |now: Option<&PortableVolume>| now.is_none_or(|now| now.resource_version() != read);
        let now = until(&hub.volumes, id, changed).await?;
        volume = now.ok_or_else(|| Status::not_found(format!("there is no volume {id}")))?;
    }
    let goes = if volume.spec.is_shared() { "is being copied" } else { "is moving" };
    Err(Status::aborted(format!("volume {id} {goes} to node {node}")))
}
