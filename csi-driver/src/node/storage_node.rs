//! What this node says of its pool: its StorageNode, and whether this process is ready.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node as KubeNode, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, OwnerReference};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource};
use portolan_crds::{Orphans, StorageNode, StorageNodeSpec, StorageNodeStatus, condition};
use portolan_runtime::conditions;
use portolan_runtime::http::Health;
use portolan_zfs::{DatasetName, ErrorKind, PoolHealth, Probe, Zfs, ZfsError};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::Node;
use super::pool::{self, Pool, bytes};
use crate::quantity::Human;

/// How often the pool is looked at.
const EVERY: Duration = Duration::from_secs(10);
/// How long a look waits for the pool: several commands, each of which has a deadline of its own.
const LOOK_WITHIN: Duration = Duration::from_secs(150);
/// The longest pause after a look that the pool did not answer: each may leave a process that can't be killed.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Who writes, for server-side apply.
const FIELD_MANAGER: &str = "portolan-storage";
/// Condition: this node can prove to others who it is.
const CERTIFICATE: &str = "CertificateReady";

/// What was found on this node.
struct Found {
    pool: Result<Pool, ZfsError>,
    probe: Option<Probe>,
    certified: bool,
    volumes: usize,
    orphans: Option<Orphans>,
}

/// Keeps the StorageNode up to date until `shutdown`. The pool's absence is a condition, not an end; nor does it keep this process from
/// being ready: what it has to say of the pool is said.
pub(super) async fn report<Z: Zfs>(
    node: Arc<Node<Z>>,
    client: Client,
    address: SocketAddr,
    health: Health,
    shutdown: CancellationToken,
) {
    let mut identity = node.identity.clone();
    let work = async {
        let mut pause = EVERY;
        loop {
            let found = find(&node).await;
            let hangs = found.pool.as_ref().is_err_and(|error| error.kind == ErrorKind::Timeout);
            pause = if hangs { (pause * 2).min(LONGEST_PAUSE) } else { EVERY };
            count(&node, &found);
            match write(&node, &client, address, &found).await {
                Ok(()) => health.set_ready(true),
                Err(error) => {
                    tracing::warn!(%error, "could not write the StorageNode");
                    pause = EVERY;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                changed = identity.changed() => if changed.is_err() { tokio::time::sleep(pause).await },
            }
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = work => {}
    }
}

async fn find<Z: Zfs>(node: &Node<Z>) -> Found {
    let probe = tokio::time::timeout(LOOK_WITHIN, node.zfs.probe());
    let (pool, probe) = tokio::join!(pool::look(node.zfs.as_ref(), &node.pool, LOOK_WITHIN), probe);
    let owned = |owner: Option<&String>| owner == Some(&node.name);
    let volumes = node.seen.state();
    Found {
        pool,
        probe: probe.ok().and_then(Result::ok),
        certified: node.identity.borrow().is_some(),
        volumes: volumes.iter().filter(|volume| owned(volume.status.as_ref().and_then(|s| s.owner.as_ref()))).count(),
        orphans: node.orphans.lock().unwrap_or_else(PoisonError::into_inner).clone(),
    }
}

fn count<Z>(node: &Node<Z>, found: &Found) {
    let metrics = &node.metrics;
    let pool = found.pool.as_ref().ok();
    metrics.pool_healthy.set(pool.is_some_and(|pool| pool.health == PoolHealth::Online).into());
    let space = pool.and_then(|pool| pool.space);
    metrics.pool_available.set(space.map_or(0, |space| bytes(space.available)));
    // What can't be told now has not changed.
    if let Some(space) = space {
        metrics.pool_capacity.set(bytes(space.capacity()));
    }
    if let Some(orphans) = &found.orphans {
        metrics.orphans.set(orphans.count);
        metrics.orphan_bytes.set(orphans.bytes);
    }
}

async fn write<Z: Zfs>(node: &Node<Z>, client: &Client, address: SocketAddr, found: &Found) -> kube::Result<()> {
    let api = &node.storage_nodes;
    let spec = StorageNodeSpec { pool: node.pool.to_string() };
    let present = match api.get_opt(&node.name).await? {
        Some(present) if present.spec == spec => present,
        Some(_) => {
            let patch = Patch::Merge(json!({ "spec": spec }));
            api.patch(&node.name, &PatchParams::default(), &patch).await?
        }
        None => {
            // Collected with its Node.
            let owner = Api::<KubeNode>::all(client.clone()).get(&node.name).await?;
            let metadata = ObjectMeta {
                name: Some(node.name.clone()),
                owner_references: Some(vec![OwnerReference {
                    api_version: "v1".to_owned(),
                    kind: "Node".to_owned(),
                    name: node.name.clone(),
                    uid: owner.metadata.uid.unwrap_or_default(),
                    ..OwnerReference::default()
                }]),
                ..ObjectMeta::default()
            };
            api.create(&PostParams::default(), &StorageNode { metadata, spec, status: None }).await?
        }
    };
    let was = present.status.clone().unwrap_or_default();
    let status = describe(&node.pool, &node.name, address, found, was.clone());
    if status != was {
        let patch = Patch::Apply(json!({
            "apiVersion": "portolan.dev/v1alpha1",
            "kind": "StorageNode",
            "status": status,
        }));
        api.patch_status(&node.name, &PatchParams::apply(FIELD_MANAGER).force(), &patch).await?;
        tell(node, &present, &was.conditions, &status.conditions).await;
    }
    Ok(())
}

/// Says what has changed where a person looks: at the StorageNode and at the Node.
async fn tell<Z>(node: &Node<Z>, object: &StorageNode, was: &[Condition], now: &[Condition]) {
    let kubelet_like = ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Node".to_owned()),
        name: Some(node.name.clone()),
        // As the kubelet writes its own.
        uid: Some(node.name.clone()),
        ..ObjectReference::default()
    };
    for (condition, good) in pool::news(was, now) {
        tracing::warn!(condition = condition.type_, status = condition.status, message = condition.message, "the pool");
        let reason =
            format!("{}{}", if condition.type_ == condition::SPACE_LOW { "Space" } else { "Pool" }, condition.reason);
        for about in [&object.object_ref(&()), &kubelet_like] {
            match good {
                true => node.events.normal(about, &reason, "Check", &condition.message).await,
                false => node.events.warning(about, &reason, "Check", &condition.message).await,
            }
        }
    }
    let orphans = |all: &[Condition]| conditions::find(all, condition::NO_ORPHANS).cloned();
    let left = orphans(now).filter(|found| found.status == condition::FALSE);
    if let Some(found) = left.filter(|found| orphans(was).is_none_or(|was| was.message != found.message)) {
        node.events.warning(&object.object_ref(&()), &found.reason, "Check", &found.message).await;
    }
}

fn describe(
    pool: &DatasetName,
    node: &str,
    address: SocketAddr,
    found: &Found,
    was: StorageNodeStatus,
) -> StorageNodeStatus {
    let mut conditions = was.conditions;
    pool::describe(&mut conditions, pool, node, &found.pool);
    match found.certified {
        true => conditions::set(&mut conditions, CERTIFICATE, condition::TRUE, "Signed", "", None),
        false => {
            let message =
                "the operator has not signed this node's certificate yet: volumes can be used here but not moved";
            conditions::set(&mut conditions, CERTIFICATE, condition::FALSE, "Waiting", message, None)
        }
    };
    // Those of an earlier process stay until this one has looked.
    let orphans = found.orphans.clone().or(was.orphans);
    if let Some(orphans) = &orphans {
        no_orphans(&mut conditions, orphans);
    }
    let answers = found.pool.as_ref().ok();
    let space = answers.and_then(|pool| pool.space);
    StorageNodeStatus {
        transfer_address: Some(address.to_string()),
        // What doesn't answer for once is the same as it was.
        pool_guid: answers.and_then(|pool| pool.guid).map(|guid| guid.to_string()).or(was.pool_guid),
        volumes: i64::try_from(found.volumes).ok(),
        health: Some(found.pool.as_ref().map_or("MISSING".to_owned(), |pool| pool.health.to_string())),
        capacity_bytes: space.map(|space| bytes(space.capacity())),
        capacity: space.map(|space| Human(bytes(space.capacity())).to_string()),
        available_bytes: space.map(|space| bytes(space.available)),
        available: space.map(|space| Human(bytes(space.available)).to_string()),
        zfs_version: found.probe.as_ref().map(ToString::to_string).or(was.zfs_version),
        capabilities: match &found.probe {
            Some(probe) => probe.capabilities.names().into_iter().map(str::to_owned).collect(),
            None => was.capabilities,
        },
        orphans,
        conditions,
    }
}

fn no_orphans(conditions: &mut Vec<Condition>, orphans: &Orphans) {
    let (status, reason, message) = match orphans.items.first() {
        None => (condition::TRUE, "Clean", "each dataset, snapshot and mount of ours has its object".to_owned()),
        Some(first) => {
            let (count, bytes) = (orphans.count, Human(orphans.bytes));
            let message = format!("{count} left over, {bytes}: {}; see status.orphans", first.message);
            (condition::FALSE, "LeftOver", message)
        }
    };
    conditions::set(conditions, condition::NO_ORPHANS, status, reason, &message, None);
}
