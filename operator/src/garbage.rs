//! Clears away what nobody owns any more: sticky addresses of pods that won't come back, and what nodes that are gone had claimed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::ListParams;
use kube::{Api, Client, Resource, ResourceExt};
use portolan_crds::{IPBlock, IPClaim, NetworkNodeSlice};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::network::apply::{Error, delete};

/// How often is looked.
pub const EVERY: Duration = Duration::from_secs(30);

/// How long a node has been gone when others may have its addresses: its Node object may have been deleted while its pods go on.
pub const QUARANTINE: Duration = Duration::from_secs(600);

/// Collects until `stop` is cancelled.
pub async fn run(client: Client, stop: CancellationToken) {
    let mut gone = Gone::default();
    loop {
        if let Err(error) = nodes(&client, &mut gone).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "collecting what gone nodes left failed");
        }
        if let Err(error) = claims(&client, &gone).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "collecting IPClaims failed");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

async fn list<K>(client: &Client, what: &'static str) -> Result<Vec<K>, Error>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    let list = Api::<K>::all(client.clone()).list(&ListParams::default()).await;
    list.map(|list| list.items).map_err(|source| Error::Read { what, source })
}

/// Whether a StatefulSet has a place for the pod of a claim. What isn't understood has one.
pub fn has_place(claim: &IPClaim, owner: Option<&StatefulSet>) -> bool {
    let Some(owner) = owner.filter(|owner| owner.uid().as_ref() == Some(&claim.spec.owner_uid)) else { return false };
    let spec = owner.spec.as_ref();
    let first = spec.and_then(|spec| spec.ordinals.as_ref()).and_then(|ordinals| ordinals.start).unwrap_or(0);
    let last = first.saturating_add(spec.and_then(|spec| spec.replicas).unwrap_or(1));
    let ordinal =
        claim.spec.pod.strip_prefix(&format!("{}-", claim.spec.owner)).and_then(|text| text.parse::<i32>().ok());
    ordinal.is_none_or(|ordinal| ordinal >= first && ordinal < last)
}

async fn claims(client: &Client, gone: &Gone) -> Result<(), Error> {
    // Claims first: whoever made one of these was there then, so a StatefulSet that the second list lacks is gone for good.
    let claims: Vec<IPClaim> = list(client, "IPClaims").await?;
    if claims.is_empty() {
        return Ok(());
    }
    let owners: Vec<StatefulSet> = list(client, "StatefulSets").await?;
    let owners: HashMap<String, StatefulSet> =
        owners.into_iter().filter_map(|owner| owner.uid().map(|uid| (uid, owner))).collect();
    for claim in claims.iter().filter(|claim| !has_place(claim, owners.get(&claim.spec.owner_uid))) {
        if is_abandoned(client, claim, gone).await? && delete(client, claim).await? {
            tracing::info!(claim = claim.name_any(), address = claim.spec.address, "a sticky address is free again");
        }
    }
    Ok(())
}

/// True if there is no pod, which may go on when its StatefulSet is gone, and none that nobody can look after; and after that look still no place for
/// one: the order keeps a scale-up from losing its address.
async fn is_abandoned(client: &Client, claim: &IPClaim, gone: &Gone) -> Result<bool, Error> {
    let pods = Api::<Pod>::namespaced(client.clone(), &claim.spec.namespace);
    let pod = pods.get_metadata_opt(&claim.spec.pod).await.map_err(|source| Error::Read { what: "a Pod", source })?;
    if pod.is_some() {
        return Ok(false);
    }
    if let Some(name) = &claim.spec.node {
        let node = Api::<Node>::all(client.clone()).get_metadata_opt(name).await;
        let is_there = node.map_err(|source| Error::Read { what: "a Node", source })?.is_some();
        if !gone.has_ended(name, is_there, Instant::now()) {
            return Ok(false);
        }
    }
    let owners = Api::<StatefulSet>::namespaced(client.clone(), &claim.spec.namespace);
    let owner = owners.get_opt(&claim.spec.owner).await;
    let owner = owner.map_err(|source| Error::Read { what: "a StatefulSet", source })?;
    Ok(!has_place(claim, owner.as_ref()))
}

/// The nodes that have no Node object, and when that was seen first. A new leader begins anew: that makes it later, never sooner.
#[derive(Default)]
pub struct Gone(BTreeMap<String, Instant>);

impl Gone {
    /// At `now` exactly these were missing.
    pub fn look(&mut self, missing: BTreeSet<String>, now: Instant) {
        self.0.retain(|node, _| missing.contains(node));
        for node in missing {
            self.0.entry(node).or_insert(now);
        }
    }

    /// Whether a pod that has no object any more has ended: the kubelet of a node that `is_there` has seen to it, and one that is gone has had
    /// the quarantine for it.
    pub fn has_ended(&self, node: &str, is_there: bool, now: Instant) -> bool {
        is_there || self.since(node, now, QUARANTINE)
    }

