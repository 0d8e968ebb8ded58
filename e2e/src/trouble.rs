//! What befalls a move without killing anybody: a target that has no room, a slow network that loses packets, a snapshot that somebody destroys
//! under it, a move that is turned round half-way, and one drain after the other. After each: every acknowledged row is there, the volume
//! has one owner, the move has ended by itself, and nothing of it is left over.

use anyhow::{Context, Result, ensure};

use crate::{
    bad_input::event,
    faults::{Phases, arrives, comes, go, in_order},
    lab::{Lab, same, text},
    scene::{self, Database},
};

/// How much of what a full stream needs there is room for at the target, in percent.
const ROOM: [u64; 3] = [0, 50, 99];
/// Bytes that a pool can't be kept from having.
const LEAST: u64 = 1 << 20;
/// Takes the room that is not to be there.
const BALLAST: &str = "portolan/ballast";
/// How fast a slow network is, and how many packets of a hundred it loses.
const SLOW: (&str, u32) = ("30mbit", 2);
const DRAINS: usize = 10;

/// Plays it, on two nodes. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let db = scene::start(lab)?;
    let db = full(lab, &db).context("a target without room")?;
    let db = slow(lab, &db).context("a slow network")?;
    let db = turned_round(lab, &db).context("a move that is turned round")?;
    drains(lab, db).context("one drain after the other")?;
    scene::clean_up(lab)
}

fn other(lab: &Lab, node: &str) -> Result<String> {
    lab.nodes()?.into_iter().find(|it| it != node).context("the lab has two nodes")
}

/// The data can't go ahead while there is no room for them, which the handoff says; the pod runs on, and what came of a stream is no copy.
fn full(lab: &Lab, db: &Database) -> Result<Database> {
    let target = other(lab, &db.node)?;
    let dataset = format!("portolan/{}", db.volume);
    let number = |node: &str, command: &str| -> Result<u64> { Ok(lab.on_node(node, command)?.trim().parse()?) };
    let used = number(&db.node, &format!("zfs get -Hp -o value used {dataset}"))?;
    let uid = text(&scene::pod(lab, "db-0")?, "/metadata/uid")?.to_owned();
    lab.on_node(&target, &format!("zfs create {BALLAST}"))?;
    let free = number(&target, "zfs get -Hp -o value available portolan")?;
    for (turn, room) in ROOM.into_iter().enumerate() {
        lab.step(format!("{target} has room for {room} % of the volume"));
        let left = LEAST.max(used * room / 100);
        lab.on_node(&target, &format!("zfs set reservation={} {BALLAST}", free - left))?;
        let failures = failures(lab, &target)?;
        if turn == 0 {
            lab.kubectl(&["cordon", &db.node])?;
        }
        let said = lab.wait("an attempt has failed for want of room", 120, || {
            ensure!(self::failures(lab, &target)? > failures, "none has failed");
            let handoff = lab.json(&["get", "portablevolume", &db.volume])?["status"]["handoff"].clone();
            let said = handoff["lastError"].as_str().unwrap_or_default().to_owned();
            ensure!(said.contains("space"), "{handoff}");
            Ok(said)
        })?;
        lab.show(said);
        let pod = scene::pod(lab, "db-0")?;
        same("the pod", text(&pod, "/metadata/uid")?, &*uid)?;
        scene::ready(&pod)?;
        let copy =
            lab.on_node(&target, &format!("zfs list -H -t snapshot -o name -r {dataset} 2>/dev/null || true"))?;
        same("what the target has of it", copy.trim(), "")?;
    }
    lab.step("there is room again, and the pod goes there");
    lab.on_node(&target, &format!("zfs destroy {BALLAST}"))?;
    let before = scene::newest_row(lab)?;
    go(lab)?;
    arrives(lab, &db.volume, &target, before)
}

