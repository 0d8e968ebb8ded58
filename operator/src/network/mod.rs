//! The ContainerNetwork controller: read, validate, plan, apply, status; all networks in one pass.
//!
//! One pass for all because they bear on each other (VNIs), and because there are few of them.

pub(crate) mod apply;
mod egress;
mod families;
mod keys;
mod narrow;
mod plan;
mod validate;
mod vni;

use std::time::Duration;

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::ListParams;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use portolan_crds::{ContainerNetwork, IPClaim, NetworkNodeSlice};
use portolan_runtime::events::Events;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::metrics::{Decision, Metrics};
use plan::World;

/// How long changes are gathered before a pass.
const GATHER: Duration = Duration::from_millis(200);
/// A pass is made at least this often.
const RESYNC: Duration = Duration::from_secs(60);
/// After a failed pass.
const RETRY: Duration = Duration::from_secs(2);

/// Runs the controller until `stop` is cancelled.
///
/// `rotation` is how old the nodes' keys get, for ever if there is none.
pub async fn run(
    client: Client,
    events: Events,
    metrics: Metrics,
    rotation: Option<Duration>,
    stop: CancellationToken,
) {
    let (changed, mut changes) = mpsc::channel(1);
    let (nodes, node_writer) = reflector::store::<Node>();
    let (slices, slice_writer) = reflector::store::<NetworkNodeSlice>();
    let (claims, claim_writer) = reflector::store::<IPClaim>();
    let node_events = watcher(Api::<Node>::all(client.clone()), watcher::Config::default())
        .modify(lighten)
        .default_backoff()
        .reflect(node_writer);
    let slice_events = watcher(Api::<NetworkNodeSlice>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .reflect(slice_writer);
    let claim_events = watcher(Api::<IPClaim>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .reflect(claim_writer);
    let network_events =
        watcher(Api::<ContainerNetwork>::all(client.clone()), watcher::Config::default()).default_backoff();

    let work = async {
        // Before the first list is complete, a pass would take pods for gone.
        let (nodes_read, slices_read, claims_read) =
            futures::join!(nodes.wait_until_ready(), slices.wait_until_ready(), claims.wait_until_ready());
        if nodes_read.and(slices_read).and(claims_read).is_err() {
            return;
        }
        let watched = Watched { nodes, slices, claims, rotation };
        loop {
            let result = pass(&client, &watched, &events).await;
            metrics.network_pass(if result.is_ok() { Decision::Granted } else { Decision::Failed });
            let wait = match result {
                Ok(()) => RESYNC,
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "a pass over the networks failed");
                    RETRY
                }
            };
            gather(&mut changes, wait, GATHER).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
        () = notify(node_events, &changed) => {}
        () = notify(slice_events, &changed) => {}
        () = notify(claim_events, &changed) => {}
        () = notify(network_events, &changed) => {}
    }
}

/// Waits for a change, or so long, and then for more changes to come together.
pub(crate) async fn gather(changes: &mut mpsc::Receiver<()>, longest: Duration, together: Duration) {
    let _ = tokio::time::timeout(longest, changes.recv()).await;
    tokio::time::sleep(together).await;
    while changes.try_recv().is_ok() {}
}

/// Says on `changed` that something changed; a full channel says so already.
pub(crate) async fn notify<K>(
    events: impl Stream<Item = Result<watcher::Event<K>, watcher::Error>>,
    changed: &mpsc::Sender<()>,
) {
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(_) => _ = changed.try_send(()),
            Err(error) => tracing::warn!(%error, "a watch was interrupted"),
        }
    }
}

/// Drops what a pass doesn't look at.
fn lighten(node: &mut Node) {
    node.metadata.managed_fields = None;
    node.metadata.annotations = None;
    if let Some(status) = &mut node.status {
        status.images = None;
        status.conditions = None;
    }
}

/// What watches keep up to date.
struct Watched {
    nodes: Store<Node>,
    slices: Store<NetworkNodeSlice>,
    claims: Store<IPClaim>,
    rotation: Option<Duration>,
}

async fn pass(client: &Client, watched: &Watched, events: &Events) -> Result<(), apply::Error> {
    let world = read(client, watched).await?;
    // One network's failure shall not keep the others waiting.
    let steps = futures::stream::iter(plan::plan(&world));
    let results: Vec<_> = steps.then(|step| apply::apply(client, events, step)).collect().await;
    results.into_iter().collect()
}

async fn read(client: &Client, watched: &Watched) -> Result<World, apply::Error> {
    // Not from a watch: a VNI that was given out a moment ago must be seen.
    let networks = Api::<ContainerNetwork>::all(client.clone());
    let networks = networks.list(&ListParams::default()).await.map_err(apply::Error::reading("ContainerNetworks"))?;
    let service_cidrs = match Api::<ServiceCIDR>::all(client.clone()).list(&ListParams::default()).await {
        Ok(list) => list.items,
        // Served from Kubernetes 1.33 on; before, nothing tells the range.
        Err(kube::Error::Api(status)) if status.is_not_found() => Vec::new(),
        Err(error) => return Err(apply::Error::reading("ServiceCIDRs")(error)),
    };
    let slices: Vec<_> = watched.slices.state().iter().map(|slice| NetworkNodeSlice::clone(slice)).collect();
    Ok(World {
        keys: Some(keys::generation(&networks.items, &slices, jiff::Timestamp::now(), watched.rotation)),
        networks: networks.items,
        nodes: watched.nodes.state().iter().map(|node| Node::clone(node)).collect(),
        slices,
        claims: watched.claims.state().iter().map(|claim| IPClaim::clone(claim)).collect(),
        service_cidrs,
    })
}
