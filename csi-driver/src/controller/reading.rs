//! Copies of volumes that nobody writes, for the nodes that read them. A copy comes as in PreCopy, one after the other, and that ends as soon
//! as the copy is complete: the owner stays.

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use portolan_crds::{AskedBy, Handoff, HandoffPhase, PortableVolume};

use super::Hub;
use super::attach::happen;
use super::volumes::is_ready;
use super::wish::{Needs, no_pool};
use crate::handoff::{self, Ask, Event};
use crate::volume;
use crate::write;

/// How long a copy that fails may hold up another node's.
const TURN: SignedDuration = SignedDuration::from_secs(30);

/// Asks for a copy on `node`; why it can't have one now, if it can't.
pub(super) async fn ask_for_copy(hub: &Hub, volume: &PortableVolume, node: &str) -> kube::Result<Option<String>> {
    if let Some(why) = no_pool(&hub.storage_nodes, node, Needs::of(&volume.spec)).await? {
        return Ok(Some(why));
    }
    let status = volume::status(volume);
    for party in [status.owner.as_deref().unwrap_or_default(), node] {
        if !is_up(hub, party).await? {
            return Ok(Some(format!(
                "node {node} has no complete copy of volume {}, and node {party} is not ready: a copy of it is made when that is back",
                volume.name_any()
            )));
        }
    }
    if let Some(running) = status.handoff.filter(|running| running.asked_by == AskedBy::Reading) {
        if !has_had_its_turn(&running, Timestamp::now()) {
            return Ok(None);
        }
        let why = format!("it gets nowhere, and node {node} waits for a copy");
        happen(hub, volume, Event::Aborted { why, at: write::now() }).await?;
        return Ok(None);
    }
    let ask = Ask { to: node.to_owned(), by: AskedBy::Reading, warm: true, ..Ask::default() };
    if happen(hub, volume, Event::Asked(ask, write::now())).await? {
        tracing::info!(volume = volume.name_any(), to = node, "asked for a copy to read");
    }
    Ok(None)
}

fn has_had_its_turn(running: &Handoff, now: Timestamp) -> bool {
    running.started_at.as_ref().is_none_or(|began| now.duration_since(began.0) >= TURN)
}

/// Ends the making of a copy that is complete, or whose node is down. False if there is nothing to end.
pub(super) async fn end_copy(hub: &Hub, volume: &PortableVolume) -> kube::Result<bool> {
    let Some(target) = handoff::copying(volume).filter(|_| volume.spec.is_shared()) else { return Ok(false) };
    let up = is_up(hub, target).await?;
    let Some(why) = why_end(volume, target, up) else { return Ok(false) };
    happen(hub, volume, Event::Aborted { why, at: write::now() }).await
}

/// Why a copy is not to go on. One that a person has asked for is theirs to end.
fn why_end(volume: &PortableVolume, target: &str, up: bool) -> Option<String> {
    let running = volume.status.as_ref()?.handoff.as_ref().filter(|running| running.phase == HandoffPhase::PreCopy)?;
    match running.asked_by {
        AskedBy::Migration | AskedBy::Attachment => None,
        _ if handoff::is_complete(volume, target) => Some(format!("node {target} has a complete copy")),
        AskedBy::Reading if !up => Some(format!("node {target}, for which a copy is made, is not ready")),
        AskedBy::Reading | AskedBy::Cordon => None,
    }
}

async fn is_up(hub: &Hub, node: &str) -> kube::Result<bool> {
    Ok(hub.nodes.get_opt(node).await?.is_some_and(|node| is_ready(&node)))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
    use portolan_crds::{PortableVolumeSpec, PortableVolumeStatus, Replica};

    use super::*;

    #[test]
    fn a_copy_ends_when_it_is_complete_or_nobody_is_there_to_take_it() {
        let ends = |asked_by, guid: Option<&str>, up| {
            let mut volume = PortableVolume::new("v", PortableVolumeSpec { read_only: true, ..Default::default() });
            let snapshot = guid.map(|_| "portolan-2".to_owned());
            let copy = Replica { node: "b".into(), snapshot, guid: guid.map(Into::into) };
            let handoff = Handoff { to: "b".into(), phase: HandoffPhase::PreCopy, asked_by, ..Handoff::default() };
            volume.status = Some(PortableVolumeStatus {
                owner: Some("a".into()),
                handoff: Some(handoff),
                replicas: vec![copy],
                ..PortableVolumeStatus::default()
            });
            why_end(&volume, "b", up)
        };
        assert_eq!(ends(AskedBy::Reading, None, true), None, "it is on its way");
        assert!(ends(AskedBy::Reading, Some("7"), true).unwrap().contains("complete"));
        assert!(ends(AskedBy::Cordon, Some("7"), true).unwrap().contains("complete"));
        assert!(ends(AskedBy::Reading, None, false).unwrap().contains("not ready"));
        assert_eq!(ends(AskedBy::Cordon, None, false), None);
        assert_eq!(ends(AskedBy::Migration, Some("7"), true), None);
    }

    #[test]
    fn a_copy_that_fails_has_its_turn() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let running = Handoff { started_at: Some(MicroTime(at(100))), ..Handoff::default() };
        assert!(!has_had_its_turn(&running, at(129)) && has_had_its_turn(&running, at(130)));
    }
}
