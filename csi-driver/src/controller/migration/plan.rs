//! What a migration that has begun does next: a pure function of the object and of what is so now.
//!
//! What was decided is in the object's status before anything is done about it, so a controller that is killed anywhere goes on
//! with the same step. Each act may be done twice.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::ResourceExt;
use portolan_crds::{
    AskedBy, Handoff, HandoffPhase, MigratingVolumePhase, MigrationPhase, PortableVolume, VolumeMigration,
    VolumeMigrationStatus, condition,
};
use portolan_runtime::conditions;

use super::figures;
use super::read::Seen;
use super::validate::{self, node_of, runs};
use crate::controller::wish::Needs;
use crate::handoff::Ask;
use crate::volume;

/// A round of PreCopy that is older than this is repeated as long as the pod runs on.
pub(super) const STALE: SignedDuration = SignedDuration::from_secs(60);

/// Something to be done.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Act {
    /// Ask for a volume's handoff, or change what was asked for.
    Ask(String, Box<Ask>),
    /// Ask for another round of PreCopy.
    Refresh(String),
    /// End a volume's handoff; why.
    Abort(String, String),
    /// Say where a volume is wanted.
    Place(String, String),
    /// Evict a pod, if it still is the one of that UID.
    Evict(String, String),
}

/// What to do, and the status then.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plan {
    pub(super) acts: Vec<Act>,
    pub(super) status: VolumeMigrationStatus,
}

/// How a migration is named in its handoffs.
pub(super) fn id(migration: &VolumeMigration) -> String {
    format!("{}/{}", migration.namespace().unwrap_or_default(), migration.name_any())
}

/// The next step of a migration that has not ended.
pub(super) fn plan(migration: &VolumeMigration, seen: &Seen, zone: &str, now: Timestamp) -> Plan {
    let mut status = migration.status.clone().unwrap_or_default();
    let before = status.phase;
    figures::write(&mut status, &id(migration), &migration.spec.node, &seen.volumes);
    let move_ = Move { migration, seen, now, zone };
    let acts = match move_.end(&status) {
        Some(end) => {
            finish(&mut status, end, now);
            Vec::new()
        }
        None => match status.phase {
            MigrationPhase::PreCopy => move_.pre_copy(&mut status),
            MigrationPhase::Evicting => move_.evict(&mut status),
            MigrationPhase::Moving => move_.wait(&mut status),
            _ => Vec::new(),
        },
    };
    if !status.phase.is_final() {
        say(&mut status, condition::FALSE, reason(before));
    }
    Plan { acts, status }
}

/// What is left to be undone of a migration that has failed or was cancelled; nothing of one that is done.
pub(super) fn undo(migration: &VolumeMigration, seen: &Seen) -> Vec<Act> {
    let (id, target) = (id(migration), &migration.spec.node);
    let mut acts = Vec::new();
    if migration.phase() == MigrationPhase::Done {
        return acts;
    }
    let why = migration.status.as_ref().map(|status| status.message.clone()).unwrap_or_default();
    for (name, volume) in &seen.volumes {
        let status = volume::status(volume);
        // Kubernetes wants it there now, whoever did first.
        let wanted = seen.attached.get(name).is_some_and(|nodes| nodes.contains(target));
        let ours = |handoff: &&Handoff| {
            handoff.migration.as_ref() == Some(&id)
                && handoff.asked_by == AskedBy::Migration
                && handoff.phase < HandoffPhase::Activating
        };
        if wanted {
            continue;
        }
        if status.handoff.as_ref().filter(ours).is_some() {
            acts.push(Act::Abort(name.clone(), why.clone()));
        } else if let Some(owner) =
            status.owner.filter(|owner| volume.spec.placement.node == *target && owner != target)
            && status.handoff.is_none()
        {
            acts.push(Act::Place(name.clone(), owner));
        }
    }
    acts
}

/// How a migration ends.
pub(super) struct End {
    pub(super) phase: MigrationPhase,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

fn failed(reason: &'static str, message: String) -> End {
    End { phase: MigrationPhase::Failed, reason, message }
}

/// Writes the end into a status.
pub(super) fn finish(status: &mut VolumeMigrationStatus, end: End, now: Timestamp) {
    status.phase = end.phase;
    status.message = end.message;
    status.finished_at = Some(MicroTime(now));
    let done = if end.phase == MigrationPhase::Done { condition::TRUE } else { condition::FALSE };
    say(status, done, end.reason);
}

fn say(status: &mut VolumeMigrationStatus, ready: &str, reason: &str) {
    conditions::set(&mut status.conditions, condition::READY, ready, reason, &status.message, None);
}

fn reason(phase: MigrationPhase) -> &'static str {
    match phase {
        MigrationPhase::Pending => "Pending",
        MigrationPhase::PreCopy => "PreCopy",
        MigrationPhase::Evicting => "Evicting",
        _ => "Moving",
    }
}

