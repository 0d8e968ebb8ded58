//! Nodes, pods and what happens to them.

mod alone;
mod machines;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    net::IpAddr,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use k8s_openapi::api::apps::v1::StatefulSet;
use portolan_crds::{ContainerNetwork, ContainerNetworkSpec, ContainerNetworkStatus};
use portolan_operator::garbage::{EVERY, Gone};
use serde_json::json;

use super::{
    operator,
    server::{Random, Server, View, Without},
};
use crate::{
    addresses::{Addresses, Holder, Reservation},
    error::PlugError,
    journal::{Endpoint, Journal, tests::endpoint},
    known::Known,
    network::Network,
    pod::Owner,
};

/// How large a world is.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub nodes: usize,
    pub subnets: &'static [&'static str],
    pub sets: usize,
    pub replicas: usize,
    /// Pods at a time.
    pub most: usize,
    pub steps: usize,
}

struct Node {
    name: String,
    view: Arc<View>,
    journal: Arc<Journal>,
    known: Arc<Known>,
    /// Whether its agent has heard nothing since it started.
    is_alone: bool,
    /// The pods that its kubelet knows, by UID: until it hears that they are gone, it may make another sandbox for each.
    kubelet: BTreeMap<String, Pod>,
    /// None while the agent, or the machine, is down.
    agent: Option<Arc<Addresses<View>>>,
    is_on: bool,
    /// Whether it has a Node object.
    is_there: bool,
}

/// A pod that the API has.
#[derive(Clone)]
struct Pod {
    name: String,
    uid: String,
    node: usize,
    set: Option<Owner>,
    asked: Vec<IpAddr>,
    is_starting: bool,
}

/// What runs of a pod, whether the API has it still or not.
struct Sandbox {
    pod: String,
    node: usize,
    id: String,
    addresses: Vec<IpAddr>,
}

type Job<T> = Pin<Box<dyn Future<Output = T>>>;

struct Start {
    pod: Pod,
    job: Job<Result<Reservation, PlugError>>,
}

#[derive(Default)]
struct Counts {
    started: usize,
    refused: usize,
    moved: usize,
    crashes: usize,
    again: usize,
    nodes_deleted: usize,
    rounds: usize,
}

pub struct World {
    sizes: Sizes,
    server: Arc<Mutex<Server>>,
    random: Random,
    network: Arc<Network>,
    root: tempfile::TempDir,
    nodes: Vec<Node>,
    /// When machines are off whose Node object was deleted, in seconds.
    ends: BTreeSet<(u64, usize)>,
    pods: BTreeMap<String, Pod>,
    /// The names of `pods`, to choose from.
    names: Vec<String>,
    sandboxes: Vec<Sandbox>,
    /// Who has an address, and in how many sandboxes.
    holders: BTreeMap<IpAddr, BTreeMap<String, usize>>,
    starts: Vec<Start>,
    release: Vec<(usize, Job<()>)>,
    operator: Option<Job<()>>,
    gone: Arc<Mutex<Gone>>,
    begin: Instant,
    /// Seconds since.
    now: u64,
    next_round: u64,
    number: usize,
    counts: Counts,
}

impl World {
    pub fn new(sizes: Sizes, seed: u64, without: Without) -> Self {
        let subnets = sizes.subnets.iter().map(|subnet| (*subnet).to_owned()).collect();
        let mut object = ContainerNetwork::new("n", ContainerNetworkSpec { subnets, ..Default::default() });
        object.status = Some(ContainerNetworkStatus { vni: Some(77), ..Default::default() });
        // Journals are synced to disk, which is not what is looked at here.
        let memory = PathBuf::from("/dev/shm");
        let root = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let mut world = Self {
            sizes,
            server: Arc::new(Mutex::new(Server::new(seed, without))),
            random: Random(seed ^ 0x5eed),
            network: Arc::new(Network::new(&object).unwrap()),
            root: root.unwrap(),
            nodes: Vec::new(),
            ends: BTreeSet::new(),
            pods: BTreeMap::new(),
            names: Vec::new(),
            sandboxes: Vec::new(),
            holders: BTreeMap::new(),
            starts: Vec::new(),
            release: Vec::new(),
            operator: None,
            gone: Arc::default(),
            begin: Instant::now(),
            now: 0,
            next_round: 0,
            number: 0,
            counts: Counts::default(),
        };
        for node in 0..sizes.nodes {
            let name = format!("node-{node}");
            world.server.lock().unwrap().nodes.insert(name.clone());
            let view = Arc::new(View::new(name.clone(), Arc::clone(&world.server)));
            let journal = Arc::new(Journal::open(world.root.path().join(&name)).unwrap());
            let known = Arc::new(Known::open(&world.known_of(&name)).unwrap());
            let agent = Some(Arc::new(Addresses::new(Arc::clone(&view), Arc::clone(&journal), Arc::clone(&known))));
            world.nodes.push(Node {
                name,
                view,
                journal,
                known,
                is_alone: false,
                kubelet: BTreeMap::new(),
                agent,
                is_on: true,
                is_there: true,
            });
        }
        (0..sizes.sets).for_each(|set| world.make_set(set));
        world
    }

