//! The scene: PostgreSQL moves to another node and back, with its disk, its address and its name, while a client writes.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::lab::{Lab, repository, same, text};

pub(crate) const NAMESPACE: &str = "demo";
/// Where the release is installed.
pub const RELEASE_NAMESPACE: &str = "portolan-system";
const NETWORK: &str = "backend";

/// Plays the whole scene and asserts each thing that it shows.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    install(lab)?;
    let first = start(lab)?;
    overview(lab, &first)?;
    let there = move_away(lab, &first)?;
    let back = move_away(lab, &there)?;
    returned_as_a_delta(lab, &there, &back)?;
    clean_up(lab)
}

/// Where the database is at one moment.
#[derive(Debug)]
pub(crate) struct Database {
    pub(crate) node: String,
    pub(crate) volume: String,
    address: String,
    bytes_of_last_move: i64,
}

/// `helm install` (or upgrade, if it's there already) and its readiness.
///
/// # Errors
/// When a part does not become ready.
pub fn install(lab: &Lab) -> Result<()> {
    install_with(lab, &[])
}

/// The same with values of the chart (`--set NAME=VALUE`).
///
/// # Errors
/// When a part does not become ready.
pub fn install_with(lab: &Lab, values: &[&str]) -> Result<()> {
    lab.step(format!("helm install portolan charts/portolan {}", values.join(" ")).trim_end());
    let chart = repository().join("charts/portolan").canonicalize()?;
    let chart = chart.to_string_lossy();
    let mut command = vec!["upgrade", "--install", "portolan", &chart, "--namespace", RELEASE_NAMESPACE];
    command.extend(["--create-namespace", "--wait", "--timeout"]);
    command.push(if lab.has_control_node() { "15m" } else { "5m" });
    let placement = repository().join("e2e/manifests/control-node.yaml");
    let placement = placement.to_string_lossy();
    if lab.has_control_node() {
        command.extend(["--values", &placement]);
    }
    command.extend(values.iter().flat_map(|value| ["--set", value]));
    lab.helm(&command)?;
    lab.show(lab.kubectl(&["-n", RELEASE_NAMESPACE, "get", "pods", "-o", "wide"])?);
    let nodes = lab.nodes()?;
    lab.wait("a StorageNode that is Ready for each node", 90, || {
        for node in &nodes {
            let pool = lab.json(&["get", "storagenode", node])?;
            ready(&pool)?;
        }
        Ok(())
    })?;
    lab.show(lab.kubectl(&["get", "storagenodes"])?);
    Ok(())
}

/// The network, the database and its client; returns when rows are acknowledged.
pub(crate) fn start(lab: &Lab) -> Result<Database> {
    lab.step("a network, PostgreSQL on a portolan volume, a client that writes without pause");
    lab.apply(include_str!("../manifests/network.yaml"))?;
    lab.wait("network backend is Ready", 20, || ready(&lab.json(&["get", "containernetwork", NETWORK])?))?;
    lab.apply(&demo(lab))?;
    lab.wait("db-0 is Ready", 90, || ready(&pod(lab, "db-0")?))?;
    lab.wait("20 acknowledged rows", 60, || {
        let acknowledged = Acknowledged::read(lab)?.rows.len();
        ensure!(acknowledged >= 20, "{acknowledged} so far");
        Ok(())
    })?;
    lab.wait("the probes are Ready", 60, || probes(lab).map(|_| ()))?;
    database(lab)
}

/// The demo's objects. On an emulated node, a client that starts a program for each row without pause leaves the node no time for itself.
fn demo(lab: &Lab) -> String {
    let objects = include_str!("../manifests/demo.yaml");
    if lab.has_control_node() { objects.replace("value: \"0.05\"", "value: \"0.5\"") } else { objects.to_owned() }
}

