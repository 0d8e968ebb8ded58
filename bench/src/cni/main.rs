//! `make bench-cni`: what Portolan's plugin and agent add to a pod's start and end, beside the reference plugins that give it its `eth0`, in the
//! same run, pod by pod. Needs no cluster. Asserts nothing about speed; docs/benchmarks.md says what is measured and how.

mod plugins;

use std::{process::ExitCode, thread, time::Instant};

use anyhow::{Result, anyhow};
use portolan_bench::stats::{Pairs, Table};
use portolan_tests::node::{Node, Pod};
use serde_json::json;

use crate::plugins::{Bridge, Plugins, Portolan};

/// How much is measured.
struct Sizes {
    /// Pods, one at a time.
    pods: usize,
    /// Rounds of pods at once.
    rounds: usize,
}

const FULL: Sizes = Sizes { pods: 100, rounds: 10 };
/// To see whether it works: `QUICK=1`.
const QUICK: Sizes = Sizes { pods: 5, rounds: 2 };
/// Pods at once.
const AT_ONCE: usize = 20;
const BESIDE: &str = "bridge and host-local";

fn main() -> ExitCode {
    match run() {
        Ok(report) => {
            println!("\n{report}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("\nFAILED: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<String> {
    let sizes = if std::env::var_os("QUICK").is_some_and(|quick| !quick.is_empty()) { QUICK } else { FULL };
    let plugins = Plugins::find()?;
    let node = Node::with_network(&["10.32.0.0/16"]);
    let (bridge, portolan) = (plugins.bridge(&node), plugins.portolan(&node));
    // Neither has to make its bridge for the pods that are measured.
    let resident = pod(&node, "resident");
    let (result, _) = bridge.add(&resident)?;
    portolan.add(&resident, &result)?;
    let mut report = one_at_a_time(&node, &bridge, &portolan, sizes.pods)?;
    report += &at_once(&node, &bridge, &portolan, sizes.rounds)?;
    Ok(report)
}

fn pod(node: &Node, name: &str) -> Pod {
    node.pod(name, json!({"portolan.dev/networks": "backend"}), json!({}))
}

fn end(node: &Node, pod: &Pod) {
    node.remove_netns(&pod.netns);
    node.api.remove(&format!("/api/v1/namespaces/{}/pods/{}", pod.namespace, pod.name));
}

fn one_at_a_time(node: &Node, bridge: &Bridge, portolan: &Portolan, pods: usize) -> Result<String> {
    let (mut added, mut deleted) = (Pairs::new("ADD", BESIDE), Pairs::new("DEL", BESIDE));
    for number in 0..pods {
        let pod = pod(node, &format!("pod-{number}"));
        let (result, theirs) = bridge.add(&pod)?;
        added.push(portolan.add(&pod, &result)?, theirs);
        let ours = portolan.delete(&pod, &result)?;
        deleted.push(ours, bridge.delete(&pod)?);
        end(node, &pod);
    }
    Ok(Table::new("Pods one at a time", "ms", [added, deleted]).markdown())
}

fn at_once(node: &Node, bridge: &Bridge, portolan: &Portolan, rounds: usize) -> Result<String> {
    let (mut added, mut deleted) = (Pairs::new("ADD", BESIDE), Pairs::new("DEL", BESIDE));
    for round in 0..rounds {
        let pods: Vec<Pod> = (0..AT_ONCE).map(|number| pod(node, &format!("pod-{round}-{number}"))).collect();
        let (results, theirs) = all(&pods, |pod| Ok(bridge.add(pod)?.0))?;
        let of = |pod: &Pod| pods.iter().position(|it| it.name == pod.name).and_then(|at| results.get(at));
        let result = |pod: &Pod| of(pod).ok_or_else(|| anyhow!("{} is none of the pods", pod.name));
        let (_, ours) = all(&pods, |pod| portolan.add(pod, result(pod)?))?;
        added.push(per_pod(ours), per_pod(theirs));
        let (_, ours) = all(&pods, |pod| portolan.delete(pod, result(pod)?))?;
        let (_, theirs) = all(&pods, |pod| bridge.delete(pod))?;
        deleted.push(per_pod(ours), per_pod(theirs));
        pods.iter().for_each(|pod| end(node, pod));
    }
    let heading = format!("{AT_ONCE} pods at once: the time until all are done, by their number");
    Ok(format!("\n{}", Table::new(heading, "ms", [added, deleted]).markdown()))
}

fn per_pod(all: f64) -> f64 {
    all / AT_ONCE as f64
}

/// Does the same for all of these pods at once, each on a thread of its own; returns what came of it in their order, and the milliseconds until
/// all were done.
fn all<T: Send>(pods: &[Pod], work: impl Fn(&Pod) -> Result<T> + Sync) -> Result<(Vec<T>, f64)> {
    let (work, begun) = (&work, Instant::now());
    let done = thread::scope(|scope| {
        let started: Vec<_> = pods.iter().map(|pod| scope.spawn(move || work(pod))).collect();
        let ended = started.into_iter().map(|it| it.join().map_err(|_| anyhow!("a thread ended"))?);
        ended.collect::<Result<Vec<T>>>()
    });
    Ok((done?, begun.elapsed().as_secs_f64() * 1000.0))
}
