//! What a VolumeAttachment needs next: a pure function of the volume and of the other attachments.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use portolan_crds::{Handoff, PortableVolume, PortableVolumeStatus, Replica, VolumePhase, condition};
use portolan_runtime::conditions;

use crate::volume;

/// What to do about an attachment.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Decision {
    /// The node may write the volume.
    Attached,
    /// Move the volume to the node.
    Move,
    /// Wait for what is under way.
    Wait,
    /// It can't be done as things are.
    Refuse(String),
}

/// What an attachment of `volume` to `node` needs, while `others` are the other nodes that it is attached to.
pub(crate) fn decide(volume: &PortableVolume, node: &str, others: &[String]) -> Decision {
    let status = volume::status(volume);
    if volume.metadata.deletion_timestamp.is_some() {
        return Decision::Refuse("the volume is being deleted".into());
    }
    let Some(owner) = &status.owner else { return Decision::Wait };
    if status.handoff.is_some() {
        // To this node or to another: its end is an event.
        return Decision::Wait;
    }
    if owner == node {
        return if status.phase == VolumePhase::Ready { Decision::Attached } else { Decision::Wait };
    }
    match others.first() {
        Some(other) => {
            Decision::Refuse(format!("the volume is attached to node {other}: one node at a time can have it"))
        }
        None => Decision::Move,
    }
}

/// Writes the start of a move to `node` into a status.
pub(crate) fn start(status: &mut PortableVolumeStatus, node: &str, now: Timestamp) {
    let from = status.owner.clone().unwrap_or_default();
    let message = format!("moving from node {from} to {node}");
    conditions::set(&mut status.conditions, condition::READY, condition::FALSE, "Moving", &message, None);
    status.phase = VolumePhase::Moving;
    // Before there is a dataset: what a crash leaves on the node is known then. The node would do it itself, one write later.
    if !status.replicas.iter().any(|replica| replica.node == node) {
        status.replicas.push(Replica { node: node.to_owned(), ..Replica::default() });
    }
    status.handoff = Some(Handoff {
        from,
        to: node.to_owned(),
        epoch: status.epoch + 1,
        started_at: Some(MicroTime(now)),
        ..Handoff::default()
    });
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use portolan_crds::{HandoffPhase, PortableVolumeSpec};

    use super::*;

    fn owned_by(owner: Option<&str>, phase: VolumePhase) -> PortableVolume {
        let mut volume = PortableVolume::new("pvc-1", PortableVolumeSpec::default());
        let owner = owner.map(str::to_owned);
        volume.status = Some(PortableVolumeStatus { owner, epoch: 4, phase, ..PortableVolumeStatus::default() });
        volume
    }

    #[test]
    fn decisions() {
        let ready = owned_by(Some("a"), VolumePhase::Ready);
        assert_eq!(decide(&ready, "a", &[]), Decision::Attached);
        assert_eq!(decide(&ready, "b", &[]), Decision::Move);
        assert!(matches!(decide(&ready, "b", &["a".into()]), Decision::Refuse(why) if why.contains("node a")));
        assert_eq!(decide(&owned_by(None, VolumePhase::Pending), "a", &[]), Decision::Wait);
        let mut moving = ready.clone();
        start(moving.status.as_mut().unwrap(), "b", Timestamp::UNIX_EPOCH);
        for node in ["a", "b", "c"] {
            assert_eq!(decide(&moving, node, &[]), Decision::Wait);
        }
        let mut deleted = ready;
        deleted.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        assert!(matches!(decide(&deleted, "a", &[]), Decision::Refuse(_)));
    }

    #[test]
    fn a_move_starts_with_its_source() {
        let mut status = owned_by(Some("a"), VolumePhase::Ready).status.unwrap();
        start(&mut status, "b", Timestamp::UNIX_EPOCH);
        assert_eq!(status.replicas.last().map(|replica| replica.node.as_str()), Some("b"));
        let handoff = status.handoff.unwrap();
        assert_eq!((handoff.from.as_str(), handoff.to.as_str(), handoff.epoch), ("a", "b", 5));
        assert_eq!(
            (handoff.phase, status.phase, status.owner.as_deref()),
            (HandoffPhase::Quiescing, VolumePhase::Moving, Some("a"))
        );
    }
}
