//! The target's part of the transfer: fetch a snapshot from the handoff's source, and tell how far it is.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use portolan_crds::{Handoff, HandoffPhase, PortableVolume, PortableVolumeStatus};
use portolan_zfs::{Property, Zfs};
use tokio::sync::watch;

use super::authorise::class_of;
use super::speed::{Speed, eta};
use super::steps::{StepError, Steps};
use super::{Node, write};
use crate::handoff::{Known, Round};
use crate::transfer::{self, Class, Fetch, Fetching, Limits, Next, Offer, Pace, Received, Request, SoFar, Waits};
use crate::volume;

/// How often the bytes in the status are brought up to date.
const REPORT_EVERY: Duration = Duration::from_secs(2);
/// How often a transfer looks whether its limit is another by now, and one that waits whether it is wanted still.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long a fetch waits for this node's certificate before it counts as failed.
const CERTIFICATE_WITHIN: Duration = Duration::from_secs(5);

/// What a handoff's target has received and not yet written down.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    /// The handoff's.
    epoch: i64,
    bytes: u64,
    base: Option<String>,
    took: Duration,
}

impl Progress {
    /// With what has come after it. What an earlier handoff has left is nothing to this one.
    fn and(self, more: Self) -> Self {
        if self.epoch != more.epoch || self.bytes == 0 {
            return more;
        }
        Self { bytes: self.bytes + more.bytes, took: self.took + more.took, ..self }
    }

    pub(super) fn is_of(&self, epoch: i64) -> bool {
        self.epoch == epoch
    }

    /// Bytes of ZFS stream, and the snapshot that they started from.
    pub(super) fn total(self) -> (i64, Option<String>) {
        (i64::try_from(self.bytes).unwrap_or(i64::MAX), self.base)
    }

    /// The figures of a round of PreCopy.
    pub(super) fn round(&self) -> Round {
        let milliseconds = i64::try_from(self.took.as_millis()).unwrap_or(i64::MAX);
        Round { bytes: i64::try_from(self.bytes).unwrap_or(i64::MAX), milliseconds }
    }
}

/// What a transfer was asked for, and how urgent that was then.
struct Asked {
    request: Request,
    class: Class,
}

/// Fetches the handoff's final snapshot, and those on the way to it.
pub(super) async fn run<Z: Zfs>(steps: &mut Steps<'_, Z>, snapshot: Known) -> Result<(), StepError> {
    let Some(handoff) = volume::status(&steps.volume).handoff else { return Ok(()) };
    let name = steps.volume.name_any();
    let request = Request::new(name.as_str(), handoff.epoch, snapshot.name.as_str(), snapshot.guid.parse()?);
    let properties = steps.received_properties()?;
    let began = Instant::now();
    let Received { bytes, base, .. } = transfer(steps, &handoff.from, request, properties).await?;
    let base = base.map(|base| base.short().to_owned());
    let received = Progress { epoch: handoff.epoch, bytes, base, took: began.elapsed() };
    steps.progress = Some(steps.progress.take().unwrap_or_default().and(received));
    tracing::info!(volume = name, snapshot = snapshot.name, bytes, from = handoff.from, "received");
    Ok(())
}

/// Fetches what `request` asks node `from` for into the volume's dataset; tells how far it is as it goes. While it waits for its turn the volume
/// isn't locked.
pub(super) async fn transfer<Z: Zfs>(
    steps: &mut Steps<'_, Z>,
    from: &str,
    request: Request,
    properties: Vec<Property>,
) -> Result<Received, StepError> {
    let identity = certificate(steps).await?;
    let address = address_of(steps.node, from).await?;
    let result = follow_through(steps, &identity, address, from, request, properties).await;
    if result.is_err() {
        // It may have another one by now.
        steps.node.forget_address(from);
    }
    result
}

async fn follow_through<Z: Zfs>(
    steps: &mut Steps<'_, Z>,
    identity: &transfer::Identity,
    address: SocketAddr,
    from: &str,
    request: Request,
    properties: Vec<Property>,
) -> Result<Received, StepError> {
    let (limit, follows) = watch::channel(limit_of(&steps.volume));
    let (target, pace, turns) = (steps.dataset.clone(), Pace::following(follows), steps.node.receives.clone());
    let asked = Asked { class: class_of(&steps.volume, &request), request: request.clone() };
    let (node, class) = (from.to_owned(), asked.class);
    let fetch = Fetch { address, node, request, target, properties, pace, turns, class };
    let (zfs, mut speed) = (steps.node.zfs.clone(), Speed::new(Instant::now()));
    let mut fetching = Fetching::new(identity, zfs.as_ref(), Limits::default(), fetch).knowing(steps.there.take());
    loop {
        // An earlier attempt, at another node, may have ended while it waited.
        steps.lock().await;
        match turn(steps, &mut fetching, from, &asked).await? {
            Next::Done(received) => return Ok(received),
            Next::Stream(offer) => {
                steps.lock().await;
                if offer.has_waited() {
                    still_wanted(steps, Some(&asked)).await?;
                }
                receive(steps, &mut fetching, offer, &limit, &mut speed).await?;
            }
        }
    }
}

