//! Nodes that take addresses of one network through an API server in memory, are killed and start anew.

use std::path::PathBuf;

use kube::{
    Api,
    api::{DeleteParams, Patch, PostParams},
    runtime::watcher::Event,
};
use portolan_crds::{ContainerNetwork, ContainerNetworkSpec, ContainerNetworkStatus};
use portolan_net::blocks;
use portolan_tests::api::FakeApi;
use proptest::prelude::*;

use super::*;
use crate::journal::tests::endpoint;

const DUAL: [&str; 2] = ["fd32::/120", "10.32.0.0/27"];
const IPV4: [&str; 1] = ["10.32.0.0/28"];
const IPV6: [&str; 1] = ["fd32::/120"];

struct World {
    api: FakeApi,
    network: Network,
    root: tempfile::TempDir,
    nodes: Vec<Node>,
}

struct Node {
    addresses: Addresses,
    claims: kube::runtime::reflector::store::Writer<IPClaim>,
}

impl World {
    fn new(subnets: &[&str], nodes: usize) -> Self {
        let subnets = subnets.iter().map(|subnet| (*subnet).to_owned()).collect();
        let mut object =
            ContainerNetwork::new("backend", ContainerNetworkSpec { subnets, ..ContainerNetworkSpec::default() });
        object.status = Some(ContainerNetworkStatus { vni: Some(77), ..ContainerNetworkStatus::default() });
        let network = Network::new(&object).unwrap();
        let mut world =
            Self { api: FakeApi::default(), network, root: tempfile::tempdir().unwrap(), nodes: Vec::new() };
        world.nodes = (0..nodes).map(|node| world.start(node)).collect();
        world
    }

    /// A node's agent as it starts: its journal is what is on disk, its watch has seen everything.
    fn start(&self, node: usize) -> Node {
        let (cluster, claims) = Cluster::with_claims(self.api.client(), &format!("node-{node}"));
        let journal = Journal::open(self.directory(node)).unwrap();
        let known = crate::known::Known::open(&self.directory(node).with_extension("known")).unwrap();
        let mut node =
            Node { addresses: Addresses::new(Arc::new(cluster), Arc::new(journal), Arc::new(known)), claims };
        self.see(&mut node);
        node
    }

    fn directory(&self, node: usize) -> PathBuf {
        self.root.path().join(format!("node-{node}"))
    }

    fn restart(&mut self, node: usize) {
        self.nodes[node] = self.start(node);
    }

    /// The watch catches up.
    fn see(&self, node: &mut Node) {
        node.claims.apply_watcher_event(&Event::Init);
        for claim in self.api.all::<IPClaim>() {
            node.claims.apply_watcher_event(&Event::InitApply(claim));
        }
        node.claims.apply_watcher_event(&Event::InitDone);
    }

    fn see_all(&mut self) {
        let mut nodes = std::mem::take(&mut self.nodes);
        nodes.iter_mut().for_each(|node| self.see(node));
        self.nodes = nodes;
    }

    async fn acquire(&self, node: usize, pod: &str) -> Result<Reservation, PlugError> {
        self.acquire_asked(node, pod, &[]).await
    }

    async fn acquire_asked(&self, node: usize, pod: &str, asked: &[IpAddr]) -> Result<Reservation, PlugError> {
        // A name with a number at its end is a StatefulSet's pod's.
        let set = Owner { kind: "StatefulSet".into(), name: "db".into(), uid: "uid".into() };
        let stateful_set = pod.starts_with("db-").then_some(&set);
        let holder = Holder { namespace: "shop", pod, uid: pod, stateful_set, resolver: true, asked };
        self.nodes[node].addresses.acquire(&self.network, &holder).await
    }

    /// As ADD does it: the addresses are a pod's once the journal says so.
    async fn plug(&self, node: usize, pod: &str) -> Result<Vec<IpAddr>, PlugError> {
        self.plug_asked(node, pod, &[]).await
    }

    async fn plug_asked(&self, node: usize, pod: &str, asked: &[&str]) -> Result<Vec<IpAddr>, PlugError> {
        let asked: Vec<IpAddr> = asked.iter().map(|address| address.parse().unwrap()).collect();
        let reservation = self.acquire_asked(node, pod, &asked).await?;
        let mut addresses = self.network.with_prefixes(&reservation.addresses);
        let first = addresses.next().unwrap();
        let endpoint = Endpoint {
            address: first.addr(),
            prefix: first.prefix_len(),
            second: addresses.next(),
            asks_from: reservation.asks_from,
            pod: pod.into(),
            ..endpoint(pod)
        };
        self.nodes[node].addresses.journal.put(endpoint)?;
        Ok(reservation.addresses.clone())
    }

