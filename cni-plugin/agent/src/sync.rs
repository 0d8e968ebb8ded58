//! Makes the kernel and the names follow the journal and what the other nodes say, and says what this node's slices are to be. Nothing in it waits for
//! the API server.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::{Resource, ResourceExt, runtime::reflector::ObjectRef};
use portolan_crds::{NetworkNodeSlice, NetworkNodeSliceSpec};
use portolan_dns::{Member, NetworkNames, NetworkZone};
use portolan_net::{BRIDGE_ADDRESS, NetworkSpec};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    agent::Agent,
    annotation,
    egress::Ways,
    encryption::Encrypting,
    entries::Entries,
    everyone::Everyone,
    filtering::Filtering,
    journal::Endpoint,
    missed, names,
    network::Network,
    paths, pod,
    resolver::Resolvers,
    snapshot::{Keeper, Snapshot},
    view::{Following, Local, names_for_everyone},
};

/// How often everything is looked at without a cause, and the kernel is asked what it really has.
const INTERVAL: Duration = Duration::from_secs(60);
/// How soon something that failed is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// The same for forwarding entries that the kernel refuses.
const RETRY_REFUSED: Duration = Duration::from_secs(10);

/// What was applied to the kernel since the agent started. To read it is the right to change single ports, each of them in its
/// [turn](crate::turns::Turns); to write it, the right to change networks and whatever is on them.
#[derive(Default)]
pub(crate) struct Applied {
    pub networks: BTreeMap<u32, NetworkSpec>,
    pub encrypting: Encrypting,
    /// How often each network was made something else, or removed.
    made: BTreeMap<u32, u64>,
    pub filters: BTreeMap<u32, Filtering>,
    pub ways: Ways,
}

impl Applied {
    /// Whether a network was made what the spec says since the start.
    pub fn has(&self, spec: &NetworkSpec) -> bool {
        self.networks.get(&spec.vni) == Some(spec)
    }

    /// Which of the networks of that VNI it is: all that was in one is lost in the next.
    pub fn which(&self, vni: u32) -> u64 {
        self.made.get(&vni).copied().unwrap_or(0)
    }

    fn is_another(&mut self, vni: u32) {
        *self.made.entry(vni).or_default() += 1;
        self.networks.remove(&vni);
        self.filters.remove(&vni);
        self.ways.remove(&vni);
    }
}

impl Agent {
    /// Makes a network what its spec says, unless this was done since the start.
    pub(crate) async fn ensure_network(&self, applied: &mut Applied, spec: NetworkSpec) -> portolan_net::Result<()> {
        if applied.has(&spec) && self.dataplane.namespace(spec.vni).is_ok() {
            return Ok(());
        }
        applied.is_another(spec.vni);
        self.dataplane.ensure_network(&spec).await?;
        applied.networks.insert(spec.vni, spec);
        Ok(())
    }

    /// The pod of an endpoint, as the API knows it.
    fn pod(&self, endpoint: &Endpoint) -> Option<Arc<Pod>> {
        let pod = self.cluster.pods.get(&ObjectRef::new(&endpoint.pod).within(&endpoint.namespace))?;
        (pod.metadata.uid.as_deref() == Some(&endpoint.uid)).then_some(pod)
    }

    /// The endpoints of this node as the API knows their pods.
    pub(crate) fn local(&self, endpoints: &[Endpoint]) -> Vec<Local> {
        let redirected: BTreeSet<String> =
            self.journal.select(|e| e.redirected.is_some()).into_iter().map(|e| e.container).collect();
        let local = |e: &Endpoint| {
            let pod = self.pod(e);
            let names = pod.as_ref().map(|p| names::of(p)).unwrap_or_default();
            let endpoint = portolan_crds::Endpoint {
                address: e.address.to_string(),
                second_address: e.second.map(|second| second.addr().to_string()),
                mac: e.mac.to_string(),
                interface: Some(e.interface.clone()),
                namespace: e.namespace.clone(),
                pod: e.pod.clone(),
                labels: pod.as_ref().map(|p| p.labels().clone()),
                owner: e.owner.clone(),
                ready: pod.as_ref().is_some_and(|p| pod::is_ready(p)),
                aliases: names.aliases,
                ports: names.ports,
                publish_not_ready: names.publish_not_ready,
                prefer_same_node: names.prefer_same_node,
                not_admitted: !redirected.contains(&e.container)
                    && pod.as_ref().is_some_and(|p| missed::is_missed(p, &self.namespace)),
            };
            Local { endpoint, asks_from: e.asks_from, current: pod.is_some_and(|p| pod::is_current(&p)) }
        };
        endpoints.iter().map(local).collect()
    }
}

