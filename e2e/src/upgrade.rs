//! What runs goes on while Portolan is upgraded and its processes are killed: no packet is lost between two nodes, and no write fails.

use std::{collections::BTreeSet, thread::sleep, time::Duration};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    everyone::upgrade,
    faults::kill,
    lab::{Lab, same},
    scene::{nothing_left, ready},
};

const NAMESPACE: &str = "upgrade";
/// Between two packets, in seconds.
const INTERVAL: &str = "0.01";
/// The parts of the release of which containers are killed.
const KILLED: [&str; 4] = ["portolan-network", "portolan-storage", "portolan-csi-controller", "portolan-operator"];

/// Plays it, on the lab's first two nodes. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes()?;
    let [here, there, ..] = &nodes[..] else { bail!("the lab has {} nodes: two are needed", nodes.len()) };
    lab.step("a pod writes to its volume, and pings a pod of another node a hundred times a second");
    lab.apply(&include_str!("../manifests/upgrade.yaml").replace("@HERE@", here).replace("@THERE@", there))?;
    for pod in ["writer", "peer"] {
        lab.wait(&format!("pod {pod} is Ready"), 90, || ready(&lab.json(&["-n", NAMESPACE, "get", "pod", pod])?))?;
    }
    let peer = shell(lab, "peer", "hostname -I")?;
    let peer = peer.split_whitespace().find(|it| it.starts_with("10.86.0.")).context("no address")?.to_owned();
    lab.wait("they reach each other", 30, || shell(lab, "writer", &format!("ping -c 1 -W 1 {peer}")))?;
    let write =
        "i=0; while i=$((i+1)); do echo $i >> /data/log && sync /data/log || { echo $i > /tmp/failed; exit; }; done";
    for (name, command) in [("ping", format!("exec ping -n -i {INTERVAL} {peer}")), ("write", write.to_owned())] {
        shell(lab, "writer", &format!("sh -c '{command}' > /tmp/{name} 2>&1 & echo $! > /tmp/{name}.pid"))?;
    }

    lab.step("helm upgrade: all of Portolan's pods are made anew, twice");
    upgrade(lab, "logLevel=debug")?;
    upgrade(lab, "logLevel=info")?;
    going_on(lab)?;

    lab.step("kill -9 of each of Portolan's processes");
    for name in KILLED {
        kill(lab, &["-l", &format!("app.kubernetes.io/name={name}")])?;
    }
    sleep(Duration::from_secs(5));
    lab.kubectl(&[
        "-n",
        crate::scene::RELEASE_NAMESPACE,
        "wait",
        "pod",
        "--all",
        "--for=condition=Ready",
        "--timeout=3m",
    ])?;
    going_on(lab)?;

    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=2m"])?;
    lab.kubectl(&["delete", "containernetwork", "steady", "--timeout=60s"])?;
    nothing_left(lab)
}

fn shell(lab: &Lab, pod: &str, command: &str) -> Result<String> {
    lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "sh", "-c", command])
}

/// Until now each packet was answered, and each write was taken; both go on.
fn going_on(lab: &Lab) -> Result<()> {
    let written = || -> Result<Vec<u64>> {
        let log = shell(lab, "writer", "cat /data/log")?;
        Ok(log.lines().map(str::parse).collect::<std::result::Result<_, _>>()?)
    };
    let before = written()?.len();
    lab.wait("something more is written", 10, || {
        ensure!(written()?.len() > before, "{before} lines still");
        Ok(())
    })?;
    same("a write that failed", shell(lab, "writer", "cat /tmp/failed 2>/dev/null || true")?, String::new())?;
    let lines = written()?;
    ensure!(lines.iter().copied().eq(1..=lines.len() as u64), "the lines of the log are not those that were written");

    let said = shell(lab, "writer", "kill -0 $(cat /tmp/ping.pid) && cat /tmp/ping")?;
    let number = |line: &str| line.split_once("icmp_seq=")?.1.split_whitespace().next()?.parse().ok();
    let answered: BTreeSet<u64> = said.lines().filter(|line| line.contains("time=")).filter_map(number).collect();
    let newest = answered.last().copied().context("no packet was answered")?;
    let lost: Vec<u64> = (1..=newest).filter(|number| !answered.contains(number)).collect();
    ensure!(lost.is_empty(), "{} of {newest} packets were lost: {:?}", lost.len(), &lost[..lost.len().min(20)]);
    lab.show(format!("{newest} packets, all answered; {} writes, none failed", lines.len()));
    Ok(())
}
