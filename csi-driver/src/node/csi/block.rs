//! Volumes that pods see as devices: the node of the zvol's device is bind-mounted on a file.

use std::path::Path;

use portolan_zfs::{DatasetName, Zfs};
use rustix::mount::MountFlags;
use tonic::Status;

use super::capability::Wanted;
use super::{DEVICE_WITHIN, block_failed, mount_failed, other_targets};
use crate::block::device::Device;
use crate::node::Node;

/// Waits for the device: there is nothing to mount.
pub(super) async fn stage<Z: Zfs>(node: &Node<Z>, dataset: &DatasetName) -> Result<Device, Status> {
    let found = Device::wait_writable(&node.mounts, &dataset.device(), DEVICE_WITHIN).await;
    found.map_err(|error| block_failed(error.into()))
}

/// Mounts the device's node at a file.
///
/// A read-only mount doesn't keep anybody from writing to the device of a node on it (path_resolution(7) knows no such rule), nor does the
/// kubelet hand it to a container: the runtime makes a node of its own. What makes a device read-only for a pod is the permission that the
/// kubelet gives the runtime, from the pod's `readOnly`.
pub(super) fn publish<Z>(
    node: &Node<Z>,
    name: &str,
    dataset: &DatasetName,
    device: &Device,
    target: &Path,
    wanted: &Wanted,
) -> Result<(), Status> {
    if wanted.single {
        other_targets(node, name, dataset, target)?;
    }
    if let Some(mount) = node.mounts.at(target).map_err(mount_failed)? {
        if node.mounts.node_at(&mount) == Some(device.number()) {
            return Ok(());
        }
        let message = format!("something else ({}) is mounted at {}", mount.source, target.display());
        return Err(Status::already_exists(message));
    }
    node.mounts.make_file(target).map_err(mount_failed)?;
    let flags = if wanted.readonly { MountFlags::RDONLY } else { MountFlags::empty() };
    node.mounts.bind(device.path(), target, flags).map_err(mount_failed)
}
