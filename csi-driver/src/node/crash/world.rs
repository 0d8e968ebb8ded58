//! A cluster in miniature: an API, pools, agents that can be killed, and the controller, which can't.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, OnceLock};

use http::{Method, Request};
use jiff::Timestamp;
use kube::api::{DeleteParams, PostParams};
use kube::client::Body;
use kube::runtime::{reflector, watcher};
use kube::{Api, Client, ResourceExt};
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
use super::picture::{self, Pools};
use super::rules::{self, Written};
use crate::block::mounts::Mounts;
use crate::block::tools::Host;
use crate::controller::{self, Hub, decide};
use crate::node::agent::{self, Agent};
use crate::node::locks::Locks;
use crate::node::metrics::Metrics;
use crate::node::{Node, authorise, write};
use crate::transfer::{self, Identity, Limits};
use crate::volume;

const NODES: [&str; 2] = ["a", "b"];
/// Rounds after which a world that still changes never comes to rest.
const ROUNDS: usize = 60;

pub(super) struct World {
    pub(super) api: FakeApi,
    pub(super) pools: Pools,
    pub(super) fate: Arc<Fate>,
    client: Client,
    written: Written,
    agents: BTreeMap<&'static str, Process>,
    hub: Arc<Hub>,
    root: TempDir,
}

/// A node's agent as it runs.
struct Process {
    agent: Arc<Agent<Memory>>,
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
        let api = FakeApi::default();
        let pool = || Memory::new(&name("tank/portolan"), 1 << 30).with_capabilities(capabilities);
        let client = api.client();
        let hub = Arc::new(Hub::new(client.clone(), "z".into(), &mut prometheus_client::registry::Registry::default()));
        let mut world = Self {
            pools: NODES.iter().map(|node| (*node, pool())).collect(),
            fate: Arc::default(),
            client,
            written: Written::default(),
            agents: BTreeMap::new(),
            hub,
            root: tempfile::tempdir().unwrap(),
            api,
        };
        let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(world.client.clone());
        for node in NODES {
            let object = serde_json::from_value(serde_json::json!({ "metadata": { "name": node } })).unwrap();
            nodes.create(&PostParams::default(), &object).await.unwrap();
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
        let start = |status: &mut _| decide::start(status, to, Timestamp::now());
        write::status(&self.volumes(), &volume, start).await.unwrap();
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

    /// From now on effects count and the rules hold.
    pub(super) fn begin(&self, blows: &[Blow]) {
        let (api, pools, written) = (self.api.clone(), self.pools.clone(), self.written.clone());
        self.fate.begin(blows, Box::new(move || rules::broken(&api, &pools, &written)));
    }

    pub(super) fn picture(&self) -> String {
        picture::draw(&self.api, &self.pools)
    }

    /// Lets all go on until nothing changes any more. If `deletes` everything is deleted as soon as an agent has been killed.
    pub(super) async fn settle(&mut self, deletes: bool) {
        let (mut quiet, mut killed) = (0, false);
        for _ in 0..ROUNDS {
            let before = self.picture();
            for node in NODES {
                for volume in self.api.all::<PortableVolume>() {
                    killed |= self.step(node, volume).await;
                    if killed && deletes {
                        return self.delete_and_settle().await;
                    }
                }
            }
            self.control().await;
            quiet = if self.picture() == before { quiet + 1 } else { 0 };
            if quiet == 3 {
                return;
            }
        }
        panic!("it never comes to rest: {}\n{:#?}", self.picture(), self.fate.effects());
    }

    async fn delete_and_settle(&mut self) {
        self.delete_all().await;
        Box::pin(self.settle(false)).await;
    }

    /// One look of a node's agent at a volume; whether an agent was killed by it.
    async fn step(&mut self, node: &'static str, volume: PortableVolume) -> bool {
        let process = self.agents.get_mut(node).unwrap();
        fill(&mut process.snapshots, self.api.all());
        let mut work = Box::pin(agent::reconcile(Arc::new(volume), process.agent.clone()));
        let mut killed = None;
        loop {
            tokio::select! {
                biased;
                victim = self.fate.struck() => {
                    killed = Some(victim);
                    self.agents.remove(victim);
                    if victim == node {
                        break;
                    }
                }
                _ = &mut work => break,
            }
        }
        drop(work);
        if let Some(victim) = killed {
            // What an agent has started and does not wait for goes on for a while.
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
            self.start(victim).await;
        }
        killed.is_some()
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
        let client = client_of(self.api.clone(), life);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.announce(node, listener.local_addr().unwrap().to_string()).await;
        let ((seen, _), (snapshots_seen, snapshots)) = (reflector::store(), reflector::store());
        let me = identities()[node].clone();
        let shared = Arc::new(Node {
            name: node.to_owned(),
            zone: "z".into(),
            max_volumes: 0,
            pool: name("tank/portolan"),
            kubelet_dir: "/kubelet".into(),
            mounts: Mounts::new(self.root.path().join(node)),
            tools: Host(Runner::new()),
            zfs: Arc::new(zfs.clone()),
            volumes: Api::all(client.clone()),
            storage_nodes: Api::all(client.clone()),
            snapshots: Api::all(client.clone()),
            seen,
            snapshots_seen,
            events: Events::new(client, "test"),
            metrics: Metrics::register(&mut prometheus_client::registry::Registry::default()),
            locks: Locks::default(),
            unstaged: Mutex::default(),
            nudges: mpsc::unbounded_channel().0,
            orphans: Mutex::default(),
            identity: watch::channel(Some(me.clone())).1,
        });
        let judge = Arc::new(authorise::ByVolume(shared.clone()));
        let (shown, zfs) = (watch::channel(me).1, Arc::new(zfs));
        let served = transfer::serve(listener, shown, judge, zfs, Limits::default(), CancellationToken::new());
        let process =
            Process { agent: Arc::new(Agent::new(shared)), snapshots, transfers: tokio::spawn(served) };
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
fn fill(store: &mut reflector::store::Writer<PortableSnapshot>, all: Vec<PortableSnapshot>) {
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