/// The loop's own memory.
struct Sync<'a> {
    agent: &'a Agent,
    resolvers: Resolvers,
    everyone: Option<Everyone>,
    keeper: Keeper,
    /// What the other nodes are to know.
    publisher: watch::Sender<Option<Vec<NetworkNodeSliceSpec>>>,
    entries: Entries,
    /// The networks that have pods here, by name; and the others, as the server for everyone knows them.
    views: BTreeMap<String, Following>,
    others: BTreeMap<String, Following>,
    /// What the journal had when the agent started, as far as the kernel wasn't asked about it yet.
    unchecked: BTreeSet<String>,
    /// Running pods, by UID, whose allowed addresses can't be read.
    refused: BTreeMap<String, Refusal>,
    /// Networks whose pods don't reach the outside from here, though they are to, and why.
    blocked: BTreeMap<String, String>,
}

/// An annotation that can't be followed, which its pod's Events are told of.
#[derive(Default)]
struct Refusal {
    pod: ObjectReference,
    message: String,
    is_told: bool,
}

impl Refusal {
    fn learn(&mut self, pod: &Pod, message: String) {
        if self.message != message {
            *self = Self { pod: pod.object_ref(&()), message, is_told: false };
        }
    }
}

/// Follows all changes until the agent ends.
pub(crate) async fn run(
    agent: Arc<Agent>,
    resolvers: Resolvers,
    everyone: Option<Everyone>,
    keeper: Keeper,
    publisher: watch::Sender<Option<Vec<NetworkNodeSliceSpec>>>,
    shutdown: CancellationToken,
) {
    let mut sync = Sync {
        agent: &agent,
        resolvers,
        everyone,
        keeper,
        publisher,
        entries: Entries::default(),
        views: BTreeMap::new(),
        others: BTreeMap::new(),
        unchecked: agent.journal.select(|_| true).iter().map(Endpoint::id).collect(),
        refused: BTreeMap::new(),
        blocked: BTreeMap::new(),
    };
    loop {
        let wait = sync.once().await;
        tokio::select! {
            () = agent.changed.notified() => {}
            () = tokio::time::sleep(wait) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

impl Sync<'_> {
    /// One pass; returns when the next one is due without a cause.
    async fn once(&mut self) -> Duration {
        let (mut failed, mut refused) = (false, false);
        let mut note = |what: &str, network: &str, result: Result<(), String>| {
            if let Err(error) = result {
                failed = true;
                tracing::warn!(network, error, "{what}");
            }
        };
        let slices = self.agent.cluster.slices.state();
        let mut silent = self.agent.peers.silent();
        self.agent.metrics.silent_nodes.set(i64::try_from(silent.len()).unwrap_or(i64::MAX));
        let small = self.agent.small_paths.get();
        self.agent.metrics.small_paths.set(i64::try_from(small.len()).unwrap_or(i64::MAX));
        let mut applied = self.agent.applied.write().await;
        // Read under the lock: a pod that is being plugged in is in the journal before its network is touched.
        let by_network = self.by_network();
        // Names prefer pods that can be reached.
        silent.extend(self.agent.tell_unreachable(|network| by_network.contains_key(network), &slices));
        self.entries.forget(self.agent.journal.take_gone());
        self.refused.retain(|uid, _| by_network.values().flatten().any(|e| e.uid == *uid));
        self.agent.metrics.set_endpoints(by_network.iter().map(|(n, e)| (n.clone(), e.len())));
        // Before the networks: their tunnels are made where this is.
        let told = self.agent.encrypt(&mut applied, None).await.map_err(|e| e.to_string());
        let encryption = told.as_ref().map_or_else(|_| self.agent.told_before(), Clone::clone);
        note("encrypted networks don't reach other nodes as they should", "", told.map(drop));
        self.blocked.clear();
        for (network, endpoints) in &by_network {
            note("network not set up", network, self.set_up(&mut applied, network, endpoints).await);
        }
        note("networks without pods not removed", "", self.remove_others(&mut applied, &by_network).await);
        self.agent.metrics.blocked_networks.set(i64::try_from(self.blocked.len()).unwrap_or(i64::MAX));
        // After the networks that leave by it.
        let forgotten = self.agent.forget_encryption(&mut applied).await;
        note("what encrypted networks needed not removed", "", forgotten.map_err(|e| e.to_string()));
        let is_restless = applied.encrypting.is_restless();
        // What follows takes as long as networks are large, and no pod that is plugged in or out waits for it.
        drop(applied);

        let locals: Vec<Vec<Local>> = by_network.values().map(|endpoints| self.agent.local(endpoints)).collect();
        let of_networks = of_networks(&slices);
        self.views.retain(|network, _| by_network.contains_key(network));
        let mut zones = Vec::new();
        for ((network, endpoints), local) in by_network.iter().zip(&locals) {
            let view = self.views.entry(network.clone()).or_default();
            let slices = of_networks.get(network.as_str()).into_iter().flatten().copied();
            view.follow(&self.agent.cluster.node, local, slices, &silent);
            let groups = view.groups();
            zones.push(NetworkNames {
                name: network.clone(),
                node: self.agent.cluster.node.clone(),
                subnets: self.subnets(network),
                groups,
                members: self.members(endpoints),
            });
        }
        let names = |zone: &NetworkNames| (zone.name.clone(), zone.groups.iter().map(|group| group.len()).sum());
        self.agent.metrics.set_names(zones.iter().map(names));
        let is_due = self.keeper.due_in().is_zero();
        let snapshot = is_due.then(|| zones.iter().map(NetworkZone::from).collect::<Vec<_>>());
        self.resolvers.follow(zones);
        for (network, endpoints) in &by_network {
            note("names not answered", network, self.ensure_resolvers(network, endpoints));
        }
        self.tell_refused();
        note("full names not answered to everyone", "", self.tell_everyone(&of_networks, &silent));
        let names_due_in = if snapshot.is_some() { INTERVAL } else { self.keeper.due_in() };
        let kept = snapshot.map(|zones| Snapshot { upstream: self.resolvers.upstream().to_vec(), zones });
        let kept = kept.map_or(Ok(()), |snapshot| self.keeper.keep(&snapshot));
        note("names not kept for the next start", "", kept.map_err(|e| e.to_string()));

        let mut specs = Vec::new();
        for ((network, endpoints), local) in by_network.iter().zip(&locals) {
            let (node, needed) = (self.agent.cluster.node.clone(), self.agent.needed(network, endpoints));
            specs.push(NetworkNodeSliceSpec {
                network: network.clone(),
                path_mtu: paths::of_network(&node, needed, &small, of_network(&slices, network)),
                node,
                vtep: self.agent.underlay.vtep.to_string(),
                endpoints: local.iter().map(|l| l.endpoint.clone()).collect(),
                encryption: encryption.clone().filter(|_| self.is_encrypted(network)),
                egress_problem: self.blocked.get(network).cloned(),
            });
        }
        self.publisher.send_replace(Some(specs));
        // After all that others wait for: the first entries of a large network take seconds.
        for (network, endpoints) in &by_network {
            let (Some(view), Some(vni)) = (self.views.get(network), endpoints.first().map(|e| e.vni)) else {
                continue;
            };
            let is_suppressed = self.network(network, vni).is_some_and(|network| network.suppression);
            let mut forwarding = view.forwarding(is_suppressed);
            forwarding.peers.retain(|peer| self.agent.underlay.reaches(peer.vtep));
            let done = self.agent.forward(&mut self.entries, (network, vni), forwarding).await;
            if let Err(error) = &done
                && error.is_refusal()
            {
                // What changes is tried at once; the kernel's limits seldom do.
                refused = true;
                tracing::warn!(network, %error, "not all forwarding entries are there");
                continue;
            }
            note("forwarding entries are not what they should be", network, done.map_err(|e| e.to_string()));
        }
        match refused {
            _ if failed || is_restless => RETRY,
            true => names_due_in.clamp(RETRY, RETRY_REFUSED),
            false => names_due_in.clamp(RETRY, INTERVAL),
        }
    }

    /// A network as its pods here are on it; none if it is being deleted, or another one by now.
    fn network(&self, name: &str, vni: u32) -> Option<Network> {
        let object = self.agent.cluster.networks.get(&ObjectRef::new(name))?;
        Network::new(&object).ok().filter(|network| network.vni == vni)
    }

    fn is_encrypted(&self, network: &str) -> bool {
        let object = self.agent.cluster.networks.get(&ObjectRef::new(network));
        object.is_some_and(|object| object.spec.encryption == portolan_crds::Encryption::WireGuard)
    }

    /// All networks' names, whether there are pods of theirs on this node or not.
    fn tell_everyone(
        &mut self,
        slices: &BTreeMap<&str, Vec<&Arc<NetworkNodeSlice>>>,
        silent: &BTreeSet<IpAddr>,
    ) -> Result<(), String> {
        let Some(everyone) = &mut self.everyone else { return Ok(()) };
        let known = self.agent.cluster.networks.state().into_iter().map(|network| network.name_any());
        let names = names_for_everyone(known, &self.views, &mut self.others, slices, silent);
        everyone.follow(names).map_err(|e| e.to_string())
    }

    fn by_network(&self) -> BTreeMap<String, Vec<Endpoint>> {
        let mut by_network: BTreeMap<String, Vec<Endpoint>> = BTreeMap::new();
        for endpoint in self.agent.journal.select(|_| true) {
            by_network.entry(endpoint.network.clone()).or_default().push(endpoint);
        }
        by_network
    }

    fn members(&self, endpoints: &[Endpoint]) -> Vec<Member> {
        let networks = |e: &Endpoint| {
            let same = self.agent.journal.select(|o| o.container == e.container);
            same.into_iter().map(|o| o.network).collect()
        };
        // The server is asked by IPv4 alone.
        let member = |e: &Endpoint| Member {
            address: e.asks_from.map_or(e.address, IpAddr::from),
            namespace: e.namespace.clone(),
            networks: networks(e),
        };
        endpoints.iter().map(member).collect()
    }

    /// The subnets whose addresses are this network's to name.
    fn subnets(&self, network: &str) -> Vec<IpNet> {
        let object = self.agent.cluster.networks.get(&ObjectRef::new(network));
        object.iter().flat_map(|o| &o.spec.subnets).filter_map(|subnet| subnet.parse().ok()).collect()
    }

    /// One network that has pods here: all that plugging a pod in changes, too.
    async fn set_up(&mut self, applied: &mut Applied, name: &str, endpoints: &[Endpoint]) -> Result<(), String> {
        let Some(vni) = endpoints.first().map(|e| e.vni) else { return Ok(()) };
        // A network that is being deleted goes on for the pods that are still on it.
        let network = self.network(name, vni);
        if let Some(network) = &network {
            let spec = self.agent.spec(network);
            self.agent.ensure_network(applied, spec).await.map_err(|e| e.to_string())?;
        }
        // Of a network that is being deleted, too: its pods are held to their addresses and policies as long as they are there.
        if self.agent.dataplane.namespace(vni).is_ok() {
            let wanted = self.agent.filter_of(name);
            self.agent.set_filter(applied, (name, vni), wanted).await.map_err(|e| e.to_string())?;
            // No port is made whose rules aren't there.
            self.restore_ports(endpoints).await;
        }
        // After the rules of those who may not go there.
        if let Some(network) = &network
            && let Some(problem) = self.agent.follow_egress(applied, network).await
        {
            self.blocked.insert(name.to_owned(), problem);
        }
        Ok(())
    }

    /// The DNS servers that a network's pods ask.
    fn ensure_resolvers(&mut self, name: &str, endpoints: &[Endpoint]) -> Result<(), String> {
        let Some(vni) = endpoints.first().map(|e| e.vni) else { return Ok(()) };
        let at: BTreeSet<_> = endpoints.iter().filter_map(|e| e.redirected).chain([BRIDGE_ADDRESS]).collect();
        for at in at {
            self.resolvers.ensure(&self.agent.dataplane, name, vni, at).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// After a start: ports of the journal that the kernel lost, or that were never finished, or that an older release made. Later:
    /// those whose pods may use other addresses than before.
    async fn restore_ports(&mut self, endpoints: &[Endpoint]) {
        for endpoint in endpoints {
            let endpoint = self.follow_allowed(endpoint);
            if !self.unchecked.remove(&endpoint.id()) {
                continue;
            }
            let port = endpoint.port();
            if self.agent.dataplane.check_port(&port).await.is_ok() {
                continue;
            }
            match self.agent.dataplane.add_port(&port).await {
                Ok(()) => tracing::info!(network = endpoint.network, pod = endpoint.pod, "port restored"),
                Err(error) => {
                    tracing::warn!(network = endpoint.network, pod = endpoint.pod, %error, "port not restored");
                    // If its namespace is going, the collection will see to it.
                    self.unchecked.insert(endpoint.id());
                }
            }
        }
    }

    /// The endpoint with the addresses that its pod may use by now. An annotation that can't be read changes nothing.
    fn follow_allowed(&mut self, endpoint: &Endpoint) -> Endpoint {
        let before = endpoint.clone();
        let Some(pod) = self.agent.pod(endpoint) else { return before };
        let allowed = match annotation::allowed(&pod) {
            Ok(allowed) if allowed == endpoint.allowed => return before,
            Ok(allowed) => allowed,
            Err(error) => {
                self.refused.entry(endpoint.uid.clone()).or_default().learn(&pod, error.to_string());
                return before;
            }
        };
        let after = Endpoint { allowed, ..before.clone() };
        if let Err(error) = self.agent.journal.put(after.clone()) {
            tracing::warn!(pod = endpoint.pod, %error, "allowed addresses not followed");
            return before;
        }
        self.unchecked.insert(after.id());
        after
    }

    /// Tells the pods whose annotation can't be read, once.
    fn tell_refused(&mut self) {
        for refusal in self.refused.values_mut().filter(|refusal| !refusal.is_told) {
            self.agent.events.warning_in_passing(&refusal.pod, "AddressesNotAllowed", "Plug", &refusal.message);
            refusal.is_told = true;
        }
    }

    async fn remove_others(
        &mut self,
        applied: &mut Applied,
        present: &BTreeMap<String, Vec<Endpoint>>,
    ) -> Result<(), String> {
        let wanted: BTreeSet<u32> = present.values().flatten().map(|e| e.vni).collect();
        for vni in self.agent.dataplane.networks().map_err(|e| e.to_string())? {
            if wanted.contains(&vni) {
                continue;
            }
            self.resolvers.stop(vni).await;
            applied.is_another(vni);
            self.entries.remove(vni);
            self.agent.dataplane.remove_network(vni).await.map_err(|e| e.to_string())?;
            tracing::info!(vni, "network removed from this node");
        }
        Ok(())
    }
}

/// The slices of each network that aren't being deleted.
fn of_networks(slices: &[Arc<NetworkNodeSlice>]) -> BTreeMap<&str, Vec<&Arc<NetworkNodeSlice>>> {
    let mut all: BTreeMap<&str, Vec<&Arc<NetworkNodeSlice>>> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.metadata.deletion_timestamp.is_none()) {
        all.entry(&slice.spec.network).or_default().push(slice);
    }
    all
}

pub(crate) fn of_network<'a>(
    slices: &'a [Arc<NetworkNodeSlice>],
    network: &str,
) -> impl Iterator<Item = &'a NetworkNodeSlice> {
    let network = network.to_owned();
    slices
        .iter()
        .map(AsRef::as_ref)
        .filter(move |s| s.spec.network == network && s.metadata.deletion_timestamp.is_none())
}
