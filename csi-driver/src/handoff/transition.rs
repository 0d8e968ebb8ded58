//! What a volume's status is after an event: the one place that changes owner, epoch and handoff.
//!
//! Each event is written by compare-and-set (see `node/write.rs`), and is checked here against the status that it is written over: one
//! that comes too late is refused, however late that is.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use portolan_crds::{
    AskedBy, Handoff, HandoffOutcome, HandoffPhase, HandoffReport, PortableVolume, PortableVolumeSpec,
    PortableVolumeStatus, Replica, VolumePhase, condition,
};
use portolan_runtime::conditions;

use super::Known;
use super::event::{Ask, Event, Refused, Round};
use crate::volume;

/// A copy that was changed behind Portolan's back.
pub const DIVERGED: &str = "Diverged";

/// The longest final transfer that PreCopy aims at unless another is asked for.
const TARGET_DOWNTIME: Duration = Duration::from_secs(1);
/// The most rounds of PreCopy in a row.
const ROUNDS: i64 = 8;

/// The status after an event.
///
/// # Errors
/// When the event can't happen to the volume as it is; nothing has changed then.
pub fn transition(volume: &PortableVolume, event: Event) -> Result<PortableVolumeStatus, Refused> {
    let name = event.name();
    let mut status = volume::status(volume);
    let deleting = volume.metadata.deletion_timestamp.is_some();
    let done = match event {
        Event::Asked(..) if deleting => Err("the volume is being deleted".to_owned()),
        Event::Asked(ask, at) => asked(&mut status, ask, at),
        Event::Aborted { why, at } => aborted(&mut status, why, at),
        Event::Refresh => refreshed(&mut status),
        Event::Recorded { node, snapshot } => {
            if snapshot.is_some() {
                heard(&mut status, &node);
            }
            record(&mut status, &node, snapshot);
            Ok(())
        }
        Event::Quarantined { node, message } => quarantined(&mut status, &node, &message),
        Event::Forgotten { node } if !deleting && status.owner.as_ref() == Some(&node) => {
            Err(format!("node {node} owns the volume"))
        }
        Event::Forgotten { node } => {
            heard(&mut status, &node);
            status.replicas.retain(|replica| replica.node != node);
            Ok(())
        }
        Event::Owned { node, spec } => owned(&mut status, &node, &spec),
        Event::RoundTaken { node, epoch, snapshot, at } => round_taken(&mut status, &node, epoch, snapshot, at),
        Event::RoundReceived { node, epoch, guid, round } => round_received(&mut status, &node, epoch, &guid, round),
        Event::Published { node, epoch, snapshot, quiesced_at } => {
            published(&mut status, &node, epoch, snapshot, quiesced_at)
        }
        Event::TookOver { node, epoch, guid, bytes, base } => {
            took_over(&mut status, &node, epoch, &guid).map(|()| sent(&mut status, bytes, base))
        }
        Event::Finished { node, epoch, at } => finished(&mut status, &node, epoch, at),
    };
    done.map(|()| status).map_err(|why| Refused { event: name, why })
}

type Done = Result<(), String>;

fn asked(status: &mut PortableVolumeStatus, ask: Ask, at: MicroTime) -> Done {
    let owner = status.owner.clone().ok_or("nobody owns the volume yet")?;
    match &mut status.handoff {
        Some(handoff) if handoff.phase == HandoffPhase::Activating => {
            return Err(format!("node {} is taking it over", handoff.to));
        }
        Some(handoff) if handoff.to == ask.to => {
            if handoff.phase == HandoffPhase::PreCopy {
                precopy_meets(handoff, ask);
                if handoff.phase != HandoffPhase::PreCopy {
                    moving(status);
                }
            }
            return Ok(());
        }
        // Only a pod's being elsewhere is reason enough to change another's mind; a cordon's guess is nobody's mind.
        Some(handoff) if ask.warm && handoff.asked_by != AskedBy::Cordon => {
            return Err(format!("it is moving to node {} already", handoff.to));
        }
        Some(_) => {
            let why = format!("it is wanted on node {}", ask.to);
            aborted(status, why, at.clone())?;
        }
        None => {}
    }
    if owner == ask.to {
        return Err(format!("it is on node {owner} already"));
    }
    start(status, owner, ask, at);
    Ok(())
}

