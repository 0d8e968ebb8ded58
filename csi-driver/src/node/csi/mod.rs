//! The CSI Node service. A volume is mounted read-write only where the API and the disk agree that it may be.

mod block;
mod capability;
mod expand;
mod filesystem;
mod stats;

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use portolan_crds::{HandoffPhase, POOL_TOPOLOGY_KEY, PortableVolume, TOPOLOGY_KEY, VolumeMode, VolumePhase};
use portolan_zfs::{DatasetName, Key, Zfs, ZfsError};
use tokio::sync::OwnedMutexGuard;
use tonic::{Code, Request, Response, Status};

use super::Node;
use super::write::{self, WriteError};
use super::{disk, seal};
use crate::block::device::Device;
use crate::block::filesystem::FilesystemError;
use crate::block::mounts::MountError;
use crate::handoff::{self, Event};
use crate::proto::csi::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse,
    NodeGetInfoRequest, NodeGetInfoResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest,
    NodeStageVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest,
    NodeUnstageVolumeResponse, Topology, node_server, node_service_capability,
    node_service_capability::{Rpc, rpc},
};
use crate::volume;
use capability::{Access, Wanted};

/// How long a call waits for another operation on the same volume. A step of the agent is a handful of commands, of which each takes
/// a second on a node that is busy; the kubelet waits two minutes for an answer.
const LOCK_WITHIN: Duration = Duration::from_secs(20);
/// How long a call waits for udev.
const DEVICE_WITHIN: Duration = Duration::from_secs(15);

/// The Node service of this node.
pub struct Service<Z>(pub Arc<Node<Z>>);

impl<Z: Zfs> Service<Z> {
    fn dataset(&self, volume: &str) -> Result<DatasetName, Status> {
        if volume.is_empty() {
            return Err(Status::invalid_argument("volume_id is empty"));
        }
        volume::dataset(&self.0.pool, volume).map_err(|error| Status::invalid_argument(format!("volume_id: {error}")))
    }

    /// Checks a volume's name and takes its lock. The agent holds it for a moment at each step, too short to send the kubelet into
    /// its back-off.
    async fn begin(&self, volume: &str) -> Result<(DatasetName, OwnedMutexGuard<()>), Status> {
        let dataset = self.dataset(volume)?;
        let lock = tokio::time::timeout(LOCK_WITHIN, self.0.locks.lock(volume)).await;
        let lock = lock.map_err(|_| Status::aborted(format!("volume {volume}: another operation is under way")))?;
        Ok((dataset, lock))
    }
}

/// The volume's object.
async fn read<Z>(node: &Node<Z>, name: &str) -> Result<PortableVolume, Status> {
    let volume = node.volumes.get_opt(name).await;
    let volume = volume.map_err(|error| Status::unavailable(format!("can't read PortableVolume {name}: {error}")))?;
    volume.ok_or_else(|| Status::not_found(format!("there is no PortableVolume {name}")))
}

/// Whether this node may write the volume now, by the API and by the disk; makes the dataset writable if only a move that hasn't come so far is
/// in the way.
async fn check_owner<Z: Zfs>(node: &Node<Z>, volume: &PortableVolume, dataset: &DatasetName) -> Result<(), Status> {
    let name = volume.name_any();
    let refused = |why: String| {
        Status::failed_precondition(format!("volume {name} can't be mounted on node {}: {why}", node.name))
    };
    let status = volume::status(volume);
    if status.owner.as_ref() != Some(&node.name) {
        return Err(refused(format!("its owner is {}", status.owner.as_deref().unwrap_or("nobody yet"))));
    }
    if let Some(handoff) = status.handoff.as_ref().filter(|handoff| handoff.phase > HandoffPhase::PreCopy) {
        return Err(refused(format!("it is moving to node {} ({:?})", handoff.to, handoff.phase)));
    }
    if status.phase != VolumePhase::Ready || volume.metadata.deletion_timestamp.is_some() {
        return Err(refused(format!("its state is {:?}", status.phase)));
    }
    let local = disk::read(node.zfs.as_ref(), &node.mounts, dataset).await;
    let local = local.map_err(|error| Status::unavailable(format!("can't read dataset {dataset}: {error}")))?;
    let local = local.ok_or_else(|| refused(format!("there is no dataset {dataset}")))?;
    if !handoff::is_copy(volume, &local) {
        return Err(refused(format!("dataset {dataset} is not this volume's")));
    }
    if local.epoch != Some(status.epoch) {
        return Err(refused(format!(
            "dataset {dataset} is at epoch {:?}, the volume at {}",
            local.epoch, status.epoch
        )));
    }
    // A move's last round has made it so, and is not the last now.
    if local.readonly && status.handoff.is_some() && !local.open && !local.mounted {
        return node.zfs.set_readonly(dataset, false).await.map_err(zfs_failed);
    }
    // Its own agent makes it writable again: a mount that came before would be taken for what an agent has left that was killed.
    if local.readonly {
        let why = format!("dataset {dataset} is read-only still: its agent has not looked at it since it was started");
        return Err(Status::unavailable(why));
    }
    Ok(())
}

