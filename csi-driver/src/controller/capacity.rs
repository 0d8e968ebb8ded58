//! How much room the scheduler may count on: a CSIStorageCapacity for each of our StorageClasses and each pool.
//!
//! A pool is known by its GUID, which the kubelet writes into a label of its node; no object says which node that is. What a pool that
//! can't be used has to offer is nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::{CSIStorageCapacity, StorageClass};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, OwnerReference};
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::reflector::{self, Store, reflector};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource, ResourceExt};
use portolan_crds::{DRIVER, Filesystem, POOL_TOPOLOGY_KEY, StorageNode, condition};
use portolan_runtime::conditions;
use serde_json::json;

use super::wish::Needs;
use super::{Hub, RESYNC, unless_gone};
use crate::parameters::{self, FS_TYPE};
use crate::{quantity, room};

/// Labels of our objects: the driver, and who keeps them up to date (the names are those that Kubernetes' own provisioner uses).
const DRIVER_LABEL: &str = "csi.storage.k8s.io/drivername";
const MANAGER_LABEL: &str = "csi.storage.k8s.io/managed-by";
/// The Deployment that this process is of, with which its objects go.
const MANAGER: &str = "portolan-csi-controller";
/// How long changes are gathered before they are looked at together.
const GATHER: Duration = Duration::from_secs(1);

/// What is to be done about one object.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Change {
    /// Make it.
    Create(CSIStorageCapacity),
    /// Write it over the one that was read.
    Replace(CSIStorageCapacity),
    /// Delete it, by its name.
    Delete(String),
}

/// What a pool has to offer.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Pool {
    /// Bytes; none where it can't be used.
    available: i64,
    /// Bytes in all.
    capacity: i64,
    capabilities: Vec<String>,
}

/// What makes the objects `present` say what the pools of `nodes` have to offer to volumes of `classes`. Those that are made get `owner`.
pub(super) fn plan(
    classes: &[Arc<StorageClass>],
    nodes: &[Arc<StorageNode>],
    present: &[Arc<CSIStorageCapacity>],
    owner: Option<&OwnerReference>,
) -> Vec<Change> {
    let pools = pools(nodes);
    let mut changes = Vec::new();
    let mut wanted = Vec::new();
    for class in classes.iter().filter(|class| class.provisioner == DRIVER) {
        for (guid, pool) in &pools {
            let bytes = if needs(class).missing(&pool.capabilities).is_some() { 0 } else { pool.available };
            let object = object(&class.name_any(), guid, bytes, owner);
            wanted.push(object.name_any());
            match present.iter().find(|present| present.name_any() == object.name_any()) {
                None => changes.push(Change::Create(object)),
                Some(present) if !says(present, bytes, pool.capacity) => {
                    let capacity = object.capacity;
                    changes.push(Change::Replace(CSIStorageCapacity { capacity, ..present.as_ref().clone() }));
                }
                Some(_) => {}
            }
        }
    }
    let stale = present.iter().map(|present| present.name_any()).filter(|name| !wanted.contains(name));
    changes.extend(stale.map(Change::Delete));
    changes
}

/// The pools by their GUIDs. One that two nodes claim, of which one can use it, is that one's.
fn pools(nodes: &[Arc<StorageNode>]) -> BTreeMap<String, Pool> {
    let mut found: BTreeMap<String, Pool> = BTreeMap::new();
    for status in nodes.iter().filter_map(|node| node.status.as_ref()) {
        let Some(guid) = status.pool_guid.clone() else { continue };
        let ready = conditions::find(&status.conditions, condition::READY);
        let usable = ready.is_some_and(|ready| ready.status == condition::TRUE);
        let pool = Pool {
            available: status.available_bytes.filter(|_| usable).unwrap_or_default(),
            capacity: status.capacity_bytes.unwrap_or_default(),
            capabilities: status.capabilities.clone(),
        };
        let better = found.get(&guid).is_none_or(|other| other.available < pool.available);
        if better {
            found.insert(guid, pool);
        }
    }
    found
}