    fn unplug(&self, pod: &str) {
        for node in &self.nodes {
            node.addresses.journal.remove(&format!("{pod}.eth1")).unwrap();
        }
    }

    /// Who has which addresses, as the journals have it.
    fn pods(&self) -> Vec<(usize, Endpoint)> {
        let journals = self.nodes.iter().map(|node| &node.addresses.journal).enumerate();
        journals.flat_map(|(node, journal)| journal.select(|_| true).into_iter().map(move |e| (node, e))).collect()
    }

    fn is_reserved(&self) -> bool {
        self.nodes.iter().any(|node| !node.addresses.reserved.lock().unwrap().is_empty())
    }

    fn blocks(&self) -> Api<IPBlock> {
        Api::all(self.api.client())
    }

    fn claims(&self) -> Api<IPClaim> {
        Api::all(self.api.client())
    }

    /// All blocks of a subnet are another node's.
    async fn take_blocks(&self, subnet: &str) {
        for block in blocks(subnet.parse().unwrap()) {
            let spec = IPBlockSpec { network: "backend".into(), cidr: block.to_string(), node: "other".into() };
            let block = IPBlock::new(&block_name("backend", block), spec);
            self.blocks().create(&PostParams::default(), &block).await.unwrap();
        }
    }
}

fn texts(addresses: &[IpAddr]) -> Vec<String> {
    addresses.iter().map(IpAddr::to_string).collect()
}

#[test]
fn a_block_has_one_name() {
    let name = |cidr: &str| block_name("backend", cidr.parse().unwrap());
    assert_eq!(name("10.32.0.64/26"), "backend-10-32-0-64");
    assert_eq!(name("fd32::/122"), "backend-fd32-0000-0000-0000-0000-0000-0000-0000");
    assert_eq!(name("fd32::40/122"), name("fd32:0:0::0040/122"));
}

#[tokio::test]
async fn a_pod_has_an_address_of_each_family() {
    for (subnets, wanted) in [(&DUAL[..], "46"), (&IPV4, "4"), (&IPV6, "6")] {
        let world = World::new(subnets, 1);
        let families = |addresses: &[IpAddr]| -> String {
            addresses.iter().map(|address| if address.is_ipv4() { '4' } else { '6' }).collect()
        };
        assert_eq!(families(&world.plug(0, "web").await.unwrap()), wanted);
        assert_eq!(families(&world.plug(0, "db-0").await.unwrap()), wanted);
        let claim = world.api.all::<IPClaim>().remove(0);
        assert_eq!(families(&claim.spec.addresses().collect::<Vec<_>>()), wanted);
        assert_eq!(claim.spec.second_address.is_some(), wanted == "46");
        assert!(!world.is_reserved(), "the journal has them");
    }
}

#[tokio::test]
async fn a_family_that_is_exhausted_is_named_and_nothing_is_kept() {
    // The first two addresses of an IPv4 subnet, which no pod gets, are all of a /27's first block.
    for (full, count) in [("fd32::/120", 16), ("10.32.0.0/27", 15)] {
        let world = World::new(&DUAL, 1);
        world.take_blocks(full).await;
        for pod in ["web", "db-0"] {
            let error = world.plug(0, pod).await.unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "ContainerNetwork backend: each of the {count} blocks of subnet {full} belongs to a node already: no address is left for this one"
                )
            );
        }
        assert!(!world.is_reserved() && world.pods().is_empty() && world.api.all::<IPClaim>().is_empty());
        // The other node gives one back: it heals by itself.
        let block = world.api.all::<IPBlock>().into_iter().find(|b| b.spec.cidr.starts_with(&full[..2])).unwrap();
        let blocks = world.blocks();
        blocks.delete(&block.name_any(), &DeleteParams::default()).await.unwrap();
        assert_eq!(world.plug(0, "db-0").await.unwrap().len(), 2);
    }
}

