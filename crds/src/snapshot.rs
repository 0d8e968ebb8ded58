//! PortableSnapshot: a moment of a volume, kept wherever the volume has a copy.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A snapshot of a volume. It travels with the volume and outlives it.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[kube(
    group = "portolan.dev",
    version = "v1alpha1",
    kind = "PortableSnapshot",
    plural = "portablesnapshots",
    shortname = "psnap",
    status = "PortableSnapshotStatus",
    derive = "Default",
    derive = "PartialEq",
    selectable = ".spec.volume",
    selectable = ".spec.group.name",
    printcolumn = r#"{"name":"Volume","type":"string","jsonPath":".spec.volume"}"#,
    printcolumn = r#"{"name":"Size","type":"string","jsonPath":".status.size"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Taken","type":"date","jsonPath":".status.takenAt"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct PortableSnapshotSpec {
    /// The PortableVolume.
    #[schemars(length(min = 1))]
    pub volume: String,
    /// The snapshot's short name in ZFS (what stands behind the `@`); the object's name if none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// The snapshot is there already, made by hand: it is looked for and never taken.
    #[serde(default)]
    pub import: bool,
    /// The group that this is one of: its snapshots are of one moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<SnapshotGroup>,
}

/// Snapshots that are of one moment.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub struct SnapshotGroup {
    /// The group's name.
    pub name: String,
    /// How many snapshots it has: none is taken before all are asked for.
    pub members: u32,
}

/// What is known of a snapshot. Once it has a GUID it is taken, and what it holds never changes.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortableSnapshotStatus {
    /// Its GUID, in decimal: the same on every node that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guid: Option<String>,
    /// When it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_at: Option<MicroTime>,
    /// The node that took it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The volume's size then, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// The volume's size then, in bytes: what a volume made from it must have at least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<i64>,
    /// While it is being deleted: the nodes that have no such snapshot any more.
    #[serde(default)]
    pub destroyed_on: Vec<String>,
    /// `Ready`, and what stands in its way.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

impl PortableSnapshot {
    /// Its short name in ZFS.
    pub fn short_name(&self) -> String {
        let own = || self.metadata.name.clone().unwrap_or_default();
        self.spec.snapshot.clone().unwrap_or_else(own)
    }

    /// Its GUID, once it is taken.
    pub fn guid(&self) -> Option<&str> {
        self.status.as_ref()?.guid.as_deref()
    }
}
