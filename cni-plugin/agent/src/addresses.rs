//! Addresses: a node allocates from blocks that are its own (IPBlock, whose name is the lock), and keeps a StatefulSet pod's
//! addresses for it (IPClaim). A pod has one address of each family that its network has.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex, PoisonError},
};

use ipnet::IpNet;
use kube::ResourceExt;
use portolan_crds::{IPBlock, IPBlockSpec, IPClaim, IPClaimSpec, RESOLVER_RANGE, claim_name};
use portolan_net::{block_of, free_address, free_block, gateway};

use crate::{
    cluster::Cluster,
    error::{ApiError, PlugError},
    journal::{Endpoint, Journal},
    known::Known,
    network::Network,
    pod::Owner,
};

mod again;
mod registry;

use registry::{Registry, is_refusal};

/// How often another node may be faster to the same block before we give up for now.
const BLOCK_TRIES: usize = 8;

/// Who addresses are for.
pub(crate) struct Holder<'a> {
    pub namespace: &'a str,
    pub pod: &'a str,
    pub uid: &'a str,
    pub stateful_set: Option<&'a Owner>,
    /// Whether it asks the DNS server over this network.
    pub resolver: bool,
    /// Addresses that it is to have, at most one of a family.
    pub asked: &'a [IpAddr],
}

type Key = (String, IpAddr);

/// Addresses that nobody else is given; kept by the journal once they are there, and free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    /// One of each family that the network has, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// What the pod asks the DNS server from, if it has no IPv4 address for that.
    pub asks_from: Option<Ipv4Addr>,
    network: String,
    reserved: Arc<Mutex<BTreeSet<Key>>>,
}

impl Reservation {
    fn keep(&self, address: IpAddr) {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner).insert((self.network.clone(), address));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        for address in self.addresses.iter().copied().chain(self.asks_from.map(IpAddr::from)) {
            reserved.remove(&(self.network.clone(), address));
        }
    }
}

/// This node's addresses.
pub(crate) struct Addresses<R = Cluster> {
    registry: Arc<R>,
    journal: Arc<Journal>,
    known: Arc<Known>,
    reserved: Arc<Mutex<BTreeSet<Key>>>,
    state: tokio::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    /// This node's blocks by network, of both families, once they have been asked for.
    blocks: BTreeMap<String, Vec<IpNet>>,
    /// Networks of claims, by name and addresses, that we wrote or were told of and the watch hasn't shown yet.
    fresh_claims: BTreeMap<(String, Vec<IpAddr>), String>,
    /// The free address that was given last, by network and subnet; also when the blocks have been given back, as the next pod may get the same.
    last: BTreeMap<(String, IpNet), IpAddr>,
}

impl<R: Registry> Addresses<R> {
    pub fn new(registry: Arc<R>, journal: Arc<Journal>, known: Arc<Known>) -> Self {
        Self { registry, journal, known, reserved: Arc::default(), state: tokio::sync::Mutex::default() }
    }

    /// Addresses for a pod: its claim's if it has or may have one, else free ones.
    pub async fn acquire(&self, network: &Network, holder: &Holder<'_>) -> Result<Reservation, PlugError> {
        check_asked(network, holder)?;
        let mut reservation = match holder.stateful_set {
            Some(owner) => self.sticky(network, holder, owner).await?,
            None => self.allocate(network, holder, &[]).await?,
        };
        let mut state = self.state.lock().await;
        self.add_resolvers(&mut state, network, holder, &mut reservation)?;
        Ok(reservation)
    }

    /// What the pod asks the DNS server from, if it needs that.
    fn add_resolvers(
        &self,
        state: &mut State,
        network: &Network,
        holder: &Holder<'_>,
        reservation: &mut Reservation,
    ) -> Result<(), PlugError> {
        if holder.resolver && !network.has_ipv4() {
            let used = self.used(state, &network.name);
            let free = RESOLVER_RANGE.hosts().find(|address| !used.contains(&IpAddr::from(*address)));
            let free = free.ok_or_else(|| PlugError::ResolverRangeFull { network: network.name.clone() })?;
            reservation.keep(free.into());
            reservation.asks_from = Some(free);
        }
        Ok(())
    }

