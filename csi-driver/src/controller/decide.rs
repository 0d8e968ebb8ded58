//! What a VolumeAttachment needs next: a pure function of the volume and of the other attachments.

use portolan_crds::{AskedBy, Handoff, HandoffPhase, PortableVolume, PortableVolumeStatus, VolumePhase};

use crate::handoff;
use crate::volume;

/// What to do about an attachment.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Decision {
    /// The node may write the volume.
    Attached,
    /// Move the volume to the node.
    Move,
    /// Have the node get a copy of a volume that nobody writes.
    Copy,
    /// Want the volume on the node: there is none yet, it waits for its key.
    Place,
    /// End the move that is under way: the volume stays where it is.
    Stay,
    /// Wait for what is under way.
    Wait,
    /// It can't be done as things are.
    Refuse(String),
}

/// An attachment of the volume to another node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Other {
    /// The node.
    pub(crate) node: String,
    /// Whether it was told that it may write the volume.
    pub(crate) attached: bool,
}

/// What an attachment of `volume` to `node` needs, beside the `others`.
pub(crate) fn decide(volume: &PortableVolume, node: &str, others: &[Other]) -> Decision {
    let status = volume::status(volume);
    if volume.metadata.deletion_timestamp.is_some() {
        return Decision::Refuse("the volume is being deleted".into());
    }
    let Some(owner) = &status.owner else { return before_its_key(volume, node, others) };
    if volume.spec.is_shared() {
        return to_read(volume, &status, node);
    }
    let here = owner == node;
    match status.handoff.as_ref().map(|handoff| (handoff.phase, handoff.to.as_str())) {
        None | Some((HandoffPhase::PreCopy, _)) if here => match status.phase {
            VolumePhase::Ready => return Decision::Attached,
            _ => return Decision::Wait,
        },
        None | Some((HandoffPhase::PreCopy, _)) => {}
        Some((HandoffPhase::Activating, _)) => return Decision::Wait,
        Some((_, to)) if to == node || others.iter().any(|other| other.node == to) => return Decision::Wait,
        // The pod that it was moving for is gone.
        Some(_) if here => return Decision::Stay,
        Some(_) => {}
    }
    match others.iter().find(|other| other.attached) {
        Some(other) => attached_to(volume, other),
        None => Decision::Move,
    }
}

/// Of a volume that nobody writes. Each node reads its own copy; copies are made one after the other.
fn to_read(volume: &PortableVolume, status: &PortableVolumeStatus, node: &str) -> Decision {
    let complete = handoff::is_complete(volume, node);
    let Some(running) = &status.handoff else {
        return match complete {
            true if status.owner.as_deref() == Some(node) && status.phase != VolumePhase::Ready => Decision::Wait,
            true => Decision::Attached,
            false => Decision::Copy,
        };
    };
    let party = running.from == node || running.to == node;
    match running.phase {
        HandoffPhase::PreCopy if running.to == node => waits(running, Decision::Wait),
        _ if complete && (!party || running.phase == HandoffPhase::PreCopy) => Decision::Attached,
        // A guess, or one that gets nowhere: it is asked for again.
        HandoffPhase::PreCopy if running.asked_by == AskedBy::Cordon || running.last_error.is_some() => Decision::Copy,
        // It shall have another owner, and a pod comes first.
        HandoffPhase::Quiescing | HandoffPhase::FinalSync if running.from == node => Decision::Stay,
        _ => waits(running, Decision::Wait),
    }
}

/// Waits for a handoff that goes on; says why one doesn't.
fn waits(running: &Handoff, goes_on: Decision) -> Decision {
    match &running.last_error {
        Some(why) => Decision::Refuse(format!("its copy for node {} is not complete yet: {why}", running.to)),
        None => goes_on,
    }
}

/// Of a volume that nobody has owned yet.
fn before_its_key(volume: &PortableVolume, node: &str, others: &[Other]) -> Decision {
    match (volume::awaits_key(volume), others.iter().find(|other| other.attached)) {
        (false, _) => Decision::Wait,
        // The kubelet brings the key when it mounts.
        (true, _) if volume.spec.placement.node == node => Decision::Attached,
        (true, Some(other)) => attached_to(volume, other),
        (true, None) => Decision::Place,
    }
}

