//! A migration in a small world: volumes that change by the protocol's own events, pods that are evicted and follow, a clock.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use kube::ResourceExt;
use portolan_crds::{
    AskedBy, MIGRATION_FINALIZER, MigrationMode, MigrationPhase, PortableVolume, PortableVolumeSpec,
    PortableVolumeStatus, StorageNode, TOPOLOGY_KEY, VolumeMigration, VolumeMigrationSpec, VolumeMigrationStatus,
};
use serde_json::{Value, json};

use super::plan::{self, Act};
use super::read::{Claim, Seen, Subject, Target};
use super::validate::{self, Refusal};
use crate::handoff::{Event, Known, Round, transition};

const ZONE: &str = "default";

fn node(name: &str, spec: Value) -> Node {
    serde_json::from_value(json!({
        "metadata": { "name": name, "labels": { TOPOLOGY_KEY: ZONE, "disk": "fast" } },
        "spec": spec,
        "status": { "conditions": [{ "type": "Ready", "status": "True" }] },
    }))
    .unwrap()
}

fn pool(name: &str) -> StorageNode {
    let ready = json!({ "type": "Ready", "status": "True", "reason": "", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z" });
    serde_json::from_value(json!({
        "metadata": { "name": name },
        "spec": { "pool": "tank" },
        "status": { "availableBytes": 1, "capacityBytes": 1, "conditions": [ready] },
    }))
    .unwrap()
}

/// A pod of a StatefulSet that mounts the claims.
fn pod(name: &str, uid: &str, on: Option<&str>, claims: &[&str]) -> Pod {
    let mounts: Vec<Value> =
        claims.iter().map(|it| json!({ "name": it, "persistentVolumeClaim": { "claimName": it } })).collect();
    let owner = json!({ "apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db", "uid": "s", "controller": true });
    serde_json::from_value(json!({
        "metadata": { "name": name, "uid": uid, "ownerReferences": [owner] },
        "spec": { "containers": [], "nodeName": on, "volumes": mounts },
    }))
    .unwrap()
}

fn volume(name: &str, owner: &str) -> PortableVolume {
    let mut volume = PortableVolume::new(name, PortableVolumeSpec::default());
    volume.spec.placement.node = owner.to_owned();
    volume.status = Some(PortableVolumeStatus { owner: Some(owner.to_owned()), epoch: 1, ..Default::default() });
    volume
}

fn migration(spec: Value) -> VolumeMigration {
    let mut all = json!({ "node": "b", "timeoutSeconds": 3600 });
    for (key, value) in spec.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    let spec: VolumeMigrationSpec = serde_json::from_value(all).unwrap();
    let mut migration = VolumeMigration::new("m", spec);
    migration.metadata.namespace = Some("shop".into());
    migration.metadata.finalizers = Some(vec![MIGRATION_FINALIZER.into()]);
    migration
}

/// Claims `x` and `y` with volumes of the same names on node `a`, a pod that uses both, and a migration to `b`.
struct World {
    migration: VolumeMigration,
    volumes: BTreeMap<String, PortableVolume>,
    pods: Vec<Pod>,
    attached: BTreeMap<String, BTreeSet<String>>,
    target: Target,
    now: Timestamp,
    evicted: Vec<String>,
}

impl World {
    fn new(spec: Value) -> Self {
        let volumes = ["x", "y"].map(|name| (name.to_owned(), volume(name, "a")));
        let attached = ["x", "y"].map(|name| (name.to_owned(), BTreeSet::from(["a".to_owned()])));
        Self {
            migration: migration(spec),
            volumes: volumes.into(),
            pods: vec![pod("db-0", "1", Some("a"), &["x", "y"])],
            attached: attached.into(),
            target: Target { node: Some(node("b", json!({}))), pool: Some(pool("b")) },
            now: Timestamp::from_second(1000).unwrap(),
            evicted: Vec::new(),
        }
    }

    fn subject(&self) -> Subject {
        let ours = |(name, volume): (&String, &PortableVolume)| (name.clone(), Claim::Ours(Box::new(volume.clone())));
        Subject {
            claims: self.volumes.iter().map(ours).collect(),
            pods: self.pods.clone(),
            pod_found: true,
            others: Vec::new(),
        }
    }

    /// As the controller does with one that it has not looked at yet.
    fn begin(&mut self) -> &mut Self {
        let scope = validate::scope(&self.migration, &self.subject(), &self.target, ZONE).unwrap();
        let phase = match (scope.pods.is_empty(), self.migration.spec.mode) {
            (true, _) => MigrationPhase::Moving,
            (false, MigrationMode::Warm) => MigrationPhase::PreCopy,
            (false, MigrationMode::Cold) => MigrationPhase::Evicting,
        };
        self.migration.status = Some(VolumeMigrationStatus {
            phase,
            volumes: scope.volumes,
            pods: scope.pods,
            started_at: Some(MicroTime(self.now)),
            ..VolumeMigrationStatus::default()
        });
        self
    }

    fn seen(&self) -> Seen {
        Seen {
            volumes: self.volumes.clone(),
            pods: self.pods.clone(),
            attached: self.attached.clone(),
            target: self.target.clone(),
        }
    }

    /// One look of the controller; what it does, done. `lost`: it dies before it writes what it has done.
    fn look(&mut self, lost: bool) -> Vec<Act> {
        let plan::Plan { acts, status } = plan::plan(&self.migration, &self.seen(), ZONE, self.now);
        for act in &acts {
            self.perform(act.clone());
        }
        if !lost {
            self.migration.status = Some(status);
        }
        acts
    }

    fn perform(&mut self, act: Act) {
        let at = MicroTime(self.now);
        match act {
            Act::Ask(name, ask) => self.happen(&name, Event::Asked(*ask, at)),
            Act::Refresh(name) => self.happen(&name, Event::Refresh),
            Act::Abort(name, why) => self.happen(&name, Event::Aborted { why, at }),
            Act::Place(name, node) => self.volumes.get_mut(&name).unwrap().spec.placement.node = node,
            Act::Evict(name, uid) => {
                let pod = self.pods.iter_mut().find(|pod| pod.uid().as_deref() == Some(&*uid)).unwrap();
                assert_eq!((pod.name_any(), &pod.metadata.deletion_timestamp), (name, &None));
                pod.metadata.deletion_timestamp = Some(Time(self.now + SignedDuration::from_secs(30)));
                pod.metadata.deletion_grace_period_seconds = Some(30);
                self.evicted.push(uid);
            }
        }
    }

    fn happen(&mut self, name: &str, event: Event) {
        let volume = self.volumes.get_mut(name).unwrap();
        volume.status = Some(transition(volume, event).unwrap());
    }

    /// A round of PreCopy of the volume, of so many bytes, in no time at all.
    fn round(&mut self, name: &str, bytes: i64) {
        let handoff = self.status(name).handoff.unwrap();
        let snapshot = Known { name: format!("r{}", handoff.rounds), guid: format!("{name}{}", handoff.rounds) };
        let (epoch, guid, at) = (handoff.epoch, snapshot.guid.clone(), MicroTime(self.now));
        self.happen(name, Event::RoundTaken { node: "a".into(), epoch, snapshot, at });
        let round = Some(Round { bytes, milliseconds: 1 });
        self.happen(name, Event::RoundReceived { node: "b".into(), epoch, guid, round });
    }

    /// The pod has ended, and its follower is on `on`; the attach controller and the agents have done their work.
    fn follow(&mut self, on: &str) {
        self.pods = vec![pod("db-0", "2", Some(on), &["x", "y"])];
        for name in ["x", "y"] {
            self.attached.insert(name.into(), BTreeSet::from([on.to_owned()]));
            if on == "b" {
                let ask = crate::handoff::Ask { to: on.into(), ..Default::default() };
                self.happen(name, Event::Asked(ask, MicroTime(self.now)));
                self.hand_over(name);
            }
        }
    }

    fn hand_over(&mut self, name: &str) {
        let epoch = self.status(name).handoff.unwrap().epoch;
        let (at, guid) = (MicroTime(self.now), format!("{name}-final"));
        let snapshot = Known { name: "final".into(), guid: guid.clone() };
        self.happen(name, Event::Published { node: "a".into(), epoch, snapshot, quiesced_at: at.clone() });
        self.happen(name, Event::TookOver { node: "b".into(), epoch, guid, bytes: 0, base: None });
        self.happen(name, Event::Finished { node: "b".into(), epoch, at });
    }

    fn get_ready(&mut self) {
        let ready = json!({ "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": self.now.to_string() }] });
        self.pods[0].status = serde_json::from_value(ready).unwrap();
    }

    fn status(&self, name: &str) -> PortableVolumeStatus {
        self.volumes[name].status.clone().unwrap()
    }

    fn phase(&self) -> MigrationPhase {
        self.migration.phase()
    }

    fn message(&self) -> String {
        self.migration.status.clone().unwrap().message
    }

    fn pass(&mut self, seconds: i64) {
        self.now += SignedDuration::from_secs(seconds);
    }

    /// Looks until nothing comes of it; the status of look `lost` isn't written.
    fn settle(&mut self, lost: Option<usize>, looks: &mut usize) {
        for _ in 0..20 {
            let before = (self.migration.clone(), self.volumes.clone());
            let acts = self.look(lost == Some(*looks));
            *looks += 1;
            if acts.is_empty() && before == (self.migration.clone(), self.volumes.clone()) && lost != Some(*looks - 1) {
                return;
            }
            if acts.iter().all(|act| matches!(act, Act::Evict(..))) && !acts.is_empty() {
                return;
            }
        }
        panic!("it does not settle: {:?}", self.migration.status);
    }
}