#[tokio::test]
async fn a_claim_of_an_earlier_release_keeps_its_address() {
    let old = || {
        let spec = serde_json::json!({"network": "backend", "address": "10.32.0.9", "namespace": "shop", "pod": "db-0",
            "owner": "db", "ownerUid": "uid"});
        IPClaim::new("backend.shop.db-0", serde_json::from_value(spec).unwrap())
    };
    for (subnets, wanted) in [(&IPV4[..], 1), (&DUAL, 2)] {
        let mut world = World::new(subnets, 2);
        world.claims().create(&PostParams::default(), &old()).await.unwrap();
        world.see_all();
        let addresses = world.plug(0, "db-0").await.unwrap();
        assert_eq!((addresses.len(), addresses[0].to_string()), (wanted, "10.32.0.9".to_owned()));
        assert_eq!(world.api.all::<IPClaim>()[0].spec.node.as_deref(), Some("node-0"), "which it didn't say");
        let before = world.api.all::<IPClaim>();
        world.unplug("db-0");
        world.plug(0, "db-0").await.unwrap();
        let now = world.api.all::<IPClaim>();
        assert_eq!(now[0].spec, before[0].spec, "it is right as it is");
        assert_ne!(now[0].resource_version(), before[0].resource_version(), "whoever is about to delete it notices");
        // The second address is as sticky, on another node and before its watch has shown it.
        world.unplug("db-0");
        assert_eq!(world.plug(1, "db-0").await.unwrap(), addresses);
        // Nobody else gets them from the node that gave them, which may not have seen the claim as it is now.
        for pod in 0..6 {
            let other = world.plug(0, &format!("web-{pod}")).await.unwrap();
            assert!(other.iter().all(|address| !addresses.contains(address)), "{other:?}");
        }
    }
}

#[tokio::test]
async fn a_claim_that_holds_an_address_of_elsewhere_is_refused() {
    let world = World::new(&DUAL, 1);
    world.plug(0, "db-0").await.unwrap();
    world.unplug("db-0");
    let patch = serde_json::json!({"spec": {"secondAddress": "fd33::9"}});
    let claims = world.claims();
    claims.patch("backend.shop.db-0", &Default::default(), &Patch::Merge(patch)).await.unwrap();
    let error = world.plug(0, "db-0").await.unwrap_err().to_string();
    assert!(error.starts_with("IPClaim backend.shop.db-0 holds fd33::9, which is not in 10.32.0.0/27 or fd32::/120"));
}

#[tokio::test]
async fn pods_without_ipv4_ask_from_different_addresses_of_their_node() {
    let mut world = World::new(&IPV6, 1);
    for pod in 0..3 {
        world.plug(0, &format!("web-{pod}")).await.unwrap();
    }
    world.restart(0);
    world.unplug("web-1");
    world.plug(0, "web-3").await.unwrap();
    let mut asked: Vec<_> = world.pods().into_iter().map(|(_, e)| e.asks_from.unwrap().to_string()).collect();
    asked.sort();
    assert_eq!(asked, ["169.254.56.1", "169.254.56.2", "169.254.56.3"]);
    let world = World::new(&DUAL, 1);
    world.plug(0, "web").await.unwrap();
    assert_eq!(world.pods()[0].1.asks_from, None, "its own address does");
}

#[tokio::test]
async fn a_block_with_a_sticky_address_of_either_family_stays() {
    let mut world = World::new(&DUAL, 2);
    let sticky = world.plug(0, "db-0").await.unwrap();
    world.unplug("db-0");
    assert!(!world.nodes[0].addresses.release("backend").await.unwrap(), "before the watch shows the claim");
    world.restart(0);
    assert!(!world.nodes[0].addresses.release("backend").await.unwrap());
    let kept: Vec<IpNet> = world.api.all::<IPBlock>().iter().map(|b| b.spec.cidr.parse().unwrap()).collect();
    assert!(kept.len() == 2 && sticky.iter().all(|address| kept.iter().any(|block| block.contains(address))));
}

