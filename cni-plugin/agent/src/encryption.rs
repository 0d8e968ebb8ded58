//! Encrypted networks: this node's keys, what the others say of theirs, and what the kernel makes of both.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use kube::runtime::reflector::ObjectRef;
use portolan_crds::{NetworkNodeSlice, NodeEncryption, NodeKey};
use portolan_net::{Encrypted, Encryption, PublicKey};

use crate::{
    agent::Agent,
    keys::{Keys, KeysError},
    rotation::{self, Said},
    sync::Applied,
};

/// How often the kernel is asked whether a handshake has come that is waited for.
const SOON: Duration = Duration::from_secs(1);
/// How often else.
const LATER: Duration = Duration::from_secs(30);
/// How long after a change it is looked at often.
const RESTLESS: Duration = Duration::from_secs(120);

/// Why an encrypted network can't be used on this node.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EncryptionError {
    #[error(transparent)]
    Net(#[from] portolan_net::Error),
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error("no encrypted network has status.keys yet; is portolan-operator running?")]
    NoGeneration,
}

/// What was done since the agent started.
#[derive(Default)]
pub(crate) struct Encrypting {
    keys: Option<Keys>,
    done: Option<Done>,
}

struct Done {
    wanted: Encryption,
    told: Encrypted,
    /// When it was looked at last.
    at: Instant,
    /// When it became what it is.
    since: Instant,
}

impl Done {
    /// Whether something is waited for that should come soon.
    fn is_restless(&self) -> bool {
        (self.wanted.keys.len() > 1 || !self.told.waiting.is_empty()) && self.since.elapsed() < RESTLESS
    }
}

impl Encrypting {
    /// Whether encrypted networks' way to other nodes has been made.
    pub fn is_made(&self) -> bool {
        self.done.is_some()
    }

    pub fn is_restless(&self) -> bool {
        self.done.as_ref().is_some_and(Done::is_restless)
    }

    fn sends(&self) -> u32 {
        self.done.as_ref().map_or(0, |done| sends(&done.told))
    }
}

/// Another node, as its newest slice has it.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Peer {
    vtep: IpAddr,
    keys: BTreeMap<u32, PublicKey>,
    sends: u32,
}

impl Agent {
    /// Makes encrypted networks' way to other nodes what it should be; `coming` is a network that is about to be set up. Returns what the
    /// other nodes are to be told, if there is any encrypted network here.
    pub(crate) async fn encrypt(
        &self,
        applied: &mut Applied,
        coming: Option<&str>,
    ) -> Result<Option<NodeEncryption>, EncryptionError> {
        let mut networks = self.encrypted_networks().0;
        networks.extend(coming.map(str::to_owned));
        if networks.is_empty() {
            return Ok(None);
        }
        let mut peers = peers(&self.cluster.node, &networks, &self.cluster.slices.state());
        peers.retain(|_, peer| self.underlay.reaches(peer.vtep));
        if !self.dataplane.has_encryption() {
            // Devices that were made from a namespace go with it.
            applied.networks.retain(|_, spec| !spec.encrypted);
            applied.encrypting.done = None;
        }
        let encrypting = &mut applied.encrypting;
        let mut keys = match &encrypting.keys {
            Some(keys) => keys.clone(),
            None => self.keys.read()?,
        };
        let generations = self.generations(&keys, encrypting.sends(), &peers)?;
        let kept = self.keys.keep(&mut keys, &generations);
        encrypting.keys = Some(keys.clone());
        kept?;
        let wanted = Encryption {
            vtep: self.underlay.vtep,
            underlay_mtu: self.underlay.mtu,
            port: self.wireguard_port,
            keys,
            peers: peers.into_values().map(|peer| (peer.vtep, peer.keys)).collect(),
        };
        if let Some(done) = encrypting.done.as_ref().filter(|done| done.wanted == wanted)
            && done.at.elapsed() < if done.is_restless() { SOON } else { LATER }
        {
            return Ok(Some(told(&done.told)));
        }
        let found = self.dataplane.ensure_encryption(&wanted).await?;
        let is_old = |done: &&Done| done.wanted == wanted && done.told == found;
        let since = encrypting.done.as_ref().filter(is_old).map_or_else(Instant::now, |done| done.since);
        self.metrics.waiting_nodes.set(i64::try_from(found.waiting.len()).unwrap_or(i64::MAX));
        let say = told(&found);
        encrypting.done = Some(Done { wanted, told: found, at: Instant::now(), since });
        Ok(Some(say))
    }