#[test]
fn a_pod_moves_warm_with_all_its_volumes_wherever_the_controller_is_killed() {
    for lost in (0..20).map(Some).chain([None]) {
        let (mut world, mut looks) = (World::new(json!({ "pod": "db-0" })), 0);
        world.begin();
        world.settle(lost, &mut looks);
        assert_eq!(world.phase(), MigrationPhase::PreCopy, "{lost:?}");
        for name in ["x", "y"] {
            let handoff = world.status(name).handoff.unwrap();
            assert_eq!((handoff.asked_by, handoff.migration.as_deref()), (AskedBy::Migration, Some("shop/m")));
        }
        world.round("x", 100);
        world.settle(lost, &mut looks);
        assert_eq!(world.phase(), MigrationPhase::PreCopy, "one of two is warm");
        assert_eq!(world.evicted, [] as [&str; 0]);
        world.round("y", 50);
        world.settle(lost, &mut looks);
        world.settle(lost, &mut looks);
        assert_eq!(world.evicted, ["1"], "{lost:?}");
        assert!(world.volumes.values().all(|volume| volume.spec.placement.node == "b"));
        world.pass(2);
        world.settle(lost, &mut looks);
        assert_eq!(world.phase(), MigrationPhase::Moving);
        world.follow("b");
        world.settle(lost, &mut looks);
        assert_eq!(world.phase(), MigrationPhase::Moving, "not ready yet: {}", world.message());
        world.get_ready();
        world.settle(lost, &mut looks);
        let status = world.migration.status.clone().unwrap();
        assert_eq!((status.phase, status.bytes), (MigrationPhase::Done, 150), "{lost:?}: {}", status.message);
        assert_eq!(status.downtime_milliseconds, Some(2000), "{lost:?}");
        assert!(status.volumes.iter().all(|entry| entry.final_bytes == Some(0) && entry.rounds == 1));
        assert_eq!(plan::undo(&world.migration, &world.seen()), []);
    }
}

