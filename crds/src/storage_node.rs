//! StorageNode: what a node's storage agent says of its pool.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A node's pool, written by that node's agent. Its name is the node's.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[kube(
    group = "portolan.dev",
    version = "v1alpha1",
    kind = "StorageNode",
    plural = "storagenodes",
    shortname = "snode",
    status = "StorageNodeStatus",
    derive = "Default",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Pool","type":"string","jsonPath":".spec.pool"}"#,
    printcolumn = r#"{"name":"Health","type":"string","jsonPath":".status.health"}"#,
    printcolumn = r#"{"name":"Size","type":"string","jsonPath":".status.capacity"}"#,
    printcolumn = r#"{"name":"Free","type":"string","jsonPath":".status.available"}"#,
    printcolumn = r#"{"name":"Volumes","type":"integer","jsonPath":".status.volumes"}"#,
    printcolumn = r#"{"name":"ZFS","type":"string","jsonPath":".status.zfsVersion"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Healthy","type":"string","jsonPath":".status.conditions[?(@.type=='PoolHealthy')].status","priority":1}"#,
    printcolumn = r#"{"name":"Orphans","type":"integer","jsonPath":".status.orphans.count","priority":1}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct StorageNodeSpec {
    /// The dataset that holds the volumes' datasets: a pool, or a path in one (`tank/portolan`).
    pub pool: String,
}

/// What the agent found.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StorageNodeStatus {
    /// Where other agents reach this one's transfer server, `address:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer_address: Option<String>,
    /// The pool's GUID, in decimal; also the value of the node label `topology.portolan.dev/pool`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_guid: Option<String>,
    /// How many volumes this node owns. There is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes: Option<i64>,
    /// The pool's health as ZFS names it (`ONLINE`, `DEGRADED`, …; zpoolconcepts(7)), or `MISSING`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<String>,
    /// Size, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<String>,
    /// Bytes in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_bytes: Option<i64>,
    /// Free space, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available: Option<String>,
    /// Bytes free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<i64>,
    /// The implementation and its version (`openzfs 2.3.2`, `zfs-fuse 0.7.0`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zfs_version: Option<String>,
    /// What the pool can do, probed (`resume`, `bookmarks`, `zvol`, …).
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// What is left over on this node and needs a person, as of the newest look; none before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orphans: Option<Orphans>,
    /// `Ready`, `PoolHealthy`, `SpaceLow`, `NoOrphans`, `CertificateReady`.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// What no object of the API accounts for.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Orphans {
    /// How many there are.
    pub count: i64,
    /// Bytes they use, as far as that is known.
    pub bytes: i64,
    /// How many datasets lie below the pool that Portolan did not make: they are nobody's concern, and never touched.
    pub foreign: i64,
    /// The first 20 of them.
    #[serde(default)]
    pub items: Vec<Orphan>,
}

/// One thing left over.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Orphan {
    /// The dataset, snapshot or path.
    pub name: String,
    /// What is the matter with it, CamelCase.
    pub reason: String,
    /// Bytes it uses; none if that isn't known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<i64>,
    /// Why nobody owns it, and the command that ends that.
    pub message: String,
}
