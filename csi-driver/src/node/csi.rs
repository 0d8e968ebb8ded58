//! The CSI Node service. A volume is mounted read-write only where the API and the disk agree that it may be.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use portolan_crds::{POOL_TOPOLOGY_KEY, TOPOLOGY_KEY, VolumePhase};
use portolan_zfs::{DatasetName, Zfs, ZfsError};
use rustix::mount::MountFlags;
use tokio::sync::OwnedMutexGuard;
use tonic::{Request, Response, Status};

use super::Node;
use super::disk;
use super::mounts::MountError;
use crate::handoff;
use crate::proto::csi::{
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodePublishVolumeResponse,
    NodeServiceCapability, NodeStageVolumeRequest, NodeStageVolumeResponse, NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest, NodeUnstageVolumeResponse, Topology, VolumeCapability,
    VolumeUsage, node_server, node_service_capability,
    node_service_capability::{Rpc, rpc},
    volume_capability::{AccessType, access_mode::Mode},
    volume_usage::Unit,
};
use crate::volume;

/// How long a call waits for another operation on the same volume.
const LOCK_WITHIN: Duration = Duration::from_secs(2);

/// The Node service of this node.
pub struct Service<Z>(pub Arc<Node<Z>>);

impl<Z: Zfs> Service<Z> {
    /// Checks a volume's name and takes its lock. The agent holds it for some milliseconds at each step, too short to send the
    /// kubelet into its back-off.
    async fn begin(&self, volume: &str) -> Result<(DatasetName, OwnedMutexGuard<()>), Status> {
        if volume.is_empty() {
            return Err(Status::invalid_argument("volume_id is empty"));
        }
        let dataset = volume::dataset(&self.0.pool, volume)
            .map_err(|error| Status::invalid_argument(format!("volume_id: {error}")))?;
        let lock = tokio::time::timeout(LOCK_WITHIN, self.0.locks.lock(volume)).await;
        let lock = lock.map_err(|_| Status::aborted(format!("volume {volume}: another operation is under way")))?;
        Ok((dataset, lock))
    }