    pub fn told(&self) -> String {
        let Counts { started, refused, moved, again, crashes, nodes_deleted, rounds } = &self.counts;
        format!(
            "{started} starts of pods ({moved} of a StatefulSet's on another node, {again} by agents that are alone), {refused} that failed, {crashes} crashes, {nodes_deleted} nodes \
             deleted, {rounds} rounds of the operator, {} blocks, {} pods in the end, {} hours",
            self.server.lock().unwrap().blocks.len(),
            self.sandboxes.len(),
            self.now / 3600,
        )
    }

    /// Plays to the end, or until two pods have one address.
    pub fn play(&mut self) -> Result<(), String> {
        // Each node has pods before anything goes wrong.
        for node in 0..self.nodes.len() {
            self.make_pod(node);
        }
        for _ in 0..self.sizes.steps {
            self.now += self.random.next() % 2;
            self.due();
            for _ in 0..4 {
                self.go_on()?;
            }
            self.happens();
        }
        Ok(())
    }

    /// What is due: the ends of machines, and the operator's rounds.
    fn due(&mut self) {
        while let Some((at, node)) = self.ends.pop_first() {
            if at > self.now {
                self.ends.insert((at, node));
                break;
            }
            self.power_off(node);
        }
        if self.now >= self.next_round && self.operator.is_none() {
            self.next_round = self.now + EVERY.as_secs();
            self.counts.rounds += 1;
            if self.random.chance(200) {
                self.gone = Arc::default();
            }
            let now = self.begin + Duration::from_secs(self.now);
            self.operator = Some(Box::pin(operator::collect(Arc::clone(&self.server), Arc::clone(&self.gone), now)));
        }
        let mut context = Context::from_waker(Waker::noop());
        // It is slow now and then, so that much may happen between what it has read and what it does.
        for _ in 0..self.random.below(12) {
            if let Some(round) = &mut self.operator
                && round.as_mut().poll(&mut context).is_ready()
            {
                self.operator = None;
            }
        }
    }

    /// One of what is under way takes a step.
    fn go_on(&mut self) -> Result<(), String> {
        let mut context = Context::from_waker(Waker::noop());
        if !self.release.is_empty() {
            let which = self.random.below(self.release.len());
            if self.release[which].1.as_mut().poll(&mut context).is_ready() {
                drop(self.release.swap_remove(which));
            }
        }
        if self.starts.is_empty() {
            return Ok(());
        }
        let which = self.random.below(self.starts.len());
        let Poll::Ready(result) = self.starts[which].job.as_mut().poll(&mut context) else { return Ok(()) };
        let Start { pod, .. } = self.starts.swap_remove(which);
        if let Some(there) = self.pods.get_mut(&pod.name).filter(|there| there.node == pod.node) {
            there.is_starting = false;
        }
        match result {
            Ok(reservation) => self.plug(&pod, &reservation),
            Err(_) => {
                self.counts.refused += 1;
                Ok(())
            }
        }
    }

