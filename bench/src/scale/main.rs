//! `make bench-scale`: what a network of 5,000 nodes and 150,000 pods takes on one node. A whole agent as a process of its own, the kernel's own
//! networks, and an API server in this process. Needs no cluster. Asserts nothing about speed; docs/benchmarks.md says what is measured and how.

mod agent;
mod seen;
mod world;

use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr, TcpListener},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use portolan_bench::stats::Series;
use portolan_net::{Dataplane, Forwarding, Multicast, NetworkSpec, Peer};
use portolan_tests::node::{Node, Pod};
use serde_json::json;

use crate::{
    agent::Agent,
    seen::{Listener, entries, is_answered, is_neighbour, is_there, wait},
    world::World,
};

/// How much is measured.
struct Sizes {
    world: World,
    /// Changes that come one at a time.
    single: u32,
    /// Changes that come at a rate, a second, and for how long.
    steady: (u32, u32),
    /// Changes that come at once.
    burst: u32,
    /// How long the agent is left alone before its memory is looked at.
    rest: Duration,
}

const FULL: Sizes = Sizes {
    world: World { nodes: 5000, pods: 30 },
    single: 100,
    steady: (50, 30),
    burst: 2000,
    rest: Duration::from_secs(30),
};
/// To see whether it works: `QUICK=1`.
const QUICK: Sizes = Sizes {
    world: World { nodes: 200, pods: 30 },
    single: 10,
    steady: (20, 3),
    burst: 100,
    rest: Duration::from_secs(3),
};

/// The rows of the table.
#[derive(Default)]
struct Rows(String);

impl Rows {
    fn push(&mut self, what: &str, result: String) {
        eprintln!("{what}: {result}");
        let _ = writeln!(self.0, "| {what} | {result} |");
    }
}

fn main() -> ExitCode {
    let mut rows = Rows::default();
    let result = agent::be_agent_if_asked().and_then(|()| run(&mut rows));
    println!("\n| what | result |\n|---|---|\n{}", rows.0);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("\nFAILED: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(rows: &mut Rows) -> Result<()> {
    let sizes = if std::env::var_os("QUICK").is_some_and(|quick| !quick.is_empty()) { QUICK } else { FULL };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let World { nodes, pods } = sizes.world;
    rows.push("network", format!("{nodes} nodes with {pods} pods each, `neighborSuppression`"));
    runtime.block_on(entries_alone(&Node::new(), sizes.world, rows))?;

    let node = Node::new();
    sizes.world.make(&node);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let url = format!("http://{}", listener.local_addr()?);
    let api = node.api.clone();
    runtime.spawn(async move { api.serve(tokio::net::TcpListener::from_std(listener)?).await });

    let mut agent = Agent::start(&node, &url)?;
    let took = agent.wait_until_ready(&node)?;
    rows.push("agent's start until it has heard of all", seconds(took));
    rows.push("of that, on a processor", format!("{:.1} s", agent.processor()?));
    rows.push("memory then", format!("{:.0} MiB", agent.memory()?));
    let pod = first_pod(&node, &agent, sizes.world, rows)?;
    std::thread::sleep(sizes.rest);
    rows.push("memory at rest", format!("{:.0} MiB", agent.memory()?));
    let before = agent.processor()?;
    std::thread::sleep(sizes.rest);
    let used = (agent.processor()? - before) / sizes.rest.as_secs_f64();
    rows.push("at rest, on a processor", format!("{:.1} %", used * 100.0));
    changes(&node, &agent, &sizes, rows)?;

    let begun = Instant::now();
    node.delete(&pod).map_err(|e| anyhow::anyhow!("DEL: {e}"))?;
    rows.push("last pod's DEL", millis(begun.elapsed()));
    let took = wait("the network to go", Duration::from_millis(20), || Ok(!is_there(&node)))?;
    rows.push("then, until nothing of the network is left", seconds(took));
    Ok(())
}

/// What is known elsewhere as `Dataplane::forward`, without an agent.
async fn entries_alone(node: &Node, world: World, rows: &mut Rows) -> Result<()> {
    let dataplane = Dataplane::new(node.root()).with_underlay("/run/netns/host");
    let spec = NetworkSpec {
        vni: world::VNI,
        mtu: 1450,
        vtep: [192, 0, 2, 1].into(),
        subnets: vec![world::SUBNET.parse()?],
        port: 7789,
        suppression: true,
        multicast: Multicast::Flood,
        encrypted: false,
        gateway: false,
    };
    dataplane.ensure_network(&spec).await?;
    let endpoint = |far, pod| {
        let address = world.address(far, pod, 0);
        (IpAddr::from(address), world.mac(address))
    };
    let peer = |far: u32| Peer {
        vtep: Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 1, 0)) + far).into(),
        endpoints: (0..world.pods).map(|pod| endpoint(far, pod)).collect(),
    };
    let wanted = Forwarding { local: vec![], peers: (0..world.nodes).map(peer).collect(), suppression: true };
    let memory = kernel_memory()?;
    let begun = Instant::now();
    let changed = dataplane.forward(spec.vni, &wanted).await?;
    let took = begun.elapsed();
    let memory = kernel_memory()? - memory;
    let rate = changed as f64 / took.as_secs_f64();
    rows.push("entries alone, without an agent", format!("{changed} in {}: {rate:.0} a second", seconds(took)));
    rows.push("the kernel's memory for them", format!("{memory:.0} MiB"));
    let begun = Instant::now();
    ensure!(dataplane.forward(spec.vni, &wanted).await? == 0, "nothing was to do");
    rows.push("reading all of them from the kernel, and comparing", seconds(begun.elapsed()));
    let begun = Instant::now();
    dataplane.forward(spec.vni, &Forwarding::default()).await?;
    rows.push("removing all of them", seconds(begun.elapsed()));
    Ok(dataplane.remove_network(spec.vni).await?)
}

