//! VolumeMigration: a move that somebody asks for.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Moves a claim's volume, or a pod with all its volumes, to a node. It is done once; the object stays as the record of it.
/// Deleting it before its end cancels it.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "portolan.dev",
    version = "v1alpha1",
    kind = "VolumeMigration",
    plural = "volumemigrations",
    shortname = "vmig",
    namespaced,
    status = "VolumeMigrationStatus",
    derive = "Default",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Claim","type":"string","jsonPath":".spec.claim"}"#,
    printcolumn = r#"{"name":"Pod","type":"string","jsonPath":".spec.pod"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".spec.node"}"#,
    printcolumn = r#"{"name":"Phase","type":"string","jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"Bytes","type":"integer","jsonPath":".status.bytes"}"#,
    printcolumn = r#"{"name":"Downtime-ms","type":"integer","jsonPath":".status.downtimeMilliseconds"}"#,
    printcolumn = r#"{"name":"Message","type":"string","jsonPath":".status.message","priority":1}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.claim) != has(self.pod)").message("exactly one of claim and pod is to be given"),
    validation = Rule::new("has(self.claim) == has(oldSelf.claim) && (!has(self.claim) || self.claim == oldSelf.claim) && has(self.pod) == has(oldSelf.pod) && (!has(self.pod) || self.pod == oldSelf.pod) && self.node == oldSelf.node && self.mode == oldSelf.mode && has(self.targetDowntimeMilliseconds) == has(oldSelf.targetDowntimeMilliseconds) && (!has(self.targetDowntimeMilliseconds) || self.targetDowntimeMilliseconds == oldSelf.targetDowntimeMilliseconds) && self.timeoutSeconds == oldSelf.timeoutSeconds")
        .message("only bandwidth can be changed: delete this migration, which cancels it, and make another"),
)]
pub struct VolumeMigrationSpec {
    /// The claim whose volume is to move, in this object's namespace. A pod that uses it moves along, with all its volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub claim: Option<String>,
    /// The pod that is to move with all its volumes, in this object's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub pod: Option<String>,
    /// The node to move to.
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
    /// Whether the data go ahead while the pod still runs.
    #[serde(default)]
    pub mode: MigrationMode,
    /// Warm: the pod is evicted once what is left to send is expected to take no longer than this, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub target_downtime_milliseconds: Option<i64>,
    /// The most that each volume may send in a second, a quantity of bytes (`50M`); no limit if not given. May be changed meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    #[x_kube(
        validation = Rule::new("isQuantity(self) && quantity(self).isGreaterThan(quantity('0'))")
            .message("bandwidth is bytes in a second as a quantity above 0, such as 50M"),
    )]
    pub bandwidth: Option<String>,
    /// The move is given up so many seconds after it began.
    #[serde(default = "day")]
    #[schemars(range(min = 1))]
    pub timeout_seconds: i64,
}

fn day() -> i64 {
    24 * 3600
}

/// How a pod's volumes are moved.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum MigrationMode {
    /// Most of the data go while the pod runs; it is evicted when little is left.
    #[default]
    Warm,
    /// The pod is evicted first.
    Cold,
}

/// How far a migration is, with its figures.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeMigrationStatus {
    /// How far it is.
    #[serde(default)]
    pub phase: MigrationPhase,
    /// The volumes that move together.
    #[serde(default)]
    pub volumes: Vec<MigratingVolume>,
    /// The pods that use them, as they were before they were evicted.
    #[serde(default)]
    pub pods: Vec<MigratingPod>,
    /// Bytes of ZFS stream that have been sent, of all volumes.
    #[serde(default)]
    pub bytes: i64,
    /// Milliseconds from the eviction of the first pod until all pods were Ready again, on the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_milliseconds: Option<i64>,
    /// What it waits for, or how it ended.
    #[serde(default)]
    pub message: String,
    /// When it was found possible and began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<MicroTime>,
    /// When the first pod was evicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evicted_at: Option<MicroTime>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<MicroTime>,
    /// `Ready`: all is where it was asked to be; or why not.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// The phases of a migration, in order.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, PartialOrd, Serialize)]
pub enum MigrationPhase {
    /// It has not been looked at yet.
    #[default]
    Pending,
    /// Data are sent while the pods run.
    PreCopy,
    /// The pods are being evicted.
    Evicting,
    /// The volumes change hands, and the pods start again.
    Moving,
    /// All is on the target.
    Done,
    /// It couldn't be done; `message` says why.
    Failed,
    /// It was deleted before its end.
    Cancelled,
}

impl MigrationPhase {
    /// Whether it has ended.
    pub fn is_final(self) -> bool {
        self >= Self::Done
    }
}

/// One of the volumes of a migration.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MigratingVolume {
    /// Its claim.
    pub claim: String,
    /// The PortableVolume.
    pub volume: String,
    /// How far it is.
    #[serde(default)]
    pub phase: MigratingVolumePhase,
    /// Bytes of ZFS stream that have been sent.
    #[serde(default)]
    pub bytes: i64,
    /// Bytes that are expected to be sent in the round that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimated_bytes: Option<i64>,
    /// Bytes that are sent in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes_per_second: Option<i64>,
    /// When the round that is under way is expected to be over, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<i64>,
    /// How many times data were sent while the pod ran.
    #[serde(default)]
    pub rounds: i64,
    /// Bytes that were sent when the volume was wanted at the target: the final delta, unless the last round had all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub final_bytes: Option<i64>,
    /// Milliseconds from unmounted at the source to writable at the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_milliseconds: Option<i64>,
}

/// How far one volume of a migration is.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum MigratingVolumePhase {
    /// Nothing is under way.
    #[default]
    Waiting,
    /// Data are sent while it is in use.
    PreCopy,
    /// What is left to send is little enough.
    Warm,
    /// It changes hands.
    Moving,
    /// The target owns it.
    Done,
}

/// A pod that uses a migration's volumes.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MigratingPod {
    /// Its name.
    pub name: String,
    /// Its UID: the pod that follows it has another.
    pub uid: String,
    /// The node that it ran on.
    pub node: String,
}

impl VolumeMigration {
    /// Its phase.
    pub fn phase(&self) -> MigrationPhase {
        self.status.as_ref().map(|status| status.phase).unwrap_or_default()
    }
}
