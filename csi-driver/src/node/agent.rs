//! The loop that brings each volume one step further whenever its object changes or the node has news of it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use kube::api::ListParams;
use kube::runtime::controller::Action as Requeue;
use kube::runtime::reflector::{self, ObjectRef, Store, reflector};
use kube::runtime::{Controller, WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use portolan_crds::{PortableSnapshot, PortableVolume, condition};
use portolan_runtime::conditions;
use portolan_zfs::{ErrorKind, Zfs};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;

use super::fetch::Progress;
use super::steps::{StepError, Steps};
use super::{Node, disk, write};
use crate::handoff::{self, Action, Asked};
use crate::transfer::TransferError;
use crate::volume::{self, AWAITS_KEY, IMPORT_REFUSED, KEPT, STEP_FAILED};

/// How soon a volume is looked at again that waits for something on this node.
const WAIT: Duration = Duration::from_secs(1);
/// How often the owner looks at what its copy uses.
const OWNED: Duration = Duration::from_secs(15);
/// How often all else is looked at, in case an event was missed.
const RESYNC: Duration = Duration::from_secs(300);
/// How soon what is wrong is looked at again: only somebody's hand will mend it.
const REPORTED: Duration = Duration::from_secs(15);
/// The pause after a failure: doubles from this one ...
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// ... to this one.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Plans in a row for one volume before others of its events are looked at.
const PLANS: usize = 32;

/// Watches all volumes and the snapshots asked of them, and looks at those that `nudged` names. The snapshots are in the store.
pub(super) fn controller(
    volumes: Api<PortableVolume>,
    snapshots: Api<PortableSnapshot>,
    nudged: UnboundedReceiver<ObjectRef<PortableVolume>>,
) -> (Controller<PortableVolume>, Store<PortableSnapshot>) {
    let (store, writer) = reflector::store();
    let watched = reflector(writer, watcher(snapshots, watcher::Config::default())).default_backoff().touched_objects();
    let controller = Controller::new(volumes, watcher::Config::default())
        .reconcile_on(UnboundedReceiverStream::new(nudged))
        .watches_stream(watched, |snapshot: PortableSnapshot| Some(ObjectRef::new(&snapshot.spec.volume)));
    (controller, store)
}

pub(super) struct Agent<Z> {
    node: Arc<Node<Z>>,
    /// Of each volume, until a look ends well.
    failures: Mutex<HashMap<String, Failures>>,
    /// Of each volume, what a round of PreCopy has brought that came too late to be written as one.
    received: Mutex<HashMap<String, Progress>>,
}

/// Failures in a row.
#[derive(Debug, Default)]
struct Failures {
    count: u32,
    /// The text that was made known last.
    told: String,
    /// Whether the newest was that a copy is not from the volume's history.
    diverged: bool,
}

/// Runs until `shutdown`. A step that is under way is dropped: it is taken again after the next start.
pub(super) async fn run<Z: Zfs>(
    controller: Controller<PortableVolume>,
    node: Arc<Node<Z>>,
    shutdown: CancellationToken,
) {
    let agent = Arc::new(Agent::new(node));
    let never = |_: Arc<PortableVolume>, _: &Infallible, _: Arc<Agent<Z>>| Requeue::await_change();
    let work = controller.run(reconcile, never, agent).for_each(|done| async {
        if let Err(error) = done {
            tracing::debug!(%error, "watching volumes");
        }
    });
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = work => {}
    }
}

/// Brings one volume as far as it can be brought now, and says when to look again.
pub(super) async fn reconcile<Z: Zfs>(
    volume: Arc<PortableVolume>,
    agent: Arc<Agent<Z>>,
) -> Result<Requeue, Infallible> {
    let node = &agent.node;
    let name = volume.name_any();
    if !handoff::concerns(&node.name, &volume) {
        agent.received().remove(&name);
        return Ok(Requeue::await_change());
    }
    let lock = Some(node.locks.lock(&name).await);
    let dataset = match volume::dataset(&node.pool, &name) {
        Ok(dataset) => dataset,
        Err(error) => {
            tracing::error!(volume = name, %error, "this volume can't be on any pool");
            return Ok(Requeue::await_change());
        }
    };
    let progress = agent.received().remove(&name);
    let mut steps = Steps { node, dataset, volume: volume.as_ref().clone(), progress, there: None, lock };
    let driven = drive(&mut steps).await;
    steps.lock().await;
    if let Some(progress) = steps.progress.take() {
        agent.received().insert(name.clone(), progress);
    }
    Ok(match driven {
        Ok(pause) => {
            agent.failures().remove(&name);
            Requeue::requeue(pause)
        }
        // Somebody else has written: their write is an event of its own, but it may have come already.
        Err(StepError::Api(error)) if write::is_conflict(&error) => Requeue::requeue(Duration::from_millis(20)),
        // A clone keeps it: looked at again when that may be gone.
        Err(StepError::Zfs(error)) if error.kind == ErrorKind::HasClones => {
            let why = format!("a clone keeps its data: {}", error.stderr.trim());
            Requeue::requeue(keep(&mut steps, &why).await.unwrap_or(REPORTED))
        }
        Err(error @ StepError::Import { .. }) => {
            let told = report(&mut steps, IMPORT_REFUSED, &error.to_string()).await;
            Requeue::requeue(told.unwrap_or(REPORTED))
        }
        Err(StepError::Deleted | StepError::Superseded) => Requeue::requeue(Duration::ZERO),
        Err(StepError::Refused(refused)) => {
            tracing::debug!(volume = name, %refused, "decided otherwise meanwhile");
            Requeue::requeue(Duration::from_millis(20))
        }
        Err(StepError::Transfer(TransferError::Diverged { why, .. })) if agent.diverged_before(&name) => {
            match steps.quarantine(&why).await {
                Ok(()) => Requeue::requeue(Duration::ZERO),
                Err(error) => agent.failed(&steps, error).await,
            }
        }
        Err(error) => agent.failed(&steps, error).await,
    })
}

