//! PortableVolume: one volume, and where it lives.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::handoff::{Handoff, HandoffReport};

/// A volume that follows its pod: a ZFS dataset on its owner, and warm replicas elsewhere.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "portolan.dev",
    version = "v1alpha1",
    kind = "PortableVolume",
    plural = "portablevolumes",
    shortname = "pvol",
    status = "PortableVolumeStatus",
    derive = "Default",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Claim","type":"string","jsonPath":".spec.claim"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".status.owner"}"#,
    printcolumn = r#"{"name":"Size","type":"string","jsonPath":".spec.size"}"#,
    printcolumn = r#"{"name":"Used","type":"string","jsonPath":".status.used"}"#,
    printcolumn = r#"{"name":"State","type":"string","jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct PortableVolumeSpec {
    /// The size as the claim asked for it (a Kubernetes quantity, `1Gi`).
    pub size: String,
    /// The size in bytes; the dataset's `refquota`.
    #[schemars(range(min = 1))]
    pub size_bytes: i64,
    /// The claim, `namespace/name`.
    #[serde(default)]
    pub claim: String,
    /// The claim's UID: a later claim of the same name is another volume.
    #[serde(default)]
    pub claim_uid: String,
    /// Whether pods see a filesystem or a block device.
    #[serde(default)]
    pub mode: VolumeMode,
    /// The filesystem that pods see: the dataset's own, or one on a zvol.
    #[serde(default)]
    pub filesystem: Filesystem,
    /// What the StorageClass and the VolumeAttributesClass asked of the dataset.
    #[serde(default)]
    pub parameters: VolumeParameters,
    /// What the volume begins as; empty if nothing is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<VolumeSource>,
    /// How the dataset is encrypted; empty if it isn't. Fixed when the volume is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<VolumeEncryption>,
    /// The dataset that the volume is to be, there already on the node of `placement`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import: Option<VolumeImport>,
    /// Whether it is never to be written, and a dataset may be read on many nodes at once (all access modes are `ReadOnlyMany`). Fixed when the
    /// volume is made.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("it is decided when the volume is made: make another volume of this one"))]
    pub read_only: bool,
    /// Where the volume is wanted.
    pub placement: Placement,
}

impl PortableVolumeSpec {
    /// Whether many nodes may read the volume at once, each its own copy, and nobody ever writes it.
    pub fn is_shared(&self) -> bool {
        self.read_only && !self.is_zvol()
    }

    /// Whether the volume is a zvol, not a filesystem of ZFS.
    pub fn is_zvol(&self) -> bool {
        self.mode == VolumeMode::Block || self.filesystem != Filesystem::Zfs
    }
}

/// How pods see a volume (`PersistentVolumeClaim.spec.volumeMode`).
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum VolumeMode {
    /// As a directory.
    #[default]
    Filesystem,
    /// As a device: a zvol.
    Block,
}

/// The filesystem of a volume in mode Filesystem.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Filesystem {
    /// The dataset's own.
    #[default]
    Zfs,
    /// ext4 on a zvol.
    Ext4,
    /// XFS on a zvol.
    Xfs,
}

/// The snapshot that a volume begins as.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSource {
    /// The PortableSnapshot.
    pub snapshot: String,
    /// The volume that it is a snapshot of.
    pub volume: String,
    /// The snapshot's short name in ZFS.
    pub short_name: String,
    /// The snapshot's GUID, in decimal.
    pub guid: String,
}

/// A dataset that was made by hand and becomes a volume.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeImport {
    /// Its name in full, in the same pool as the volumes. It is renamed.
    #[schemars(length(min = 1))]
    pub dataset: String,
}

/// How a volume's dataset is encrypted. The key itself is in no object of Portolan's.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeEncryption {
    /// ZFS property `encryption` (zfsprops(7)).
    pub cipher: Cipher,
    /// The Secret with the key, which the kubelet hands to the node where a pod uses the volume; empty if the volume was made by a CSI
    /// call, whose caller knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<KeySecret>,
}

