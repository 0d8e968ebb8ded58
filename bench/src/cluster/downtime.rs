//! What a pod is without its volume when both move warm, while it writes at some rate: the volume's part beside the bare commands that do
//! the same, and the pod's whole downtime, split.

use std::time::Instant;

use anyhow::{Context, Result};
use portolan_bench::stats::{Pairs, Series, Table};
use portolan_e2e::lab::{Lab, text};

use crate::{
    Sizes,
    bare::{dataset, options},
    transfer::{End, PATIENCE, Sent, change, is_at, is_moving, send},
    volumes::{NAMESPACE, Watches, between},
    watch::Event,
};

/// MiB a second that the pod writes.
const RATES: [u32; 4] = [0, 1, 10, 50];
/// The file that it writes over and over, in MiB.
const FILE: u32 = 256;
/// Bytes of the volume.
const SIZE: u64 = 1 << 30;
const BARE: &str = "`zfs set readonly`, `zfs snapshot`, `zfs send -i`, TCP, `zfs recv`, `zfs set readonly`";

/// The parts of a pod's downtime, in their order.
const PARTS: [&str; 6] = [
    "evicted → its containers have ended, its volume is unmounted",
    "→ detached",
    "→ scheduled, attachment asked for",
    "→ handed over: writable on the target",
    "→ attached",
    "→ mounted, started, Ready",
];

/// When each part of one move was over; the first is when the pod was evicted.
struct Move {
    ends: [Instant; 7],
    /// Bytes of the stream that brought what the pod had written last.
    bytes: u64,
}

impl Move {
    fn parts(&self) -> Vec<f64> {
        self.ends.windows(2).map(|pair| between(pair[0], pair[1])).collect()
    }

    fn storage(&self) -> f64 {
        between(self.ends[3], self.ends[4])
    }

    fn whole(&self) -> f64 {
        between(self.ends[0], self.ends[6])
    }
}

/// Moves a pod there and back at each rate; the volume's part in a table with the bare commands, the pod's parts in another one.
///
/// # Errors
/// When something does not move.
pub fn measure(lab: &Lab, watches: &Watches, a: &mut End<'_>, b: &mut End<'_>, sizes: &Sizes) -> Result<String> {
    let nodes = [a.node.clone(), b.node.clone()];
    let mut limit = Limit::start(a, b)?;
    let (mut rows, mut split) = (Vec::new(), String::new());
    for &rate in RATES.iter().take(sizes.rates) {
        lab.apply(&pod(rate))?;
        let name = format!("dirty-{rate}-0");
        let volume = watches.claim(&format!("data-{name}"))?.1;
        let running = watches.pods.find(
            &format!("{name} is Ready"),
            PATIENCE,
            |event| event.of(&name) && event.is_ready(),
            |event| text(&event.object, "/spec/nodeName").map(str::to_owned),
        )?;
        let mut at = running?;
        let mut row = Pairs::new(format!("{rate} MiB/s written: attachment asked for → writable on the target"), BARE);
        let mut moves = Vec::new();
        for i in 0..sizes.pairs {
            let to = nodes.iter().find(|node| **node != at).context("there are two nodes")?;
            let moved = one(lab, watches, &format!("{name}-{i}"), &name, &volume, to)?;
            row.push(moved.storage(), limit.beside(a, b, moved.bytes)?);
            moves.push(moved);
            at.clone_from(to);
        }
        rows.push(row);
        split += &line(rate, &moves);
        lab.kubectl(&["-n", NAMESPACE, "delete", "statefulset", &format!("dirty-{rate}"), "--timeout=2m"])?;
        lab.kubectl(&["-n", NAMESPACE, "delete", "pod", &name, "--ignore-not-found", "--timeout=2m"])?;
        lab.kubectl(&["-n", NAMESPACE, "delete", "pvc", &format!("data-{name}"), "--timeout=2m"])?;
    }
    limit.end(a, b)?;
    let table = Table::new("The volume's part of a warm move", "ms", rows).markdown();
    let head = "### The pod's downtime in a warm move, median ms\n\n| MiB/s written | bytes at last |";
    let names: String = PARTS.iter().map(|part| format!(" {part} |")).collect();
    Ok(format!("{table}\n{head}{names} all: min / median / max |\n|{}\n{split}", "---|".repeat(PARTS.len() + 3)))
}

