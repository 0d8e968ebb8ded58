//! `portolan-csi controller`: provisions volumes, gives them back, and attaches them, which may mean to move them.
//!
//! Loops over the API, each driven by watches, and the CSI Controller service for the sidecars. None keeps state of its own: each
//! looks at the objects as they are now.

mod attach;
mod capacity;
pub(crate) mod decide;
mod drain;
mod encryption;
mod migration;
mod provision;
mod reading;
mod reclaim;
mod service;
pub(crate) mod snapshots;
mod source;
pub(crate) mod volumes;
mod wish;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::{StorageClass, VolumeAttachment, VolumeAttributesClass};
use kube::api::{Patch, PatchParams};
use kube::runtime::controller::Action;
use kube::{Api, Client, Config, Resource, ResourceExt};
use portolan_crds::{DRIVER, PortableSnapshot, PortableVolume, StorageNode};
use portolan_runtime::client::patient;
use portolan_runtime::events::Events;
use portolan_runtime::http::{self, Health};
use portolan_runtime::leader;
use prometheus_client::metrics::counter::Counter;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// Name of the leader's Lease.
const LEASE: &str = "portolan-csi-controller";
/// How often an object is looked at when no event asks for it.
const RESYNC: Duration = Duration::from_secs(300);
/// Annotation of a PortableVolume: it has had a PersistentVolume, so that it isn't left over when it has none.
const PROVISIONED: &str = "portolan.dev/provisioned";
/// Annotation of a PersistentVolume: which driver made it (kubernetes.io, well-known annotations).
const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";

/// What the controller is told at its start.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// TCP port of health and metrics.
    #[arg(long, env = "HTTP_PORT", default_value_t = 8081)]
    pub http_port: u16,
    /// Value of the topology key that new volumes ask of a node.
    #[arg(long, env = "ZONE_OF_POOL", default_value = "default")]
    pub zone_of_pool: String,
    /// The Unix socket at which the CSI Controller service is answered, for the sidecars; none if not given.
    #[arg(long, env = "CSI_SOCKET")]
    pub csi_socket: Option<PathBuf>,
    /// This process's name among those that may lead.
    #[arg(long, env = "POD_NAME", default_value = "portolan-csi-controller")]
    pub pod_name: String,
}

/// What the loops share.
pub(crate) struct Hub {
    client: Client,
    /// Hands a refusal on (429) that another client would try again for a minute: that of a PodDisruptionBudget is an answer.
    evictions: Client,
    classes: Api<StorageClass>,
    attribute_classes: Api<VolumeAttributesClass>,
    pvs: Api<PersistentVolume>,
    volumes: Api<PortableVolume>,
    snapshots: Api<PortableSnapshot>,
    storage_nodes: Api<StorageNode>,
    attachments: Api<VolumeAttachment>,
    nodes: Api<Node>,
    events: Events,
    zone: String,
    provisioned: Counter,
    moves: Counter,
}

impl Hub {
    pub(crate) fn new(client: Client, zone: String, registry: &mut prometheus_client::registry::Registry) -> Self {
        let (provisioned, moves) = (Counter::default(), Counter::default());
        registry.register("volumes_provisioned", "PersistentVolumes made", provisioned.clone());
        registry.register("moves_started", "Moves asked of nodes", moves.clone());
        Self {
            evictions: client.clone(),
            classes: Api::all(client.clone()),
            attribute_classes: Api::all(client.clone()),
            pvs: Api::all(client.clone()),
            volumes: Api::all(client.clone()),
            snapshots: Api::all(client.clone()),
            storage_nodes: Api::all(client.clone()),
            attachments: Api::all(client.clone()),
            nodes: Api::all(client.clone()),
            events: Events::new(client.clone(), DRIVER),
            client,
            zone,
            provisioned,
            moves,
        }
    }

    fn claims(&self, namespace: &str) -> Api<PersistentVolumeClaim> {
        Api::namespaced(self.client.clone(), namespace)
    }