/// What volumes of a class need of a pool. What else is wrong with a class is said where a claim names it: without room nobody would see that.
fn needs(class: &StorageClass) -> Needs {
    let given = |name| class.parameters.as_ref().and_then(|parameters| parameters.get(name));
    let filesystem = given(FS_TYPE).map(|name| parameters::filesystem(name).unwrap_or_default()).unwrap_or_default();
    Needs { zvol: filesystem != Filesystem::Zfs, encryption: given("encryption").is_some() }
}

fn object(class: &str, guid: &str, bytes: i64, owner: Option<&OwnerReference>) -> CSIStorageCapacity {
    let labels = [(DRIVER_LABEL, DRIVER), (MANAGER_LABEL, MANAGER)];
    CSIStorageCapacity {
        metadata: ObjectMeta {
            // A class's name may be too long to be a part of another.
            name: Some(format!("portolan-{}-{guid}", &blake3::hash(class.as_bytes()).to_hex()[..12])),
            labels: Some(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
            owner_references: owner.map(|owner| vec![owner.clone()]),
            ..ObjectMeta::default()
        },
        storage_class_name: class.to_owned(),
        node_topology: Some(LabelSelector {
            match_labels: Some(BTreeMap::from([(POOL_TOPOLOGY_KEY.to_owned(), guid.to_owned())])),
            ..LabelSelector::default()
        }),
        capacity: Some(Quantity(bytes.to_string())),
        maximum_volume_size: None,
    }
}

/// Whether an object says what is so, or nearly.
fn says(present: &CSIStorageCapacity, bytes: i64, of: i64) -> bool {
    let said = present.capacity.as_ref().map(|capacity| match capacity.0.as_str() {
        "0" => Ok(0),
        other => quantity::bytes(other),
    });
    matches!(said, Some(Ok(said)) if !room::is_noticeable(said, bytes, of))
}

/// Keeps the objects up to date as long as this process leads.
pub(super) async fn run(hub: Arc<Hub>) {
    let namespace = portolan_runtime::namespace();
    let capacities: Api<CSIStorageCapacity> = Api::namespaced(hub.client.clone(), &namespace);
    let ours = watcher::Config::default().labels(&format!("{DRIVER_LABEL}={DRIVER},{MANAGER_LABEL}={MANAGER}"));
    let (classes, class_changes) = follow(hub.classes.clone(), watcher::Config::default());
    let (nodes, node_changes) = follow(hub.storage_nodes.clone(), watcher::Config::default());
    let (present, own_changes) = follow(capacities.clone(), ours);
    let mut changes = stream::select_all([class_changes.boxed(), node_changes.boxed(), own_changes.boxed()]);
    let (mut owner, mut labelled) = (None, BTreeMap::new());
    loop {
        // What is not known yet must not be taken for gone: all three lists have come once.
        let ready = async {
            let (a, b, c) =
                tokio::join!(classes.wait_until_ready(), nodes.wait_until_ready(), present.wait_until_ready());
            a.is_ok() && b.is_ok() && c.is_ok()
        };
        let drive = async { while changes.next().await.is_some() {} };
        tokio::select! {
            ready = ready => if !ready { return },
            () = drive => return,
        }
        if owner.is_none() {
            owner = deployment(&hub, &namespace).await;
        }
        let mut failed = false;
        for change in plan(&classes.state(), &nodes.state(), &present.state(), owner.as_ref()) {
            failed |= logged(apply(&capacities, change).await);
        }
        for node in nodes.state() {
            failed |= logged(relabel(&hub, &node, &mut labelled).await);
        }
        let pause = if failed { GATHER * 5 } else { RESYNC };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            Some(()) = changes.next() => {}
        }
        let gather = async { while changes.next().await.is_some() {} };
        let _ = tokio::time::timeout(GATHER, gather).await;
    }
}

/// The objects of a kind as they are now, and when they change.
pub(super) fn follow<K>(api: Api<K>, config: watcher::Config) -> (Store<K>, impl Stream<Item = ()> + Send)
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let changes = reflector(writer, watcher(api, config)).default_backoff().touched_objects();
    let kind = K::kind(&()).into_owned();
    let changes = changes.map(move |change| {
        if let Err(error) = change {
            tracing::debug!(kind, %error, "watching");
        }
    });
    (store, changes)
}