/// Plans and acts until there is nothing more to do; says when to look again.
async fn drive<Z: Zfs>(steps: &mut Steps<'_, Z>) -> Result<Duration, StepError> {
    let node = steps.node;
    let mut fresh = false;
    for _ in 0..PLANS {
        // Of a volume that moves something is to be done nearly always: the object is asked for at once.
        let moves = !fresh && volume::status(&steps.volume).handoff.is_some();
        let (found, now) =
            tokio::join!(disk::look(node.zfs.as_ref(), &node.mounts, &steps.dataset), newest(steps, moves));
        let found = found?;
        if moves {
            let Some(now) = now? else { return Ok(RESYNC) };
            steps.volume = now;
            fresh = true;
        }
        let (local, part) = (found.copy, found.there.part.is_some());
        let mut snapshots = asked(steps).await?;
        let mut actions = handoff::plan(&node.name, &steps.volume, local.as_ref(), &snapshots);
        if !fresh && (part || !actions.is_empty()) {
            // The watch may be behind: what is done is decided on the object as it is now.
            let Some(now) = newest(steps, true).await? else { return Ok(RESYNC) };
            steps.volume = now;
            fresh = true;
            snapshots = asked(steps).await?;
            actions = handoff::plan(&node.name, &steps.volume, local.as_ref(), &snapshots);
        }
        if part && !handoff::wants_part(&node.name, &steps.volume, &actions) {
            node.zfs.abort_receive(&steps.dataset).await?;
            tracing::info!(dataset = %steps.dataset, "dropped a part of a stream that nobody goes on with");
            continue;
        }
        if actions.is_empty() {
            let owned = volume::status(&steps.volume).owner.as_ref() == Some(&node.name);
            return Ok(if owned { OWNED } else { RESYNC });
        }
        // What comes before a fetch may change what is there.
        steps.there = matches!(actions.first(), Some(Action::Fetch(_))).then_some(found.there);
        for action in actions {
            match action {
                Action::Wait(why) => return wait(steps, &why).await,
                Action::Report { reason, message } => return report(steps, reason, &message).await,
                Action::Keep(why) => return keep(steps, &why).await,
                Action::AwaitKey => {
                    condition(
                        steps,
                        AWAITS_KEY,
                        "encrypted: the dataset is made with the key that its first pod brings",
                        false,
                    )
                    .await?;
                    return Ok(RESYNC);
                }
                action => {
                    tracing::debug!(volume = steps.volume.name_any(), ?action, "step");
                    steps.apply(action).await?;
                }
            }
        }
    }
    Ok(Duration::ZERO)
}

/// The volume's object as it is now, if that is wanted and there is one.
async fn newest<Z: Zfs>(steps: &Steps<'_, Z>, wanted: bool) -> kube::Result<Option<PortableVolume>> {
    match wanted {
        true => steps.node.volumes.get_opt(&steps.volume.name_any()).await,
        false => Ok(None),
    }
}

/// The snapshots that are wanted of the volume. The watch may be behind, which matters only where the volume is destroyed: what is
/// not known to be wanted is destroyed with it.
async fn asked<Z: Zfs>(steps: &Steps<'_, Z>) -> Result<Vec<Asked>, StepError> {
    let (node, name) = (steps.node, steps.volume.name_any());
    if steps.volume.metadata.deletion_timestamp.is_some() {
        let of_volume = ListParams::default().fields(&format!("spec.volume={name}"));
        return Ok(node.snapshots.list(&of_volume).await?.iter().map(Asked::of).collect());
    }
    let seen = node.snapshots_seen.state();
    Ok(seen.iter().filter(|snapshot| snapshot.spec.volume == name).map(|snapshot| Asked::of(snapshot)).collect())
}