fn attached_to(volume: &PortableVolume, other: &Other) -> Decision {
    let zvol = match volume.spec.read_only && volume.spec.is_zvol() {
        true => ", as it is a zvol: several can read only a volume without ext4, XFS or volumeMode Block",
        false => "",
    };
    Decision::Refuse(format!("the volume is attached to node {}: one node at a time can have it{zvol}", other.node))
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use portolan_crds::{PortableVolumeSpec, Replica, condition};
    use portolan_runtime::conditions;

    use super::*;

    fn owned_by(owner: Option<&str>, phase: VolumePhase) -> PortableVolume {
        let mut volume = PortableVolume::new("pvc-1", PortableVolumeSpec::default());
        let owner = owner.map(str::to_owned);
        volume.status = Some(PortableVolumeStatus { owner, epoch: 4, phase, ..PortableVolumeStatus::default() });
        volume
    }

    fn moving(phase: HandoffPhase) -> PortableVolume {
        let state = if phase == HandoffPhase::PreCopy { VolumePhase::Ready } else { VolumePhase::Moving };
        let mut volume = owned_by(Some("a"), state);
        let handoff = Handoff { from: "a".into(), to: "b".into(), epoch: 5, phase, ..Handoff::default() };
        volume.status.as_mut().unwrap().handoff = Some(handoff);
        volume
    }

    fn other(node: &str, attached: bool) -> Other {
        Other { node: node.into(), attached }
    }

    #[test]
    fn decisions() {
        let ready = owned_by(Some("a"), VolumePhase::Ready);
        assert_eq!(decide(&ready, "a", &[]), Decision::Attached);
        assert_eq!(decide(&ready, "b", &[]), Decision::Move);
        assert_eq!(decide(&ready, "b", &[other("a", false)]), Decision::Move);
        assert!(matches!(decide(&ready, "b", &[other("a", true)]), Decision::Refuse(why) if why.contains("node a")));
        assert_eq!(decide(&owned_by(None, VolumePhase::Pending), "a", &[]), Decision::Wait);
        let mut deleted = ready;
        deleted.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        assert!(matches!(decide(&deleted, "a", &[]), Decision::Refuse(_)));
    }

    #[test]
    fn a_volume_that_waits_for_its_key_goes_where_its_pod_is() {
        let mut volume = owned_by(None, VolumePhase::Pending);
        volume.spec.placement.node = "a".into();
        let status = volume.status.as_mut().unwrap();
        status.replicas.push(Replica { node: "a".into(), ..Replica::default() });
        conditions::set(&mut status.conditions, condition::READY, condition::FALSE, volume::AWAITS_KEY, "", None);
        assert_eq!(decide(&volume, "a", &[]), Decision::Attached);
        assert_eq!(decide(&volume, "b", &[other("a", false)]), Decision::Place);
        assert!(matches!(decide(&volume, "b", &[other("a", true)]), Decision::Refuse(why) if why.contains("node a")));
        // Wanted on b, whose agent has not said anything yet.
        volume.spec.placement.node = "b".into();
        assert_eq!(decide(&volume, "b", &[]), Decision::Wait);
    }

    #[test]
    fn a_move_follows_the_pod() {
        for phase in [HandoffPhase::Quiescing, HandoffPhase::FinalSync] {
            let moving = moving(phase);
            assert_eq!(decide(&moving, "b", &[]), Decision::Wait);
            for node in ["a", "c"] {
                assert_eq!(decide(&moving, node, &[other("b", false)]), Decision::Wait);
            }
            assert_eq!(decide(&moving, "a", &[]), Decision::Stay);
            assert_eq!(decide(&moving, "c", &[]), Decision::Move);
        }
        for node in ["a", "b", "c"] {
            assert_eq!(decide(&moving(HandoffPhase::Activating), node, &[]), Decision::Wait);
        }
    }

    /// A volume that nobody writes, of node a; b has a copy.
    fn shared() -> PortableVolume {
        let mut volume = owned_by(Some("a"), VolumePhase::Ready);
        volume.spec.read_only = true;
        let copy = Replica { node: "b".into(), snapshot: Some("portolan-4".into()), guid: Some("7".into()) };
        volume.status.as_mut().unwrap().replicas = vec![copy];
        volume
    }

    #[test]
    fn what_nobody_writes_is_attached_wherever_its_copy_is_complete() {
        let volume = shared();
        for node in ["a", "b"] {
            assert_eq!(decide(&volume, node, &[other("a", true), other("c", true)]), Decision::Attached, "{node}");
        }
        assert_eq!(decide(&volume, "c", &[other("a", true), other("b", true)]), Decision::Copy);
        let mut deleted = volume.clone();
        deleted.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        assert!(matches!(decide(&deleted, "b", &[]), Decision::Refuse(_)));
        let mut zvol = volume;
        zvol.spec.filesystem = portolan_crds::Filesystem::Ext4;
        assert!(matches!(decide(&zvol, "b", &[other("a", true)]), Decision::Refuse(why) if why.contains("zvol")));
        assert_eq!(decide(&zvol, "b", &[]), Decision::Move, "one node after the other, as ever");
    }

    #[test]
    fn copies_are_made_one_after_the_other_and_one_that_fails_holds_up_nobody() {
        let mut volume = shared();
        let copying = |to: &str, asked_by, last_error: Option<&str>| Handoff {
            from: "a".into(),
            to: to.into(),
            phase: HandoffPhase::PreCopy,
            asked_by,
            last_error: last_error.map(Into::into),
            ..Handoff::default()
        };
        let decided = |volume: &mut PortableVolume, handoff, node| {
            volume.status.as_mut().unwrap().handoff = Some(handoff);
            decide(volume, node, &[])
        };
        for node in ["a", "b"] {
            assert_eq!(decided(&mut volume, copying("c", AskedBy::Reading, None), node), Decision::Attached);
        }
        assert_eq!(decided(&mut volume, copying("c", AskedBy::Reading, None), "c"), Decision::Wait);
        let failed = decided(&mut volume, copying("c", AskedBy::Reading, Some("no space")), "c");
        assert!(matches!(failed, Decision::Refuse(why) if why.contains("no space")));
        assert_eq!(decided(&mut volume, copying("c", AskedBy::Reading, None), "d"), Decision::Wait);
        assert_eq!(decided(&mut volume, copying("c", AskedBy::Reading, Some("no space")), "d"), Decision::Copy);
        assert_eq!(decided(&mut volume, copying("c", AskedBy::Cordon, None), "d"), Decision::Copy);
        // Until it has been ended another round might come, into what is mounted.
        assert_eq!(decided(&mut volume, copying("b", AskedBy::Reading, None), "b"), Decision::Wait);
    }

    #[test]
    fn while_another_node_becomes_the_owner_only_those_two_wait() {
        let mut volume = shared();
        let copy = Replica { node: "c".into(), snapshot: Some("portolan-4".into()), guid: Some("7".into()) };
        volume.status.as_mut().unwrap().replicas.push(copy);
        for phase in [HandoffPhase::Quiescing, HandoffPhase::FinalSync, HandoffPhase::Activating] {
            let owner = if phase == HandoffPhase::Activating { "b" } else { "a" };
            let status = volume.status.as_mut().unwrap();
            status.owner = Some(owner.into());
            status.handoff = Some(Handoff { from: "a".into(), to: "b".into(), phase, ..Handoff::default() });
            assert_eq!(decide(&volume, "c", &[]), Decision::Attached, "{phase:?}");
            assert_eq!(decide(&volume, "b", &[]), Decision::Wait, "{phase:?}");
            assert_eq!(decide(&volume, "d", &[]), Decision::Wait, "{phase:?}");
            let source = if phase == HandoffPhase::Activating { Decision::Wait } else { Decision::Stay };
            assert_eq!(decide(&volume, "a", &[]), source, "{phase:?}");
        }
    }

    #[test]
    fn while_it_is_copied_it_is_in_use() {
        let copying = moving(HandoffPhase::PreCopy);
        assert_eq!(decide(&copying, "a", &[]), Decision::Attached);
        assert_eq!(decide(&copying, "b", &[]), Decision::Move);
        assert_eq!(decide(&copying, "c", &[]), Decision::Move);
        assert!(matches!(decide(&copying, "b", &[other("a", true)]), Decision::Refuse(_)));
    }
}