/// Values of the ZFS property `encryption` that Portolan passes on.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Cipher {
    /// AES in GCM, key of 128 bits.
    #[serde(rename = "aes-128-gcm")]
    Aes128Gcm,
    /// AES in GCM, key of 192 bits.
    #[serde(rename = "aes-192-gcm")]
    Aes192Gcm,
    /// AES in GCM, key of 256 bits.
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
}

impl Cipher {
    /// As ZFS spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Aes128Gcm => "aes-128-gcm",
            Self::Aes192Gcm => "aes-192-gcm",
            Self::Aes256Gcm => "aes-256-gcm",
        }
    }
}

/// A Secret by name.
#[derive(Clone, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeySecret {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl std::fmt::Display for KeySecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Where a volume is wanted. The owner follows; it never leads.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// The node that shall own the volume.
    pub node: String,
}

/// The tunables of a volume's dataset, from the StorageClass. What is not given is the pool's default.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeParameters {
    /// ZFS property `compression` (zfsprops(7)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// ZFS property `recordsize` in bytes: a power of two from 512 to 1 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record_size: Option<u32>,
    /// ZFS property `atime`; off unless asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub atime: Option<bool>,
    /// ZFS property `sync`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sync: Option<Sync>,
    /// ZFS property `logbias`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logbias: Option<Logbias>,
    /// ZFS property `volblocksize` in bytes, of a zvol: a power of two from 4 KiB to 128 KiB. Fixed when the volume is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u32>,
    /// The most bytes a second that the volume's data take on their way to another node while its pod goes on. A VolumeMigration's own goes before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub bandwidth: Option<i64>,
}

/// Values of the ZFS property `sync`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sync {
    /// As POSIX asks.
    Standard,
    /// Every write before it is acknowledged.
    Always,
    /// Never: what was acknowledged within some seconds before a crash is lost.
    Disabled,
}

/// Values of the ZFS property `logbias`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Logbias {
    /// Short synchronous writes first.
    Latency,
    /// Much data first.
    Throughput,
}

/// Values of the ZFS property `compression` that Portolan passes on.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Off.
    Off,
    /// The pool's default algorithm.
    On,
    /// LZJB, known to every ZFS.
    Lzjb,
    /// gzip, known to every ZFS.
    Gzip,
    /// LZ4, OpenZFS only.
    Lz4,
    /// Zstandard, OpenZFS 2.0 and later.
    Zstd,
}

/// What is known of a volume. `owner` and `epoch` change only by compare-and-set (an update that carries the resourceVersion read).
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortableVolumeStatus {
    /// The one node that may write the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Grows by one with each change of owner; also stamped on the dataset.
    #[serde(default)]
    pub epoch: i64,
    /// What an operator needs to know at a glance.
    #[serde(default)]
    pub phase: VolumePhase,
    /// The size in bytes that the owner's dataset has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<i64>,
    /// The parameters that the owner's dataset has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<VolumeParameters>,
    /// Bytes the dataset uses at its owner, for people (`12Mi`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<String>,
    /// Bytes the dataset uses at its owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<i64>,
    /// The GUID, in decimal, of the dataset that is being imported, written before it is renamed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import_guid: Option<String>,
    /// Every node that holds a dataset of this volume, the owner included. A volume is gone when this is empty.
    #[serde(default)]
    pub replicas: Vec<Replica>,
    /// The move that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handoff: Option<Handoff>,
    /// The newest move that ended, with its figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_handoff: Option<HandoffReport>,
    /// `Ready`, and what stands in its way.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// The state of a volume.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum VolumePhase {
    /// No node has made the dataset yet.
    #[default]
    Pending,
    /// The owner's dataset is there and may be mounted.
    Ready,
    /// A handoff is under way.
    Moving,
    /// Being deleted.
    Deleting,
}

/// One node's copy of a volume.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Replica {
    /// The node.
    pub node: String,
    /// The newest snapshot that this copy shares with the volume's history (short name, without dataset and `@`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// That snapshot's GUID, in decimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guid: Option<String>,
}