/// What the kernel has for its own objects, in MiB (proc_meminfo(5)).
fn kernel_memory() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let is_it =
        |line: &&str| line.starts_with("Slab:") || line.starts_with("Percpu:") || line.starts_with("VmallocUsed:");
    let kib = text.lines().filter(is_it).filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    Ok(kib.sum::<f64>() / 1024.0)
}

/// The first pod on the network, by which the node has all of it to do.
fn first_pod(node: &Node, agent: &Agent, world: World, rows: &mut Rows) -> Result<Pod> {
    let processor = agent.processor()?;
    let pod = node.pod("first", json!({"portolan.dev/networks": world::NETWORK}), json!({}));
    let others: Vec<Pod> = (0..10)
        .map(|number| node.pod(&format!("other-{number}"), json!({"portolan.dev/networks": "other"}), json!({})))
        .collect();
    let begun = Instant::now();
    node.add(&pod).map_err(|e| anyhow::anyhow!("ADD: {e}"))?;
    rows.push("first pod's ADD", millis(begun.elapsed()));
    let mut added = Vec::new();
    let mut others = others.iter();
    let mut named = None;
    let last = world.address(world.nodes - 1, world.pods - 1, 0);
    wait("all entries", Duration::from_millis(10), || {
        if named.is_none() && is_answered(node, &pod, &world.last_name())? {
            named = Some(begun.elapsed());
        }
        if let Some(other) = others.next() {
            let begun = Instant::now();
            node.add(other).map_err(|e| anyhow::anyhow!("ADD: {e}"))?;
            added.push(begun.elapsed().as_secs_f64() * 1000.0);
        }
        Ok(named.is_some() && is_neighbour(node, last)?)
    })?;
    let took = begun.elapsed();
    rows.push("from there until names of all pods answer", seconds(named.unwrap_or(took)));
    rows.push("until all forwarding entries are set", seconds(took));
    rows.push("of that, on a processor", format!("{:.1} s", agent.processor()? - processor));
    let added = Series::new(added);
    let (all, longest) = (added.spread(), added.quantile(1.0));
    ensure!(longest.is_finite(), "no other pod was added meanwhile");
    rows.push("ADDs of other pods meanwhile, min / median / max", format!("{all} ms"));
    let [tunnels, floods, behind] = entries(node)?;
    let wanted = world.endpoints_in_all() as usize;
    ensure!(
        (tunnels, floods, behind) == (wanted, world.nodes as usize, wanted),
        "{tunnels}, {floods}, {behind} entries"
    );
    Ok(pod)
}

