//! What a new volume begins as: a snapshot, or another volume, of which a snapshot is taken that lives until the new volume is made.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec, TypedObjectReference};
use kube::api::{ApiResource, DeleteParams, DynamicObject, ObjectMeta, PostParams};
use kube::core::GroupVersionKind;
use kube::{Api, ResourceExt};
use portolan_crds::{DRIVER, PortableSnapshot, PortableSnapshotSpec, SNAPSHOT_FINALIZER, VolumeSource};
use serde_json::Value;

use super::{Hub, unless_gone};
use crate::parameters::Refusal;

/// Annotation of a PortableSnapshot that was taken to make a volume from: that volume.
pub(super) const CLONE_FOR: &str = "portolan.dev/clone-for";
/// Annotation of such a PortableSnapshot: the claim that wants the volume, as namespace/name, if a claim does.
pub(super) const CLONE_CLAIM: &str = "portolan.dev/clone-claim";
/// The API group of VolumeSnapshots.
const SNAPSHOT_GROUP: &str = "snapshot.storage.k8s.io";

/// What a wish names.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Source {
    /// A PortableSnapshot.
    Snapshot(String),
    /// A PortableVolume.
    Volume(String),
}

/// What became of it.
#[derive(Debug)]
pub(super) enum Resolved {
    /// A new volume can begin as this, and must have so many bytes at least.
    Ready(VolumeSource, i64),
    /// Not yet, and why.
    Waiting(String),
    /// There is no such thing.
    Missing(String),
}

/// Finds the snapshot that volume `new` begins as; has one taken of a volume. `claim`, as namespace/name, is who wants the new volume.
pub(super) async fn resolve(hub: &Hub, source: &Source, new: &str, claim: Option<&str>) -> kube::Result<Resolved> {
    match source {
        Source::Snapshot(name) => match hub.snapshots.get_opt(name).await? {
            None => Ok(Resolved::Missing(format!("there is no PortableSnapshot {name}"))),
            Some(snapshot) => Ok(ready(&snapshot)),
        },
        Source::Volume(volume) => {
            let name = clone_name(new);
            if let Some(snapshot) = hub.snapshots.get_opt(&name).await? {
                return Ok(ready(&snapshot));
            }
            match hub.volumes.get_opt(volume).await? {
                Some(found) if found.metadata.deletion_timestamp.is_none() => {}
                _ => return Ok(Resolved::Missing(format!("there is no PortableVolume {volume}"))),
            }
            let mut snapshot = snapshot(&name, volume);
            let mut annotations = BTreeMap::from([(CLONE_FOR.to_owned(), new.to_owned())]);
            annotations.extend(claim.map(|claim| (CLONE_CLAIM.to_owned(), claim.to_owned())));
            snapshot.metadata.annotations = Some(annotations);
            match hub.snapshots.create(&PostParams::default(), &snapshot).await {
                Err(kube::Error::Api(status)) if status.is_already_exists() => {}
                result => _ = result?,
            }
            Ok(Resolved::Waiting(format!("a snapshot of volume {volume} is being taken")))
        }
    }
}

/// The object that asks for a snapshot of a volume.
pub(super) fn snapshot(name: &str, volume: &str) -> PortableSnapshot {
    PortableSnapshot {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            finalizers: Some(vec![SNAPSHOT_FINALIZER.to_owned()]),
            ..ObjectMeta::default()
        },
        spec: PortableSnapshotSpec { volume: volume.to_owned(), ..PortableSnapshotSpec::default() },
        status: None,
    }
}

/// The name of the snapshot that is taken to make volume `new` from.
pub(super) fn clone_name(new: &str) -> String {
    format!("clone-{new}")
}

fn ready(snapshot: &PortableSnapshot) -> Resolved {
    let name = snapshot.name_any();
    if snapshot.metadata.deletion_timestamp.is_some() {
        return Resolved::Missing(format!("PortableSnapshot {name} is being deleted"));
    }
    let status = snapshot.status.clone().unwrap_or_default();
    match (status.guid, status.size_bytes) {
        (Some(guid), Some(size)) => {
            let (volume, short_name) = (snapshot.spec.volume.clone(), snapshot.short_name());
            Resolved::Ready(VolumeSource { snapshot: name, volume, short_name, guid }, size)
        }
        _ => Resolved::Waiting(format!("PortableSnapshot {name} is not taken yet")),
    }
}

