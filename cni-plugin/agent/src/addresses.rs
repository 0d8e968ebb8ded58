//! Addresses: a node allocates from blocks that are its own (IPBlock, whose name is the lock), and keeps a StatefulSet pod's
//! address for it (IPClaim).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
};

use ipnet::Ipv4Net;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, PostParams},
};
use portolan_crds::{IPBlock, IPBlockSpec, IPClaim, IPClaimSpec, claim_name};
use portolan_net::{free_address, free_block};

use crate::{
    cluster::Cluster,
    error::{ApiError, PlugError},
    journal::Journal,
    network::Network,
    pod::Owner,
};

/// How often another node may be faster to the same block before we give up for now.
const BLOCK_TRIES: usize = 8;

/// Who an address is for.
pub(crate) struct Holder<'a> {
    pub namespace: &'a str,
    pub pod: &'a str,
    pub stateful_set: Option<&'a Owner>,
}

type Key = (String, Ipv4Addr);

/// An address that nobody else is given; kept by the journal once it is there, and free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub address: Ipv4Addr,
    key: Key,
    reserved: Arc<Mutex<BTreeSet<Key>>>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// This node's addresses.
pub(crate) struct Addresses {
    cluster: Arc<Cluster>,
    journal: Arc<Journal>,
    reserved: Arc<Mutex<BTreeSet<Key>>>,
    state: tokio::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    /// This node's blocks by network, once they have been asked for.
    blocks: BTreeMap<String, Vec<Ipv4Net>>,
    /// Claims that we made and the watch hasn't shown yet.
    fresh_claims: BTreeMap<String, Key>,
}

impl Addresses {
    pub fn new(cluster: Arc<Cluster>, journal: Arc<Journal>) -> Self {
        Self { cluster, journal, reserved: Arc::default(), state: tokio::sync::Mutex::default() }
    }

