//! PersistentVolumeClaims that want a volume: check what they ask for, make a PortableVolume, then its PersistentVolume.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, ObjectReference,
    PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimSpec, PersistentVolumeSpec, SecretReference,
    VolumeNodeAffinity,
};
use k8s_openapi::api::storage::v1::{StorageClass, VolumeAttributesClass};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{Controller, watcher};
use kube::{Api, Resource, ResourceExt};
use portolan_crds::{
    DRIVER, Filesystem, IMPORT_ANNOTATION, PV_FINALIZER, PortableVolume, PortableVolumeSpec, TOPOLOGY_KEY, VolumePhase,
    condition,
};
use portolan_runtime::conditions;
use serde_json::json;

use super::encryption;
use super::source::{self, Named, Resolved, Source};
use super::volumes::{self, name_of};
use super::wish::{self, Needs, Wish, no_pool};
use super::{Hub, PROVISIONED_BY, RESYNC, exhaust, retry};
use crate::parameters::{self, Import, Refusal};
use crate::quantity::{self, Human};
use crate::volume;

/// Annotation of a claim: the node that the scheduler has chosen for its first pod.
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// Annotations of a claim: who shall provision it. Set by Kubernetes when it is time; the second is the older name.
const PROVISIONERS: [&str; 2] =
    ["volume.kubernetes.io/storage-provisioner", "volume.beta.kubernetes.io/storage-provisioner"];
const WAITING: std::time::Duration = std::time::Duration::from_secs(15);
/// How soon a claim is looked at again whose source is not there yet.
const SOURCE: std::time::Duration = std::time::Duration::from_secs(1);

pub(super) async fn run(hub: Arc<Hub>) {
    let claims: Api<PersistentVolumeClaim> = Api::all(hub.client.clone());
    let stream = Controller::new(claims, watcher::Config::default())
        .watches(hub.volumes.clone(), watcher::Config::default(), |volume: PortableVolume| {
            let claim = volume.spec.claim.split_once('/');
            claim.map(|(namespace, name)| ObjectRef::new(name).within(namespace))
        })
        .run(reconcile, retry, hub.clone());
    exhaust("claims", stream).await;
}

/// What a claim asks for, checked; its source is not.
fn check(
    claim: &PersistentVolumeClaim,
    spec: &PersistentVolumeClaimSpec,
    class: &StorageClass,
    attributes: Option<&VolumeAttributesClass>,
) -> Result<Wish, Refusal> {
    let mode = parameters::volume_mode(spec.volume_mode.as_deref())?;
    parameters::check_access_modes(spec.access_modes.as_deref().unwrap_or_default())?;
    let mut asked = parameters::parse(class.parameters.as_ref().unwrap_or(&BTreeMap::new()), mode)?;
    if let Some(given) = attributes.and_then(|attributes| attributes.parameters.as_ref()) {
        parameters::change(&mut asked.parameters, given)?;
    }
    let secret = match asked.encryption {
        Some(_) => {
            let pv = name_of(claim).unwrap_or_default();
            Some(encryption::secret(class.parameters.as_ref().unwrap_or(&BTreeMap::new()), claim, &pv)?)
        }
        None => None,
    };
    let import = claim.annotations().get(IMPORT_ANNOTATION).map(|given| parameters::import(given)).transpose()?;
    if import.is_some() && (spec.data_source.is_some() || spec.data_source_ref.is_some()) {
        return Err(Refusal::ImportAndSource);
    }
    if import.is_some() && secret.is_some() {
        return Err(Refusal::ImportAndEncryption);
    }
    let requests = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref());
    let size = requests.and_then(|requests| requests.get("storage")).map(|size| size.0.clone()).unwrap_or_default();
    let size_bytes = quantity::bytes(&size)?;
    parameters::check_size(asked.filesystem, size_bytes)?;
    Ok(Wish {
        size,
        size_bytes,
        mode,
        read_only: parameters::only_read(spec.access_modes.as_deref().unwrap_or_default()),
        asked,
        source: None,
        secret,
        import,
        claim: format!("{}/{}", claim.namespace().unwrap_or_default(), claim.name_any()),
        claim_uid: claim.uid().unwrap_or_default(),
    })
}

