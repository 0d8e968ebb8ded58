//! A cluster in miniature: an API, pools, mounts, agents that can be killed, and kubelets and the controller, which can't.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, OnceLock};

use http::{Method, Request};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::client::Body;
use kube::runtime::{reflector, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use portolan_crds::{
    PortableSnapshot, PortableSnapshotSpec, PortableVolume, PortableVolumeSpec, SNAPSHOT_FINALIZER, StorageNode,
    StorageNodeStatus, VOLUME_FINALIZER, condition,
};
use portolan_runtime::conditions;
use portolan_runtime::events::Events;
use portolan_tests::api::{FakeApi, Path};
use portolan_zfs::memory::Memory;
use portolan_zfs::{Capabilities, DatasetName, Runner, Zfs};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::fate::{Blow, Fate, Life};
use super::host::{Host, Seen};
use super::kubelet::{self, Call};
use super::picture::{self, Pools};
use super::rules::{self, Written};
use crate::block::mounts::Mounts;
use crate::block::tools;
use crate::controller::{self, Hub};
use crate::handoff::{Ask, Event};
use crate::node::agent::{self, Agent};
use crate::node::locks::Locks;
use crate::node::metrics::Metrics;
use crate::node::{Node, authorise, write};
use crate::transfer::{self, Identity, Limits, Turns};
use crate::volume;

const NODES: [&str; 2] = ["a", "b"];
/// Rounds without a change after which there will be none.
const QUIET: usize = 2;
/// Rounds after which a world that still changes never comes to rest.
const ROUNDS: usize = 60;

pub(super) struct World {
    pub(super) api: FakeApi,
    pub(super) pools: Pools,
    pub(super) fate: Arc<Fate>,
    client: Client,
    written: Written,
    hosts: BTreeMap<&'static str, Arc<Host>>,
    agents: BTreeMap<&'static str, Process>,
    /// What kubelets still have to ask for, in this order.
    calls: VecDeque<(&'static str, Call)>,
    /// Whether an agent has started anew, and nobody has done anything since.
    restarted: bool,
    hub: Arc<Hub>,
    _root: TempDir,
}

/// A node's agent as it runs.
struct Process {
    node: Arc<Node<Memory>>,
    agent: Arc<Agent<Memory>>,
    volumes: reflector::store::Writer<PortableVolume>,
    snapshots: reflector::store::Writer<PortableSnapshot>,
    transfers: JoinHandle<()>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.transfers.abort();
    }
}

pub(super) fn name(text: &str) -> DatasetName {
    DatasetName::new(text).unwrap()
}

impl World {
    pub(super) async fn new(capabilities: Capabilities) -> Self {
        let (api, root) = (FakeApi::default(), tempfile::tempdir().unwrap());
        let pool = || Memory::new(&name("tank/portolan"), 1 << 30).with_capabilities(capabilities);
        let client = api.client();
        let hub = Arc::new(Hub::new(client.clone(), "z".into(), &mut prometheus_client::registry::Registry::default()));
        let pools: Pools = NODES.iter().map(|node| (*node, pool())).collect();
        let host = |(node, pool): (&&'static str, &Memory)| (*node, Host::new(root.path().join(node), pool.clone()));
        let mut world = Self {
            hosts: pools.iter().map(host).collect(),
            pools,
            fate: Arc::default(),
            client,
            written: Written::default(),
            agents: BTreeMap::new(),
            calls: VecDeque::new(),
            restarted: false,
            hub,
            _root: root,
            api,
        };
        let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(world.client.clone());
        for node in NODES {
            let object = serde_json::from_value(serde_json::json!({ "metadata": { "name": node } })).unwrap();
            nodes.create(&PostParams::default(), &object).await.unwrap();
            let ready = serde_json::json!({ "status": { "conditions": [{ "type": "Ready", "status": "True" }] } });
            nodes.patch_status(node, &PatchParams::default(), &Patch::Merge(ready)).await.unwrap();
            world.start(node).await;
        }
        world
    }

    pub(super) fn volumes(&self) -> Api<PortableVolume> {
        Api::all(self.client.clone())
    }

    pub(super) fn snapshots(&self) -> Api<PortableSnapshot> {
        Api::all(self.client.clone())
    }

    /// Asks for a volume.
    pub(super) async fn ask_volume(&self, name: &str, node: &str, change: impl FnOnce(&mut PortableVolumeSpec)) {
        let mut spec = PortableVolumeSpec { size: "1Mi".into(), size_bytes: 1 << 20, ..PortableVolumeSpec::default() };
        spec.placement.node = node.into();
        change(&mut spec);
        let mut volume = PortableVolume::new(name, spec);
        volume.metadata.finalizers = Some(vec![VOLUME_FINALIZER.into()]);
        self.volumes().create(&PostParams::default(), &volume).await.unwrap();
    }

    /// Asks for a snapshot.
    pub(super) async fn ask_snapshot(&self, name: &str, of: &str, change: impl FnOnce(&mut PortableSnapshotSpec)) {
        let mut spec = PortableSnapshotSpec { volume: of.into(), ..PortableSnapshotSpec::default() };
        change(&mut spec);
        let mut snapshot = PortableSnapshot::new(name, spec);
        snapshot.metadata.finalizers = Some(vec![SNAPSHOT_FINALIZER.into()]);
        self.snapshots().create(&PostParams::default(), &snapshot).await.unwrap();
    }

    /// Asks for a move, as an attachment does.
    pub(super) async fn ask_move(&self, name: &str, to: &str) {
        let volume = self.volumes().get(name).await.unwrap();
        let ask = Ask { to: to.to_owned(), ..Ask::default() };
        write::event(&self.volumes(), &volume, Event::Asked(ask, write::now())).await.unwrap();
    }

    /// Ends the move that is under way.
    pub(super) async fn ask_abort(&self, name: &str) {
        let volume = self.volumes().get(name).await.unwrap();
        let event = Event::Aborted { why: "not wanted".into(), at: write::now() };
        write::event(&self.volumes(), &volume, event).await.unwrap();
    }

    /// Deletes all that there is.
    pub(super) async fn delete_all(&self) {
        for volume in self.api.all::<PortableVolume>() {
            self.volumes().delete(&volume.name_any(), &DeleteParams::default()).await.unwrap();
        }
        for snapshot in self.api.all::<PortableSnapshot>() {
            self.snapshots().delete(&snapshot.name_any(), &DeleteParams::default()).await.unwrap();
        }
    }

    /// What a pod writes to a volume where that is.
    pub(super) async fn write(&self, volume: &str, data: &str) {
        let owner = volume::status(&self.volumes().get(volume).await.unwrap()).owner.unwrap();
        let (pool, dataset) = (&self.pools[owner.as_str()], name("tank/portolan").child(volume).unwrap());
        pool.mount(&dataset).await.unwrap();
        pool.write(&dataset, data.as_bytes()).unwrap();
        pool.unmount(&dataset).await.unwrap();
        self.expect(volume, data);
    }

    /// What a volume must have in it once somebody owns it.
    pub(super) fn expect(&self, volume: &str, data: &str) {
        self.written.lock().unwrap().insert(volume.to_owned(), data.as_bytes().to_vec());
    }

    /// A pod on this node begins or ends.
    pub(super) fn ask_kubelet(&mut self, node: &'static str, calls: [Call; 2]) {
        self.calls.extend(calls.map(|call| (node, call)));
    }

    /// What kubelets still have to ask for was asked for otherwise.
    pub(super) fn forget_calls(&mut self) {
        self.calls.clear();
    }

    /// All pods end, however far they have come.
    pub(super) fn end_pods(&mut self) {
        self.calls.clear();
        NODES.iter().for_each(|node| self.ask_kubelet(node, kubelet::END));
    }

    /// From now on effects count and the rules hold.
    pub(super) fn begin(&self, blows: &[Blow]) {
        let (api, pools, written) = (self.api.clone(), self.pools.clone(), self.written.clone());
        let hosts: Vec<Arc<Host>> = self.hosts.values().cloned().collect();
        let look = move || {
            let mut wrong = rules::broken(&api, &pools, &written);
            wrong.extend(hosts.iter().flat_map(|host| host.broken()));
            wrong
        };
        self.fate.begin(blows, Box::new(look));
    }

    pub(super) fn picture(&self) -> String {
        let mut text = picture::draw(&self.api, &self.pools);
        self.hosts.iter().for_each(|(node, host)| host.draw(&mut text, node));
        text
    }

    /// How often agents have done something, and anybody has written something else to the API.
    fn changes(&self) -> (usize, u64) {
        (self.fate.effects().len(), self.api.version())
    }

    /// Lets all go on until nothing changes any more.
    pub(super) async fn settle(&mut self) {
        // Apart, here and below: one future of all of it is more than a test's stack holds.
        while Box::pin(self.settle_unless_killed()).await {}
    }

    /// Lets all go on until nothing changes any more, or until an agent has been killed, and is started again: true.
    pub(super) async fn settle_unless_killed(&mut self) -> bool {
        let mut quiet = 0;
        for _ in 0..ROUNDS {
            let before = self.changes();
            // A kubelet may come before an agent that has started anew has looked at anything.
            if std::mem::take(&mut self.restarted) && Box::pin(self.kubelets()).await {
                return true;
            }
            for node in NODES {
                for volume in self.api.all::<PortableVolume>() {
                    if Box::pin(self.look(node, volume)).await {
                        return true;
                    }
                }
            }
            if Box::pin(self.kubelets()).await {
                return true;
            }
            Box::pin(self.control()).await;
            quiet = if self.changes() == before { quiet + 1 } else { 0 };
            if quiet == QUIET {
                assert!(self.calls.is_empty(), "not done: {:?}\n{}", self.calls, self.picture());
                return false;
            }
        }
        panic!("it never comes to rest: {}\n{:#?}", self.picture(), self.fate.effects());
    }

    /// The kubelets' calls, as far as they are answered well; whether an agent was killed by one.
    async fn kubelets(&mut self) -> bool {
        while let Some((node, call)) = self.calls.front().copied() {
            let asked = self.call(node, call);
            match self.unless_killed(node, asked).await {
                None => return true,
                Some(Ok(())) => _ = self.calls.pop_front(),
                // Called again in the next round.
                Some(Err(_)) => return false,
            }
        }
        false
    }

    /// One call of a node's kubelet.
    pub(super) fn call(&self, node: &str, call: Call) -> impl Future<Output = Result<(), tonic::Status>> + use<> {
        let reads =
            self.api.all::<PortableVolume>().iter().any(|it| it.name_any() == kubelet::VOLUME && it.spec.read_only);
        kubelet::call(self.agents[node].node.clone(), call, reads)
    }

    pub(super) fn agent(&self, node: &str) -> Arc<Agent<Memory>> {
        self.agents[node].agent.clone()
    }

    pub(super) fn node(&self, node: &str) -> Arc<Node<Memory>> {
        self.agents[node].node.clone()
    }

    /// One look of a node's agent at each volume.
    pub(super) async fn look_all(&mut self, node: &'static str) {
        for volume in self.api.all::<PortableVolume>() {
            Box::pin(self.look(node, volume)).await;
        }
    }

    /// Lets a node's watches come up with the API.
    pub(super) fn see(&mut self, node: &str) {
        let process = self.agents.get_mut(node).unwrap();
        fill(&mut process.volumes, self.api.all());
        fill(&mut process.snapshots, self.api.all());
    }

    /// One look of a node's agent at a volume; whether an agent was killed by it.
    pub(super) async fn look(&mut self, node: &'static str, volume: PortableVolume) -> bool {
        self.see(node);
        let agent = self.agent(node);
        self.unless_killed(node, agent::reconcile(Arc::new(volume), agent)).await.is_none()
    }

    /// Waits for what a node's agent does. If any agent is killed meanwhile it is gone, and there is no answer; then it is started again.
    async fn unless_killed<T>(&mut self, node: &'static str, work: impl Future<Output = T>) -> Option<T> {
        let mut work = Box::pin(work);
        let mut done = None;
        while self.agents.contains_key(node) {
            tokio::select! {
                biased;
                victim = self.fate.struck() => drop(self.agents.remove(victim)),
                answer = &mut work => {
                    done = Some(answer);
                    break;
                }
            }
        }
        drop(work);
        while let Some(victim) = self.fate.victim() {
            self.agents.remove(victim);
        }
        if self.agents.len() == NODES.len() {
            return done;
        }
        // What an agent has started and does not wait for goes on for a while.
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
        for node in NODES {
            if !self.agents.contains_key(node) {
                self.restarted = true;
                self.start(node).await;
            }
        }
        None
    }

    /// What the controller does.
    async fn control(&self) {
        for volume in self.api.all::<PortableVolume>() {
            let looked = controller::volumes::reconcile(Arc::new(volume), self.hub.clone()).await;
            assert!(looked.is_ok(), "{looked:?}");
        }
        for snapshot in self.api.all::<PortableSnapshot>() {
            let looked = controller::snapshots::reconcile(Arc::new(snapshot), self.hub.clone()).await;
            assert!(looked.is_ok(), "{looked:?}");
        }
    }

    /// Starts a node's agent.
    async fn start(&mut self, node: &'static str) {
        let life = Life::new(node, self.fate.clone());
        let zfs = self.pools[node].witnessed(life.clone());
        let kernel = Arc::new(Seen(self.hosts[node].clone(), life.clone()));
        let client = client_of(self.api.clone(), life);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.announce(node, listener.local_addr().unwrap().to_string()).await;
        let ((seen, volumes), (snapshots_seen, snapshots)) = (reflector::store(), reflector::store());
        let me = identities()[node].clone();
        let shared = Arc::new(Node {
            name: node.to_owned(),
            zone: "z".into(),
            max_volumes: 0,
            pool: name("tank/portolan"),
            kubelet_dir: "/kubelet".into(),
            mounts: Mounts::with_kernel(self.hosts[node].root(), kernel),
            tools: tools::Host(Runner::new()),
            zfs: Arc::new(zfs.clone()),
            volumes: Api::all(client.clone()),
            storage_nodes: Api::all(client.clone()),
            snapshots: Api::all(client.clone()),
            seen,
            snapshots_seen,
            events: Events::new(client, "test"),
            metrics: Metrics::register(&mut prometheus_client::registry::Registry::default()),
            locks: Locks::default(),
            receives: Turns::new(4),
            unstaged: Mutex::default(),
            addresses: Mutex::default(),
            nudges: mpsc::unbounded_channel().0,
            orphans: Mutex::default(),
            identity: watch::channel(Some(me.clone())).1,
        });
        let judge = Arc::new(authorise::ByVolume(shared.clone()));
        let (shown, zfs) = (watch::channel(me).1, Arc::new(zfs));
        let served = transfer::serve(listener, shown, judge, zfs, Limits::default(), CancellationToken::new());
        let process = Process {
            agent: Arc::new(Agent::new(shared.clone())),
            node: shared,
            volumes,
            snapshots,
            transfers: tokio::spawn(served),
        };
        self.agents.insert(node, process);
    }

    /// Says where a node's transfers are to be had.
    async fn announce(&self, node: &str, address: String) {
        let nodes: Api<StorageNode> = Api::all(self.client.clone());
        let mut object = match nodes.get_opt(node).await.unwrap() {
            Some(object) => object,
            None => nodes.create(&PostParams::default(), &StorageNode::new(node, Default::default())).await.unwrap(),
        };
        let mut status = StorageNodeStatus { transfer_address: Some(address), ..StorageNodeStatus::default() };
        conditions::set(&mut status.conditions, condition::READY, condition::TRUE, "Ready", "", None);
        object.status = Some(status);
        nodes.replace_status(node, &PostParams::default(), &object).await.unwrap();
    }
}

/// Makes a store what the API has.
fn fill<K>(store: &mut reflector::store::Writer<K>, all: Vec<K>)
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    store.apply_watcher_event(&watcher::Event::Init);
    for object in all {
        store.apply_watcher_event(&watcher::Event::InitApply(object));
    }
    store.apply_watcher_event(&watcher::Event::InitDone);
}

/// An agent's way to the API: what it writes there are effects, its Events excepted.
fn client_of(api: FakeApi, life: Arc<Life>) -> Client {
    let service = tower::service_fn(move |request: Request<Body>| {
        let (api, life) = (api.clone(), life.clone());
        async move {
            let path = Path::parse(request.uri().path()).unwrap();
            let what = format!("{} {} {} {}", request.method(), path.kind, path.name, path.part);
            let counts = request.method() != Method::GET && path.kind.starts_with("portolan.dev/");
            life.live().await;
            let answer = api.answer(request);
            Ok::<_, Infallible>(if counts { life.effect(what.trim(), answer).await } else { answer.await })
        }
    });
    Client::new(service, "default")
}

/// The nodes' certificates.
fn identities() -> &'static BTreeMap<&'static str, Arc<Identity>> {
    static MADE: OnceLock<BTreeMap<&'static str, Arc<Identity>>> = OnceLock::new();
    MADE.get_or_init(|| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        let issue = |node: &'static str| {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(vec![format!("{node}.node.portolan.dev")]).unwrap();
            params.distinguished_name.push(DnType::CommonName, format!("node:{node}"));
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            let certificate = params.signed_by(&key, &issuer).unwrap().pem();
            let pem = key.serialize_pem();
            (node, Arc::new(Identity::new(certificate.as_bytes(), pem.as_bytes(), authority.as_bytes()).unwrap()))
        };
        NODES.map(issue).into_iter().collect()
    })
}