    /// The addresses of a StatefulSet's pod: those of its claim, which is made if there is none.
    async fn sticky(&self, network: &Network, holder: &Holder<'_>, owner: &Owner) -> Result<Reservation, PlugError> {
        let name = claim_name(&network.name, holder.namespace, holder.pod);
        let ended = self.ended_tries(&name).await;
        let claim = match self.registry.claim(&name).await {
            // Another sandbox of a pod that has its claim.
            Err(error) if !is_refusal(&error) => return self.had(network, holder).await.map_err(|_| error.into()),
            found => found?,
        };
        if let Some(claim) = claim {
            return self.claimed(network, holder, claim, owner).await;
        }
        // They have come to nothing.
        self.state.lock().await.fresh_claims.retain(|claim, _| !ended.contains(claim));
        let reservation = self.allocate(network, holder, &[]).await?;
        let mut spec = IPClaimSpec {
            network: network.name.clone(),
            namespace: holder.namespace.to_owned(),
            pod: holder.pod.to_owned(),
            owner: owner.name.clone(),
            owner_uid: owner.uid.clone(),
            node: Some(self.registry.node().to_owned()),
            ..IPClaimSpec::default()
        };
        set_addresses(&mut spec, &reservation.addresses);
        // Before it is asked for: who has lost the answer may have the claim all the same.
        self.remember(name.clone(), &reservation).await;
        match self.registry.create_claim(&IPClaim::new(&name, spec)).await {
            Ok(true) => Ok(reservation),
            // Another node was faster (or we were, and never heard of it): its addresses count.
            Ok(false) => {
                self.forget(&name, &reservation).await;
                match self.registry.claim(&name).await? {
                    Some(claim) => self.claimed(network, holder, claim, owner).await,
                    None => Err(PlugError::NotReady {
                        network: network.name.clone(),
                        reason: format!("IPClaim {name} came and went"),
                    }),
                }
            }
            Err(error) => {
                if is_refusal(&error) {
                    self.forget(&name, &reservation).await;
                }
                Err(error.into())
            }
        }
    }

    /// The addresses of a claim, which says from then on that the pod is on this node. One of an earlier StatefulSet of the same name passes over to
    /// the pod's own; one that lacks a family of the network gets an address of it.
    async fn claimed(
        &self,
        network: &Network,
        holder: &Holder<'_>,
        mut claim: IPClaim,
        owner: &Owner,
    ) -> Result<Reservation, PlugError> {
        let name = claim.name_any();
        let is_foreign = |text: &&String| {
            let address = text.parse::<IpAddr>();
            !address.is_ok_and(|address| network.subnets.iter().any(|subnet| subnet.contains(&address)))
        };
        let texts = [Some(&claim.spec.address), claim.spec.second_address.as_ref()];
        if let Some(address) = texts.into_iter().flatten().find(is_foreign) {
            let subnets: Vec<String> = network.subnets.iter().map(IpNet::to_string).collect();
            let (address, subnets) = (address.clone(), subnets.join(" or "));
            return Err(PlugError::ForeignClaim { claim: name, address, subnets });
        }
        let given: Vec<IpAddr> = claim.spec.addresses().collect();
        refuse_gateways(network, &name, &given)?;
        let reservation = self.allocate(network, holder, &given).await?;
        // The watch may show it only when the pod is on another node already.
        self.remember(name, &reservation).await;
        claim.spec.owner_uid.clone_from(&owner.uid);
        claim.spec.owner.clone_from(&owner.name);
        let former = claim.spec.node.replace(self.registry.node().to_owned());
        // It may run there still, and nobody can look: the address is not free before that has ended too.
        if let Some(former) = former.filter(|former| !claim.spec.nodes().any(|node| node == former))
            && !self.registry.has_node(&former).await?
        {
            claim.spec.former_nodes.push(former);
        }
        set_addresses(&mut claim.spec, &reservation.addresses);
        // Also if all of it is so already, with the version that was read: if the operator is just deleting it, one of the two fails.
        self.registry.replace_claim(&claim).await?;
        Ok(reservation)
    }

    /// What was tried to write of a claim, by tries that have ended.
    async fn ended_tries(&self, claim: &str) -> BTreeSet<(String, Vec<IpAddr>)> {
        let state = self.state.lock().await;
        let reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        let is_reserved = |network: &String, address: &IpAddr| reserved.contains(&(network.clone(), *address));
        let of_claim = state.fresh_claims.iter().filter(|((name, _), _)| name == claim);
        let ended = of_claim.filter(|((_, written), network)| !written.iter().any(|it| is_reserved(network, it)));
        ended.map(|(written, _)| written.clone()).collect()
    }