async fn reconcile(claim: Arc<PersistentVolumeClaim>, hub: Arc<Hub>) -> kube::Result<Action> {
    let Some(spec) = &claim.spec else { return Ok(Action::await_change()) };
    let ours = PROVISIONERS.iter().any(|key| claim.annotations().get(*key).is_some_and(|who| who == DRIVER));
    let bound = spec.volume_name.as_ref().is_some_and(|name| !name.is_empty());
    if !ours || bound || claim.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let Some(class) = spec.storage_class_name.as_deref().filter(|name| !name.is_empty()) else {
        return Ok(Action::await_change());
    };
    let Some(class) = hub.classes.get_opt(class).await? else { return Ok(Action::requeue(WAITING)) };
    if class.provisioner != DRIVER {
        return Ok(Action::await_change());
    }
    let attributes = match spec.volume_attributes_class_name.as_deref().filter(|name| !name.is_empty()) {
        None => None,
        Some(name) => {
            let Some(found) = hub.attribute_classes.get_opt(name).await? else {
                failed(&hub, &claim, &format!("there is no VolumeAttributesClass {name}")).await;
                return Ok(Action::requeue(WAITING));
            };
            Some(found)
        }
    };
    let wish = match check(&claim, spec, &class, attributes.as_ref()) {
        Ok(wish) => source::named(&hub, &claim, spec).await?.map(|named| (wish, named)),
        Err(refusal) => Err(refusal),
    };
    match wish {
        Ok((wish, Named::Nothing)) => provision(&claim, &class, wish, None, &hub).await,
        Ok((wish, Named::Ours(source))) => provision(&claim, &class, wish, Some(source), &hub).await,
        Ok((_, Named::Foreign)) => Ok(Action::await_change()),
        Ok((_, Named::Waiting(why))) => {
            tracing::debug!(claim = claim.name_any(), why, "a claim's source is not there yet");
            Ok(Action::requeue(SOURCE))
        }
        Err(refusal) => {
            let message = format!("can't provision with StorageClass {}: {refusal}", class.name_any());
            failed(&hub, &claim, &message).await;
            Ok(Action::requeue(RESYNC))
        }
    }
}

async fn failed(hub: &Hub, claim: &PersistentVolumeClaim, message: &str) {
    tracing::warn!(claim = format!("{}/{}", claim.namespace().unwrap_or_default(), claim.name_any()), message);
    hub.events.warning(&claim.object_ref(&()), "ProvisioningFailed", "Provision", message).await;
}