/// Whether this node may read its own copy of a volume that nobody writes.
async fn check_reader<Z: Zfs>(node: &Node<Z>, volume: &PortableVolume, dataset: &DatasetName) -> Result<(), Status> {
    let name = volume.name_any();
    let refused = |why: String| {
        Status::failed_precondition(format!("volume {name} can't be mounted on node {}: {why}", node.name))
    };
    let status = volume::status(volume);
    if volume.metadata.deletion_timestamp.is_some() {
        return Err(refused("it is being deleted".to_owned()));
    }
    // Its owner unmounts before it takes the final snapshot, and a copy that is received into must not be mounted.
    let beyond = status.handoff.as_ref().filter(|handoff| handoff.phase > HandoffPhase::PreCopy);
    if let Some(handoff) = beyond.filter(|handoff| handoff.from == node.name || handoff.to == node.name) {
        let why = format!("it is moving from node {} to {} ({:?})", handoff.from, handoff.to, handoff.phase);
        return Err(refused(why));
    }
    let local = disk::read(node.zfs.as_ref(), &node.mounts, dataset).await;
    let local = local.map_err(|error| Status::unavailable(format!("can't read dataset {dataset}: {error}")))?;
    let local = local.ok_or_else(|| refused(format!("there is no dataset {dataset}")))?;
    handoff::check_whole(&node.name, volume, &local).map_err(refused)
}

/// Brings the volume to its mountpoint, or waits for its device.
async fn stage<Z: Zfs>(
    node: &Arc<Node<Z>>,
    name: &str,
    dataset: &DatasetName,
    wanted: &Wanted,
    secrets: &HashMap<String, String>,
) -> Result<(), Status> {
    let mut volume = read(node, name).await?;
    capability::check(wanted, &volume.spec)?;
    let key = seal::key(&volume, secrets)?;
    if let Some(key) = key.as_ref().filter(|_| seal::is_new(&node.name, &volume)) {
        volume = make(node, &volume, dataset, key).await?;
    }
    let shared = volume.spec.is_shared();
    match shared {
        true => check_reader(node, &volume, dataset).await?,
        false => check_owner(node, &volume, dataset).await?,
    }
    if let Some(key) = &key {
        seal::open(node.zfs.as_ref(), &node.pool, &volume, dataset, key).await?;
    }
    match (volume.spec.mode, volume.spec.is_zvol()) {
        (VolumeMode::Block, _) => block::stage(node, dataset).await.map(drop)?,
        (VolumeMode::Filesystem, true) => filesystem::stage_zvol(node, &volume, dataset, wanted).await?,
        (VolumeMode::Filesystem, false) => filesystem::stage_dataset(node, name, dataset, shared).await?,
    }
    node.forget_unstaged(name);
    tracing::info!(volume = name, "staged");
    Ok(())
}

/// Makes the dataset of a new encrypted volume, and its owner this node. Whoever has changed the volume meanwhile wins: the dataset is
/// the agent's to take or to destroy then, and nothing was ever mounted.
async fn make<Z: Zfs>(
    node: &Arc<Node<Z>>,
    volume: &PortableVolume,
    dataset: &DatasetName,
    key: &Key,
) -> Result<PortableVolume, Status> {
    let name = volume.name_any();
    let mountpoint = volume::mountpoint(&node.kubelet_dir, &name);
    let properties =
        volume::new_properties(volume, &mountpoint).map_err(|error| Status::internal(error.to_string()))?;
    seal::make(node.zfs.as_ref(), &node.mounts, volume, dataset, properties, key).await?;
    let event = Event::Owned { node: node.name.clone(), spec: Box::new(volume.spec.clone()) };
    let owned = write::event(&node.volumes, volume, event).await;
    node.nudge(&name);
    owned.map_err(|error| match error {
        WriteError::Api(error) if !write::is_conflict(&error) => {
            Status::unavailable(format!("can't write PortableVolume {name}: {error}"))
        }
        changed => Status::aborted(format!("volume {name} has changed while its dataset was made: {changed}")),
    })
}

