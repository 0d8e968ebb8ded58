//! What a volume is called on a node: its dataset, its mountpoint, its properties.

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{Resource, ResourceExt};
use portolan_crds::{Compression, DRIVER, PortableVolume, PortableVolumeStatus, VolumeParameters};
use portolan_zfs::{DatasetName, InvalidName, Property};

/// User property of a dataset: the volume's name.
pub const VOLUME_PROPERTY: &str = "portolan:volume";
/// User property of a dataset: the PortableVolume's UID. Set last: a dataset that has it has all the others.
pub const UID_PROPERTY: &str = "portolan:uid";
/// User property of a dataset: the epoch at which this copy was last writable.
pub const EPOCH_PROPERTY: &str = "portolan:epoch";

/// A volume's status; an empty one if nobody has written any.
pub fn status(volume: &PortableVolume) -> PortableVolumeStatus {
    volume.status.clone().unwrap_or_default()
}

/// A volume's dataset below `pool`.
///
/// # Errors
/// When the volume's name can't be one of ZFS.
pub fn dataset(pool: &DatasetName, volume: &str) -> Result<DatasetName, InvalidName> {
    pool.child(volume)
}

/// Where the driver keeps its sockets and mounts, as the host sees it.
pub fn plugin_dir(kubelet_dir: &Path) -> PathBuf {
    kubelet_dir.join("plugins").join(DRIVER)
}

/// Where a volume's dataset is mounted, as the host sees it.
pub fn mountpoint(kubelet_dir: &Path, volume: &str) -> PathBuf {
    plugin_dir(kubelet_dir).join("volumes").join(volume)
}

/// All properties of a volume's dataset but `readonly` and the epoch, in the order in which they are to be set.
///
/// # Errors
/// When a name or value is one that ZFS would refuse.
pub fn properties(volume: &PortableVolume, mountpoint: &Path) -> Result<Vec<Property>, InvalidName> {
    let mut properties = vec![
        Property::canmount_noauto(),
        Property::new("mountpoint", mountpoint.to_string_lossy())?,
        Property::refquota(u64::try_from(volume.spec.size_bytes).unwrap_or_default()),
    ];
    properties.extend(tunables(&volume.spec.parameters)?);
    properties.push(Property::new(VOLUME_PROPERTY, volume.name_any())?);
    properties.push(Property::new(UID_PROPERTY, volume.uid().unwrap_or_default())?);
    Ok(properties)
}

/// The property that stamps `epoch` on a dataset.
///
/// # Errors
/// Never in practice: a number is a good value.
pub fn epoch_property(epoch: i64) -> Result<Property, InvalidName> {
    Property::new(EPOCH_PROPERTY, epoch.to_string())
}

fn tunables(parameters: &VolumeParameters) -> Result<Vec<Property>, InvalidName> {
    let mut properties = vec![Property::new("atime", if parameters.atime == Some(true) { "on" } else { "off" })?];
    if let Some(size) = parameters.record_size {
        properties.push(Property::new("recordsize", size.to_string())?);
    }
    if let Some(compression) = parameters.compression {
        let name = match compression {
            Compression::Off => "off",
            Compression::On => "on",
            Compression::Lzjb => "lzjb",
            Compression::Gzip => "gzip",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        };
        properties.push(Property::new("compression", name)?);
    }
    Ok(properties)
}

/// What an Event about a volume refers to.
pub fn reference(volume: &PortableVolume) -> ObjectReference {
    volume.object_ref(&())
}
