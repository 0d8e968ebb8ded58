//! Asked-for moves: PostgreSQL moves warm while a client writes, a move is cancelled, a cordon sends data ahead, bad input has its message.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    lab::{Lab, same, text},
    scene::{self, Database, NAMESPACE},
};

/// Plays it, on two nodes. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let db = scene::start(lab)?;
    let target = lab.nodes()?.into_iter().find(|node| *node != db.node).context("the lab has two nodes")?;
    bad_input(lab, &db, &target)?;
    cordon(lab, &db, &target)?;
    cancel(lab, &db, &target)?;
    warm(lab, &db, &target)?;
    unused(lab, &target, &db.node)?;
    scene::clean_up(lab)
}

fn migration(lab: &Lab, name: &str) -> Result<Value> {
    lab.json(&["-n", NAMESPACE, "get", "volumemigration", name])
}

fn migrate(lab: &Lab, name: &str, spec: &str) -> Result<String> {
    lab.apply(&format!(
        "{{apiVersion: portolan.dev/v1alpha1, kind: VolumeMigration, metadata: {{name: {name}, namespace: {NAMESPACE}}}, spec: {spec}}}"
    ))
}

fn volume(lab: &Lab, db: &Database) -> Result<Value> {
    lab.json(&["get", "portablevolume", &db.volume])
}

fn delete(lab: &Lab, name: &str) -> Result<()> {
    lab.kubectl(&["-n", NAMESPACE, "delete", "volumemigration", name, "--timeout=60s"]).map(drop)
}

/// Waits for a phase, with words in the message; one that has ended otherwise ends the wait.
fn phase(lab: &Lab, name: &str, phase: &str, words: &[&str], seconds: u32) -> Result<Value> {
    lab.wait(&format!("VolumeMigration {name} is {phase}"), seconds, || {
        let found = migration(lab, name)?;
        let status = &found["status"];
        ensure!(status["phase"] == phase, "{status}");
        let message = status["message"].as_str().unwrap_or_default();
        ensure!(words.iter().all(|word| message.contains(word)), "{message}");
        lab.show(format!("{name}: {phase}: {message}"));
        Ok(found)
    })
}

fn bad_input(lab: &Lab, db: &Database, target: &str) -> Result<()> {
    lab.step("VolumeMigrations that can't be done");
    for (spec, words) in [
        (format!("{{claim: a, pod: b, node: {target}}}"), "exactly one of claim and pod"),
        (format!("{{node: {target}}}"), "exactly one of claim and pod"),
        (format!("{{claim: data-db-0, node: {target}, bandwidth: fast}}"), "such as 50M"),
        (format!("{{claim: data-db-0, node: {target}, mode: Hot}}"), "\"Warm\", \"Cold\""),
    ] {
        let refused = migrate(lab, "wrong", &spec).err().with_context(|| format!("{spec} was accepted"))?.to_string();
        ensure!(refused.contains(words), "{spec}: {refused}");
    }
    for (spec, words) in [
        (format!("{{claim: nothing, node: {target}}}"), ["spec.claim", "no such claim"]),
        (format!("{{pod: nothing, node: {target}}}"), ["spec.pod", "no such pod"]),
        (format!("{{pod: client, node: {target}}}"), ["spec.pod", "uses no volume"]),
        ("{claim: data-db-0, node: nowhere}".to_owned(), ["spec.node", "no such node"]),
        (format!("{{claim: data-db-0, node: {}}}", db.node), ["spec.node", "already"]),
    ] {
        migrate(lab, "wrong", &spec)?;
        phase(lab, "wrong", "Failed", &words, 20)?;
        delete(lab, "wrong")?;
    }
    ensure!(volume(lab, db)?["status"]["handoff"].is_null(), "something was begun");
    Ok(())
}

/// What the pod must not notice.
fn untouched(lab: &Lab, db: &Database, uid: &str) -> Result<()> {
    let pod = scene::pod(lab, "db-0")?;
    same("the pod", text(&pod, "/metadata/uid")?, uid)?;
    ensure!(pod["metadata"]["deletionTimestamp"].is_null(), "the pod is being deleted");
    same("its node", text(&pod, "/spec/nodeName")?, &*db.node)?;
    scene::ready(&pod)?;
    let volume = volume(lab, db)?;
    same("the owner", text(&volume, "/status/owner")?, &*db.node)?;
    same("the wanted node", text(&volume, "/spec/placement/node")?, &*db.node)
}

