//! VolumeMigrations: moves that somebody asks for.
//!
//! Each is looked at alone, and only by the leader, so that two for the same volume can't begin at once. Read, check, plan, do, write.

mod figures;
pub(super) mod plan;
mod read;
#[cfg(test)]
mod tests;
mod validate;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{DeleteParams, EvictParams, PostParams, Preconditions};
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{Controller, controller, watcher};
use kube::{Api, Resource, ResourceExt};
use portolan_crds::{
    MIGRATION_FINALIZER, MigrationMode, MigrationPhase, PortableVolume, VolumeMigration, VolumeMigrationStatus,
};

use self::plan::{Act, End, Plan};
use self::read::Seen;
use super::attach::place;
use super::{Hub, RESYNC, exhaust, retry, set_finalizer, unless_gone};
use crate::handoff::Event;
use crate::write::{self, WriteError};

/// How soon a migration is looked at again while its pod runs; the volumes' changes are events.
const RUNNING: Duration = Duration::from_secs(2);
/// How long its volumes' changes are gathered before it is looked at: a hand-over is several of them, and nothing of it is up to the migration.
const GATHER: Duration = Duration::from_millis(100);
/// How soon one is whose pod is away: pods are not watched.
const AWAY: Duration = Duration::from_millis(500);
/// How soon an eviction that was refused is tried again.
const REFUSED: Duration = Duration::from_secs(5);

pub(super) async fn run(hub: Arc<Hub>) {
    let migrations: Api<VolumeMigration> = Api::all(hub.client.clone());
    let controller = Controller::new(migrations, watcher::Config::default());
    let known = controller.store();
    let stream = controller
        .with_config(controller::Config::default().concurrency(1).debounce(GATHER))
        .watches(hub.volumes.clone(), watcher::Config::default(), move |volume: PortableVolume| {
            let name = volume.name_any();
            let moves = |migration: &VolumeMigration| {
                let status = migration.status.as_ref();
                status.is_some_and(|status| {
                    !status.phase.is_final() && status.volumes.iter().any(|entry| entry.volume == name)
                })
            };
            let of_volume = known.state().into_iter().filter(|migration| moves(migration));
            of_volume.map(|migration| ObjectRef::from_obj(migration.as_ref())).collect::<Vec<_>>()
        })
        .run(reconcile, retry, hub.clone());
    exhaust("migrations", stream).await;
}

async fn reconcile(migration: Arc<VolumeMigration>, hub: Arc<Hub>) -> kube::Result<Action> {
    let api: Api<VolumeMigration> = Api::namespaced(hub.client.clone(), &migration.namespace().unwrap_or_default());
    // As it is now: what is known of it here may be older than what was written last.
    let Some(migration) = api.get_opt(&migration.name_any()).await? else { return Ok(Action::await_change()) };
    if migration.phase().is_final() {
        return clean_up(&hub, &api, &migration).await;
    }
    if migration.phase() == MigrationPhase::Pending {
        return begin(&hub, &api, &migration).await;
    }
    let status = migration.status.clone().unwrap_or_default();
    // Of a pod's volumes Kubernetes' own attachments take care.
    let seen = read::seen(&hub, &migration, &status.volumes, status.pods.is_empty()).await?;
    let Plan { acts, mut status } = plan::plan(&migration, &seen, &hub.zone, Timestamp::now());
    let mut again = if status.phase == MigrationPhase::Moving { AWAY } else { RUNNING };
    for act in acts {
        match perform(&hub, &migration, &seen, act).await? {
            Outcome::Done => {}
            Outcome::Evicted => {
                status.evicted_at.get_or_insert(MicroTime(Timestamp::now()));
                again = AWAY;
            }
            Outcome::Refused(why) => {
                status.message = why;
                again = REFUSED;
            }
        }
    }
    write_status(&hub, &api, &migration, status).await?;
    Ok(Action::requeue(again))
}

/// Looks whether it can be done, and writes down what moves.
async fn begin(hub: &Hub, api: &Api<VolumeMigration>, migration: &VolumeMigration) -> kube::Result<Action> {
    if migration.metadata.deletion_timestamp.is_some() {
        set_finalizer(api, migration, MIGRATION_FINALIZER, false).await?;
        return Ok(Action::await_change());
    }
    if !migration.finalizers().iter().any(|finalizer| finalizer == MIGRATION_FINALIZER) {
        // Which is an event.
        set_finalizer(api, migration, MIGRATION_FINALIZER, true).await?;
        return Ok(Action::requeue(RUNNING));
    }
    let subject = read::subject(hub, migration).await?;
    let target = read::target(hub, &migration.spec.node).await?;
    let now = Timestamp::now();
    let mut status = migration.status.clone().unwrap_or_default();
    match validate::scope(migration, &subject, &target, &hub.zone) {
        Err(refusal) => {
            let end = End { phase: MigrationPhase::Failed, reason: refusal.reason(), message: refusal.to_string() };
            plan::finish(&mut status, end, now);
        }
        Ok(scope) => {
            status.started_at = Some(MicroTime(now));
            status.phase = match (scope.pods.is_empty(), migration.spec.mode) {
                (true, _) => MigrationPhase::Moving,
                (false, MigrationMode::Warm) => MigrationPhase::PreCopy,
                (false, MigrationMode::Cold) => MigrationPhase::Evicting,
            };
            (status.volumes, status.pods) = (scope.volumes, scope.pods);
        }
    }
    write_status(hub, api, migration, status).await?;
    Ok(Action::requeue(AWAY))
}

