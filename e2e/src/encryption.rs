//! Encryption at rest: what is written is not found on the disk, moves sealed, and is read by whoever has the key and by nobody else.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{
    bad_input::event,
    lab::{Lab, same, text},
    scene::{nothing_left, ready},
};

const NAMESPACE: &str = "encryption";
const PASSPHRASE: &str = "correct horse battery staple";
/// Written to the volumes; nothing else that is on the disks has it.
const SEALED: &str = "e2e-marker-of-the-encrypted-volume";
const OPEN: &str = "e2e-marker-of-the-plain-volume";
const NO_SOURCE: &str = "null";

/// Plays it, on the lab's first two nodes. Portolan must be installed. Where the pools can't encrypt, only that they say so.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes()?;
    let [here, there, ..] = &nodes[..] else { bail!("the lab has {} nodes: two are needed", nodes.len()) };
    // Where there are zvols, volumes of the second class are some.
    let filesystem = if lab.has_zvols() { "ext4" } else { "zfs" };
    let classes = include_str!("../manifests/encryption.yaml").replace("@PASSPHRASE@", PASSPHRASE);
    lab.apply(&classes.replace("@FSTYPE@", filesystem))?;
    match lab.has_zvols() {
        true => sealed(lab, here, there)?,
        false => refused(lab)?,
    }
    lab.step("the namespace goes with its Secrets, and all volumes with it: none of that needs a key");
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=4m"])?;
    lab.kubectl(&["delete", "storageclass", "sealed", "sealed-each"])?;
    nothing_left(lab)
}

/// A pool that can't encrypt is named, and offers no room to such a class.
fn refused(lab: &Lab) -> Result<()> {
    lab.step("a class with encryption, on pools that have none");
    claim(lab, "disk", "sealed-each", NO_SOURCE)?;
    event(lab, NAMESPACE, "PersistentVolumeClaim", "disk", &["zfs-fuse", "can't encrypt"])?;
    lab.wait("no room for the class", 20, || {
        let all = lab.json(&["get", "csistoragecapacities", "--all-namespaces"])?;
        let all = all["items"].as_array().context("no list")?;
        let of_class: Vec<_> = all.iter().filter(|room| room["storageClassName"] == "sealed").collect();
        ensure!(!of_class.is_empty() && of_class.iter().all(|room| room["capacity"] == "0"), "{of_class:?}");
        Ok(())
    })
}

fn sealed(lab: &Lab, here: &str, there: &str) -> Result<()> {
    lab.step("an encrypted volume and a plain one: what is written to the one is not on the disk");
    claim(lab, "db", "sealed", NO_SOURCE)?;
    claim(lab, "plain", "portolan", NO_SOURCE)?;
    start(lab, "db", here)?;
    start(lab, "plain", here)?;
    write(lab, "db", SEALED)?;
    write(lab, "plain", OPEN)?;
    same("the dataset", properties(lab, here, "db")?, "aes-256-gcm available".to_owned())?;
    same("what is found on the disk", found_on_disk(lab, here)?, OPEN.to_owned())?;

    an_hour_ahead(lab, there)?;
    lab.step("it moves sealed, is opened where its pod is, and shut where it was");
    go(lab, "db", there)?;
    same("what is read", read(lab, "db")?, SEALED.to_owned())?;
    same("the dataset where it is", properties(lab, there, "db")?, "aes-256-gcm available".to_owned())?;
    same("the dataset where it was", properties(lab, here, "db")?, "aes-256-gcm unavailable".to_owned())?;
    same("what is found on the target's disk", found_on_disk(lab, there)?, String::new())?;
    go(lab, "db", here)?;
    let volume = lab.json(&["get", "portablevolume", &volume(lab, "db")?])?;
    ensure!(volume["status"]["lastHandoff"]["base"].is_string(), "the way back has no base: {}", volume["status"]);
    same("what is read after the way back", read(lab, "db")?, SEALED.to_owned())?;

    lab.step("another key opens nothing");
    stop(lab, "db")?;
    secret(lab, "another horse and battery")?;
    pod(lab, "db", here)?;
    event(lab, NAMESPACE, "Pod", "db", &["encryption/keys", "has not the key"])?;
    stop(lab, "db")?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "secret", "keys"])?;
    pod(lab, "db", here)?;
    event(lab, NAMESPACE, "Pod", "db", &["keys", "not found"])?;
    secret(lab, PASSPHRASE)?;
    started(lab, "db")?;
    same("what is read with the key", read(lab, "db")?, SEALED.to_owned())?;

    lab.step("a new key, set while it is in use, opens it after the next move");
    let dataset = format!("portolan/{}", self::volume(lab, "db")?);
    lab.on_node(here, &format!("echo 'quite another horse' | zfs change-key {dataset}"))?;
    secret(lab, "quite another horse")?;
    go(lab, "db", there)?;
    same("what is read with the new key", read(lab, "db")?, SEALED.to_owned())?;

    copies(lab, here, there)?;
    zvol(lab, here, there)
}

/// Moves don't need clocks that agree. It stays so: the kubelet's lease must not go back in time.
fn an_hour_ahead(lab: &Lab, node: &str) -> Result<()> {
    lab.step(format!("the clock of {node} goes an hour ahead"));
    lab.on_node(node, "date -s @$(( $(date +%s) + 3600 ))").map(|now| lab.show(now))
}

