//! The API server of the simulation: blocks, claims, Node objects, StatefulSets and pods; and the ways to it, which lose requests and answers.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
};

use k8s_openapi::api::apps::v1::StatefulSet;
use kube::ResourceExt;
use portolan_crds::{IPBlock, IPClaim};

use super::super::registry::Registry;
use crate::error::ApiError;

/// How many requests of ten thousand are lost, and how many answers.
const LOST: u64 = 60;

/// The same numbers for the same seed (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub fn chance(&mut self, of_ten_thousand: u64) -> bool {
        self.next() % 10_000 < of_ten_thousand
    }
}

/// What a world is without, to see that it is missed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Without {
    Nothing,
    /// A name is no lock: who creates what is there replaces it.
    AtomicCreate,
    /// What is deleted or changed may have changed since it was read.
    Versions,
    /// Blocks of a node are free as soon as its Node object is gone.
    Quarantine,
    /// Claims go with their StatefulSet, whether the pod is still there or not.
    PodsEnd,
    /// Claims go with their pod, whether the node is gone that had it or not.
    NodesEnd,
    /// Of the nodes that a pod was on only the last one counts.
    FormerNodes,
}

pub type Claims = BTreeMap<String, Arc<IPClaim>>;

pub struct Server {
    pub blocks: BTreeMap<String, Arc<IPBlock>>,
    claims: Claims,
    snapshot: Option<Arc<Claims>>,
    pub nodes: BTreeSet<String>,
    pub pods: BTreeSet<String>,
    pub sets: BTreeMap<String, StatefulSet>,
    version: u64,
    pub random: Random,
    pub without: Without,
}

impl Server {
    pub fn new(seed: u64, without: Without) -> Self {
        Self {
            blocks: BTreeMap::new(),
            claims: Claims::new(),
            snapshot: None,
            nodes: BTreeSet::new(),
            pods: BTreeSet::new(),
            sets: BTreeMap::new(),
            version: 0,
            random: Random(seed),
            without,
        }
    }

    /// All claims as they are now.
    pub fn claims(&mut self) -> Arc<Claims> {
        Arc::clone(self.snapshot.get_or_insert_with(|| Arc::new(self.claims.clone())))
    }

    fn version(&mut self) -> Option<String> {
        self.version += 1;
        Some(self.version.to_string())
    }

    fn create_block(&mut self, block: &IPBlock) -> bool {
        if self.blocks.contains_key(&block.name_any()) && self.without != Without::AtomicCreate {
            return false;
        }
        self.put_block(block.clone());
        true
    }

    fn put_block(&mut self, mut block: IPBlock) {
        block.metadata.resource_version = self.version();
        block.metadata.uid = block.metadata.uid.or_else(|| block.metadata.resource_version.clone());
        self.blocks.insert(block.name_any(), Arc::new(block));
    }

    fn renew_block(&mut self, block: &IPBlock) -> bool {
        let there = self.blocks.get(&block.name_any());
        let is_right = there.is_some_and(|it| it.metadata.resource_version == block.metadata.resource_version);
        if is_right {
            self.put_block(block.clone());
        }
        is_right
    }

    /// `whole`: only as it was read; otherwise, only the same object.
    pub fn delete_block(&mut self, block: &IPBlock, whole: bool) {
        let (name, read) = (block.name_any(), &block.metadata);
        let is_it = |it: &Arc<IPBlock>| {
            let (it, any) = (&it.metadata, self.without == Without::Versions);
            any || it.uid == read.uid && (!whole || it.resource_version == read.resource_version)
        };
        if self.blocks.get(&name).is_some_and(is_it) {
            self.blocks.remove(&name);
        }
    }

    fn create_claim(&mut self, claim: &IPClaim) -> bool {
        if self.claims.contains_key(&claim.name_any()) && self.without != Without::AtomicCreate {
            return false;
        }
        self.put_claim(claim.clone());
        true
    }

    fn put_claim(&mut self, mut claim: IPClaim) {
        claim.metadata.resource_version = self.version();
        self.claims.insert(claim.name_any(), Arc::new(claim));
        self.snapshot = None;
    }