fn cordon(lab: &Lab, db: &Database, target: &str) -> Result<()> {
    lab.step(format!("kubectl cordon {}: the data go ahead to {target}; kubectl uncordon: they don't", db.node));
    let uid = text(&scene::pod(lab, "db-0")?, "/metadata/uid")?.to_owned();
    lab.kubectl(&["cordon", &db.node])?;
    lab.wait("PreCopy is done", 90, || {
        let handoff = volume(lab, db)?["status"]["handoff"].clone();
        ensure!(handoff["phase"] == "PreCopy" && handoff["askedBy"] == "Cordon", "{handoff}");
        ensure!(handoff["to"] == *target && handoff["warm"] == true, "{handoff}");
        lab.show(format!("{} rounds, {} bytes", handoff["rounds"], handoff["preCopyBytes"]));
        Ok(())
    })?;
    lab.kubectl(&["uncordon", &db.node])?;
    aborted(lab, db)?;
    untouched(lab, db, &uid)?;
    one_common_snapshot(lab, db)
}

fn aborted(lab: &Lab, db: &Database) -> Result<()> {
    lab.wait("the handoff is aborted", 60, || {
        let status = volume(lab, db)?["status"].clone();
        ensure!(status["handoff"].is_null() && status["lastHandoff"]["outcome"] == "Aborted", "{status}");
        lab.show(format!("aborted: {}", status["lastHandoff"]["reason"]));
        Ok(())
    })
}

/// What snapshots each node has of the volume.
fn snapshots(lab: &Lab, db: &Database) -> Result<Vec<(String, Vec<String>)>> {
    let command = format!("zfs list -H -t snapshot -o name -r portolan/{} | sed 's/.*@//'", db.volume);
    let of = |node: String| {
        let names = lab.on_node(&node, &command)?;
        Ok((node, names.lines().map(str::to_owned).collect()))
    };
    lab.nodes()?.into_iter().map(of).collect()
}

/// No copy has more than the newest snapshot that it shares with the other.
fn one_common_snapshot(lab: &Lab, db: &Database) -> Result<()> {
    let newest = lab.wait("each node has one and the same snapshot of the volume", 60, || {
        let found = snapshots(lab, db)?;
        ensure!(found.iter().all(|(_, names)| names.len() == 1 && *names == found[0].1), "{found:?}");
        Ok(found[0].1.concat())
    })?;
    lab.show(format!("{newest} is all that is left of it"));
    Ok(())
}

/// The target's agent is stopped, so that no round ends before the move is cancelled.
fn cancel(lab: &Lab, db: &Database, target: &str) -> Result<()> {
    lab.step("a move is cancelled in PreCopy");
    let uid = text(&scene::pod(lab, "db-0")?, "/metadata/uid")?.to_owned();
    let agent = lab.on_node(target, "pgrep -f '^/portolan-csi node'")?;
    let agent = agent.trim();
    lab.on_node(target, &format!("kill -STOP {agent}"))?;
    let begun = migrate(lab, "cancelled", &format!("{{claim: data-db-0, node: {target}}}")).and_then(|_| {
        lab.wait("PreCopy runs", 30, || {
            let status = migration(lab, "cancelled")?["status"].clone();
            ensure!(status["phase"] == "PreCopy" && status["volumes"][0]["phase"] == "PreCopy", "{status}");
            Ok(())
        })?;
        let second = migrate(lab, "second", &format!("{{pod: db-0, node: {target}}}"))
            .and_then(|_| phase(lab, "second", "Failed", &["VolumeMigration cancelled"], 20).map(drop));
        second.and_then(|()| delete(lab, "second"))?;
        delete(lab, "cancelled")?;
        aborted(lab, db)
    });
    lab.on_node(target, &format!("kill -CONT {agent}"))?;
    begun?;
    untouched(lab, db, &uid)?;
    // The snapshot of the round that was cut short stays at the source until the next move: the target might have received it.
    lab.wait("nothing but that is left of it", 60, || {
        for (node, names) in snapshots(lab, db)? {
            ensure!(names.len() <= if node == db.node { 2 } else { 1 }, "{node}: {names:?}");
        }
        Ok(())
    })
}