fn line(rate: u32, moves: &[Move]) -> String {
    let parts: Vec<Vec<f64>> = moves.iter().map(Move::parts).collect();
    let median = |i: usize| Series::new(parts.iter().map(|parts| parts[i])).quantile(0.5);
    let medians: String = (0..PARTS.len()).map(|i| format!(" {:.0} |", median(i))).collect();
    let bytes = Series::new(moves.iter().map(|it| it.bytes as f64)).quantile(0.5);
    let whole = Series::new(moves.iter().map(Move::whole)).spread();
    format!("| {rate} | {bytes:.0} |{medians} {whole} |\n")
}

/// One asked-for move of a pod that runs.
fn one(lab: &Lab, watches: &Watches, name: &str, pod: &str, volume: &str, to: &str) -> Result<Move> {
    let since = Instant::now();
    lab.apply(&format!(
        "{{apiVersion: portolan.dev/v1alpha1, kind: VolumeMigration, metadata: {{name: {name}, namespace: {NAMESPACE}}}, \
         spec: {{pod: {pod}, node: {to}}}}}"
    ))?;
    let of_pod = |what: &str, is: &dyn Fn(&Event) -> bool| {
        watches.pods.first(&format!("{pod}: {what}"), PATIENCE, |event| event.at > since && event.of(pod) && is(event))
    };
    let of_volume = |what: &str, is: &dyn Fn(&Event) -> bool| {
        let is = |event: &Event| event.at > since && event.of(volume) && is(event);
        watches.volumes.first(&format!("{volume}: {what}"), PATIENCE, is)
    };
    let of_attachment = |what: &str, is: &dyn Fn(&Event) -> bool| {
        let ours = |event: &Event| event.object["spec"]["source"]["persistentVolumeName"] == volume;
        let is = |event: &Event| event.at > since && ours(event) && is(event);
        watches.attachments.first(&format!("{volume}: {what}"), PATIENCE, is)
    };
    let evicted = of_pod("is evicted", &|event| event.ends())?;
    let ended = of_pod("has ended", &|event| event.kind == "DELETED")?;
    let detached = of_attachment("detached", &|event| event.kind == "DELETED")?;
    let (asked, last_round) = watches.volumes.find(
        &format!("{volume}: asked for"),
        PATIENCE,
        |event| event.at > since && event.of(volume) && is_moving(event, to, "Quiescing"),
        |event| (event.at, event.object["status"]["handoff"]["deltaBytes"].as_u64()),
    )?;
    let writable = of_volume("writable", &|event| is_at(event, to))?;
    let attached = of_attachment("attached", &|event| {
        event.object["spec"]["nodeName"] == to && event.object["status"]["attached"] == true
    })?;
    let ready = of_pod("is Ready", &|event| event.object["spec"]["nodeName"] == to && event.is_ready())?;
    let done = ["-n", NAMESPACE, "wait", "--for=jsonpath={.status.phase}=Done", "--timeout=2m"];
    lab.kubectl(&[&done[..], &[&format!("volumemigration/{name}")]].concat())?;
    let report = lab.json(&["get", "portablevolume", volume])?["status"]["lastHandoff"].clone();
    // If the volume was at rest at the last round's snapshot, that was the final delta.
    let bytes = match report["bytes"].as_u64().context("lastHandoff.bytes")? {
        0 => last_round.unwrap_or_default(),
        bytes => bytes,
    };
    Ok(Move { ends: [evicted, ended, detached, asked, writable, attached, ready], bytes })
}

/// A dataset without Portolan that is sent ahead, as a warm volume's is.
struct Limit {
    copy: String,
    sent: usize,
}

impl Limit {
    fn start(a: &mut End<'_>, b: &mut End<'_>) -> Result<Self> {
        let copy = dataset("downtime");
        a.bare.time(&format!("zfs create {} {copy}", options("downtime", SIZE)))?;
        a.bare.time(&format!("zfs snapshot {copy}@0"))?;
        send(a, b, &Sent { arguments: format!("{copy}@0"), dataset: copy.clone() })?;
        Ok(Self { copy, sent: 0 })
    }

