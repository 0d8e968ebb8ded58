//! Who may have a volume's data: the target of its running handoff, a node that makes a new volume of one of its snapshots, and nobody else.

use std::sync::Arc;

use kube::api::ListParams;
use portolan_crds::{AskedBy, HandoffPhase, PortableVolume};
use portolan_zfs::{Snapshot, Zfs};

use super::Node;
use crate::handoff::{self, Asked, Known};
use crate::transfer::{Authorise, Class, Grant, Refusal, RefusalCode, Request};
use crate::volume;

/// Asks the API, not a cache: what counts is the volume as it is now.
pub(super) struct ByVolume<Z>(pub(super) Arc<Node<Z>>);

impl<Z: Zfs> Authorise for ByVolume<Z> {
    async fn authorise(&self, peer_node: &str, request: &Request) -> Result<Grant, Refusal> {
        let name = request.restore.as_ref().unwrap_or(&request.volume);
        // A new volume is one snapshot; a copy of a volume has its history.
        let history = request.restore.is_none();
        // At once: a pod may wait for it.
        let asked = async {
            match history {
                true => self.asked(&request.volume).await,
                false => Ok(Vec::new()),
            }
        };
        let (found, asked) = tokio::join!(self.0.volumes.get_opt(name), asked);
        let found =
            found.map_err(|error| Refusal::new(RefusalCode::Failed, format!("can't read the volume: {error}")))?;
        let found = found.ok_or_else(|| Refusal::new(RefusalCode::NotFound, format!("there is no volume {name}")))?;
        let checked = match request.restore {
            Some(_) => check_restore(peer_node, request, &found),
            None => check(&self.0.name, peer_node, request, &found),
        };
        checked.map_err(|why| Refusal::new(RefusalCode::NotAuthorised, why))?;
        let dataset = volume::dataset(&self.0.pool, &request.volume);
        let dataset = dataset.map_err(|error| Refusal::new(RefusalCode::Invalid, error.to_string()))?;
        let (shared, asked) = (handoff::shared_guids(&volume::status(&found)), asked?);
        let to = peer_node.to_owned();
        let travels = move |snapshot: &Snapshot| {
            let name = snapshot.name.short().to_owned();
            history && handoff::travels(&shared, &asked, &to, &Known { name, guid: snapshot.guid.to_string() })
        };
        // A new volume is encrypted as its source is.
        let (raw, class) = (found.spec.encryption.is_some(), class_of(&found, request));
        Ok(Grant { dataset, raw, class, estimated: !is_known_small(&found, class), travels: Box::new(travels) })
    }
}

/// How urgent a transfer of this volume, as its object is, is. Each end asks this for its own queue.
pub(super) fn class_of(volume: &PortableVolume, request: &Request) -> Class {
    let handoff = volume.status.as_ref().and_then(|status| status.handoff.as_ref());
    match handoff.map(|handoff| (handoff.phase, handoff.asked_by)) {
        _ if request.restore.is_some() => Class::Restore,
        Some((HandoffPhase::FinalSync, _)) => Class::Final,
        Some((_, AskedBy::Reading)) => Class::Restore,
        _ => Class::Background,
    }
}

/// Whether a stream is what is left after rounds of PreCopy have made it small: it has come before anybody could read how much it would be.
fn is_known_small(volume: &PortableVolume, class: Class) -> bool {
    let handoff = volume.status.as_ref().and_then(|status| status.handoff.as_ref());
    class == Class::Final && handoff.is_some_and(|handoff| handoff.warm)
}

impl<Z: Zfs> ByVolume<Z> {
    /// The snapshots that are wanted of a volume, and who has said that it has none of them any more, as it is now.
    async fn asked(&self, volume: &str) -> Result<Vec<Asked>, Refusal> {
        let found = self.0.snapshots.list(&ListParams::default().fields(&format!("spec.volume={volume}"))).await;
        let failed = |error| Refusal::new(RefusalCode::Failed, format!("can't read the volume's snapshots: {error}"));
        Ok(found.map_err(failed)?.iter().map(Asked::of).collect())
    }
}

/// Whether the peer makes this new volume, and of the snapshot that it asks for.
fn check_restore(peer: &str, request: &Request, new: &PortableVolume) -> Result<(), String> {
    let name = request.restore.as_deref().unwrap_or_default();
    if volume::status(new).owner.is_some() || new.spec.placement.node != peer {
        return Err(format!("volume {name} is made already, or not on node {peer}"));
    }
    let source = new.spec.source.as_ref().ok_or_else(|| format!("volume {name} begins empty"))?;
    if source.volume != request.volume
        || source.short_name != request.snapshot
        || source.guid != request.guid.to_string()
    {
        return Err(format!(
            "volume {name} begins as {}@{}, not as what is asked for",
            source.volume, source.short_name
        ));
    }
    Ok(())
}