/// Unmounts the volume and takes its key away. What is published still is refused.
async fn unstage<Z: Zfs>(node: &Arc<Node<Z>>, name: &str, dataset: &DatasetName) -> Result<(), Status> {
    let mountpoint = volume::mountpoint(&node.kubelet_dir, name);
    let mounted = mounts_of(node, dataset)?;
    if let Some(path) = mounted.iter().find(|path| **path != mountpoint) {
        let message = format!("volume {name} is still published at {}", path.display());
        return Err(Status::failed_precondition(message));
    }
    if !mounted.is_empty() {
        match device_of(node, dataset)? {
            None => {
                node.zfs.unmount(dataset).await.map_err(zfs_failed)?;
                set_open(node, dataset, false).await?;
            }
            Some(_) => unmount(node, mountpoint.clone()).await?,
        }
        tracing::info!(volume = name, "unmounted");
    }
    // A raw device is mounted only where it is published.
    node.remember_unstaged(name, !mounted.is_empty());
    let seen = node.seen.get(&ObjectRef::new(name));
    if seen.is_none_or(|seen| seen.spec.encryption.is_some()) {
        seal::close(node.zfs.as_ref(), &node.pool, dataset).await?;
    }
    node.mounts.remove_directory(&mountpoint).map_err(mount_failed)
}

/// Says on the dataset whether it may have been written since it was unmounted in order.
async fn set_open<Z: Zfs>(node: &Node<Z>, dataset: &DatasetName, open: bool) -> Result<(), Status> {
    let property = volume::open_property(open).map_err(|error| Status::internal(error.to_string()))?;
    node.zfs.set_property(dataset, &property).await.map_err(zfs_failed)
}

/// Unmounting may wait for the disk.
async fn unmount<Z: Zfs>(node: &Node<Z>, path: PathBuf) -> Result<(), Status> {
    let mounts = node.mounts.clone();
    let unmounted = tokio::task::spawn_blocking(move || {
        mounts.unmount(&path)?;
        mounts.remove_target(&path)
    });
    unmounted.await.map_err(|error| Status::internal(error.to_string()))?.map_err(mount_failed)
}

/// Bind-mounts the volume for a pod.
async fn publish<Z: Zfs>(
    node: &Arc<Node<Z>>,
    name: &str,
    dataset: &DatasetName,
    target: &Path,
    wanted: &Wanted,
) -> Result<(), Status> {
    if wanted.access != Access::Block {
        let published = filesystem::publish(node, name, dataset, target, wanted);
        let Err(refused) = published else { return Ok(()) };
        // It may not be staged because there is no such volume.
        return match read(node, name).await {
            Err(gone) if gone.code() == Code::NotFound => Err(gone),
            _ => Err(refused),
        };
    }
    // Nothing on this node says that a device was staged.
    let volume = read(node, name).await?;
    check_owner(node, &volume, dataset).await?;
    capability::check(wanted, &volume.spec)?;
    let device = block::stage(node, dataset).await?;
    block::publish(node, name, dataset, &device, target, wanted)
}

