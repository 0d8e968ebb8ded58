//! What a node does next about a volume: a pure function of the volume's object and of what is on the node's disk.
//!
//! Nothing else is remembered, so an agent that is killed anywhere goes on with the same step. Actions that write the status
//! are compare-and-set: one that fails ends the plan, and the agent reads both and plans again, as it does after the last.

use kube::ResourceExt;
use portolan_crds::{
    AskedBy, Handoff, HandoffPhase, PortableVolume, PortableVolumeStatus, Replica, VolumePhase, condition,
};

use super::copy::known_guids;
use super::snapshots;
use super::source::{copied, source};
use super::{Asked, Known, Local, is_copy};
use crate::volume;

/// One step of a plan.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Action {
    /// Nothing can be done yet, and why. Look again soon.
    Wait(String),
    /// Something is wrong that waiting alone won't mend: say so in a condition.
    Report {
        /// The condition's reason, CamelCase.
        reason: &'static str,
        /// What is wrong, and what to do.
        message: String,
    },
    /// Write: this node may hold a dataset from now on. Comes before any dataset does.
    RecordReplica,
    /// Write: this node holds no dataset any more.
    ForgetReplica,
    /// Write: the snapshot that this node's copy shares with the others.
    RecordSnapshot(Known),
    /// Write: the bytes that the owner's copy uses, and that it is well.
    RecordUsed(i64),
    /// Make the dataset of a new volume, stamped with epoch 1.
    Create,
    /// Write: the dataset is made when the kubelet brings its key.
    AwaitKey,
    /// Make the dataset of a new volume from the snapshot that it begins as, stamped with epoch 1; or go on with that.
    Restore,
    /// Make the dataset that the spec names a new volume's, stamped with epoch 1; or go on with that.
    Import,
    /// Write: this node owns the new volume, at epoch 1.
    Own,
    /// Set `readonly`.
    SetReadonly(bool),
    /// Mount the dataset, which is read-only, and unmount it: what a power cut has left in its log only is in it then.
    Replay,
    /// Make sure by the node's mount table that nothing has the dataset mounted, and that a zvol's device can't be written.
    CheckQuiet,
    /// Take the snapshot of a round of PreCopy, and write it with its GUID.
    PublishRound {
        /// Its name.
        name: String,
        /// Whether the dataset rests: it is marked with the snapshot, which may be the last one then.
        rests: bool,
    },
    /// Take the final snapshot, and write it with its GUID if the dataset is read-only; phase FinalSync.
    PublishFinal {
        /// Its name.
        name: String,
        /// A round's snapshot that is the final one if the dataset rests at it still: none is taken then.
        resting: Option<Known>,
    },
    /// Receive what the source has up to this snapshot, and this snapshot.
    Fetch(Known),
    /// Write: the round's snapshot, of this GUID, has come.
    RecordRound(String),
    /// Set the properties that a received dataset lacks because an earlier attempt was cut short, its `portolan:uid` last.
    Adopt,
    /// Write: this node, whose newest snapshot has this GUID, owns the volume, at the handoff's epoch; phase Activating.
    TakeOver(String),
    /// Stamp the epoch on the dataset.
    Stamp(i64),
    /// Write: the handoff is done; phase Ready.
    Finish,
    /// Bring size and parameters of the owner's dataset up to the spec, and write that they are.
    ApplySpec,
    /// Take the snapshots that these objects ask for; more than one are a group's, of one moment.
    Take(Box<Asked>),
    /// Destroy what the taking of this one's group has left on other volumes' datasets, if it was cut short.
    CleanUp(Box<Asked>),
    /// Write: the object's snapshot is this one.
    RecordTaken {
        /// The PortableSnapshot.
        object: String,
        /// Its snapshot.
        snapshot: Known,
    },
    /// Destroy a snapshot whose object is being deleted or was, as soon as no clone needs it.
    DestroyTaken(Known),
    /// Rename a snapshot whose object is being deleted to one of ours: a copy's next delta may begin there.
    Retire(Known),
    /// Write: this node has no snapshot of that object any more.
    RecordDestroyed {
        /// The PortableSnapshot.
        object: String,
    },
    /// The volume is gone for its users; its dataset stays for what still needs it, and for what.
    Keep(String),
    /// Destroy the dataset and its snapshots, if it is this volume's.
    Destroy,
    /// Destroy one snapshot that no copy needs any more.
    DestroySnapshot(Known),
}