#[test]
fn a_pod_is_evicted_only_when_its_successor_would_find_the_way() {
    let mut world = World::new(json!({ "pod": "db-0", "mode": "Cold" }));
    world.begin();
    let places = |act: &Act| matches!(act, Act::Place(_, node) if node == "b");
    let acts = world.look(false);
    assert!(acts.len() == 2 && acts.iter().all(places), "{acts:?}");
    assert_eq!(world.look(false), [Act::Evict("db-0".into(), "1".into())]);
}

#[test]
fn a_target_that_is_lost_before_the_eviction_ends_it() {
    for phase in [MigrationPhase::PreCopy, MigrationPhase::Evicting] {
        let mut world = World::new(json!({ "claim": "x" }));
        world.begin().migration.status.as_mut().unwrap().phase = phase;
        world.target.node = Some(node("b", json!({ "unschedulable": true })));
        assert_eq!(world.look(false), []);
        assert_eq!(world.phase(), MigrationPhase::Failed);
        assert!(world.message().contains("cordoned"), "{}", world.message());
    }
}

#[test]
fn one_that_is_cancelled_is_undone_unless_kubernetes_wants_the_volume_there() {
    let mut world = World::new(json!({ "claim": "x" }));
    world.begin().look(false);
    world.volumes.get_mut("x").unwrap().spec.placement.node = "b".into();
    world.migration.metadata.deletion_timestamp = Some(Time(world.now));
    assert_eq!(world.look(false), []);
    assert_eq!(world.phase(), MigrationPhase::Cancelled);
    // A pod is on its way there by now.
    world.attached.get_mut("y").unwrap().insert("b".into());
    let message = world.message();
    let undo = plan::undo(&world.migration, &world.seen());
    assert_eq!(undo, [Act::Abort("x".into(), message)]);
    undo.into_iter().for_each(|act| world.perform(act));
    let undo = plan::undo(&world.migration, &world.seen());
    assert_eq!(undo, [Act::Place("x".into(), "a".into())]);
    undo.into_iter().for_each(|act| world.perform(act));
    assert_eq!(plan::undo(&world.migration, &world.seen()), []);
    assert!(world.status("x").handoff.is_none() && world.status("y").handoff.is_some());
    // Another's is not ours to end.
    world.attached.get_mut("y").unwrap().remove("b");
    world.volumes.get_mut("y").unwrap().status.as_mut().unwrap().handoff.as_mut().unwrap().migration = None;
    assert_eq!(plan::undo(&world.migration, &world.seen()), []);
}

