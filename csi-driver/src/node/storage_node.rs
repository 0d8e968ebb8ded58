//! What this node says of its pool: its StorageNode, and whether this process is ready.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node as KubeNode;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use portolan_crds::{StorageNode, StorageNodeSpec, StorageNodeStatus, condition};
use portolan_runtime::conditions;
use portolan_runtime::http::Health;
use portolan_zfs::{PoolHealth, Probe, Space, Zfs, ZfsError};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::Node;
use crate::quantity::Human;

/// How often the pool is looked at.
const EVERY: Duration = Duration::from_secs(10);
/// Who writes, for server-side apply.
const FIELD_MANAGER: &str = "portolan-storage";
/// Condition: this node can prove to others who it is.
const CERTIFICATE: &str = "CertificateReady";

/// What was found on this node.
struct Found {
    pool: Result<(PoolHealth, Space), ZfsError>,
    probe: Result<Probe, ZfsError>,
    certified: bool,
}

/// Keeps the StorageNode up to date until `shutdown`. The pool's absence is a condition, not an end.
pub(super) async fn report<Z: Zfs>(
    node: Arc<Node<Z>>,
    client: Client,
    address: SocketAddr,
    health: Health,
    shutdown: CancellationToken,
) {
    let mut identity = node.identity.clone();
    let work = async {
        loop {
            let found = find(&node).await;
            match write(&node, &client, address, &found).await {
                Ok(()) => health.set_ready(true),
                Err(error) => tracing::warn!(%error, "could not write the StorageNode"),
            }
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                changed = identity.changed() => if changed.is_err() { tokio::time::sleep(EVERY).await },
            }
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = work => {}
    }
}

async fn find<Z: Zfs>(node: &Node<Z>) -> Found {
    let pool = async { Ok((node.zfs.pool_health(&node.pool).await?, node.zfs.space(&node.pool).await?)) };
    let (pool, probe) = tokio::join!(pool, node.zfs.probe());
    Found { pool, probe, certified: node.identity.borrow().is_some() }
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
    let was = present.status.unwrap_or_default();
    let status = describe(node.pool.as_str(), &node.name, address, found, was.clone());
    if status != was {
        let patch = Patch::Apply(json!({
            "apiVersion": "portolan.dev/v1alpha1",
            "kind": "StorageNode",
            "status": status,
        }));
        api.patch_status(&node.name, &PatchParams::apply(FIELD_MANAGER).force(), &patch).await?;
    }
    Ok(())
}

fn describe(pool: &str, node: &str, address: SocketAddr, found: &Found, was: StorageNodeStatus) -> StorageNodeStatus {
    let mut conditions = was.conditions;
    let (status, reason, message) = match &found.pool {
        Ok((health, _)) if health.is_usable() => (condition::TRUE, "PoolUsable", format!("pool {pool} is {health}")),
        Ok((health, _)) => {
            let message = format!("pool {pool} is {health}: see `zpool status -x` on node {node}");
            (condition::FALSE, "PoolNotUsable", message)
        }
        Err(error) => (condition::FALSE, "PoolMissing", missing(pool, node, error)),
    };
    conditions::set(&mut conditions, condition::READY, status, reason, &message, None);
    match found.certified {
        true => conditions::set(&mut conditions, CERTIFICATE, condition::TRUE, "Signed", "", None),
        false => {
            let message =
                "the operator has not signed this node's certificate yet: volumes can be used here but not moved";
            conditions::set(&mut conditions, CERTIFICATE, condition::FALSE, "Waiting", message, None)
        }
    };
    let space = found.pool.as_ref().ok().map(|(_, space)| *space);
    let bytes = |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX);
    StorageNodeStatus {
        transfer_address: Some(address.to_string()),
        health: Some(found.pool.as_ref().map_or("MISSING".to_owned(), |(health, _)| health.to_string())),
        capacity_bytes: space.map(|space| bytes(space.capacity())),
        capacity: space.map(|space| Human(bytes(space.capacity())).to_string()),
        available_bytes: space.map(|space| bytes(space.available)),
        available: space.map(|space| Human(bytes(space.available)).to_string()),
        // What doesn't answer for once has not changed.
        zfs_version: found.probe.as_ref().map_or(was.zfs_version, |probe| Some(probe.to_string())),
        capabilities: match &found.probe {
            Ok(probe) => probe.capabilities.names().into_iter().map(str::to_owned).collect(),
            Err(_) => was.capabilities,
        },
        conditions,
    }
}

fn missing(pool: &str, node: &str, error: &ZfsError) -> String {
    let make = match pool.split_once('/') {
        None => format!("`zpool create {pool} <device>`"),
        Some((root, _)) => format!("`zpool create {root} <device>` and `zfs create -p -o canmount=off {pool}`"),
    };
    format!("node {node} has no {pool} that can be used ({error}). To give it one, run there: {make}")
}