struct Move<'a> {
    migration: &'a VolumeMigration,
    seen: &'a Seen,
    now: Timestamp,
    zone: &'a str,
}

impl Move<'_> {
    fn target(&self) -> &str {
        &self.migration.spec.node
    }

    /// Whether it ends now, whatever is under way.
    fn end(&self, status: &VolumeMigrationStatus) -> Option<End> {
        if self.migration.metadata.deletion_timestamp.is_some() {
            let message = "the migration was deleted before its end".to_owned();
            return Some(End { phase: MigrationPhase::Cancelled, reason: "Cancelled", message });
        }
        let gone = status.volumes.iter().find(|entry| {
            self.seen.volumes.get(&entry.volume).is_none_or(|volume| volume.metadata.deletion_timestamp.is_some())
        });
        if let Some(gone) = gone {
            return Some(failed("VolumeDeleted", format!("the volume of claim {} was deleted meanwhile", gone.claim)));
        }
        let seconds = self.migration.spec.timeout_seconds;
        let begun = status.started_at.as_ref().map_or(self.now, |begun| begun.0);
        if self.now.duration_since(begun) >= SignedDuration::from_secs(seconds) {
            let was = if status.message.is_empty() { "nothing in particular" } else { &status.message };
            return Some(failed(
                "Timeout",
                format!("it was given up after {seconds} s, in phase {:?}: {was}", status.phase),
            ));
        }
        None
    }

    fn volumes(&self) -> impl Iterator<Item = (&String, &PortableVolume)> {
        self.seen.volumes.iter()
    }

    fn ask(&self, warm: bool) -> Box<Ask> {
        let spec = &self.migration.spec;
        Box::new(Ask {
            to: spec.node.clone(),
            by: AskedBy::Migration,
            migration: Some(id(self.migration)),
            warm,
            target_downtime_milliseconds: spec.target_downtime_milliseconds,
            // A wrong one is refused where it is written, and where it is read first.
            limit_bytes_per_second: validate::limit(self.migration).ok().flatten(),
        })
    }

    /// What the volumes need of the target's pool.
    fn needs(&self) -> Needs {
        self.volumes().fold(Needs::default(), |needs, (_, volume)| needs.and(Needs::of(&volume.spec)))
    }

    /// The end, if the target can't take the pods any more. Until one of them is evicted nothing is lost by that.
    fn target_lost(&self, status: &mut VolumeMigrationStatus) -> bool {
        let lost = validate::target(self.target(), &self.seen.target, self.needs(), self.zone).err();
        if let Some(lost) = &lost {
            finish(status, failed(lost.reason(), lost.to_string()), self.now);
        }
        lost.is_some()
    }

    fn pre_copy(&self, status: &mut VolumeMigrationStatus) -> Vec<Act> {
        if self.target_lost(status) {
            return Vec::new();
        }
        // It may have started anew meanwhile, and not be the one that it was.
        match validate::pods(&self.seen.pods, self.target(), self.seen.target.node.as_ref()) {
            Ok(pods) if !pods.is_empty() => status.pods = pods,
            Ok(_) => {}
            Err(refusal) => {
                finish(status, failed(refusal.reason(), refusal.to_string()), self.now);
                return Vec::new();
            }
        }
        let running = self.seen.pods.iter().filter(|pod| runs(pod));
        let (there, here): (Vec<&Pod>, Vec<&Pod>) = running.partition(|pod| node_of(pod) == Some(self.target()));
        if here.is_empty() && !there.is_empty() {
            status.phase = MigrationPhase::Moving;
            status.evicted_at = Some(MicroTime(self.now));
            return Vec::new();
        }
        let mut acts = Vec::new();
        for (name, volume) in self.volumes() {
            if self.wants_pre_copy(volume) {
                acts.push(Act::Ask(name.clone(), self.ask(true)));
            } else if self.is_stale(volume) {
                acts.push(Act::Refresh(name.clone()));
            }
        }
        let open = status.volumes.iter().filter(|entry| {
            !matches!(
                entry.phase,
                MigratingVolumePhase::Warm | MigratingVolumePhase::Moving | MigratingVolumePhase::Done
            )
        });
        let open: Vec<&str> = open.map(|entry| entry.claim.as_str()).collect();
        status.message = match (open.is_empty(), here.is_empty()) {
            (false, _) => format!("data of {} are sent while the pod runs", open.join(", ")),
            (true, false) => {
                status.phase = MigrationPhase::Evicting;
                status.message = "all data are near".to_owned();
                return Vec::new();
            }
            (true, true) if self.seen.pods.is_empty() => {
                status.pods.clear();
                status.phase = MigrationPhase::Moving;
                return Vec::new();
            }
            (true, true) => "all data are near; it waits until the pod runs, or is gone".to_owned(),
        };
        self.add_errors(status);
        acts
    }

    /// Whether a volume's PreCopy is still to be asked for, or to be made ours.
    fn wants_pre_copy(&self, volume: &PortableVolume) -> bool {
        let status = volume::status(volume);
        if status.owner.as_deref() == Some(self.target()) {
            return false;
        }
        let ask = self.ask(true);
        match &status.handoff {
            None => true,
            Some(handoff) if handoff.phase > HandoffPhase::PreCopy => false,
            Some(handoff) if handoff.to == self.target() => {
                handoff.migration != ask.migration || handoff.limit_bytes_per_second != ask.limit_bytes_per_second
            }
            Some(_) => true,
        }
    }

    /// Whether a volume that is warm has cooled down while it waited.
    fn is_stale(&self, volume: &PortableVolume) -> bool {
        let handoff = volume.status.as_ref().and_then(|status| status.handoff.as_ref());
        handoff.is_some_and(|handoff| is_stale(handoff, self.now))
    }

    fn evict(&self, status: &mut VolumeMigrationStatus) -> Vec<Act> {
        let recorded = |uid: Option<String>| status.pods.iter().any(|pod| Some(&pod.uid) == uid.as_ref());
        let old: Vec<&Pod> = self.seen.pods.iter().filter(|pod| recorded(pod.uid())).collect();
        let running: Vec<&&Pod> = old.iter().filter(|pod| runs(pod)).collect();
        if running.is_empty() {
            let since = old.iter().filter_map(|pod| asked_to_end(pod)).min();
            status.evicted_at.get_or_insert(MicroTime(since.unwrap_or(self.now)));
            status.phase = MigrationPhase::Moving;
            status.message = "the pod has been evicted".to_owned();
            return Vec::new();
        }
        if running.len() == status.pods.len() && self.target_lost(status) {
            return Vec::new();
        }
        // First of all, so that whoever starts the pod again finds it.
        let unplaced = self.place();
        if !unplaced.is_empty() {
            return unplaced;
        }
        let names: Vec<String> = running.iter().map(|pod| pod.name_any()).collect();
        status.message = format!("evicting pod {}", names.join(", "));
        let stale = self.volumes().filter(|(_, volume)| self.is_stale(volume));
        let mut acts: Vec<Act> = stale.map(|(name, _)| Act::Refresh(name.clone())).collect();
        acts.extend(running.iter().map(|pod| Act::Evict(pod.name_any(), pod.uid().unwrap_or_default())));
        acts
    }

    fn place(&self) -> Vec<Act> {
        let elsewhere = self.volumes().filter(|(_, volume)| volume.spec.placement.node != self.target());
        elsewhere.map(|(name, _)| Act::Place(name.clone(), self.target().to_owned())).collect()
    }

    fn wait(&self, status: &mut VolumeMigrationStatus) -> Vec<Act> {
        let here = status.volumes.iter().all(|entry| entry.phase == MigratingVolumePhase::Done);
        if status.pods.is_empty() {
            if here {
                let message = format!("node {} owns it", self.target());
                finish(status, End { phase: MigrationPhase::Done, reason: "Done", message }, self.now);
                return Vec::new();
            }
            return self.move_unused(status);
        }
        let old = |pod: &&Pod| status.pods.iter().any(|known| Some(&known.uid) == pod.uid().as_ref());
        let next: Vec<&Pod> =
            self.seen.pods.iter().filter(|pod| !old(pod) && pod.metadata.deletion_timestamp.is_none()).collect();
        if let Some(stray) = next.iter().find(|pod| node_of(pod).is_some_and(|node| node != self.target())) {
            let message = self.landed_elsewhere(stray);
            finish(status, failed("LandedElsewhere", message), self.now);
            return Vec::new();
        }
        let ready: Vec<Timestamp> = next.iter().filter_map(|pod| ready_since(pod)).collect();
        if here && ready.len() >= status.pods.len() {
            self.done(status, &ready);
            return Vec::new();
        }
        status.message = match next.iter().find(|pod| node_of(pod).is_none()) {
            Some(pending) => unscheduled(pending),
            None if next.is_empty() => {
                let names: Vec<&str> = status.pods.iter().map(|pod| pod.name.as_str()).collect();
                format!("waits for the pod that follows {}", names.join(", "))
            }
            None => format!("waits until the pod is Ready on node {}", self.target()),
        };
        self.add_errors(status);
        Vec::new()
    }

    /// A volume that no pod uses: it changes hands at once.
    fn move_unused(&self, status: &mut VolumeMigrationStatus) -> Vec<Act> {
        let mut acts = self.place();
        status.message = format!("the volume changes hands, to node {}", self.target());
        for (name, volume) in self.volumes() {
            let now = volume::status(volume);
            let begun = now.handoff.as_ref().is_some_and(|handoff| handoff.phase > HandoffPhase::PreCopy);
            if begun || now.owner.as_deref() == Some(self.target()) {
                continue;
            }
            let attached = self.seen.attached.get(name);
            // A pod that has just ended there, or one that is about to start: it would find no volume.
            match attached.and_then(|nodes| nodes.iter().find(|node| *node != self.target())) {
                Some(node) => status.message = format!("waits until volume {name} is detached from node {node}"),
                None => acts.push(Act::Ask(name.clone(), self.ask(false))),
            }
        }
        self.add_errors(status);
        acts
    }

    fn done(&self, status: &mut VolumeMigrationStatus, ready: &[Timestamp]) {
        if let Some(evicted) = &status.evicted_at {
            // `lastTransitionTime` has whole seconds: it became ready within that second, and before now.
            let latest = ready.iter().max().copied().unwrap_or(self.now);
            let second = latest.checked_add(SignedDuration::from_secs(1)).unwrap_or(latest);
            let at = self.now.min(second);
            status.downtime_milliseconds =
                Some(at.duration_since(evicted.0).as_millis().try_into().unwrap_or(i64::MAX));
        }
        let message = format!("pod and volumes are on node {}", self.target());
        finish(status, End { phase: MigrationPhase::Done, reason: "Done", message }, self.now);
    }

    fn landed_elsewhere(&self, pod: &Pod) -> String {
        let (name, node) = (pod.name_any(), node_of(pod).unwrap_or_default());
        let why = match validate::target(self.target(), &self.seen.target, self.needs(), self.zone) {
            Err(refusal) => refusal.to_string(),
            Ok(()) => format!(
                "node {} is only preferred, and the pod's own rules or what it asks for led elsewhere (kubectl describe pod {name})",
                self.target()
            ),
        };
        format!("the scheduler has put pod {name} on node {node}, not {}: {why}", self.target())
    }

    /// What the agents wait for, and what they complain of.
    fn add_errors(&self, status: &mut VolumeMigrationStatus) {
        for (name, volume) in self.volumes() {
            let handoff = volume.status.as_ref().and_then(|status| status.handoff.as_ref());
            if let Some(waits) = handoff.and_then(|handoff| handoff.waits.as_ref()) {
                status.message.push_str(&format!("; volume {name} waits for {waits}"));
            }
            if let Some(error) = handoff.and_then(|handoff| handoff.last_error.as_ref()) {
                status.message.push_str(&format!("; volume {name}: {error}"));
            }
        }
    }
}

