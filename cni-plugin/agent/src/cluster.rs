//! What the agent sees of the cluster: its own pods, all networks, slices and claims, kept up to date by watches.

use std::{
    fmt::Debug,
    hash::Hash,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt;
use k8s_openapi::{
    api::{
        core::v1::{Namespace, Node, Pod, Service},
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::{
        WatchStreamExt,
        reflector::{self, ObjectRef, Store},
        watcher,
    },
};
use portolan_cni::PodName;
use portolan_crds::{ContainerNetwork, IPClaim, NetworkNodeSlice};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, OnceCell};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{ApiError, PlugError},
    network::Network,
    pod,
};

/// How long a pod waits for its network to become ready.
const NETWORK_PATIENCE: Duration = Duration::from_secs(4);
/// How often it looks; the watch is what brings the news.
const NETWORK_POLL: Duration = Duration::from_millis(50);

/// The cluster, as far as this node needs it.
pub(crate) struct Cluster {
    pub client: Client,
    pub node: String,
    pub pods: Store<Pod>,
    pub networks: Store<ContainerNetwork>,
    pub slices: Store<NetworkNodeSlice>,
    pub claims: Store<IPClaim>,
    pub policies: Store<NetworkPolicy>,
    pub namespaces: Store<Namespace>,
    node_reference: OnceCell<OwnerReference>,
}

impl Cluster {
    /// Begins to watch; `changed` is told of everything that may change what this node does.
    pub fn watch(client: Client, node: &str, changed: &Arc<Notify>, shutdown: &CancellationToken) -> Self {
        let own_pods = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
        let all = watcher::Config::default;
        Self {
            pods: follow(Api::all(client.clone()), own_pods, wholly, changed, shutdown),
            networks: follow(Api::all(client.clone()), all(), wholly, changed, shutdown),
            slices: follow(Api::all(client.clone()), all(), wholly, changed, shutdown),
            claims: follow(Api::all(client.clone()), all(), wholly, changed, shutdown),
            policies: follow(Api::all(client.clone()), all(), wholly, changed, shutdown),
            namespaces: follow(Api::all(client.clone()), all(), wholly, changed, shutdown),
            client,
            node: node.to_owned(),
            node_reference: OnceCell::new(),
        }
    }

    /// Waits until each watch has seen everything once. Until then nothing may be taken for gone.
    pub async fn wait_until_synced(&self) -> Result<(), reflector::store::WriterDropped> {
        self.pods.wait_until_ready().await?;
        self.networks.wait_until_ready().await?;
        self.slices.wait_until_ready().await?;
        self.claims.wait_until_ready().await?;
        self.policies.wait_until_ready().await?;
        self.namespaces.wait_until_ready().await
    }

    /// The pod that a container runtime names. The watch may lag behind the kubelet, so what it lacks is asked for.
    pub async fn pod(&self, name: &PodName) -> Result<Arc<Pod>, PlugError> {
        let reference = ObjectRef::new(&name.name).within(&name.namespace);
        if let Some(pod) = self.pods.get(&reference).filter(|p| pod::is_pod(p, name.uid.as_deref())) {
            return Ok(pod);
        }
        let full_name = format!("{}/{}", name.namespace, name.name);
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &name.namespace);
        let found = api.get_opt(&name.name).await.map_err(|e| ApiError::new(format!("get pod {full_name}"), e))?;
        found.filter(|p| pod::is_pod(p, name.uid.as_deref())).map(Arc::new).ok_or(PlugError::NoPod(full_name))
    }

    /// A network by name. One that is applied together with its pods gets a moment to become ready: else the kubelet would
    /// wait ten seconds and more before it tries again.
    pub async fn network(&self, name: &str) -> Result<Network, PlugError> {
        let known = || self.networks.get(&ObjectRef::new(name)).and_then(|n| Network::new(&n).ok());
        let end = Instant::now() + NETWORK_PATIENCE;
        while Instant::now() < end {
            match known() {
                Some(network) => return Ok(network),
                None => tokio::time::sleep(NETWORK_POLL).await,
            }
        }
        let api: Api<ContainerNetwork> = Api::all(self.client.clone());
        let found = api.get_opt(name).await.map_err(|e| ApiError::new(format!("get ContainerNetwork {name}"), e))?;
        match found {
            Some(object) => Network::new(&object),
            None => Err(PlugError::NoSuchNetwork { given: name.to_owned(), known: self.network_names() }),
        }
    }

    fn network_names(&self) -> String {
        let mut names: Vec<String> = self.networks.state().iter().map(|n| n.name_any()).collect();
        names.sort();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    }

    /// What makes an object go with this node.
    pub async fn node_reference(&self) -> Result<&OwnerReference, ApiError> {
        self.node_reference
            .get_or_try_init(|| async {
                let api: Api<Node> = Api::all(self.client.clone());
                let fail = |e| ApiError::new(format!("get node {}", self.node), e);
                let node = api.get(&self.node).await.map_err(fail)?;
                Ok(OwnerReference {
                    api_version: Node::api_version(&()).into_owned(),
                    kind: Node::kind(&()).into_owned(),
                    name: node.name_any(),
                    uid: node.uid().unwrap_or_default(),
                    ..OwnerReference::default()
                })
            })
            .await
    }

    /// The address of the cluster's DNS Service.
    pub async fn cluster_dns(&self) -> Result<Option<std::net::IpAddr>, ApiError> {
        let api: Api<Service> = Api::namespaced(self.client.clone(), "kube-system");
        let fail = |e| ApiError::new("get Service kube-system/kube-dns", e);
        let service = api.get_opt("kube-dns").await.map_err(fail)?;
        Ok(service.and_then(|s| s.spec?.cluster_ip?.parse().ok()))
    }
}

#[cfg(test)]
impl Cluster {
    /// A cluster that is not watched: what is seen of its claims is what the writer is told.
    pub fn with_claims(client: Client, node: &str) -> (Self, reflector::store::Writer<IPClaim>) {
        let (claims, writer) = reflector::store();
        let cluster = Self {
            pods: reflector::store().0,
            networks: reflector::store().0,
            slices: reflector::store().0,
            claims,
            policies: reflector::store().0,
            namespaces: reflector::store().0,
            client,
            node: node.to_owned(),
            node_reference: OnceCell::new(),
        };
        (cluster, writer)
    }
}

/// What is seen is kept as it is.
fn wholly<K>(_: &mut K) {}

/// Keeps all objects of a kind up to date, each as `slim` leaves it; `changed` is told of each change.
pub(crate) fn follow<K>(
    api: Api<K>,
    config: watcher::Config,
    slim: fn(&mut K),
    changed: &Arc<Notify>,
    shutdown: &CancellationToken,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Hash + Eq + Clone,
{
    let (store, writer) = reflector::store();
    let (changed, shutdown) = (Arc::clone(changed), shutdown.clone());
    let events = watcher(api, config).default_backoff().modify(slim).reflect(writer);
    tokio::spawn(async move {
        let mut events = std::pin::pin!(events.take_until(shutdown.cancelled_owned()));
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
                Ok(_) => changed.notify_one(),
                Err(error) => tracing::warn!(%error, kind = %K::kind(&()), "watch interrupted; it goes on by itself"),
            }
        }
    });
    store
}
