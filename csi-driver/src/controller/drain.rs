//! Cordoned nodes: the data of what runs there go ahead, so that little is left to send when the pods go.
//!
//! Where to is a guess: the scheduler decides, and a volume that is wanted elsewhere goes there all the same.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::VolumeAttachment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::ResourceExt;
use kube::runtime::watcher;
use portolan_crds::{
    AskedBy, DRIVER, HandoffPhase, PortableVolume, PortableVolumeStatus, Replica, StorageNode, TOPOLOGY_KEY,
};

use super::Hub;
use super::capacity::follow;
use super::migration::plan::is_stale;
use super::volumes::is_ready;
use super::wish::{Needs, candidate, why_no_pool};
use crate::handoff::{self, Ask, Event};
use crate::volume;
use crate::write::{self, WriteError};

/// How many volumes of a node are sent at once; those that are warm don't count.
const AT_ONCE: usize = 2;
/// The taint that a cordoned node has, whoever put it there (kubernetes.io, well-known taints).
const TAINT: &str = "node.kubernetes.io/unschedulable";
/// How often is looked while a node is cordoned, and how long changes are gathered.
const CORDONED: Duration = Duration::from_secs(5);
const GATHER: Duration = Duration::from_millis(500);

/// What there is, by the watches.
struct World<'a> {
    nodes: &'a [Arc<Node>],
    pools: &'a [Arc<StorageNode>],
    volumes: &'a [Arc<PortableVolume>],
    attachments: &'a [Arc<VolumeAttachment>],
}

/// Whether a node takes no new pods because somebody wants it so.
pub(super) fn is_cordoned(node: &Node) -> bool {
    let Some(spec) = &node.spec else { return false };
    let tainted = spec.taints.iter().flatten().any(|taint| taint.key == TAINT && taint.effect != "PreferNoSchedule");
    spec.unschedulable == Some(true) || tainted
}

/// What is to be written to volumes, by their names.
fn plan(world: &World<'_>, now: Timestamp) -> Vec<(String, Event)> {
    let cordoned: BTreeSet<String> =
        world.nodes.iter().filter(|node| is_cordoned(node)).map(|node| node.name_any()).collect();
    let mut events = Vec::new();
    let mut sending: BTreeMap<String, usize> = BTreeMap::new();
    for volume in world.volumes {
        let status = volume::status(volume);
        let Some(handoff) = status.handoff.filter(|handoff| handoff.phase == HandoffPhase::PreCopy) else { continue };
        if handoff.asked_by == AskedBy::Cordon && !cordoned.contains(&handoff.from) {
            let why = format!("node {} is not cordoned any more", handoff.from);
            events.push((volume.name_any(), Event::Aborted { why, at: MicroTime(now) }));
            continue;
        }
        if !handoff.warm {
            *sending.entry(handoff.from.clone()).or_default() += 1;
        } else if handoff.asked_by == AskedBy::Cordon && is_stale(&handoff, now) {
            events.push((volume.name_any(), Event::Refresh));
            *sending.entry(handoff.from.clone()).or_default() += 1;
        }
    }
    for volume in world.volumes {
        let status = volume::status(volume);
        let Some(owner) = status.owner.clone().filter(|owner| cordoned.contains(owner)) else { continue };
        let deleting = volume.metadata.deletion_timestamp.is_some();
        let busy = sending.get(&owner).copied().unwrap_or_default() >= AT_ONCE;
        if status.handoff.is_some() || deleting || busy || !is_used(world, volume, &owner) {
            continue;
        }
        // It stays its owner's, and a node that has a copy needs no other.
        let copied = |replica: &Replica| replica.node != owner && handoff::is_complete(volume, &replica.node);
        if volume.spec.is_shared() && status.replicas.iter().any(copied) {
            continue;
        }
        let Some(to) = likeliest(world, volume, &status, &owner) else { continue };
        *sending.entry(owner).or_default() += 1;
        let ask = Ask { to, by: AskedBy::Cordon, warm: true, ..Ask::default() };
        events.push((volume.name_any(), Event::Asked(ask, MicroTime(now))));
    }
    events
}

/// Whether a pod of that node has the volume, as far as Kubernetes says.
fn is_used(world: &World<'_>, volume: &PortableVolume, node: &str) -> bool {
    let name = volume.name_any();
    world.attachments.iter().any(|it| {
        it.spec.attacher == DRIVER
            && it.spec.node_name == node
            && it.spec.source.persistent_volume_name.as_deref() == Some(name.as_str())
            && it.status.as_ref().is_some_and(|status| status.attached)
    })
}