/// Whether a warm handoff's newest round is old.
pub(crate) fn is_stale(handoff: &Handoff, now: Timestamp) -> bool {
    let at = handoff.round_at.as_ref().map(|at| at.0);
    handoff.phase == HandoffPhase::PreCopy && handoff.warm && at.is_some_and(|at| now.duration_since(at) >= STALE)
}

/// When a pod that is ending was asked to: Kubernetes writes down when it will be killed.
fn asked_to_end(pod: &Pod) -> Option<Timestamp> {
    let killed = pod.metadata.deletion_timestamp.as_ref()?.0;
    let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or_default();
    killed.checked_sub(SignedDuration::from_secs(grace)).ok()
}

/// Since when a pod is Ready; none if it isn't.
fn ready_since(pod: &Pod) -> Option<Timestamp> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let ready = conditions.iter().find(|it| it.type_ == "Ready" && it.status == "True")?;
    Some(ready.last_transition_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0))
}

fn unscheduled(pod: &Pod) -> String {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut said = conditions.filter(|it| it.type_ == "PodScheduled" && it.status != "True");
    let why =
        said.find_map(|it| it.message.clone()).unwrap_or_else(|| "the scheduler has not looked at it yet".to_owned());
    format!("pod {} has no node yet: {why}", pod.name_any())
}