    /// As ADD does it: never what another pod of this node still has; an earlier sandbox of the same pod gives it up.
    fn plug(&mut self, pod: &Pod, reservation: &Reservation) -> Result<(), String> {
        let journal = Arc::clone(&self.nodes[pod.node].journal);
        let shares = |e: &Endpoint| e.addresses().any(|address| reservation.addresses.contains(&address));
        let before = journal.select(shares);
        if before.iter().any(|e| e.pod != pod.name) {
            self.counts.refused += 1;
            return Ok(());
        }
        before.iter().for_each(|e| self.end_sandbox(&e.container));
        self.number += 1;
        let id = format!("c{}", self.number);
        journal.put(self.endpoint(pod, &id, reservation)).unwrap();
        self.counts.started += 1;
        self.counts.again += usize::from(self.nodes[pod.node].is_alone);
        self.nodes[pod.node].kubelet.insert(pod.uid.clone(), pod.clone());
        let addresses = reservation.addresses.clone();
        for address in &addresses {
            let holders = self.holders.entry(*address).or_default();
            *holders.entry(pod.name.clone()).or_default() += 1;
            if holders.len() > 1 {
                let node = &self.nodes[pod.node].name;
                return Err(format!("{address} of {} on {node} is also another's: {holders:?}", pod.name));
            }
        }
        self.sandboxes.push(Sandbox { pod: pod.name.clone(), node: pod.node, id, addresses });
        Ok(())
    }

    fn endpoint(&self, pod: &Pod, container: &str, reservation: &Reservation) -> Endpoint {
        let mut addresses = self.network.with_prefixes(&reservation.addresses);
        let first = addresses.next().unwrap();
        Endpoint {
            network: self.network.name.clone(),
            address: first.addr(),
            prefix: first.prefix_len(),
            second: addresses.next(),
            pod: pod.name.clone(),
            uid: pod.uid.clone(),
            ..endpoint(container)
        }
    }

    /// All addresses once more, as the journals of machines that are on have them.
    pub fn check_all(&self) {
        let mut holders: BTreeMap<IpAddr, BTreeSet<String>> = BTreeMap::new();
        for node in self.nodes.iter().filter(|node| node.is_on) {
            for endpoint in node.journal.select(|_| true) {
                for address in endpoint.addresses() {
                    holders.entry(address).or_default().insert(endpoint.pod.clone());
                }
            }
        }
        assert!(holders.len() > self.sizes.nodes / 2 && holders.values().all(|pods| pods.len() == 1));
    }

    fn happens(&mut self) {
        let node = self.random.below(self.nodes.len());
        match self.random.below(1000) {
            0..250 if self.pods.len() < self.sizes.most => self.make_pod(node),
            250..400 => self.make_sets_pod(node),
            400..600 => self.start_some(),
            600..800 => self.end_some(),
            800..860 if !self.nodes[node].view.is_cut() => self.see(node),
            860..866 => self.crash_agent(node),
            866..915 => self.start_agent(node),
            915..920 => (0..20).for_each(|_| self.add_again()),
            920..923 => self.crash_machine(node),
            923..927 => self.cut(node, true),
            927..957 => self.cut(node, false),
            957..961 => self.delete_node(node),
            961..981 => self.return_node(node),
            981..987 => self.change_set(),
            987..1000 => self.release(node),
            _ => {}
        }
    }

    fn make_set(&mut self, set: usize) {
        self.number += 1;
        let (name, uid, replicas) = (format!("set{set}"), format!("uid-{}", self.number), self.sizes.replicas);
        let object = json!({"metadata": {"name": name, "uid": uid},
            "spec": {"replicas": replicas, "selector": {}, "template": {}, "serviceName": ""}});
        let object: StatefulSet = serde_json::from_value(object).unwrap();
        self.server.lock().unwrap().sets.insert(name, object);
    }

    /// A StatefulSet goes, whose pods end in their own time; or is made anew, or has fewer replicas.
    fn change_set(&mut self) {
        let set = self.random.below(self.sizes.sets);
        let name = format!("set{set}");
        let mut server = self.server.lock().unwrap();
        match server.sets.get_mut(&name).and_then(|it| it.spec.as_mut()) {
            None => {
                drop(server);
                self.make_set(set);
            }
            Some(_) if self.random.chance(5000) => drop(server.sets.remove(&name)),
            Some(spec) => spec.replicas = Some(1 + (self.random.next() % self.sizes.replicas as u64) as i32),
        }
    }

    fn add(&mut self, pod: Pod) {
        if pod.set.is_some() {
            self.server.lock().unwrap().pods.insert(pod.name.clone());
        }
        self.names.push(pod.name.clone());
        self.start(&pod.name, pod.clone());
    }

