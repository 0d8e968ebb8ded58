//! Copies of volumes that nobody writes, for the nodes that read them. A copy comes as in PreCopy, one after the other, and that ends as soon
//! as the copy is complete: the owner stays.

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use portolan_crds::{AskedBy, Handoff, HandoffPhase, PortableVolume};

use super::Hub;
use super::attach::happen;
use super::volumes::is_ready;
use super::wish::{Needs, no_pool};
use crate::handoff::{self, Ask, Event};
use crate::volume;
use crate::write;

/// How long a copy that fails may hold up another node's.
const TURN: SignedDuration = SignedDuration::from_secs(30);

/// Asks for a copy on `node`; why it can't have one now, if it can't.
pub(super) async fn ask_for_copy(hub: &Hub, volume: &PortableVolume, node: &str) -> kube::Result<Option<String>> {
    if let Some(why) = no_pool(&hub.storage_nodes, node, Needs::of(&volume.spec)).await? {
        return Ok(Some(why));
    }
    let status = volume::status(volume);
    for party in [status.owner.as_deref().unwrap_or_default(), node] {
        if !is_up(hub, party).await? {
            return Ok(Some(format!(
                "node {node} has no complete copy of volume {}, and node {party} is not ready: a copy of it is made when that is back",
                volume.name_any()
            )));
        }
    }
    if let Some(running) = status.handoff.filter(|running| running.asked_by == AskedBy::Reading) {
        if !has_had_its_turn(&running, Timestamp::now()) {
            return Ok(None);
        }
        let why = format!("it gets nowhere, and node {node} waits for a copy");
        happen(hub, volume, Event::Aborted { why, at: write::now() }).await?;
        return Ok(None);
    }
    let ask = Ask { to: node.to_owned(), by: AskedBy::Reading, warm: true, ..Ask::default() };
    if happen(hub, volume, Event::Asked(ask, write::now())).await? {
        tracing::info!(volume = volume.name_any(), to = node, "asked for a copy to read");
    }
    Ok(None)
}

fn has_had_its_turn(running: &Handoff, now: Timestamp) -> bool {
    running.started_at.as_ref().is_none_or(|began| now.duration_since(began.0) >= TURN)
}

/// Ends the making of a copy that is complete, or whose node is down. False if there is nothing to end.
pub(super) async fn end_copy(hub: &Hub, volume: &PortableVolume) -> kube::Result<bool> {
    let Some(target) = handoff::copying(volume).filter(|_| volume.spec.is_shared()) else { return Ok(false) };
    let up = is_up(hub, target).await?;
    let Some(why) = why_end(volume, target, up) else { return Ok(false) };
    happen(hub, volume, Event::Aborted { why, at: write::now() }).await
}

/// Why a copy is not to go on. One that a person has asked for is theirs to end.
fn why_end(volume: &PortableVolume, target: &str, up: bool) -> Option<String> {
    let running = volume.status.as_ref()?.handoff.as_ref().filter(|running| running.phase == HandoffPhase::PreCopy)?;
    match running.asked_by {
        AskedBy::Migration | AskedBy::Attachment => None,
        _ if handoff::is_complete(volume, target) => Some(format!("node {target} has a complete copy")),
        AskedBy::Reading if !up => Some(format!("node {target}, for which a copy is made, is not ready")),
        AskedBy::Reading | AskedBy::Cordon => None,
    }
}