/// What node `me` does next about `volume`, whose copy here is `local` (none: the pool is there and has no such dataset) and
/// whose snapshots are `asked` for.
pub fn plan(me: &str, volume: &PortableVolume, local: Option<&Local>, asked: &[Asked]) -> Vec<Action> {
    let status = volume::status(volume);
    let recorded = status.replicas.iter().any(|replica| replica.node == me);
    if volume.metadata.deletion_timestamp.is_some() {
        return delete(me, volume, recorded, local, asked);
    }
    if let Some(local) = local.filter(|local| !is_ours(volume, local, asked)) {
        // A copy that isn't one is nobody's concern while the owner has its own.
        return match (&status.owner, &status.handoff) {
            (Some(owner), None) if owner != me && recorded => vec![Action::ForgetReplica],
            (Some(owner), None) if owner != me => Vec::new(),
            _ => foreign(me, volume, local),
        };
    }
    if let Some(handoff) = &status.handoff {
        if handoff.from == me && handoff.phase == HandoffPhase::PreCopy {
            let actions = own(me, volume, &status, recorded, local, asked);
            return match local {
                Some(local) => copied(volume, &status, handoff, local, actions),
                None => actions,
            };
        }
        if handoff.from == me && handoff.phase < HandoffPhase::Activating {
            return source(&status, handoff, local);
        }
        if handoff.to == me {
            return target(me, &status, handoff, local, asked);
        }
        // PreCopy may last: other copies are kept in order meanwhile.
        if handoff.phase != HandoffPhase::PreCopy {
            return Vec::new();
        }
    }
    match &status.owner {
        None if volume.spec.placement.node == me => create(volume, recorded, local),
        None => withdraw(me, volume, recorded, local),
        Some(owner) if owner == me => own(me, volume, &status, recorded, local, asked),
        Some(_) => keep(me, &status, recorded, local, asked),
    }
}

/// Whether a dataset is a copy of the volume. One that has only begun to come, and not been marked yet, may have no snapshot but a person's.
fn is_ours(volume: &PortableVolume, local: &Local, asked: &[Asked]) -> bool {
    is_copy(volume, local) || (local.uid.is_none() && snapshots::has_asked(local, asked))
}

fn foreign(me: &str, volume: &PortableVolume, local: &Local) -> Vec<Action> {
    let whose = match &local.uid {
        Some(uid) => format!("belongs to another volume (portolan:uid is {uid})"),
        None => "was not made by Portolan (it has no portolan:uid)".to_owned(),
    };
    let message = format!(
        "the dataset {} on node {me} {whose}: rename it or destroy it there if nobody needs it",
        volume.name_any()
    );
    vec![Action::Report { reason: "DatasetConflict", message }]
}

fn delete(me: &str, volume: &PortableVolume, recorded: bool, local: Option<&Local>, asked: &[Asked]) -> Vec<Action> {
    let local = local.filter(|local| is_ours(volume, local, asked));
    if let Some(local) = local.filter(|local| local.mounted) {
        if is_cut_short(local) {
            return vec![Action::Replay];
        }
        return vec![Action::Wait(format!(
            "the volume is being deleted and dataset is still mounted ({} bytes)",
            local.used
        ))];
    }
    // What was to be imported and never was is still its maker's.
    let local = local.filter(|_| volume.spec.import.is_none() || volume::status(volume).owner.is_some());
    // Nobody receives any more of it.
    let mut actions = snapshots::end_asked(me, &PortableVolumeStatus::default(), local, asked);
    let kept: Vec<&str> = local.map(|local| snapshots::kept(local, asked)).unwrap_or_default();
    if !kept.is_empty() {
        actions.push(Action::Keep(format!("its snapshots are kept: {}", kept.join(", "))));
        return actions;
    }
    if local.is_some() {
        actions.push(Action::Destroy);
    }
    if recorded {
        actions.push(Action::ForgetReplica);
    }
    actions
}