async fn provision(
    claim: &PersistentVolumeClaim,
    class: &StorageClass,
    mut wish: Wish,
    source: Option<Source>,
    hub: &Hub,
) -> kube::Result<Action> {
    let Some(name) = name_of(claim) else { return Ok(Action::await_change()) };
    let present = hub.volumes.get_opt(&name).await?;
    if let Some(volume) = &present {
        let status = volume::status(volume);
        if volume.metadata.deletion_timestamp.is_some() {
            return Ok(Action::requeue(WAITING));
        }
        if (status.owner.is_some() && status.phase == VolumePhase::Ready) || volume::awaits_key(volume) {
            return bind(claim, class, volume, hub).await;
        }
        let ready = conditions::find(&status.conditions, condition::READY);
        if let Some(refused) = ready.filter(|ready| ready.reason == volume::IMPORT_REFUSED) {
            failed(hub, claim, &format!("annotation {IMPORT_ANNOTATION}: {}", refused.message)).await;
        }
    }
    let needs = Needs::of(&wish.clone().spec(String::new()));
    let Some(node) = choose(claim, class, present.as_ref(), wish.import.as_ref(), needs, hub).await? else {
        return Ok(Action::requeue(WAITING));
    };
    if let Some(import) = wish.import.as_ref().filter(|import| import.node != node) {
        let message = format!(
            "annotation {IMPORT_ANNOTATION} names node {}, and the scheduler has chosen node {node} for the pod: give the pod a nodeSelector for node {} until it runs",
            import.node, import.node
        );
        failed(hub, claim, &message).await;
        give_back(claim, hub).await?;
        return Ok(Action::requeue(WAITING));
    }
    if let Some(why) = no_pool(&hub.storage_nodes, &node, needs).await? {
        failed(hub, claim, &format!("no volume can be made on the chosen node: {why}")).await;
        give_back(claim, hub).await?;
        return Ok(Action::requeue(WAITING));
    }
    match present {
        None => {
            if let Some(source) = source {
                match source::resolve(hub, &source, &name, Some(&wish.claim)).await? {
                    Resolved::Ready(_, least) if wish.size_bytes < least => {
                        let message = format!(
                            "spec.resources.requests.storage is {}: the source has {}",
                            wish.size,
                            Human(least)
                        );
                        failed(hub, claim, &message).await;
                        return Ok(Action::requeue(RESYNC));
                    }
                    Resolved::Ready(found, _) => {
                        if let Some(why) = encryption::check_source(hub, &found, wish.encryption().as_ref()).await? {
                            failed(hub, claim, &format!("spec.dataSource: {why}")).await;
                            return Ok(Action::requeue(RESYNC));
                        }
                        wish.source = Some(found);
                    }
                    Resolved::Waiting(_) => return Ok(Action::requeue(SOURCE)),
                    Resolved::Missing(why) => {
                        failed(hub, claim, &format!("spec.dataSource: {why}")).await;
                        return Ok(Action::requeue(WAITING));
                    }
                }
            }
            let message = format!("making volume {name} on node {node}");
            wish::create(hub, &name, wish.spec(node)).await?;
            tracing::info!(volume = name, message);
            hub.events.normal(&claim.object_ref(&()), "Provisioning", "Provision", &message).await;
        }
        // An import is where its dataset is.
        Some(volume) if volume.spec.placement.node != node && volume.spec.import.is_none() => {
            // Nobody owns it yet, and the scheduler has thought again.
            let patch = json!({
                "metadata": { "resourceVersion": volume.resource_version() },
                "spec": { "placement": { "node": node } },
            });
            hub.volumes.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        }
        Some(_) => {}
    }
    Ok(Action::requeue(WAITING))
}

/// The node for a new volume: the scheduler's choice, or for a class that binds at once the one with the most room.
async fn choose(
    claim: &PersistentVolumeClaim,
    class: &StorageClass,
    present: Option<&PortableVolume>,
    import: Option<&Import>,
    needs: Needs,
    hub: &Hub,
) -> kube::Result<Option<String>> {
    if let Some(node) = claim.annotations().get(SELECTED_NODE) {
        return Ok(Some(node.clone()));
    }
    if class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer") {
        return Ok(None);
    }
    if let Some(volume) = present {
        return Ok(Some(volume.spec.placement.node.clone()));
    }
    if let Some(import) = import {
        return Ok(Some(import.node.clone()));
    }
    let candidates = wish::candidates(&hub.storage_nodes).await?;
    if candidates.is_empty() {
        failed(hub, claim, "no StorageNode is ready: see `kubectl get storagenodes`").await;
    }
    // If none can, the refusal names what the roomiest lacks.
    let able = candidates.iter().find(|candidate| needs.missing(&candidate.capabilities).is_none());
    let best = able.or(candidates.first()).cloned();
    Ok(best.map(|best| best.node))
}

/// Takes the scheduler's choice back, so that it makes another.
async fn give_back(claim: &PersistentVolumeClaim, hub: &Hub) -> kube::Result<()> {
    if !claim.annotations().contains_key(SELECTED_NODE) {
        return Ok(());
    }
    let patch =
        json!({ "metadata": { "annotations": { SELECTED_NODE: null }, "resourceVersion": claim.resource_version() } });
    let claims = hub.claims(&claim.namespace().unwrap_or_default());
    claims.patch(&claim.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(())
}

async fn bind(
    claim: &PersistentVolumeClaim,
    class: &StorageClass,
    volume: &PortableVolume,
    hub: &Hub,
) -> kube::Result<Action> {
    let pv = persistent_volume(claim, class, volume, &hub.zone);
    match hub.pvs.create(&PostParams::default(), &pv).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => {}
        result => {
            result?;
            hub.provisioned.inc();
            let message = format!("made volume {} on node {}", volume.name_any(), volume.spec.placement.node);
            tracing::info!(volume = volume.name_any(), message);
            hub.events.normal(&claim.object_ref(&()), "ProvisioningSucceeded", "Provision", &message).await;
        }
    }
    volumes::mark(volume, hub).await?;
    source::release(hub, volume.spec.source.as_ref(), &volume.name_any()).await?;
    Ok(Action::requeue(RESYNC))
}

