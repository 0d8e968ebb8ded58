//! A migration's figures, from its volumes' handoffs. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use portolan_crds::{
    Handoff, HandoffOutcome, HandoffPhase, HandoffReport, MigratingVolume, MigratingVolumePhase, PortableVolume,
    PortableVolumeStatus, VolumeMigrationStatus,
};

/// Brings the figures of `status`, of the migration `id` to node `to`, up to what the volumes say.
pub(super) fn write(
    status: &mut VolumeMigrationStatus,
    id: &str,
    to: &str,
    volumes: &BTreeMap<String, PortableVolume>,
) {
    let since = status.started_at.as_ref().map(|since| since.0);
    for entry in &mut status.volumes {
        let Some(volume) = volumes.get(&entry.volume).and_then(|volume| volume.status.as_ref()) else { continue };
        match &volume.handoff {
            Some(handoff) if handoff.to == to => running(entry, handoff, volume),
            _ => ended(entry, volume, id, to, since),
        }
    }
    status.bytes = status.volumes.iter().map(|entry| entry.bytes).sum();
}

fn running(entry: &mut MigratingVolume, handoff: &Handoff, volume: &PortableVolumeStatus) {
    entry.phase = match handoff.phase {
        HandoffPhase::PreCopy if handoff.warm => MigratingVolumePhase::Warm,
        HandoffPhase::PreCopy => MigratingVolumePhase::PreCopy,
        _ => MigratingVolumePhase::Moving,
    };
    let there = volume.replicas.iter().find(|replica| replica.node == handoff.to);
    // A round that has ended is in the sum already.
    let counted = handoff.phase == HandoffPhase::PreCopy && there.is_some_and(|there| there.guid == handoff.guid);
    entry.bytes = handoff.pre_copy_bytes + if counted { 0 } else { handoff.bytes };
    entry.rounds = handoff.rounds;
    entry.estimated_bytes = handoff.estimated_bytes;
    entry.eta_seconds = handoff.eta_seconds;
    entry.rate_bytes_per_second = Some(handoff.rate_bytes_per_second).filter(|rate| *rate > 0);
}

fn ended(entry: &mut MigratingVolume, volume: &PortableVolumeStatus, id: &str, to: &str, since: Option<Timestamp>) {
    let there = volume.owner.as_deref() == Some(to);
    entry.phase = if there { MigratingVolumePhase::Done } else { MigratingVolumePhase::Waiting };
    (entry.estimated_bytes, entry.eta_seconds, entry.rate_bytes_per_second) = (None, None, None);
    // A pod that was evicted first has its volume asked for by Kubernetes, which knows of no migration.
    let ours = |report: &&HandoffReport| {
        let begun = report.started_at.as_ref().map(|begun| begun.0);
        report.to == to && (report.migration.as_deref() == Some(id) || begun >= since)
    };
    if let Some(report) = volume.last_handoff.as_ref().filter(ours) {
        entry.bytes = report.pre_copy_bytes + report.bytes;
        entry.rounds = report.rounds;
        if report.outcome == HandoffOutcome::Done {
            entry.final_bytes = Some(report.bytes);
            entry.downtime_milliseconds = Some(report.downtime_milliseconds);
        }
    }
}