/// The owner of the objects. Without one they would outlive us, which is better than none at all.
async fn deployment(hub: &Hub, namespace: &str) -> Option<OwnerReference> {
    let deployments: Api<Deployment> = Api::namespaced(hub.client.clone(), namespace);
    match deployments.get_opt(MANAGER).await {
        Ok(found) => found?.owner_ref(&()),
        Err(error) => {
            tracing::warn!(%error, "can't read our own Deployment");
            None
        }
    }
}

/// Whether it failed, and is to be tried again.
fn logged(done: kube::Result<()>) -> bool {
    if let Err(error) = &done {
        tracing::warn!(%error, "can't say what room there is");
    }
    done.is_err()
}

async fn apply(capacities: &Api<CSIStorageCapacity>, change: Change) -> kube::Result<()> {
    let done = match &change {
        Change::Create(object) => capacities.create(&PostParams::default(), object).await.map(drop),
        Change::Replace(object) => {
            capacities.replace(&object.name_any(), &PostParams::default(), object).await.map(drop)
        }
        Change::Delete(name) => unless_gone(capacities.delete(name, &DeleteParams::default()).await).map(drop),
    };
    match done {
        // Ours, which the watch has not shown yet: it will.
        Err(kube::Error::Api(status)) if status.is_already_exists() || status.is_conflict() => Ok(()),
        done => done,
    }
}