/// Somebody asks for what PreCopy has begun.
fn precopy_meets(handoff: &mut Handoff, ask: Ask) {
    if ask.by != AskedBy::Cordon {
        handoff.asked_by = ask.by;
        handoff.migration = ask.migration.or(handoff.migration.take());
        handoff.target_downtime_milliseconds =
            ask.target_downtime_milliseconds.or(handoff.target_downtime_milliseconds);
        handoff.limit_bytes_per_second = ask.limit_bytes_per_second;
    }
    if !ask.warm {
        handoff.phase = HandoffPhase::Quiescing;
        // From here on these are the final snapshot's.
        handoff.snapshot = None;
        handoff.guid = None;
        forget_progress(handoff);
    }
}

fn start(status: &mut PortableVolumeStatus, from: String, ask: Ask, at: MicroTime) {
    // An attempt that was aborted has used its epoch up: nothing of it can be taken for the next one's.
    let last = status.last_handoff.as_ref().map_or(0, |report| report.epoch);
    let epoch = status.epoch.max(last) + 1;
    // Before there is a dataset: what a crash leaves on the node is known then. The node would do it itself, one write later.
    record(status, &ask.to, None);
    status.handoff = Some(Handoff {
        from,
        to: ask.to,
        epoch,
        phase: if ask.warm { HandoffPhase::PreCopy } else { HandoffPhase::Quiescing },
        asked_by: ask.by,
        migration: ask.migration,
        started_at: Some(at),
        target_downtime_milliseconds: ask.target_downtime_milliseconds,
        limit_bytes_per_second: ask.limit_bytes_per_second,
        ..Handoff::default()
    });
    if !ask.warm {
        moving(status);
    }
}

/// From here on nobody mounts it.
fn moving(status: &mut PortableVolumeStatus) {
    let Some(handoff) = &status.handoff else { return };
    let message = format!("moving from node {} to {}", handoff.from, handoff.to);
    conditions::set(&mut status.conditions, condition::READY, condition::FALSE, "Moving", &message, None);
    status.phase = VolumePhase::Moving;
}

fn aborted(status: &mut PortableVolumeStatus, why: String, at: MicroTime) -> Done {
    match &status.handoff {
        Some(handoff) if handoff.phase == HandoffPhase::Activating => {
            return Err(format!("node {} owns the volume already", handoff.to));
        }
        Some(handoff) if handoff.phase > HandoffPhase::PreCopy => {
            // The source says itself that it is ready, once it is writable.
            let message = format!("the move to node {} was aborted: {why}", handoff.to);
            conditions::set(&mut status.conditions, condition::READY, condition::FALSE, "Aborted", &message, None);
        }
        _ => {}
    }
    if let Some(handoff) = status.handoff.take() {
        status.last_handoff = Some(report(handoff, HandoffOutcome::Aborted, Some(why), at));
    }
    Ok(())
}

fn refreshed(status: &mut PortableVolumeStatus) -> Done {
    let handoff = status.handoff.as_mut().filter(|handoff| handoff.phase == HandoffPhase::PreCopy);
    handoff.ok_or("no PreCopy is running")?.warm = false;
    Ok(())
}

/// Puts a node on the list of those that hold a dataset, or changes what is known of its copy.
fn record(status: &mut PortableVolumeStatus, node: &str, snapshot: Option<Known>) {
    let index = status.replicas.iter().position(|replica| replica.node == node).unwrap_or_else(|| {
        status.replicas.push(Replica { node: node.to_owned(), ..Replica::default() });
        status.replicas.len() - 1
    });
    if let Some(Known { name, guid }) = snapshot {
        status.replicas[index].snapshot = Some(name);
        status.replicas[index].guid = Some(guid);
    }
}

/// The target of an aborted handoff says what its copy has: what else that may have brought is nobody's concern any more.
fn heard(status: &mut PortableVolumeStatus, node: &str) {
    let aborted = |report: &&mut HandoffReport| report.outcome == HandoffOutcome::Aborted && report.to == node;
    if let Some(report) = status.last_handoff.as_mut().filter(aborted) {
        (report.guid, report.round_guid) = (None, None);
    }
}

