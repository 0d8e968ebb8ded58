//! Volumes: made and deleted one at a time, and many at once with their pods.

use std::{fmt::Write, time::Instant};

use anyhow::{Context, Result};
use portolan_bench::stats::{Pairs, Table};
use portolan_e2e::lab::{Lab, text};

use crate::{
    Sizes,
    bare::{Bare, FOLDER, dataset, options},
    watch::{Event, Watch},
};

/// Where all objects of a run are.
pub const NAMESPACE: &str = "bench";
/// As in the chart's StorageClass, but volumes are made at once.
pub const IMMEDIATE: &str = "bench-immediate";
/// Bytes of a claim.
pub const SIZE: u64 = 64 << 20;
const CLAIMS_OF_A_POD: usize = 5;
/// Seconds after which something has gone wrong.
const PATIENCE: u64 = 60;

/// The API server's streams of all that a volume is.
pub struct Watches {
    pub claims: Watch,
    pub volumes: Watch,
    pub pods: Watch,
    pub attachments: Watch,
    persistent_volumes: Watch,
}

impl Watches {
    /// Begins to watch.
    ///
    /// # Errors
    /// When the API server does not stream.
    pub fn start(lab: &Lab) -> Result<Self> {
        Ok(Self {
            claims: Watch::start(lab, &format!("/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims"))?,
            volumes: Watch::start(lab, "/apis/portolan.dev/v1alpha1/portablevolumes")?,
            pods: Watch::start(lab, &format!("/api/v1/namespaces/{NAMESPACE}/pods"))?,
            attachments: Watch::start(lab, "/apis/storage.k8s.io/v1/volumeattachments")?,
            persistent_volumes: Watch::start(lab, "/api/v1/persistentvolumes")?,
        })
    }

    /// When a claim was there, and its volume's name.
    ///
    /// # Errors
    /// When it does not come.
    pub fn claim(&self, claim: &str) -> Result<(Instant, String)> {
        let added = |event: &Event| event.of(claim);
        let (at, uid) = self.claims.find(&format!("claim {claim}"), PATIENCE, added, |event| {
            (event.at, text(&event.object, "/metadata/uid").map(str::to_owned))
        })?;
        Ok((at, format!("pvc-{}", uid?)))
    }

    /// When a claim was bound.
    ///
    /// # Errors
    /// When it isn't in time.
    pub fn bound(&self, claim: &str) -> Result<Instant> {
        let is = |event: &Event| event.of(claim) && event.in_phase("Bound");
        self.claims.first(&format!("claim {claim} is bound"), 3 * PATIENCE, is)
    }

    /// When a claim was told to go.
    fn deleted(&self, claim: &str) -> Result<Instant> {
        let is = |event: &Event| event.of(claim) && event.ends();
        self.claims.first(&format!("claim {claim} is deleted"), 3 * PATIENCE, is)
    }

    /// When nothing of a volume was left: neither its PersistentVolume nor its PortableVolume, which goes when each node has
    /// destroyed its copy.
    fn gone(&self, volume: &str) -> Result<Instant> {
        let is = |event: &Event| event.of(volume) && event.kind == "DELETED";
        let ours = self.volumes.first(&format!("{volume} is gone"), 3 * PATIENCE, is)?;
        let theirs = self.persistent_volumes.first(&format!("PersistentVolume {volume} is gone"), PATIENCE, is)?;
        Ok(ours.max(theirs))
    }

    /// When a pod ran.
    fn running(&self, pod: &str) -> Result<Instant> {
        let is = |event: &Event| event.of(pod) && event.in_phase("Running");
        self.pods.first(&format!("pod {pod} runs"), 5 * PATIENCE, is)
    }
}

/// Milliseconds.
pub fn between(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1000.0
}