/// Lets go of the snapshot that was taken to make a volume from. Idempotent.
pub(super) async fn release(hub: &Hub, source: Option<&VolumeSource>, new: &str) -> kube::Result<()> {
    let taken = source.is_some_and(|source| source.snapshot == clone_name(new));
    if taken {
        unless_gone(hub.snapshots.delete(&clone_name(new), &DeleteParams::default()).await)?;
    }
    Ok(())
}

/// What a claim names as its source.
pub(super) enum Named {
    /// Nothing: the volume begins empty.
    Nothing,
    /// Something of ours.
    Ours(Source),
    /// Something that somebody else fills the volume from.
    Foreign,
    /// Not yet there, and why.
    Waiting(String),
}

/// Follows a claim's `dataSource` to what it stands for.
pub(super) async fn named(
    hub: &Hub,
    claim: &PersistentVolumeClaim,
    spec: &PersistentVolumeClaimSpec,
) -> kube::Result<Result<Named, Refusal>> {
    let old = spec.data_source.as_ref().map(|source| TypedObjectReference {
        api_group: source.api_group.clone(),
        kind: source.kind.clone(),
        name: source.name.clone(),
        namespace: None,
    });
    let Some(source) = spec.data_source_ref.clone().or(old) else { return Ok(Ok(Named::Nothing)) };
    let namespace = claim.namespace().unwrap_or_default();
    let refuse = |why: String| Ok(Err(Refusal::DataSource { given: format!("{} {}", source.kind, source.name), why }));
    if source.namespace.as_ref().is_some_and(|other| *other != namespace) {
        return refuse("is in another namespace: allowed are those of the claim's own".to_owned());
    }
    match (source.api_group.as_deref().unwrap_or_default(), source.kind.as_str()) {
        ("", "PersistentVolumeClaim") => claim_source(hub, &namespace, &source.name).await,
        (SNAPSHOT_GROUP, "VolumeSnapshot") => snapshot_source(hub, &namespace, &source.name).await,
        _ => Ok(Ok(Named::Foreign)),
    }
    .map(|found| found.map_err(|why| Refusal::DataSource { given: format!("{} {}", source.kind, source.name), why }))
}

async fn claim_source(hub: &Hub, namespace: &str, name: &str) -> kube::Result<Result<Named, String>> {
    let Some(claim) = hub.claims(namespace).get_opt(name).await? else {
        return Ok(Ok(Named::Waiting(format!("there is no PersistentVolumeClaim {namespace}/{name}"))));
    };
    let Some(pv) = claim.spec.and_then(|spec| spec.volume_name).filter(|name| !name.is_empty()) else {
        return Ok(Ok(Named::Waiting(format!("PersistentVolumeClaim {namespace}/{name} is not bound yet"))));
    };
    let csi = hub.pvs.get_opt(&pv).await?.and_then(|pv| pv.spec?.csi).filter(|csi| csi.driver == DRIVER);
    Ok(match csi {
        Some(csi) => Ok(Named::Ours(Source::Volume(csi.volume_handle))),
        None => Err("is not a volume of Portolan's".to_owned()),
    })
}

async fn snapshot_source(hub: &Hub, namespace: &str, name: &str) -> kube::Result<Result<Named, String>> {
    let waiting = |why: String| Ok(Ok(Named::Waiting(why)));
    let Some(snapshot) = objects(hub, "VolumeSnapshot", Some(namespace)).get_opt(name).await? else {
        return waiting(format!("there is no VolumeSnapshot {namespace}/{name}"));
    };
    let Some(content) = text(&snapshot.data, "/status/boundVolumeSnapshotContentName") else {
        return waiting(format!("VolumeSnapshot {namespace}/{name} is not bound yet"));
    };
    let Some(content) = objects(hub, "VolumeSnapshotContent", None).get_opt(&content).await? else {
        return waiting(format!("there is no VolumeSnapshotContent {content}"));
    };
    if text(&content.data, "/spec/driver").as_deref() != Some(DRIVER) {
        return Ok(Err("is not a snapshot of Portolan's".to_owned()));
    }
    match text(&content.data, "/status/snapshotHandle") {
        Some(handle) => Ok(Ok(Named::Ours(Source::Snapshot(handle)))),
        None => waiting(format!("VolumeSnapshot {namespace}/{name} is not taken yet")),
    }
}

fn objects(hub: &Hub, kind: &str, namespace: Option<&str>) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(SNAPSHOT_GROUP, "v1", kind));
    match namespace {
        Some(namespace) => Api::namespaced_with(hub.client.clone(), namespace, &resource),
        None => Api::all_with(hub.client.clone(), &resource),
    }
}

fn text(value: &Value, pointer: &str) -> Option<String> {
    value.pointer(pointer)?.as_str().map(str::to_owned)
}