    async fn remember(&self, claim: String, reservation: &Reservation) {
        let written = (claim, reservation.addresses.clone());
        self.state.lock().await.fresh_claims.insert(written, reservation.network.clone());
    }

    /// What else is known of the claim stays: it may be another node's, of an address in a block of this one.
    async fn forget(&self, claim: &str, reservation: &Reservation) {
        let written = (claim.to_owned(), reservation.addresses.clone());
        self.state.lock().await.fresh_claims.remove(&written);
    }

    /// One address of each family that the network has: those that the pod has already, those that it asks for, and free ones for the rest.
    async fn allocate(
        &self,
        network: &Network,
        holder: &Holder<'_>,
        given: &[IpAddr],
    ) -> Result<Reservation, PlugError> {
        let mut state = self.state.lock().await;
        let (name, reserved) = (network.name.clone(), Arc::clone(&self.reserved));
        let mut reservation = Reservation { addresses: Vec::new(), asks_from: None, network: name, reserved };
        for subnet in &network.subnets {
            let of_subnet = |addresses: &[IpAddr]| addresses.iter().copied().find(|address| subnet.contains(address));
            let address = match (of_subnet(given), of_subnet(holder.asked)) {
                (Some(held), Some(asked)) if held != asked => {
                    let claim = claim_name(&network.name, holder.namespace, holder.pod);
                    return Err(PlugError::ClaimDiffers { claim, held, asked });
                }
                (Some(held), _) => held,
                (None, Some(asked)) => self.asked(&mut state, network, *subnet, asked, holder).await?,
                (None, None) => match self.former(&mut state, network, *subnet, holder.uid) {
                    Some(former) => former,
                    None => self.free(&mut state, network, *subnet).await?,
                },
            };
            // First on disk: who had it before is not to have it again.
            self.known.give(&network.name, address, holder.uid)?;
            reservation.keep(address);
            reservation.addresses.push(address);
        }
        Ok(reservation)
    }

    /// An address that a pod asks for. It is given if its block is this node's, or becomes so now: nobody else gives addresses of it.
    async fn asked(
        &self,
        state: &mut State,
        network: &Network,
        subnet: IpNet,
        address: IpAddr,
        holder: &Holder<'_>,
    ) -> Result<IpAddr, PlugError> {
        let block = block_of(subnet, address).ok_or_else(|| no_pods_address(network, address))?;
        self.own(state, network, address, block).await?;
        let (name, is_holder) = (&network.name, |e: &Endpoint| e.namespace == holder.namespace && e.pod == holder.pod);
        let plugged = self.journal.select(|e| e.network == *name && e.addresses().any(|a| a == address));
        let taken = |holder: String| PlugError::AddressTaken { network: name.clone(), address, holder };
        if let Some(other) = plugged.iter().find(|e| !is_holder(e)) {
            return Err(taken(format!("pod {}/{}", other.namespace, other.pod)));
        }
        // An earlier sandbox of the same pod may still have it, and gives it up.
        if plugged.is_empty() && self.used(state, name).contains(&address) {
            return Err(taken("a pod that is about to start, or a StatefulSet's (kubectl get ipclaims)".into()));
        }
        Ok(address)
    }

    /// Sees to it that an address is of a block of this node, which may claim the block for it.
    async fn own(&self, state: &mut State, network: &Network, address: IpAddr, block: IpNet) -> Result<(), PlugError> {
        let is_within = |own: &Vec<IpNet>| own.iter().any(|it| it.contains(&address));
        if state.blocks.get(&network.name).is_some_and(is_within) {
            return Ok(());
        }
        let (_, taken) = self.learn_blocks(state, network).await?;
        if state.blocks.get(&network.name).is_some_and(is_within) {
            return Ok(());
        }
        let is_taken = taken.iter().any(|it| it.contains(&block) || block.contains(it));
        if !is_taken && self.create_block(state, network, block).await? {
            return Ok(());
        }
        let all = self.registry.blocks().await?;
        let is_it = |b: &&Arc<IPBlock>| {
            b.spec.network == network.name
                && b.spec.cidr.parse().is_ok_and(|it: IpNet| it.contains(&block) || block.contains(&it))
        };
        let node = all.iter().find(is_it).map_or_else(|| "another".to_owned(), |b| b.spec.node.clone());
        Err(PlugError::ForeignBlock { network: network.name.clone(), address, block, node })
    }

