//! Snapshots: restored where they were taken and where they never were, kept when their volume goes, and of one moment in a group.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    bad_input::event,
    lab::{Lab, same, text},
    scene::{nothing_left, ready},
};

const NAMESPACE: &str = "snapshots";
/// A claim that begins as the snapshot.
const FROM_SNAPSHOT: &str = "{apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: first}";

/// Plays it, on the lab's first two nodes. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes()?;
    let (here, there) = nodes.first().zip(nodes.get(1)).context("the lab has two nodes")?;
    lab.step("a volume, its snapshot, and volumes made of that on both nodes");
    lab.kubectl(&["create", "namespace", NAMESPACE])?;
    start(lab, "source", here, "null", "none")?;
    write(lab, "source", "one")?;
    lab.apply(include_str!("../manifests/snapshot.yaml"))?;
    lab.wait("the VolumeSnapshot is ready", 60, || snapshot_ready(lab, "volumesnapshot", "first"))?;
    write(lab, "source", "two")?;
    start(lab, "clone", here, FROM_SNAPSHOT, "none")?;
    start(lab, "copy", there, FROM_SNAPSHOT, "together")?;
    for restored in ["clone", "copy"] {
        same("what a restored volume begins with", read(lab, restored)?, "one".to_owned())?;
    }
    same("what the source has", read(lab, "source")?, "two".to_owned())?;
    ensure!(origin(lab, here, "clone")?.contains('@'), "on the snapshot's own node it is no clone");
    same("the origin of a copy", origin(lab, there, "copy")?, "-".to_owned())?;
    lab.show(lab.kubectl(&["get", "portablesnapshots"])?);

    lab.step("a volume of a volume; the source goes, and its snapshot stays");
    start(lab, "second", there, "{kind: PersistentVolumeClaim, name: source}", "together")?;
    same("what a copy of a volume begins with", read(lab, "second")?, "two".to_owned())?;
    refused(lab, there)?;
    let source = volume(lab, "source")?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod/source", "pvc/source", "--timeout=120s"])?;
    lab.wait("the PersistentVolume is gone, and the volume is kept", 60, || {
        let left = lab.kubectl(&["get", "persistentvolume", &source, "--ignore-not-found", "-o", "name"])?;
        ensure!(left.trim().is_empty(), "{left}");
        let kept = lab.json(&["get", "portablevolume", &source])?;
        let conditions = kept["status"]["conditions"].as_array().context("no conditions")?;
        ensure!(conditions.iter().any(|condition| condition["reason"] == "Kept"), "{kept}");
        Ok(())
    })?;
    start(lab, "late", there, FROM_SNAPSHOT, "none")?;
    same("what a volume of a kept snapshot begins with", read(lab, "late")?, "one".to_owned())?;

    lab.step("a group's snapshots are of one moment");
    lab.apply(include_str!("../manifests/group-snapshot.yaml"))?;
    lab.wait("the VolumeGroupSnapshot is ready", 90, || snapshot_ready(lab, "volumegroupsnapshot", "both"))?;
    let transactions = lab.on_node(
        there,
        "zfs list -H -t snapshot -o name -r portolan | grep @groupsnapshot- | xargs -n 1 zfs get -Hp -o value createtxg",
    )?;
    let transactions: Vec<&str> = transactions.lines().collect();
    ensure!(transactions.len() == 2 && transactions[0] == transactions[1], "transactions {transactions:?}");
    lab.show(format!("both were taken in transaction {}", transactions[0]));

    lab.step("all of it is deleted; then look for what is left");
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=4m"])?;
    nothing_left(lab)
}

/// A claim that can't be made of the source goes with the snapshot that was taken for it.
fn refused(lab: &Lab, node: &str) -> Result<()> {
    let small = manifest("small", node, "{kind: PersistentVolumeClaim, name: source}", "none").replace("64Mi", "32Mi");
    lab.apply(&small)?;
    event(lab, NAMESPACE, "PersistentVolumeClaim", "small", &["32Mi", "64Mi"])?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod/small", "pvc/small", "--timeout=60s"])?;
    lab.wait("the snapshot that was taken for it is gone", 60, || {
        let left = lab.kubectl(&["get", "portablesnapshots", "-o", "name"])?;
        ensure!(!left.contains("/clone-"), "{left}");
        Ok(())
    })
}

/// A claim and the pod that uses it, on a node.
fn start(lab: &Lab, name: &str, node: &str, source: &str, group: &str) -> Result<()> {
    lab.apply(&manifest(name, node, source, group))?;
    lab.wait(&format!("pod {name} is Ready"), 90, || ready(&lab.json(&["-n", NAMESPACE, "get", "pod", name])?))
}

fn manifest(name: &str, node: &str, source: &str, group: &str) -> String {
    let manifest = include_str!("../manifests/snapshot-pod.yaml");
    let manifest = manifest.replace("@NAME@", name).replace("@NODE@", node).replace("@SOURCE@", source);
    manifest.replace("@GROUP@", group)
}

fn write(lab: &Lab, pod: &str, words: &str) -> Result<()> {
    let command = format!("echo {words} > /data/words && sync /data/words");
    lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "sh", "-c", &command]).map(drop)
}

fn read(lab: &Lab, pod: &str) -> Result<String> {
    Ok(lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "cat", "/data/words"])?.trim().to_owned())
}

/// The volume of a claim.
fn volume(lab: &Lab, claim: &str) -> Result<String> {
    Ok(text(&lab.json(&["-n", NAMESPACE, "get", "pvc", claim])?, "/spec/volumeName")?.to_owned())
}

/// What the dataset of a claim is a clone of; `-` if of nothing.
fn origin(lab: &Lab, node: &str, claim: &str) -> Result<String> {
    let dataset = format!("portolan/{}", volume(lab, claim)?);
    Ok(lab.on_node(node, &format!("zfs get -H -o value origin {dataset}"))?.trim().to_owned())
}

fn snapshot_ready(lab: &Lab, kind: &str, name: &str) -> Result<()> {
    let snapshot: Value = lab.json(&["-n", NAMESPACE, "get", kind, name])?;
    ensure!(snapshot["status"]["readyToUse"] == true, "{}", snapshot["status"]);
    Ok(())
}
