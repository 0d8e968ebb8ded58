//! What this node knew of its pods, its networks and its blocks when it last heard from the API server: an agent that starts while that is away
//! gives those pods again what they had.
//!
//! It is good for one boot. While a machine is off, its Node object may be deleted and its blocks be given to others, and nothing on it would tell;
//! as long as it is on, this is what an agent that had not ended would remember.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use kube::ResourceExt;
use portolan_cni::PodName;
use portolan_net::{PodNetwork, PortFilter};
use serde::{Deserialize, Serialize};

use crate::{
    network::Network,
    pod,
    store::{JournalError, Kept, Store},
};

/// Another one after each start of the machine (proc_sys_kernel(5)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Annotations of ours and of the kubelet's; others are none of this node's business.
const ANNOTATIONS: [&str; 2] = ["portolan.dev/", "kubernetes.io/config."];

/// A pod of this node that may be given another sandbox.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct KnownPod {
    /// As much of it as plugging it in needs.
    pod: Pod,
    /// By network.
    had: BTreeMap<String, Had>,
}

/// What a pod had on a network.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub(crate) struct Had {
    /// Its addresses, unless they were given to another pod since.
    pub addresses: Vec<IpAddr>,
    /// What its policies let pass at its port; none if that wasn't known.
    pub filter: Option<PortFilter>,
    /// Where it asked for names and was answered by our DNS server, if it was made while admission was away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirected: Option<Ipv4Addr>,
}

/// A network that one of these pods is on.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct KnownNetwork {
    pub network: Network,
    /// The versions of the policies that are about it.
    pub policies: Vec<String>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Blocks {
    network: String,
    blocks: Vec<IpNet>,
}

impl Kept for KnownPod {
    fn id(&self) -> String {
        self.pod.uid().unwrap_or_default()
    }
}

impl Kept for KnownNetwork {
    fn id(&self) -> String {
        self.network.name.clone()
    }
}

impl Kept for Blocks {
    fn id(&self) -> String {
        self.network.clone()
    }
}

impl Kept for PodNetwork {
    fn id(&self) -> String {
        "pod-network".to_owned()
    }
}

/// All of it, on disk.
#[derive(Debug)]
pub(crate) struct Known {
    pods: Store<KnownPod>,
    networks: Store<KnownNetwork>,
    blocks: Store<Blocks>,
    pod_networks: Store<PodNetwork>,
    /// Who has it may read what pods have and write it down.
    writing: Mutex<()>,
}