#[tonic::async_trait]
impl<Z: Zfs> node_server::Node for Service<Z> {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        check_path("staging_target_path", &request.staging_target_path)?;
        let wanted = capability::parse(request.volume_capability.as_ref())?;
        let (dataset, lock) = self.begin(&request.volume_id).await?;
        let node = self.0.clone();
        // A format or a repair goes on when the caller has lost patience; its next call waits for the lock, or finds it done.
        let staged = tokio::spawn(async move {
            let staged = stage(&node, &request.volume_id, &dataset, &wanted, &request.secrets).await;
            drop(lock);
            staged
        });
        staged.await.map_err(|error| Status::internal(error.to_string()))??;
        Ok(Response::new(NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        check_path("staging_target_path", &request.staging_target_path)?;
        let (dataset, lock) = self.begin(&request.volume_id).await?;
        unstage(&self.0, &request.volume_id, &dataset).await?;
        drop(lock);
        self.0.nudge(&request.volume_id);
        Ok(Response::new(NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let target = check_path("target_path", &request.target_path)?;
        check_path("staging_target_path", &request.staging_target_path)?;
        let mut wanted = capability::parse(request.volume_capability.as_ref())?;
        wanted.readonly |= request.readonly;
        let (dataset, _lock) = self.begin(&request.volume_id).await?;
        publish(&self.0, &request.volume_id, &dataset, &target, &wanted).await?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let target = check_path("target_path", &request.target_path)?;
        let (_, _lock) = self.begin(&request.volume_id).await?;
        unmount(&self.0, target).await?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let dataset = self.dataset(&request.volume_id)?;
        given("volume_path", &request.volume_path)?;
        stats::get(&self.0, &dataset, &request.volume_path).await.map(Response::new)
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        given("volume_path", &request.volume_path)?;
        if request.volume_capability.is_some() {
            capability::parse(request.volume_capability.as_ref())?;
        }
        let (dataset, _lock) = self.begin(&request.volume_id).await?;
        let volume = read(&self.0, &request.volume_id).await?;
        let range = request.capacity_range.unwrap_or_default();
        let capacity_bytes = expand::run(&self.0, &volume, &dataset, &range).await?;
        tracing::info!(volume = volume.name_any(), capacity_bytes, "grown");
        Ok(Response::new(NodeExpandVolumeResponse { capacity_bytes }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capabilities = [
            rpc::Type::StageUnstageVolume,
            rpc::Type::GetVolumeStats,
            rpc::Type::ExpandVolume,
            rpc::Type::VolumeCondition,
            rpc::Type::SingleNodeMultiWriter,
        ]
        .map(|offer| NodeServiceCapability {
            r#type: Some(node_service_capability::Type::Rpc(Rpc { r#type: offer.into() })),
        })
        .to_vec();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        let node = &self.0;
        // The kubelet asks again; until then no pod with a volume comes here.
        let pool = async { node.zfs.space(&node.pool).await.and(node.zfs.pool_guid(&node.pool).await) };
        let guid = pool.await.map_err(|error| {
            Status::unavailable(format!(
                "node {} can't have volumes: pool {} is not there: {error}",
                node.name, node.pool
            ))
        })?;
        let segments = HashMap::from([
            (TOPOLOGY_KEY.to_owned(), node.zone.clone()),
            (POOL_TOPOLOGY_KEY.to_owned(), guid.to_string()),
        ]);
        Ok(Response::new(NodeGetInfoResponse {
            node_id: node.name.clone(),
            max_volumes_per_node: node.max_volumes.into(),
            accessible_topology: Some(Topology { segments }),
        }))
    }
}

/// The volume's device, if it is a zvol.
fn device_of<Z>(node: &Node<Z>, dataset: &DatasetName) -> Result<Option<Device>, Status> {
    Device::find(&node.mounts, &dataset.device()).map_err(|error| block_failed(error.into()))
}

/// Where the volume is mounted on this node.
fn mounts_of<Z>(node: &Node<Z>, dataset: &DatasetName) -> Result<Vec<PathBuf>, Status> {
    disk::mounts(&node.mounts, dataset).map_err(|error| Status::internal(error.to_string()))
}

/// Refuses if the volume is published anywhere but at `target`.
fn other_targets<Z>(node: &Node<Z>, name: &str, dataset: &DatasetName, target: &Path) -> Result<(), Status> {
    let mountpoint = volume::mountpoint(&node.kubelet_dir, name);
    match mounts_of(node, dataset)?.iter().find(|path| **path != mountpoint && *path != target) {
        None => Ok(()),
        Some(other) => Err(Status::failed_precondition(format!(
            "volume {name} is published at {} and only one pod may have it (SINGLE_NODE_SINGLE_WRITER)",
            other.display()
        ))),
    }
}

fn given(field: &str, value: &str) -> Result<(), Status> {
    if value.is_empty() { Err(Status::invalid_argument(format!("{field} is empty"))) } else { Ok(()) }
}

/// A path of the host that a caller gave us.
fn check_path(field: &str, path: &str) -> Result<PathBuf, Status> {
    let given = Path::new(path);
    let plain = given.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !given.is_absolute() || !plain {
        return Err(Status::invalid_argument(format!("{field} is {path:?}: expected an absolute path without '..'")));
    }
    Ok(given.components().collect())
}

fn mount_failed(error: MountError) -> Status {
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
    Status::internal(format!("{error}{cause}"))
}

fn zfs_failed(error: ZfsError) -> Status {
    if error.is_retryable() { Status::unavailable(error.to_string()) } else { Status::internal(error.to_string()) }
}

fn block_failed(error: FilesystemError) -> Status {
    let message = error.to_string();
    match error {
        FilesystemError::Foreign { .. } | FilesystemError::Damaged { .. } => Status::failed_precondition(message),
        FilesystemError::Device(_) => Status::unavailable(message),
        FilesystemError::Tool(_) => Status::internal(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert_eq!(check_path("p", "/a//b/").unwrap(), Path::new("/a/b"));
        for bad in ["", "a/b", "/a/../b"] {
            assert!(check_path("p", bad).unwrap_err().message().contains("absolute"), "{bad}");
        }
    }
}
