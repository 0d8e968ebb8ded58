//! Whether a migration can be done: pure. What can't is refused with a reason and a message that names the field.

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use portolan_crds::{MigratingPod, MigratingVolume, PortableVolume, TOPOLOGY_KEY, VolumeMigration};

use super::read::{Claim, Subject, Target};
use crate::controller::wish::{Needs, why_no_pool};
use crate::quantity::{self, QuantityError};
use crate::volume;

/// Why a migration can't be done.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("spec.claim is {claim:?}: there is no such claim in namespace {namespace}")]
    ClaimMissing { claim: String, namespace: String },
    #[error("claim {claim} is bound to no volume yet: start a pod that uses it first")]
    ClaimNotBound { claim: String },
    #[error("claim {claim} is of {driver}: allowed are claims whose volumes are of portolan.dev")]
    ClaimForeign { claim: String, driver: String },
    #[error("spec.pod is {pod:?}: no such pod runs in namespace {namespace}")]
    PodMissing { pod: String, namespace: String },
    #[error("spec.pod is {pod:?}, which uses no volume of portolan.dev: allowed are pods that do")]
    PodWithoutVolumes { pod: String },
    #[error(
        "pod {pod} belongs to no controller, so nobody would start it again once it is evicted: delete it, then move its claim"
    )]
    PodUnmanaged { pod: String },
    #[error("pod {pod} belongs to a DaemonSet, so it can't run on another node: its volumes stay")]
    PodOfDaemonSet { pod: String },
    #[error("spec.node is {node:?}, and pod {pod} may not run there: {why}")]
    PodNotAllowed { node: String, pod: String, why: String },
    #[error("spec.node is {node:?}: there is no such node")]
    NodeMissing { node: String },
    #[error("spec.node is {node:?}, which is cordoned: allowed are nodes that take pods")]
    NodeUnschedulable { node: String },
    #[error("spec.node is {node:?}, which is not ready")]
    NodeNotReady { node: String },
    #[error("spec.node is {node:?}: {why}")]
    NoPool { node: String, why: String },
    #[error(
        "spec.node is {node:?}, whose label {TOPOLOGY_KEY} is {found}: allowed is {allowed}, to which the volumes are bound"
    )]
    OtherZone { node: String, found: String, allowed: String },
    #[error("spec.node is {node:?}, which has {what} already")]
    AlreadyThere { node: String, what: String },
    #[error("volume {volume} is being deleted")]
    Deleting { volume: String },
    #[error(
        "claim {claim} is only read (ReadOnlyMany), each node that has pods reads its own copy, and nothing needs to move with them: allowed \
         are claims that no pod uses, whose volume gets another owner"
    )]
    OnlyRead { claim: String },
    #[error("claim {claim} is being moved by VolumeMigration {other}: delete that, or wait for its end")]
    MigrationRunning { claim: String, other: String },
    #[error("spec.bandwidth: {0}")]
    Bandwidth(#[from] QuantityError),
}

impl Refusal {
    /// A condition's reason.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::ClaimMissing { .. } => "ClaimMissing",
            Self::ClaimNotBound { .. } => "ClaimNotBound",
            Self::ClaimForeign { .. } => "ClaimForeign",
            Self::PodMissing { .. } => "PodMissing",
            Self::PodWithoutVolumes { .. } => "PodWithoutVolumes",
            Self::PodUnmanaged { .. } => "PodUnmanaged",
            Self::PodOfDaemonSet { .. } => "PodOfDaemonSet",
            Self::PodNotAllowed { .. } => "PodNotAllowed",
            Self::NodeMissing { .. } => "NodeMissing",
            Self::NodeUnschedulable { .. } => "NodeUnschedulable",
            Self::NodeNotReady { .. } => "NodeNotReady",
            Self::NoPool { .. } => "NoPool",
            Self::OtherZone { .. } => "OtherZone",
            Self::AlreadyThere { .. } => "AlreadyThere",
            Self::Deleting { .. } => "VolumeDeleting",
            Self::OnlyRead { .. } => "OnlyRead",
            Self::MigrationRunning { .. } => "MigrationRunning",
            Self::Bandwidth(_) => "BandwidthInvalid",
        }
    }
}