fn quarantined(status: &mut PortableVolumeStatus, node: &str, message: &str) -> Done {
    if status.owner.as_deref() == Some(node) {
        return Err(format!("node {node} owns the volume"));
    }
    conditions::set(&mut status.conditions, DIVERGED, condition::TRUE, "Quarantined", message, None);
    for replica in status.replicas.iter_mut().filter(|replica| replica.node == node) {
        (replica.snapshot, replica.guid) = (None, None);
    }
    Ok(())
}

fn owned(status: &mut PortableVolumeStatus, node: &str, spec: &PortableVolumeSpec) -> Done {
    if let Some(owner) = status.owner.as_ref().filter(|owner| *owner != node) {
        return Err(format!("node {owner} owns the volume"));
    }
    status.owner = Some(node.to_owned());
    status.epoch = 1;
    applied(status, spec);
    ready(status);
    Ok(())
}

/// The owner's dataset is what the spec says.
pub fn applied(status: &mut PortableVolumeStatus, spec: &PortableVolumeSpec) {
    status.size_bytes = Some(spec.size_bytes);
    status.parameters = Some(spec.parameters.clone());
}

/// The volume can be mounted at its owner.
pub fn ready(status: &mut PortableVolumeStatus) {
    status.phase = VolumePhase::Ready;
    let owner = status.owner.as_deref().unwrap_or_default();
    let message = format!("node {owner} has the volume at epoch {}", status.epoch);
    conditions::set(&mut status.conditions, condition::READY, condition::TRUE, "Ready", &message, None);
}

/// The running handoff, if it is that one in that phase.
fn running(status: &mut PortableVolumeStatus, epoch: i64, phase: HandoffPhase) -> Result<&mut Handoff, String> {
    let handoff = status.handoff.as_mut().ok_or("no handoff is running")?;
    match (handoff.epoch == epoch, handoff.phase == phase) {
        (true, true) => Ok(handoff),
        (true, false) => Err(format!("the handoff is in phase {:?}, not {phase:?}", handoff.phase)),
        (false, _) => Err(format!("the handoff is that of epoch {}, not {epoch}", handoff.epoch)),
    }
}

fn is_party(wanted: &str, node: &str) -> Done {
    if wanted == node { Ok(()) } else { Err(format!("it is the turn of node {wanted}, not {node}")) }
}

fn round_taken(status: &mut PortableVolumeStatus, node: &str, epoch: i64, snapshot: Known, at: MicroTime) -> Done {
    let handoff = running(status, epoch, HandoffPhase::PreCopy)?;
    is_party(&handoff.from, node)?;
    handoff.snapshot = Some(snapshot.name);
    handoff.round_guid = Some(snapshot.guid.clone());
    handoff.guid = Some(snapshot.guid);
    handoff.round_at = Some(at);
    forget_progress(handoff);
    Ok(())
}

fn round_received(status: &mut PortableVolumeStatus, node: &str, epoch: i64, guid: &str, round: Option<Round>) -> Done {
    let handoff = running(status, epoch, HandoffPhase::PreCopy)?;
    is_party(&handoff.to, node)?;
    let Some(snapshot) = published_as(handoff, guid) else { return Err(format!("{guid} is not this round's")) };
    handoff.rounds += 1;
    handoff.warm = is_warm(handoff, round.as_ref());
    handoff.eta_seconds = None;
    handoff.waits = None;
    handoff.last_error = None;
    if let Some(Round { bytes, milliseconds }) = round {
        handoff.pre_copy_bytes += bytes;
        handoff.delta_bytes = Some(bytes);
        if milliseconds > 0 {
            handoff.rate_bytes_per_second = bytes.saturating_mul(1000) / milliseconds;
        }
    }
    // Both have it: what they had in common before is needed no more.
    let from = handoff.from.clone();
    record(status, &from, Some(snapshot.clone()));
    record(status, node, Some(snapshot));
    status.conditions.retain(|condition| condition.type_ != DIVERGED);
    Ok(())
}