/// Where the pod will go: to a node that takes pods and volumes of this kind. First where the volume is wanted, then where most of it is
/// already, then where most room is.
fn likeliest(world: &World<'_>, volume: &PortableVolume, status: &PortableVolumeStatus, owner: &str) -> Option<String> {
    let node = |name: &str| world.nodes.iter().find(|node| node.name_any() == name);
    let zone = node(owner).and_then(|node| node.labels().get(TOPOLOGY_KEY));
    let copy = |name: &str| status.replicas.iter().find(|replica| replica.node == name);
    let newest = copy(owner).and_then(|replica| replica.guid.as_ref());
    let possible = world.pools.iter().filter_map(|pool| {
        let name = pool.name_any();
        let node = node(&name)?;
        let open = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        let open = open.filter(|taint| taint.effect != "PreferNoSchedule").count() == 0;
        let can = why_no_pool(&name, Some(pool.as_ref()), Needs::of(&volume.spec)).is_none();
        let same_zone = zone.is_some() && node.labels().get(TOPOLOGY_KEY) == zone;
        let takes = name != owner && open && !is_cordoned(node) && is_ready(node) && can && same_zone;
        takes.then_some(pool)
    });
    let rank = |pool: &&Arc<StorageNode>| {
        let name = pool.name_any();
        let replica = copy(&name);
        let as_new = newest.is_some() && replica.and_then(|replica| replica.guid.as_ref()) == newest;
        let room = candidate(pool).map(|candidate| candidate.available);
        let some = replica.is_some_and(|replica| replica.guid.is_some());
        (volume.spec.placement.node == name, as_new, some, room, Reverse(name))
    };
    possible.max_by_key(rank).map(|pool| pool.name_any())
}

/// Looks after cordoned nodes as long as this process leads.
pub(super) async fn run(hub: Arc<Hub>) {
    let (nodes, node_changes) = follow(hub.nodes.clone(), watcher::Config::default());
    let (pools, pool_changes) = follow(hub.storage_nodes.clone(), watcher::Config::default());
    let (volumes, volume_changes) = follow(hub.volumes.clone(), watcher::Config::default());
    let (attachments, attachment_changes) = follow(hub.attachments.clone(), watcher::Config::default());
    let mut changes = stream::select_all([
        node_changes.boxed(),
        pool_changes.boxed(),
        volume_changes.boxed(),
        attachment_changes.boxed(),
    ]);
    // What is not known yet must not be taken for gone: all lists have come once.
    let ready = async {
        let all = tokio::join!(
            nodes.wait_until_ready(),
            pools.wait_until_ready(),
            volumes.wait_until_ready(),
            attachments.wait_until_ready()
        );
        all.0.is_ok() && all.1.is_ok() && all.2.is_ok() && all.3.is_ok()
    };
    tokio::select! {
        ready = ready => if !ready { return },
        () = async { while changes.next().await.is_some() {} } => return,
    }
    loop {
        let (nodes, pools) = (nodes.state(), pools.state());
        let (volumes, attachments) = (volumes.state(), attachments.state());
        let world = World { nodes: &nodes, pools: &pools, volumes: &volumes, attachments: &attachments };
        for (name, event) in plan(&world, Timestamp::now()) {
            let Some(volume) = volumes.iter().find(|volume| volume.name_any() == name) else { continue };
            tell(&hub, volume, event).await;
        }
        // Of what nobody has cordoned only a change can make something to do.
        let pause = if nodes.iter().any(|node| is_cordoned(node)) { CORDONED } else { super::RESYNC };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            Some(()) = changes.next() => {}
        }
        let gather = async { while changes.next().await.is_some() {} };
        let _ = tokio::time::timeout(GATHER, gather).await;
    }
}