#[test]
fn a_pod_that_lands_elsewhere_ends_it_with_where_and_why() {
    let mut world = World::new(json!({ "pod": "db-0", "mode": "Cold" }));
    world.begin();
    world.settle(None, &mut 0);
    world.pods.clear();
    world.look(false);
    assert_eq!(world.phase(), MigrationPhase::Moving);
    world.follow("c");
    world.target.node = Some(node("b", json!({ "unschedulable": true })));
    world.look(false);
    assert_eq!(world.phase(), MigrationPhase::Failed);
    for words in ["db-0 on node c", "cordoned"] {
        assert!(world.message().contains(words), "{}", world.message());
    }
}

#[test]
fn it_is_given_up_in_time_and_says_what_it_waited_for() {
    let mut world = World::new(json!({ "claim": "x" }));
    world.begin().look(false);
    world.pass(3599);
    world.look(false);
    assert_eq!(world.phase(), MigrationPhase::PreCopy);
    world.pass(1);
    world.look(false);
    assert_eq!(world.phase(), MigrationPhase::Failed);
    for words in ["3600 s", "PreCopy", "data of x, y are sent"] {
        assert!(world.message().contains(words), "{}", world.message());
    }
}

#[test]
fn a_volume_that_no_pod_uses_changes_hands_at_once_but_not_while_it_is_attached() {
    let mut world = World::new(json!({ "claim": "x" }));
    world.pods.clear();
    world.begin();
    world.look(false);
    assert!(world.message().contains("detached from node a"), "{}", world.message());
    assert!(world.status("x").handoff.is_none());
    world.attached.clear();
    let acts = world.look(false);
    assert!(acts.iter().all(|act| matches!(act, Act::Ask(_, ask) if !ask.warm)) && acts.len() == 2, "{acts:?}");
    world.hand_over("x");
    world.look(false);
    assert_eq!(world.phase(), MigrationPhase::Moving);
    world.hand_over("y");
    world.look(false);
    assert_eq!(world.phase(), MigrationPhase::Done);
}