async fn is_up(hub: &Hub, node: &str) -> kube::Result<bool> {
    Ok(hub.nodes.get_opt(node).await?.is_some_and(|node| is_ready(&node)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use k8s_openapi::api::core::v1::Node;
    use k8s_openapi::api::storage::v1::VolumeAttachment;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
    use kube::Api;
    use kube::api::{Patch, PatchParams, PostParams};
    use portolan_crds::{
        DRIVER, PortableVolumeSpec, PortableVolumeStatus, Replica, StorageNode, StorageNodeStatus, VolumePhase,
        condition,
    };
    use portolan_runtime::conditions;
    use portolan_tests::api::FakeApi;
    use serde_json::json;

    use super::super::{attach, volumes};
    use super::*;
    use crate::handoff::{Known, Round};

    /// Nodes a, b and c with pools, and a volume of node a that nobody writes.
    struct Cluster {
        hub: Arc<Hub>,
        nodes: Api<Node>,
        storage_nodes: Api<StorageNode>,
    }

    impl Cluster {
        async fn new() -> Self {
            let client = FakeApi::default().client();
            let mut registry = prometheus_client::registry::Registry::default();
            let hub = Arc::new(Hub::new(client.clone(), "z".into(), &mut registry));
            let cluster = Self { hub, nodes: Api::all(client.clone()), storage_nodes: Api::all(client) };
            for name in ["a", "b", "c"] {
                let node = serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap();
                cluster.nodes.create(&PostParams::default(), &node).await.unwrap();
                cluster.is_ready(name, "True").await;
                let pool = StorageNode::new(name, Default::default());
                let mut pool = cluster.storage_nodes.create(&PostParams::default(), &pool).await.unwrap();
                let mut status = StorageNodeStatus::default();
                conditions::set(&mut status.conditions, condition::READY, condition::TRUE, "Ready", "", None);
                pool.status = Some(status);
                cluster.storage_nodes.replace_status(name, &PostParams::default(), &pool).await.unwrap();
                let attachment = json!({
                    "metadata": { "name": name },
                    "spec": { "attacher": DRIVER, "nodeName": name, "source": { "persistentVolumeName": "v" } },
                });
                let attachment = serde_json::from_value(attachment).unwrap();
                cluster.hub.attachments.create(&PostParams::default(), &attachment).await.unwrap();
            }
            let mut spec = PortableVolumeSpec { read_only: true, ..PortableVolumeSpec::default() };
            spec.placement.node = "a".into();
            let volume = PortableVolume::new("v", spec);
            let mut volume = cluster.hub.volumes.create(&PostParams::default(), &volume).await.unwrap();
            volume.status = Some(PortableVolumeStatus {
                owner: Some("a".into()),
                epoch: 1,
                phase: VolumePhase::Ready,
                replicas: vec![Replica { node: "a".into(), ..Replica::default() }],
                ..PortableVolumeStatus::default()
            });
            cluster.hub.volumes.replace_status("v", &PostParams::default(), &volume).await.unwrap();
            cluster
        }

        async fn is_ready(&self, node: &str, ready: &str) {
            let status = json!({ "status": { "conditions": [{ "type": "Ready", "status": ready }] } });
            self.nodes.patch_status(node, &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
        }

        async fn volume(&self) -> PortableVolume {
            self.hub.volumes.get("v").await.unwrap()
        }

        /// Whom a copy is made for.
        async fn copying(&self) -> Option<String> {
            handoff::copying(&self.volume().await).map(str::to_owned)
        }

        /// One look at a node's attachment: whether it is attached, or why not, if that is said.
        async fn attach(&self, node: &str) -> (bool, String) {
            let attachment = self.hub.attachments.get(node).await.unwrap();
            attach::reconcile(Arc::new(attachment), self.hub.clone()).await.unwrap();
            let attachment: VolumeAttachment = self.hub.attachments.get(node).await.unwrap();
            let status = attachment.status.unwrap_or_default();
            (status.attached, status.attach_error.and_then(|error| error.message).unwrap_or_default())
        }

        async fn look(&self) {
            volumes::reconcile(Arc::new(self.volume().await), self.hub.clone()).await.unwrap();
        }

        async fn happens(&self, event: Event) {
            write::event(&self.hub.volumes, &self.volume().await, event).await.unwrap();
        }

        /// What the agents do about a copy, whose first round takes a minute.
        async fn copied(&self, node: &str) {
            let epoch = volume::status(&self.volume().await).handoff.unwrap().epoch;
            let snapshot = Known { name: format!("portolan-{epoch}"), guid: epoch.to_string() };
            let (guid, at) = (snapshot.guid.clone(), write::now());
            self.happens(Event::RoundTaken { node: "a".into(), epoch, snapshot, at }).await;
            let round = Some(Round { bytes: 1 << 30, milliseconds: 60_000 });
            self.happens(Event::RoundReceived { node: node.into(), epoch, guid, round }).await;
        }
    }

    fn nothing_said(attached: bool) -> (bool, String) {
        (attached, String::new())
    }

    #[tokio::test]
    async fn each_node_gets_its_copy_in_turn_and_the_owner_stays() {
        let cluster = Cluster::new().await;
        assert_eq!(cluster.attach("a").await, nothing_said(true));
        for node in ["b", "c"] {
            assert_eq!(cluster.attach(node).await, nothing_said(false));
            assert_eq!(cluster.copying().await.as_deref(), Some("b"));
        }
        cluster.copied("b").await;
        assert_eq!(cluster.attach("b").await, nothing_said(false), "a round to it may be running");
        cluster.look().await;
        assert_eq!(cluster.attach("b").await, nothing_said(true));
        assert_eq!(cluster.attach("c").await, nothing_said(false));
        cluster.copied("c").await;
        cluster.look().await;
        assert_eq!(cluster.attach("c").await, nothing_said(true));
        let volume = cluster.volume().await;
        let status = volume::status(&volume);
        assert_eq!((status.owner.as_deref(), status.epoch, status.handoff), (Some("a"), 1, None));
        assert_eq!((status.phase, volume.spec.placement.node.as_str()), (VolumePhase::Ready, "a"));
    }

    #[tokio::test]
    async fn without_the_owner_only_a_new_reader_waits_and_is_told_why() {
        let cluster = Cluster::new().await;
        cluster.attach("b").await;
        cluster.copied("b").await;
        cluster.look().await;
        cluster.is_ready("a", "Unknown").await;
        assert_eq!(cluster.attach("b").await, nothing_said(true), "it has all there is");
        let (attached, why) = cluster.attach("c").await;
        assert!(!attached && why.contains("node a is not ready"), "{why}");
        assert_eq!(cluster.copying().await, None);
        cluster.is_ready("a", "True").await;
        cluster.attach("c").await;
        assert_eq!(cluster.copying().await.as_deref(), Some("c"));
        // The owner goes while the copy is made.
        cluster.is_ready("a", "Unknown").await;
        cluster.look().await;
        let (_, why) = cluster.attach("c").await;
        assert!(why.contains("node a, which has the data"), "{why}");
        // So does the node that it is for: others have their turn.
        cluster.is_ready("a", "True").await;
        cluster.is_ready("c", "Unknown").await;
        cluster.look().await;
        assert_eq!(cluster.copying().await, None);
        let (_, why) = cluster.attach("c").await;
        assert!(why.contains("node c is not ready"), "{why}");
    }

    #[test]
    fn a_copy_ends_when_it_is_complete_or_nobody_is_there_to_take_it() {
        let ends = |asked_by, guid: Option<&str>, up| {
            let mut volume = PortableVolume::new("v", PortableVolumeSpec { read_only: true, ..Default::default() });
            let snapshot = guid.map(|_| "portolan-2".to_owned());
            let copy = Replica { node: "b".into(), snapshot, guid: guid.map(Into::into) };
            let handoff = Handoff { to: "b".into(), phase: HandoffPhase::PreCopy, asked_by, ..Handoff::default() };
            volume.status = Some(PortableVolumeStatus {
                owner: Some("a".into()),
                handoff: Some(handoff),
                replicas: vec![copy],
                ..PortableVolumeStatus::default()
            });
            why_end(&volume, "b", up)
        };
        assert_eq!(ends(AskedBy::Reading, None, true), None, "it is on its way");
        assert!(ends(AskedBy::Reading, Some("7"), true).unwrap().contains("complete"));
        assert!(ends(AskedBy::Cordon, Some("7"), true).unwrap().contains("complete"));
        assert!(ends(AskedBy::Reading, None, false).unwrap().contains("not ready"));
        assert_eq!(ends(AskedBy::Cordon, None, false), None);
        assert_eq!(ends(AskedBy::Migration, Some("7"), true), None);
    }

    #[test]
    fn a_copy_that_fails_has_its_turn() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let running = Handoff { started_at: Some(MicroTime(at(100))), ..Handoff::default() };
        assert!(!has_had_its_turn(&running, at(129)) && has_had_its_turn(&running, at(130)));
    }
}