/// What a migration that can be done moves.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Scope {
    pub(super) volumes: Vec<MigratingVolume>,
    pub(super) pods: Vec<MigratingPod>,
}

/// What `migration` moves, of `subject`, to `target`, in this zone.
pub(super) fn scope(
    migration: &VolumeMigration,
    subject: &Subject,
    target: &Target,
    zone: &str,
) -> Result<Scope, Refusal> {
    limit(migration)?;
    let mut volumes = Vec::new();
    let (spec, namespace) = (&migration.spec, migration.namespace().unwrap_or_default());
    if let Some(pod) = spec.pod.clone().filter(|_| !subject.pod_found) {
        return Err(Refusal::PodMissing { pod, namespace });
    }
    let (mut needs, mut only_read) = (Needs::default(), None);
    for (name, claim) in &subject.claims {
        let named = spec.claim.as_ref() == Some(name);
        match claim {
            Claim::Missing if named => return Err(Refusal::ClaimMissing { claim: name.clone(), namespace }),
            Claim::Unbound if named => return Err(Refusal::ClaimNotBound { claim: name.clone() }),
            Claim::Foreign(driver) if named => {
                return Err(Refusal::ClaimForeign { claim: name.clone(), driver: driver.clone() });
            }
            Claim::Missing | Claim::Unbound | Claim::Foreign(_) => {}
            Claim::Ours(volume) if volume.metadata.deletion_timestamp.is_some() => {
                return Err(Refusal::Deleting { volume: volume.name_any() });
            }
            Claim::Ours(volume) if volume.spec.is_shared() && named && subject.pods.iter().any(runs) => {
                return Err(Refusal::OnlyRead { claim: name.clone() });
            }
            Claim::Ours(volume) if volume.spec.is_shared() && !named => only_read = Some(name.clone()),
            Claim::Ours(volume) => {
                needs = needs.and(Needs::of(&volume.spec));
                volumes.push((name, volume.as_ref()));
            }
        }
    }
    if let Some(claim) = only_read.filter(|_| volumes.is_empty()) {
        return Err(Refusal::OnlyRead { claim });
    }
    if let Some(pod) = spec.pod.clone().filter(|_| volumes.is_empty()) {
        return Err(Refusal::PodWithoutVolumes { pod });
    }
    self::target(&spec.node, target, needs, zone)?;
    let pods = pods(&subject.pods, &spec.node, target.node.as_ref())?;
    if volumes.iter().all(|(_, volume)| volume::status(volume).owner.as_ref() == Some(&spec.node)) {
        let what = spec.claim.as_ref().map(|claim| format!("claim {claim}"));
        let what = what.unwrap_or_else(|| format!("pod {}", spec.pod.as_deref().unwrap_or_default()));
        return Err(Refusal::AlreadyThere { node: spec.node.clone(), what });
    }
    for (claim, volume) in &volumes {
        let other = subject.others.iter().find(|other| has(other, &volume.name_any()));
        if let Some(other) = other {
            return Err(Refusal::MigrationRunning { claim: claim.to_string(), other: other.name_any() });
        }
    }
    let entry = |(claim, volume): &(&String, &PortableVolume)| MigratingVolume {
        claim: claim.to_string(),
        volume: volume.name_any(),
        ..MigratingVolume::default()
    };
    Ok(Scope { volumes: volumes.iter().map(entry).collect(), pods })
}

/// Whether a migration moves a volume, or has still to clean up after that.
fn has(migration: &VolumeMigration, volume: &str) -> bool {
    let ended = migration.phase().is_final() && migration.finalizers().is_empty();
    let status = migration.status.as_ref();
    !ended && status.is_some_and(|status| status.volumes.iter().any(|entry| entry.volume == volume))
}