#[test]
fn what_runs_is_kept_warm_and_can_be_slowed_down() {
    let mut world = World::new(json!({ "claim": "x" }));
    world.begin().look(false);
    world.round("x", 10);
    assert_eq!(world.look(false), []);
    world.pass(plan::STALE.as_secs());
    assert_eq!(world.look(false), [Act::Refresh("x".into())]);
    world.migration.spec.bandwidth = Some("1M".into());
    assert_eq!(world.look(false).len(), 2);
    assert_eq!(world.status("y").handoff.unwrap().limit_bytes_per_second, Some(1_000_000));
    assert_eq!(world.look(false), []);
}

#[test]
fn what_a_cordon_has_begun_is_taken_over() {
    let mut world = World::new(json!({ "claim": "x" }));
    world.begin();
    for (name, to) in [("x", "b"), ("y", "c")] {
        let ask = crate::handoff::Ask { to: to.into(), by: AskedBy::Cordon, warm: true, ..Default::default() };
        world.happen(name, Event::Asked(ask, MicroTime(world.now)));
    }
    world.look(false);
    for name in ["x", "y"] {
        let handoff = world.status(name).handoff.unwrap();
        assert_eq!((handoff.to.as_str(), handoff.asked_by), ("b", AskedBy::Migration), "{name}");
    }
    assert_eq!(world.look(false), []);
}

#[test]
fn a_pod_that_starts_anew_meanwhile_is_the_one_that_is_evicted() {
    let mut world = World::new(json!({ "claim": "x" }));
    world.begin().look(false);
    world.pods = vec![pod("db-0", "7", Some("a"), &["x", "y"])];
    world.round("x", 1);
    world.round("y", 1);
    world.settle(None, &mut 0);
    assert_eq!(world.evicted, ["7"]);
}

type Change = Box<dyn Fn(&mut World, &mut Subject)>;

#[test]
fn what_is_only_read_does_not_move_with_its_pods() {
    let scope = |spec: Value, only_read: &[&str], pods: bool| {
        let mut world = World::new(spec);
        for name in only_read {
            world.volumes.get_mut(*name).unwrap().spec.read_only = true;
        }
        let mut subject = world.subject();
        if !pods {
            subject.pods.clear();
        }
        let scope = validate::scope(&world.migration, &subject, &world.target, ZONE)?;
        Ok(scope.volumes.into_iter().map(|entry| entry.volume).collect::<Vec<_>>())
    };
    assert_eq!(scope(json!({ "pod": "db-0" }), &["x"], true), Ok(vec!["y".to_owned()]));
    let refused = |claim: &str| Err(Refusal::OnlyRead { claim: claim.to_owned() });
    assert_eq!(scope(json!({ "pod": "db-0" }), &["x", "y"], true), refused("y"));
    assert_eq!(scope(json!({ "claim": "x" }), &["x"], true), refused("x"), "not its pods' other volumes instead");
    assert_eq!(scope(json!({ "claim": "x" }), &["x", "y"], false), Ok(vec!["x".to_owned()]), "it gets another owner");
}

