//! `portolan-csi node`: the CSI Node service, the volumes' steps, and the transfer server of one node.
//!
//! What is mounted goes on without this process; what is under way goes on when it is started again, from the API and the disk.

pub mod agent;
mod authorise;
mod certificate;
#[cfg(test)]
mod crash;
pub mod csi;
mod disk;
mod fetch;
mod housekeeping;
mod import;
mod locks;
mod metrics;
mod orphans;
mod pool;
mod registration;
mod restore;
mod seal;
mod speed;
mod steps;
mod storage_node;
mod take;
pub(crate) mod write;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, Client};
use portolan_crds::{Orphans, PortableSnapshot, PortableVolume, StorageNode};
use portolan_runtime::client::patient;
use portolan_runtime::events::Events;
use portolan_runtime::http::{self, Health};
use portolan_zfs::{CommandLine, DatasetName, Runner, Zfs};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::block::mounts::Mounts;
use crate::block::tools::Host;
use crate::transfer::{self, Limits, Turns};
use locks::Locks;
use metrics::Metrics;

/// What a node's agent is told at its start.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The dataset that holds the volumes' datasets: a pool, or a path in one.
    #[arg(long, env = "POOL", default_value = "portolan")]
    pub pool: DatasetName,
    /// Where the host's root is mounted here.
    #[arg(long, env = "HOST_ROOT", default_value = "/host")]
    pub host_root: PathBuf,
    /// The kubelet's directory on the host.
    #[arg(long, env = "KUBELET_DIR", default_value = "/var/lib/kubelet")]
    pub kubelet_dir: PathBuf,
    /// This node's name.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// The address at which other nodes reach this one.
    #[arg(long, env = "HOST_IP", value_parser = portolan_runtime::address::host_ip)]
    pub host_ip: IpAddr,
    /// TCP port of the transfer server.
    #[arg(long, env = "TRANSFER_PORT", default_value_t = 7791)]
    pub transfer_port: u16,
    /// TCP port of health and metrics.
    #[arg(long, env = "HTTP_PORT", default_value_t = 7792)]
    pub http_port: u16,
    /// Value of the topology key: volumes move among the nodes that have the same.
    #[arg(long, env = "ZONE_OF_POOL", default_value = "default")]
    pub zone_of_pool: String,
    /// How many volumes the scheduler may place here; 0 is no limit.
    #[arg(long, env = "MAX_VOLUMES", default_value_t = 0)]
    pub max_volumes: u32,
    /// How many volumes this node sends at a time.
    #[arg(long, env = "MAX_SENDS", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_sends: u32,
    /// How many volumes this node receives at a time.
    #[arg(long, env = "MAX_RECEIVES", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_receives: u32,
}

/// What all parts of a node's agent share.
pub struct Node<Z> {
    name: String,
    zone: String,
    max_volumes: u32,
    pool: DatasetName,
    kubelet_dir: PathBuf,
    mounts: Mounts,
    tools: Host,
    zfs: Arc<Z>,
    volumes: Api<PortableVolume>,
    storage_nodes: Api<StorageNode>,
    snapshots: Api<PortableSnapshot>,
    seen: Store<PortableVolume>,
    snapshots_seen: Store<PortableSnapshot>,
    events: Events,
    metrics: Metrics,
    locks: Locks,
    /// Of the volumes that come here.
    receives: Turns,
    /// When a volume was unmounted here, if it hasn't been mounted since.
    unstaged: Mutex<HashMap<String, Timestamp>>,
    /// Where other nodes were reached last.
    addresses: Mutex<HashMap<String, SocketAddr>>,
    nudges: mpsc::UnboundedSender<ObjectRef<PortableVolume>>,
    /// What the newest look has found left over.
    orphans: Mutex<Option<Orphans>>,
    identity: watch::Receiver<Option<Arc<transfer::Identity>>>,
}

impl<Z> Node<Z> {
    /// `fresh`: it has been unmounted just now, not at some time before.
    fn remember_unstaged(&self, volume: &str, fresh: bool) {
        let mut unstaged = self.unstaged.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Timestamp::now();
        let since = unstaged.entry(volume.to_owned()).or_insert(now);
        if fresh {
            *since = now;
        }
    }

    fn forget_unstaged(&self, volume: &str) {
        self.unstaged.lock().unwrap_or_else(PoisonError::into_inner).remove(volume);
    }

    /// When the volume was unmounted here, as far as this process has seen it.
    fn unstaged_at(&self, volume: &str) -> Option<Timestamp> {
        self.unstaged.lock().unwrap_or_else(PoisonError::into_inner).get(volume).copied()
    }

    fn addresses(&self) -> MutexGuard<'_, HashMap<String, SocketAddr>> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a node was reached last, if that has gone well since.
    fn known_address(&self, node: &str) -> Option<SocketAddr> {
        self.addresses().get(node).copied()
    }

