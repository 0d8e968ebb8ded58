//! Taking and deleting snapshots.

use kube::ResourceExt;
use kube::api::{DeleteParams, PostParams};
use portolan_crds::PortableSnapshot;
use tonic::Status;

use super::super::{source, unless_gone};
use super::{Service, api_failed, id_of, required, until};
use crate::proto::csi::{CreateSnapshotRequest, CreateSnapshotResponse, Snapshot};

/// Parameters that the sidecar adds under this prefix are not ours to judge.
const FOREIGN_PREFIX: &str = "csi.storage.k8s.io/";

/// CreateSnapshot: answered when it is taken.
pub(super) async fn create(
    service: &Service,
    request: CreateSnapshotRequest,
) -> Result<CreateSnapshotResponse, Status> {
    let id = id_of("name", &request.name)?;
    let volume = required("source_volume_id", &request.source_volume_id)?;
    check_parameters(request.parameters.keys())?;
    let taken = take(service, source::snapshot(&id, volume)).await?;
    Ok(CreateSnapshotResponse { snapshot: answer(&taken) })
}

/// No parameter is known.
pub(super) fn check_parameters<'a>(mut names: impl Iterator<Item = &'a String>) -> Result<(), Status> {
    match names.find(|name| !name.starts_with(FOREIGN_PREFIX)) {
        Some(name) => {
            Err(Status::invalid_argument(format!("VolumeSnapshotClass parameter {name:?} is unknown: there are none")))
        }
        None => Ok(()),
    }
}

/// Asks for a snapshot and waits for it.
async fn take(service: &Service, wanted: PortableSnapshot) -> Result<PortableSnapshot, Status> {
    let id = wanted.name_any();
    ask(service, wanted).await?;
    taken(service, &id).await
}

/// Makes the object. Idempotent, if it asks for the same.
pub(super) async fn ask(service: &Service, wanted: PortableSnapshot) -> Result<(), Status> {
    let hub = &service.hub;
    let id = wanted.name_any();
    if let Some(present) = hub.snapshots.get_opt(&id).await.map_err(api_failed)? {
        if present.metadata.deletion_timestamp.is_some() {
            return Err(Status::aborted(format!("snapshot {id} is being deleted")));
        }
        if present.spec != wanted.spec {
            let message = format!("snapshot {id} is there, of volume {}", present.spec.volume);
            return Err(Status::already_exists(message));
        }
        return Ok(());
    }
    service.volume(&wanted.spec.volume).await?;
    match hub.snapshots.create(&PostParams::default(), &wanted).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => {
            Err(Status::aborted(format!("snapshot {id} is being made by another call")))
        }
        result => result.map(drop).map_err(api_failed),
    }
}

/// Waits for a snapshot that was asked for.
pub(super) async fn taken(service: &Service, id: &str) -> Result<PortableSnapshot, Status> {
    let taken = |now: Option<&PortableSnapshot>| now.is_none_or(|now| now.guid().is_some());
    let found = until(&service.hub.snapshots, id, taken).await?;
    found.ok_or_else(|| Status::aborted(format!("snapshot {id} was deleted while it was taken")))
}

/// DeleteSnapshot: decided once the object is being deleted; nodes that can't be reached now destroy theirs when they are back.
pub(super) async fn delete(service: &Service, id: &str) -> Result<(), Status> {
    unless_gone(service.hub.snapshots.delete(id, &DeleteParams::default()).await).map(drop).map_err(api_failed)
}

/// A snapshot as CSI sees it; none if it isn't taken or is being deleted.
pub(super) fn answer(snapshot: &PortableSnapshot) -> Option<Snapshot> {
    let status = snapshot.status.as_ref().filter(|_| snapshot.metadata.deletion_timestamp.is_none())?;
    let at = status.taken_at.as_ref().filter(|_| status.guid.is_some())?.0;
    let creation_time = prost_types::Timestamp { seconds: at.as_second(), nanos: at.subsec_nanosecond() };
    Some(Snapshot {
        size_bytes: status.size_bytes.unwrap_or_default(),
        snapshot_id: snapshot.name_any(),
        source_volume_id: snapshot.spec.volume.clone(),
        creation_time: Some(creation_time),
        ready_to_use: true,
        group_snapshot_id: snapshot.spec.group.as_ref().map(|group| group.name.clone()).unwrap_or_default(),
    })
}