    /// A free address of one subnet, of a new block if need be.
    async fn free(&self, state: &mut State, network: &Network, subnet: IpNet) -> Result<IpAddr, PlugError> {
        if !state.blocks.contains_key(&network.name) {
            self.learn_blocks(state, network).await?;
        }
        for _ in 0..BLOCK_TRIES {
            let used = self.used(state, &network.name);
            let own = state.blocks.get(&network.name).map(Vec::as_slice).unwrap_or_default();
            let of_subnet = (network.name.clone(), subnet);
            if let Some(address) = free_address(subnet, own, &used, state.last.get(&of_subnet).copied()) {
                state.last.insert(of_subnet, address);
                return Ok(address);
            }
            let (is_news, taken) = self.learn_blocks(state, network).await?;
            if is_news {
                continue;
            }
            let fail = |source| PlugError::NoAddress { network: network.name.clone(), source };
            let block = free_block(subnet, &taken, self.registry.node()).map_err(fail)?;
            self.create_block(state, network, block).await?;
        }
        Err(PlugError::NotReady { network: network.name.clone(), reason: "other nodes took each block first".into() })
    }

    /// What may not be given: addresses of this node's pods, those on the way to be, and those that are claimed.
    fn used(&self, state: &mut State, network: &str) -> BTreeSet<IpAddr> {
        let plugged = self.journal.select(|e| e.network == network);
        let of = |e: &Endpoint| e.addresses().chain(e.asks_from.map(IpAddr::from)).collect::<Vec<_>>();
        let mut used: BTreeSet<IpAddr> = plugged.iter().flat_map(of).collect();
        used.extend(self.claimed_addresses(state, network));
        let reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        used.extend(reserved.iter().filter(|(n, _)| n == network).map(|(_, address)| *address));
        used
    }

    fn claimed_addresses(&self, state: &mut State, network: &str) -> BTreeSet<IpAddr> {
        // A claim that was completed may be seen as it was before.
        state.fresh_claims.retain(|(name, written), _| {
            let seen = self.registry.seen_claim(name);
            !seen.is_some_and(|claim| written.iter().all(|address| claim.spec.addresses().any(|a| a == *address)))
        });
        let claims = self.registry.seen_claims();
        let of_network = claims.iter().filter(|c| c.spec.network == network);
        let mut claimed: BTreeSet<IpAddr> = of_network.flat_map(|c| c.spec.addresses()).collect();
        claimed.extend(state.fresh_claims.iter().filter(|(_, n)| *n == network).flat_map(|((_, written), _)| written));
        claimed
    }

    /// Asks which blocks of a network are this node's. Returns whether they are others than were known, and everybody's.
    async fn learn_blocks(&self, state: &mut State, network: &Network) -> Result<(bool, BTreeSet<IpNet>), PlugError> {
        let (mut own, mut taken) = (Vec::new(), BTreeSet::new());
        let known = state.blocks.get(&network.name).cloned().unwrap_or_default();
        for block in self.registry.blocks().await?.iter().filter(|block| block.spec.network == network.name) {
            let Ok(cidr) = block.spec.cidr.parse::<IpNet>() else { continue };
            if !network.subnets.iter().any(|subnet| subnet.contains(&cidr)) {
                continue;
            }
            taken.insert(cidr);
            // One that the operator is about to take back, as it was a gone node's, is written anew: then it is left alone, or is not this node's.
            if block.spec.node == self.registry.node()
                && (known.contains(&cidr) || self.registry.renew_block(block).await?)
            {
                own.push(cidr);
            }
        }
        let news: Vec<IpNet> = own.iter().filter(|block| !known.contains(block)).copied().collect();
        self.learn_claims(state, network, &news).await?;
        let is_news = known != own;
        self.known.set_blocks(&network.name, &own)?;
        state.blocks.insert(network.name.clone(), own);
        Ok((is_news, taken))
    }

    /// Claims a block, unless another node was faster: then nothing is said, as the next look shows it.
    async fn create_block(&self, state: &mut State, network: &Network, block: IpNet) -> Result<bool, PlugError> {
        let name = block_name(&network.name, block);
        let spec = IPBlockSpec {
            network: network.name.clone(),
            cidr: block.to_string(),
            node: self.registry.node().to_owned(),
        };
        if !self.registry.create_block(&IPBlock::new(&name, spec)).await? {
            return Ok(false);
        }
        self.learn_claims(state, network, &[block]).await?;
        let own = state.blocks.entry(network.name.clone()).or_default();
        own.push(block);
        self.known.set_blocks(&network.name, own)?;
        Ok(true)
    }