/// Writes an event to a volume as it was seen; what has changed since is seen next time.
async fn tell(hub: &Hub, volume: &PortableVolume, event: Event) {
    let name = volume.name_any();
    let what = match &event {
        Event::Asked(ask, _) => format!("its node is cordoned: its data go ahead to node {}", ask.to),
        Event::Aborted { why, .. } => format!("its data don't go ahead any more: {why}"),
        _ => "its data are sent once more".to_owned(),
    };
    match write::event(&hub.volumes, volume, event).await {
        Ok(_) => tracing::info!(volume = name, what, "cordon"),
        Err(WriteError::Refused(refused)) => tracing::debug!(volume = name, why = refused.why, "cordon"),
        Err(WriteError::Api(error)) if write::is_conflict(&error) => {}
        Err(WriteError::Api(error)) => tracing::warn!(volume = name, %error, "cordon"),
    }
}

#[cfg(test)]
mod tests {
    use portolan_crds::{Handoff, PortableVolumeSpec};
    use serde_json::{Value, json};

    use super::*;
    use crate::handoff::transition;

    fn node(name: &str, spec: Value) -> Arc<Node> {
        let node = json!({
            "metadata": { "name": name, "labels": { TOPOLOGY_KEY: "default" } },
            "spec": spec,
            "status": { "conditions": [{ "type": "Ready", "status": "True" }] },
        });
        Arc::new(serde_json::from_value(node).unwrap())
    }