fn persistent_volume(
    claim: &PersistentVolumeClaim,
    class: &StorageClass,
    volume: &PortableVolume,
    zone: &str,
) -> PersistentVolume {
    let name = volume.name_any();
    let asked = claim.spec.as_ref();
    let secret = volume.spec.encryption.clone().and_then(|encryption| encryption.secret);
    let here = NodeSelectorRequirement {
        key: TOPOLOGY_KEY.to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![zone.to_owned()]),
    };
    let term = NodeSelectorTerm { match_expressions: Some(vec![here]), match_fields: None };
    let capacity = k8s_openapi::apimachinery::pkg::api::resource::Quantity(volume.spec.size.clone());
    PersistentVolume {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            annotations: Some(BTreeMap::from([(PROVISIONED_BY.to_owned(), DRIVER.to_owned())])),
            finalizers: Some(vec![PV_FINALIZER.to_owned()]),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeSpec {
            access_modes: asked.and_then(|spec| spec.access_modes.clone()),
            capacity: Some(BTreeMap::from([("storage".to_owned(), capacity)])),
            claim_ref: Some(ObjectReference { resource_version: None, ..claim.object_ref(&()) }),
            csi: Some(CSIPersistentVolumeSource {
                driver: DRIVER.to_owned(),
                volume_handle: name,
                fs_type: fs_type(&volume.spec).map(str::to_owned),
                node_stage_secret_ref: secret
                    .map(|secret| SecretReference { name: Some(secret.name), namespace: Some(secret.namespace) }),
                ..CSIPersistentVolumeSource::default()
            }),
            mount_options: class.mount_options.clone(),
            node_affinity: Some(VolumeNodeAffinity {
                required: Some(NodeSelector { node_selector_terms: vec![term] }),
            }),
            persistent_volume_reclaim_policy: Some(class.reclaim_policy.clone().unwrap_or_else(|| "Delete".to_owned())),
            storage_class_name: Some(class.name_any()),
            volume_attributes_class_name: asked.and_then(|spec| spec.volume_attributes_class_name.clone()),
            volume_mode: Some(format!("{:?}", volume.spec.mode)),
            ..PersistentVolumeSpec::default()
        }),
        status: None,
    }
}

