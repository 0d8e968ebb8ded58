//! The CSI Controller and GroupController services. They do nothing themselves: a call writes what is wanted into the API, waits a while for
//! the leader and the nodes' agents to make it so, and says `ABORTED` if it is not so yet. Called again, it goes on waiting.

mod groups;
mod list;
mod publish;
mod snapshots;
mod volumes;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use kube::Api;
use kube::runtime::wait::{Condition, await_condition};
use portolan_crds::{PortableVolume, TOPOLOGY_KEY};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::Hub;
use crate::identity::Identity;
use crate::parameters::Refusal;
use crate::proto::csi::{
    ControllerExpandVolumeRequest, ControllerExpandVolumeResponse, ControllerGetCapabilitiesRequest,
    ControllerGetCapabilitiesResponse, ControllerGetVolumeRequest, ControllerGetVolumeResponse,
    ControllerModifyVolumeRequest, ControllerModifyVolumeResponse, ControllerPublishVolumeRequest,
    ControllerPublishVolumeResponse, ControllerServiceCapability, ControllerUnpublishVolumeRequest,
    ControllerUnpublishVolumeResponse, CreateSnapshotRequest, CreateSnapshotResponse, CreateVolumeRequest,
    CreateVolumeResponse, DeleteSnapshotRequest, DeleteSnapshotResponse, DeleteVolumeRequest, DeleteVolumeResponse,
    GetCapacityRequest, GetCapacityResponse, GetSnapshotRequest, GetSnapshotResponse, ListSnapshotsRequest,
    ListSnapshotsResponse, ListVolumesRequest, ListVolumesResponse, Topology, ValidateVolumeCapabilitiesRequest,
    ValidateVolumeCapabilitiesResponse, controller_server, controller_service_capability,
    controller_service_capability::{Rpc, rpc},
    group_controller_server::GroupControllerServer,
    identity_server::IdentityServer,
};
use crate::socket;

/// How long a call waits for what it asked for: less than the sidecars' own patience (`--timeout=60s` in the chart).
const PATIENCE: Duration = Duration::from_secs(50);
/// The longest name that becomes an object's as it is: it must fit a label and a ZFS name, with what we put before it.
const LONGEST_ID: usize = 63;

/// The services, on what the controller's loops see too.
#[derive(Clone)]
pub(super) struct Service {
    hub: Arc<Hub>,
}

/// Serves until `shutdown`; nothing without a socket.
pub(super) async fn serve(hub: Arc<Hub>, path: Option<PathBuf>, shutdown: CancellationToken) -> anyhow::Result<()> {
    let Some(path) = path else {
        shutdown.cancelled().await;
        return Ok(());
    };
    let incoming = socket::listen(&path).with_context(|| format!("can't listen at {}", path.display()))?;
    let service = Service { hub };
    Server::builder()
        .add_service(IdentityServer::new(Identity))
        .add_service(controller_server::ControllerServer::new(service.clone()))
        .add_service(GroupControllerServer::new(service))
        .serve_with_incoming_shutdown(incoming, shutdown.cancelled())
        .await
        .context("the CSI server ended")
}

/// The id of what was asked for by `name`: the name itself if an object can be called so, else one made from it, always the same.
fn id_of(field: &'static str, name: &str) -> Result<String, Status> {
    if name.is_empty() {
        return Err(Status::invalid_argument(format!("{field} is empty")));
    }
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let edges = name.bytes().next().zip(name.bytes().last()).is_some_and(|(a, z)| a != b'-' && z != b'-');
    if name.len() <= LONGEST_ID && edges && name.bytes().all(plain) {
        return Ok(name.to_owned());
    }
    Ok(format!("id-{}", &blake3::hash(name.as_bytes()).to_hex()[..32]))
}

/// What a call names must be there to name it.
fn required<'a>(field: &'static str, value: &'a str) -> Result<&'a str, Status> {
    match value {
        "" => Err(Status::invalid_argument(format!("{field} is empty"))),
        value => Ok(value),
    }
}

fn refused(refusal: Refusal) -> Status {
    Status::invalid_argument(refusal.to_string())
}

fn api_failed(error: kube::Error) -> Status {
    match &error {
        kube::Error::Api(status) if status.is_conflict() => {
            Status::aborted("somebody else has changed it meanwhile: try again".to_owned())
        }
        _ => Status::unavailable(format!("the Kubernetes API: {error}")),
    }
}

fn map(given: HashMap<String, String>) -> BTreeMap<String, String> {
    given.into_iter().collect()
}

/// Waits until an object is as wanted, or gone; gives up in time.
async fn until<K>(api: &Api<K>, name: &str, wanted: impl Condition<K>) -> Result<Option<K>, Status>
where
    K: kube::Resource + Clone + std::fmt::Debug + Send + serde::de::DeserializeOwned + 'static,
{
    match tokio::time::timeout(PATIENCE, await_condition(api.clone(), name, wanted)).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(Status::unavailable(format!("the Kubernetes API: {error}"))),
        Err(_) => Err(Status::aborted(format!("{name}: not done within {PATIENCE:?}, and still being worked on"))),
    }
}

