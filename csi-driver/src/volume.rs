//! What a volume is called on a node: its dataset, its mountpoint, its properties.

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{Resource, ResourceExt};
use portolan_crds::{DRIVER, PortableVolume, PortableVolumeStatus, condition};
use portolan_zfs::{DatasetName, InvalidName, Property};

/// User property of a dataset: the volume's name.
pub const VOLUME_PROPERTY: &str = "portolan:volume";
/// User property of a dataset: the PortableVolume's UID. Set last: a dataset that has it has all the others.
pub const UID_PROPERTY: &str = "portolan:uid";
/// User property of a dataset: the epoch at which this copy was last writable.
pub const EPOCH_PROPERTY: &str = "portolan:epoch";

/// User property of a dataset: `on` from before it is mounted until it has been unmounted in order. After a power cut what was written last is
/// in the dataset's log only, and no snapshot has it, until the dataset is mounted again (zpoolconcepts(7), "Intent Log"). A snapshot's GUID, in decimal, if
/// that was taken of the dataset when it had been unmounted in order: as long as it is so, nobody has written since.
pub const OPEN_PROPERTY: &str = "portolan:open";

/// Reason of a condition: the volume is gone for its users, and its dataset stays for its snapshots or clones.
pub const KEPT: &str = "Kept";

/// Reason of a condition: a node could not do what it has to, and why.
pub const STEP_FAILED: &str = "StepFailed";

/// Reason of a condition: the dataset that the volume was to be can't be it.
pub const IMPORT_REFUSED: &str = "ImportRefused";

/// Reason of a condition: the volume is encrypted, and its dataset is made when the kubelet brings the key for the first time.
pub const AWAITS_KEY: &str = "AwaitsKey";

/// What stands between a volume's name and an epoch in the name of a copy that is not from its history.
const QUARANTINED: &str = ".diverged-";

/// A volume's status; an empty one if nobody has written any.
pub fn status(volume: &PortableVolume) -> PortableVolumeStatus {
    volume.status.clone().unwrap_or_default()
}

/// Whether a deleted volume is there only for its snapshots or clones.
pub fn is_kept(volume: &PortableVolume) -> bool {
    let conditions = volume.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    let kept = conditions.iter().any(|condition| condition.type_ == condition::READY && condition.reason == KEPT);
    kept && volume.metadata.deletion_timestamp.is_some()
}

/// Whether a volume is all that it can be before the kubelet brings its key, on the node where it is wanted. Nobody owns it, so nobody has
/// ever mounted it.
pub fn awaits_key(volume: &PortableVolume) -> bool {
    let Some(status) = &volume.status else { return false };
    let said = |condition: &Condition| condition.type_ == condition::READY && condition.reason == AWAITS_KEY;
    status.owner.is_none()
        && volume.metadata.deletion_timestamp.is_none()
        && status.replicas.iter().any(|replica| replica.node == volume.spec.placement.node)
        && status.conditions.iter().any(said)
}

/// A volume's dataset below `pool`.
///
/// # Errors
/// When the volume's name can't be one of ZFS.
pub fn dataset(pool: &DatasetName, volume: &str) -> Result<DatasetName, InvalidName> {
    pool.child(volume)
}

/// Where a copy is put that is not from the volume's history.
///
/// # Errors
/// As [`dataset`].
pub fn quarantine(dataset: &DatasetName, epoch: i64) -> Result<DatasetName, InvalidName> {
    DatasetName::new(format!("{dataset}{QUARANTINED}{epoch}"))
}

/// Whether a dataset's short name says that it was put out of the way as a copy of `volume`.
pub fn is_quarantined(short: &str, volume: &str) -> bool {
    short.strip_prefix(volume).is_some_and(|rest| rest.starts_with(QUARANTINED))
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
    let mut properties = Vec::new();
    if !volume.spec.is_zvol() {
        properties.extend([
            Property::canmount_noauto(),
            Property::new("mountpoint", mountpoint.to_string_lossy())?,
            Property::new("atime", if volume.spec.parameters.atime == Some(true) { "on" } else { "off" })?,
        ]);
    }
    // A zvol's size is not a property that it can be made or received with.
    properties.extend(changeable(volume)?.into_iter().filter(|property| property.name() != "volsize"));
    properties.push(Property::new(VOLUME_PROPERTY, volume.name_any())?);
    properties.push(Property::new(UID_PROPERTY, volume.uid().unwrap_or_default())?);
    Ok(properties)
}