/// A new volume that is wanted here.
fn create(volume: &PortableVolume, recorded: bool, local: Option<&Local>) -> Vec<Action> {
    if !recorded {
        return vec![Action::RecordReplica];
    }
    let make = match local {
        _ if volume.spec.import.is_some() => Some(Action::Import),
        _ if volume.spec.source.is_some() => Some(Action::Restore),
        // Made when it is first mounted (`node::seal`); what that has left when it was cut short is owned like any other.
        None if volume.spec.encryption.is_some() => return vec![Action::AwaitKey],
        None => Some(Action::Create),
        Some(_) => None,
    };
    // What was there already was made as the spec was then. A zvol's size is behind its key.
    let apply = local.filter(|local| !(volume.spec.is_zvol() && local.sealed)).map(|_| Action::ApplySpec);
    make.into_iter().chain(apply).chain([Action::Own]).collect()
}

/// A new volume that was wanted here once, and that nobody has owned: its dataset has never been mounted.
fn withdraw(me: &str, volume: &PortableVolume, recorded: bool, local: Option<&Local>) -> Vec<Action> {
    match (recorded, local) {
        (_, Some(local)) if volume.spec.import.is_some() => {
            let message = format!(
                "the dataset that is to be imported is {} on node {me}, and spec.placement.node is {}: allowed is {me}",
                local.dataset, volume.spec.placement.node
            );
            vec![Action::Report { reason: "ImportElsewhere", message }]
        }
        (_, Some(local)) if local.mounted || !local.snapshots.is_empty() => Vec::new(),
        (_, Some(_)) => vec![Action::Destroy, Action::ForgetReplica],
        (true, None) => vec![Action::ForgetReplica],
        (false, None) => Vec::new(),
    }
}

/// The owner's copy when no handoff is under way.
fn own(
    me: &str,
    volume: &PortableVolume,
    status: &PortableVolumeStatus,
    recorded: bool,
    local: Option<&Local>,
    asked: &[Asked],
) -> Vec<Action> {
    let local = match at_epoch(local, status.epoch) {
        Ok(local) => local,
        Err(report) => return vec![report],
    };
    if !recorded {
        return vec![Action::RecordReplica];
    }
    let taken = snapshots::take_asked(local, asked);
    let mut actions = play_log(local, &taken);
    if local.readonly || !actions.is_empty() {
        actions.push(Action::SetReadonly(false));
    }
    let spec = &volume.spec;
    let differs = status.size_bytes != Some(spec.size_bytes) || status.parameters.as_ref() != Some(&spec.parameters);
    // A zvol's size is behind its key: it waits for the next mount.
    if differs && !(spec.is_zvol() && local.sealed) {
        actions.push(Action::ApplySpec);
    }
    // Behind its key it waits for the next mount, too.
    let lacks = |action: &Action| matches!(action, Action::Take(_)) && has_log(local) && local.sealed;
    actions.extend(taken.into_iter().filter(|action| !lacks(action)));
    actions.extend(snapshots::end_asked(me, status, Some(local), asked));
    actions.extend(record_and_prune(me, status, local));
    let noticeable = status.used_bytes.is_none_or(|used| (used - local.used).abs() > (used / 100).max(64 << 10));
    let well = status
        .conditions
        .iter()
        .any(|condition| condition.type_ == condition::READY && condition.status == condition::TRUE);
    if noticeable || !well || status.phase != VolumePhase::Ready {
        actions.push(Action::RecordUsed(local.used));
    }
    actions
}

/// Whether something that was acknowledged may be in the dataset's log only, because its node failed while it was in use.
fn has_log(local: &Local) -> bool {
    local.open && !local.mounted
}

/// Whether it is mounted because an agent was killed while it had its log played: nobody else would unmount it.
pub(super) fn is_cut_short(local: &Local) -> bool {
    local.open && local.mounted && local.readonly
}

