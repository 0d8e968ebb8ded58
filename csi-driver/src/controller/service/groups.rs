//! Snapshots of several volumes, of one moment: possible where one node has them all.

use std::collections::BTreeSet;

use kube::ResourceExt;
use kube::api::ListParams;
use portolan_crds::{PortableSnapshot, SnapshotGroup};
use tonic::{Request, Response, Status};

use super::super::source;
use super::{Service, api_failed, id_of, required, snapshots};
use crate::proto::csi::{
    CreateVolumeGroupSnapshotRequest, CreateVolumeGroupSnapshotResponse, DeleteVolumeGroupSnapshotRequest,
    DeleteVolumeGroupSnapshotResponse, GetVolumeGroupSnapshotRequest, GetVolumeGroupSnapshotResponse,
    GroupControllerGetCapabilitiesRequest, GroupControllerGetCapabilitiesResponse, GroupControllerServiceCapability,
    VolumeGroupSnapshot, group_controller_server, group_controller_service_capability,
    group_controller_service_capability::{Rpc, rpc},
};
use crate::volume;

#[tonic::async_trait]
impl group_controller_server::GroupController for Service {
    async fn group_controller_get_capabilities(
        &self,
        _: Request<GroupControllerGetCapabilitiesRequest>,
    ) -> Result<Response<GroupControllerGetCapabilitiesResponse>, Status> {
        let offer = rpc::Type::CreateDeleteGetVolumeGroupSnapshot.into();
        let rpc = group_controller_service_capability::Type::Rpc(Rpc { r#type: offer });
        let capabilities = vec![GroupControllerServiceCapability { r#type: Some(rpc) }];
        Ok(Response::new(GroupControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn create_volume_group_snapshot(
        &self,
        request: Request<CreateVolumeGroupSnapshotRequest>,
    ) -> Result<Response<CreateVolumeGroupSnapshotResponse>, Status> {
        let request = request.into_inner();
        let id = id_of("name", &request.name)?;
        snapshots::check_parameters(request.parameters.keys())?;
        let volumes: BTreeSet<String> = request.source_volume_ids.into_iter().collect();
        create(self, &id, &volumes).await?;
        for volume in &volumes {
            snapshots::taken(self, &member_name(&id, volume)).await?;
        }
        let group_snapshot = Some(answer(self, &id).await?);
        Ok(Response::new(CreateVolumeGroupSnapshotResponse { group_snapshot }))
    }

    async fn delete_volume_group_snapshot(
        &self,
        request: Request<DeleteVolumeGroupSnapshotRequest>,
    ) -> Result<Response<DeleteVolumeGroupSnapshotResponse>, Status> {
        let id = required("group_snapshot_id", &request.get_ref().group_snapshot_id)?;
        for member in members(self, id).await? {
            snapshots::delete(self, &member.name_any()).await?;
        }
        Ok(Response::new(DeleteVolumeGroupSnapshotResponse {}))
    }

    async fn get_volume_group_snapshot(
        &self,
        request: Request<GetVolumeGroupSnapshotRequest>,
    ) -> Result<Response<GetVolumeGroupSnapshotResponse>, Status> {
        let id = required("group_snapshot_id", &request.get_ref().group_snapshot_id)?;
        Ok(Response::new(GetVolumeGroupSnapshotResponse { group_snapshot: Some(answer(self, id).await?) }))
    }
}

/// Asks for the group's snapshots. None is taken before all are asked for, so a call that is cut short leaves nothing half-taken.
async fn create(service: &Service, id: &str, volumes: &BTreeSet<String>) -> Result<(), Status> {
    if volumes.is_empty() {
        return Err(Status::invalid_argument("source_volume_ids is empty"));
    }
    let mut owners = BTreeSet::new();
    for volume in volumes {
        let found = service.volume(volume).await?;
        owners.insert(volume::status(&found).owner.unwrap_or_else(|| "no node yet".to_owned()));
    }
    if owners.len() > 1 {
        let owners = owners.into_iter().collect::<Vec<_>>().join(", ");
        let message =
            format!("the volumes of group {id} are on different pools ({owners}): there is no one moment for them");
        return Err(Status::failed_precondition(message));
    }
    let group = SnapshotGroup { name: id.to_owned(), members: u32::try_from(volumes.len()).unwrap_or(u32::MAX) };
    for volume in volumes {
        let mut member = source::snapshot(&member_name(id, volume), volume);
        member.spec.snapshot = Some(id.to_owned());
        member.spec.group = Some(group.clone());
        snapshots::ask(service, member).await?;
    }
    Ok(())
}

/// The name of the snapshot of one volume of a group.
fn member_name(group: &str, volume: &str) -> String {
    format!("{group}-{}", &blake3::hash(volume.as_bytes()).to_hex()[..12])
}

async fn members(service: &Service, id: &str) -> Result<Vec<PortableSnapshot>, Status> {
    // What can't be a group's name is none: it would be a malformed selector.
    if id_of("group_snapshot_id", id)? != id {
        return Ok(Vec::new());
    }
    let of_group = ListParams::default().fields(&format!("spec.group.name={id}"));
    Ok(service.hub.snapshots.list(&of_group).await.map_err(api_failed)?.items)
}

async fn answer(service: &Service, id: &str) -> Result<VolumeGroupSnapshot, Status> {
    let members = members(service, id).await?;
    let snapshots: Vec<_> = members.iter().filter_map(snapshots::answer).collect();
    if snapshots.is_empty() {
        return Err(Status::not_found(format!("there is no group snapshot {id}")));
    }
    Ok(VolumeGroupSnapshot {
        group_snapshot_id: id.to_owned(),
        creation_time: snapshots.iter().filter_map(|snapshot| snapshot.creation_time).min_by_key(|time| time.seconds),
        ready_to_use: snapshots.len() == members.len(),
        snapshots,
    })
}