/// Steps that have failed on a node since its agent started.
fn failures(lab: &Lab, node: &str) -> Result<u64> {
    let text = lab.on_node(node, "curl -s http://127.0.0.1:7792/metrics")?;
    let line = text.lines().find_map(|line| line.strip_prefix("portolan_volume_step_failures_total "));
    Ok(line.with_context(|| format!("no such metric on {node}"))?.trim().parse()?)
}

/// The source's network is slow and loses packets, and somebody wants to destroy the snapshot that is being sent.
fn slow(lab: &Lab, db: &Database) -> Result<Database> {
    let (rate, lost) = SLOW;
    let (source, target) = (&db.node, other(lab, &db.node)?);
    lab.step(format!("{rate} and {lost} % of packets lost at {source}; its snapshots are destroyed under way"));
    // What is there already would make the stream short.
    lab.on_node(&target, &format!("zfs destroy -r portolan/{}", db.volume))?;
    let before = scene::newest_row(lab)?;
    lab.on_node(
        source,
        &format!(
            "tc qdisc add dev eth0 root tbf rate {rate} burst 64k latency 100ms && nft 'table inet lossy {{ chain in {{ \
             type filter hook input priority 0; iifname eth0 numgen random mod 100 < {lost} drop; }}; }}'"
        ),
    )?;
    let moved = (|| {
        lab.kubectl(&["cordon", source])?;
        let destroy = format!(
            "pgrep -f '^(/[a-z/]*)?zfs send' && for one in $(zfs list -H -t snapshot -o name -r portolan/{}); do \
             zfs destroy $one 2>&1 || true; done",
            db.volume
        );
        lab.show(lab.wait("a stream is under way", 60, || lab.on_node(source, &destroy))?);
        go(lab)?;
        comes(lab, &target, before)
    })();
    lab.on_node(source, "tc qdisc del dev eth0 root; nft delete table inet lossy")?;
    moved?;
    put_out_of_the_way(lab, &target, &db.volume)?;
    lab.wait("the move has ended and left nothing", 60, || in_order(lab, &db.volume, &target))?;
    scene::database(lab)
}

/// zfs-fuse lets a snapshot be destroyed that it sends: the target then has what nobody knows any more. It is kept, told, and destroyed by
/// hand.
fn put_out_of_the_way(lab: &Lab, node: &str, volume: &str) -> Result<()> {
    let list = format!("zfs list -H -o name -r portolan | grep '^portolan/{volume}.diverged-[0-9]*$' || true");
    let found = lab.on_node(node, &list)?;
    let Some(dataset) = found.lines().next() else { return Ok(()) };
    event(lab, "default", "PortableVolume", volume, &[&format!("zfs destroy -r {dataset}")])?;
    lab.show(format!("{dataset} was put out of the way"));
    lab.on_node(node, &format!("zfs destroy -r {dataset}")).map(drop)
}

/// Before the volume has come to where its pod was sent, the pod is sent back.
fn turned_round(lab: &Lab, db: &Database) -> Result<Database> {
    let (source, target) = (&db.node, other(lab, &db.node)?);
    lab.step(format!("db-0 is sent from {source} to {target}, and back before it has come there"));
    let before = scene::newest_row(lab)?;
    let phases = Phases::watch(lab, &db.volume)?;
    lab.kubectl(&["cordon", source])?;
    go(lab)?;
    phases.until("FinalSync")?;
    lab.kubectl(&["uncordon", source])?;
    lab.kubectl(&["cordon", &target])?;
    go(lab)?;
    arrives(lab, &db.volume, source, before)
}

fn drains(lab: &Lab, mut db: Database) -> Result<()> {
    for number in 1..=DRAINS {
        let target = other(lab, &db.node)?;
        lab.step(format!("drain {number} of {DRAINS}: {} to {target}", db.node));
        let before = scene::newest_row(lab)?;
        lab.kubectl(&["cordon", &db.node])?;
        go(lab)?;
        db = arrives(lab, &db.volume, &target, before)?;
    }
    Ok(())
}
