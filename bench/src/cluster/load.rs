//! Programs on a volume: fio and pgbench, in one pod that has a volume of Portolan's and a bare dataset of the same pool.

use anyhow::{Context, Result};
use portolan_bench::stats::{Pairs, Table};
use portolan_e2e::lab::Lab;
use serde_json::Value;

use crate::{
    Sizes,
    bare::{Bare, FOLDER, dataset, options},
    volumes::NAMESPACE,
};

/// The claim of the pod's volume.
pub const CLAIM: &str = "load";
/// The dataset beside it.
pub const BARE: &str = "load";
/// Bytes of both: a database writes many times its own size.
pub const SIZE: u64 = 2 << 30;

/// Where a side of a pair is in the pod, and its database's port.
const OURS: (&str, &str) = ("/volume", "5432");
const THEIRS: (&str, &str) = ("/bare", "5433");

/// What fio does: for people, and its options.
const JOBS: &[(&str, &[&str])] = &[
    ("sequential writes of 1 MiB", &["--rw=write", "--bs=1M"]),
    ("random writes of 8 KiB, each with fdatasync", &["--rw=randwrite", "--bs=8k", "--fdatasync=1"]),
    (
        "random, 70 % reads, 8 KiB, fdatasync each 32 writes",
        &["--rw=randrw", "--rwmixread=70", "--bs=8k", "--fdatasync=32"],
    ),
];

/// Starts the pod on a node, with a database on either side.
///
/// # Errors
/// When a part does not start.
pub fn start(lab: &Lab, bare: &mut Bare, node: &str) -> Result<()> {
    bare.time(&format!("zfs create {} {}", options(BARE, SIZE), dataset(BARE)))?;
    bare.time(&format!("zfs mount {}", dataset(BARE)))?;
    let archive = lab.tool("fio")?;
    bare.time(&format!("mkdir -p {FOLDER}/fio"))?;
    lab.copy_to_node(node, archive.as_ref(), &format!("{FOLDER}/fio.tar"))?;
    bare.time(&format!("tar -C {FOLDER}/fio -xf {FOLDER}/fio.tar"))?;
    lab.apply(&pod(node))?;
    for (_, port) in [OURS, THEIRS] {
        lab.wait("the databases answer", 120, || exec(lab, &["pg_isready", "-q", "-p", port]))?;
        // 75 MB of accounts.
        exec(lab, &["pgbench", "-i", "-q", "-s", "5", "-p", port, "-U", "postgres", "postgres"])?;
    }
    Ok(())
}

/// Ends the pod and its volume.
///
/// # Errors
/// When they do not go.
pub fn stop(lab: &Lab) -> Result<()> {
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod/load", "pvc/load", "--timeout=4m"]).map(drop)
}

/// fio on the volume and on the bare dataset.
///
/// # Errors
/// When it does not run.
pub fn fio(lab: &Lab, sizes: &Sizes) -> Result<Table> {
    let mut rows = Vec::new();
    for (what, options) in JOBS {
        rows.push(pairs(what, sizes, |(folder, _)| {
            let folder = format!("--directory={folder}");
            let runtime = format!("--runtime={}", sizes.seconds);
            let common = ["--name=job", "--filename=fio", "--size=64M", "--ioengine=psync", "--time_based"];
            let program =
                ["/fio/ld.so", "--library-path", "/fio", "/fio/fio", "--output-format=json", &folder, &runtime];
            operations(&exec(lab, &[&program[..], &common, options].concat())?)
        })?);
    }
    Ok(Table::new("fio in a pod", "operations/s", rows))
}

/// pgbench (TPC-B, two clients) against a database on the volume and one on the bare dataset.
///
/// # Errors
/// When it does not run.
pub fn pgbench(lab: &Lab, sizes: &Sizes) -> Result<Table> {
    let seconds = sizes.seconds.to_string();
    let row = pairs("TPC-B, 2 clients", sizes, |(_, port)| {
        exec(lab, &["psql", "-q", "-p", port, "-U", "postgres", "-c", "checkpoint"])?;
        let options = ["-n", "-c", "2", "-T", &seconds, "-p", port, "-U", "postgres", "postgres"];
        transactions(&exec(lab, &[&["pgbench"][..], &options].concat())?)
    })?;
    Ok(Table::new("pgbench in a pod", "transactions/s", [row]))
}

/// Runs both sides so many times, turn by turn; who is first changes, too.
fn pairs(what: &str, sizes: &Sizes, run: impl Fn((&str, &str)) -> Result<f64>) -> Result<Pairs> {
    let mut pairs = Pairs::new(what, "bare dataset");
    for i in 0..sizes.pairs {
        let (ours, bare) = if i % 2 == 0 {
            let ours = run(OURS)?;
            (ours, run(THEIRS)?)
        } else {
            let bare = run(THEIRS)?;
            (run(OURS)?, bare)
        };
        pairs.push(ours, bare);
    }
    Ok(pairs)
}

fn exec(lab: &Lab, command: &[&str]) -> Result<String> {
    lab.kubectl(&[&["-n", NAMESPACE, "exec", "load", "--"], command].concat())
}

/// Operations in a second that fio reports. What it says before its JSON is for people.
fn operations(report: &str) -> Result<f64> {
    let json = report.find('{').and_then(|start| report.get(start..)).unwrap_or_default();
    let report: Value = serde_json::from_str(json).context("fio's report")?;
    let job = &report["jobs"][0];
    let of = |direction: &str| job[direction]["iops"].as_f64().context("iops in fio's report");
    Ok(of("read")? + of("write")?)
}

/// Transactions in a second that pgbench reports.
fn transactions(report: &str) -> Result<f64> {
    let line = report.lines().find_map(|line| line.strip_prefix("tps = "));
    let number = line.and_then(|line| line.split(' ').next()).and_then(|number| number.parse().ok());
    number.with_context(|| format!("no tps in pgbench's report: {report}"))
}

fn pod(node: &str) -> String {
    format!(
        "apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: {CLAIM}, namespace: {NAMESPACE}}}
spec:
  storageClassName: portolan
  accessModes: [ReadWriteOnce]
  resources: {{requests: {{storage: \"{SIZE}\"}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: load, namespace: {NAMESPACE}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: {node}}}
  terminationGracePeriodSeconds: 30
  containers:
  - name: databases
    image: docker.io/portolan/postgres:15
    command: [bash, -c, 'PGDATA={bare}/pgdata serve -p {bare_port} & exec env PGDATA={volume}/pgdata serve -p {port}']
    volumeMounts:
    - {{name: volume, mountPath: {volume}}}
    - {{name: bare, mountPath: {bare}}}
    - {{name: fio, mountPath: /fio, readOnly: true}}
  volumes:
  - {{name: volume, persistentVolumeClaim: {{claimName: {CLAIM}}}}}
  - {{name: bare, hostPath: {{path: {FOLDER}/{BARE}, type: Directory}}}}
  - {{name: fio, hostPath: {{path: {FOLDER}/fio, type: Directory}}}}
",
        volume = OURS.0,
        port = OURS.1,
        bare = THEIRS.0,
        bare_port = THEIRS.1,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read() {
        let fio = "fio: a warning\n{\"jobs\": [{\"read\": {\"iops\": 70.5}, \"write\": {\"iops\": 30.0}}]}";
        assert_eq!(operations(fio).unwrap(), 100.5);
        let pgbench = "latency average = 4.1 ms\ntps = 483.125 (without initial connection time)\n";
        assert_eq!(transactions(pgbench).unwrap(), 483.125);
        assert!(operations("").is_err() && transactions("").is_err());
    }
}
