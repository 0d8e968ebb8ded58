//! A claim that is only `ReadOnlyMany`: pods on both nodes read it at once, each its node's own copy, and nobody writes.

use anyhow::{Context, Result, ensure};

use crate::{
    lab::{Lab, same, text},
    scene::{nothing_left, ready},
};

const NAMESPACE: &str = "reading";

/// Plays it, on the lab's first two nodes. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes()?;
    let (here, there) = nodes.first().zip(nodes.get(1)).context("the lab has two nodes")?;
    lab.step("a volume with 16 MiB, its snapshot, and a claim of that which is only ReadOnlyMany");
    lab.kubectl(&["create", "namespace", NAMESPACE])?;
    lab.apply(include_str!("../manifests/reading-source.yaml"))?;
    start(lab, "source", here, "source")?;
    shell(lab, "source", "head -c 16777216 /dev/urandom > /data/file && sync /data/file")?;
    let wanted = checksum(lab, "source")?;
    lab.apply(include_str!("../manifests/reading.yaml"))?;
    lab.wait("the VolumeSnapshot is ready", 60, || {
        let snapshot = lab.json(&["-n", NAMESPACE, "get", "volumesnapshot", "first"])?;
        ensure!(snapshot["status"]["readyToUse"] == true, "{}", snapshot["status"]);
        Ok(())
    })?;
    shell(lab, "source", "echo other > /data/file && sync /data/file")?;

    lab.step("pods on both nodes read it at once, and can't write");
    let readers = [("here", here), ("there", there)];
    for (pod, node) in readers {
        start(lab, pod, node, "shared")?;
    }
    let claim = lab.json(&["-n", NAMESPACE, "get", "pvc", "shared"])?;
    let volume = text(&claim, "/spec/volumeName")?.to_owned();
    for (pod, node) in readers {
        same(&format!("what pod {pod} reads"), checksum(lab, pod)?, wanted.clone())?;
        refused(lab, pod)?;
        // The pod's own mount would refuse it anyway; so does the dataset.
        let at = format!("/var/lib/kubelet/plugins/portolan.dev/volumes/{volume}");
        let said = lab.on_node(node, &format!("grep -q {at} /proc/mounts && touch {at}/new 2>&1 || true"))?;
        ensure!(said.contains("Read-only file system"), "writing to the dataset on {node} said {said:?}");
    }
    let object = lab.json(&["get", "portablevolume", &volume])?;
    ensure!(object["spec"]["readOnly"] == true && object["status"]["epoch"] == 1, "it has moved: {object}");
    let change = r#"{"spec": {"readOnly": false}}"#;
    let changed = lab.kubectl(&["patch", "portablevolume", &volume, "--type=merge", "-p", change]);
    ensure!(changed.is_err(), "spec.readOnly could be changed: {changed:?}");
    lab.show(lab.kubectl(&["get", "volumeattachments"])?);

    lab.step("one ends, and the other reads on; it begins again with the copy that is there");
    let copied = copies(lab, &volume)?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod", "there", "--timeout=120s"])?;
    lab.wait(&format!("nothing of it is mounted on {there}"), 60, || {
        let mounts = lab.on_node(there, &format!("grep {volume} /proc/mounts || true"))?;
        ensure!(mounts.trim().is_empty(), "{mounts}");
        Ok(())
    })?;
    same("what the other reads", checksum(lab, "here")?, wanted.clone())?;
    start(lab, "there", there, "shared")?;
    same("what it reads when it is back", checksum(lab, "there")?, wanted)?;
    same("the copies", copies(lab, &volume)?, copied)?;

    lab.step("both end, and all of it is deleted; then look for what is left");
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod", "here", "there", "--timeout=120s"])?;
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=4m"])?;
    nothing_left(lab)
}

/// The pod that uses a claim, on a node.
fn start(lab: &Lab, name: &str, node: &str, claim: &str) -> Result<()> {
    let manifest = include_str!("../manifests/reading-pod.yaml");
    lab.apply(&manifest.replace("@NAME@", name).replace("@NODE@", node).replace("@CLAIM@", claim))?;
    lab.wait(&format!("pod {name} is Ready"), 120, || ready(&lab.json(&["-n", NAMESPACE, "get", "pod", name])?))
}

fn shell(lab: &Lab, pod: &str, command: &str) -> Result<String> {
    lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "sh", "-c", command])
}

fn checksum(lab: &Lab, pod: &str) -> Result<String> {
    Ok(shell(lab, pod, "sha256sum /data/file")?.trim().to_owned())
}

/// Each way to write ends with EROFS.
fn refused(lab: &Lab, pod: &str) -> Result<()> {
    for write in ["echo x > /data/new", "echo x >> /data/file", "rm -f /data/file", "mkdir /data/folder"] {
        let said = shell(lab, pod, &format!("({write}) 2>&1 || true"))?;
        ensure!(said.contains("Read-only file system"), "pod {pod}: `{write}` said {said:?}");
    }
    Ok(())
}

/// The nodes that have copies, and the GUIDs of the newest snapshots that they share.
fn copies(lab: &Lab, volume: &str) -> Result<serde_json::Value> {
    let object = lab.json(&["get", "portablevolume", volume])?;
    Ok(object["status"]["replicas"].clone())
}