/// What begins as an encrypted volume has its key; anything else is refused by name.
fn copies(lab: &Lab, here: &str, there: &str) -> Result<()> {
    lab.step("copies of it, on its node and on another, and what can't be one");
    let of_db = "{kind: PersistentVolumeClaim, name: db}";
    for (name, node) in [("clone", there), ("copy", here)] {
        claim(lab, name, "sealed", of_db)?;
        start(lab, name, node)?;
        same("what a copy begins with", read(lab, name)?, SEALED.to_owned())?;
        same("its dataset", properties(lab, node, name)?, "aes-256-gcm available".to_owned())?;
    }
    claim(lab, "disk", "sealed-each", of_db)?;
    event(lab, NAMESPACE, "PersistentVolumeClaim", "disk", &["aes-128-gcm", "aes-256-gcm"])?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "pvc", "disk"])?;
    // The clone shares the source's key, which goes with the last of the two.
    stop(lab, "db")?;
    same("the clone's dataset", properties(lab, there, "clone")?, "aes-256-gcm available".to_owned())?;
    same("what the clone reads", read(lab, "clone")?, SEALED.to_owned())?;
    stop(lab, "clone")?;
    same("the clone's dataset", properties(lab, there, "clone")?, "aes-256-gcm unavailable".to_owned())
}

/// ext4 on an encrypted zvol, with a key of 32 bytes.
fn zvol(lab: &Lab, here: &str, there: &str) -> Result<()> {
    lab.step("ext4 on an encrypted zvol, there and back");
    claim(lab, "disk", "sealed-each", NO_SOURCE)?;
    start(lab, "disk", here)?;
    write(lab, "disk", SEALED)?;
    for node in [there, here] {
        go(lab, "disk", node)?;
        same("what is read", read(lab, "disk")?, SEALED.to_owned())?;
        same("its dataset", properties(lab, node, "disk")?, "aes-128-gcm available".to_owned())?;
    }
    Ok(())
}

fn claim(lab: &Lab, name: &str, class: &str, source: &str) -> Result<()> {
    let manifest = include_str!("../manifests/encryption-claim.yaml").replace("@NAME@", name);
    lab.apply(&manifest.replace("@CLASS@", class).replace("@SOURCE@", source)).map(drop)
}

fn pod(lab: &Lab, name: &str, node: &str) -> Result<()> {
    let manifest = include_str!("../manifests/encryption-pod.yaml").replace("@NAME@", name);
    lab.apply(&manifest.replace("@NODE@", node)).map(drop)
}

fn started(lab: &Lab, name: &str) -> Result<()> {
    // The kubelet tries a mount that failed again after up to two minutes.
    lab.wait(&format!("pod {name} is Ready"), 150, || ready(&lab.json(&["-n", NAMESPACE, "get", "pod", name])?))
}

fn start(lab: &Lab, name: &str, node: &str) -> Result<()> {
    pod(lab, name, node)?;
    started(lab, name)
}

/// Ends a pod; returns when its volume is unmounted.
fn stop(lab: &Lab, name: &str) -> Result<()> {
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod", name, "--timeout=4m"])?;
    let volume = volume(lab, name)?;
    lab.wait(&format!("volume of {name} is detached"), 60, || {
        let all = lab.json(&["get", "volumeattachments"])?;
        let all = all["items"].as_array().context("no list")?;
        let left = all.iter().find(|it| it["spec"]["source"]["persistentVolumeName"] == volume.as_str());
        ensure!(left.is_none(), "{left:?}");
        Ok(())
    })
}

fn go(lab: &Lab, name: &str, node: &str) -> Result<()> {
    stop(lab, name)?;
    start(lab, name, node)
}

fn secret(lab: &Lab, passphrase: &str) -> Result<()> {
    lab.apply(&format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: keys, namespace: {NAMESPACE}}}\n\
         stringData: {{encryption-passphrase: {passphrase}}}\n"
    ))
    .map(drop)
}

/// Among noise, which no compression makes smaller, so that the disk has the words as they are unless they are encrypted.
fn write(lab: &Lab, pod: &str, words: &str) -> Result<()> {
    let noise = "head -c 60000 /dev/urandom";
    let command = format!("({noise}; echo; echo {words}; {noise}) > /data/words && sync /data/words");
    lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "sh", "-c", &command]).map(drop)
}

fn read(lab: &Lab, pod: &str) -> Result<String> {
    let command = format!("grep -a -o -e {SEALED} -e {OPEN} /data/words");
    Ok(lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "sh", "-c", &command])?.trim().to_owned())
}

/// The volume of a claim.
fn volume(lab: &Lab, claim: &str) -> Result<String> {
    Ok(text(&lab.json(&["-n", NAMESPACE, "get", "pvc", claim])?, "/spec/volumeName")?.to_owned())
}

/// How a claim's dataset is encrypted on a node, and whether it can be read.
fn properties(lab: &Lab, node: &str, claim: &str) -> Result<String> {
    let command = format!("zfs get -H -o value encryption,keystatus portolan/{}", volume(lab, claim)?);
    Ok(lab.on_node(node, &command)?.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Which of the words are on the pool's disk. Without the zeros, which are most of it, lines are short; the machine reads them a hundred times
/// faster than an emulated node does.
fn found_on_disk(lab: &Lab, node: &str) -> Result<String> {
    lab.on_node(node, "zpool sync portolan && sync")?;
    let search = format!("tr -d '\\000' < \"$0\" | grep -a -o -e {SEALED} -e {OPEN} | sort -u");
    let found = Command::new("bash").args(["-c", &search]).arg(lab.disk(node)?).env("LC_ALL", "C").output()?;
    ensure!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    Ok(String::from_utf8(found.stdout)?.split_whitespace().collect::<Vec<_>>().join(" "))
}