fn check(me: &str, peer: &str, request: &Request, volume: &PortableVolume) -> Result<(), String> {
    let status = volume::status(volume);
    let handoff = status.handoff.ok_or_else(|| format!("volume {} is not moving", request.volume))?;
    if (handoff.from.as_str(), handoff.to.as_str()) != (me, peer) {
        return Err(format!(
            "volume {} moves from {} to {}, not from {me} to {peer}",
            request.volume, handoff.from, handoff.to
        ));
    }
    let sends = matches!(handoff.phase, HandoffPhase::PreCopy | HandoffPhase::FinalSync);
    if !sends || handoff.epoch != request.epoch {
        return Err(format!("the handoff is in phase {:?} for epoch {}", handoff.phase, handoff.epoch));
    }
    let guid = request.guid.to_string();
    if handoff.snapshot.as_ref() == Some(&request.snapshot) && handoff.guid.as_ref() == Some(&guid) {
        return Ok(());
    }
    Err(format!("snapshot {} ({guid}) is no part of the handoff", request.snapshot))
}

#[cfg(test)]
mod tests {
    use portolan_crds::{Handoff, Placement, PortableVolumeSpec, PortableVolumeStatus, Replica, VolumeSource};
    use portolan_zfs::Guid;

    use super::*;

    #[test]
    fn only_the_target_of_the_running_handoff() {
        let mut volume = PortableVolume::new("pvc-1", PortableVolumeSpec::default());
        let good = Request::new("pvc-1", 2, "portolan-2", Guid(7));
        assert!(check("a", "b", &good, &volume).is_err());
        volume.status = Some(PortableVolumeStatus {
            handoff: Some(Handoff {
                from: "a".into(),
                to: "b".into(),
                epoch: 2,
                phase: HandoffPhase::FinalSync,
                snapshot: Some("portolan-2".into()),
                guid: Some("7".into()),
                ..Handoff::default()
            }),
            replicas: vec![Replica { node: "c".into(), snapshot: Some("portolan-1".into()), guid: Some("5".into()) }],
            ..PortableVolumeStatus::default()
        });
        assert_eq!(check("a", "b", &good, &volume), Ok(()));
        for (me, peer, request) in [
            ("a", "c", good.clone()),
            ("b", "b", good.clone()),
            ("a", "b", Request::new("pvc-1", 3, "portolan-2", Guid(7))),
            ("a", "b", Request::new("pvc-1", 2, "portolan-2", Guid(8))),
            ("a", "b", Request::new("pvc-1", 2, "daily", Guid(7))),
            ("a", "b", Request::new("pvc-1", 2, "portolan-1", Guid(5))),
        ] {
            assert!(check(me, peer, &request, &volume).is_err(), "{me} {peer} {request:?}");
        }
        if let Some(handoff) = volume.status.as_mut().and_then(|status| status.handoff.as_mut()) {
            handoff.phase = HandoffPhase::Quiescing;
        }
        assert!(check("a", "b", &good, &volume).is_err());
    }

    #[test]
    fn only_what_a_pod_waits_for_is_urgent() {
        let request = Request::new("pvc-1", 2, "portolan-2", Guid(7));
        let asked_for = |phase: Option<HandoffPhase>, asked_by| {
            let handoff = phase.map(|phase| Handoff { phase, asked_by, ..Handoff::default() });
            let status = PortableVolumeStatus { handoff, ..PortableVolumeStatus::default() };
            let volume = PortableVolume { status: Some(status), ..PortableVolume::new("pvc-1", Default::default()) };
            (
                class_of(&volume, &request),
                class_of(&volume, &Request { restore: Some("pvc-2".into()), ..request.clone() }),
            )
        };
        let class = |phase| asked_for(phase, AskedBy::Migration);
        assert_eq!(class(Some(HandoffPhase::FinalSync)).0, Class::Final);
        assert_eq!(class(Some(HandoffPhase::PreCopy)).0, Class::Background);
        assert_eq!(class(Some(HandoffPhase::Quiescing)).0, Class::Background, "a round's snapshot, not the last");
        assert_eq!(asked_for(Some(HandoffPhase::PreCopy), AskedBy::Reading).0, Class::Restore);
        assert_eq!(class(None), (Class::Background, Class::Restore));
    }

    #[test]
    fn only_the_maker_of_a_volume_that_begins_as_the_snapshot() {
        let source = VolumeSource {
            volume: "pvc-1".into(),
            short_name: "daily".into(),
            guid: "7".into(),
            ..VolumeSource::default()
        };
        let placement = Placement { node: "b".into() };
        let spec = PortableVolumeSpec { source: Some(source), placement, ..PortableVolumeSpec::default() };
        let mut new = PortableVolume::new("pvc-2", spec);
        let good = Request::new("pvc-1", 1, "daily", Guid(7));
        assert_eq!(check_restore("b", &good, &new), Ok(()));
        assert!(check_restore("c", &good, &new).is_err());
        for bad in [Request::new("pvc-3", 1, "daily", Guid(7)), Request::new("pvc-1", 1, "daily", Guid(8))] {
            assert!(check_restore("b", &bad, &new).is_err(), "{bad:?}");
        }
        new.status = Some(PortableVolumeStatus { owner: Some("b".into()), ..PortableVolumeStatus::default() });
        assert!(check_restore("b", &good, &new).is_err(), "it is made already");
    }
}