/// Gets the next stream. While that waits for its turn others may have the volume, its status says so, and it ends if nobody wants it any more.
async fn turn<Z: Zfs>(
    steps: &mut Steps<'_, Z>,
    fetching: &mut Fetching<'_, Z>,
    from: &str,
    asked: &Asked,
) -> Result<Next, StepError> {
    let (waits, now) = watch::channel(None);
    let next = fetching.next(|now| {
        waits.send_replace(Some(now));
    });
    let mut next = Box::pin(next);
    let begin = tokio::time::Instant::now();
    let mut look = tokio::time::interval_at(begin + LOOK_EVERY, LOOK_EVERY);
    let mut told: Option<tokio::time::Instant> = None;
    loop {
        tokio::select! {
            next = &mut next => return Ok(next?),
            _ = look.tick() => {
                let Some(now) = *now.borrow() else { continue };
                steps.unlock();
                still_wanted(steps, Some(asked)).await?;
                if told.is_none_or(|told| told.elapsed() >= REPORT_EVERY) {
                    tell_waits(steps, &sentence(now, &steps.node.name, from)).await;
                    told = Some(tokio::time::Instant::now());
                }
            }
        }
    }
}

/// What a transfer waits for, for people.
fn sentence(Waits { at_source, before }: Waits, me: &str, from: &str) -> String {
    match at_source {
        true => format!("its turn to be sent by node {from}: {before} before it"),
        false => format!("its turn to be received by node {me}: {before} before it"),
    }
}

/// Receives a stream, and tells how far it is.
async fn receive<Z: Zfs>(
    steps: &mut Steps<'_, Z>,
    fetching: &mut Fetching<'_, Z>,
    offer: Box<Offer>,
    limit: &watch::Sender<Option<u64>>,
    speed: &mut Speed,
) -> Result<(), StepError> {
    let so_far = watch::Sender::new(SoFar::default());
    let report = |now| {
        so_far.send_replace(now);
    };
    let mut received = Box::pin(fetching.receive(offer, report));
    let now = tokio::time::Instant::now();
    let mut tick = tokio::time::interval_at(now + REPORT_EVERY, REPORT_EVERY);
    let mut look = tokio::time::interval_at(now + LOOK_EVERY, LOOK_EVERY);
    loop {
        tokio::select! {
            received = &mut received => return Ok(received?),
            _ = look.tick() => follow(steps, limit),
            _ = tick.tick() => {
                still_wanted(steps, None).await?;
                let now = *so_far.borrow();
                tell(steps, now, speed.at(Instant::now(), now.bytes)).await;
            }
        }
    }
}

/// The most bytes a second that a volume's transfer may take. Once its pod is away nothing is held back: it waits for what is left.
fn limit_of(volume: &PortableVolume) -> Option<u64> {
    let handoff = volume::status(volume).handoff.filter(|handoff| handoff.phase == HandoffPhase::PreCopy)?;
    let limit = handoff.limit_bytes_per_second.or(volume.spec.parameters.bandwidth)?;
    u64::try_from(limit).ok()
}

/// Makes the volume's limit, as it has been seen last, the transfer's.
fn follow<Z: Zfs>(steps: &Steps<'_, Z>, limit: &watch::Sender<Option<u64>>) {
    let Some(seen) = steps.node.seen.get(&ObjectRef::new(&steps.volume.name_any())) else { return };
    let wanted = limit_of(&seen);
    limit.send_if_modified(|limit| std::mem::replace(limit, wanted) != wanted);
}

/// The figures of a running transfer. More than was estimated shows that the estimate was too low, and nothing of what is left.
fn fill(handoff: &mut Handoff, SoFar { bytes, estimate }: SoFar, rate: u64) {
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    handoff.waits = None;
    handoff.bytes = number(bytes);
    handoff.rate_bytes_per_second = number(rate);
    handoff.estimated_bytes = estimate.map(|all| number(all.max(bytes)));
    let left = estimate.and_then(|all| all.checked_sub(bytes));
    handoff.eta_seconds = left.and_then(|left| eta(left, rate)).map(number);
}

async fn certificate<Z: Zfs>(steps: &Steps<'_, Z>) -> Result<std::sync::Arc<transfer::Identity>, StepError> {
    let mut identity = steps.node.identity.clone();
    let ready = tokio::time::timeout(CERTIFICATE_WITHIN, identity.wait_for(Option::is_some)).await;
    let found = ready.ok().and_then(|ready| ready.ok().and_then(|identity| identity.clone()));
    found.ok_or_else(|| StepError::NoCertificate(steps.node.name.clone()))
}