/// Corrects the label of a node that has got another pool. The kubelet sets it once, and then refuses a driver that says otherwise.
/// Nodes that have been looked at with the pool that they have are in `labelled`.
async fn relabel(hub: &Hub, node: &StorageNode, labelled: &mut BTreeMap<String, String>) -> kube::Result<()> {
    let name = node.name_any();
    let Some(guid) = node.status.as_ref().and_then(|status| status.pool_guid.as_ref()) else { return Ok(()) };
    if labelled.get(&name) == Some(guid) {
        return Ok(());
    }
    let found: Option<Node> = hub.nodes.get_opt(&name).await?;
    let label = found.as_ref().and_then(|found| found.labels().get(POOL_TOPOLOGY_KEY));
    if label.is_some_and(|label| label != guid) {
        let patch = Patch::Merge(json!({ "metadata": { "labels": { POOL_TOPOLOGY_KEY: guid } } }));
        unless_gone(hub.nodes.patch(&name, &PatchParams::default(), &patch).await)?;
        tracing::info!(node = name, pool = guid, "the node has another pool: its label says so");
    }
    labelled.insert(name, guid.clone());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: i64 = 1 << 30;

    fn class(name: &str, provisioner: &str, parameters: serde_json::Value) -> Arc<StorageClass> {
        let class = json!({ "metadata": { "name": name }, "provisioner": provisioner, "parameters": parameters });
        Arc::new(serde_json::from_value(class).unwrap())
    }

    fn node(name: &str, guid: &str, ready: &str, available: i64, capabilities: &[&str]) -> Arc<StorageNode> {
        let status = json!({
            "poolGuid": guid, "availableBytes": available, "capacityBytes": 100 * GIB, "capabilities": capabilities,
            "conditions": [{ "type": "Ready", "status": ready, "reason": "", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z" }],
        });
        let mut node = StorageNode::new(name, Default::default());
        node.status = serde_json::from_value(status).unwrap();
        Arc::new(node)
    }

    /// What the objects are after the changes.
    fn after(present: &[Arc<CSIStorageCapacity>], changes: Vec<Change>) -> Vec<Arc<CSIStorageCapacity>> {
        let mut all: BTreeMap<String, _> = present.iter().map(|object| (object.name_any(), object.clone())).collect();
        for change in changes {
            match change {
                Change::Create(object) | Change::Replace(object) => {
                    _ = all.insert(object.name_any(), Arc::new(object));
                }
                Change::Delete(name) => _ = all.remove(&name),
            }
        }
        all.into_values().collect()
    }

    /// Class, pool and bytes of each.
    fn said(objects: &[Arc<CSIStorageCapacity>]) -> Vec<(String, String, String)> {
        let said = |object: &Arc<CSIStorageCapacity>| {
            let labels = object.node_topology.as_ref().unwrap().match_labels.clone().unwrap();
            assert_eq!(labels.keys().collect::<Vec<_>>(), [POOL_TOPOLOGY_KEY], "by pool, and by nothing else");
            assert_eq!(object.maximum_volume_size, None);
            (object.storage_class_name.clone(), labels[POOL_TOPOLOGY_KEY].clone(), object.capacity.clone().unwrap().0)
        };
        let mut all: Vec<_> = objects.iter().map(said).collect();
        all.sort();
        all
    }

    fn of(class: &str, guid: &str, bytes: i64) -> (String, String, String) {
        (class.into(), guid.into(), bytes.to_string())
    }

    #[test]
    fn each_class_and_pool_has_one() {
        let classes = [
            class("fast", DRIVER, json!({})),
            class("zvols", DRIVER, json!({ FS_TYPE: "ext4" })),
            class("sealed", DRIVER, json!({ "encryption": "aes-256-gcm" })),
            class("other", "example.com/other", json!({})),
        ];
        let openzfs = ["zvol", "encryption", "raw-send"];
        let nodes = [node("a", "1", "True", 50 * GIB, &openzfs), node("b", "2", "True", 40 * GIB, &[])];
        let owner = OwnerReference { name: MANAGER.into(), ..OwnerReference::default() };
        let made = after(&[], plan(&classes, &nodes, &[], Some(&owner)));
        let wanted = [
            of("fast", "1", 50 * GIB),
            of("fast", "2", 40 * GIB),
            of("sealed", "1", 50 * GIB),
            of("sealed", "2", 0),
            of("zvols", "1", 50 * GIB),
            of("zvols", "2", 0),
        ];
        assert_eq!(said(&made), wanted);
        assert!(made.iter().all(|object| object.owner_references() == std::slice::from_ref(&owner)));
        assert!(made.iter().all(|object| object.labels()[MANAGER_LABEL] == MANAGER));
        assert_eq!(plan(&classes, &nodes, &made, Some(&owner)), [], "nothing more to do");
    }

    #[test]
    fn they_follow_pools_and_classes() {
        let fast = [class("fast", DRIVER, json!({}))];
        let made = after(&[], plan(&fast, &[node("a", "1", "True", 50 * GIB, &[])], &[], None));
        assert_eq!(plan(&fast, &[node("a", "1", "True", 50 * GIB - GIB / 4, &[])], &made, None), [], "too little");
        for (nodes, wanted) in [
            (vec![node("a", "1", "True", 49 * GIB, &[])], vec![of("fast", "1", 49 * GIB)]),
            (vec![node("a", "1", "False", 50 * GIB, &[])], vec![of("fast", "1", 0)]),
            // Another pool in its place.
            (vec![node("a", "7", "True", 50 * GIB, &[])], vec![of("fast", "7", 50 * GIB)]),
            // The pool has gone to another node.
            (
                vec![node("a", "1", "False", 0, &[]), node("b", "1", "True", 20 * GIB, &[])],
                vec![of("fast", "1", 20 * GIB)],
            ),
            (vec![], vec![]),
        ] {
            assert_eq!(said(&after(&made, plan(&fast, &nodes, &made, None))), wanted);
        }
        assert_eq!(plan(&[], &[node("a", "1", "True", GIB, &[])], &made, None), [Change::Delete(made[0].name_any())]);
    }

    #[test]
    fn a_change_is_of_what_was_read() {
        let fast = [class("fast", DRIVER, json!({}))];
        let mut made = after(&[], plan(&fast, &[node("a", "1", "True", 50 * GIB, &[])], &[], None));
        Arc::make_mut(&mut made[0]).metadata.resource_version = Some("7".into());
        let changes = plan(&fast, &[node("a", "1", "True", 5 * GIB, &[])], &made, None);
        assert!(matches!(&changes[..], [Change::Replace(object)] if object.resource_version().as_deref() == Some("7")));
    }
}