/// A claim that is to be measured. Given a node, its volume is made there at once; else where its first pod is.
pub fn claim(name: &str, bytes: u64, node: Option<&str>, snapshot: Option<&str>) -> String {
    let (class, annotations) = match node {
        Some(node) => (IMMEDIATE, format!("{{volume.kubernetes.io/selected-node: {node}}}")),
        None => ("portolan", "{}".to_owned()),
    };
    let source = snapshot.map_or(String::new(), |snapshot| {
        format!("\n  dataSource: {{apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: {snapshot}}}")
    });
    format!(
        "---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: {name}, namespace: {NAMESPACE}, labels: {{bench: sample}}, annotations: {annotations}}}
spec:
  storageClassName: {class}
  accessModes: [ReadWriteOnce]
  resources: {{requests: {{storage: \"{bytes}\"}}}}{source}
"
    )
}

/// Deletes all claims that were measured, and the pods that have them.
///
/// # Errors
/// When they do not go.
pub fn delete_samples(lab: &Lab, wait: bool) -> Result<()> {
    let wait = format!("--wait={wait}");
    lab.kubectl(&["-n", NAMESPACE, "delete", "pods,pvc", "-l", "bench=sample", &wait, "--timeout=5m"]).map(drop)
}

/// One volume at a time, each beside one of bare ZFS.
///
/// # Errors
/// When a volume is not made or deleted.
pub fn one_by_one(lab: &Lab, watches: &Watches, bare: &mut Bare, node: &str, sizes: &Sizes) -> Result<Table> {
    let (create, destroy) = ("`zfs create`", "`zfs destroy`");
    let mut ready = Pairs::new("of that, until its dataset is there and owned", create);
    let mut agent = Pairs::new("of that, the node's part: from its PortableVolume on", create);
    let mut bound = Pairs::new("created: claim → Bound", create);
    let mut gone = Pairs::new("deleted: claim deleted → dataset destroyed, no object left", destroy);
    for i in 0..sizes.volumes {
        let name = format!("one-{i}");
        let made = bare.time(&format!("zfs create {} {}", options(&name, SIZE), dataset(&name)))?;
        lab.apply(&claim(&name, SIZE, Some(node), None))?;
        let (begin, volume) = watches.claim(&name)?;
        let object = watches.volumes.first(&format!("{volume} is there"), PATIENCE, |event| event.of(&volume))?;
        let is = |event: &Event| event.of(&volume) && event.in_phase("Ready");
        let owned = watches.volumes.first(&format!("{volume} is Ready"), PATIENCE, is)?;
        ready.push(between(begin, owned), made);
        agent.push(between(object, owned), made);
        bound.push(between(begin, watches.bound(&name)?), made);

        let destroyed = bare.time(&format!("zfs destroy {}", dataset(&name)))?;
        lab.kubectl(&["-n", NAMESPACE, "delete", "pvc", &name, "--wait=false"])?;
        gone.push(between(watches.deleted(&name)?, watches.gone(&volume)?), destroyed);
    }
    Ok(Table::new("Volumes, one at a time", "ms", [bound, ready, agent, gone]))
}

/// Many volumes at once with their pods, each round beside as many of bare ZFS, one after the other.
///
/// # Errors
/// When one of them is not made, does not run or does not go.
pub fn many(lab: &Lab, watches: &Watches, bare: &mut Bare, sizes: &Sizes) -> Result<Table> {
    let (claims, pods) = (sizes.pods * CLAIMS_OF_A_POD, sizes.pods);
    let mut each = Pairs::new("each claim → Bound", "each `zfs create`");
    let mut bound = Pairs::new(format!("first claim → all {claims} Bound"), "all `zfs create`");
    let mut running = Pairs::new(format!("first claim → all {pods} pods Running"), "all `zfs create`, `zfs mount`");
    let mut gone =
        Pairs::new("pods and claims deleted → datasets destroyed, no object left", "all `zfs umount`, `zfs destroy`");
    for round in 0..sizes.rounds {
        let names: Vec<String> = (0..claims).map(|i| format!("many-{round}-{i}")).collect();
        let limit = bare_round(bare, &names)?;

        lab.apply(&crowd(&names))?;
        let begun: Vec<(Instant, String)> = names.iter().map(|name| watches.claim(name)).collect::<Result<_>>()?;
        let begin = begun.iter().map(|(at, _)| *at).min().context("a round has claims")?;
        let mut last = begin;
        for ((name, (at, _)), created) in names.iter().zip(&begun).zip(&limit.creates) {
            let now = watches.bound(name)?;
            each.push(between(*at, now), *created);
            last = last.max(now);
        }
        let created: f64 = limit.creates.iter().sum();
        bound.push(between(begin, last), created);
        for pod in names.chunks(CLAIMS_OF_A_POD).map(pod_name) {
            last = last.max(watches.running(&pod)?);
        }
        running.push(between(begin, last), created + limit.mounts);

        delete_samples(lab, false)?;
        let deleted = names.iter().map(|name| watches.deleted(name)).collect::<Result<Vec<_>>>()?;
        let first = deleted.into_iter().min().context("a round has claims")?;
        let went = begun.iter().map(|(_, volume)| watches.gone(volume)).collect::<Result<Vec<_>>>()?;
        gone.push(between(first, went.into_iter().max().context("a round has volumes")?), limit.destroys);
    }
    let heading = format!("{claims} claims of {pods} pods at once");
    Ok(Table::new(heading, "ms", [each, bound, running, gone]))
}

/// What a round took without Portolan, in milliseconds.
struct Limit {
    creates: Vec<f64>,
    mounts: f64,
    destroys: f64,
}

fn bare_round(bare: &mut Bare, names: &[String]) -> Result<Limit> {
    let mut all = |command: &str| -> Result<Vec<f64>> {
        names
            .iter()
            .map(|name| bare.time(&format!("{} {}", command.replace("NAME", &options(name, SIZE)), dataset(name))))
            .collect()
    };
    let creates = all("zfs create NAME")?;
    let mounts = all("zfs mount")?.iter().sum();
    let destroys = all("zfs umount")?.iter().chain(&all("zfs destroy")?).sum();
    bare.time(&format!("rmdir {FOLDER}/many-*"))?;
    Ok(Limit { creates, mounts, destroys })
}

fn pod_name(claims: &[String]) -> String {
    format!("pod-of-{}", claims.first().map_or("nothing", String::as_str))
}

/// Claims, and pods that have so many of them each.
fn crowd(names: &[String]) -> String {
    let mut yaml = String::new();
    for name in names {
        yaml += &claim(name, SIZE, None, None);
    }
    for claims in names.chunks(CLAIMS_OF_A_POD) {
        let (mut mounts, mut volumes) = (String::new(), String::new());
        for name in claims {
            let _ = write!(mounts, "{{name: {name}, mountPath: /{name}}}, ");
            let _ = write!(volumes, "{{name: {name}, persistentVolumeClaim: {{claimName: {name}}}}}, ");
        }
        let pod = pod_name(claims);
        let _ = write!(
            yaml,
            "---
apiVersion: v1
kind: Pod
metadata: {{name: {pod}, namespace: {NAMESPACE}, labels: {{bench: sample}}}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: pause
    image: docker.io/lab/pause:1
    volumeMounts: [{mounts}]
  volumes: [{volumes}]
"
        );
    }
    yaml
}