/// The properties of a new volume's dataset, in the order in which they are to be set; not how it is encrypted.
///
/// # Errors
/// As [`properties`].
pub fn new_properties(volume: &PortableVolume, mountpoint: &Path) -> Result<Vec<Property>, InvalidName> {
    let mut all = vec![epoch_property(1)?];
    all.extend(properties(volume, mountpoint)?);
    Ok(all)
}

/// The properties that a dataset in use can be given when the spec changes: its size and its tunables.
///
/// # Errors
/// As [`properties`].
pub fn changeable(volume: &PortableVolume) -> Result<Vec<Property>, InvalidName> {
    let (spec, parameters) = (&volume.spec, &volume.spec.parameters);
    let size = u64::try_from(spec.size_bytes).unwrap_or_default();
    let mut properties = Vec::new();
    if spec.is_zvol() {
        properties.push(Property::volsize(size));
    } else {
        properties.push(Property::refquota(size));
        if let Some(size) = parameters.record_size {
            properties.push(Property::new("recordsize", size.to_string())?);
        }
    }
    if let Some(compression) = parameters.compression {
        properties.push(Property::new("compression", word(&compression))?);
    }
    if let Some(sync) = parameters.sync {
        properties.push(Property::new("sync", word(&sync))?);
    }
    if let Some(logbias) = parameters.logbias {
        properties.push(Property::new("logbias", word(&logbias))?);
    }
    Ok(properties)
}

/// A property's value as the API spells it, which is as ZFS does.
fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// The property that stamps `epoch` on a dataset.
///
/// # Errors
/// Never in practice: a number is a good value.
pub fn epoch_property(epoch: i64) -> Result<Property, InvalidName> {
    Property::new(EPOCH_PROPERTY, epoch.to_string())
}

/// The property that says whether a dataset is open.
///
/// # Errors
/// Never in practice.
pub fn open_property(open: bool) -> Result<Property, InvalidName> {
    Property::new(OPEN_PROPERTY, if open { "on" } else { "off" })
}

/// The property that says that a dataset is not open, and since which snapshot.
///
/// # Errors
/// Never in practice.
pub fn resting_property(guid: &str) -> Result<Property, InvalidName> {
    Property::new(OPEN_PROPERTY, guid)
}

/// What an Event about a volume refers to.
pub fn reference(volume: &PortableVolume) -> ObjectReference {
    volume.object_ref(&())
}

#[cfg(test)]
mod tests {
    use portolan_crds::{Compression, Filesystem, PortableVolumeSpec, VolumeParameters};

    use super::*;

    #[test]
    fn a_dataset_is_marked_last() {
        let parameters = VolumeParameters {
            compression: Some(Compression::Zstd),
            record_size: Some(8192),
            block_size: Some(16_384),
            ..VolumeParameters::default()
        };
        let mut spec = PortableVolumeSpec { size_bytes: 1 << 30, parameters, ..PortableVolumeSpec::default() };
        let text = |spec: &PortableVolumeSpec| {
            let volume = PortableVolume::new("pvc-1", spec.clone());
            properties(&volume, Path::new("/m")).unwrap().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            text(&spec),
            "canmount=noauto mountpoint=/m atime=off refquota=1073741824 recordsize=8192 compression=zstd \
             portolan:volume=pvc-1 portolan:uid="
        );
        spec.filesystem = Filesystem::Ext4;
        assert_eq!(text(&spec), "compression=zstd portolan:volume=pvc-1 portolan:uid=");
        let volume = PortableVolume::new("pvc-1", spec);
        assert_eq!(changeable(&volume).unwrap()[0].to_string(), "volsize=1073741824");
    }
}
