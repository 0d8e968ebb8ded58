//! The agent as a whole.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use portolan_net::Dataplane;
use portolan_runtime::{
    address,
    events::Events,
    http::{self, Health, ServeError},
};
use tokio::sync::{Mutex, Notify, RwLock, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    addresses::Addresses,
    alone,
    cluster::Cluster,
    collect,
    conflist::{self, ConflistError},
    everyone::Everyone,
    hotplug::{self, Busy},
    journal::{Journal, JournalError},
    keys::KeyFile,
    known::Known,
    metrics::Metrics,
    paths::SmallPaths,
    peers::{self, Peers},
    primary::{self, Primary},
    publish,
    resolver::Resolvers,
    server,
    settings::{SOCKET, Settings},
    snapshot::{Keeper, Snapshot},
    sync::{self, Applied},
    turns::Turns,
    underlay::{Underlay, Unreachable},
};

/// How often the container runtime's directory is looked at.
const CONFLIST_INTERVAL: Duration = Duration::from_secs(5);
/// How often the API server is asked for the cluster's DNS address; without it only our own names are answered.
const DNS_LOOKUPS: usize = 5;
/// How long it may take each time: whoever follows the cluster doesn't begin before.
const DNS_PATIENCE: Duration = Duration::from_secs(2);

/// What makes the agent end.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The journal can't be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The underlay isn't as it should be.
    #[error(transparent)]
    Net(#[from] portolan_net::Error),
    /// The plugin can't be installed.
    #[error(transparent)]
    Conflist(#[from] ConflistError),
    /// There is no way to the API server.
    #[error("no Kubernetes client: {0}")]
    Client(Box<kube::Error>),
    /// The CNI socket can't be served.
    #[error("CNI socket {path}: {source}")]
    Socket {
        /// Its path here.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Health and metrics can't be served.
    #[error(transparent)]
    Http(#[from] ServeError),
    /// The watches ended.
    #[error("the watches of the API server ended")]
    Watch,
}

/// What all parts of the agent share.
pub(crate) struct Agent {
    pub cluster: Arc<Cluster>,
    /// The namespace that Portolan is in.
    pub namespace: String,
    pub dataplane: Dataplane,
    pub underlay: Underlay,
    pub journal: Arc<Journal>,
    /// This node's private keys.
    pub keys: KeyFile,
    /// The first of the two UDP ports of WireGuard, the same on all nodes.
    pub wireguard_port: u16,
    pub addresses: Addresses,
    /// The pod network, where no other plugin makes it.
    pub primary: Primary,
    pub events: Events,
    pub metrics: Metrics,
    pub peers: Peers,
    pub small_paths: SmallPaths,
    pub unreachable: Unreachable,
    /// Told whenever there may be something to do.
    pub changed: Arc<Notify>,
    /// The pods whose networks are being changed.
    pub busy: Busy,
    /// The right to change networks and ports.
    pub applied: RwLock<Applied>,
    /// Whose turn it is to change a port.
    pub turns: Turns,
    /// The right to give a pod a MAC that it asks for.
    pub macs: Mutex<()>,
    /// Whether pods that should ask our DNS server and don't are to reach it where they ask.
    pub redirects: bool,
    /// Where that is, once it is known.
    pub redirect: OnceLock<Ipv4Addr>,
    synced: AtomicBool,
    /// What was known before this agent started.
    pub known: Arc<Known>,
    pub started: Instant,
}

impl Agent {
    /// Whether everything has been heard from the API server once.
    pub fn is_synced(&self) -> bool {
        self.synced.load(Ordering::Relaxed)
    }
}

/// Runs the agent until `shutdown`. Networks and pods stay as they are: forwarding goes on without the agent.
///
/// # Errors
/// What the agent can't work without.
pub async fn run(settings: Settings, shutdown: CancellationToken) -> Result<(), AgentError> {
    let client = kube::Client::try_default().await.map_err(|e| AgentError::Client(Box::new(e)))?;
    let dataplane = Dataplane::new(&settings.host_root);
    run_with(settings, client, dataplane, shutdown).await
}

/// The same, with another way to the API server than this process's own, and other networks than those of the host.
///
/// # Errors
/// What the agent can't work without.
pub async fn run_with(
    settings: Settings,
    client: kube::Client,
    dataplane: Dataplane,
    shutdown: CancellationToken,
) -> Result<(), AgentError> {
    let client = portolan_runtime::client::patient_until(client, shutdown.clone());
    let (metrics, registry) = Metrics::new();
    let health = Health::new();
    let address = address::everywhere_like(settings.host_ip, settings.http_port);
    let web = tokio::spawn(http::serve(address, health.clone(), registry, shutdown.clone()));

    let agent = Arc::new(prepare(&settings, client, dataplane, metrics, &shutdown).await?);
    let socket = settings.socket();
    let listener = server::listen(&socket).map_err(|source| AgentError::Socket { path: socket, source })?;
    let mut tasks = vec![
        tokio::spawn(server::run(Arc::clone(&agent), listener, shutdown.clone())),
        tokio::spawn(collect::run(Arc::clone(&agent), shutdown.clone())),
        // Only now: a runtime that finds the plugin also finds the agent.
        tokio::spawn(keep_conflist(Arc::clone(&agent), settings.clone(), shutdown.clone())),
        tokio::spawn(primary::run(Arc::clone(&agent), shutdown.clone())),
    ];
    // Names don't wait for the API server.
    let mut resolvers = Resolvers::resume(
        &agent.dataplane,
        &agent.journal,
        Snapshot::read(&settings.names()),
        settings.dns_domain.clone(),
        agent.metrics.dns.clone(),
    );
    tokio::select! {
        synced = agent.cluster.wait_until_synced() => synced.map_err(|_| AgentError::Watch)?,
        () = answer_alone(&agent, &mut resolvers) => {}
        () = shutdown.cancelled() => return Ok(()),
    }
    agent.synced.store(true, Ordering::Relaxed);
    tasks.push(tokio::spawn(become_ready(Arc::clone(&agent), health.clone(), shutdown.clone())));
    if let Some(servers) = upstream(&agent, &settings).await {
        let address = servers.iter().find_map(|server| match server.ip() {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        });
        if let Some(address) = address.filter(|_| agent.redirects) {
            let _ = agent.redirect.set(address);
        }
        resolvers.set_upstream(servers).await;
    }
    agent.small_paths.resume(&agent.cluster.node, &agent.cluster.slices.state());
    let keeper = Keeper::new(settings.names());
    tasks.push(tokio::spawn(peers::run(Arc::clone(&agent), shutdown.clone())));
    tasks.push(tokio::spawn(alone::run(Arc::clone(&agent), shutdown.clone())));
    tasks.push(tokio::spawn(hotplug::run(Arc::clone(&agent), shutdown.clone())));
    let everyone = everyone(&settings, &agent.metrics, &shutdown);
    let (wanted, told) = watch::channel(None);
    tasks.push(tokio::spawn(publish::run(Arc::clone(&agent), told, shutdown.clone())));
    tasks.push(tokio::spawn(sync::run(agent, resolvers, everyone, keeper, wanted, shutdown.clone())));
    let served = web.await;
    shutdown.cancel();
    for task in tasks {
        if let Err(error) = task.await {
            tracing::error!(%error, "a part of the agent did not end well");
        }
    }
    served.unwrap_or(Ok(())).map_err(Into::into)
}

async fn prepare(
    settings: &Settings,
    client: kube::Client,
    dataplane: Dataplane,
    metrics: Metrics,
    shutdown: &CancellationToken,
) -> Result<Agent, AgentError> {
    let mtu = dataplane.underlay_mtu(settings.host_ip).await?;
    let underlay = Underlay { vtep: settings.host_ip, port: settings.vxlan_port, mtu };
    let journal = Arc::new(Journal::open(settings.journal())?);
    let known = Arc::new(Known::open(&settings.known())?);
    conflist::install_plugin(&settings.cni_plugin, &settings.on_host(&settings.cni_bin_dir))?;
    let primary = Primary::open(settings, underlay, client.clone(), Arc::clone(&known), shutdown)?;
    let changed = Arc::new(Notify::new());
    let cluster = Arc::new(Cluster::watch(client.clone(), &settings.node_name, &changed, shutdown));
    Ok(Agent {
        addresses: Addresses::new(Arc::clone(&cluster), Arc::clone(&journal), Arc::clone(&known)),
        cluster,
        primary,
        namespace: portolan_runtime::namespace(),
        dataplane,
        underlay,
        journal,
        keys: KeyFile(settings.keys()),
        wireguard_port: settings.wireguard_port,
        events: Events::new(client, "portolan-agent"),
        metrics,
        peers: Peers::default(),
        small_paths: SmallPaths::default(),
        unreachable: Unreachable::default(),
        changed,
        busy: Busy::default(),
        applied: RwLock::default(),
        turns: Turns::default(),
        macs: Mutex::default(),
        redirects: settings.dns_redirect,
        redirect: OnceLock::new(),
        synced: AtomicBool::new(false),
        known,
        started: Instant::now(),
    })
}

/// Keeps the DNS servers up that pods ask which are plugged in before anything is heard of the API server; never ends.
async fn answer_alone(agent: &Agent, resolvers: &mut Resolvers) {
    loop {
        agent.changed.notified().await;
        resolvers.ensure_all(&agent.dataplane, &agent.journal);
    }
}

/// All that the pod network waits for is told by its own words; networks don't wait for it.
async fn become_ready(agent: Arc<Agent>, health: Health, shutdown: CancellationToken) {
    tokio::select! {
        () = agent.primary.wait_until_served() => {}
        () = shutdown.cancelled() => return,
    }
    health.set_ready(true);
    tracing::info!(node = agent.cluster.node, "ready");
}

/// The DNS server for everyone, if there shall be one.
fn everyone(settings: &Settings, metrics: &Metrics, shutdown: &CancellationToken) -> Option<Everyone> {
    let at = SocketAddr::from((settings.host_ip, settings.dns_everyone_port?));
    Some(Everyone::new(at, settings.dns_domain.clone()?, metrics.dns.clone(), shutdown.clone()))
}

/// Where names go that aren't ours; none if the API server doesn't tell.
async fn upstream(agent: &Agent, settings: &Settings) -> Option<Vec<SocketAddr>> {
    if let Some(address) = settings.cluster_dns {
        return Some(vec![SocketAddr::new(address, 53)]);
    }
    for attempt in 1..=DNS_LOOKUPS {
        match tokio::time::timeout(DNS_PATIENCE, agent.cluster.cluster_dns()).await {
            Ok(Ok(Some(address))) => return Some(vec![SocketAddr::new(address, 53)]),
            Ok(Ok(None)) => {
                tracing::warn!(
                    "Service kube-system/kube-dns has no address: only names of networks are answered (see --cluster-dns)"
                );
                return Some(Vec::new());
            }
            Ok(Err(error)) => tracing::warn!(%error, attempt, "the cluster's DNS address is not known"),
            Err(late) => tracing::warn!(error = %late, attempt, "the cluster's DNS address is not known"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    None
}

async fn keep_conflist(agent: Arc<Agent>, settings: Settings, shutdown: CancellationToken) {
    let directory = settings.on_host(&settings.cni_conf_dir);
    // The kubelet takes a node for ready that has a configuration.
    tokio::select! {
        () = agent.primary.wait_until_served() => {}
        () = shutdown.cancelled() => return,
    }
    let write = if settings.primary { conflist::write_alone } else { conflist::update };
    loop {
        match write(&directory, SOCKET) {
            Ok(true) => tracing::info!(directory = %directory.display(), "{} written", conflist::FILE),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "the container runtime's configuration stays as it is"),
        }
        tokio::select! {
            () = tokio::time::sleep(CONFLIST_INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
    }
}
