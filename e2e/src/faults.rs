//! Faults while a volume moves: processes killed, power cut, the network cut, in each phase. After each: every acknowledged row is there, the
//! volume has one owner, the move has ended by itself, and nothing of it is left over.

use std::{
    io::{BufRead, BufReader},
    process::Child,
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{
    lab::{Lab, same, text},
    names,
    scene::{self, Database, NAMESPACE, RELEASE_NAMESPACE},
};

/// How long what is broken stays so.
const OUTAGE: Duration = Duration::from_secs(15);

/// What is done to whom, in which phase of the handoff.
struct Fault {
    what: &'static str,
    phase: &'static str,
    inject: fn(&Lab, &Parties) -> Result<()>,
}

struct Parties {
    source: String,
    target: String,
}

const FAULTS: [Fault; 13] = [
    Fault { what: "kill -9 of the source's agent", phase: "PreCopy", inject: |lab, it| kill_agent(lab, &it.source) },
    Fault { what: "kill -9 of the target's agent", phase: "PreCopy", inject: |lab, it| kill_agent(lab, &it.target) },
    Fault { what: "kill -9 of the source's agent", phase: LAST_ROUND, inject: |lab, it| kill_agent(lab, &it.source) },
    Fault { what: "kill -9 of the target's agent", phase: LAST_ROUND, inject: |lab, it| kill_agent(lab, &it.target) },
    Fault { what: "kill -9 of the source's agent", phase: "Quiescing", inject: |lab, it| kill_agent(lab, &it.source) },
    Fault { what: "kill -9 of the source's agent", phase: "FinalSync", inject: |lab, it| kill_agent(lab, &it.source) },
    Fault { what: "kill -9 of the target's agent", phase: "FinalSync", inject: |lab, it| kill_agent(lab, &it.target) },
    Fault { what: "kill -9 of the target's agent", phase: "Activating", inject: |lab, it| kill_agent(lab, &it.target) },
    Fault { what: "kill -9 of the controllers", phase: "Quiescing", inject: |lab, _| kill_controllers(lab) },
    Fault { what: "kill -9 of zfs send and zfs recv", phase: "FinalSync", inject: kill_streams },
    Fault { what: "a cut of the source's network", phase: "FinalSync", inject: |lab, it| cut(lab, &it.source) },
    Fault { what: "a power cut of the target", phase: "FinalSync", inject: |lab, it| power_cut(lab, &it.target) },
    Fault { what: "a power cut of the source", phase: "FinalSync", inject: |lab, it| power_cut(lab, &it.source) },
];

/// Before the move: what was acknowledged last is in the dataset's log then, and no pod mounts it there again.
const IN_USE: &str = "use";

/// The pod has ended, and is wanted nowhere yet.
const LAST_ROUND: &str = "the last round";

/// Plays it, on two nodes. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let mut db = scene::start(lab)?;
    for fault in &FAULTS {
        db = under(lab, &db, fault).with_context(|| format!("{} in {}", fault.what, fault.phase))?;
    }
    scene::clean_up(lab)
}

/// Plays the one that needs a node of which nobody else wants anything meanwhile.
///
/// # Errors
/// As [`play`].
pub fn play_in_use(lab: &Lab) -> Result<()> {
    let db = scene::start(lab)?;
    let fault = Fault { what: "a power cut of the source", phase: IN_USE, inject: cut_in_use };
    under(lab, &db, &fault).with_context(|| fault.what)?;
    names::with(lab, &db.node)?;
    scene::clean_up(lab)
}