    /// Milliseconds of what a hand-over of a stream of so many bytes needs of ZFS.
    fn beside(&mut self, a: &mut End<'_>, b: &mut End<'_>, bytes: u64) -> Result<f64> {
        let Self { copy, sent } = self;
        let next = *sent + 1;
        a.bare.time(&change(copy, &format!("head -c {bytes} /dev/urandom > $at/file")))?;
        let shut = a.bare.time(&format!("zfs set readonly=on {copy} && zfs snapshot {copy}@{next}"))?;
        let arguments = format!("-i @{sent} {copy}@{next}");
        let brought = send(a, b, &Sent { arguments, dataset: copy.clone() })?;
        let opened = b.bare.time(&format!("zfs set readonly=off {copy}"))?;
        a.bare.time(&format!("zfs set readonly=off {copy}"))?;
        *sent = next;
        Ok(shut + brought + opened)
    }

    fn end(self, a: &mut End<'_>, b: &mut End<'_>) -> Result<()> {
        a.destroy(&self.copy)?;
        b.destroy(&self.copy)
    }
}

/// A pod that writes so many MiB a second, each second's with an fdatasync. The image is PostgreSQL's, which is stopped by SIGINT.
fn pod(rate: u32) -> String {
    let write = format!(
        "dd if=/dev/urandom of=/data/file bs=1M count={rate} seek=$((i % {FILE})) conv=notrunc,fdatasync status=none & wait $!"
    );
    let script = format!(
        "trap \"exit 0\" INT TERM; i=0; while :; do a=${{EPOCHREALTIME/./}}; [ {rate} = 0 ] || {{ {write}; }}; i=$((i + {rate})); \
         left=$((1000000 - ${{EPOCHREALTIME/./}} + a)); [ $left -le 0 ] || {{ sleep $(printf 0.%06d $((left - 1))) & wait $!; }}; done"
    );
    format!(
        "apiVersion: apps/v1
kind: StatefulSet
metadata: {{name: dirty-{rate}, namespace: {NAMESPACE}}}
spec:
  replicas: 1
  serviceName: dirty
  selector: {{matchLabels: {{app: dirty-{rate}}}}}
  template:
    metadata: {{labels: {{app: dirty-{rate}}}}}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
      - name: writer
        image: docker.io/portolan/postgres:15
        command: [bash, -c, '{script}']
        volumeMounts: [{{name: data, mountPath: /data}}]
  volumeClaimTemplates:
  - metadata: {{name: data}}
    spec:
      storageClassName: portolan
      accessModes: [ReadWriteOnce]
      resources: {{requests: {{storage: \"{SIZE}\"}}}}
"
    )
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use super::*;

    #[test]
    fn a_move_is_split_without_rest() {
        let begin = Instant::now();
        let ends = [0, 10, 30, 60, 100, 150, 210].map(|ms| begin + Duration::from_millis(ms));
        let it = Move { ends, bytes: 7 };
        assert_eq!(it.parts(), [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]);
        assert_eq!((it.storage(), it.whole()), (40.0, 210.0));
        assert_eq!(line(1, &[it]), "| 1 | 7 | 10 | 20 | 30 | 40 | 50 | 60 | 210 / 210 / 210 |\n");
    }

    /// What the pod's shell makes of the script: it writes, and ends at once when it is told to.
    #[test]
    fn the_writer_writes_and_ends() {
        let manifest = pod(1);
        let script = manifest.split_once("[bash, -c, '").unwrap().1.split_once("']").unwrap().0;
        let file = std::env::temp_dir().join(format!("portolan-writer-{}", std::process::id()));
        let script = script.replace("/data/file", &file.display().to_string());
        let mut child = Command::new("bash").args(["-c", &script]).spawn().unwrap();
        let size = || std::fs::metadata(&file).map_or(0, |it| it.len());
        let end = Instant::now() + Duration::from_secs(60);
        while size() < 2 << 20 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(size() >= 2 << 20, "{} bytes", size());
        Command::new("kill").arg(child.id().to_string()).status().unwrap();
        assert!(child.wait().unwrap().success());
        std::fs::remove_file(file).unwrap();
    }
}
