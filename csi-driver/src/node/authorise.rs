//! Who may have a volume's data: the target of its running handoff, and nobody else.

use std::sync::Arc;

use portolan_crds::{HandoffPhase, PortableVolume};
use portolan_zfs::{DatasetName, Zfs};

use super::Node;
use crate::transfer::{Authorise, Refusal, RefusalCode, Request};
use crate::volume;

/// Asks the API, not a cache: what counts is the handoff as it is now.
pub(super) struct ByHandoff<Z>(pub(super) Arc<Node<Z>>);

impl<Z: Zfs> Authorise for ByHandoff<Z> {
    async fn authorise(&self, peer_node: &str, request: &Request) -> Result<DatasetName, Refusal> {
        let found = self.0.volumes.get_opt(&request.volume).await;
        let found =
            found.map_err(|error| Refusal::new(RefusalCode::Failed, format!("can't read the volume: {error}")))?;
        let found = found
            .ok_or_else(|| Refusal::new(RefusalCode::NotFound, format!("there is no volume {}", request.volume)))?;
        check(&self.0.name, peer_node, request, &found).map_err(|why| Refusal::new(RefusalCode::NotAuthorised, why))?;
        let dataset = volume::dataset(&self.0.pool, &request.volume);
        dataset.map_err(|error| Refusal::new(RefusalCode::Invalid, error.to_string()))
    }
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
    if handoff.phase != HandoffPhase::FinalSync || handoff.epoch != request.epoch {
        return Err(format!("the handoff is in phase {:?} for epoch {}", handoff.phase, handoff.epoch));
    }
    let guid = request.guid.to_string();
    let is = |name: &Option<String>, its: &Option<String>| {
        name.as_ref() == Some(&request.snapshot) && its.as_ref() == Some(&guid)
    };
    // What other replicas share with the source may go ahead of the final snapshot: a later move to one of them is a delta then.
    if is(&handoff.snapshot, &handoff.guid)
        || status.replicas.iter().any(|replica| is(&replica.snapshot, &replica.guid))
    {
        return Ok(());
    }
    Err(format!("snapshot {} ({guid}) is no part of the handoff", request.snapshot))
}

#[cfg(test)]
mod tests {
    use portolan_crds::{Handoff, PortableVolumeSpec, PortableVolumeStatus, Replica};
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
        assert_eq!(check("a", "b", &Request::new("pvc-1", 2, "portolan-1", Guid(5)), &volume), Ok(()));
        for (me, peer, request) in [
            ("a", "c", good.clone()),
            ("b", "b", good.clone()),
            ("a", "b", Request::new("pvc-1", 3, "portolan-2", Guid(7))),
            ("a", "b", Request::new("pvc-1", 2, "portolan-2", Guid(8))),
            ("a", "b", Request::new("pvc-1", 2, "daily", Guid(7))),
        ] {
            assert!(check(me, peer, &request, &volume).is_err(), "{me} {peer} {request:?}");
        }
        if let Some(handoff) = volume.status.as_mut().and_then(|status| status.handoff.as_mut()) {
            handoff.phase = HandoffPhase::Quiescing;
        }
        assert!(check("a", "b", &good, &volume).is_err());
    }
}