/// A move under a fault; where the database is then.
fn under(lab: &Lab, db: &Database, fault: &Fault) -> Result<Database> {
    let target = lab.nodes()?.into_iter().find(|node| *node != db.node).context("the lab has two nodes")?;
    let it = Parties { source: db.node.clone(), target };
    lab.step(format!("{} in {} of the move from {} to {}", fault.what, fault.phase, it.source, it.target));
    let before = scene::newest_row(lab)?;
    let phases = Phases::watch(lab, &db.volume)?;
    if fault.phase == IN_USE {
        (fault.inject)(lab, &it)?;
    } else if fault.phase == LAST_ROUND {
        lab.kubectl(&["cordon", &it.source])?;
        let before = lab.wait("most of it has come", 90, || warm_round(lab, &db.volume))?;
        go(lab)?;
        lab.wait("the last round has begun", 60, || last_round(lab, &db.volume, &before))?;
        (fault.inject)(lab, &it)?;
    } else if fault.phase == "PreCopy" {
        lab.kubectl(&["cordon", &it.source])?;
        phases.until(fault.phase)?;
        (fault.inject)(lab, &it)?;
        go(lab)?;
    } else {
        lab.kubectl(&["cordon", &it.source])?;
        go(lab)?;
        phases.until(fault.phase)?;
        (fault.inject)(lab, &it)?;
    }
    arrives(lab, &db.volume, &it.target, before)
}

/// The newest round of a PreCopy that has ended but for the pod.
fn warm_round(lab: &Lab, volume: &str) -> Result<String> {
    let found = lab.json(&["get", "portablevolume", volume])?;
    ensure!(found["status"]["handoff"]["warm"] == true, "{}", found["status"]["handoff"]);
    Ok(text(&found, "/status/handoff/roundGuid")?.to_owned())
}

/// Whether there is another round than that, or all of it is over.
fn last_round(lab: &Lab, volume: &str, before: &str) -> Result<()> {
    let found = lab.json(&["get", "portablevolume", volume])?;
    ensure!(found["status"]["handoff"]["roundGuid"] != before, "it is the same still");
    Ok(())
}

/// Waits until the database is on a node, and its move has ended as it should.
pub(crate) fn arrives(lab: &Lab, volume: &str, target: &str, before: u64) -> Result<Database> {
    comes(lab, target, before)?;
    lab.wait("the move has ended and left nothing", 60, || in_order(lab, volume, target))?;
    scene::database(lab)
}

/// Waits until the database is on a node with all that was acknowledged.
pub(crate) fn comes(lab: &Lab, target: &str, before: u64) -> Result<()> {
    lab.wait(&format!("db-0 is Ready on {target}"), 240, || {
        let pod = scene::pod(lab, "db-0")?;
        scene::ready(&pod)?;
        same("its node", text(&pod, "/spec/nodeName")?, target)
    })?;
    lab.wait("the client goes on", 120, || {
        let newest = scene::newest_row(lab)?;
        ensure!(newest > before + 20, "newest row {newest}");
        Ok(())
    })?;
    for node in lab.nodes()? {
        lab.kubectl(&["uncordon", &node])?;
    }
    scene::every_acknowledged_row_is_there(lab)
}

pub(crate) fn go(lab: &Lab) -> Result<()> {
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod", "db-0", "--wait=false"]).map(drop)
}