/// Where a node is reached. Asked once: its certificate proves that it is the one, wherever it is.
async fn address_of<Z: Zfs>(node: &Node<Z>, of: &str) -> Result<SocketAddr, StepError> {
    if let Some(known) = node.known_address(of) {
        return Ok(known);
    }
    let found = node.storage_nodes.get_opt(of).await?;
    let address = found.and_then(|found| found.status).and_then(|status| status.transfer_address);
    let address =
        address.and_then(|address| address.parse().ok()).ok_or_else(|| StepError::NoAddress(of.to_owned()))?;
    node.remember_address(of, address);
    Ok(address)
}

/// Whether a transfer is of use still: the volume isn't being deleted, and the handoff is the one that it is for. One that only waits must also ask for
/// what the handoff wants now, and as urgently: it is begun anew if not.
async fn still_wanted<Z: Zfs>(steps: &mut Steps<'_, Z>, waits: Option<&Asked>) -> Result<(), StepError> {
    let name = steps.volume.name_any();
    let seen = steps.node.seen.get(&ObjectRef::new(&name));
    let Some(seen) = seen.filter(|seen| seen.metadata.deletion_timestamp.is_none()) else {
        return Err(StepError::Deleted);
    };
    let running = volume::status(&steps.volume).handoff.map(|handoff| handoff.epoch);
    let status = volume::status(&seen);
    let newest = status.handoff.as_ref().map(|handoff| handoff.epoch);
    let newest = newest.max(status.last_handoff.map(|ended| ended.epoch + 1));
    if running.is_some_and(|epoch| newest > Some(epoch)) {
        return Err(StepError::Superseded);
    }
    if waits.is_some_and(|asked| is_outdated(&seen, asked)) {
        // The watch may be behind what this was decided on.
        let now = steps.node.volumes.get(&name).await?;
        let outdated = waits.is_some_and(|asked| is_outdated(&now, asked));
        steps.volume = now;
        if outdated {
            return Err(StepError::Superseded);
        }
    }
    Ok(())
}

/// Whether a handoff wants another snapshot than what was asked for, or wants it more urgently.
fn is_outdated(volume: &PortableVolume, Asked { request, class }: &Asked) -> bool {
    let handoff = volume.status.as_ref().and_then(|status| status.handoff.as_ref());
    let handoff = handoff.filter(|_| request.restore.is_none());
    handoff.is_some_and(|handoff| {
        handoff.guid.as_deref() != Some(&request.guid.to_string()) || class_of(volume, request) != *class
    })
}

/// Writes how far it is, and how fast.
async fn tell<Z: Zfs>(steps: &mut Steps<'_, Z>, now: SoFar, rate: u64) {
    write_or_reread(steps, |status| {
        if let Some(handoff) = &mut status.handoff {
            fill(handoff, now, rate);
        }
    })
    .await;
}

/// Writes that it waits, and for what, unless it says so already. A volume that is yet to come has no handoff to say it in.
async fn tell_waits<Z: Zfs>(steps: &mut Steps<'_, Z>, what: &str) {
    let mut next = volume::status(&steps.volume);
    let changed = match &mut next.handoff {
        Some(handoff) => handoff.waits.replace(what.to_owned()).as_deref() != Some(what),
        None if next.owner.is_none() => write::not_ready(&mut next, "Waiting", &format!("waits for {what}")),
        None => false,
    };
    if changed {
        write_or_reread(steps, |status| *status = next).await;
    }
}

/// A write that fails is left to the next.
async fn write_or_reread<Z: Zfs>(steps: &mut Steps<'_, Z>, change: impl FnOnce(&mut PortableVolumeStatus)) {
    let name = steps.volume.name_any();
    match write::status(&steps.node.volumes, &steps.volume, change).await {
        Ok(now) => steps.volume = now,
        Err(error) if write::is_conflict(&error) => {
            if let Ok(now) = steps.node.volumes.get(&name).await {
                steps.volume = now;
            }
        }
        Err(error) => tracing::debug!(volume = name, %error, "could not write the progress"),
    }
}

#[cfg(test)]
mod tests {
    use portolan_crds::{PortableVolumeSpec, PortableVolumeStatus};
    use portolan_zfs::Guid;

    use super::*;