fn overview(lab: &Lab, db: &Database) -> Result<()> {
    lab.step("kubectl get portablevolumes; kubectl get containernetworks");
    lab.wait("the volume's used bytes are known", 60, || {
        let volume = lab.json(&["get", "portablevolume", &db.volume])?;
        ensure!(
            volume["status"]["usedBytes"].as_i64().is_some_and(|used| used > 1 << 20),
            "usedBytes: {}",
            volume["status"]
        );
        Ok(())
    })?;
    let volumes = lab.kubectl(&["get", "portablevolumes"])?;
    lab.show(&volumes);
    let header: Vec<&str> = volumes.lines().next().unwrap_or_default().split_whitespace().collect();
    for column in ["NAME", "CLAIM", "NODE", "SIZE", "USED", "STATE", "AGE"] {
        ensure!(header.contains(&column), "no column {column} in {header:?}");
    }
    let row: Vec<&str> = volumes.lines().nth(1).unwrap_or_default().split_whitespace().collect();
    same(
        "the volume's row",
        row.get(..4).map(<[_]>::to_vec),
        Some(vec![&*db.volume, "demo/data-db-0", &*db.node, "1Gi"]),
    )?;

    let endpoints = lab.nodes()?.len() as i64 + 2;
    lab.wait("the network counts its endpoints", 20, || {
        let network = lab.json(&["get", "containernetwork", NETWORK])?;
        same("endpoints", network["status"]["endpoints"].as_i64(), Some(endpoints))
    })?;
    let networks = lab.kubectl(&["get", "containernetworks"])?;
    ensure!(networks.contains("10.32.0.0/16"), "no subnet in {networks}");
    lab.show(networks);
    Ok(())
}

/// Cordons the database's node, deletes the pod, and checks that all it owns is where it starts again.
fn move_away(lab: &Lab, before: &Database) -> Result<Database> {
    lab.step(format!("kubectl cordon {}; kubectl delete pod db-0", before.node));
    let epoch = epoch(lab, &before.volume)?;
    let client = identity(&pod(lab, "client")?)?;
    let old_uid = text(&pod(lab, "db-0")?, "/metadata/uid")?.to_string();
    let acknowledged_before = Acknowledged::read(lab)?;
    lab.kubectl(&["cordon", &before.node])?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod", "db-0", "--wait=false"])?;
    lab.wait("db-0 is Ready on another node", 120, || {
        let db = pod(lab, "db-0")?;
        ensure!(text(&db, "/metadata/uid")? != old_uid, "the old pod is still there");
        ready(&db)?;
        ensure!(text(&db, "/spec/nodeName")? != before.node, "it is back on {}", before.node);
        Ok(())
    })?;
    let newest = acknowledged_before.rows.last().copied().unwrap_or(0);
    lab.wait("the client went on by itself", 60, || {
        let rows = Acknowledged::read(lab)?.rows;
        ensure!(rows.last().copied().unwrap_or(0) > newest + 40, "newest row {:?}", rows.last());
        Ok(())
    })?;
    lab.kubectl(&["uncordon", &before.node])?;

    let now = database(lab)?;
    lab.show(lab.kubectl(&["get", "portablevolumes"])?);
    let volume = lab.json(&["get", "portablevolume", &now.volume])?;
    same("the volume's owner", text(&volume, "/status/owner")?, &*now.node)?;
    same("the volume's epoch", self::epoch(lab, &now.volume)?, epoch + 1)?;
    same("the overlay address", &now.address, &before.address)?;
    same("the client's pod and restarts", identity(&pod(lab, "client")?)?, client)?;
    every_acknowledged_row_is_there(lab)?;
    name_resolves_everywhere(lab, &now.address)?;

    let report = &volume["status"]["lastHandoff"];
    lab.show(format!(
        "handoff {} -> {}: {} bytes sent, {} of them when the volume was wanted there, {} ms from unmounted to writable",
        before.node,
        now.node,
        now.bytes_of_last_move,
        report["bytes"],
        report["downtimeMilliseconds"],
    ));
    let gap = Acknowledged::read(lab)?.longest_gap_after(acknowledged_before.times.len().saturating_sub(1));
    lab.show(format!("downtime as the client saw it: {gap} ms between two acknowledged rows"));
    Ok(now)
}

fn returned_as_a_delta(lab: &Lab, there: &Database, back: &Database) -> Result<()> {
    lab.step("the way back was a delta");
    let (full, delta) = (there.bytes_of_last_move, back.bytes_of_last_move);
    lab.show(format!("first move {full} bytes, way back {delta} bytes ({:.1} %)", 100.0 * delta as f64 / full as f64));
    ensure!(delta * 2 < full, "{delta} bytes is no delta of {full}");
    let dataset = format!("zfs list -H -o name portolan/{}", back.volume);
    for node in lab.nodes()? {
        lab.on_node(&node, &dataset).with_context(|| format!("{node} keeps its copy"))?;
    }
    Ok(())
}