/// Pods that go and others that come, on nodes at random.
fn changes(node: &Node, agent: &Agent, sizes: &Sizes, rows: &mut Rows) -> Result<()> {
    let world = sizes.world;
    let mut listener = Listener::start(node)?;
    let mut generations = vec![0u32; world.nodes as usize];
    // Steps by a prime that divides no number of nodes here: each node comes once before any comes again.
    let mut far = 0;
    let mut next = |generations: &mut Vec<u32>| {
        far = (far + 2741) % world.nodes;
        generations[far as usize] += 1;
        (far, generations[far as usize])
    };
    let change = |far, generation| {
        world.change(node, far, generation);
        world.address(far, 0, generation)
    };

    let (mut took, processor) = (Vec::new(), agent.processor()?);
    for _ in 0..sizes.single {
        let (far, generation) = next(&mut generations);
        let begun = Instant::now();
        let address = change(far, generation);
        took.push(listener.when(address)?.duration_since(begun).as_secs_f64() * 1000.0);
    }
    let each = (agent.processor()? - processor) * 1000.0 / f64::from(sizes.single);
    rows.push(&format!("{} changes one at a time: until the entry is set, p50 / p99", sizes.single), quantiles(&took));
    rows.push("of that, on a processor for each", format!("{each:.0} ms"));

    let (rate, seconds) = sizes.steady;
    let (mut made, processor, begun) = (Vec::new(), agent.processor()?, Instant::now());
    for number in 0..rate * seconds {
        let due = begun + Duration::from_secs(1) * number / rate;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let (far, generation) = next(&mut generations);
        let at = Instant::now();
        made.push((change(far, generation), at));
    }
    let took = latencies(&mut listener, made)?;
    let used = (agent.processor()? - processor) / begun.elapsed().as_secs_f64();
    rows.push(&format!("{rate} changes a second for {seconds} s: p50 / p99"), quantiles(&took));
    rows.push("of that, on a processor", format!("{:.0} %", used * 100.0));

    let (mut made, processor, begun) = (Vec::new(), agent.processor()?, Instant::now());
    for _ in 0..sizes.burst {
        let (far, generation) = next(&mut generations);
        let at = Instant::now();
        made.push((change(far, generation), at));
    }
    let took = latencies(&mut listener, made)?;
    let (all, used) = (begun.elapsed().as_secs_f64(), agent.processor()? - processor);
    let a_second = f64::from(sizes.burst) / all;
    rows.push(&format!("{} changes as fast as the API takes them", sizes.burst), format!("{a_second:.0} a second"));
    rows.push("p50 / p99", quantiles(&took));
    rows.push("on a processor for each", format!("{:.1} ms", used * 1000.0 / f64::from(sizes.burst)));
    rows.push("memory after all changes", format!("{:.0} MiB", agent.memory()?));
    Ok(())
}

/// How long each of these changes took to be an entry, in ms. A node whose pod changed twice before that shows the latter only.
fn latencies(listener: &mut Listener, made: Vec<(Ipv4Addr, Instant)>) -> Result<Vec<f64>> {
    made.into_iter()
        .map(|(address, at)| Ok(listener.when(address)?.duration_since(at).as_secs_f64() * 1000.0))
        .collect()
}

fn quantiles(took: &[f64]) -> String {
    let took = Series::new(took.iter().copied());
    format!("{:.0} / {:.0} ms", took.quantile(0.5), took.quantile(0.99))
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

fn millis(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1000.0)
}