    fn remember_address(&self, node: &str, address: SocketAddr) {
        self.addresses().insert(node.to_owned(), address);
    }

    fn forget_address(&self, node: &str) {
        self.addresses().remove(node);
    }

    /// Makes the agent look at a volume at once.
    fn nudge(&self, volume: &str) {
        // The receiver ends only with the process.
        let _ = self.nudges.send(ObjectRef::new(volume));
    }
}

/// Runs a node's agent until `shutdown`.
///
/// # Errors
/// When the API can't be used or a socket can't be listened at.
pub async fn run(options: Options, shutdown: CancellationToken) -> anyhow::Result<()> {
    let client = patient(Client::try_default().await.context("can't find the Kubernetes API")?);
    let runner = match options.host_root.as_os_str().as_encoded_bytes() {
        b"/" => Runner::new(),
        _ => Runner::new().with_chroot(&options.host_root),
    };
    let (nudges, nudged) = mpsc::unbounded_channel();
    let (identity_sender, identity) = watch::channel(None);
    let mut registry = prometheus_client::registry::Registry::with_prefix("portolan");
    let volumes = Api::all(client.clone());
    let snapshots = Api::all(client.clone());
    let (controller, snapshots_seen) = agent::controller(volumes.clone(), snapshots.clone(), nudged);
    let node = Arc::new(Node {
        name: options.node_name.clone(),
        zone: options.zone_of_pool.clone(),
        max_volumes: options.max_volumes,
        pool: options.pool.clone(),
        kubelet_dir: options.kubelet_dir.clone(),
        mounts: Mounts::new(&options.host_root),
        tools: Host(runner.clone()),
        zfs: Arc::new(CommandLine::new(runner)),
        volumes,
        storage_nodes: Api::all(client.clone()),
        snapshots,
        seen: controller.store(),
        snapshots_seen,
        events: Events::new(client.clone(), "portolan-storage"),
        metrics: Metrics::register(&mut registry),
        locks: Locks::default(),
        receives: Turns::new(options.max_receives as usize),
        unstaged: Mutex::default(),
        addresses: Mutex::default(),
        nudges,
        orphans: Mutex::default(),
        identity: identity.clone(),
    });

    let health = Health::new();
    let address = portolan_runtime::address::everywhere_like(options.host_ip, options.http_port);
    let http = http::serve(address, health.clone(), Arc::new(registry), shutdown.clone());
    let csi = registration::serve(node.clone(), shutdown.clone());
    let transfer_address = SocketAddr::new(options.host_ip, options.transfer_port);
    let reports = storage_node::report(node.clone(), client.clone(), transfer_address, health, shutdown.clone());
    let certificates = certificate::keep(client, options.node_name, identity_sender, shutdown.clone());
    let limits = Limits { streams: options.max_sends as usize, ..Limits::default() };
    let transfers = serve_transfers(node.clone(), transfer_address, identity, limits, shutdown.clone());
    let housekeeping = housekeeping::keep(node.clone(), shutdown.clone());
    let work = agent::run(controller, node, shutdown.clone());
    tokio::try_join!(
        async { http.await.context("health and metrics") },
        async { csi.await.context("CSI") },
        async { transfers.await.context("transfer server") },
        async {
            tokio::join!(reports, certificates, housekeeping, work);
            Ok(())
        },
    )?;
    Ok(())
}

/// Serves other nodes as soon as there is a certificate to show.
async fn serve_transfers<Z: Zfs>(
    node: Arc<Node<Z>>,
    address: SocketAddr,
    mut identity: watch::Receiver<Option<Arc<transfer::Identity>>>,
    limits: Limits,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let first = tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        first = identity.wait_for(Option::is_some) => first.ok().and_then(|first| first.clone()),
    };
    let Some(first) = first else { return Ok(()) };
    let (current, shown) = watch::channel(first);
    let listener = listen(address).await?;
    tracing::info!(%address, "serving transfers");
    let follow = async {
        while identity.changed().await.is_ok() {
            if let Some(next) = identity.borrow_and_update().clone() {
                current.send_replace(next);
            }
        }
        std::future::pending::<()>().await;
    };
    let zfs = node.zfs.clone();
    let authorise = Arc::new(authorise::ByVolume(node));
    tokio::select! {
        () = transfer::serve(listener, shown, authorise, zfs, limits, shutdown) => {}
        () = follow => {}
    }
    Ok(())
}

/// The address may come a little later than this process, and its last holder may go a little later.
async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let mut attempts = 0;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(error) if attempts < 30 => {
                tracing::warn!(%address, %error, "can't listen yet");
                attempts += 1;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return Err(error).with_context(|| format!("can't listen at {address}")),
        }
    }
}
