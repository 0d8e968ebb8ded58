//! Volumes, snapshots and room as CSI lists them.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Resource, ResourceExt};
use portolan_crds::{PortableVolume, TOPOLOGY_KEY, condition};
use portolan_runtime::conditions;
use tonic::Status;

use super::super::wish;
use super::{Service, api_failed, snapshots};
use crate::proto::csi::{
    ControllerGetVolumeResponse, GetCapacityRequest, GetCapacityResponse, ListSnapshotsRequest, ListSnapshotsResponse,
    ListVolumesRequest, ListVolumesResponse, Volume, VolumeCondition, VolumeContentSource,
    controller_get_volume_response, list_snapshots_response, list_volumes_response, volume_content_source,
};
use crate::volume;

/// ListVolumes: those that are there for their users.
pub(super) async fn volumes(service: &Service, request: &ListVolumesRequest) -> Result<ListVolumesResponse, Status> {
    let all = service.hub.volumes.list(&Default::default()).await.map_err(api_failed)?.items;
    let there = |volume: &PortableVolume| {
        volume.metadata.deletion_timestamp.is_none() && volume::status(volume).owner.is_some()
    };
    let (page, next_token) =
        page(all.into_iter().filter(there).collect(), &request.starting_token, request.max_entries)?;
    let entry = |volume: &PortableVolume| list_volumes_response::Entry {
        volume: Some(answer(service, volume, None)),
        status: Some(list_volumes_response::VolumeStatus {
            published_node_ids: Vec::new(),
            volume_condition: Some(condition_of(volume)),
        }),
    };
    Ok(ListVolumesResponse { entries: page.iter().map(entry).collect(), next_token })
}

/// ListSnapshots: those that are taken.
pub(super) async fn snapshots(
    service: &Service,
    request: &ListSnapshotsRequest,
) -> Result<ListSnapshotsResponse, Status> {
    let mut all = service.hub.snapshots.list(&Default::default()).await.map_err(api_failed)?.items;
    all.retain(|snapshot| {
        (request.snapshot_id.is_empty() || snapshot.name_any() == request.snapshot_id)
            && (request.source_volume_id.is_empty() || snapshot.spec.volume == request.source_volume_id)
            && snapshots::answer(snapshot).is_some()
    });
    let (page, next_token) = page(all, &request.starting_token, request.max_entries)?;
    let entries =
        page.iter().map(|snapshot| list_snapshots_response::Entry { snapshot: snapshots::answer(snapshot) }).collect();
    Ok(ListSnapshotsResponse { entries, next_token })
}

/// ControllerGetVolume.
pub(super) fn one(service: &Service, volume: &PortableVolume) -> ControllerGetVolumeResponse {
    ControllerGetVolumeResponse {
        volume: Some(answer(service, volume, None)),
        status: Some(controller_get_volume_response::VolumeStatus {
            published_node_ids: Vec::new(),
            volume_condition: Some(condition_of(volume)),
        }),
    }
}

/// GetCapacity: what the roomiest pool has left. A volume is on one pool, so the sum of several is of no use to anybody.
pub(super) async fn capacity(service: &Service, request: &GetCapacityRequest) -> Result<GetCapacityResponse, Status> {
    let zone = request.accessible_topology.as_ref().and_then(|topology| topology.segments.get(TOPOLOGY_KEY));
    if zone.is_some_and(|zone| *zone != service.hub.zone) {
        return Ok(GetCapacityResponse::default());
    }
    let candidates = wish::candidates(&service.hub.storage_nodes).await.map_err(api_failed)?;
    let available_capacity = candidates.first().map_or(0, |roomiest| roomiest.available);
    let maximum_volume_size = candidates.iter().map(|candidate| candidate.capacity).max();
    Ok(GetCapacityResponse { available_capacity, maximum_volume_size, minimum_volume_size: None })
}

/// A volume as CSI sees it.
pub(super) fn answer(service: &Service, volume: &PortableVolume, from: Option<VolumeContentSource>) -> Volume {
    let began = volume.spec.source.as_ref().map(|source| VolumeContentSource {
        r#type: Some(volume_content_source::Type::Snapshot(volume_content_source::SnapshotSource {
            snapshot_id: source.snapshot.clone(),
        })),
    });
    Volume {
        capacity_bytes: volume.spec.size_bytes,
        volume_id: volume.name_any(),
        volume_context: Default::default(),
        content_source: from.or(began),
        accessible_topology: vec![service.topology()],
    }
}

fn condition_of(volume: &PortableVolume) -> VolumeCondition {
    let status = volume::status(volume);
    match conditions::find(&status.conditions, condition::READY) {
        Some(ready) => {
            let well = ready.status == condition::TRUE || volume::awaits_key(volume);
            VolumeCondition { abnormal: !well, message: ready.message.clone() }
        }
        None => VolumeCondition { abnormal: true, message: "no node has said anything of it yet".to_owned() },
    }
}

/// One page of a list, oldest first, and the token of the next; what is deleted or made between two pages moves nothing else.
fn page<K: Resource>(mut all: Vec<K>, token: &str, entries: i32) -> Result<(Vec<K>, String), Status> {
    let place =
        |object: &K| (object.meta().creation_timestamp.clone().map_or(0, |Time(at)| seconds(at)), object.name_any());
    let entries = usize::try_from(entries)
        .map_err(|_| Status::invalid_argument(format!("max_entries is {entries}: expected 0 or more")))?;
    if !token.is_empty() {
        let wrong = || Status::aborted(format!("starting_token is {token:?}: not one that was given out"));
        let (at, name) = token.split_once('.').ok_or_else(wrong)?;
        let after = (at.parse::<i64>().map_err(|_| wrong())?, name.to_owned());
        all.retain(|object| place(object) > after);
    }
    all.sort_by_key(place);
    if entries == 0 || all.len() <= entries {
        return Ok((all, String::new()));
    }
    all.truncate(entries);
    let next = all.last().map(place).map(|(at, name)| format!("{at}.{name}")).unwrap_or_default();
    Ok((all, next))
}

fn seconds(at: Timestamp) -> i64 {
    at.as_second()
}

#[cfg(test)]
mod tests {
    use portolan_crds::PortableVolumeSpec;

    use super::*;

    fn volumes(names: &[(&str, i64)]) -> Vec<PortableVolume> {
        let made = |(name, at): &(&str, i64)| {
            let mut volume = PortableVolume::new(name, PortableVolumeSpec::default());
            volume.metadata.creation_timestamp = Some(Time(Timestamp::from_second(*at).unwrap()));
            volume
        };
        names.iter().map(made).collect()
    }

    #[test]
    fn pages_neither_repeat_nor_miss() {
        let names = |page: &[PortableVolume]| page.iter().map(ResourceExt::name_any).collect::<Vec<_>>();
        let (first, token) = page(volumes(&[("c", 1), ("a", 2), ("b", 1), ("d", 3)]), "", 2).unwrap();
        assert_eq!(names(&first), ["b", "c"]);
        // Both are deleted, and one is made.
        let (rest, end) = page(volumes(&[("a", 2), ("d", 3), ("0", 4)]), &token, 0).unwrap();
        assert_eq!((names(&rest), end.as_str()), (vec!["a".into(), "d".into(), "0".into()], ""));
        assert_eq!(page(volumes(&[]), "invalid-token", 0).unwrap_err().code(), tonic::Code::Aborted);
        assert_eq!(page(volumes(&[]), "", -1).unwrap_err().code(), tonic::Code::InvalidArgument);
    }
}