    fn pods(&self, namespace: &str) -> Api<Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }
}

/// Runs the controller until `shutdown`, or until another process leads.
///
/// # Errors
/// When the API can't be used, the port can't be listened at, or leadership is lost.
pub async fn run(options: Options, shutdown: CancellationToken) -> anyhow::Result<()> {
    let mut config = Config::infer().await.context("can't find the Kubernetes API")?;
    let client = patient(Client::try_from(config.clone()).context("can't use the Kubernetes API")?);
    config.default_retry = false;
    let evictions = patient(Client::try_from(config).context("can't use the Kubernetes API")?);
    let mut registry = prometheus_client::registry::Registry::with_prefix("portolan");
    let hub = Arc::new(Hub { evictions, ..Hub::new(client.clone(), options.zone_of_pool, &mut registry) });
    let health = Health::new();
    // One that waits for its turn to lead is as ready as the leader.
    health.set_ready(true);
    let address = portolan_runtime::address::everywhere(options.http_port);
    let http = http::serve(address, health, Arc::new(registry), shutdown.clone());
    let namespace = portolan_runtime::namespace();
    // Every process answers CSI calls: what they ask for is in the API, where the leader finds it.
    let csi = service::serve(hub.clone(), options.csi_socket, shutdown.clone());
    let work = |token: CancellationToken| async move {
        tokio::select! {
            () = token.cancelled() => {}
            _ = async {
                tokio::join!(
                    provision::run(hub.clone()),
                    reclaim::run(hub.clone()),
                    volumes::run(hub.clone()),
                    snapshots::run(hub.clone()),
                    capacity::run(hub.clone()),
                    attach::run(hub.clone()),
                    migration::run(hub.clone()),
                    drain::run(hub.clone()),
                )
            } => {}
        }
    };
    let leading = leader::run(client, &namespace, LEASE, &options.pod_name, shutdown, work);
    tokio::try_join!(async { http.await.context("health and metrics") }, async { csi.await.context("CSI") }, async {
        leading.await.context("leading")
    },)?;
    Ok(())
}

/// Runs a loop to its end; says what its watches complain of.
async fn exhaust<T, E: std::fmt::Display>(what: &str, stream: impl Stream<Item = Result<T, E>>) {
    let log = |done: Result<T, E>| async {
        if let Err(error) = done {
            tracing::debug!(what, %error, "watching");
        }
    };
    stream.for_each(log).await;
}

/// When to try again after a failed look at an object.
fn retry<K: Resource<DynamicType = ()>>(object: Arc<K>, error: &kube::Error, _: Arc<Hub>) -> Action {
    let name = object.name_any();
    if is_conflict(error) {
        tracing::debug!(kind = %K::kind(&()), name, "somebody else has written; looking again");
        return Action::requeue(Duration::from_millis(50));
    }
    tracing::warn!(kind = %K::kind(&()), name, %error, "the Kubernetes API failed");
    Action::requeue(Duration::from_secs(3))
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_conflict())
}

/// A result for which "it is gone" is as good as any.
fn unless_gone<T>(result: kube::Result<T>) -> kube::Result<Option<T>> {
    match result {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(None),
        result => result.map(Some),
    }
}

/// Puts a finalizer on an object, or takes it off, provided that the object is as it was read.
async fn set_finalizer<K>(api: &Api<K>, object: &K, finalizer: &str, wanted: bool) -> kube::Result<()>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug,
{
    let mut finalizers = object.finalizers().to_vec();
    if finalizers.iter().any(|present| present == finalizer) == wanted {
        return Ok(());
    }
    finalizers.retain(|present| present != finalizer);
    if wanted {
        finalizers.push(finalizer.to_owned());
    }
    let patch = json!({ "metadata": { "finalizers": finalizers, "resourceVersion": object.resource_version() } });
    unless_gone(api.patch(&object.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await)?;
    Ok(())
}