    /// Takes it all away when no encrypted network is left on this node.
    pub(crate) async fn forget_encryption(&self, applied: &mut Applied) -> Result<(), EncryptionError> {
        let (networks, are_known) = self.encrypted_networks();
        if !networks.is_empty() || !are_known {
            return Ok(());
        }
        applied.encrypting = Encrypting::default();
        self.metrics.waiting_nodes.set(0);
        if self.dataplane.has_encryption() {
            self.dataplane.remove_encryption().await?;
            tracing::info!("no encrypted network is left on this node");
        }
        Ok(self.keys.remove()?)
    }

    /// The encrypted networks that have pods here, and whether all networks that have are known.
    fn encrypted_networks(&self) -> (BTreeSet<String>, bool) {
        let (mut networks, mut are_known) = (BTreeSet::new(), true);
        for endpoint in self.journal.select(|_| true) {
            match self.cluster.networks.get(&ObjectRef::new(&endpoint.network)) {
                Some(network) if network.spec.encryption == portolan_crds::Encryption::WireGuard => {
                    networks.insert(endpoint.network);
                }
                Some(_) => {}
                None => are_known = false,
            }
        }
        (networks, are_known)
    }

    /// What the other nodes were told last.
    pub(crate) fn told_before(&self) -> Option<NodeEncryption> {
        let slices = self.cluster.slices.state();
        slices
            .iter()
            .filter(|slice| slice.spec.node == self.cluster.node)
            .find_map(|slice| slice.spec.encryption.clone())
    }

    fn generations(
        &self,
        keys: &Keys,
        sends: u32,
        peers: &BTreeMap<String, Peer>,
    ) -> Result<BTreeSet<u32>, EncryptionError> {
        let networks = self.cluster.networks.state();
        let newest =
            networks.iter().filter_map(|network| network.status.as_ref()?.keys.as_ref()).map(|keys| keys.generation);
        let newest = newest.max().ok_or(EncryptionError::NoGeneration)?;
        let own = Said { keys: keys.keys().copied().collect(), sends };
        let said = |peer: &Peer| Said { keys: peer.keys.keys().copied().collect(), sends: peer.sends };
        let peers: Vec<Said> = peers.values().map(said).collect();
        let wanted = rotation::wanted(&own, &peers, newest);
        if wanted != own.keys {
            tracing::info!(before = ?own.keys, after = ?wanted, "generations of this node's keys");
        }
        Ok(wanted)
    }
}

/// The oldest generation by which packets are sent; of the newest key if there are none to send to.
fn sends(told: &Encrypted) -> u32 {
    told.oldest.or(told.keys.keys().next_back().copied()).unwrap_or(0)
}

fn told(found: &Encrypted) -> NodeEncryption {
    let key = |(generation, key): (&u32, &PublicKey)| NodeKey { generation: *generation, public_key: key.to_string() };
    NodeEncryption { keys: found.keys.iter().map(key).collect(), sends: sends(found) }
}

/// The other nodes that have one of the networks and say how they are to be reached, by name. What was written last counts, of a node's
/// slices as of nodes with the same address.
fn peers(own: &str, networks: &BTreeSet<String>, slices: &[impl Borrow<NetworkNodeSlice>]) -> BTreeMap<String, Peer> {
    let written = |slice: &NetworkNodeSlice| -> u64 {
        slice.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
    };
    let mut slices: Vec<&NetworkNodeSlice> = slices
        .iter()
        .map(Borrow::borrow)
        .filter(|slice| slice.spec.node != own && networks.contains(&slice.spec.network))
        .filter(|slice| slice.metadata.deletion_timestamp.is_none())
        .collect();
    slices.sort_by_key(|slice| written(slice));
    let mut peers: BTreeMap<String, Peer> = BTreeMap::new();
    for slice in slices {
        if let Some(peer) = peer(slice) {
            peers.retain(|_, other| other.vtep != peer.vtep);
            peers.insert(slice.spec.node.clone(), peer);
        }
    }
    peers
}