/// Has the log played before a snapshot is taken: it shall have all that was acknowledged. Read-only meanwhile, which tells a mount that was left
/// by an agent that was killed there from the kubelet's.
fn play_log(local: &Local, taken: &[Action]) -> Vec<Action> {
    let wanted = has_log(local) && !local.sealed && taken.iter().any(|action| matches!(action, Action::Take(_)));
    match (wanted, is_cut_short(local)) {
        (true, _) => vec![Action::SetReadonly(true), Action::Replay],
        (false, true) => vec![Action::Replay],
        (false, false) => Vec::new(),
    }
}

/// A copy on a node that is not the owner.
fn keep(
    me: &str,
    status: &PortableVolumeStatus,
    recorded: bool,
    local: Option<&Local>,
    asked: &[Asked],
) -> Vec<Action> {
    match (recorded, local) {
        (true, Some(local)) => {
            // An aborted handoff has left it so.
            let mut actions: Vec<Action> = local.uid.is_none().then_some(Action::Adopt).into_iter().collect();
            // Received for a handoff that was aborted before that was written down. It comes first: what is known to be shared stays.
            let unsaid = snapshots::unsaid(me, status, &local.snapshots, asked);
            match unsaid.or_else(|| only_of_people(me, status, local)) {
                Some(shared) => actions.push(Action::RecordSnapshot(shared.clone())),
                None => {
                    actions.extend(snapshots::end_asked(me, status, Some(local), asked));
                    actions.extend(record_and_prune(me, status, local));
                }
            }
            actions
        }
        (true, None) => vec![Action::ForgetReplica],
        (false, Some(_)) => vec![Action::RecordReplica],
        (false, None) => Vec::new(),
    }
}

/// The newest snapshot of a copy that has people's only, because the handoff that brought it was aborted: as long as nobody knows what a copy
/// has, none of ours is let go of anywhere.
fn only_of_people<'a>(me: &str, status: &PortableVolumeStatus, local: &'a Local) -> Option<&'a Known> {
    let unknown = |replica: &&Replica| replica.node == me && replica.guid.is_none();
    let newest = local.snapshots.last().filter(|_| local.newest().is_none())?;
    status.replicas.iter().find(unknown).map(|_| newest)
}

fn record_and_prune(me: &str, status: &PortableVolumeStatus, local: &Local) -> Vec<Action> {
    let entry = status.replicas.iter().find(|replica| replica.node == me);
    match (local.newest(), entry) {
        // What was taken after the recorded one was never published: the others don't have it.
        (Some(newest), Some(entry)) if !entry.guid.as_ref().is_some_and(|guid| local.has(guid)) => {
            vec![Action::RecordSnapshot(newest.clone())]
        }
        _ => snapshots::prune(me, status, &local.snapshots).collect(),
    }
}

pub(super) fn at_epoch(local: Option<&Local>, epoch: i64) -> Result<&Local, Action> {
    let Some(local) = local else {
        let message =
            "the owner's pool is there but the volume's dataset is not: it was destroyed or renamed by hand".to_owned();
        return Err(Action::Report { reason: "DatasetMissing", message });
    };
    if local.epoch != Some(epoch) {
        let found = local.epoch.map_or("none".to_owned(), |epoch| epoch.to_string());
        let message = format!(
            "the owner's dataset carries epoch {found} and the volume is at epoch {epoch}: it is not the copy that was written last"
        );
        return Err(Action::Report { reason: "EpochMismatch", message });
    }
    Ok(local)
}