    fn pool(name: &str, available: i64) -> Arc<StorageNode> {
        let ready = json!({ "type": "Ready", "status": "True", "reason": "", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z" });
        let pool = json!({
            "metadata": { "name": name },
            "spec": { "pool": "tank" },
            "status": { "availableBytes": available, "capacityBytes": 100, "conditions": [ready] },
        });
        Arc::new(serde_json::from_value(pool).unwrap())
    }

    fn volume(name: &str, owner: &str, replicas: &[(&str, &str)]) -> PortableVolume {
        let mut volume = PortableVolume::new(name, PortableVolumeSpec::default());
        volume.spec.placement.node = owner.to_owned();
        let replica = |(node, guid): &(&str, &str)| Replica {
            node: node.to_string(),
            guid: Some(guid.to_string()),
            ..Replica::default()
        };
        volume.status = Some(PortableVolumeStatus {
            owner: Some(owner.to_owned()),
            epoch: 1,
            replicas: replicas.iter().map(replica).collect(),
            ..PortableVolumeStatus::default()
        });
        volume
    }

    fn attached(volume: &str, node: &str) -> Arc<VolumeAttachment> {
        let attachment = json!({
            "metadata": { "name": volume },
            "spec": { "attacher": DRIVER, "nodeName": node, "source": { "persistentVolumeName": volume } },
            "status": { "attached": true },
        });
        Arc::new(serde_json::from_value(attachment).unwrap())
    }

    /// A cluster of three nodes, of which `a` may be cordoned, and volumes that are all attached to `a`.
    struct Cluster {
        nodes: Vec<Arc<Node>>,
        pools: Vec<Arc<StorageNode>>,
        volumes: Vec<Arc<PortableVolume>>,
        attachments: Vec<Arc<VolumeAttachment>>,
    }

    impl Cluster {
        fn new(volumes: Vec<PortableVolume>) -> Self {
            Self {
                nodes: vec![node("a", json!({ "unschedulable": true })), node("b", json!({})), node("c", json!({}))],
                pools: vec![pool("a", 90), pool("b", 10), pool("c", 50)],
                attachments: volumes.iter().map(|volume| attached(&volume.name_any(), "a")).collect(),
                volumes: volumes.into_iter().map(Arc::new).collect(),
            }
        }

        fn plan(&self, now: i64) -> Vec<(String, Event)> {
            let world = World {
                nodes: &self.nodes,
                pools: &self.pools,
                volumes: &self.volumes,
                attachments: &self.attachments,
            };
            plan(&world, Timestamp::from_second(now).unwrap())
        }

        /// Where each volume is to go.
        fn targets(&self) -> Vec<String> {
            let to = |(_, event): (String, Event)| match event {
                Event::Asked(ask, _) if ask.warm && ask.by == AskedBy::Cordon => ask.to,
                other => panic!("{other:?}"),
            };
            self.plan(0).into_iter().map(to).collect()
        }

        fn apply(&mut self, now: i64) {
            for (name, event) in self.plan(now) {
                let volume = self.volumes.iter_mut().find(|volume| volume.name_any() == name).unwrap();
                let status = transition(volume, event).unwrap();
                Arc::make_mut(volume).status = Some(status);
            }
        }

        fn handoff(&mut self, index: usize, change: impl FnOnce(&mut Handoff)) {
            let status = Arc::make_mut(&mut self.volumes[index]).status.as_mut().unwrap();
            change(status.handoff.as_mut().unwrap());
        }
    }

    #[test]
    fn the_likeliest_target() {
        assert_eq!(Cluster::new(vec![volume("v", "a", &[("a", "1")])]).targets(), ["c"], "most room");
        let near = volume("v", "a", &[("a", "2"), ("b", "2"), ("c", "1")]);
        assert_eq!(Cluster::new(vec![near.clone()]).targets(), ["b"], "the newest snapshot is there");
        let mut wanted = near.clone();
        wanted.spec.placement.node = "c".to_owned();
        assert_eq!(Cluster::new(vec![wanted]).targets(), ["c"], "it is wanted there");
        for unfit in [
            node("b", json!({ "unschedulable": true })),
            node("b", json!({ "taints": [{ "key": "gpu", "effect": "NoSchedule" }] })),
            Arc::new(Node::default()),
        ] {
            let mut cluster = Cluster::new(vec![near.clone()]);
            cluster.nodes[1] = unfit;
            assert_eq!(cluster.targets(), ["c"]);
        }
        let mut cluster = Cluster::new(vec![near]);
        cluster.pools.remove(1);
        assert_eq!(cluster.targets(), ["c"], "no pool");
    }

    #[test]
    fn one_copy_of_what_nobody_writes_is_enough() {
        let mut volume = volume("v", "a", &[("b", "1")]);
        volume.spec.read_only = true;
        assert_eq!(Cluster::new(vec![volume.clone()]).targets(), ["b"], "what b has proves nothing");
        volume.status.as_mut().unwrap().replicas[0].snapshot = Some("portolan-2".into());
        assert_eq!(Cluster::new(vec![volume.clone()]).plan(0), []);
        volume.spec.read_only = false;
        assert_eq!(Cluster::new(vec![volume]).targets(), ["b"]);
    }

    #[test]
    fn only_what_is_in_use_and_at_rest_is_sent_ahead() {
        let of_a = || volume("v", "a", &[]);
        let mut open = Cluster::new(vec![of_a()]);
        open.nodes[0] = node("a", json!({}));
        assert_eq!(open.plan(0), [], "nobody cordoned it");
        open.nodes[0] = node("a", json!({ "taints": [{ "key": TAINT, "effect": "NoExecute" }] }));
        assert_eq!(open.plan(0).len(), 1, "a taint is as good");
        let mut unused = Cluster::new(vec![of_a()]);
        unused.attachments.clear();
        assert_eq!(unused.plan(0), []);
        assert_eq!(Cluster::new(vec![volume("v", "b", &[])]).plan(0), [], "another node's");
        let mut moving = of_a();
        moving.status.as_mut().unwrap().handoff =
            Some(Handoff { from: "a".into(), to: "b".into(), ..Handoff::default() });
        assert_eq!(Cluster::new(vec![moving]).plan(0), []);
    }

    #[test]
    fn two_at_once_and_the_next_when_one_is_warm() {
        let mut cluster = Cluster::new(vec![volume("u", "a", &[]), volume("v", "a", &[]), volume("w", "a", &[])]);
        assert_eq!(cluster.targets().len(), AT_ONCE);
        cluster.apply(0);
        assert_eq!(cluster.plan(1), []);
        cluster.handoff(0, |handoff| handoff.warm = true);
        assert_eq!(cluster.targets().len(), 1);
    }

    #[test]
    fn it_is_kept_warm_while_the_cordon_lasts_and_ends_with_it() {
        let mut cluster = Cluster::new(vec![volume("v", "a", &[])]);
        cluster.apply(0);
        cluster.handoff(0, |handoff| {
            handoff.warm = true;
            handoff.round_at = Some(MicroTime(Timestamp::from_second(100).unwrap()));
        });
        assert_eq!(cluster.plan(159), []);
        assert_eq!(cluster.plan(160), [("v".to_owned(), Event::Refresh)]);
        cluster.nodes[0] = node("a", json!({}));
        assert!(matches!(&cluster.plan(160)[..], [(_, Event::Aborted { why, .. })] if why.contains("not cordoned")));
        // What a person has asked for goes on.
        cluster.handoff(0, |handoff| handoff.asked_by = AskedBy::Migration);
        assert_eq!(cluster.plan(160), []);
    }
}
