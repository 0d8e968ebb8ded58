//! NodeExpandVolume: makes what pods see as large as what the controller has made.

use kube::ResourceExt;
use portolan_crds::{PortableVolume, VolumeMode};
use portolan_zfs::{DatasetName, Kind, Zfs};
use tonic::Status;

use super::filesystem::{grow, kind};
use super::{device_of, mount_failed, zfs_failed};
use crate::node::Node;
use crate::proto::csi::CapacityRange;
use crate::volume;

/// Answers with the size in bytes that the volume has on this node.
///
/// Where the caller believes the volume to be doesn't matter: it is grown where it is mounted on this node. The kubelet names its own staging
/// path, where nothing is mounted, as well as pods' paths.
pub(super) async fn run<Z: Zfs>(
    node: &Node<Z>,
    volume: &PortableVolume,
    dataset: &DatasetName,
    range: &CapacityRange,
) -> Result<i64, Status> {
    if volume.spec.is_shared() {
        // Its owner's dataset has the size; copies have what they came with, and nobody writes to them.
        let size = volume::status(volume).size_bytes.unwrap_or(volume.spec.size_bytes);
        return check_size(dataset, size, range).map(|()| size);
    }
    let found = node.zfs.dataset(dataset).await.map_err(zfs_failed)?;
    let size = match found.kind {
        Kind::Volume { size } => size,
        Kind::Filesystem => found.refquota.unwrap_or_default(),
    };
    let size = i64::try_from(size).unwrap_or(i64::MAX);
    check_size(dataset, size, range)?;
    let Some(kind) = kind(volume.spec.filesystem).filter(|_| volume.spec.mode == VolumeMode::Filesystem) else {
        // A dataset has its size at once, and so has a device.
        return Ok(size);
    };
    let mountpoint = volume::mountpoint(&node.kubelet_dir, &volume.name_any());
    let device = device_of(node, dataset)?;
    let mount = node.mounts.at(&mountpoint).map_err(mount_failed)?;
    match (device, mount) {
        (Some(device), Some(mount)) if mount.number == device.number() => {
            grow(node, &device, kind, &mountpoint).await?;
            Ok(size)
        }
        _ => Err(Status::not_found(format!("volume {dataset} is not mounted on node {}", node.name))),
    }
}

fn check_size(dataset: &DatasetName, size: i64, range: &CapacityRange) -> Result<(), Status> {
    if size < range.required_bytes {
        // The agent brings the dataset up to the spec, and the controller waits for that before anybody asks here.
        let message = format!("{dataset} has {size} of {} bytes: it is still to be grown", range.required_bytes);
        return Err(Status::unavailable(message));
    }
    if range.limit_bytes > 0 && size > range.limit_bytes {
        return Err(Status::out_of_range(format!("{dataset} has {size} bytes, more than {}", range.limit_bytes)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let dataset = DatasetName::new("tank/pvc-1").unwrap();
        let code = |size, required_bytes, limit_bytes| {
            check_size(&dataset, size, &CapacityRange { required_bytes, limit_bytes }).map_err(|status| status.code())
        };
        assert_eq!(code(5, 5, 0), Ok(()));
        assert_eq!(code(7, 5, 7), Ok(()));
        assert_eq!(code(4, 5, 0), Err(tonic::Code::Unavailable));
        assert_eq!(code(8, 5, 7), Err(tonic::Code::OutOfRange));
    }
}