    /// An address for a pod: its claim's if it has or may have one, else a free one.
    pub async fn acquire(&self, network: &Network, holder: &Holder<'_>) -> Result<Reservation, PlugError> {
        let Some(owner) = holder.stateful_set else { return self.allocate(network).await };
        let name = claim_name(&network.name, holder.namespace, holder.pod);
        if let Some(address) = self.claimed(network, &name, owner).await? {
            return Ok(self.reserve(network, address));
        }
        let reservation = self.allocate(network).await?;
        let spec = IPClaimSpec {
            network: network.name.clone(),
            address: reservation.address.to_string(),
            namespace: holder.namespace.to_owned(),
            pod: holder.pod.to_owned(),
            owner: owner.name.clone(),
            owner_uid: owner.uid.clone(),
        };
        match self.claims().create(&PostParams::default(), &IPClaim::new(&name, spec)).await {
            Ok(_) => {
                self.state.lock().await.fresh_claims.insert(name, reservation.key.clone());
                Ok(reservation)
            }
            // Another node was faster (or we were, and never heard of it): its address counts.
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                let address = self.claimed(network, &name, owner).await?;
                address.map(|a| self.reserve(network, a)).ok_or(PlugError::NotReady {
                    network: network.name.clone(),
                    reason: format!("IPClaim {name} came and went"),
                })
            }
            Err(e) => Err(ApiError::new(format!("create IPClaim {name}"), e).into()),
        }
    }

    /// The address of a claim. One of an earlier StatefulSet of the same name passes over to the pod's own.
    async fn claimed(&self, network: &Network, name: &str, owner: &Owner) -> Result<Option<Ipv4Addr>, PlugError> {
        let claims = self.claims();
        let found = claims.get_opt(name).await.map_err(|e| ApiError::new(format!("get IPClaim {name}"), e))?;
        let Some(mut claim) = found else { return Ok(None) };
        let address = claim.spec.address.parse().ok().filter(|a| network.subnet.contains(a));
        let address = address.ok_or_else(|| PlugError::ForeignClaim {
            claim: name.to_owned(),
            address: claim.spec.address.clone(),
            subnet: network.subnet,
        })?;
        if claim.spec.owner_uid != owner.uid {
            claim.spec.owner_uid.clone_from(&owner.uid);
            claim.spec.owner.clone_from(&owner.name);
            // With the version that was read: if the operator is just deleting it, this fails and the runtime tries again.
            let fail = |e| ApiError::new(format!("hand IPClaim {name} over to StatefulSet {}", owner.name), e);
            claims.replace(name, &PostParams::default(), &claim).await.map_err(fail)?;
        }
        Ok(Some(address))
    }

    async fn allocate(&self, network: &Network) -> Result<Reservation, PlugError> {
        let mut state = self.state.lock().await;
        if !state.blocks.contains_key(&network.name) {
            let own = self.own_blocks(network).await?.0;
            state.blocks.insert(network.name.clone(), own);
        }
        let used = self.used(&mut state, &network.name);
        for _ in 0..BLOCK_TRIES {
            let own = state.blocks.get(&network.name).map(Vec::as_slice).unwrap_or_default();
            if let Some(address) = free_address(network.subnet, own, &used) {
                return Ok(self.reserve(network, address));
            }
            let (own, taken) = self.own_blocks(network).await?;
            let is_news = state.blocks.insert(network.name.clone(), own.clone()) != Some(own);
            if is_news {
                continue;
            }
            let node = &self.cluster.node;
            let fail = |source| PlugError::NoAddress { network: network.name.clone(), source };
            let block = free_block(network.subnet, &taken, node).map_err(fail)?;
            if self.create_block(network, block).await? {
                state.blocks.entry(network.name.clone()).or_default().push(block);
            }
        }
        Err(PlugError::NotReady { network: network.name.clone(), reason: "other nodes took each block first".into() })
    }

    /// What may not be given: addresses of this node's pods, those on the way to be, and those that are claimed.
    fn used(&self, state: &mut State, network: &str) -> BTreeSet<Ipv4Addr> {
        let mut used: BTreeSet<Ipv4Addr> =
            self.journal.select(|e| e.network == network).into_iter().map(|e| e.address).collect();
        used.extend(self.claimed_addresses(state, network));
        let reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        used.extend(reserved.iter().filter(|(n, _)| n == network).map(|(_, address)| *address));
        used
    }

    fn claimed_addresses(&self, state: &mut State, network: &str) -> BTreeSet<Ipv4Addr> {
        let claims = self.cluster.claims.state();
        let seen: BTreeSet<String> = claims.iter().map(|c| c.name_any()).collect();
        state.fresh_claims.retain(|name, _| !seen.contains(name));
        let of_network = claims.iter().filter(|c| c.spec.network == network);
        let mut claimed: BTreeSet<Ipv4Addr> = of_network.filter_map(|c| c.spec.address.parse().ok()).collect();
        claimed.extend(state.fresh_claims.values().filter(|(n, _)| n == network).map(|(_, a)| *a));
        claimed
    }

    fn reserve(&self, network: &Network, address: Ipv4Addr) -> Reservation {
        let key = (network.name.clone(), address);
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone());
        Reservation { address, key, reserved: Arc::clone(&self.reserved) }
    }

    /// This node's blocks of a network, and everybody's.
    async fn own_blocks(&self, network: &Network) -> Result<(Vec<Ipv4Net>, BTreeSet<Ipv4Net>), ApiError> {
        let all = self.list_blocks().await?;
        let of_network = || all.iter().filter(|b| b.spec.network == network.name);
        let net = |b: &IPBlock| b.spec.cidr.parse::<Ipv4Net>().ok().filter(|n| network.subnet.contains(n));
        let own = of_network().filter(|b| b.spec.node == self.cluster.node).filter_map(net).collect();
        Ok((own, of_network().filter_map(net).collect()))
    }

    async fn list_blocks(&self) -> Result<Vec<IPBlock>, ApiError> {
        let listed = self.blocks().list(&ListParams::default()).await;
        listed.map(|l| l.items).map_err(|e| ApiError::new("list IPBlocks", e))
    }

    /// Claims a block; `false` if another node was faster.
    async fn create_block(&self, network: &Network, block: Ipv4Net) -> Result<bool, ApiError> {
        let name = format!("{}-{}", network.name, block.network().to_string().replace('.', "-"));
        let spec =
            IPBlockSpec { network: network.name.clone(), cidr: block.to_string(), node: self.cluster.node.clone() };
        match self.blocks().create(&PostParams::default(), &IPBlock::new(&name, spec)).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(false),
            Err(e) => Err(ApiError::new(format!("create IPBlock {name}"), e)),
        }
    }

    /// The networks that this node has blocks of.
    pub async fn networks_with_blocks(&self) -> Result<BTreeSet<String>, ApiError> {
        let all = self.list_blocks().await?;
        Ok(all.into_iter().filter(|b| b.spec.node == self.cluster.node).map(|b| b.spec.network).collect())
    }

    /// Gives a network's blocks back that nothing needs any more. A block with a claimed address stays this node's: returns
    /// whether none is left.
    pub async fn release(&self, network: &str) -> Result<bool, ApiError> {
        let mut state = self.state.lock().await;
        let is_reserved =
            self.reserved.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|(n, _)| n == network);
        if is_reserved || !self.journal.select(|e| e.network == network).is_empty() {
            return Ok(true);
        }
        let mut none_left = true;
        let claimed = self.claimed_addresses(&mut state, network);
        state.blocks.remove(network);
        for block in self.list_blocks().await? {
            let is_ours = block.spec.network == network && block.spec.node == self.cluster.node;
            let holds_claim =
                block.spec.cidr.parse::<Ipv4Net>().is_ok_and(|net| claimed.iter().any(|a| net.contains(a)));
            none_left &= !(is_ours && holds_claim);
            if is_ours && !holds_claim {
                let name = block.name_any();
                match self.blocks().delete(&name, &DeleteParams::default()).await {
                    Err(kube::Error::Api(status)) if status.is_not_found() => {}
                    Err(e) => return Err(ApiError::new(format!("delete IPBlock {name}"), e)),
                    Ok(_) => tracing::info!(block = name, "block given back"),
                }
            }
        }
        Ok(none_left)
    }

    fn blocks(&self) -> Api<IPBlock> {
        Api::all(self.cluster.client.clone())
    }

    fn claims(&self) -> Api<IPClaim> {
        Api::all(self.cluster.client.clone())
    }
}
