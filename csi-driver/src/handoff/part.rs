//! What has come of a stream that was cut. It counts for nothing, and is in the way of all but the stream's rest.

use portolan_crds::{HandoffPhase, PortableVolume};

use super::plan::Action;
use crate::volume;

/// Whether a part of a stream that node `me` has of the volume may still be gone on with: the plan is to fetch that stream, or to write something down first,
/// and destroys nothing that it may stand on.
pub fn wants_part(me: &str, volume: &PortableVolume, actions: &[Action]) -> bool {
    let status = volume::status(volume);
    let comes = status.handoff.as_ref().is_some_and(|handoff| {
        handoff.to == me
            && handoff.guid.is_some()
            && matches!(handoff.phase, HandoffPhase::PreCopy | HandoffPhase::FinalSync)
    });
    let is_made = status.owner.is_none() && volume.spec.source.is_some() && volume.spec.placement.node == me;
    let harmless = |action: &Action| {
        matches!(
            action,
            Action::Restore
                | Action::ApplySpec
                | Action::Own
                | Action::Adopt
                | Action::RecordReplica
                | Action::RecordSnapshot(_)
        )
    };
    // What comes after a fetch is done with all of the stream there.
    let mut before = actions.iter().take_while(|action| !matches!(action, Action::Fetch(_)));
    volume.metadata.deletion_timestamp.is_none() && (comes || is_made) && !actions.is_empty() && before.all(harmless)
}