    /// Whether a node has been gone for so long.
    pub fn since(&self, node: &str, now: Instant, long: Duration) -> bool {
        self.0.get(node).is_some_and(|first| now.duration_since(*first) >= long)
    }
}

/// Deletes what is left of nodes whose Node object is gone: slices if it was already at the last look (a node may register anew), so that nothing is
/// sent there; blocks after the quarantine.
async fn nodes(client: &Client, gone: &mut Gone) -> Result<(), Error> {
    let blocks: Vec<IPBlock> = list(client, "IPBlocks").await?;
    let slices: Vec<NetworkNodeSlice> = list(client, "NetworkNodeSlices").await?;
    let claims: Vec<IPClaim> = list(client, "IPClaims").await?;
    let nodes = Api::<Node>::all(client.clone()).list_metadata(&ListParams::default()).await;
    let nodes = nodes.map_err(|source| Error::Read { what: "Nodes", source })?;
    let present: BTreeSet<String> = nodes.items.iter().map(ResourceExt::name_any).collect();

    let mentioned = blocks.iter().map(|it| &it.spec.node).chain(slices.iter().map(|it| &it.spec.node));
    let mentioned = mentioned.chain(claims.iter().filter_map(|it| it.spec.node.as_ref()));
    let now = Instant::now();
    gone.look(mentioned.filter(|node| !present.contains(*node)).cloned().collect(), now);
    for slice in slices.iter().filter(|slice| gone.since(&slice.spec.node, now, EVERY)) {
        delete(client, slice).await?;
        tracing::info!(slice = slice.name_any(), "deleted: its node is gone");
    }
    for block in blocks.iter().filter(|block| gone.since(&block.spec.node, now, QUARANTINE)) {
        delete(client, block).await?;
        tracing::info!(block = block.name_any(), "deleted: its node has been gone for long enough");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::IPClaimSpec;
    use serde_json::json;

    fn claim(pod: &str) -> IPClaim {
        let (pod, owner, owner_uid) = (pod.to_owned(), "db".to_owned(), "uid".to_owned());
        IPClaim::new("c", IPClaimSpec { pod, owner, owner_uid, ..Default::default() })
    }

    fn owner(replicas: i32, start: i32) -> StatefulSet {
        let spec = json!({"replicas": replicas, "ordinals": {"start": start}, "selector": {}, "template": {}, "serviceName": ""});
        serde_json::from_value(json!({"metadata": {"name": "db", "uid": "uid"}, "spec": spec})).unwrap()
    }

    #[test]
    fn a_node_that_is_back_once_was_never_gone() {
        let (mut gone, begin) = (Gone::default(), Instant::now());
        let missing = |nodes: &[&str]| nodes.iter().map(|node| (*node).to_owned()).collect::<BTreeSet<_>>();
        let at = |seconds| begin + Duration::from_secs(seconds);
        gone.look(missing(&["a", "b"]), at(0));
        assert!(!gone.since("a", at(0), EVERY), "it may only be registering anew");
        gone.look(missing(&["a"]), at(300));
        assert!(gone.since("a", at(300), EVERY) && !gone.since("a", at(300), QUARANTINE));
        gone.look(missing(&["a", "b"]), at(600));
        assert!(gone.since("a", at(600), QUARANTINE));
        assert!(!gone.since("b", at(600), EVERY), "it was there in between");
        gone.look(missing(&[]), at(700));
        assert!(!gone.since("a", at(9000), EVERY));
    }

    #[test]
    fn a_pod_without_an_object_has_ended_when_its_node_says_so_or_can_not_any_more() {
        let (mut gone, begin) = (Gone::default(), Instant::now());
        assert!(gone.has_ended("a", true, begin) && !gone.has_ended("a", false, begin), "it has only just gone");
        gone.look(["a".to_owned()].into(), begin);
        assert!(!gone.has_ended("a", false, begin + QUARANTINE / 2) && gone.has_ended("a", false, begin + QUARANTINE));
    }

    #[test]
    fn a_claim_lives_as_long_as_its_pods_place() {
        assert!(!has_place(&claim("db-0"), None));
        assert!(has_place(&claim("db-2"), Some(&owner(3, 0))) && !has_place(&claim("db-3"), Some(&owner(3, 0))));
        assert!(has_place(&claim("db-12"), Some(&owner(3, 10))) && !has_place(&claim("db-0"), Some(&owner(3, 10))));
        assert!(has_place(&claim("other"), Some(&owner(0, 0))), "what isn't understood is kept");
        let mut earlier = claim("db-0");
        earlier.spec.owner_uid = "of an earlier one".to_owned();
        assert!(!has_place(&earlier, Some(&owner(3, 0))));
    }
}