#[tokio::test]
async fn a_pod_gets_what_it_asks_for_or_is_told_why_not() {
    let mut world = World::new(&DUAL, 2);
    assert_eq!(
        texts(&world.plug_asked(0, "web", &["fd32::17", "10.32.0.7"]).await.unwrap()),
        ["10.32.0.7", "fd32::17"]
    );
    let one = world.plug_asked(0, "one", &["10.32.0.6"]).await.unwrap();
    assert_eq!((one.len(), one[0].to_string()), (2, "10.32.0.6".to_owned()), "the other is any");
    let error = |result: Result<Vec<IpAddr>, PlugError>| result.unwrap_err().to_string();
    let taken = "annotation portolan.dev/networks: ips: 10.32.0.7 of ContainerNetwork backend is given already: to pod shop/web";
    assert_eq!(error(world.plug_asked(0, "thief", &["10.32.0.7"]).await), taken);
    // Its own node's block: no other node gives of it, whether the address is taken or not.
    for address in ["10.32.0.7", "10.32.0.6"] {
        let foreign = error(world.plug_asked(1, "thief", &[address]).await);
        assert!(
            foreign.contains(&format!(
                "{address} of ContainerNetwork backend is of block 10.32.0.6/31, which is node node-0's"
            )),
            "{foreign}"
        );
    }
    for wrong in ["10.32.0.0", "10.32.0.1", "10.32.0.31", "10.33.0.5", "fd33::5", "fd32::", "fd32::1"] {
        let refused = error(world.plug_asked(0, "wrong", &[wrong]).await);
        assert!(refused.starts_with(&format!("annotation portolan.dev/networks: ips: {wrong} was given for ContainerNetwork backend; allowed: an address of 10.32.0.0/27 or fd32::/120")), "{refused}");
    }
    // What two ask for at once, one gets.
    let same = ["10.32.0.20".parse().unwrap()];
    let (a, b) = tokio::join!(world.acquire_asked(1, "a", &same), world.acquire_asked(1, "b", &same));
    assert!(a.is_ok() != b.is_ok());
    drop((a, b));
    // The same pod's next sandbox gets it while the one before still has it; a StatefulSet's pod keeps it, and nobody else gets it.
    assert!(world.plug_asked(0, "web", &["10.32.0.7"]).await.is_ok());
    world.plug_asked(0, "db-0", &["10.32.0.10"]).await.unwrap();
    world.unplug("db-0");
    assert!(error(world.plug_asked(0, "thief", &["10.32.0.10"]).await).contains("is given already"));
    assert_eq!(
        world.plug_asked(1, "db-0", &["10.32.0.10"]).await.unwrap()[0].to_string(),
        "10.32.0.10",
        "wherever it is"
    );
    world.unplug("db-0");
    let differs = error(world.plug_asked(1, "db-0", &["10.32.0.12"]).await);
    assert_eq!(
        differs,
        "annotation portolan.dev/networks: ips: 10.32.0.12 was given, but IPClaim backend.shop.db-0 keeps 10.32.0.10 for this pod; allowed: that, or delete the IPClaim"
    );
    assert!(!world.is_reserved(), "nothing is kept of what was refused");
    world.restart(0);
    assert_eq!(error(world.plug_asked(0, "thief", &["10.32.0.7"]).await), taken, "after a restart too");
}

#[derive(Clone, Debug)]
enum Step {
    /// So many pods at once, on nodes from this one on.
    Plug(usize, usize),
    /// A StatefulSet's pod starts on a node, having ended elsewhere.
    Move(usize, usize),
    /// A node's agent is killed after it gave addresses to a pod, before the journal has them.
    KillInPlug(usize, bool),
    /// A pod that asks for the address of this number.
    Ask(usize, u8),
    Unplug(usize),
    Restart(usize),
    See,
    Release(usize),
}

const NODES: usize = 3;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..NODES, 1usize..6).prop_map(|(node, pods)| Step::Plug(node, pods)),
        4 => (0..NODES, 0usize..4).prop_map(|(node, pod)| Step::Move(node, pod)),
        1 => (0..NODES, any::<bool>()).prop_map(|(node, sticky)| Step::KillInPlug(node, sticky)),
        3 => (0..NODES, 0u8..34).prop_map(|(node, last)| Step::Ask(node, last)),
        4 => (0usize..20).prop_map(Step::Unplug),
        1 => (0..NODES).prop_map(Step::Restart),
        1 => Just(Step::See),
        2 => (0..NODES).prop_map(Step::Release),
    ]
}

/// A network that is full is the only reason for no address.
fn expect_full<T>(result: Result<T, PlugError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(PlugError::NoAddress { .. }) => None,
        Err(other) => panic!("{other}"),
    }
}