fn warm(lab: &Lab, db: &Database, target: &str) -> Result<()> {
    lab.step(format!(
        "db-0 moves warm to {target} while the client writes; a PodDisruptionBudget holds it up at first"
    ));
    let uid = text(&scene::pod(lab, "db-0")?, "/metadata/uid")?.to_owned();
    let before = scene::newest_row(lab)?;
    lab.kubectl(&["-n", NAMESPACE, "create", "poddisruptionbudget", "db", "--selector=app=db", "--max-unavailable=0"])?;
    migrate(lab, "warm", &format!("{{pod: db-0, node: {target}}}"))?;
    phase(lab, "warm", "Evicting", &["db-0 can't be evicted now", "disruption budget"], 90)?;
    let pod = scene::pod(lab, "db-0")?;
    same("the pod that runs", text(&pod, "/metadata/uid")?, &*uid)?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "poddisruptionbudget", "db"])?;
    let done = phase(lab, "warm", "Done", &[], 120)?;

    let pod = scene::pod(lab, "db-0")?;
    scene::ready(&pod)?;
    ensure!(text(&pod, "/metadata/uid")? != uid, "it is the old pod");
    same("the pod's node", text(&pod, "/spec/nodeName")?, target)?;
    lab.wait("the client went on by itself", 60, || {
        let newest = scene::newest_row(lab)?;
        ensure!(newest > before + 40, "newest row {newest}");
        Ok(())
    })?;
    scene::every_acknowledged_row_is_there(lab)?;
    let volume = volume(lab, db)?;
    same("the owner", text(&volume, "/status/owner")?, target)?;
    one_common_snapshot(lab, db)?;

    let figure =
        |pointer: &str| done.pointer(pointer).and_then(Value::as_i64).with_context(|| format!("{pointer}: {done}"));
    let (bytes, last) = (figure("/status/bytes")?, figure("/status/volumes/0/finalBytes")?);
    let (rounds, downtime) = (figure("/status/volumes/0/rounds")?, figure("/status/downtimeMilliseconds")?);
    let of_volume = figure("/status/volumes/0/downtimeMilliseconds")?;
    lab.show(format!(
        "{bytes} bytes in {rounds} rounds and a final delta of {last}; pod away for {downtime} ms, volume for {of_volume} ms"
    ));
    let used = volume["status"]["usedBytes"].as_i64().context("usedBytes")?;
    ensure!(last * 2 < used, "the final delta is {last} bytes, the volume has {used}");
    ensure!(downtime > 0 && of_volume > 0 && of_volume <= downtime + 1000, "downtimes");
    ensure!(done["status"]["startedAt"].is_string(), "{done}");

    let changed = lab.kubectl(&[
        "-n",
        NAMESPACE,
        "patch",
        "volumemigration",
        "warm",
        "--type=merge",
        "-p",
        &format!("{{\"spec\":{{\"node\":\"{}\"}}}}", db.node),
    ]);
    let refused = changed.err().context("spec.node could be changed")?.to_string();
    ensure!(refused.contains("only bandwidth can be changed"), "{refused}");
    delete(lab, "warm")
}

/// A volume that no pod uses goes at once, and its pod follows it.
fn unused(lab: &Lab, from: &str, to: &str) -> Result<()> {
    lab.step(format!("the StatefulSet is scaled to 0, its volume moves to {to}, and the pod starts there"));
    lab.kubectl(&["-n", NAMESPACE, "scale", "statefulset/db", "--replicas=0"])?;
    lab.kubectl(&["-n", NAMESPACE, "wait", "--for=delete", "pod/db-0", "--timeout=90s"])?;
    migrate(lab, "cold", &format!("{{claim: data-db-0, node: {to}}}"))?;
    let done = phase(lab, "cold", "Done", &[], 90)?;
    ensure!(done["status"]["downtimeMilliseconds"].is_null(), "no pod was away: {done}");
    lab.kubectl(&["-n", NAMESPACE, "scale", "statefulset/db", "--replicas=1"])?;
    lab.wait("db-0 is Ready", 90, || scene::ready(&scene::pod(lab, "db-0")?))?;
    let pod = scene::pod(lab, "db-0")?;
    // Both nodes would do: it is admission that makes it follow its volume.
    same("the pod's node", text(&pod, "/spec/nodeName")?, to)?;
    let preferred =
        pod.pointer("/spec/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution/0/preference");
    let preferred = preferred.and_then(|it| it.pointer("/matchFields/0/values/0")).and_then(Value::as_str);
    same("the node that it prefers", preferred, Some(to))?;
    ensure!(from != to, "one node");
    scene::every_acknowledged_row_is_there(lab)
}
