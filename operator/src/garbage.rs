//! Clears away what nobody owns any more: sticky addresses of pods that won't come back, and what nodes that are gone had claimed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{ListParams, PostParams};
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
    for name in claim.spec.nodes() {
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

/// The nodes that a claim names, each with what changes whenever something may have been started there for the claim.
pub fn mentions(claim: &IPClaim) -> impl Iterator<Item = (&String, Option<String>)> {
    let last = claim.spec.node.iter().map(|node| (node, claim.resource_version()));
    // Other nodes write the claim as well: that says nothing of this one, unless it was the last one in between.
    let handed_over = format!("{} to {:?}", claim.name_any(), claim.spec.node);
    last.chain(claim.spec.former_nodes.iter().map(move |node| (node, Some(handed_over.clone()))))
}

/// The nodes that have no Node object, and since when. A new leader begins anew: that makes it later, never sooner.
#[derive(Default)]
pub struct Gone(BTreeMap<String, Absence>);

/// A node that is gone.
struct Absence {
    /// When that was seen first.
    since: Instant,
    /// The versions of the objects that name it.
    versions: BTreeSet<String>,
}

impl Gone {
    /// At `now` only the nodes `present` were there, and objects of these versions named a node. One that was back between two looks has written to
    /// one of its objects: it is gone since now.
    pub fn look<'a>(
        &mut self,
        mentioned: impl IntoIterator<Item = (&'a String, Option<String>)>,
        present: &BTreeSet<String>,
        now: Instant,
    ) {
        let mut missing: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (node, version) in mentioned.into_iter().filter(|(node, _)| !present.contains(*node)) {
            missing.entry(node.clone()).or_default().extend(version);
        }
        let before = std::mem::take(&mut self.0);
        let absence = |(node, versions): (String, BTreeSet<String>)| {
            let known = before.get(&node).filter(|before| versions.is_subset(&before.versions));
            (node, Absence { since: known.map_or(now, |known| known.since), versions })
        };
        self.0 = missing.into_iter().map(absence).collect();
    }

    /// Whether a pod that has no object any more has ended: the kubelet of a node that `is_there` has seen to it, and one that is gone has had
    /// the quarantine for it.
    pub fn has_ended(&self, node: &str, is_there: bool, now: Instant) -> bool {
        is_there || self.since(node, now, QUARANTINE)
    }

    /// A claim without those former nodes where its pod has ended; None if it stays as it is.
    pub fn without_ended(&self, claim: &IPClaim, present: &BTreeSet<String>, now: Instant) -> Option<IPClaim> {
        let mut left = claim.clone();
        left.spec.former_nodes.retain(|node| !self.has_ended(node, present.contains(node), now));
        (left != *claim).then_some(left)
    }

    /// Whether a node has been gone for so long.
    pub fn since(&self, node: &str, now: Instant, long: Duration) -> bool {
        self.0.get(node).is_some_and(|absence| now.duration_since(absence.since) >= long)
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

    let of_blocks = blocks.iter().map(|it| (&it.spec.node, it.resource_version()));
    let of_slices = slices.iter().map(|it| (&it.spec.node, it.resource_version()));
    let now = Instant::now();
    gone.look(of_blocks.chain(of_slices).chain(claims.iter().flat_map(mentions)), &present, now);
    for slice in slices.iter().filter(|slice| gone.since(&slice.spec.node, now, EVERY)) {
        delete(client, slice).await?;
        tracing::info!(slice = slice.name_any(), "deleted: its node is gone");
    }
    for block in blocks.iter().filter(|block| gone.since(&block.spec.node, now, QUARANTINE)) {
        delete(client, block).await?;
        tracing::info!(block = block.name_any(), "deleted: its node has been gone for long enough");
    }
    for claim in claims.iter().filter_map(|claim| gone.without_ended(claim, &present, now)) {
        replace(client, &claim).await?;
    }
    Ok(())
}

/// Changes a claim, unless it has changed since it was read.
async fn replace(client: &Client, claim: &IPClaim) -> Result<(), Error> {
    let name = claim.name_any();
    match Api::<IPClaim>::all(client.clone()).replace(&name, &PostParams::default(), claim).await {
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
        replaced => replaced.map(drop).map_err(|source| Error::Claim { name, source }),
    }
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
        let (a, b) = ("a".to_owned(), "b".to_owned());
        let objects = || [(&a, Some("1".to_owned())), (&a, Some("2".to_owned())), (&b, Some("3".to_owned()))];
        let present = |nodes: &[&String]| nodes.iter().map(|node| (*node).clone()).collect::<BTreeSet<_>>();
        let at = |seconds| begin + Duration::from_secs(seconds);
        gone.look(objects(), &present(&[]), at(0));
        assert!(!gone.since("a", at(0), EVERY), "it may only be registering anew");
        gone.look(objects(), &present(&[&b]), at(300));
        assert!(gone.since("a", at(300), EVERY) && !gone.since("a", at(300), QUARANTINE));
        gone.look(objects(), &present(&[]), at(600));
        assert!(gone.since("a", at(600), QUARANTINE));
        assert!(!gone.since("b", at(600), EVERY), "it was there in between");
        gone.look([(&a, Some("2".to_owned()))], &present(&[]), at(650));
        assert!(gone.since("a", at(650), QUARANTINE), "one of its objects was deleted");
        gone.look([(&a, Some("4".to_owned()))], &present(&[]), at(660));
        assert!(!gone.since("a", at(660), EVERY), "it was there between two looks, and wrote");
        gone.look(objects(), &present(&[&a, &b]), at(700));
        assert!(!gone.since("a", at(9000), EVERY));
    }

    #[test]
    fn a_pod_without_an_object_has_ended_when_its_node_says_so_or_can_not_any_more() {
        let (mut gone, begin) = (Gone::default(), Instant::now());
        assert!(gone.has_ended("a", true, begin) && !gone.has_ended("a", false, begin), "it has only just gone");
        gone.look([(&"a".to_owned(), Some("1".to_owned()))], &BTreeSet::new(), begin);
        assert!(!gone.has_ended("a", false, begin + QUARANTINE / 2) && gone.has_ended("a", false, begin + QUARANTINE));
    }

    #[test]
    fn a_claim_names_a_former_node_until_the_pod_has_ended_there() {
        let (mut gone, begin) = (Gone::default(), Instant::now());
        let mut claim = claim("db-0");
        let (a, b, c) = ("a".to_owned(), "b".to_owned(), "c".to_owned());
        claim.spec.node = Some(c.clone());
        claim.spec.former_nodes = vec![a.clone(), b.clone()];
        let present = [b, c].into();
        gone.look(mentions(&claim), &present, begin);
        let left = gone.without_ended(&claim, &present, begin).unwrap();
        assert_eq!(left.spec.former_nodes, [a.as_str()], "it may still run there; the other is back without it");
        claim = left;
        // Written by the node that it is on: that says nothing of the former one.
        claim.metadata.resource_version = Some("2".into());
        gone.look(mentions(&claim), &present, begin + QUARANTINE / 2);
        assert_eq!(gone.without_ended(&claim, &present, begin + QUARANTINE / 2), None);
        let left = gone.without_ended(&claim, &present, begin + QUARANTINE).unwrap();
        assert!(left.spec.former_nodes.is_empty());
        // It was there in between.
        claim.spec.node = Some("d".into());
        gone.look(mentions(&claim), &present, begin + QUARANTINE);
        assert_eq!(gone.without_ended(&claim, &present, begin + QUARANTINE), None);
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
