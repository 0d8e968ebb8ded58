//! Writing what was planned. Each write carries the resourceVersion that was read: a conflict makes the next pass read again.

use std::fmt::Debug;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
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
    /// An IPClaim could not be changed.
    #[error("can't change IPClaim {name}")]
    Claim {
        /// Its name.
        name: String,
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

    let before = network.status.as_ref().map_or(&[][..], |status| &status.conditions);
    for (is_warning, condition) in news(before, &status.conditions) {
        let (about, action) =
            (network.object_ref(&()), if condition.type_ == condition::READY { "Validate" } else { "Probe" });
        if is_warning {
            events.warning(&about, &condition.reason, action, &condition.message).await;
        } else {
            events.normal(&about, &condition.reason, action, &condition.message).await;
        }
    }
    Ok(())
}

/// What Events tell, and whether it needs a look: another reason of `Ready`, a path that is too small once the first one is known, nodes
/// of both IP families, and a reason why there is no way outside.
fn news<'a>(before: &[Condition], after: &'a [Condition]) -> Vec<(bool, &'a Condition)> {
    let changed = |type_, of: fn(&Condition) -> &str| {
        let after = conditions::find(after, type_)?;
        (conditions::find(before, type_).map(of) != Some(of(after))).then_some(after)
    };
    let ready = changed(condition::READY, |it| &it.reason).map(|it| (it.status != condition::TRUE, it));
    let mismatch = changed(condition::MTU_MISMATCH, |it| &it.status).filter(|it| it.status == condition::TRUE);
    let split = changed(condition::FAMILY_MISMATCH, |it| &it.status).filter(|it| it.status == condition::TRUE);
    let egress = changed(condition::EGRESS_READY, |it| &it.reason).filter(|it| it.status != condition::TRUE);
    let warnings = [mismatch, split, egress].into_iter().flatten().map(|it| (true, it));
    ready.into_iter().chain(warnings).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn conditions(ready: &str, mismatch: &str, message: &str) -> Vec<Condition> {
        let mut all = Vec::new();
        conditions::set(&mut all, condition::READY, condition::TRUE, ready, "", None);
        conditions::set(&mut all, condition::MTU_MISMATCH, mismatch, "PathTooSmall", message, None);
        all
    }

    #[test]
    fn a_path_that_is_too_small_is_told_once() {
        let told = |before: &[Condition], after: &[Condition]| -> Vec<(bool, String)> {
            news(before, after).into_iter().map(|(is_warning, it)| (is_warning, it.type_.clone())).collect()
        };
        let (fine, small) = (conditions("Accepted", "False", ""), conditions("Accepted", "True", "one"));
        let mismatch = vec![(true, "MTUMismatch".to_owned())];
        assert_eq!(told(&fine, &small), mismatch);
        assert_eq!(told(&small, &conditions("Accepted", "True", "two")), [], "another path");
        assert_eq!(told(&small, &fine), []);
        assert_eq!(told(&fine[..1], &small), mismatch, "the status is of an older release");
        assert_eq!(told(&[], &fine), [(false, "Ready".to_owned())]);
        assert_eq!(told(&fine, &conditions("SubnetOverlaps", "True", "")).len(), 2);
        let mut split = fine.clone();
        conditions::set(&mut split, condition::FAMILY_MISMATCH, condition::TRUE, "NodesOfBothFamilies", "", None);
        assert_eq!(told(&fine, &split), [(true, "IPFamilyMismatch".to_owned())]);
        assert_eq!(told(&split, &split), []);
        assert_eq!(told(&split, &fine), [], "it is mended");
    }
}
