//! What the source of a handoff does next: rounds of PreCopy while the volume is in use, then its last word.

use portolan_crds::{Handoff, HandoffPhase, PortableVolume, PortableVolumeStatus};

use super::plan::{Action, at_epoch, is_cut_short};
use super::snapshots::fresh_name;
use super::{Known, Local};

/// What it does from Quiescing on.
pub(super) fn source(status: &PortableVolumeStatus, handoff: &Handoff, local: Option<&Local>) -> Vec<Action> {
    if handoff.phase == HandoffPhase::FinalSync {
        let found = handoff.guid.as_ref().is_some_and(|guid| local.is_some_and(|local| local.has(guid)));
        if found {
            return Vec::new();
        }
        let message =
            "the source has lost the handoff's final snapshot: it was destroyed or rolled back by hand".to_owned();
        return vec![Action::Report { reason: "SnapshotMissing", message }];
    }
    match at_epoch(local, status.epoch) {
        Err(report) => vec![report],
        Ok(local) if local.mounted && !is_cut_short(local) => {
            vec![Action::Wait(format!("still mounted on node {}", handoff.from))]
        }
        Ok(local) if local.open && local.sealed => {
            let message = format!(
                "node {0} failed while the volume was in use, and what was written last is behind its key: let a pod that uses the volume \
                 start on node {0} once",
                handoff.from
            );
            vec![Action::Report { reason: "KeyNeeded", message }]
        }
        Ok(local) => {
            let name = next_name(status, handoff, local);
            // One that this handoff has published as a round's: nothing of another attempt can be taken for it.
            let of_this = |resting: &&Known| handoff.round_guid.as_ref() == Some(&resting.guid);
            let resting = local.resting().filter(of_this).cloned();
            // The last round has made it so, and the final snapshot is published only if it is so then.
            let readonly = resting.is_some() && local.readonly;
            let replay = local.open.then_some(Action::Replay);
            let quiet = (!readonly).then_some(Action::SetReadonly(true)).into_iter().chain(replay);
            quiet.chain([Action::CheckQuiet, Action::PublishFinal { name, resting }]).collect()
        }
    }
}

/// What the source of a PreCopy does besides what any owner does: the next round, once the newest has come, unless that was enough. When the pod has
/// ended there is one more, which needn't wait for where the pod starts anew: if nobody writes until then, it was the last. So the
/// dataset is read-only from there on, until a pod comes back.
pub(super) fn copied(
    volume: &PortableVolume,
    status: &PortableVolumeStatus,
    handoff: &Handoff,
    local: &Local,
    mut actions: Vec<Action>,
) -> Vec<Action> {
    // Who uses a zvol's device leaves no mark on it, and what is only ever read has one round.
    let rests = local.rests() && !volume.spec.is_zvol() && !volume.spec.is_shared();
    if rests {
        actions.retain(|action| *action != Action::SetReadonly(false));
    }
    let last = !rests || local.resting().is_some_and(|resting| handoff.guid.as_ref() == Some(&resting.guid));
    let come = status.replicas.iter().any(|replica| replica.node == handoff.to && replica.guid == handoff.guid);
    let wanted = match &handoff.guid {
        None => true,
        Some(_) if come => !handoff.warm || !last,
        // Destroyed by hand before it was fetched.
        Some(guid) => !local.has(guid),
    };
    if wanted {
        actions.extend((rests && !local.readonly).then_some(Action::SetReadonly(true)));
        actions.push(Action::PublishRound { name: next_name(status, handoff, local), rests });
    }
    actions
}

fn next_name(status: &PortableVolumeStatus, handoff: &Handoff, local: &Local) -> String {
    let copies = status.replicas.iter().filter_map(|replica| replica.snapshot.as_deref());
    fresh_name(handoff.epoch, &local.snapshots, copies.chain(handoff.snapshot.as_deref()))
}
