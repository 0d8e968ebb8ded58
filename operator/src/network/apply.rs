//! Writing what was planned. Each write carries the resourceVersion that was read: a conflict makes the next pass read again.

use std::fmt::Debug;

use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, Client, Resource, ResourceExt};
use portolan_crds::{
    ContainerNetwork, ContainerNetworkStatus, IPBlock, IPClaim, NETWORK_FINALIZER, NetworkNodeSlice, condition,
};
use portolan_runtime::{conditions, events::Events};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::plan::Step;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something could not be read.
    #[error("can't read {what}")]
    Read {
        /// What.
        what: &'static str,
        /// Why.
        source: kube::Error,
    },
    /// A network could not be written.
    #[error("can't write the {part} of ContainerNetwork {network}")]
    Write {
        /// Which part.
        part: &'static str,
        /// Which network.
        network: String,
        /// Why.
        source: kube::Error,
    },
    /// Something of a network that goes could not be deleted.
    #[error("can't delete {kind} {name}")]
    Delete {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
        /// Why.
        source: kube::Error,
    },
}

impl Error {
    pub(super) fn reading(what: &'static str) -> impl Fn(kube::Error) -> Self {
        move |source| Self::Read { what, source }
    }
}

pub(super) async fn apply(client: &Client, events: &Events, step: Step) -> Result<(), Error> {
    match step {
        Step::AddFinalizer(network) => {
            let mut finalizers = network.finalizers().to_vec();
            finalizers.push(NETWORK_FINALIZER.to_owned());
            set_finalizers(client, &network, finalizers).await
        }
        Step::Status { network, status } => write_status(client, events, &network, status).await,
        Step::Release(network) => release(client, &network).await,
    }
}

async fn set_finalizers(client: &Client, network: &ContainerNetwork, finalizers: Vec<String>) -> Result<(), Error> {
    let patch = json!({"metadata": {"resourceVersion": network.resource_version(), "finalizers": finalizers}});
    write(client, network, "finalizers", &patch, None).await
}

async fn write_status(
    client: &Client,
    events: &Events,
    network: &ContainerNetwork,
    status: ContainerNetworkStatus,
) -> Result<(), Error> {
    // Adding the finalizer in the same pass has moved the resourceVersion on; only this process writes the status.
    let patch = json!({"status": status});
    write(client, network, "status", &patch, Some("status")).await?;

    let reason_of = |conditions| conditions::find(conditions, condition::READY).map(|ready| ready.reason.as_str());
    let before = network.status.as_ref().and_then(|status| reason_of(&status.conditions));
    if let Some(ready) = conditions::find(&status.conditions, condition::READY)
        && before != Some(ready.reason.as_str())
    {
        let about = network.object_ref(&());
        if ready.status == condition::TRUE {
            events.normal(&about, &ready.reason, "Validate", &ready.message).await;
        } else {
            events.warning(&about, &ready.reason, "Validate", &ready.message).await;
        }
    }
    Ok(())
}

async fn write(
    client: &Client,
    network: &ContainerNetwork,
    part: &'static str,
    patch: &serde_json::Value,
    subresource: Option<&str>,
) -> Result<(), Error> {
    let api = Api::<ContainerNetwork>::all(client.clone());
    let (name, params, patch) = (network.name_any(), PatchParams::default(), Patch::Merge(patch));
    let result = match subresource {
        Some(subresource) => api.patch_subresource(subresource, &name, &params, &patch).await,
        None => api.patch(&name, &params, &patch).await,
    };
    match result {
        Ok(_) => Ok(()),
        // Deleted in the meantime: nothing is left to write.
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(source) => Err(Error::Write { part, network: name, source }),
    }
}

/// Deletes what nodes have claimed of a network, then lets it go. Slices are read afresh: a pod may have come since the watch.
async fn release(client: &Client, network: &ContainerNetwork) -> Result<(), Error> {
    let name = network.name_any();
    let slices = of_network::<NetworkNodeSlice>(client, "NetworkNodeSlices", |it| it.spec.network == name).await?;
    if slices.iter().any(|slice| !slice.spec.endpoints.is_empty()) {
        return Ok(());
    }
    for slice in &slices {
        if !delete(client, slice).await? {
            return Ok(());
        }
    }
    for claim in of_network::<IPClaim>(client, "IPClaims", |it| it.spec.network == name).await? {
        delete(client, &claim).await?;
    }
    for block in of_network::<IPBlock>(client, "IPBlocks", |it| it.spec.network == name).await? {
        delete(client, &block).await?;
    }
    let others = network.finalizers().iter().filter(|finalizer| *finalizer != NETWORK_FINALIZER);
    set_finalizers(client, network, others.cloned().collect()).await
}

async fn of_network<K>(client: &Client, what: &'static str, is_its: impl Fn(&K) -> bool) -> Result<Vec<K>, Error>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    let list = Api::<K>::all(client.clone()).list(&ListParams::default()).await.map_err(Error::reading(what))?;
    Ok(list.items.into_iter().filter(is_its).collect())
}

/// Deletes exactly the object that was read. False if it has been changed or replaced since, and was left alone.
pub(crate) async fn delete<K>(client: &Client, object: &K) -> Result<bool, Error>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    let preconditions = kube::api::Preconditions { uid: object.uid(), resource_version: object.resource_version() };
    let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    match Api::<K>::all(client.clone()).delete(&object.name_any(), &params).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(true),
        Err(kube::Error::Api(status)) if status.is_conflict() => Ok(false),
        Err(source) => Err(Error::Delete { kind: K::kind(&()).into_owned(), name: object.name_any(), source }),
    }
}