fn peer(slice: &NetworkNodeSlice) -> Option<Peer> {
    let says = slice.spec.encryption.as_ref()?;
    let key = |key: &NodeKey| Some((key.generation, key.public_key.parse().ok()?));
    let keys: BTreeMap<u32, PublicKey> = says.keys.iter().filter_map(key).collect();
    Some(Peer { vtep: slice.spec.vtep.parse().ok()?, keys, sends: says.sends }).filter(|peer| !peer.keys.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::NetworkNodeSliceSpec;

    fn key(number: u8) -> PublicKey {
        PublicKey([number; 32])
    }

    fn slice(network: &str, node: &str, vtep: u8, version: &str, generations: &[u32]) -> NetworkNodeSlice {
        let keys = generations
            .iter()
            .map(|it| NodeKey { generation: *it, public_key: key(vtep + u8::try_from(*it).unwrap()).to_string() });
        let encryption = NodeEncryption { keys: keys.collect(), sends: generations[0] };
        let spec = NetworkNodeSliceSpec {
            network: network.into(),
            node: node.into(),
            vtep: format!("192.0.2.{vtep}"),
            encryption: Some(encryption),
            ..NetworkNodeSliceSpec::default()
        };
        let mut slice = NetworkNodeSlice::new(&format!("{network}.{node}"), spec);
        slice.metadata.resource_version = Some(version.into());
        slice
    }

    fn last(vtep: IpAddr) -> u8 {
        vtep.to_string().rsplit('.').next().unwrap().parse().unwrap()
    }

    fn named(slices: &[NetworkNodeSlice]) -> Vec<(String, u8, Vec<u32>)> {
        let networks = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        let peers = peers("own", &networks, slices).into_iter();
        peers.map(|(name, peer)| (name, last(peer.vtep), peer.keys.into_keys().collect())).collect()
    }

    #[test]
    fn those_are_peers_who_share_an_encrypted_network() {
        let mut silent = slice("a", "silent", 5, "5", &[1]);
        silent.spec.encryption = None;
        let mut wrong = slice("a", "wrong", 6, "6", &[1]);
        wrong.spec.encryption.as_mut().unwrap().keys[0].public_key = "no key".into();
        let slices = [
            slice("a", "own", 1, "1", &[1]),
            slice("a", "x", 2, "2", &[1]),
            slice("c", "y", 3, "3", &[1]),
            silent,
            wrong,
        ];
        assert_eq!(named(&slices), [("x".to_owned(), 2, vec![1])]);
    }

    #[test]
    fn what_a_node_said_last_counts() {
        let slices = [slice("a", "x", 2, "10", &[1, 2]), slice("b", "x", 2, "9", &[1])];
        assert_eq!(named(&slices), [("x".to_owned(), 2, vec![1, 2])]);
        let replaced = [slice("a", "old", 2, "9", &[1]), slice("a", "new", 2, "10", &[2])];
        assert_eq!(named(&replaced), [("new".to_owned(), 2, vec![2])], "it has the address now");
    }

    #[test]
    fn what_is_told_has_no_secret_in_it() {
        let keys = BTreeMap::from([(3, key(1)), (4, key(2))]);
        let found = Encrypted { keys, oldest: Some(3), ..Encrypted::default() };
        let said = told(&found);
        assert_eq!((said.sends, said.keys[1].public_key.clone()), (3, key(2).to_string()));
        assert_eq!(told(&Encrypted { oldest: None, ..found }).sends, 4, "nobody is sent to");
    }
}