impl Known {
    /// Reads what is known in a directory. What is of another boot, or can't be read, is not known.
    pub fn open(directory: &Path) -> Result<Self, JournalError> {
        let boot = fs::read_to_string(BOOT_ID).ok();
        let is_of_this = boot.is_some() && fs::read_to_string(directory.join("boot")).ok() == boot;
        if is_of_this {
            match Self::read(directory) {
                Ok(known) => return Ok(known),
                Err(error) => tracing::warn!(%error, "what was known of this node's pods can't be read"),
            }
        }
        match fs::remove_dir_all(directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(JournalError::new(directory, "remove", error));
            }
            _ => {}
        }
        let known = Self::read(directory)?;
        if let Some(boot) = boot {
            let file = directory.join("boot");
            fs::write(&file, boot).map_err(|error| JournalError::new(&file, "write", error))?;
        }
        Ok(known)
    }

    fn read(directory: &Path) -> Result<Self, JournalError> {
        Ok(Self {
            pods: Store::open(directory.join("pods"))?,
            networks: Store::open(directory.join("networks"))?,
            blocks: Store::open(directory.join("blocks"))?,
            pod_networks: Store::open(directory.join("pod-network"))?,
            writing: Mutex::default(),
        })
    }

    /// Whether there is any pod that could be plugged in without the API server.
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }

    /// The pod that a container runtime names. Only its UID says that it is the same one.
    pub fn pod(&self, name: &PodName) -> Option<Arc<Pod>> {
        let uid = name.uid.as_deref()?;
        let is_it = |known: &KnownPod| {
            let pod = &known.pod;
            pod.name_any() == name.name
                && pod.namespace().as_deref() == Some(&name.namespace)
                && pod::is_pod(pod, Some(uid))
        };
        self.pods.select(is_it).pop().map(|known| Arc::new(known.pod))
    }

    pub fn network(&self, name: &str) -> Option<KnownNetwork> {
        self.networks.select(|known| known.network.name == name).pop()
    }

    /// What a pod had on a network.
    pub fn had(&self, uid: &str, network: &str) -> Option<Had> {
        self.pods.select(|known| known.id() == uid).pop()?.had.remove(network)
    }

    /// Whether an address is of a block of this node.
    pub fn has_block_of(&self, network: &str, address: IpAddr) -> bool {
        let is_of = |known: &Blocks| known.network == network && known.blocks.iter().any(|it| it.contains(&address));
        !self.blocks.select(is_of).is_empty()
    }

    /// Writes down which blocks of a network are this node's.
    pub fn set_blocks(&self, network: &str, blocks: &[IpNet]) -> Result<(), JournalError> {
        if blocks.is_empty() {
            return self.blocks.remove(network).map(drop);
        }
        let blocks = Blocks { network: network.to_owned(), blocks: blocks.to_vec() };
        put_if_new(&self.blocks, blocks)
    }

    /// The pod network, as it was made last.
    pub fn pod_network(&self) -> Option<PodNetwork> {
        self.pod_networks.select(|_| true).pop()
    }

    /// Writes down what the pod network is.
    pub fn set_pod_network(&self, network: &PodNetwork) -> Result<(), JournalError> {
        put_if_new(&self.pod_networks, network.clone())
    }

    /// An address is about to be given to a pod: no other may be given it again.
    pub fn give(&self, network: &str, address: IpAddr, uid: &str) -> Result<(), JournalError> {
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let has_it = |known: &KnownPod| known.had.get(network).is_some_and(|had| had.addresses.contains(&address));
        for mut other in self.pods.select(|known| has_it(known) && known.id() != uid) {
            other.had.remove(network);
            self.pods.put(other)?;
        }
        Ok(())
    }

    /// Makes what is known of pods what they have; `has` tells what a pod has now, by network, of which there is none while its sandbox is made
    /// anew: then it is what it had.
    pub fn follow(
        &self,
        pods: &[Arc<Pod>],
        has: impl Fn(&str) -> BTreeMap<String, Had>,
        networks: Vec<KnownNetwork>,
    ) -> Result<(), JournalError> {
        let is_as_before = |network: &String| {
            let now = networks.iter().find(|it| it.network.name == *network);
            self.network(network).map(|before| before.policies) == now.map(|now| now.policies.clone())
        };
        for pod in pods.iter().filter(|pod| may_start(pod)) {
            let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            let uid = pod.uid().unwrap_or_default();
            let before = self.pods.select(|known| known.id() == uid).pop();
            let mut had = before.as_ref().map(|known| known.had.clone()).unwrap_or_default();
            // What was right when it was plugged in isn't any more.
            had.iter_mut().filter(|(network, _)| !is_as_before(network)).for_each(|(_, had)| had.filter = None);
            had.extend(has(&uid));
            let after = KnownPod { pod: slim(pod), had };
            if before.as_ref() != Some(&after) {
                self.pods.put(after)?;
            }
        }
        let is_there = |uid: &String| pods.iter().any(|pod| may_start(pod) && pod.uid().as_ref() == Some(uid));
        for gone in self.pods.select(|known| !is_there(&known.id())) {
            self.pods.remove(&gone.id())?;
        }
        let is_named = |known: &KnownNetwork| networks.iter().any(|it| it.network.name == known.network.name);
        for gone in self.networks.select(|known| !is_named(known)) {
            self.networks.remove(&gone.id())?;
        }
        // Last: until all pods are told, it is looked at again.
        networks.iter().cloned().try_for_each(|network| put_if_new(&self.networks, network))
    }
}

fn put_if_new<T: Kept + PartialEq>(store: &Store<T>, thing: T) -> Result<(), JournalError> {
    match store.select(|there| there.id() == thing.id()).first() {
        Some(there) if *there == thing => Ok(()),
        _ => store.put(thing),
    }
}

/// Whether the kubelet may make a sandbox for a pod.
fn may_start(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    let on_host = pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
    pod::is_current(pod) && !on_host && !matches!(phase, Some("Succeeded" | "Failed"))
}