/// Deletes everything of the scene but the release, and checks that no node holds anything of it.
pub(crate) fn clean_up(lab: &Lab) -> Result<()> {
    lab.step("kubectl delete: claim, pods and network; then look for what is left");
    lab.kubectl(&["-n", NAMESPACE, "delete", "statefulset/db", "daemonset/probe", "pod/client", "--timeout=15m"])?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "pvc", "--all", "--timeout=15m"])?;
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=15m"])?;
    nothing_left(lab)?;
    lab.kubectl(&["delete", "containernetwork", NETWORK, "--timeout=15m"])?;
    lab.wait("no blocks", 20, || empty(lab, "ipblocks"))?;
    lab.show("no dataset, mount, link, namespace, address or object is left");
    Ok(())
}

/// No volume and no endpoint exists, neither as an object nor on any node.
///
/// # Errors
/// When something is left after two minutes, naming it.
pub fn nothing_left(lab: &Lab) -> Result<()> {
    // Longer than the longest pause between two tries of an agent.
    lab.wait("objects are gone", 120, || {
        [
            "portablevolumes",
            "portablesnapshots",
            "persistentvolumes",
            "volumeattachments",
            "ipclaims",
            "networknodeslices",
        ]
        .iter()
        .try_for_each(|kind| empty(lab, kind))
    })?;
    for node in lab.nodes()? {
        let looks = [
            ("datasets", "zfs list -H -o name -r portolan | grep '/' || true"),
            (
                "mounts",
                r"awk '$1 ~ /^portolan\// || $2 ~ /plugins\/portolan.dev\/volumes|kubernetes.io~csi\/pvc-|^\/run\/netns\/portolan-/' /proc/mounts",
            ),
            ("namespaces", "ls /run/netns 2>/dev/null | grep ^portolan || true"),
            ("links", "ls /sys/class/net | grep -E '^(vx|pgw|p[0-9a-f]{8})' || true"),
            ("rules", "nft list tables | grep portolan_egress || true"),
            ("journal", "find /var/lib/portolan -name '*.json' -path '*endpoints*' 2>/dev/null || true"),
        ];
        for (what, command) in looks {
            lab.wait(&format!("no {what} on {node}"), 30, || {
                let left = lab.on_node(&node, command)?;
                ensure!(left.trim().is_empty(), "{what} left on {node}: {left}");
                Ok(())
            })?;
        }
    }
    Ok(())
}

fn empty(lab: &Lab, kind: &str) -> Result<()> {
    let left = lab.kubectl(&["get", kind, "-o", "name"])?;
    ensure!(left.trim().is_empty(), "{kind} left: {left}");
    Ok(())
}

pub(crate) fn pod(lab: &Lab, name: &str) -> Result<Value> {
    lab.json(&["-n", NAMESPACE, "get", "pod", name])
}

/// Fails unless an object's condition `Ready` is `True`.
///
/// # Errors
/// With the condition, or that there is none.
pub fn ready(object: &Value) -> Result<()> {
    let conditions = object["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    match conditions.iter().find(|condition| condition["type"] == "Ready") {
        Some(condition) if condition["status"] == "True" => Ok(()),
        Some(condition) => bail!("{} is not Ready: {condition}", object["metadata"]["name"]),
        None => bail!("{} has no condition Ready", object["metadata"]["name"]),
    }
}

/// A pod's UID and its containers' restarts: both stay while it goes on by itself.
fn identity(pod: &Value) -> Result<(String, i64)> {
    let restarts = pod["status"]["containerStatuses"][0]["restartCount"].as_i64().context("restartCount")?;
    Ok((text(pod, "/metadata/uid")?.to_string(), restarts))
}

fn epoch(lab: &Lab, volume: &str) -> Result<i64> {
    lab.json(&["get", "portablevolume", volume])?["status"]["epoch"].as_i64().context("epoch")
}

