//! The handoff: a volume's move from its owner to another node, as the volume's status tells it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A running move of a volume from its owner to another node.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Handoff {
    /// The owner when the handoff began.
    pub from: String,
    /// The node that takes over.
    pub to: String,
    /// The epoch that the handoff will establish: no other attempt has had it.
    pub epoch: i64,
    /// How far it is.
    pub phase: HandoffPhase,
    /// Who asked for it.
    #[serde(default)]
    pub asked_by: AskedBy,
    /// The VolumeMigration that asked for it, `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<String>,
    /// When it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<MicroTime>,
    /// The rounds of PreCopy that have ended: each brought the target one snapshot nearer.
    #[serde(default)]
    pub rounds: i64,
    /// When the newest round's snapshot was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_at: Option<MicroTime>,
    /// That snapshot's GUID at the source, in decimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_guid: Option<String>,
    /// Whether PreCopy has done what it can: what is left is small enough, or doesn't get smaller.
    #[serde(default)]
    pub warm: bool,
    /// Bytes of ZFS stream that the rounds of PreCopy have brought.
    #[serde(default)]
    pub pre_copy_bytes: i64,
    /// Bytes of the newest round that has ended: what the final delta is predicted to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta_bytes: Option<i64>,
    /// The longest final transfer in milliseconds that is asked for: PreCopy goes on until it is predicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_downtime_milliseconds: Option<i64>,
    /// The most bytes a second that the transfers may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bytes_per_second: Option<i64>,
    /// When the source had proved that nothing can write there any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesced_at: Option<MicroTime>,
    /// The short name at the source of the snapshot that the target fetches: of PreCopy's round, then the final one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// That snapshot's GUID at the source, in decimal: the target's must equal it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guid: Option<String>,
    /// Bytes of ZFS stream that the target has received of what it fetches now.
    #[serde(default)]
    pub bytes: i64,
    /// About how many bytes that will be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimated_bytes: Option<i64>,
    /// Bytes a second at which it comes, or came last.
    #[serde(default)]
    pub rate_bytes_per_second: i64,
    /// In about how many seconds it will be there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<i64>,
    /// What the transfer waits for, while it doesn't run: its turn at the target or at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits: Option<String>,
    /// The common snapshot that the stream started from; none for a full one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Why the newest attempt failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// Who asked for a handoff.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum AskedBy {
    /// A VolumeAttachment: the pod is on the target already.
    #[default]
    Attachment,
    /// A VolumeMigration.
    Migration,
    /// The owner's node was cordoned: its pods will go soon.
    Cordon,
    /// A pod reads a volume that nobody writes: the target gets a copy, and the owner stays.
    Reading,
}

/// The phases of a handoff, in order. Up to FinalSync it can be aborted, and the source is writable again.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, PartialOrd, Serialize)]
pub enum HandoffPhase {
    /// The pod runs on; the target receives one snapshot after another.
    PreCopy,
    /// The source unmounts, sets the dataset read-only and takes the final snapshot.
    #[default]
    Quiescing,
    /// The target receives up to the final snapshot.
    FinalSync,
    /// Owner and epoch are the target's; it makes its dataset writable.
    Activating,
}

/// A move that has ended.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HandoffReport {
    /// How it ended.
    #[serde(default)]
    pub outcome: HandoffOutcome,
    /// Why it was aborted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The owner before.
    pub from: String,
    /// The owner after, if it was done.
    pub to: String,
    /// The epoch that it established, or would have.
    pub epoch: i64,
    /// The VolumeMigration that asked for it, `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<String>,
    /// The rounds of PreCopy.
    #[serde(default)]
    pub rounds: i64,
    /// Bytes of ZFS stream that they brought.
    #[serde(default)]
    pub pre_copy_bytes: i64,
    /// Bytes of ZFS stream that were sent when nothing could write any more.
    pub bytes: i64,
    /// The common snapshot that the stream started from; none for a full one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The GUID, in decimal, of the newest snapshot that the target was to fetch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guid: Option<String>,
    /// The GUID, in decimal, of the newest round's snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_guid: Option<String>,
    /// When it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<MicroTime>,
    /// When it ended: the target was writable, or the abort was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<MicroTime>,
    /// Milliseconds from unmounted at the source, by its clock, to writable at the target, by the target's.
    pub downtime_milliseconds: i64,
}

/// How a handoff ended.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum HandoffOutcome {
    /// The target owns the volume.
    #[default]
    Done,
    /// The source owns it still.
    Aborted,
}