/// Bytes a second.
pub(super) fn limit(migration: &VolumeMigration) -> Result<Option<i64>, Refusal> {
    Ok(migration.spec.bandwidth.as_deref().map(quantity::bytes).transpose()?)
}

/// Whether the node takes pods, and volumes.
pub(super) fn target(name: &str, target: &Target, needs: Needs, zone: &str) -> Result<(), Refusal> {
    let node = name.to_owned();
    let Some(found) = &target.node else { return Err(Refusal::NodeMissing { node }) };
    if crate::controller::drain::is_cordoned(found) {
        return Err(Refusal::NodeUnschedulable { node });
    }
    if !crate::controller::volumes::is_ready(found) {
        return Err(Refusal::NodeNotReady { node });
    }
    if let Some(why) = why_no_pool(name, target.pool.as_ref(), needs) {
        return Err(Refusal::NoPool { node, why });
    }
    match found.labels().get(TOPOLOGY_KEY) {
        Some(found) if found == zone => Ok(()),
        found => {
            let found = found.map_or("missing".to_owned(), |found| format!("{found:?}"));
            Err(Refusal::OtherZone { node, found, allowed: format!("{zone:?}") })
        }
    }
}

/// The pods that run elsewhere than on `target`, provided that each would be started again and may run there.
pub(super) fn pods(pods: &[Pod], target: &str, node: Option<&Node>) -> Result<Vec<MigratingPod>, Refusal> {
    let mut found = Vec::new();
    for pod in pods.iter().filter(|pod| runs(pod)) {
        let on = node_of(pod).unwrap_or_default();
        if on == target {
            continue;
        }
        let owner = pod.owner_references().iter().find(|owner| owner.controller == Some(true));
        match owner.map(|owner| owner.kind.as_str()) {
            None => return Err(Refusal::PodUnmanaged { pod: pod.name_any() }),
            Some("DaemonSet") => return Err(Refusal::PodOfDaemonSet { pod: pod.name_any() }),
            Some(_) => {}
        }
        if let Some(why) = node.and_then(|node| may_not_run(pod, node)) {
            return Err(Refusal::PodNotAllowed { node: target.to_owned(), pod: pod.name_any(), why });
        }
        found.push(MigratingPod { name: pod.name_any(), uid: pod.uid().unwrap_or_default(), node: on.to_owned() });
    }
    Ok(found)
}

/// Whether a pod has a node and is not on its way out.
pub(super) fn runs(pod: &Pod) -> bool {
    node_of(pod).is_some() && pod.metadata.deletion_timestamp.is_none()
}

/// The node of a pod that has one.
pub(super) fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|node| !node.is_empty())
}

/// The plainest of the reasons for which the scheduler would not put a pod on a node: a label that it asks for, or a taint. Others show
/// when the pod lands elsewhere.
fn may_not_run(pod: &Pod, node: &Node) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let wrong = spec.node_selector.iter().flatten().find(|(key, value)| node.labels().get(*key) != Some(*value));
    if let Some((key, value)) = wrong {
        return Some(format!("its nodeSelector asks for {key}={value}"));
    }
    let tolerated = |taint: &k8s_openapi::api::core::v1::Taint| {
        spec.tolerations.iter().flatten().any(|it| {
            let key = it.key.as_deref().is_none_or(|key| key.is_empty() || key == taint.key);
            let effect = it.effect.as_deref().is_none_or(|effect| effect.is_empty() || effect == taint.effect);
            let value = it.operator.as_deref() == Some("Exists")
                || it.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default();
            key && effect && value
        })
    };
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let mut hard = taints.filter(|taint| taint.effect != "PreferNoSchedule");
    hard.find(|taint| !tolerated(taint))
        .map(|taint| format!("it does not tolerate the taint {}:{}", taint.key, taint.effect))
}