/// The volume is at rest on a node, whole, and no copy of it keeps more than what copies share.
pub(crate) fn in_order(lab: &Lab, volume: &str, owner: &str) -> Result<()> {
    let found = lab.json(&["get", "portablevolume", volume])?;
    let status = &found["status"];
    same("owner", text(&found, "/status/owner")?, owner)?;
    same("phase", text(&found, "/status/phase")?, "Ready")?;
    ensure!(status["handoff"].is_null(), "a handoff is running: {}", status["handoff"]);
    let conditions = status["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    ensure!(!conditions.iter().any(|it| it["type"] == "Diverged"), "{conditions:?}");
    for node in lab.nodes()? {
        let dataset = format!("portolan/{volume}");
        let command = format!(
            "zfs list -H -t snapshot -o name,userrefs -r {dataset} 2>/dev/null || zfs list -H -t snapshot -o name -r {dataset}"
        );
        let snapshots = lab.on_node(&node, &command)?;
        let lines: Vec<&str> = snapshots.lines().collect();
        ensure!((1..=3).contains(&lines.len()), "snapshots on {node}: {lines:?}");
        let held = lines.iter().filter(|line| line.split('\t').nth(1).is_some_and(|holds| !matches!(holds, "0" | "-")));
        ensure!(held.count() == 0, "held on {node}: {lines:?}");
        let others = lab.on_node(&node, "zfs list -H -o name -r portolan")?;
        ensure!(!others.contains("diverged"), "a copy was put out of the way on {node}: {others}");
    }
    Ok(())
}

/// The phases of a volume's handoff, as they are written.
pub(crate) struct Phases {
    child: Child,
    seen: std::sync::mpsc::Receiver<String>,
}

impl Phases {
    pub(crate) fn watch(lab: &Lab, volume: &str) -> Result<Self> {
        let template = "jsonpath={.status.handoff.phase}{\"\\n\"}";
        let mut child = lab.start(&["run", "kubectl", "get", "portablevolume", volume, "--watch", "-o", template])?;
        let out = child.stdout.take().context("standard output")?;
        let (tell, seen) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, seen })
    }

    pub(crate) fn until(&self, phase: &str) -> Result<()> {
        loop {
            let now = self
                .seen
                .recv_timeout(Duration::from_secs(300))
                .context(format!("the handoff never was in {phase}"))?;
            if now == phase {
                return Ok(());
            }
        }
    }
}

impl Drop for Phases {
    fn drop(&mut self) {
        // It has nothing to lose.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn kill_agent(lab: &Lab, node: &str) -> Result<()> {
    let of_node = format!("--field-selector=spec.nodeName={node}");
    kill(lab, &["-l", "app.kubernetes.io/name=portolan-storage", &of_node])
}

fn kill_controllers(lab: &Lab) -> Result<()> {
    kill(lab, &["-l", "app.kubernetes.io/name=portolan-csi-controller"])
}

/// Ends the first container of pods at once: nothing of it can do a last thing.
pub(crate) fn kill(lab: &Lab, which: &[&str]) -> Result<()> {
    let pods = lab.json(&[&["-n", RELEASE_NAMESPACE, "get", "pods"], which].concat())?;
    let pods = pods["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    ensure!(!pods.is_empty(), "no pods {which:?}");
    for pod in pods {
        let id = text(pod, "/status/containerStatuses/0/containerID")?;
        let id = id.strip_prefix("containerd://").context("a container of containerd")?;
        // It may have ended by itself since.
        let command = format!("ctr -n k8s.io task kill --all -s SIGKILL {id} || true");
        lab.on_node(text(pod, "/spec/nodeName")?, &command)?;
    }
    Ok(())
}

fn kill_streams(lab: &Lab, parties: &Parties) -> Result<()> {
    let command = "for pid in $(pgrep -f '^(/[a-z/]*)?zfs (send|recv|receive)'); do kill -9 $pid; done; true";
    lab.on_node(&parties.source, command)?;
    lab.on_node(&parties.target, command).map(drop)
}

fn cut(lab: &Lab, node: &str) -> Result<()> {
    lab.verb("cut", node)?;
    sleep(OUTAGE);
    lab.verb("mend", node)
}

/// The pod is to go while its node is down, so that it isn't started there again.
fn cut_in_use(lab: &Lab, parties: &Parties) -> Result<()> {
    lab.verb("crash", &parties.source)?;
    names::without(lab, &parties.source)?;
    lab.kubectl(&["cordon", &parties.source])?;
    go(lab)?;
    sleep(OUTAGE);
    lab.verb("start", &parties.source)
}

fn power_cut(lab: &Lab, node: &str) -> Result<()> {
    lab.verb("crash", node)?;
    sleep(OUTAGE);
    lab.verb("start", node)
}
