//! `make bench`: what Portolan takes beside what bare ZFS takes on the same node, in the same run, turn by turn. Asserts nothing about
//! times; docs/benchmarks.md says what is measured and how.

mod bare;
mod crowd;
mod downtime;
mod forgetting;
mod load;
mod snapshots;
mod syncoid;
mod transfer;
mod volumes;
mod watch;
mod wire;

use std::process::ExitCode;

use anyhow::{Context, Result};
use portolan_bench::{end, stats::Table};
use portolan_e2e::{
    lab::{Lab, text},
    parts::Parts,
    scene,
};

use crate::{
    bare::Bare,
    transfer::End,
    volumes::Watches,
    wire::{MEGABITS, Wire},
};

/// How much is measured.
struct Sizes {
    /// Volumes made and deleted one at a time.
    volumes: usize,
    /// How often many are made at once, and with how many pods.
    rounds: usize,
    pods: usize,
    snapshots: usize,
    /// Pairs of runs of each program, and seconds of a run.
    pairs: usize,
    seconds: u32,
    /// Bytes of a volume that is sent to another node.
    transfer: u64,
    /// At how many rates a pod writes that moves.
    rates: usize,
    /// Pods that end in each way.
    ends: usize,
}

const FULL: Sizes = Sizes {
    volumes: 100,
    rounds: 2,
    pods: 20,
    snapshots: 30,
    pairs: 5,
    seconds: 10,
    transfer: 512 << 20,
    rates: 4,
    ends: 20,
};
/// To see whether it works: `QUICK=1`.
const QUICK: Sizes =
    Sizes { volumes: 4, rounds: 1, pods: 2, snapshots: 2, pairs: 2, seconds: 2, transfer: 40 << 20, rates: 2, ends: 2 };

fn main() -> ExitCode {
    let mut report = String::new();
    let result = Lab::connect().and_then(|lab| {
        scene::install(&lab)?;
        run(&lab, &mut report)
    });
    end(&report, result)
}

/// Measures all, and leaves nothing behind. The report has what was measured before an error, too.
fn run(lab: &Lab, report: &mut String) -> Result<()> {
    let sizes = if std::env::var_os("QUICK").is_some_and(|quick| !quick.is_empty()) { QUICK } else { FULL };
    let node = lab.nodes()?.into_iter().next().context("the lab has nodes")?;
    let parts = Parts::read(&["forgetting", "volumes", "transfers", "crowds", "wire", "moves", "load"])?;
    set_up(lab)?;
    *report += &facts(lab, &node)?;
    let mut add = |table: &str| *report += &format!("\n{table}");

    let mut bare = Bare::start(lab, &node)?;
    let watches = Watches::start(lab)?;
    if parts.has("forgetting", true) {
        lab.step("pods that go, and their names");
        add(&forgetting::measure(lab, &watches, &sizes)?.markdown());
    }
    if parts.has("volumes", true) {
        lab.step("volumes, one at a time");
        add(&volumes::one_by_one(lab, &watches, &mut bare, &node, &sizes)?.markdown());
        lab.step("volumes, many at once");
        add(&volumes::many(lab, &watches, &mut bare, &sizes)?.markdown());
    }
    between_nodes(lab, &parts, &watches, &mut bare, &node, &sizes, &mut add)?;
    if parts.has("load", true) {
        lab.step("two databases, one on a volume and one on a bare dataset");
        load::start(lab, &mut bare, &node)?;
        lab.step("snapshots and clones");
        add(&snapshots::measure(lab, &watches, &mut bare, &node, &sizes)?.markdown());
        lab.step("fio");
        add(&load::fio(lab, &sizes)?.markdown());
        lab.step("pgbench");
        add(&load::pgbench(lab, &sizes)?.markdown());
    }
    *report += &format!("\nLoad averages at the end: {}.\n", load_averages()?);

    lab.step("all of it is taken away");
    if parts.has("load", true) {
        load::stop(lab)?;
    }
    bare.clean_up()?;
    lab.kubectl(&["delete", "namespace", volumes::NAMESPACE, "--timeout=4m"])?;
    lab.kubectl(&["delete", "storageclass", volumes::IMMEDIATE])?;
    scene::nothing_left(lab)
}