#[test]
fn what_can_not_be_done_is_refused_by_name() {
    let refused = |spec: Value, change: Change| -> Option<Refusal> {
        let mut world = World::new(spec);
        let mut subject = world.subject();
        change(&mut world, &mut subject);
        validate::scope(&world.migration, &subject, &world.target, ZONE).err()
    };
    let of_x = || json!({ "claim": "x" });
    assert_eq!(refused(of_x(), Box::new(|_, _| {})), None);
    let claim = |claim: Claim| move |_: &mut World, it: &mut Subject| drop(it.claims.insert("x".into(), claim.clone()));
    let node_is = |spec: Value| move |it: &mut World, _: &mut Subject| it.target.node = Some(node("b", spec.clone()));
    let zoneless = |it: &mut World, _: &mut Subject| it.target.node.as_mut().unwrap().labels_mut().clear();
    let unready = |it: &mut World, _: &mut Subject| it.target.node.as_mut().unwrap().status = None;
    let zvol = |_: &mut World, it: &mut Subject| {
        let mut volume = volume("x", "a");
        volume.spec.mode = portolan_crds::VolumeMode::Block;
        it.claims.insert("x".into(), Claim::Ours(Box::new(volume)));
    };
    let there = |_: &mut World, it: &mut Subject| {
        it.pods.clear();
        it.claims = [("x".to_owned(), Claim::Ours(Box::new(volume("x", "b"))))].into();
    };
    let other = |_: &mut World, it: &mut Subject| {
        let mut other = World::new(json!({ "claim": "y" }));
        other.begin().migration.metadata.name = Some("other".into());
        it.others = vec![other.migration];
    };
    let unmanaged = |_: &mut World, it: &mut Subject| it.pods[0].metadata.owner_references = None;
    let daemon = |_: &mut World, it: &mut Subject| it.pods[0].owner_references_mut()[0].kind = "DaemonSet".into();
    let picky = |_: &mut World, it: &mut Subject| {
        it.pods[0].spec.as_mut().unwrap().node_selector = Some([("disk".to_owned(), "slow".to_owned())].into());
    };
    let taints = json!({ "taints": [{ "key": "gpu", "effect": "NoSchedule" }] });
    let cases: Vec<(Value, Change, &str, &str)> = vec![
        (of_x(), Box::new(claim(Claim::Missing)), "ClaimMissing", "namespace shop"),
        (of_x(), Box::new(claim(Claim::Unbound)), "ClaimNotBound", "claim x"),
        (of_x(), Box::new(claim(Claim::Foreign("nfs".into()))), "ClaimForeign", "nfs"),
        (json!({ "pod": "db-9" }), Box::new(|_, it| it.pod_found = false), "PodMissing", "db-9"),
        (json!({ "pod": "web" }), Box::new(|_, it| it.claims.clear()), "PodWithoutVolumes", "web"),
        (of_x(), Box::new(unmanaged), "PodUnmanaged", "db-0"),
        (of_x(), Box::new(daemon), "PodOfDaemonSet", "db-0"),
        (of_x(), Box::new(picky), "PodNotAllowed", "disk=slow"),
        (of_x(), Box::new(node_is(taints)), "PodNotAllowed", "gpu:NoSchedule"),
        (of_x(), Box::new(|it, _| it.target.node = None), "NodeMissing", "spec.node is \"b\""),
        (of_x(), Box::new(node_is(json!({ "unschedulable": true }))), "NodeUnschedulable", "cordoned"),
        (of_x(), Box::new(unready), "NodeNotReady", "not ready"),
        (of_x(), Box::new(|it, _| it.target.pool = None), "NoPool", "no StorageNode"),
        (of_x(), Box::new(zvol), "NoPool", "can't have zvols"),
        (of_x(), Box::new(zoneless), "OtherZone", "missing"),
        (of_x(), Box::new(there), "AlreadyThere", "claim x"),
        (of_x(), Box::new(other), "MigrationRunning", "other"),
        (json!({ "claim": "x", "bandwidth": "fast" }), Box::new(|_, _| {}), "BandwidthInvalid", "spec.bandwidth"),
    ];
    for (spec, change, reason, words) in cases {
        let found = refused(spec, change).unwrap_or_else(|| panic!("{reason} was let pass"));
        assert_eq!(found.reason(), reason);
        assert!(found.to_string().contains(words), "{reason}: {found}");
    }
}

#[test]
fn what_a_volume_waits_for_is_in_the_message() {
    let mut world = World::new(json!({ "pod": "db-0" }));
    world.begin();
    world.look(false);
    let (name, volume) = world.volumes.iter_mut().next().unwrap();
    let (name, handoff) = (name.clone(), volume.status.as_mut().unwrap().handoff.as_mut().unwrap());
    handoff.waits = Some("its turn to be sent by node a: 2 before it".into());
    world.look(false);
    let message = world.migration.status.unwrap().message;
    assert!(
        message.ends_with(&format!("; volume {name} waits for its turn to be sent by node a: 2 before it")),
        "{message}"
    );
}
