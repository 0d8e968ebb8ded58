//! Asks the API where a pod's volumes are wanted. Whatever goes wrong, the pod starts as it is.

use futures::future::join_all;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::core::admission::{AdmissionRequest, AdmissionResponse};
use kube::{Api, Client, ResourceExt};
use portolan_crds::{DRIVER, PortableVolume};
use serde_json::Value;
use tokio::time::timeout;

use std::time::Duration;

use super::place;
use crate::metrics::Decision;

/// The API server waits 2 s for us (the registration's `timeoutSeconds`): an answer that says "as it is" counts as one.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Annotations of a claim: who provisions its volume (kubernetes.io, well-known annotations).
const PROVISIONERS: [&str; 2] =
    ["volume.kubernetes.io/storage-provisioner", "volume.beta.kubernetes.io/storage-provisioner"];

/// The answer to a pod that mounts claims.
pub(super) async fn answer(client: &Client, request: &AdmissionRequest<Pod>) -> (Decision, AdmissionResponse) {
    let response = AdmissionResponse::from(request);
    let Some(pod) = &request.object else { return (Decision::Unchanged, response) };
    let namespace = request.namespace.as_deref().unwrap_or("default");
    let nodes = match timeout(PATIENCE, nodes(client, namespace, pod)).await {
        Ok(Ok(nodes)) => nodes,
        Ok(Err(error)) => {
            tracing::warn!(namespace, %error, "a pod starts without a preference for its volumes' node");
            return (Decision::Failed, response);
        }
        Err(_) => {
            tracing::warn!(namespace, "the API was too slow: a pod starts without a preference for its volumes' node");
            return (Decision::Failed, response);
        }
    };
    let operations = place::patch(pod, &nodes);
    if operations.is_empty() {
        return (Decision::Unchanged, response);
    }
    let patch = serde_json::from_value(Value::Array(operations)).ok();
    match patch.and_then(|patch| response.clone().with_patch(patch).ok()) {
        Some(patched) => (Decision::Granted, patched),
        None => (Decision::Failed, response),
    }
}

async fn nodes(client: &Client, namespace: &str, pod: &Pod) -> kube::Result<Vec<String>> {
    let claims = place::claims(pod);
    let found = join_all(claims.iter().map(|claim| volume(client, namespace, claim))).await;
    let found = found.into_iter().collect::<kube::Result<Vec<_>>>()?;
    Ok(found.iter().flatten().filter_map(place::node).collect())
}

/// The PortableVolume of a claim, if it is bound to one.
async fn volume(client: &Client, namespace: &str, claim: &str) -> kube::Result<Option<PortableVolume>> {
    let claims = Api::<PersistentVolumeClaim>::namespaced(client.clone(), namespace);
    let Some(claim) = claims.get_opt(claim).await? else { return Ok(None) };
    let provisioner = PROVISIONERS.iter().find_map(|key| claim.annotations().get(*key));
    let Some(name) = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).filter(|name| !name.is_empty())
    else {
        return Ok(None);
    };
    if provisioner.is_some_and(|provisioner| provisioner != DRIVER) {
        return Ok(None);
    }
    let volumes = Api::<PortableVolume>::all(client.clone());
    // One that was provisioned has the name of its PersistentVolume: one look-up instead of two.
    if let Some(volume) = volumes.get_opt(name).await?
        && Some(&volume.spec.claim_uid) == claim.uid().as_ref()
    {
        return Ok(Some(volume));
    }
    let Some(pv) = Api::<PersistentVolume>::all(client.clone()).get_opt(name).await? else { return Ok(None) };
    let csi = pv.spec.and_then(|spec| spec.csi).filter(|csi| csi.driver == DRIVER);
    match csi {
        Some(csi) => volumes.get_opt(&csi.volume_handle).await,
        None => Ok(None),
    }
}
