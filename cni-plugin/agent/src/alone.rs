//! An agent that has started and hears nothing of the API server: what it does for pods that were here before.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::api::{core::v1::Pod, networking::v1::NetworkPolicy};
use kube::{ResourceExt, runtime::reflector::ObjectRef};
use portolan_cni::PodName;
use portolan_crds::NETWORKS_ANNOTATION;
use portolan_net::{Filter, port_name};
use tokio::sync::RwLockReadGuard;
use tokio_util::sync::CancellationToken;

use crate::{
    agent::Agent,
    annotation,
    error::PlugError,
    journal::Endpoint,
    known::{Had, KnownNetwork},
    network::Network,
    policy::is_about,
    store::JournalError,
    sync::Applied,
};

/// How long after its start the agent waits for the API server before it goes on with what was known.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often somebody who waits for that looks.
const POLL: Duration = Duration::from_millis(50);
/// How long the API server may take to tell of a pod that isn't known here.
const POD_PATIENCE: Duration = Duration::from_secs(5);
/// How often what is known of this node's pods is written down, if it has changed.
const INTERVAL: Duration = Duration::from_secs(2);

impl Agent {
    /// Whether the API server hasn't been heard of since the start, and there is something to go on with.
    pub(crate) fn is_alone(&self) -> bool {
        !self.is_synced() && self.started.elapsed() >= PATIENCE && !self.known.is_empty()
    }

    /// Waits until the API server has been heard of or has not, for as long as that makes a difference.
    pub(crate) async fn wait_for_news(&self) {
        while !self.is_synced() && !self.is_alone() && !self.known.is_empty() {
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until the agent is alone, if it ever is.
    pub(crate) async fn wait_until_alone(&self) {
        while !self.is_alone() {
            tokio::time::sleep(POLL).await;
        }
    }

    /// The pod that a container runtime names.
    pub(crate) async fn pod_named(&self, name: &PodName) -> Result<Arc<Pod>, PlugError> {
        if self.is_synced() {
            return self.cluster.pod(name).await;
        }
        match self.known.pod(name).filter(|_| self.is_alone()) {
            Some(pod) => Ok(pod),
            // It may be that only the watches are slow.
            None => {
                tokio::time::timeout(POD_PATIENCE, self.cluster.pod(name)).await.map_err(|_| PlugError::NotSynced)?
            }
        }
    }

    /// A network that a pod asks for.
    pub(crate) async fn network_named(&self, name: &str) -> Result<Network, PlugError> {
        if !self.is_alone() {
            return self.cluster.network(name).await;
        }
        self.known
            .network(name)
            .map(|known| known.network)
            .ok_or_else(|| unknown(name, "this network is not known here"))
    }

    /// Waits until a network that the former agent made has the rules that its policies needed when they were last heard of, with those of a pod
    /// that comes again. The network itself stays as the kernel has it: who is where isn't known.
    pub(crate) async fn prepare_alone(&self, network: &Network) -> Result<RwLockReadGuard<'_, Applied>, PlugError> {
        let name = &network.name;
        if self.dataplane.namespace(network.vni).is_err() {
            return Err(unknown(name, "there is no pod on this network here, and so no way to other nodes"));
        }
        if self.known.network(name).is_none_or(|known| known.policies.is_empty()) {
            return Ok(self.applied.read().await);
        }
        let mut applied = self.applied.write().await;
        let mut wanted = Filter::default();
        for endpoint in self.journal.select(|e| e.network == *name) {
            let filter = self.known.had(&endpoint.uid, name).and_then(|had| had.filter);
            let filter = filter.ok_or_else(|| unknown(name, "what its policies let pass is not known of each pod"))?;
            if !filter.is_open() {
                wanted.ports.insert(port_name(&endpoint.container, &endpoint.interface), filter);
            }
        }
        self.set_filter(&mut applied, (name, network.vni), wanted).await?;
        Ok(applied.downgrade())
    }

    /// Writes down what the next agent is to know of this node's pods.
    async fn remember(&self) -> Result<(), JournalError> {
        let pods = self.cluster.pods.state();
        let wishes = pods.iter().filter_map(|pod| annotation::parse(pod.annotations().get(NETWORKS_ANNOTATION)?).ok());
        let mut names: Vec<String> = wishes.flatten().map(|wish| wish.network).collect();
        names.sort_unstable();
        names.dedup();
        let policies = self.cluster.policies.state();
        let known = |name: &String| {
            let network = Network::new(&*self.cluster.networks.get(&ObjectRef::new(name))?).ok()?;
            let about = policies.iter().filter(|policy| is_about(policy, name));
            let version = |policy: &Arc<NetworkPolicy>| {
                format!("{} {}", policy.uid().unwrap_or_default(), policy.resource_version().unwrap_or_default())
            };
            let mut policies: Vec<String> = about.map(version).collect();
            policies.sort_unstable();
            Some(KnownNetwork { network, policies })
        };
        let networks: Vec<KnownNetwork> = names.iter().filter_map(known).collect();
        // Nobody sets other rules meanwhile.
        let applied = self.applied.read().await;
        let had = |endpoint: &Endpoint| Had {
            addresses: endpoint.addresses().collect(),
            filter: applied.filter_at(endpoint.vni, &port_name(&endpoint.container, &endpoint.interface)),
            redirected: endpoint.redirected,
        };
        let has = |uid: &str| -> BTreeMap<String, Had> {
            let endpoints = self.journal.select(|e| e.uid == uid);
            endpoints.iter().map(|endpoint| (endpoint.network.clone(), had(endpoint))).collect()
        };
        self.known.follow(&pods, has, networks)
    }
}

/// Why a pod can't be plugged in by an agent that is alone.
pub(crate) fn unknown(network: &str, reason: &'static str) -> PlugError {
    PlugError::Alone { network: network.to_owned(), reason }
}

/// Follows this node's pods until the agent ends. For an agent that has heard of all of them: who isn't heard of is forgotten.
pub(crate) async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    loop {
        if let Err(error) = agent.remember().await {
            tracing::warn!(%error, "an agent that starts without the API server will not know of all pods");
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
    }
}