impl Service {
    /// A volume that is there for its users.
    async fn volume(&self, id: &str) -> Result<PortableVolume, Status> {
        let found = self.hub.volumes.get_opt(id).await.map_err(api_failed)?;
        let found = found.filter(|volume| volume.metadata.deletion_timestamp.is_none());
        found.ok_or_else(|| Status::not_found(format!("there is no volume {id}")))
    }

    fn topology(&self) -> Topology {
        Topology { segments: HashMap::from([(TOPOLOGY_KEY.to_owned(), self.hub.zone.clone())]) }
    }
}

#[tonic::async_trait]
impl controller_server::Controller for Service {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        Ok(Response::new(volumes::create(self, request.into_inner()).await?))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        volumes::delete(self, required("volume_id", &request.get_ref().volume_id)?).await?;
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn controller_publish_volume(
        &self,
        request: Request<ControllerPublishVolumeRequest>,
    ) -> Result<Response<ControllerPublishVolumeResponse>, Status> {
        publish::publish(self, request.get_ref()).await?;
        Ok(Response::new(ControllerPublishVolumeResponse::default()))
    }

    /// Asks nothing of the node and proves nothing about it: that it writes no more is its own agent's to say, when the volume moves.
    async fn controller_unpublish_volume(
        &self,
        request: Request<ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<ControllerUnpublishVolumeResponse>, Status> {
        required("volume_id", &request.get_ref().volume_id)?;
        Ok(Response::new(ControllerUnpublishVolumeResponse {}))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        Ok(Response::new(volumes::validate(self, request.into_inner()).await?))
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        Ok(Response::new(list::volumes(self, request.get_ref()).await?))
    }

    async fn get_capacity(
        &self,
        request: Request<GetCapacityRequest>,
    ) -> Result<Response<GetCapacityResponse>, Status> {
        Ok(Response::new(list::capacity(self, request.get_ref()).await?))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let offered = [
            rpc::Type::CreateDeleteVolume,
            rpc::Type::PublishUnpublishVolume,
            rpc::Type::ListVolumes,
            rpc::Type::GetCapacity,
            rpc::Type::CreateDeleteSnapshot,
            rpc::Type::ListSnapshots,
            rpc::Type::CloneVolume,
            rpc::Type::ExpandVolume,
            rpc::Type::GetVolume,
            rpc::Type::VolumeCondition,
            rpc::Type::SingleNodeMultiWriter,
            rpc::Type::ModifyVolume,
        ];
        let capabilities = offered
            .map(|offer| ControllerServiceCapability {
                r#type: Some(controller_service_capability::Type::Rpc(Rpc { r#type: offer.into() })),
            })
            .to_vec();
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn create_snapshot(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Result<Response<CreateSnapshotResponse>, Status> {
        Ok(Response::new(snapshots::create(self, request.into_inner()).await?))
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        snapshots::delete(self, required("snapshot_id", &request.get_ref().snapshot_id)?).await?;
        Ok(Response::new(DeleteSnapshotResponse {}))
    }

    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        Ok(Response::new(list::snapshots(self, request.get_ref()).await?))
    }

    async fn get_snapshot(
        &self,
        request: Request<GetSnapshotRequest>,
    ) -> Result<Response<GetSnapshotResponse>, Status> {
        let id = required("snapshot_id", &request.get_ref().snapshot_id)?;
        let found = self.hub.snapshots.get_opt(id).await.map_err(api_failed)?;
        let snapshot = found.as_ref().and_then(snapshots::answer);
        let snapshot = snapshot.ok_or_else(|| Status::not_found(format!("there is no snapshot {id}")))?;
        Ok(Response::new(GetSnapshotResponse { snapshot: Some(snapshot) }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Result<Response<ControllerExpandVolumeResponse>, Status> {
        Ok(Response::new(volumes::expand(self, request.get_ref()).await?))
    }

    async fn controller_get_volume(
        &self,
        request: Request<ControllerGetVolumeRequest>,
    ) -> Result<Response<ControllerGetVolumeResponse>, Status> {
        let volume = self.volume(required("volume_id", &request.get_ref().volume_id)?).await?;
        Ok(Response::new(list::one(self, &volume)))
    }

    async fn controller_modify_volume(
        &self,
        request: Request<ControllerModifyVolumeRequest>,
    ) -> Result<Response<ControllerModifyVolumeResponse>, Status> {
        volumes::modify(self, request.into_inner()).await?;
        Ok(Response::new(ControllerModifyVolumeResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_where_they_can_be() {
        let id = |name: &str| id_of("name", name).unwrap();
        assert_eq!(id("pvc-0a1b"), "pvc-0a1b");
        let odd = id("Sanity Volume/1");
        assert_eq!(odd, id("Sanity Volume/1"));
        assert!(odd.starts_with("id-") && odd.len() == 35);
        assert_ne!(odd, id("Sanity Volume/2"));
        assert!(id(&"x".repeat(128)).len() <= LONGEST_ID);
        assert!(id("-x").starts_with("id-"));
        assert!(id_of("name", "").unwrap_err().message().contains("name"));
    }
}