/// Volumes that move, on both nodes.
fn between_nodes(
    lab: &Lab,
    parts: &Parts,
    watches: &Watches,
    bare: &mut Bare,
    node: &str,
    sizes: &Sizes,
    add: &mut impl FnMut(&str),
) -> Result<()> {
    let other = lab.nodes()?.into_iter().find(|other| other != node).context("the lab has two nodes")?;
    let mut there = Bare::start(lab, &other)?;
    let (mut a, mut b) = (End::new(lab, node, bare)?, End::new(lab, &other, &mut there)?);
    if parts.has("transfers", true) {
        lab.step("a volume from node to node");
        add(&transfer::measure(lab, watches, &mut a, &mut b, sizes)?.markdown());
    }
    if parts.has("crowds", true) {
        lab.step("ten volumes from node to node at once");
        let crowd = crowd::measure(lab, watches, "ten", &mut a, &b.node, sizes)?;
        add(&Table::new("Many volumes from node to node at once", crowd::UNIT, [crowd]).markdown());
    }
    if parts.has("wire", true) {
        lab.step("the same by a wire that is slower than the processors");
        let _wire = Wire::limit(lab, [a.node.clone(), b.node.clone()])?;
        let by_wire = format!("by a wire of {MEGABITS} Mbit/s");
        let whole = transfer::whole(lab, watches, &mut a, &mut b, sizes)?;
        add(&Table::new(format!("A volume {by_wire}"), "ms", whole).markdown());
        let crowd = crowd::measure(lab, watches, "wire", &mut a, &b.node, sizes)?;
        add(&Table::new(format!("Many volumes {by_wire}"), crowd::UNIT, [crowd]).markdown());
    }
    if parts.has("moves", true) {
        lab.step("a pod that writes, from node to node");
        add(&downtime::measure(lab, watches, &mut a, &mut b, sizes)?);
    }
    there.clean_up()
}

fn set_up(lab: &Lab) -> Result<()> {
    lab.kubectl(&["delete", "namespace", volumes::NAMESPACE, "--ignore-not-found", "--timeout=4m"])?;
    lab.apply(&format!(
        "apiVersion: v1
kind: Namespace
metadata: {{name: {}}}
---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: {}}}
provisioner: portolan.dev
volumeBindingMode: Immediate
",
        volumes::NAMESPACE,
        volumes::IMMEDIATE
    ))
    .map(drop)
}

/// What it runs on.
fn facts(lab: &Lab, node: &str) -> Result<String> {
    let read = |file: &str| std::fs::read_to_string(file).with_context(|| file.to_owned());
    let cpuinfo = read("/proc/cpuinfo")?;
    let model =
        cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    let memory = read("/proc/meminfo")?;
    let kib = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default();
    let pool = lab.json(&["get", "storagenode", node])?;
    let version = lab.json(&["version"])?;
    Ok(format!(
        "{} cores ({}), {} GiB of memory; lane {}, {} nodes; {}; Kubernetes {}. Load averages before: {}.\n",
        std::thread::available_parallelism()?,
        model.unwrap_or("of unknown make"),
        kib >> 20,
        if lab.has_zvols() { "openzfs" } else { "native" },
        lab.nodes()?.len(),
        text(&pool, "/status/zfsVersion")?,
        text(&version, "/serverVersion/gitVersion")?,
        load_averages()?,
    ))
}

/// Processes that ran or waited to, as averages of 1, 5 and 15 minutes (proc_loadavg(5)).
fn load_averages() -> Result<String> {
    let averages = std::fs::read_to_string("/proc/loadavg").context("/proc/loadavg")?;
    Ok(averages.split(' ').take(3).collect::<Vec<_>>().join(", "))
}
