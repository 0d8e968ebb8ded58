//! Where the nodes agree on addresses: IPBlocks and IPClaims, whose names are locks.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, PostParams, Preconditions},
    runtime::reflector::ObjectRef,
};
use portolan_crds::{IPBlock, IPClaim};

use crate::{cluster::Cluster, error::ApiError};

/// The annotation of a block or a claim that says which version a node last took up: that makes it another version, whatever else is in it.
const RENEWED: &str = "portolan.dev/renewed";

/// How long the API server may take to tell of what is there: others wait meanwhile who may not need it.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a node sees and does of blocks and claims. A request that fails may have been carried out all the same, unless the error says otherwise
/// ([`is_refusal`]).
pub(crate) trait Registry {
    /// The node's own name.
    fn node(&self) -> &str;

    /// All blocks, as they are now.
    async fn blocks(&self) -> Result<Vec<Arc<IPBlock>>, ApiError>;

    /// Gives a block another version; `false` if it isn't any more what was read.
    async fn renew_block(&self, block: &IPBlock) -> Result<bool, ApiError>;

    /// Makes a block; `false` if there is one of that name.
    async fn create_block(&self, block: &IPBlock) -> Result<bool, ApiError>;

    /// Deletes this very block; it is right if it is gone, or is another one of the same name by now.
    async fn delete_block(&self, block: &IPBlock) -> Result<(), ApiError>;

    /// All claims, as they are now.
    async fn claims(&self) -> Result<Vec<Arc<IPClaim>>, ApiError>;

    /// A claim, as it is now.
    async fn claim(&self, name: &str) -> Result<Option<IPClaim>, ApiError>;

    /// Makes a claim; `false` if there is one of that name.
    async fn create_claim(&self, claim: &IPClaim) -> Result<bool, ApiError>;

    /// Gives a claim another version and this content, unless it has changed since it was read.
    async fn replace_claim(&self, claim: &IPClaim) -> Result<(), ApiError>;

    /// Whether there is a Node object of that name.
    async fn has_node(&self, name: &str) -> Result<bool, ApiError>;

    /// All claims, as the watch has shown them by now.
    fn seen_claims(&self) -> Vec<Arc<IPClaim>>;

    /// One of these.
    fn seen_claim(&self, name: &str) -> Option<Arc<IPClaim>>;
}

/// Whether the API server has refused a request: then it wasn't carried out, and never will be.
pub(crate) fn is_refusal(error: &ApiError) -> bool {
    matches!(&*error.source, kube::Error::Api(status) if (400..500).contains(&status.code))
}

impl Registry for Cluster {
    fn node(&self) -> &str {
        &self.node
    }

    async fn blocks(&self) -> Result<Vec<Arc<IPBlock>>, ApiError> {
        let (api, params) = (Api::<IPBlock>::all(self.client.clone()), ListParams::default());
        let listed = in_time(api.list(&params)).await;
        listed.map(|l| l.items.into_iter().map(Arc::new).collect()).map_err(|e| ApiError::new("list IPBlocks", e))
    }

    async fn renew_block(&self, block: &IPBlock) -> Result<bool, ApiError> {
        let (name, mut renewed) = (block.name_any(), block.clone());
        renewed.annotations_mut().insert(RENEWED.to_owned(), block.resource_version().unwrap_or_default());
        match Api::<IPBlock>::all(self.client.clone()).replace(&name, &PostParams::default(), &renewed).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(false),
            Err(e) => Err(ApiError::new(format!("renew IPBlock {name}"), e)),
        }
    }

    async fn create_block(&self, block: &IPBlock) -> Result<bool, ApiError> {
        let created = Api::<IPBlock>::all(self.client.clone()).create(&PostParams::default(), block).await;
        is_new(created, || format!("create IPBlock {}", block.name_any()))
    }

    async fn delete_block(&self, block: &IPBlock) -> Result<(), ApiError> {
        let preconditions = Some(Preconditions { uid: block.uid(), resource_version: None });
        let params = DeleteParams { preconditions, ..DeleteParams::default() };
        match Api::<IPBlock>::all(self.client.clone()).delete(&block.name_any(), &params).await {
            Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
            Err(e) => Err(ApiError::new(format!("delete IPBlock {}", block.name_any()), e)),
            Ok(_) => Ok(()),
        }
    }

    async fn claims(&self) -> Result<Vec<Arc<IPClaim>>, ApiError> {
        let listed = Api::<IPClaim>::all(self.client.clone()).list(&ListParams::default()).await;
        listed.map(|l| l.items.into_iter().map(Arc::new).collect()).map_err(|e| ApiError::new("list IPClaims", e))
    }

    async fn claim(&self, name: &str) -> Result<Option<IPClaim>, ApiError> {
        let api = Api::<IPClaim>::all(self.client.clone());
        let found = in_time(api.get_opt(name)).await;
        found.map_err(|e| ApiError::new(format!("get IPClaim {name}"), e))
    }

    async fn create_claim(&self, claim: &IPClaim) -> Result<bool, ApiError> {
        let created = Api::<IPClaim>::all(self.client.clone()).create(&PostParams::default(), claim).await;
        is_new(created, || format!("create IPClaim {}", claim.name_any()))
    }

    async fn replace_claim(&self, claim: &IPClaim) -> Result<(), ApiError> {
        let (name, mut renewed) = (claim.name_any(), claim.clone());
        renewed.annotations_mut().insert(RENEWED.to_owned(), claim.resource_version().unwrap_or_default());
        let replaced = Api::<IPClaim>::all(self.client.clone()).replace(&name, &PostParams::default(), &renewed).await;
        let action = || format!("hand IPClaim {name} over to StatefulSet {}", claim.spec.owner);
        replaced.map(drop).map_err(|e| ApiError::new(action(), e))
    }

    async fn has_node(&self, name: &str) -> Result<bool, ApiError> {
        let found = Api::<Node>::all(self.client.clone()).get_metadata_opt(name).await;
        found.map(|it| it.is_some()).map_err(|e| ApiError::new(format!("get Node {name}"), e))
    }

    fn seen_claims(&self) -> Vec<Arc<IPClaim>> {
        self.claims.state()
    }

    fn seen_claim(&self, name: &str) -> Option<Arc<IPClaim>> {
        self.claims.get(&ObjectRef::new(name))
    }
}

/// The answer to a question; an error if it doesn't come.
async fn in_time<T>(asked: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    let answer = tokio::time::timeout(PATIENCE, asked).await;
    answer.unwrap_or_else(|late| Err(kube::Error::Service(Box::new(late))))
}

fn is_new<T>(created: kube::Result<T>, action: impl FnOnce() -> String) -> Result<bool, ApiError> {
    match created {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(false),
        Err(e) => Err(ApiError::new(action(), e)),
    }
}