    /// Whether this node may write the volume now, by the API and by the disk.
    async fn check_owner(&self, name: &str, dataset: &DatasetName) -> Result<(), Status> {
        let refused = |why: String| {
            Status::failed_precondition(format!("volume {name} can't be mounted on node {}: {why}", self.0.name))
        };
        let volume = self.0.volumes.get_opt(name).await;
        let volume =
            volume.map_err(|error| Status::unavailable(format!("can't read PortableVolume {name}: {error}")))?;
        let volume = volume.ok_or_else(|| Status::not_found(format!("there is no PortableVolume {name}")))?;
        let status = volume::status(&volume);
        if status.owner.as_ref() != Some(&self.0.name) {
            return Err(refused(format!("its owner is {}", status.owner.as_deref().unwrap_or("nobody yet"))));
        }
        if let Some(handoff) = &status.handoff {
            return Err(refused(format!("it is moving to node {} ({:?})", handoff.to, handoff.phase)));
        }
        if status.phase != VolumePhase::Ready || volume.metadata.deletion_timestamp.is_some() {
            return Err(refused(format!("its state is {:?}", status.phase)));
        }
        let local = disk::read(self.0.zfs.as_ref(), &self.0.mounts, dataset).await;
        let local = local.map_err(|error| Status::unavailable(format!("can't read dataset {dataset}: {error}")))?;
        let local = local.ok_or_else(|| refused(format!("there is no dataset {dataset}")))?;
        if !handoff::is_copy(&volume, &local) {
            return Err(refused(format!("dataset {dataset} is not this volume's")));
        }
        if local.epoch != Some(status.epoch) {
            return Err(refused(format!(
                "dataset {dataset} is at epoch {:?}, the volume at {}",
                local.epoch, status.epoch
            )));
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl<Z: Zfs> node_server::Node for Service<Z> {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        check_path("staging_target_path", &request.staging_target_path)?;
        mount_flags(request.volume_capability.as_ref(), false)?;
        let (dataset, _lock) = self.begin(&request.volume_id).await?;
        self.check_owner(&request.volume_id, &dataset).await?;
        let node = &self.0;
        let mountpoint = volume::mountpoint(&node.kubelet_dir, &request.volume_id);
        node.mounts.make_directory(&mountpoint).map_err(mount_failed)?;
        node.zfs.mount(&dataset).await.map_err(zfs_failed)?;
        check_mounted(node, &dataset, &mountpoint)?;
        node.forget_unstaged(&request.volume_id);
        tracing::info!(volume = request.volume_id, "mounted");
        Ok(Response::new(NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        check_path("staging_target_path", &request.staging_target_path)?;
        let (dataset, lock) = self.begin(&request.volume_id).await?;
        let node = &self.0;
        let mountpoint = volume::mountpoint(&node.kubelet_dir, &request.volume_id);
        let mounted = node.mounts.of(dataset.as_str()).map_err(mount_failed)?;
        if let Some(path) = mounted.iter().find(|path| **path != mountpoint) {
            let message = format!("volume {} is still published at {}", request.volume_id, path.display());
            return Err(Status::failed_precondition(message));
        }
        if !mounted.is_empty() {
            node.zfs.unmount(&dataset).await.map_err(zfs_failed)?;
            node.remember_unstaged(&request.volume_id);
            tracing::info!(volume = request.volume_id, "unmounted");
        }
        node.mounts.remove_directory(&mountpoint).map_err(mount_failed)?;
        drop(lock);
        node.nudge(&request.volume_id);
        Ok(Response::new(NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let target = check_path("target_path", &request.target_path)?;
        check_path("staging_target_path", &request.staging_target_path)?;
        let flags = mount_flags(request.volume_capability.as_ref(), request.readonly)?;
        let (dataset, _lock) = self.begin(&request.volume_id).await?;
        let node = &self.0;
        let mountpoint = volume::mountpoint(&node.kubelet_dir, &request.volume_id);
        // Else the pod would write to the host's own disk, into the empty mountpoint.
        check_mounted(node, &dataset, &mountpoint)?;
        match node.mounts.at(&target).map_err(mount_failed)? {
            Some(mount) if mount.source != dataset.as_str() => {
                let message = format!("something else ({}) is mounted at {}", mount.source, target.display());
                return Err(Status::already_exists(message));
            }
            Some(mount) if mount.readonly == flags.contains(MountFlags::RDONLY) => {}
            // An earlier call ended between the mount and its options.
            Some(_) => {
                node.mounts.unmount(&target).map_err(mount_failed)?;
                node.mounts.bind(&mountpoint, &target, flags).map_err(mount_failed)?;
            }
            None => {
                node.mounts.make_directory(&target).map_err(mount_failed)?;
                node.mounts.bind(&mountpoint, &target, flags).map_err(mount_failed)?;
            }
        }
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let target = check_path("target_path", &request.target_path)?;
        let (_, _lock) = self.begin(&request.volume_id).await?;
        let mounts = self.0.mounts.clone();
        // Unmounting may wait for the disk.
        let unmounted = tokio::task::spawn_blocking(move || {
            mounts.unmount(&target)?;
            mounts.remove_directory(&target)
        });
        unmounted.await.map_err(|error| Status::internal(error.to_string()))?.map_err(mount_failed)?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let path = check_path("volume_path", &request.volume_path)?;
        if request.volume_id.is_empty() {
            return Err(Status::invalid_argument("volume_id is empty"));
        }
        if self.0.mounts.at(&path).map_err(mount_failed)?.is_none() {
            return Err(Status::not_found(format!("nothing is mounted at {}", path.display())));
        }
        let here = self.0.mounts.here(&path);
        let stat = tokio::task::spawn_blocking(move || rustix::fs::statvfs(&here));
        let stat = stat.await.map_err(|error| Status::internal(error.to_string()))?;
        let stat = stat.map_err(|error| Status::internal(format!("can't stat {}: {error}", path.display())))?;
        let usage = |unit: Unit, total: u64, free: u64, available: u64, size: u64| VolumeUsage {
            available: signed(available.saturating_mul(size)),
            total: signed(total.saturating_mul(size)),
            used: signed(total.saturating_sub(free).saturating_mul(size)),
            unit: unit.into(),
        };
        Ok(Response::new(NodeGetVolumeStatsResponse {
            usage: vec![
                usage(Unit::Bytes, stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_frsize),
                usage(Unit::Inodes, stat.f_files, stat.f_ffree, stat.f_favail, 1),
            ],
            volume_condition: None,
        }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capabilities = [rpc::Type::StageUnstageVolume, rpc::Type::GetVolumeStats]
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
            max_volumes_per_node: 0,
            accessible_topology: Some(Topology { segments }),
        }))
    }
}

fn check_mounted<Z>(node: &Node<Z>, dataset: &DatasetName, mountpoint: &Path) -> Result<(), Status> {
    match node.mounts.at(mountpoint).map_err(mount_failed)? {
        Some(mount) if mount.source == dataset.as_str() => Ok(()),
        Some(mount) => {
            let message = format!("{} is mounted at {}, not dataset {dataset}", mount.source, mountpoint.display());
            Err(Status::failed_precondition(message))
        }
        None => {
            Err(Status::failed_precondition(format!("dataset {dataset} is not mounted at {}", mountpoint.display())))
        }
    }
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

/// What a capability asks of the mount; refuses what isn't offered.
fn mount_flags(capability: Option<&VolumeCapability>, readonly: bool) -> Result<MountFlags, Status> {
    let capability = capability.ok_or_else(|| Status::invalid_argument("volume_capability is missing"))?;
    let Some(AccessType::Mount(mount)) = &capability.access_type else {
        return Err(Status::invalid_argument(
            "volume_capability.access_type must be mount: there are no raw block volumes",
        ));
    };
    if !matches!(mount.fs_type.as_str(), "" | "zfs") {
        let message = format!("volume_capability.mount.fs_type is {:?}: allowed are zfs and nothing", mount.fs_type);
        return Err(Status::invalid_argument(message));
    }
    let mode = capability.access_mode.as_ref().map(|mode| mode.mode()).unwrap_or_default();
    let reader = mode == Mode::SingleNodeReaderOnly;
    if !reader && !matches!(mode, Mode::SingleNodeWriter | Mode::SingleNodeSingleWriter | Mode::SingleNodeMultiWriter) {
        let message =
            format!("volume_capability.access_mode is {}: allowed are the SINGLE_NODE_* modes", mode.as_str_name());
        return Err(Status::invalid_argument(message));
    }
    let mut flags = if readonly || reader { MountFlags::RDONLY } else { MountFlags::empty() };
    for option in mount.mount_flags.iter().flat_map(|options| options.split(',')) {
        flags |= match option {
            "ro" => MountFlags::RDONLY,
            "rw" | "" => MountFlags::empty(),
            "noexec" => MountFlags::NOEXEC,
            "nosuid" => MountFlags::NOSUID,
            "nodev" => MountFlags::NODEV,
            "noatime" => MountFlags::NOATIME,
            "relatime" => MountFlags::RELATIME,
            other => {
                let allowed = "ro, rw, noexec, nosuid, nodev, noatime, relatime";
                return Err(Status::invalid_argument(format!(
                    "mount option {other:?} is unknown: allowed are {allowed}"
                )));
            }
        };
    }
    Ok(flags)
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn mount_failed(error: MountError) -> Status {
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
    Status::internal(format!("{error}{cause}"))
}

fn zfs_failed(error: ZfsError) -> Status {
    if error.is_retryable() { Status::unavailable(error.to_string()) } else { Status::internal(error.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};

    fn capability(mode: Mode, options: &[&str]) -> VolumeCapability {
        let mount =
            MountVolume { mount_flags: options.iter().map(ToString::to_string).collect(), ..MountVolume::default() };
        VolumeCapability {
            access_type: Some(AccessType::Mount(mount)),
            access_mode: Some(AccessMode { mode: mode.into() }),
        }
    }

    #[test]
    fn capabilities() {
        let flags = |capability: &VolumeCapability, readonly| {
            mount_flags(Some(capability), readonly).map_err(|status| status.message().to_owned())
        };
        assert_eq!(flags(&capability(Mode::SingleNodeWriter, &[]), false), Ok(MountFlags::empty()));
        assert_eq!(flags(&capability(Mode::SingleNodeWriter, &[]), true), Ok(MountFlags::RDONLY));
        let options = flags(&capability(Mode::SingleNodeMultiWriter, &["ro,nodev", "noexec"]), false);
        assert_eq!(options, Ok(MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOEXEC));
        assert!(
            flags(&capability(Mode::MultiNodeMultiWriter, &[]), false).unwrap_err().contains("MULTI_NODE_MULTI_WRITER")
        );
        assert!(flags(&capability(Mode::SingleNodeWriter, &["suid"]), false).unwrap_err().contains("suid"));
        let block = VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), access_mode: None };
        assert!(flags(&block, false).is_err());
    }

    #[test]
    fn paths() {
        assert_eq!(check_path("p", "/a//b/").unwrap(), Path::new("/a/b"));
        for bad in ["", "a/b", "/a/../b"] {
            assert!(check_path("p", bad).unwrap_err().message().contains("absolute"), "{bad}");
        }
    }
}