/// Undoes what a migration that did not come to its end has begun, then lets it be deleted.
async fn clean_up(hub: &Hub, api: &Api<VolumeMigration>, migration: &VolumeMigration) -> kube::Result<Action> {
    if !migration.finalizers().iter().any(|finalizer| finalizer == MIGRATION_FINALIZER) {
        return Ok(Action::await_change());
    }
    let volumes = migration.status.as_ref().map(|status| status.volumes.as_slice()).unwrap_or_default();
    let seen = read::seen(hub, migration, volumes, true).await?;
    let acts = plan::undo(migration, &seen);
    if acts.is_empty() {
        set_finalizer(api, migration, MIGRATION_FINALIZER, false).await?;
        return Ok(Action::requeue(RESYNC));
    }
    for act in acts {
        if let Outcome::Refused(why) = perform(hub, migration, &seen, act).await? {
            tracing::info!(migration = plan::id(migration), why, "undoing");
        }
    }
    Ok(Action::requeue(AWAY))
}

async fn write_status(
    hub: &Hub,
    api: &Api<VolumeMigration>,
    migration: &VolumeMigration,
    status: VolumeMigrationStatus,
) -> kube::Result<()> {
    if migration.status.as_ref() == Some(&status) {
        return Ok(());
    }
    let (phase, message) = (status.phase, status.message.clone());
    let mut next = migration.clone();
    next.status = Some(status);
    next.metadata.managed_fields = None;
    unless_gone(api.replace_status(&migration.name_any(), &PostParams::default(), &next).await)?;
    if phase != migration.phase() {
        tracing::info!(migration = plan::id(migration), ?phase, message, "migration");
    }
    if phase.is_final() {
        let about = migration.object_ref(&());
        match phase {
            MigrationPhase::Done => hub.events.normal(&about, "Moved", "Migrate", &message).await,
            _ => hub.events.warning(&about, "NotMoved", "Migrate", &message).await,
        }
    }
    Ok(())
}

enum Outcome {
    Done,
    /// A pod has been asked to go.
    Evicted,
    /// It can't be done now; why. It is tried again.
    Refused(String),
}

async fn perform(hub: &Hub, migration: &VolumeMigration, seen: &Seen, act: Act) -> kube::Result<Outcome> {
    let at = MicroTime(Timestamp::now());
    match act {
        Act::Ask(name, ask) => {
            let event = Event::Asked(*ask, at);
            tell(hub, seen, &name, event).await
        }
        Act::Refresh(name) => tell(hub, seen, &name, Event::Refresh).await,
        Act::Abort(name, why) => tell(hub, seen, &name, Event::Aborted { why, at }).await,
        Act::Place(name, node) => {
            if let Some(volume) = seen.volumes.get(&name) {
                unless_gone(place(hub, volume, &node).await)?;
            }
            Ok(Outcome::Done)
        }
        Act::Evict(pod, uid) => evict(hub, &migration.namespace().unwrap_or_default(), &pod, uid).await,
    }
}

/// Writes an event to a volume as it was seen.
async fn tell(hub: &Hub, seen: &Seen, name: &str, event: Event) -> kube::Result<Outcome> {
    let Some(volume) = seen.volumes.get(name) else { return Ok(Outcome::Done) };
    match write::event(&hub.volumes, volume, event).await {
        Ok(_) => Ok(Outcome::Done),
        Err(WriteError::Refused(refused)) => Ok(Outcome::Refused(format!("volume {name}: {}", refused.why))),
        // Its change is an event, and comes with the next look.
        Err(WriteError::Api(error)) if write::is_conflict(&error) => Ok(Outcome::Done),
        Err(WriteError::Api(error)) => Err(error),
    }
}

/// Evicts a pod as `kubectl drain` does: a PodDisruptionBudget may say no.
async fn evict(hub: &Hub, namespace: &str, pod: &str, uid: String) -> kube::Result<Outcome> {
    let exactly = DeleteParams {
        preconditions: Some(Preconditions { uid: Some(uid), resource_version: None }),
        ..DeleteParams::default()
    };
    let how = EvictParams { delete_options: Some(exactly), ..EvictParams::default() };
    let pods: Api<Pod> = Api::namespaced(hub.evictions.clone(), namespace);
    match pods.evict(pod, &how).await {
        Ok(_) => Ok(Outcome::Evicted),
        // Another of that name is there by now.
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(Outcome::Done),
        Err(kube::Error::Api(status)) if status.code == 429 => {
            Ok(Outcome::Refused(format!("pod {pod} can't be evicted now, it is tried again: {}", status.message)))
        }
        Err(error) => Err(error),
    }
}
