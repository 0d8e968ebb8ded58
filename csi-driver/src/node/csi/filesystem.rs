//! Volumes that pods see as directories: datasets, and ext4 and XFS on zvols. Both are mounted at the volume's mountpoint, and bind-mounted
//! from there for each pod.

use std::path::Path;
use std::sync::Arc;

use kube::ResourceExt;
use portolan_crds::{Filesystem, PortableVolume};
use portolan_zfs::{DatasetName, Zfs};
use rustix::mount::MountFlags;
use tonic::Status;

use super::capability::{Access, Wanted};
use super::{DEVICE_WITHIN, block_failed, device_of, mount_failed, other_targets, zfs_failed};
use crate::block::device::Device;
use crate::block::filesystem::{self, Kind};
use crate::block::mounts::Mount;
use crate::block::prepare::{PrepareError, prepare};
use crate::node::Node;
use crate::volume;

/// Mounts a dataset; one that is only read leaves nothing in its log.
pub(super) async fn stage_dataset<Z: Zfs>(
    node: &Node<Z>,
    name: &str,
    dataset: &DatasetName,
    only_read: bool,
) -> Result<(), Status> {
    let mountpoint = volume::mountpoint(&node.kubelet_dir, name);
    node.mounts.make_directory(&mountpoint).map_err(mount_failed)?;
    if !only_read {
        super::set_open(node, dataset, true).await?;
    }
    node.zfs.mount(dataset).await.map_err(zfs_failed)?;
    staged(node, dataset, &mountpoint).map(drop)
}

/// Mounts the filesystem on a zvol; makes it if the zvol is blank, grows it if the zvol is larger.
pub(super) async fn stage_zvol<Z: Zfs>(
    node: &Arc<Node<Z>>,
    volume: &PortableVolume,
    dataset: &DatasetName,
    wanted: &Wanted,
) -> Result<(), Status> {
    let Access::Mount { flags, own, .. } = &wanted.access else { return Ok(()) };
    let Some(kind) = kind(volume.spec.filesystem) else { return Ok(()) };
    let mountpoint = volume::mountpoint(&node.kubelet_dir, &volume.name_any());
    let found = Device::wait_writable(&node.mounts, &dataset.device(), DEVICE_WITHIN).await;
    let device = found.map_err(|error| block_failed(error.into()))?;
    match node.mounts.at(&mountpoint).map_err(mount_failed)? {
        Some(mount) if mount.number == device.number() => {}
        Some(mount) => return Err(occupied(&mount)),
        None => {
            let epoch = volume::status(volume).epoch;
            let made = prepare(&node.tools, node.zfs.as_ref(), dataset, epoch, &device, kind).await;
            if made.map_err(prepare_failed)? {
                tracing::info!(volume = volume.name_any(), filesystem = %kind, "made a filesystem");
            }
            node.mounts.make_directory(&mountpoint).map_err(mount_failed)?;
            let mut options = own.clone();
            if flags.contains(MountFlags::RDONLY) {
                options.push("ro".to_owned());
            }
            filesystem::mount(&node.tools, &device, kind, &mountpoint, &options).await.map_err(block_failed)?;
        }
    }
    grow(node, &device, kind, &mountpoint).await
}

/// Grows the filesystem to its device. One that is mounted read-only stays as it is.
pub(super) async fn grow<Z: Zfs>(node: &Node<Z>, device: &Device, kind: Kind, at: &Path) -> Result<(), Status> {
    let readonly = node.mounts.at(at).map_err(mount_failed)?.is_some_and(|mount| mount.readonly);
    if readonly {
        return Ok(());
    }
    filesystem::grow(&node.tools, device, kind, at).await.map_err(block_failed)
}

/// The filesystem on a zvol; none if it is the dataset's own.
pub(super) fn kind(filesystem: Filesystem) -> Option<Kind> {
    match filesystem {
        Filesystem::Zfs => None,
        Filesystem::Ext4 => Some(Kind::Ext4),
        Filesystem::Xfs => Some(Kind::Xfs),
    }
}

/// Bind-mounts the volume for a pod.
pub(super) fn publish<Z>(
    node: &Node<Z>,
    name: &str,
    dataset: &DatasetName,
    target: &Path,
    wanted: &Wanted,
) -> Result<(), Status> {
    let Access::Mount { flags, .. } = &wanted.access else { return Ok(()) };
    let flags = if wanted.readonly { *flags | MountFlags::RDONLY } else { *flags };
    let mountpoint = volume::mountpoint(&node.kubelet_dir, name);
    // Else the pod would write to the host's own disk, into the empty mountpoint.
    let staged = staged(node, dataset, &mountpoint)?;
    if wanted.single {
        other_targets(node, name, dataset, target)?;
    }
    let bind = || {
        node.mounts.make_directory(target).map_err(mount_failed)?;
        node.mounts.bind(&mountpoint, target, flags).map_err(mount_failed)
    };
    match node.mounts.at(target).map_err(mount_failed)? {
        Some(mount) if !is_same(&mount, &staged) => Err(occupied(&mount)),
        // A filesystem that is read-only everywhere needs no flag of the mount.
        Some(mount) if mount.readonly == (flags.contains(MountFlags::RDONLY) || staged.readonly) => Ok(()),
        // An earlier call ended between the mount and its options.
        Some(_) => {
            node.mounts.unmount(target).map_err(mount_failed)?;
            bind()
        }
        None => bind(),
    }
}

/// The mount of the volume at its mountpoint.
fn staged<Z>(node: &Node<Z>, dataset: &DatasetName, mountpoint: &Path) -> Result<Mount, Status> {
    let missing = || {
        let message = format!("volume {dataset} is not mounted at {}", mountpoint.display());
        Status::failed_precondition(message)
    };
    let mount = node.mounts.at(mountpoint).map_err(mount_failed)?.ok_or_else(missing)?;
    let device = || device_of(node, dataset).map(|device| device.is_some_and(|device| device.number() == mount.number));
    if mount.source == dataset.as_str() || device()? {
        return Ok(mount);
    }
    let message = format!("{} is mounted at {}, not volume {dataset}", mount.source, mountpoint.display());
    Err(Status::failed_precondition(message))
}

fn prepare_failed(error: PrepareError) -> Status {
    match error {
        PrepareError::Filesystem(error) => block_failed(error),
        PrepareError::Zfs(error) => zfs_failed(error),
        PrepareError::Name(error) => Status::internal(error.to_string()),
    }
}

fn is_same(one: &Mount, other: &Mount) -> bool {
    one.number == other.number && one.source == other.source
}

fn occupied(mount: &Mount) -> Status {
    Status::already_exists(format!("something else ({}) is mounted at {}", mount.source, mount.target.display()))
}
