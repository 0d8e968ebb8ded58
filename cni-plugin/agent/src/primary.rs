//! The cluster's own network, where no other plugin makes it: pods have addresses of their Node's `spec.podCIDRs`, and each node routes to
//! the others'.
//!
//! What a node's pods have is in a journal of its own; the kernel follows that and the Nodes. Also where Portolan isn't primary (any more) the journal
//! is read: pods of before keep what they have, and nothing of them stays when they end.

mod nodes;
mod record;
mod verbs;

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client, runtime::reflector, runtime::watcher};
use portolan_net::{Dataplane, HostPort, Namespace, PodNetwork, next_address};
use tokio::sync::{Mutex, Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    agent::Agent,
    cluster,
    collect::UnplugError,
    error::PlugError,
    known::Known,
    settings::Settings,
    store::{JournalError, Kept, Store},
    underlay::{Underlay, Unreachable},
};

use record::{Last, PodRecord};

/// How often the kernel is made what is wanted without a cause: somebody may have flushed the host's rules.
const INTERVAL: Duration = Duration::from_secs(60);
/// How soon something that failed is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Why there is no pod network before the API server has answered.
const UNKNOWN: &str = "the cluster's Nodes are not known yet";

/// This node's part of the pod network.
pub(crate) struct Primary {
    /// All Nodes; none where another plugin makes the pod network.
    nodes: Option<reflector::Store<Node>>,
    node: String,
    underlay: Underlay,
    pods: Store<PodRecord>,
    last: Mutex<Last>,
    applied: Mutex<Applied>,
    changed: Arc<Notify>,
    served: watch::Sender<bool>,
    known: Arc<Known>,
    unreachable: Unreachable,
}

/// What the kernel was made since the start.
#[derive(Default)]
struct Applied {
    /// None until it was made once.
    network: Option<Arc<PodNetwork>>,
    /// None if it isn't known.
    ports: Option<Vec<HostPort>>,
    at: Option<Instant>,
    /// Why it isn't made.
    problem: String,
}

impl Primary {
    /// Reads what is kept, and begins to watch Nodes if Portolan is to make the pod network.
    pub fn open(
        settings: &Settings,
        underlay: Underlay,
        client: Client,
        known: Arc<Known>,
        shutdown: &CancellationToken,
    ) -> Result<Self, JournalError> {
        let changed = Arc::new(Notify::new());
        let all = watcher::Config::default();
        let watched = || cluster::follow(Api::all(client), all, nodes::slim, &changed, shutdown);
        Ok(Self {
            nodes: settings.primary.then(watched),
            node: settings.node_name.clone(),
            underlay,
            pods: Store::open(settings.pods())?,
            last: Mutex::new(Last::read(settings.last_pod())),
            applied: Mutex::new(Applied { problem: UNKNOWN.to_owned(), ..Applied::default() }),
            changed,
            served: watch::Sender::new(!settings.primary),
            known,
            unreachable: Unreachable::default(),
        })
    }

    /// Whether Portolan makes the pod network.
    pub fn is_enabled(&self) -> bool {
        self.nodes.is_some()
    }

    /// Waits until pods can be given what they are to have; at once where another plugin does that.
    pub async fn wait_until_served(&self) {
        // It ends with this only.
        let _ = self.served.subscribe().wait_for(|served| *served).await;
    }

    /// The pod network as it was made here, or why it wasn't.
    async fn network(&self) -> Result<Arc<PodNetwork>, PlugError> {
        let applied = self.applied.lock().await;
        applied.network.clone().ok_or_else(|| PlugError::NoPodNetwork { reason: applied.problem.clone() })
    }

    /// The number of nodes that this one can't send to.
    fn tell_unreachable(&self) -> usize {
        let nodes = self.nodes.as_ref().map(reflector::Store::state).unwrap_or_default();
        let unreachable = nodes::unreachable(&nodes, &self.node, self.underlay);
        self.unreachable.tell(self.underlay.vtep, &unreachable);
        unreachable.len()
    }

    /// Makes the kernel's part what the Nodes say.
    async fn follow(&self, dataplane: &Dataplane) -> Result<(), String> {
        let Some(nodes) = &self.nodes else {
            // Nobody needs it when the last pod of before is gone.
            let is_empty = self.pods.select(|_| true).is_empty();
            return if is_empty { dataplane.remove_pod_network().await.map_err(|e| e.to_string()) } else { Ok(()) };
        };
        let mut applied = self.applied.lock().await;
        let done = self.make(dataplane, nodes, &mut applied).await;
        if let Err(error) = &done {
            applied.problem.clone_from(error);
        }
        done
    }

    async fn make(
        &self,
        dataplane: &Dataplane,
        nodes: &reflector::Store<Node>,
        applied: &mut Applied,
    ) -> Result<(), String> {
        let wanted = nodes::network(&nodes.state(), &self.node, self.underlay)?;
        let is_made = applied.network.as_deref() == Some(&wanted) && applied.ports.is_some();
        if is_made && applied.at.is_some_and(|at| at.elapsed() < INTERVAL) {
            return Ok(());
        }
        dataplane.ensure_pod_network(&wanted).await.map_err(|e| e.to_string())?;
        applied.ports = None;
        self.set_rules(dataplane, &wanted, &mut applied.ports).await.map_err(|e| e.to_string())?;
        self.known.set_pod_network(&wanted).map_err(|e| e.to_string())?;
        applied.network = Some(Arc::new(wanted));
        applied.at = Some(Instant::now());
        self.served.send_replace(true);
        Ok(())
    }