/// What plugging a pod in needs of it: nothing of what its containers are told.
fn slim(pod: &Pod) -> Pod {
    let metadata = &pod.metadata;
    let is_ours = |(name, _): &(&String, &String)| ANNOTATIONS.iter().any(|prefix| name.starts_with(prefix));
    let annotations = pod.annotations().iter().filter(is_ours);
    let mut slim = Pod::default();
    slim.metadata.name.clone_from(&metadata.name);
    slim.metadata.namespace.clone_from(&metadata.namespace);
    slim.metadata.uid.clone_from(&metadata.uid);
    slim.metadata.labels.clone_from(&metadata.labels);
    slim.metadata.owner_references.clone_from(&metadata.owner_references);
    slim.metadata.annotations = Some(annotations.map(|(name, value)| (name.clone(), value.clone())).collect());
    slim.spec = pod.spec.as_ref().map(|spec| PodSpec {
        dns_config: spec.dns_config.clone(),
        dns_policy: spec.dns_policy.clone(),
        host_network: spec.host_network,
        ..PodSpec::default()
    });
    slim
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, more: serde_json::Value) -> Arc<Pod> {
        let mut pod = json!({"metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"),
                "annotations": {"portolan.dev/networks": "backend", "other.example/token": "secret"}},
            "spec": {"containers": [{"name": "c", "env": [{"name": "TOKEN", "value": "secret"}]}]}});
        if let Some(fields) = more.as_object() {
            fields.iter().for_each(|(name, value)| pod[name] = value.clone());
        }
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn had(address: &str) -> BTreeMap<String, Had> {
        BTreeMap::from([("backend".into(), Had { addresses: vec![address.parse().unwrap()], ..Had::default() })])
    }

    fn addresses(known: &Known, name: &str) -> Vec<String> {
        let had = known.had(&format!("uid-{name}"), "backend").unwrap_or_default();
        had.addresses.iter().map(IpAddr::to_string).collect()
    }

    fn name(name: &str, uid: Option<&str>) -> PodName {
        PodName { namespace: "shop".into(), name: name.into(), uid: uid.map(str::to_owned) }
    }

    #[test]
    fn is_what_it_was_after_a_restart_of_the_agent_and_nothing_after_one_of_the_machine() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("known");
        let known = Known::open(&at).unwrap();
        assert!(known.is_empty());
        known.follow(&[pod("web", json!({}))], |_| had("10.32.0.5"), vec![]).unwrap();
        known.set_blocks("backend", &["10.32.0.0/26".parse().unwrap()]).unwrap();
        let again = Known::open(&at).unwrap();
        assert_eq!(addresses(&again, "web"), ["10.32.0.5"]);
        assert!(again.pod(&name("web", Some("uid-web"))).is_some());
        assert!(again.pod(&name("web", Some("another"))).is_none() && again.pod(&name("web", None)).is_none());
        let has = |known: &Known, address: &str| known.has_block_of("backend", address.parse().unwrap());
        assert!(has(&again, "10.32.0.63") && !has(&again, "10.32.0.64"));
        again.set_blocks("backend", &[]).unwrap();
        assert!(!has(&Known::open(&at).unwrap(), "10.32.0.63"));
        // What can't be read is not known, and never keeps the agent from starting.
        fs::write(at.join("pods/uid-web.json"), "{").unwrap();
        assert!(Known::open(&at).unwrap().is_empty());
        again.follow(&[pod("web", json!({}))], |_| had("10.32.0.5"), vec![]).unwrap();
        fs::write(at.join("boot"), "another").unwrap();
        assert!(Known::open(&at).unwrap().is_empty() && Known::open(&at).unwrap().is_empty());
    }

    #[test]
    fn what_was_given_to_another_pod_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let known = Known::open(directory.path()).unwrap();
        let both = [pod("a", json!({})), pod("b", json!({}))];
        let has = |uid: &str| had(if uid == "uid-a" { "10.32.0.5" } else { "10.32.0.6" });
        known.follow(&both, has, vec![]).unwrap();
        // Its sandbox is made anew.
        known.follow(&both, |_| BTreeMap::new(), vec![]).unwrap();
        known.give("backend", "10.32.0.5".parse().unwrap(), "uid-a").unwrap();
        known.give("frontend", "10.32.0.5".parse().unwrap(), "uid-b").unwrap();
        assert_eq!(
            (addresses(&known, "a"), addresses(&known, "b")),
            (vec!["10.32.0.5".into()], vec!["10.32.0.6".into()])
        );
        known.give("backend", "10.32.0.5".parse().unwrap(), "uid-c").unwrap();
        let known = Known::open(directory.path()).unwrap();
        assert_eq!((addresses(&known, "a"), addresses(&known, "b")), (vec![], vec!["10.32.0.6".to_owned()]));
    }

    #[test]
    fn a_pod_that_gets_no_other_sandbox_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let known = Known::open(directory.path()).unwrap();
        let ends = [
            json!({"status": {"phase": "Succeeded"}}),
            json!({"metadata": {"name": "web", "namespace": "shop", "uid": "uid-web", "deletionTimestamp": "2026-01-01T00:00:00Z"}}),
            json!({"spec": {"containers": [], "hostNetwork": true}}),
        ];
        for more in ends {
            known.follow(&[pod("web", json!({}))], |_| had("10.32.0.5"), vec![]).unwrap();
            assert!(!known.is_empty());
            known.follow(&[pod("web", more)], |_| had("10.32.0.5"), vec![]).unwrap();
            assert!(known.is_empty());
        }
    }

    #[test]
    fn nothing_is_kept_of_what_containers_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let known = Known::open(directory.path()).unwrap();
        known.follow(&[pod("web", json!({}))], |_| BTreeMap::new(), vec![]).unwrap();
        let text = fs::read_to_string(directory.path().join("pods/uid-web.json")).unwrap();
        assert!(text.contains("portolan.dev/networks") && !text.contains("secret"), "{text}");
    }
}