    #[test]
    fn only_while_the_pod_runs_is_anything_held_back() {
        let limit = |phase, limit_bytes_per_second| {
            let handoff = Handoff { phase, limit_bytes_per_second, ..Handoff::default() };
            let status = PortableVolumeStatus { handoff: Some(handoff), ..PortableVolumeStatus::default() };
            limit_of(&PortableVolume { status: Some(status), ..PortableVolume::new("v", Default::default()) })
        };
        assert_eq!(limit(HandoffPhase::PreCopy, Some(50)), Some(50));
        assert_eq!(limit(HandoffPhase::PreCopy, None), None);
        assert_eq!(limit(HandoffPhase::Quiescing, Some(50)), None, "the newest round is what the pod waits for");
        assert_eq!(limit(HandoffPhase::FinalSync, Some(50)), None);
    }

    #[test]
    fn a_migrations_limit_goes_before_the_volumes() {
        let limit = |phase, of_migration| {
            let mut volume = PortableVolume::new("v", PortableVolumeSpec::default());
            volume.spec.parameters.bandwidth = Some(7);
            let handoff = Handoff { phase, limit_bytes_per_second: of_migration, ..Handoff::default() };
            volume.status = Some(PortableVolumeStatus { handoff: Some(handoff), ..PortableVolumeStatus::default() });
            limit_of(&volume)
        };
        assert_eq!(limit(HandoffPhase::PreCopy, None), Some(7));
        assert_eq!(limit(HandoffPhase::PreCopy, Some(50)), Some(50));
        assert_eq!(limit(HandoffPhase::FinalSync, None), None);
    }

    #[test]
    fn what_waits_is_begun_anew_when_something_else_is_wanted() {
        let outdated = |phase, guid: &str, asked: &Asked| {
            let handoff = Handoff { phase, guid: Some(guid.into()), ..Handoff::default() };
            let status = PortableVolumeStatus { handoff: Some(handoff), ..PortableVolumeStatus::default() };
            let volume = PortableVolume { status: Some(status), ..PortableVolume::new("v", Default::default()) };
            is_outdated(&volume, asked)
        };
        let request = Request::new("v", 2, "portolan-2", Guid(7));
        let round = Asked { request: request.clone(), class: Class::Background };
        assert!(!outdated(HandoffPhase::PreCopy, "7", &round));
        assert!(outdated(HandoffPhase::PreCopy, "8", &round), "another round");
        assert!(outdated(HandoffPhase::FinalSync, "8", &round), "the last");
        assert!(outdated(HandoffPhase::FinalSync, "7", &round), "what was a round is the last: a pod waits for it");
        let last = Asked { class: Class::Final, ..round };
        assert!(!outdated(HandoffPhase::FinalSync, "7", &last));
        let restore = Request { restore: Some("w".into()), ..request };
        let restore = Asked { request: restore, class: Class::Restore };
        assert!(!outdated(HandoffPhase::FinalSync, "8", &restore), "a move of a volume that it is not made from");
    }

    #[test]
    fn what_it_waits_for_is_told_and_is_over_when_something_comes() {
        let text = sentence(Waits { at_source: true, before: 3 }, "b", "a");
        assert_eq!(text, "its turn to be sent by node a: 3 before it");
        assert_eq!(
            sentence(Waits { at_source: false, before: 0 }, "b", "a"),
            "its turn to be received by node b: 0 before it"
        );
        let mut handoff = Handoff { waits: Some(text), ..Handoff::default() };
        fill(&mut handoff, SoFar::default(), 0);
        assert_eq!(handoff.waits, None);
    }

    #[test]
    fn a_round_that_came_too_late_counts_for_the_final_snapshot() {
        let came = |epoch, bytes, base: Option<&str>| Progress {
            epoch,
            bytes,
            base: base.map(str::to_owned),
            took: Duration::from_secs(1),
        };
        let round = came(4, 1000, None);
        assert_eq!(round.clone().and(came(4, 10, Some("portolan-4"))).total(), (1010, None));
        assert_eq!(round.clone().and(came(4, 10, Some("portolan-4"))).round().milliseconds, 2000);
        assert_eq!(
            round.and(came(5, 10, Some("portolan-4"))).total(),
            (10, Some("portolan-4".into())),
            "another handoff"
        );
        assert_eq!(Progress::default().and(came(4, 10, Some("portolan-3"))).total(), (10, Some("portolan-3".into())));
    }

    #[test]
    fn figures_are_filled_as_far_as_they_are_known() {
        let figures = |bytes, estimate, rate| {
            let mut handoff = Handoff::default();
            fill(&mut handoff, SoFar { bytes, estimate }, rate);
            (handoff.bytes, handoff.estimated_bytes, handoff.rate_bytes_per_second, handoff.eta_seconds)
        };
        assert_eq!(figures(100, Some(1100), 50), (100, Some(1100), 50, Some(20)));
        assert_eq!(figures(100, Some(1100), 0), (100, Some(1100), 0, None), "it stands still");
        assert_eq!(figures(100, None, 50), (100, None, 50, None));
        assert_eq!(figures(1200, Some(1100), 50), (1200, Some(1200), 50, None));
    }
}
