//! PortableSnapshots: their finalizer, their deletion, and those that were taken for a volume that is made.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use kube::api::{DeleteParams, PostParams};
use kube::runtime::controller::Action;
use kube::runtime::{Controller, watcher};
use portolan_crds::{PortableSnapshot, PortableVolume, SNAPSHOT_FINALIZER, condition};
use portolan_runtime::conditions;

use super::source::{CLONE_CLAIM, CLONE_FOR};
use super::volumes::name_of;
use super::{Hub, RESYNC, exhaust, retry, set_finalizer, unless_gone};
use crate::volume;

/// How soon a snapshot is looked at again that waits for nodes.
const WAITING: Duration = Duration::from_secs(10);
/// How long a snapshot is kept for a volume that isn't there and that no claim is known to want: a call of CSI's is making it, or has
/// given up.
const UNCLAIMED: SignedDuration = SignedDuration::from_hours(1);

pub(super) async fn run(hub: Arc<Hub>) {
    let stream = Controller::new(hub.snapshots.clone(), watcher::Config::default()).run(reconcile, retry, hub.clone());
    exhaust("snapshots", stream).await;
}

/// Looks at one of them.
pub(crate) async fn reconcile(snapshot: Arc<PortableSnapshot>, hub: Arc<Hub>) -> kube::Result<Action> {
    let of = hub.volumes.get_opt(&snapshot.spec.volume).await?;
    if snapshot.metadata.deletion_timestamp.is_some() {
        if is_nowhere(&snapshot, of.as_ref()) {
            set_finalizer(&hub.snapshots, snapshot.as_ref(), SNAPSHOT_FINALIZER, false).await?;
            return Ok(Action::await_change());
        }
        return Ok(Action::requeue(WAITING));
    }
    set_finalizer(&hub.snapshots, snapshot.as_ref(), SNAPSHOT_FINALIZER, true).await?;
    if let Some(new) = snapshot.annotations().get(CLONE_FOR) {
        return collect_clone(&hub, &snapshot, new).await;
    }
    if of.is_none() {
        let message = format!("there is no PortableVolume {}", snapshot.spec.volume);
        return not_ready(&hub, &snapshot, "VolumeMissing", &message).await;
    }
    if snapshot.guid().is_none() {
        let message = match snapshot.spec.import {
            true => format!(
                "the volume's owner has no ZFS snapshot {} yet: take it there, or delete this",
                snapshot.short_name()
            ),
            false => "the volume's owner has not taken it yet".to_owned(),
        };
        return not_ready(&hub, &snapshot, "NotTaken", &message).await;
    }
    Ok(Action::requeue(RESYNC))
}

/// Whether no node has it any more, and none can get it: each that may have a copy of the volume has said so, the target of a move among them, and
/// no source sends it to a node that has.
pub(crate) fn is_nowhere(snapshot: &PortableSnapshot, of: Option<&PortableVolume>) -> bool {
    let Some(volume) = of else { return true };
    let status = volume::status(volume);
    let said = snapshot.status.as_ref().map(|status| status.destroyed_on.as_slice()).unwrap_or_default();
    status.replicas.iter().all(|replica| said.contains(&replica.node))
}

/// A snapshot that was taken to make a volume from goes when that is made, or when nobody wants it any more.
async fn collect_clone(hub: &Hub, snapshot: &PortableSnapshot, new: &str) -> kube::Result<Action> {
    let claim = snapshot.annotations().get(CLONE_CLAIM).and_then(|claim| claim.split_once('/'));
    let is_done = match (hub.volumes.get_opt(new).await?, claim) {
        (Some(volume), _) => volume::status(&volume).owner.is_some() || volume.metadata.deletion_timestamp.is_some(),
        (None, Some((namespace, name))) => !wants(hub.claims(namespace).get_opt(name).await?.as_ref(), new),
        (None, None) => {
            let since = snapshot.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |since| since.0);
            // Negative after a clock has gone back: then it waits.
            Timestamp::now().duration_since(since) > UNCLAIMED
        }
    };
    if is_done {
        unless_gone(hub.snapshots.delete(&snapshot.name_any(), &DeleteParams::default()).await)?;
    }
    Ok(Action::requeue(WAITING))
}

/// Whether a claim still wants volume `new`: another one of the same name doesn't.
fn wants(claim: Option<&PersistentVolumeClaim>, new: &str) -> bool {
    let current = claim.filter(|claim| claim.metadata.deletion_timestamp.is_none());
    current.and_then(name_of).is_some_and(|volume| volume == new)
}

async fn not_ready(hub: &Hub, snapshot: &PortableSnapshot, reason: &str, message: &str) -> kube::Result<Action> {
    let mut next = snapshot.clone();
    let status = next.status.get_or_insert_default();
    if conditions::set(&mut status.conditions, condition::READY, condition::FALSE, reason, message, None) {
        unless_gone(hub.snapshots.replace_status(&snapshot.name_any(), &PostParams::default(), &next).await)?;
    }
    Ok(Action::requeue(WAITING))
}

#[cfg(test)]
mod tests {
    use portolan_crds::{
        Handoff, PortableSnapshotSpec, PortableSnapshotStatus, PortableVolumeSpec, PortableVolumeStatus, Replica,
    };

    use super::*;

    #[test]
    fn only_the_claim_itself_wants_its_volume() {
        let mut claim = PersistentVolumeClaim::default();
        claim.metadata.uid = Some("one".into());
        assert!(wants(Some(&claim), "pvc-one"));
        assert!(!wants(None, "pvc-one"));
        assert!(!wants(Some(&claim), "pvc-other"), "one that had its name");
        claim.metadata.deletion_timestamp = Some(Timestamp::UNIX_EPOCH.into());
        assert!(!wants(Some(&claim), "pvc-one"));
    }

    #[test]
    fn a_snapshot_is_gone_when_every_copy_has_said_so() {
        let replica = |node: &str| Replica { node: node.into(), ..Replica::default() };
        let mut volume = PortableVolume::new("pvc-1", PortableVolumeSpec::default());
        let replicas = vec![replica("a"), replica("b")];
        volume.status = Some(PortableVolumeStatus { replicas, ..PortableVolumeStatus::default() });
        let said = |nodes: &[&str]| {
            let mut snapshot = PortableSnapshot::new("s", PortableSnapshotSpec::default());
            let destroyed_on = nodes.iter().map(ToString::to_string).collect();
            snapshot.status = Some(PortableSnapshotStatus { destroyed_on, ..PortableSnapshotStatus::default() });
            snapshot
        };
        assert!(!is_nowhere(&said(&["a"]), Some(&volume)));
        assert!(is_nowhere(&said(&["b", "a"]), Some(&volume)));
        assert!(is_nowhere(&said(&[]), None));
        // It moves: whether its target has received the snapshot the target alone can say.
        if let Some(status) = &mut volume.status {
            status.handoff = Some(Handoff { to: "c".into(), ..Handoff::default() });
            status.replicas.push(replica("c"));
        }
        assert!(!is_nowhere(&said(&["b", "a"]), Some(&volume)));
        assert!(is_nowhere(&said(&["b", "a", "c"]), Some(&volume)));
    }
}