fn target(
    me: &str,
    status: &PortableVolumeStatus,
    handoff: &Handoff,
    local: Option<&Local>,
    asked: &[Asked],
) -> Vec<Action> {
    let Some(entry) = status.replicas.iter().find(|replica| replica.node == me) else {
        return vec![Action::RecordReplica];
    };
    if handoff.phase == HandoffPhase::Activating {
        return match local.filter(|local| handoff.guid.as_ref().is_some_and(|guid| local.has(guid))) {
            Some(local) => activate(handoff, local),
            None => {
                let message =
                    "the new owner has lost the copy it received: it was destroyed or rolled back by hand".to_owned();
                vec![Action::Report { reason: "DatasetMissing", message }]
            }
        };
    }
    let adopt = local.filter(|local| local.uid.is_none()).map(|_| Action::Adopt);
    let has = |guid: &String| local.is_some_and(|local| local.has(guid));
    match (handoff.phase, handoff.guid.clone().filter(has), local) {
        (HandoffPhase::FinalSync, Some(guid), Some(local)) => {
            adopt.into_iter().chain(take_over(guid, handoff, local)).collect()
        }
        (HandoffPhase::PreCopy, Some(guid), _) if entry.guid.as_ref() != Some(&guid) => {
            adopt.into_iter().chain([Action::RecordRound(guid)]).collect()
        }
        (HandoffPhase::PreCopy, Some(_), Some(local)) => {
            // What can be done before a pod waits for it. The epoch is nobody's but this attempt's. Who only reads never owns it.
            let moves = handoff.warm && handoff.asked_by != AskedBy::Reading;
            let early = moves && local.uid.is_some() && local.epoch != Some(handoff.epoch);
            let stamp = early.then_some(Action::Stamp(handoff.epoch)).into_iter();
            let ended = snapshots::end_asked(me, status, Some(local), asked);
            stamp.chain(ended).chain(snapshots::prune(me, status, &local.snapshots)).collect()
        }
        (_, _, Some(local)) if local.mounted => {
            vec![Action::Wait(format!("the replica on node {} is mounted there", handoff.to))]
        }
        (HandoffPhase::Quiescing, _, Some(local)) if local.uid.is_some() && local.epoch != Some(handoff.epoch) => {
            // The source's turn: what can be done before it is is not waited for later. The epoch is nobody's but this attempt's.
            vec![Action::Stamp(handoff.epoch)]
        }
        (_, _, local) => match local.and_then(|local| snapshots::unsaid(me, status, &local.snapshots, asked)) {
            // The source lets go of it if nobody is known to have it.
            Some(shared) => vec![Action::RecordSnapshot(shared.clone())],
            None => fetch(status, handoff, entry, local),
        },
    }
}

fn fetch(status: &PortableVolumeStatus, handoff: &Handoff, entry: &Replica, local: Option<&Local>) -> Vec<Action> {
    let wanted = handoff.snapshot.clone().zip(handoff.guid.clone());
    // Until there is one it is the source's turn.
    let Some((name, guid)) = wanted else { return Vec::new() };
    let known = known_guids(status);
    let here = local.map(|local| local.snapshots.as_slice()).unwrap_or_default();
    let unpublished = snapshots::unpublished(&known, entry, here);
    let fetch = Action::Fetch(Known { name, guid: guid.clone() });
    let actions = unpublished.map(Action::DestroySnapshot).chain([fetch]);
    // A fetch ends well only with that snapshot there, and nothing else of a copy that is ours changes with it: no need to look again.
    match local.filter(|local| local.uid.is_some()) {
        Some(local) if handoff.phase == HandoffPhase::FinalSync => {
            actions.chain(take_over(guid, handoff, local)).collect()
        }
        Some(_) => actions.chain([Action::RecordRound(guid)]).collect(),
        None => actions.collect(),
    }
}

/// What follows the first step is decided by our own write: nobody else can change it between.
fn take_over(guid: String, handoff: &Handoff, local: &Local) -> impl Iterator<Item = Action> {
    [Action::TakeOver(guid)].into_iter().chain(activate(handoff, local))
}

fn activate(handoff: &Handoff, local: &Local) -> Vec<Action> {
    let mut actions = Vec::new();
    if local.epoch != Some(handoff.epoch) {
        actions.push(Action::Stamp(handoff.epoch));
    }
    // One that has just been adopted is read-only since.
    if local.readonly || local.uid.is_none() {
        actions.push(Action::SetReadonly(false));
    }
    actions.push(Action::Finish);
    actions
}
