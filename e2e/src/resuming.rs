//! A stream that is cut half-way: what has come to the target is kept, and the next attempt brings the rest. Needs ZFS with receive tokens.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    faults::kill_agent,
    lab::{Lab, same, text},
    scene::{nothing_left, ready},
};

const NAMESPACE: &str = "resuming";
/// What is sent, in bytes, at the class's 1 MB/s, and what has come of it when the stream is cut.
const WHOLE: i64 = 48 << 20;
const CUT_AT: i64 = 12 << 20;

/// Plays it, on the lab's first two nodes. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes()?;
    let (here, there) = nodes.first().zip(nodes.get(1)).context("the lab has two nodes")?;
    lab.step(format!("a volume with {} MiB that nothing makes smaller", WHOLE >> 20));
    lab.apply(include_str!("../manifests/resuming.yaml"))?;
    start(lab, here)?;
    shell(lab, &format!("head -c {WHOLE} /dev/urandom > /data/file && sync /data/file"))?;
    let wanted = shell(lab, "sha256sum /data/file")?;
    let claim = lab.json(&["-n", NAMESPACE, "get", "pvc", "data"])?;
    let volume = text(&claim, "/spec/volumeName")?.to_owned();

    lab.step(format!(
        "kubectl cordon {here}: it goes to {there}, whose agent is killed when {} MiB have come",
        CUT_AT >> 20
    ));
    lab.kubectl(&["cordon", here])?;
    let dataset = format!("portolan/{volume}");
    lab.wait("a part has come", 120, || {
        let used: i64 = lab.on_node(there, &format!("zfs list -Hp -o used {dataset}"))?.trim().parse()?;
        ensure!(used >= CUT_AT, "{used} bytes");
        Ok(())
    })?;
    same("whole rounds until then", handoff(lab, &volume)?["rounds"].as_i64().unwrap_or_default(), 0)?;
    kill_agent(lab, there)?;
    let token = lab.on_node(there, &format!("zfs get -H -o value receive_resume_token {dataset}"))?;
    ensure!(token.trim().len() > 1, "{there} has kept no part of the stream");

    lab.step("the next attempt brings the rest");
    let brought = lab.wait("the first round has come", 240, || {
        let handoff = handoff(lab, &volume)?;
        ensure!(handoff["rounds"].as_i64().is_some_and(|rounds| rounds >= 1), "{handoff}");
        handoff["preCopyBytes"].as_i64().context("preCopyBytes")
    })?;
    lab.show(format!("{brought} bytes of {WHOLE}"));
    ensure!(brought <= WHOLE - CUT_AT / 2, "{brought} bytes were sent again");
    ensure!(brought >= WHOLE / 4, "{brought} bytes can't be the rest: was anything cut?");

    lab.step("the pod goes there and reads what it wrote");
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod", "writer", "--timeout=4m"])?;
    start(lab, there)?;
    same("what is read", shell(lab, "sha256sum /data/file")?, wanted)?;
    lab.kubectl(&["uncordon", here])?;
    for node in [here, there] {
        let token = lab.on_node(node, &format!("zfs get -H -o value receive_resume_token {dataset}"))?;
        same(&format!("the token on {node}"), token.trim(), "-")?;
    }
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=4m"])?;
    lab.kubectl(&["delete", "storageclass", "slow"])?;
    nothing_left(lab)
}

fn start(lab: &Lab, node: &str) -> Result<()> {
    lab.apply(&include_str!("../manifests/resuming-pod.yaml").replace("@NODE@", node))?;
    lab.wait("the pod is Ready", 120, || ready(&lab.json(&["-n", NAMESPACE, "get", "pod", "writer"])?))
}

fn shell(lab: &Lab, command: &str) -> Result<String> {
    lab.kubectl(&["-n", NAMESPACE, "exec", "writer", "--", "sh", "-c", command])
}

fn handoff(lab: &Lab, volume: &str) -> Result<Value> {
    Ok(lab.json(&["get", "portablevolume", volume])?["status"]["handoff"].clone())
}