pub(crate) fn database(lab: &Lab) -> Result<Database> {
    let claim = lab.json(&["-n", NAMESPACE, "get", "pvc", "data-db-0"])?;
    let volume = text(&claim, "/spec/volumeName")?.to_string();
    let last = &lab.json(&["get", "portablevolume", &volume])?["status"]["lastHandoff"];
    let addresses = lab.wait("db-0 tells its addresses", 10, || {
        lab.kubectl(&["-n", NAMESPACE, "exec", "db-0", "--", "hostname", "-I"])
    })?;
    let address = addresses.split_whitespace().find(|address| address.starts_with("10.32."));
    Ok(Database {
        node: text(&pod(lab, "db-0")?, "/spec/nodeName")?.to_string(),
        volume,
        address: address.with_context(|| format!("db-0 has no address of {NETWORK}: {addresses}"))?.to_string(),
        bytes_of_last_move: ["preCopyBytes", "bytes"].iter().filter_map(|part| last[part].as_i64()).sum(),
    })
}

/// The name of the probe pod on each node; an error until there is one that is Ready on each.
fn probes(lab: &Lab) -> Result<Vec<String>> {
    let pods = lab.json(&["-n", NAMESPACE, "get", "pods", "-l", "app=probe"])?;
    let pods = pods["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    same("probes", pods.len(), lab.nodes()?.len())?;
    pods.iter().map(|pod| ready(pod).and_then(|()| Ok(text(pod, "/metadata/name")?.to_string()))).collect()
}

fn name_resolves_everywhere(lab: &Lab, address: &str) -> Result<()> {
    for probe in probes(lab)? {
        for name in ["db.backend", "db-0.backend", "db.demo.backend"] {
            lab.wait(&format!("{name} resolves to {address} in {probe}"), 10, || {
                let answer = lab.kubectl(&["-n", NAMESPACE, "exec", &probe, "--", "getent", "ahostsv4", name])?;
                let found: BTreeSet<&str> = answer.lines().filter_map(|line| line.split_whitespace().next()).collect();
                same(name, found, BTreeSet::from([address]))
            })?;
        }
    }
    lab.show(format!("db.backend is {address} on every node, as before"));
    Ok(())
}

pub(crate) fn every_acknowledged_row_is_there(lab: &Lab) -> Result<()> {
    let acknowledged = Acknowledged::read(lab)?;
    let query = "select n from rows order by n";
    let stored = lab.wait("the table is read", 10, || {
        lab.kubectl(&["-n", NAMESPACE, "exec", "db-0", "--", "psql", "-U", "postgres", "-qAtc", query])
    })?;
    let stored: BTreeSet<u64> = stored.lines().filter_map(|line| line.parse().ok()).collect();
    let lost: Vec<&u64> = acknowledged.rows.iter().filter(|row| !stored.contains(row)).collect();
    ensure!(lost.is_empty(), "acknowledged, but not in the table: {lost:?}");
    lab.show(format!("{} rows acknowledged, each of them is in the table", acknowledged.rows.len()));
    Ok(())
}

/// The newest row that the client was told is written.
pub(crate) fn newest_row(lab: &Lab) -> Result<u64> {
    Ok(Acknowledged::read(lab)?.rows.last().copied().unwrap_or(0))
}

/// What the client says that it was told.
struct Acknowledged {
    rows: Vec<u64>,
    /// Milliseconds since the epoch, one for each row.
    times: Vec<u64>,
}

impl Acknowledged {
    fn read(lab: &Lab) -> Result<Self> {
        let log = lab.kubectl(&["-n", NAMESPACE, "logs", "client"])?;
        let acknowledged = log.lines().filter_map(|line| {
            let (row, time) = line.strip_prefix("ack ")?.split_once(' ')?;
            Some((row.parse::<u64>().ok()?, time.parse::<u64>().ok()?))
        });
        let (rows, times) = acknowledged.unzip();
        Ok(Self { rows, times })
    }

    /// The longest time in milliseconds between two acknowledged rows, from the given one on.
    fn longest_gap_after(&self, row: usize) -> u64 {
        let times = self.times.get(row..).unwrap_or_default();
        times.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).max().unwrap_or(0)
    }
}