async fn play(subnets: &[&str], steps: Vec<Step>) {
    let mut world = World::new(subnets, NODES);
    let mut sticky: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    let mut pods = 0;
    for step in steps {
        match step {
            Step::Plug(node, count) => {
                let names: Vec<String> = (pods..pods + count).map(|pod| format!("web-{pod}")).collect();
                pods += count;
                let plugs = names.iter().enumerate().map(|(n, pod)| world.plug((node + n / 2) % NODES, pod));
                futures::future::join_all(plugs).await.into_iter().for_each(|result| drop(expect_full(result)));
            }
            Step::Move(node, pod) => {
                let pod = format!("db-{pod}");
                world.unplug(&pod);
                if let Some(addresses) = expect_full(world.plug(node, &pod).await) {
                    assert_eq!(sticky.entry(pod).or_insert_with(|| addresses.clone()), &addresses, "is not sticky");
                }
            }
            Step::Ask(node, last) => {
                pods += 1;
                let asked = [format!("fd32::{last:x}"), format!("10.32.0.{last}")];
                let is_asked = |text: &&String| subnets.iter().any(|s| s.contains(':') == text.contains(':'));
                let asked: Vec<&str> = asked.iter().filter(is_asked).map(String::as_str).collect();
                match world.plug_asked(node, &format!("web-{pods}"), &asked).await {
                    Ok(given) => assert!(given.iter().all(|address| asked.contains(&&*address.to_string()))),
                    Err(
                        PlugError::NoPodsAddress { .. }
                        | PlugError::ForeignBlock { .. }
                        | PlugError::AddressTaken { .. },
                    ) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            Step::KillInPlug(node, is_sticky) => {
                let pod = if is_sticky { "db-9" } else { "web-killed" };
                drop(expect_full(world.acquire(node, pod).await));
                world.restart(node);
            }
            Step::Unplug(which) => {
                let plugged = world.pods();
                if let Some((_, endpoint)) = plugged.get(which % plugged.len().max(1)) {
                    world.unplug(&endpoint.pod);
                }
            }
            Step::Restart(node) => world.restart(node),
            Step::See => world.see_all(),
            Step::Release(node) => drop(world.nodes[node].addresses.release("backend").await.unwrap()),
        }
        check(&world, &sticky);
    }
}

fn check(world: &World, sticky: &BTreeMap<String, Vec<IpAddr>>) {
    let (mut given, mut asked) = (BTreeMap::new(), BTreeSet::new());
    for (node, endpoint) in world.pods() {
        let addresses: Vec<IpAddr> = endpoint.addresses().collect();
        assert_eq!(addresses.len(), world.network.subnets.len(), "one of each family: {:?}", texts(&addresses));
        for (address, subnet) in addresses.iter().zip(&world.network.subnets) {
            assert!(subnet.contains(address), "{address} is not in {subnet}");
            let before = given.insert(*address, endpoint.pod.clone());
            assert_eq!(before, None, "{address} is {}'s too", endpoint.pod);
            let holder = sticky.iter().find(|(_, kept)| kept.contains(address));
            assert!(
                holder.is_none_or(|(pod, _)| *pod == endpoint.pod),
                "{address} of {} is kept for {holder:?}",
                endpoint.pod
            );
        }
        let asks = endpoint.asks_from.is_none_or(|address| asked.insert((node, address)));
        assert!(asks, "two pods of node {node} ask from {:?}", endpoint.asks_from);
    }
    assert!(!world.is_reserved(), "what no pod has is free");
}

#[tokio::test]
async fn a_pod_does_not_get_what_another_has_just_given_back() {
    let world = World::new(&["10.32.0.0/24", "fd32::/120"], 1);
    let mut given = BTreeSet::new();
    for n in 0..12 {
        let addresses = world.plug(0, "web").await.unwrap();
        assert!(addresses.iter().all(|address| given.insert(*address)), "{addresses:?} at start {n}, after {given:?}");
        world.unplug("web");
        // As it is when a network's last pod on a node ends.
        if n % 3 == 2 {
            assert!(world.nodes[0].addresses.release("backend").await.unwrap());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn no_address_is_given_twice(
        subnets in prop_oneof![Just(&DUAL[..]), Just(&IPV4[..]), Just(&IPV6[..])],
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(play(subnets, steps));
    }
}