    /// Goes on with the pod network that the former agent made, as long as nothing is heard of the Nodes.
    async fn resume(&self, dataplane: &Dataplane) {
        let mut applied = self.applied.lock().await;
        let Some(network) = self.known.pod_network() else { return };
        match self.set_rules(dataplane, &network, &mut applied.ports).await {
            Ok(()) => {
                applied.network = Some(Arc::new(network));
                self.served.send_replace(true);
            }
            Err(error) => applied.problem = error.to_string(),
        }
    }

    /// Makes the host's ports lead where the journal says. Before the network was made there is nothing to do: that does it.
    async fn follow_ports(&self, dataplane: &Dataplane) -> portolan_net::Result<()> {
        let mut applied = self.applied.lock().await;
        let Some(network) = applied.network.clone() else { return Ok(()) };
        self.set_rules(dataplane, &network, &mut applied.ports).await
    }

    async fn set_rules(
        &self,
        dataplane: &Dataplane,
        network: &PodNetwork,
        set: &mut Option<Vec<HostPort>>,
    ) -> portolan_net::Result<()> {
        // Read under the lock: of two who change them the later one has both.
        let pods = self.pods.select(|_| true);
        let wanted: Vec<HostPort> = pods.iter().filter(|pod| !pod.leaving).flat_map(PodRecord::host_ports).collect();
        if set.as_ref() != Some(&wanted) {
            let mut before = set.take().unwrap_or_default();
            before.extend(pods.iter().filter(|pod| pod.leaving).flat_map(PodRecord::host_ports));
            dataplane.set_pod_rules(network, &wanted, &before).await?;
            *set = Some(wanted);
        }
        Ok(())
    }

    /// Addresses for a pod, which are its own once this returns: one of each of the node's blocks.
    async fn give(&self, mut pod: PodRecord, network: &PodNetwork) -> Result<PodRecord, PlugError> {
        let mut last = self.last.lock().await;
        let used: BTreeSet<IpAddr> = self.pods.select(|_| true).iter().flat_map(|pod| pod.addresses.clone()).collect();
        for block in &network.blocks {
            let next = next_address(*block, &used, last.like(block.addr()));
            pod.addresses.push(next.ok_or(PlugError::NoPodAddress { block: *block })?);
        }
        self.pods.put(pod.clone())?;
        last.set(&pod.addresses)?;
        Ok(pod)
    }

    /// Takes a pod off, its journal's entry last: killed before, this is done again.
    async fn take_off(&self, dataplane: &Dataplane, pod: &PodRecord) -> Result<(), UnplugError> {
        if !pod.ports.is_empty() {
            // First of all: its address may be another pod's in a moment.
            self.pods.put(PodRecord { leaving: true, ..pod.clone() })?;
            self.follow_ports(dataplane).await?;
        }
        dataplane.remove_pod(&pod.link()).await?;
        self.pods.remove(&pod.id())?;
        Ok(())
    }

    /// Takes off the pods whose network namespace is gone, and removes links that the journal doesn't know. Nobody may add a pod meanwhile.
    pub async fn collect(&self, dataplane: &Dataplane) -> Result<(), UnplugError> {
        for pod in self.pods.select(|pod| Namespace::is_gone(dataplane.root(), &pod.netns)) {
            self.take_off(dataplane, &pod).await?;
            let (name, netns) = (pod.pod, pod.netns.display());
            tracing::info!(pod = name, %netns, "taken off the pod network: its namespace is gone");
        }
        let known: BTreeSet<String> = self.pods.select(|_| true).iter().map(PodRecord::link).collect();
        for link in dataplane.pods().await?.into_iter().filter(|link| !known.contains(link)) {
            dataplane.remove_pod(&link).await?;
            tracing::info!(link, "collected: the journal doesn't know it");
        }
        Ok(())
    }
}

/// Goes on without the Nodes, if nothing is heard of them; never ends.
async fn resume_alone(agent: &Agent) {
    agent.wait_until_alone().await;
    agent.primary.resume(&agent.dataplane).await;
    std::future::pending().await
}

/// Follows the Nodes until the agent ends.
pub(crate) async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    let primary = &agent.primary;
    if let Some(nodes) = &primary.nodes {
        // Before that none may be taken for gone.
        let synced = tokio::select! {
            synced = nodes.wait_until_ready() => synced.is_ok(),
            () = resume_alone(&agent) => false,
            () = shutdown.cancelled() => false,
        };
        if !synced {
            return;
        }
    }
    let mut unchecked: BTreeSet<String> = primary.pods.select(|_| true).iter().map(Kept::id).collect();
    loop {
        let unreachable = i64::try_from(primary.tell_unreachable()).unwrap_or(i64::MAX);
        agent.metrics.unreachable_pod_nodes.set(unreachable);
        let done = primary.follow(&agent.dataplane).await;
        if let Err(error) = &done {
            tracing::warn!(error, "the pod network is not what it should be");
        }
        agent.restore_pods(&mut unchecked).await;
        let wait = if done.is_err() || !unchecked.is_empty() { RETRY } else { INTERVAL };
        tokio::select! {
            () = primary.changed.notified() => {}
            () = tokio::time::sleep(wait) => {}
            () = shutdown.cancelled() => return,
        }
    }
}