    fn make_pod(&mut self, node: usize) {
        self.number += 1;
        let mut asked = Vec::new();
        if self.random.chance(500) && !self.sandboxes.is_empty() {
            // One that another has now, or may just have had, or a neighbour of it.
            let which = self.random.below(self.sandboxes.len());
            asked = self.sandboxes[which].addresses.clone();
            asked.truncate(1);
            if let (Some(IpAddr::V4(address)), true) = (asked.first_mut(), self.random.chance(5000)) {
                *address = std::net::Ipv4Addr::from_bits(address.to_bits() ^ 1);
            }
        }
        let name = format!("web-{}", self.number);
        self.add(Pod { uid: name.clone(), name, node, set: None, asked, is_starting: false });
    }

    /// A StatefulSet's pod, which may have been elsewhere before. There is one of a name at a time.
    fn make_sets_pod(&mut self, node: usize) {
        let set = format!("set{}", self.random.below(self.sizes.sets));
        let name = format!("{set}-{}", self.random.below(self.sizes.replicas));
        let there = self.server.lock().unwrap().sets.get(&set).cloned();
        let Some(there) = there else { return };
        let replicas = there.spec.and_then(|spec| spec.replicas).unwrap_or_default();
        if self.pods.contains_key(&name) || !(0..replicas).any(|n| name == format!("{set}-{n}")) {
            return;
        }
        self.counts.moved += 1;
        let owner = Owner { kind: "StatefulSet".into(), name: set, uid: there.metadata.uid.unwrap_or_default() };
        self.number += 1;
        let uid = format!("{name}-{}", self.number);
        self.add(Pod { name, uid, node, set: Some(owner), asked: Vec::new(), is_starting: false });
    }

    /// The kubelet tries, if there is an agent and the API may have told it of the pod.
    fn start(&mut self, name: &str, mut pod: Pod) {
        let node = &self.nodes[pod.node];
        let can_hear = node.is_on && !node.view.is_cut() && node.is_there && !node.is_alone;
        let agent = node.agent.clone().filter(|_| can_hear);
        pod.is_starting = agent.is_some();
        self.pods.insert(name.to_owned(), pod.clone());
        let Some(agent) = agent else { return };
        let (network, of) = (Arc::clone(&self.network), pod.clone());
        let job = Box::pin(async move {
            let (stateful_set, asked) = (of.set.as_ref(), &of.asked[..]);
            let holder = Holder { namespace: "shop", pod: &of.name, uid: &of.uid, stateful_set, resolver: true, asked };
            agent.acquire(&network, &holder).await
        });
        self.starts.push(Start { pod, job });
    }

    fn some_pod(&mut self) -> Option<Pod> {
        let which = self.random.below(self.names.len());
        self.pods.get(self.names.get(which)?).cloned()
    }

    /// A pod that doesn't run is tried again, and one that runs gets another sandbox now and then.
    fn start_some(&mut self) {
        let Some(pod) = self.some_pod().filter(|pod| !pod.is_starting) else { return };
        let runs = self.nodes[pod.node].journal.select(|e| e.pod == pod.name).len() == 1;
        if !runs || self.random.chance(500) {
            self.start(&pod.name.clone(), pod);
        }
    }

    /// A pod ends: what runs of it first, then its object. A node that hears nothing does nothing.
    fn end_some(&mut self) {
        let Some(pod) = self.some_pod().filter(|pod| !pod.is_starting) else { return };
        let node = &self.nodes[pod.node];
        if !node.is_on || node.view.is_cut() || node.is_alone || node.agent.is_none() {
            return;
        }
        node.journal.select(|e| e.pod == pod.name).iter().for_each(|e| self.end_sandbox(&e.container));
        self.nodes[pod.node].kubelet.remove(&pod.uid);
        self.remove_object(&pod.name);
    }

    fn remove_object(&mut self, name: &str) {
        self.pods.remove(name);
        self.server.lock().unwrap().pods.remove(name);
        if let Some(which) = self.names.iter().position(|it| it == name) {
            self.names.swap_remove(which);
        }
    }

    fn end_sandbox(&mut self, id: &str) {
        let Some(which) = self.sandboxes.iter().position(|it| it.id == id) else { return };
        let sandbox = self.sandboxes.swap_remove(which);
        for address in &sandbox.addresses {
            let Some(holders) = self.holders.get_mut(address) else { continue };
            if let Some(count) = holders.get_mut(&sandbox.pod) {
                *count -= 1;
                if *count == 0 {
                    holders.remove(&sandbox.pod);
                }
            }
        }
        self.nodes[sandbox.node].journal.remove(&format!("{id}.eth1")).unwrap();
    }
}
