//! Writing a volume's status: compare-and-set, always.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use portolan_crds::{
    Handoff, HandoffPhase, HandoffReport, PortableVolume, PortableVolumeSpec, PortableVolumeStatus, Replica,
    VolumePhase, condition,
};
use portolan_runtime::conditions;

use crate::handoff::Known;
use crate::quantity::Human;
use crate::volume;

/// A copy that was changed behind Portolan's back.
pub(crate) const DIVERGED: &str = "Diverged";

/// Writes a changed status over exactly the object that was read; returns what is there now.
pub(crate) async fn status(
    volumes: &Api<PortableVolume>,
    read: &PortableVolume,
    change: impl FnOnce(&mut PortableVolumeStatus),
) -> kube::Result<PortableVolume> {
    let mut next = read.clone();
    let mut status = volume::status(read);
    change(&mut status);
    next.status = Some(status);
    next.metadata.managed_fields = None;
    volumes.replace_status(&read.name_any(), &PostParams::default(), &next).await
}

/// Whether a write failed because somebody else has written since.
pub(crate) fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_conflict())
}

pub(crate) fn now() -> MicroTime {
    MicroTime(jiff::Timestamp::now())
}

/// Puts a node on the list of those that hold a dataset, or changes what is known of its copy.
pub(crate) fn replica(status: &mut PortableVolumeStatus, node: &str, snapshot: Option<Known>) {
    let index = status.replicas.iter().position(|replica| replica.node == node).unwrap_or_else(|| {
        status.replicas.push(Replica { node: node.to_owned(), ..Replica::default() });
        status.replicas.len() - 1
    });
    if let Some(Known { name, guid }) = snapshot {
        status.replicas[index].snapshot = Some(name);
        status.replicas[index].guid = Some(guid);
    }
}

/// A node owns a volume that it has just made.
pub(crate) fn own(status: &mut PortableVolumeStatus, node: &str, spec: &PortableVolumeSpec) {
    status.owner = Some(node.to_owned());
    status.epoch = 1;
    applied(status, spec);
    ready(status);
}

/// The owner's dataset is what the spec says.
pub(crate) fn applied(status: &mut PortableVolumeStatus, spec: &PortableVolumeSpec) {
    status.size_bytes = Some(spec.size_bytes);
    status.parameters = Some(spec.parameters.clone());
}

pub(crate) fn ready(status: &mut PortableVolumeStatus) {
    status.phase = VolumePhase::Ready;
    let owner = status.owner.as_deref().unwrap_or_default();
    let message = format!("node {owner} has the volume at epoch {}", status.epoch);
    conditions::set(&mut status.conditions, condition::READY, condition::TRUE, "Ready", &message, None);
}

pub(crate) fn not_ready(status: &mut PortableVolumeStatus, reason: &str, message: &str) -> bool {
    conditions::set(&mut status.conditions, condition::READY, condition::FALSE, reason, message, None)
}

pub(crate) fn used(status: &mut PortableVolumeStatus, bytes: i64) {
    status.used_bytes = Some(bytes);
    status.used = Some(Human(bytes).to_string());
}

/// The source's last word: the volume as it is in this snapshot.
pub(crate) fn published(status: &mut PortableVolumeStatus, me: &str, snapshot: Known, quiesced_at: MicroTime) {
    replica(status, me, Some(snapshot.clone()));
    if let Some(handoff) = &mut status.handoff {
        handoff.snapshot = Some(snapshot.name);
        handoff.guid = Some(snapshot.guid);
        handoff.quiesced_at = Some(quiesced_at);
        handoff.phase = HandoffPhase::FinalSync;
        handoff.last_error = None;
    }
}

/// The target becomes the owner: from here on the volume is what its copy says.
pub(crate) fn taken_over(status: &mut PortableVolumeStatus, me: &str) {
    let Some(handoff) = &mut status.handoff else { return };
    handoff.phase = HandoffPhase::Activating;
    handoff.last_error = None;
    status.owner = Some(me.to_owned());
    status.epoch = handoff.epoch;
    let received = handoff.snapshot.clone().zip(handoff.guid.clone()).map(|(name, guid)| Known { name, guid });
    replica(status, me, received);
    status.conditions.retain(|condition| condition.type_ != DIVERGED);
}

/// The handoff becomes the report of itself.
pub(crate) fn finished(status: &mut PortableVolumeStatus, at: MicroTime) {
    let Some(handoff) = status.handoff.take() else { return };
    status.last_handoff = Some(report(handoff, at));
    ready(status);
}

fn report(handoff: Handoff, at: MicroTime) -> HandoffReport {
    let downtime = handoff.quiesced_at.as_ref().map_or(0, |since| at.0.as_millisecond() - since.0.as_millisecond());
    HandoffReport {
        from: handoff.from,
        to: handoff.to,
        epoch: handoff.epoch,
        bytes: handoff.bytes,
        base: handoff.base,
        started_at: handoff.started_at,
        finished_at: Some(at),
        downtime_milliseconds: downtime,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handoff_from_end_to_end() {
        let known = |name: &str| Known { name: name.into(), guid: "7".into() };
        let mut status = PortableVolumeStatus::default();
        replica(&mut status, "a", None);
        own(&mut status, "a", &PortableVolumeSpec::default());
        status.handoff = Some(Handoff { from: "a".into(), to: "b".into(), epoch: 2, bytes: 5, ..Handoff::default() });
        replica(&mut status, "b", None);
        let at = |millisecond| MicroTime(jiff::Timestamp::from_millisecond(millisecond).unwrap());
        published(&mut status, "a", known("portolan-2"), at(1000));
        assert_eq!(status.handoff.as_ref().unwrap().phase, HandoffPhase::FinalSync);
        assert_eq!((status.owner.as_deref(), status.epoch), (Some("a"), 1));
        taken_over(&mut status, "b");
        assert_eq!((status.owner.as_deref(), status.epoch), (Some("b"), 2));
        finished(&mut status, at(1250));
        assert_eq!((status.phase, status.handoff.is_none()), (VolumePhase::Ready, true));
        let report = status.last_handoff.unwrap();
        assert_eq!((report.downtime_milliseconds, report.bytes, report.epoch), (250, 5, 2));
        assert_eq!(status.replicas.len(), 2);
        assert!(status.replicas.iter().all(|replica| replica.guid.as_deref() == Some("7")));
    }
}