    /// Asks for claims of addresses of blocks that were another's: the watch may have been silent since before they were made.
    async fn learn_claims(&self, state: &mut State, network: &Network, blocks: &[IpNet]) -> Result<(), ApiError> {
        if blocks.is_empty() {
            return Ok(());
        }
        for claim in self.registry.claims().await?.iter().filter(|claim| claim.spec.network == network.name) {
            let addresses: Vec<IpAddr> = claim.spec.addresses().collect();
            if addresses.iter().any(|address| blocks.iter().any(|block| block.contains(address))) {
                state.fresh_claims.insert((claim.name_any(), addresses), network.name.clone());
            }
        }
        Ok(())
    }

    /// The networks that this node has blocks of.
    pub async fn networks_with_blocks(&self) -> Result<BTreeSet<String>, ApiError> {
        let all = self.registry.blocks().await?;
        Ok(all.into_iter().filter(|b| b.spec.node == self.registry.node()).map(|b| b.spec.network.clone()).collect())
    }

    /// The networks that this node was asked for addresses of, and whose blocks it hasn't given back since.
    pub async fn networks_in_use(&self) -> Vec<String> {
        self.state.lock().await.blocks.keys().cloned().collect()
    }

    /// Gives a network's blocks back that nothing needs any more. A block with a claimed address stays this node's: returns
    /// whether none is left.
    pub async fn release(&self, network: &str) -> Result<bool, PlugError> {
        let mut state = self.state.lock().await;
        let is_reserved =
            self.reserved.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|(n, _)| n == network);
        if is_reserved || !self.journal.select(|e| e.network == network).is_empty() {
            return Ok(true);
        }
        let mut none_left = true;
        let claimed = self.claimed_addresses(&mut state, network);
        // While nobody tells, they stay: other pods may need them.
        let all = self.registry.blocks().await?;
        state.blocks.remove(network);
        // Before they are: an agent that starts would take them for its own.
        self.known.set_blocks(network, &[])?;
        for block in all {
            let is_ours = block.spec.network == network && block.spec.node == self.registry.node();
            let holds_claim = block.spec.cidr.parse::<IpNet>().is_ok_and(|net| claimed.iter().any(|a| net.contains(a)));
            none_left &= !(is_ours && holds_claim);
            if is_ours && !holds_claim {
                self.registry.delete_block(&block).await?;
                tracing::info!(block = block.name_any(), "block given back");
            }
        }
        Ok(none_left)
    }
}

/// Each address that a pod asks for has to be of a subnet.
fn check_asked(network: &Network, holder: &Holder<'_>) -> Result<(), PlugError> {
    let is_foreign = |address: &&IpAddr| !network.subnets.iter().any(|subnet| block_of(*subnet, **address).is_some());
    holder.asked.iter().find(is_foreign).map_or(Ok(()), |address| Err(no_pods_address(network, *address)))
}

/// A claim that somebody wrote by hand may hold what is the gateway's by now.
fn refuse_gateways(network: &Network, claim: &str, given: &[IpAddr]) -> Result<(), PlugError> {
    let gateways: Vec<IpAddr> = network.subnets.iter().copied().map(gateway).collect();
    match given.iter().find(|address| network.egress && gateways.contains(address)) {
        Some(address) => {
            let help = format!("delete IPClaim {claim} to get another address");
            Err(PlugError::GatewaysAddress { network: network.name.clone(), address: *address, help })
        }
        None => Ok(()),
    }
}

fn no_pods_address(network: &Network, address: IpAddr) -> PlugError {
    let subnets: Vec<String> = network.subnets.iter().map(IpNet::to_string).collect();
    PlugError::NoPodsAddress { network: network.name.clone(), address, subnets: subnets.join(" or ") }
}

fn set_addresses(spec: &mut IPClaimSpec, addresses: &[IpAddr]) {
    let mut texts = addresses.iter().map(IpAddr::to_string);
    spec.address = texts.next().unwrap_or_default();
    spec.second_address = texts.next();
}

/// The name of a block's object, which is its lock: one name for a block, however its address may be written.
fn block_name(network: &str, block: IpNet) -> String {
    let address = match block.network() {
        IpAddr::V4(address) => address.octets().map(|octet| octet.to_string()).join("-"),
        IpAddr::V6(address) => address.segments().map(|group| format!("{group:04x}")).join("-"),
    };
    format!("{network}-{address}")
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