/// Whether the final delta is predicted to be sent within the downtime that is asked for, or another round would not make it smaller. The
/// prediction: as much as the newest round, as fast as it.
fn is_warm(handoff: &Handoff, round: Option<&Round>) -> bool {
    if handoff.rounds >= ROUNDS {
        return true;
    }
    let Some(round) = round else { return false };
    let default = i64::try_from(TARGET_DOWNTIME.as_millis()).unwrap_or(i64::MAX);
    let short = round.milliseconds <= handoff.target_downtime_milliseconds.unwrap_or(default);
    let shrinks = handoff.delta_bytes.is_none_or(|before| round.bytes < before / 5 * 4);
    short || !shrinks
}

fn published(
    status: &mut PortableVolumeStatus,
    node: &str,
    epoch: i64,
    snapshot: Known,
    quiesced_at: MicroTime,
) -> Done {
    let handoff = running(status, epoch, HandoffPhase::Quiescing)?;
    is_party(&handoff.from, node)?;
    handoff.snapshot = Some(snapshot.name.clone());
    handoff.guid = Some(snapshot.guid.clone());
    handoff.quiesced_at = Some(quiesced_at);
    handoff.phase = HandoffPhase::FinalSync;
    handoff.last_error = None;
    record(status, node, Some(snapshot));
    Ok(())
}

fn took_over(status: &mut PortableVolumeStatus, node: &str, epoch: i64, guid: &str) -> Done {
    let handoff = running(status, epoch, HandoffPhase::FinalSync)?;
    is_party(&handoff.to, node)?;
    let Some(received) = published_as(handoff, guid) else {
        return Err(format!("the final snapshot is {:?}, not {guid}", handoff.guid));
    };
    handoff.phase = HandoffPhase::Activating;
    handoff.last_error = None;
    handoff.waits = None;
    status.owner = Some(node.to_owned());
    status.epoch = epoch;
    record(status, node, Some(received));
    status.conditions.retain(|condition| condition.type_ != DIVERGED);
    Ok(())
}

fn sent(status: &mut PortableVolumeStatus, bytes: i64, base: Option<String>) {
    if let Some(handoff) = status.handoff.as_mut().filter(|_| bytes > 0) {
        (handoff.bytes, handoff.base) = (bytes, base);
    }
}

fn finished(status: &mut PortableVolumeStatus, node: &str, epoch: i64, at: MicroTime) -> Done {
    let handoff = running(status, epoch, HandoffPhase::Activating)?;
    is_party(&handoff.to, node)?;
    if let Some(handoff) = status.handoff.take() {
        status.last_handoff = Some(report(handoff, HandoffOutcome::Done, None, at));
    }
    ready(status);
    Ok(())
}

/// The snapshot that the target fetches, if it has this GUID.
fn published_as(handoff: &Handoff, guid: &str) -> Option<Known> {
    let name = handoff.snapshot.clone().filter(|_| handoff.guid.as_deref() == Some(guid))?;
    Some(Known { name, guid: guid.to_owned() })
}

fn forget_progress(handoff: &mut Handoff) {
    handoff.bytes = 0;
    handoff.base = None;
    handoff.estimated_bytes = None;
    handoff.eta_seconds = None;
    handoff.waits = None;
    handoff.last_error = None;
}

fn report(handoff: Handoff, outcome: HandoffOutcome, reason: Option<String>, at: MicroTime) -> HandoffReport {
    let millisecond = |time: &MicroTime| Timestamp::as_millisecond(time.0);
    let quiesced = handoff.quiesced_at.as_ref().filter(|_| outcome == HandoffOutcome::Done);
    HandoffReport {
        outcome,
        reason,
        // Of two clocks, which differ.
        downtime_milliseconds: quiesced.map_or(0, |since| (millisecond(&at) - millisecond(since)).max(0)),
        from: handoff.from,
        to: handoff.to,
        epoch: handoff.epoch,
        migration: handoff.migration,
        rounds: handoff.rounds,
        pre_copy_bytes: handoff.pre_copy_bytes,
        bytes: handoff.bytes,
        base: handoff.base,
        guid: handoff.guid,
        round_guid: handoff.round_guid,
        started_at: handoff.started_at,
        finished_at: Some(at),
    }
}
