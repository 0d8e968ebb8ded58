//! What is so now, of all that a migration has to do with.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::VolumeAttachment;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use portolan_crds::{DRIVER, MigratingVolume, PortableVolume, StorageNode, VolumeMigration};

use super::super::Hub;

/// Pods that have not ended.
const RUNNING: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// A claim, and what it is bound to.
#[derive(Clone, Debug)]
pub(super) enum Claim {
    /// There is none of that name.
    Missing,
    /// It has no volume yet.
    Unbound,
    /// Its volume is another driver's, or none's.
    Foreign(String),
    /// Its volume.
    Ours(Box<PortableVolume>),
}

/// What a migration that nobody has looked at yet is about.
#[derive(Clone, Debug, Default)]
pub(super) struct Subject {
    /// The claims that were named: that of the spec, or those of its pod; and those of all pods that use one of ours.
    pub(super) claims: BTreeMap<String, Claim>,
    /// The pods that use one of ours.
    pub(super) pods: Vec<Pod>,
    /// Whether the pod that is named exists; true if none is.
    pub(super) pod_found: bool,
    /// The other migrations of the namespace that have not ended.
    pub(super) others: Vec<VolumeMigration>,
}

/// What there is of a node.
#[derive(Clone, Debug, Default)]
pub(super) struct Target {
    pub(super) node: Option<Node>,
    pub(super) pool: Option<StorageNode>,
}

/// What is so of a migration that is under way.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Its volumes by name; one that is gone is not there.
    pub(super) volumes: BTreeMap<String, PortableVolume>,
    /// The pods that use its claims and have not ended.
    pub(super) pods: Vec<Pod>,
    /// The nodes that a volume is attached to, or is to be.
    pub(super) attached: BTreeMap<String, BTreeSet<String>>,
    pub(super) target: Target,
}

/// The claims that a pod mounts.
pub(super) fn claims_of(pod: &Pod) -> BTreeSet<String> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let name = pod.name_any();
    volumes
        .filter_map(|volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
            (Some(claim), _) => Some(claim.claim_name.clone()),
            (None, Some(_)) => Some(format!("{name}-{}", volume.name)),
            (None, None) => None,
        })
        .collect()
}

/// All that moves together with what is asked for: the pods that use the volume, and their other volumes of ours.
pub(super) async fn subject(hub: &Hub, migration: &VolumeMigration) -> kube::Result<Subject> {
    let namespace = migration.namespace().unwrap_or_default();
    let pods = running(hub, &namespace).await?;
    let mut found = Subject { pod_found: true, ..Subject::default() };
    let mut open: BTreeSet<String> = migration.spec.claim.iter().cloned().collect();
    if let Some(name) = &migration.spec.pod {
        let pod = pods.iter().find(|pod| pod.name_any() == *name);
        found.pod_found = pod.is_some();
        open.extend(pod.map(claims_of).unwrap_or_default());
    }
    while let Some(name) = open.pop_first() {
        if found.claims.contains_key(&name) {
            continue;
        }
        let claim = claim(hub, &namespace, &name).await?;
        if let Claim::Ours(volume) = &claim {
            // What is only read needs no move, nor do others who read it: they count only where it is to have another owner.
            let shared = volume.spec.is_shared();
            if shared && migration.spec.claim.as_ref() != Some(&name) {
                found.claims.insert(name, claim);
                continue;
            }
            for pod in pods.iter().filter(|pod| claims_of(pod).contains(&name)) {
                if !found.pods.iter().any(|known| known.uid() == pod.uid()) {
                    if !shared {
                        open.extend(claims_of(pod));
                    }
                    found.pods.push(pod.clone());
                }
            }
        }
        found.claims.insert(name, claim);
    }
    let all = Api::<VolumeMigration>::namespaced(hub.client.clone(), &namespace).list(&ListParams::default()).await?;
    found.others = all.items.into_iter().filter(|other| other.uid() != migration.uid()).collect();
    Ok(found)
}

async fn claim(hub: &Hub, namespace: &str, name: &str) -> kube::Result<Claim> {
    let Some(claim) = hub.claims(namespace).get_opt(name).await? else { return Ok(Claim::Missing) };
    let bound = |claim: PersistentVolumeClaim| claim.spec?.volume_name.filter(|name| !name.is_empty());
    let Some(pv) = bound(claim) else { return Ok(Claim::Unbound) };
    let Some(pv) = hub.pvs.get_opt(&pv).await? else { return Ok(Claim::Unbound) };
    let Some(csi) = pv.spec.and_then(|spec| spec.csi) else { return Ok(Claim::Foreign("no CSI driver".to_owned())) };
    if csi.driver != DRIVER {
        return Ok(Claim::Foreign(csi.driver));
    }
    let volume = hub.volumes.get_opt(&csi.volume_handle).await?;
    Ok(volume.map_or(Claim::Unbound, |volume| Claim::Ours(Box::new(volume))))
}

async fn running(hub: &Hub, namespace: &str) -> kube::Result<Vec<Pod>> {
    Ok(hub.pods(namespace).list(&ListParams::default().fields(RUNNING)).await?.items)
}

/// What there is of the node `name`.
pub(super) async fn target(hub: &Hub, name: &str) -> kube::Result<Target> {
    Ok(Target { node: hub.nodes.get_opt(name).await?, pool: hub.storage_nodes.get_opt(name).await? })
}

/// What is so of a migration that has begun; the attachments only where they matter: that is a list of all of the cluster.
pub(super) async fn seen(
    hub: &Hub,
    migration: &VolumeMigration,
    volumes: &[MigratingVolume],
    attachments: bool,
) -> kube::Result<Seen> {
    let mut seen = Seen { target: target(hub, &migration.spec.node).await?, ..Seen::default() };
    for entry in volumes {
        if let Some(volume) = hub.volumes.get_opt(&entry.volume).await? {
            seen.volumes.insert(entry.volume.clone(), volume);
        }
    }
    seen.pods = running(hub, &migration.namespace().unwrap_or_default()).await?;
    seen.pods.retain(|pod| claims_of(pod).iter().any(|claim| volumes.iter().any(|entry| entry.claim == *claim)));
    if !attachments {
        return Ok(seen);
    }
    for attachment in hub.attachments.list(&ListParams::default()).await?.items {
        if let Some(volume) = of_volume(&attachment, volumes) {
            seen.attached.entry(volume).or_default().insert(attachment.spec.node_name);
        }
    }
    Ok(seen)
}

/// The volume of these that an attachment is of. A PersistentVolume that was made by hand may have another name than its volume: the
/// agents keep such a volume safe, and all that is lost is what is known here of its use.
fn of_volume(attachment: &VolumeAttachment, volumes: &[MigratingVolume]) -> Option<String> {
    let pv = attachment.spec.source.persistent_volume_name.as_ref()?;
    let ours = attachment.spec.attacher == DRIVER && attachment.metadata.deletion_timestamp.is_none();
    volumes.iter().find(|entry| ours && entry.volume == *pv).map(|entry| entry.volume.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pods_claims_are_named_or_its_own() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": { "name": "db-0" },
            "spec": { "containers": [], "volumes": [
                { "name": "data", "persistentVolumeClaim": { "claimName": "data-db-0" } },
                { "name": "scratch", "ephemeral": { "volumeClaimTemplate": { "spec": {} } } },
                { "name": "tmp", "emptyDir": {} },
            ] },
        }))
        .unwrap();
        assert_eq!(Vec::from_iter(claims_of(&pod)), ["data-db-0", "db-0-scratch"]);
    }
}