/// The filesystem by name, where it isn't the dataset's own.
fn fs_type(spec: &PortableVolumeSpec) -> Option<&'static str> {
    match spec.filesystem {
        Filesystem::Zfs => None,
        Filesystem::Ext4 => Some("ext4"),
        Filesystem::Xfs => Some("xfs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(change: serde_json::Value) -> PersistentVolumeClaim {
        let mut claim = json!({
            "metadata": { "name": "db", "namespace": "shop", "uid": "u1" },
            "spec": { "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": "1Gi" } } },
        });
        for (key, value) in change.as_object().into_iter().flatten() {
            claim["spec"][key] = value.clone();
        }
        serde_json::from_value(claim).unwrap()
    }

    fn class(parameters: serde_json::Value) -> StorageClass {
        serde_json::from_value(json!({
            "metadata": { "name": "fast" }, "provisioner": DRIVER, "parameters": parameters, "mountOptions": ["noatime"],
        }))
        .unwrap()
    }

    #[test]
    fn a_claim_is_checked_field_by_field() {
        let refused = |change, parameters| {
            let claim = claim(change);
            check(&claim, claim.spec.as_ref().unwrap(), &class(parameters), None)
                .err()
                .map(|refusal| refusal.to_string())
        };
        assert_eq!(refused(json!({}), json!({ "recordsize": "16K" })), None);
        for (change, parameters, named) in [
            (json!({}), json!({ "recordsize": "17K" }), "recordsize"),
            (json!({ "volumeMode": "Tape" }), json!({}), "volumeMode"),
            (json!({ "volumeMode": "Block" }), json!({ "recordsize": "16K" }), "volblocksize"),
            (json!({ "accessModes": ["ReadWriteMany"] }), json!({}), "ReadWriteMany"),
            (json!({ "resources": {} }), json!({}), "requests.storage"),
            (json!({}), json!({ "encryption": "aes-256-gcm" }), "node-stage-secret-name"),
            (json!({}), json!({ "encryption": "rot13" }), "aes-256-gcm"),
        ] {
            assert!(refused(change, parameters).unwrap().contains(named), "{named}");
        }
    }

    #[test]
    fn a_claim_may_name_a_dataset_to_import() {
        let asked = |annotation: &str, change| {
            let mut claim = claim(change);
            claim.annotations_mut().insert(IMPORT_ANNOTATION.to_owned(), annotation.to_owned());
            check(&claim, claim.spec.as_ref().unwrap(), &class(json!({})), None).map_err(|refusal| refusal.to_string())
        };
        let wish = asked("node-1:tank/old/db", json!({})).unwrap();
        assert!(
            !wish.read_only
                && !asked("n:t", json!({ "accessModes": ["ReadWriteOnce", "ReadOnlyMany"] })).unwrap().read_only
        );
        assert!(asked("n:t", json!({ "accessModes": ["ReadOnlyMany"] })).unwrap().read_only);
        let spec = wish.spec("node-1".into());
        assert_eq!(spec.import.unwrap().dataset, "tank/old/db");
        for wrong in ["", "tank/old", ":tank/old", "node-1:", "node-1:/tank", "node-1:tank@s"] {
            let refused = asked(wrong, json!({})).unwrap_err();
            assert!(refused.contains(IMPORT_ANNOTATION) && refused.contains("<node>:<dataset>"), "{wrong}: {refused}");
        }
        let both = json!({ "dataSource": { "kind": "PersistentVolumeClaim", "name": "other" } });
        assert!(asked("node-1:tank/old", both).unwrap_err().contains("dataSource"));
        let mut claim = claim(json!({}));
        claim.annotations_mut().insert(IMPORT_ANNOTATION.to_owned(), "node-1:tank/old".to_owned());
        let refused = check(&claim, claim.spec.as_ref().unwrap(), &class(sealed()), None).unwrap_err().to_string();
        assert!(refused.contains(IMPORT_ANNOTATION) && refused.contains("encryption"), "{refused}");
    }

    fn sealed() -> serde_json::Value {
        json!({
            "encryption": "aes-256-gcm", "csi.storage.k8s.io/node-stage-secret-name": "${pvc.name}-key",
            "csi.storage.k8s.io/node-stage-secret-namespace": "${pvc.namespace}",
        })
    }

    #[test]
    fn the_persistent_volume_of_an_encrypted_one_names_the_secret() {
        let (claim, class) = (claim(json!({})), class(sealed()));
        let wish = check(&claim, claim.spec.as_ref().unwrap(), &class, None).unwrap();
        let pv = persistent_volume(&claim, &class, &PortableVolume::new("pvc-u1", wish.spec("a".into())), "default");
        let text = serde_json::to_value(&pv).unwrap();
        assert_eq!(text["spec"]["csi"]["nodeStageSecretRef"], json!({ "name": "db-key", "namespace": "shop" }));
    }

    #[test]
    fn the_persistent_volume_can_go_wherever_such_a_pool_is() {
        let spec = PortableVolumeSpec { size: "1Gi".into(), ..PortableVolumeSpec::default() };
        let pv =
            persistent_volume(&claim(json!({})), &class(json!({})), &PortableVolume::new("pvc-u1", spec), "default");
        let text = serde_json::to_value(&pv).unwrap();
        assert_eq!(text["spec"]["csi"], json!({ "driver": "portolan.dev", "volumeHandle": "pvc-u1" }));
        let term = &text["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"][0]["matchExpressions"];
        assert_eq!(*term, json!([{ "key": TOPOLOGY_KEY, "operator": "In", "values": ["default"] }]));
        assert_eq!(
            (&text["spec"]["claimRef"]["uid"], &text["spec"]["volumeMode"]),
            (&json!("u1"), &json!("Filesystem"))
        );
        assert_eq!(text["spec"]["persistentVolumeReclaimPolicy"], "Delete");
        assert_eq!(text["metadata"]["finalizers"], json!([PV_FINALIZER]));
    }
}