    fn is_as_read(&self, claim: &IPClaim) -> bool {
        let there = self.claims.get(&claim.name_any());
        let is_right = |it: &Arc<IPClaim>| it.metadata.resource_version == claim.metadata.resource_version;
        there.is_some_and(|it| is_right(it) || self.without == Without::Versions)
    }

    pub fn replace_claim(&mut self, claim: &IPClaim) -> bool {
        let is_right = self.is_as_read(claim);
        if is_right {
            self.put_claim(claim.clone());
        }
        is_right
    }

    /// Only as it was read.
    pub fn delete_claim(&mut self, claim: &IPClaim) {
        if self.is_as_read(claim) {
            self.claims.remove(&claim.name_any());
            self.snapshot = None;
        }
    }
}

/// What one node sees of it.
pub struct View {
    name: String,
    server: Arc<Mutex<Server>>,
    /// What its watch has shown.
    seen: Mutex<Arc<Claims>>,
    /// Whether nothing gets through.
    pub is_cut: AtomicBool,
}

impl View {
    pub fn new(name: String, server: Arc<Mutex<Server>>) -> Self {
        let seen = server.lock().unwrap().claims();
        Self { name, server, seen: Mutex::new(seen), is_cut: AtomicBool::new(false) }
    }

    pub fn is_cut(&self) -> bool {
        self.is_cut.load(Ordering::Relaxed)
    }

    /// The watch catches up.
    pub fn see(&self) {
        *self.seen.lock().unwrap() = self.server.lock().unwrap().claims();
    }

    fn server(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap()
    }

    /// Asks the server. Others are faster, before it is asked or before the answer comes; or it never comes.
    async fn ask<T>(&self, effect: impl FnOnce(&mut Server) -> T) -> Result<T, ApiError> {
        let lost = || ApiError::new("ask", kube::Error::Service("no answer".into()));
        pause().await;
        if self.is_cut() || self.server().random.chance(LOST) {
            return Err(lost());
        }
        let answer = effect(&mut self.server());
        pause().await;
        if self.is_cut() || self.server().random.chance(LOST) {
            return Err(lost());
        }
        Ok(answer)
    }
}

/// Lets others do something.
pub async fn pause() {
    let mut is_first = true;
    poll_fn(|_| if std::mem::take(&mut is_first) { Poll::Pending } else { Poll::Ready(()) }).await;
}

impl Registry for View {
    fn node(&self) -> &str {
        &self.name
    }

    async fn blocks(&self) -> Result<Vec<Arc<IPBlock>>, ApiError> {
        self.ask(|server| server.blocks.values().cloned().collect()).await
    }

    async fn renew_block(&self, block: &IPBlock) -> Result<bool, ApiError> {
        self.ask(|server| server.renew_block(block)).await
    }

    async fn create_block(&self, block: &IPBlock) -> Result<bool, ApiError> {
        self.ask(|server| server.create_block(block)).await
    }

    async fn delete_block(&self, block: &IPBlock) -> Result<(), ApiError> {
        self.ask(|server| server.delete_block(block, false)).await
    }

    async fn claims(&self) -> Result<Vec<Arc<IPClaim>>, ApiError> {
        self.ask(|server| server.claims.values().cloned().collect()).await
    }

    async fn claim(&self, name: &str) -> Result<Option<IPClaim>, ApiError> {
        self.ask(|server| server.claims.get(name).map(|claim| IPClaim::clone(claim))).await
    }

    async fn create_claim(&self, claim: &IPClaim) -> Result<bool, ApiError> {
        self.ask(|server| server.create_claim(claim)).await
    }

    async fn replace_claim(&self, claim: &IPClaim) -> Result<(), ApiError> {
        let conflict = || {
            ApiError::new("replace", kube::Error::Api(Box::new(kube::core::Status { code: 409, ..Default::default() })))
        };
        self.ask(|server| server.replace_claim(claim)).await?.then_some(()).ok_or_else(conflict)
    }

    async fn has_node(&self, name: &str) -> Result<bool, ApiError> {
        self.ask(|server| server.nodes.contains(name) || server.without == Without::FormerNodes).await
    }

    fn seen_claims(&self) -> Vec<Arc<IPClaim>> {
        self.seen.lock().unwrap().values().cloned().collect()
    }

    fn seen_claim(&self, name: &str) -> Option<Arc<IPClaim>> {
        self.seen.lock().unwrap().get(name).cloned()
    }
}