/// A dataset that outlives its volume.
async fn keep<Z: Zfs>(steps: &mut Steps<'_, Z>, why: &str) -> Result<Duration, StepError> {
    condition(steps, KEPT, why, false).await?;
    Ok(REPORTED)
}

async fn wait<Z: Zfs>(steps: &mut Steps<'_, Z>, why: &str) -> Result<Duration, StepError> {
    let reason = if steps.volume.metadata.deletion_timestamp.is_some() { "Deleting" } else { "Moving" };
    condition(steps, reason, why, false).await?;
    Ok(WAIT)
}

async fn report<Z: Zfs>(steps: &mut Steps<'_, Z>, reason: &'static str, message: &str) -> Result<Duration, StepError> {
    if condition(steps, reason, message, true).await? {
        tracing::warn!(volume = steps.volume.name_any(), reason, message);
        steps.node.events.warning(&volume::reference(&steps.volume), reason, "Check", message).await;
    }
    Ok(REPORTED)
}

/// Says in the status why the volume is not ready. False if it said so already.
async fn condition<Z: Zfs>(
    steps: &mut Steps<'_, Z>,
    reason: &str,
    message: &str,
    error: bool,
) -> Result<bool, StepError> {
    let mut status = volume::status(&steps.volume);
    let mut changed = write::not_ready(&mut status, reason, message);
    if let Some(handoff) = status.handoff.as_mut().filter(|_| error) {
        changed |= handoff.last_error.as_deref() != Some(message);
        handoff.last_error = Some(message.to_owned());
    }
    if changed {
        steps.volume = write::status(&steps.node.volumes, &steps.volume, |now| *now = status).await?;
    }
    Ok(changed)
}

impl<Z: Zfs> Agent<Z> {
    pub(super) fn new(node: Arc<Node<Z>>) -> Self {
        Self { node, failures: Mutex::default(), received: Mutex::default() }
    }

    fn failures(&self) -> std::sync::MutexGuard<'_, HashMap<String, Failures>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn received(&self) -> std::sync::MutexGuard<'_, HashMap<String, Progress>> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the newest attempt has ended at the same.
    fn diverged_before(&self, name: &str) -> bool {
        self.failures().get(name).is_some_and(|failures| failures.diverged)
    }

    /// Makes a failure known, once for each different text, and says when to try again.
    async fn failed(&self, steps: &Steps<'_, Z>, error: StepError) -> Requeue {
        let (name, message) = (steps.volume.name_any(), error.to_string());
        let diverged = matches!(error, StepError::Transfer(TransferError::Diverged { .. }));
        let (count, told) = {
            let mut failures = self.failures();
            let failures = failures.entry(name.clone()).or_default();
            failures.count += 1;
            // On zfs-fuse a group's snapshot touches every dataset for a moment: what is gone by the next look was none.
            let passing = diverged && !failures.diverged;
            failures.diverged = diverged;
            let told = passing || failures.told == message;
            if !told {
                failures.told.clone_from(&message);
            }
            (failures.count, told)
        };
        self.node.metrics.failures.inc();
        let pause = FIRST_PAUSE.saturating_mul(1 << (count - 1).min(5)).min(LONGEST_PAUSE);
        tracing::warn!(volume = name, error = message, attempt = count, ?pause, "a step failed");
        if !told {
            if let Err(error) = self.note(&name, &message, diverged).await {
                tracing::debug!(volume = name, %error, "could not write the failure");
            }
            let reason = if diverged { handoff::DIVERGED } else { STEP_FAILED };
            self.node.events.warning(&volume::reference(&steps.volume), reason, "Retry", &message).await;
        }
        Requeue::requeue(pause)
    }

    async fn note(&self, name: &str, message: &str, diverged: bool) -> kube::Result<()> {
        let volume = self.node.volumes.get(name).await?;
        let mut status = volume::status(&volume);
        match &mut status.handoff {
            Some(handoff) => handoff.last_error = Some(message.to_owned()),
            // The owner of a volume that is in use and well isn't unwell because a look at it failed.
            None if status.owner.is_some() && volume.metadata.deletion_timestamp.is_none() => return Ok(()),
            None => _ = write::not_ready(&mut status, STEP_FAILED, message),
        }
        if diverged {
            conditions::set(
                &mut status.conditions,
                handoff::DIVERGED,
                condition::TRUE,
                "NotFromHistory",
                message,
                None,
            );
        }
        write::status(&self.node.volumes, &volume, |now| *now = status).await?;
        Ok(())
    }
}
