//! Volumes that nobody ever writes, and that many nodes read at once, each its own copy.
//!
//! Their owner's dataset is made read-only before anybody can mount it, and stays so: what it holds then is all that it will ever hold. So
//! each snapshot that a handoff has it take has everything, and a copy that is known to have one of these is complete. How copies come to
//! other nodes, and how the owner changes, is the handoff's; all that differs is that nothing is ever made writable.

use portolan_crds::{AskedBy, HandoffPhase, PortableVolume};

use super::plan::{self, Action};
use super::{Asked, Local, is_copy, snapshots};
use crate::volume;

/// What node `me` does next about `volume`, whose copy here is `local` (none: the pool is there and has no such dataset) and whose snapshots
/// are `asked` for.
pub fn plan(me: &str, volume: &PortableVolume, local: Option<&Local>, asked: &[Asked]) -> Vec<Action> {
    let mut actions = plan::plan(me, volume, local, asked);
    if !volume.spec.is_shared() || volume.metadata.deletion_timestamp.is_some() {
        return actions;
    }
    let owned = volume::status(volume).owner.as_deref() == Some(me);
    if let Some(local) = local.filter(|local| owned && is_copy(volume, local)) {
        let freeze = freeze(local);
        if !freeze.is_empty() {
            return freeze;
        }
    }
    // One round brings everything, and the controller is about to end it. What a migration has begun goes its own way.
    let by = volume.status.as_ref().and_then(|status| status.handoff.as_ref()).map(|handoff| handoff.asked_by);
    let ends = matches!(by, Some(AskedBy::Reading | AskedBy::Cordon));
    let enough = ends && copying(volume).is_some_and(|target| is_complete(volume, target));
    actions.retain(|action| match action {
        Action::SetReadonly(on) => *on,
        Action::PublishRound { .. } => !enough,
        _ => true,
    });
    actions
}

/// Comes before all else: nothing is written from here on. What may be in the log only (an imported dataset's) is played before any snapshot.
fn freeze(local: &Local) -> Vec<Action> {
    let log = local.open && !local.sealed;
    let readonly = (!local.readonly).then_some(Action::SetReadonly(true));
    readonly.into_iter().chain(log.then_some(Action::Replay)).collect()
}

/// The node to which a copy is on its way while the volume stays where it is.
pub fn copying(volume: &PortableVolume) -> Option<&str> {
    let handoff = volume.status.as_ref()?.handoff.as_ref()?;
    (handoff.phase == HandoffPhase::PreCopy).then_some(handoff.to.as_str())
}

/// Whether a node is known to have all of a volume that nobody writes: it owns it, or its copy has a snapshot that the owner took for a
/// handoff. People's snapshots prove nothing, retired ones neither: an imported dataset brings older ones along.
pub fn is_complete(volume: &PortableVolume, node: &str) -> bool {
    let Some(status) = &volume.status else { return false };
    status.owner.as_deref() == Some(node) || proof(volume, node).is_some()
}

/// Whether what is on this node's disk is all of the volume, and can't be written.
///
/// # Errors
/// Why not, for people.
pub fn check_whole(me: &str, volume: &PortableVolume, local: &Local) -> Result<(), String> {
    let status = volume::status(volume);
    let dataset = &local.dataset;
    if !is_copy(volume, local) {
        return Err(format!("dataset {dataset} is not this volume's"));
    }
    if !local.readonly || local.open {
        return Err(format!("dataset {dataset} is not read-only for good yet: its agent is about to see to that"));
    }
    if status.owner.as_deref() == Some(me) {
        let same = local.epoch == Some(status.epoch);
        let differ = || format!("dataset {dataset} is at epoch {:?}, the volume at {}", local.epoch, status.epoch);
        return if same { Ok(()) } else { Err(differ()) };
    }
    match proof(volume, me) {
        Some(guid) if local.uid.is_some() && local.has(guid) => Ok(()),
        Some(guid) => {
            Err(format!("the copy in dataset {dataset} has lost snapshot {guid}, up to which it was complete"))
        }
        None => Err(format!("the copy in dataset {dataset} is not complete yet")),
    }
}

/// The GUID of the snapshot by which a copy is known to be complete.
fn proof<'a>(volume: &'a PortableVolume, node: &str) -> Option<&'a str> {
    let status = volume.status.as_ref()?;
    let copy = status.replicas.iter().find(|replica| replica.node == node)?;
    let ours = copy.snapshot.as_deref().is_some_and(snapshots::is_of_handoff);
    copy.guid.as_deref().filter(|_| ours)
}

#[cfg(test)]
mod tests {
    use portolan_crds::{Handoff, Placement, PortableVolumeSpec, PortableVolumeStatus, Replica, VolumePhase};

    use super::*;
    use crate::handoff::{Ask, Event, Known, transition};

    fn shared(owner: Option<&str>) -> PortableVolume {
        let placement = Placement { node: "a".into() };
        let mut volume = PortableVolume::new(
            "v",
            PortableVolumeSpec { read_only: true, placement, ..PortableVolumeSpec::default() },
        );
        volume.metadata.uid = Some("uid".into());
        let mut status =
            PortableVolumeStatus { epoch: 1, phase: VolumePhase::Ready, ..PortableVolumeStatus::default() };
        status.owner = owner.map(str::to_owned);
        status.replicas.push(Replica { node: "a".into(), ..Replica::default() });
        volume.status = Some(status);
        volume
    }

    fn local(snapshots: &[&str]) -> Local {
        let known = |name: &&str| Known { name: (*name).into(), guid: format!("g-{name}") };
        Local {
            dataset: "tank/v".into(),
            uid: Some("uid".into()),
            epoch: Some(1),
            readonly: true,
            snapshots: snapshots.iter().map(known).collect(),
            ..Local::default()
        }
    }

    fn happen(volume: &mut PortableVolume, event: Event) {
        volume.status = Some(transition(volume, event).unwrap());
    }

    fn copy_to(volume: &mut PortableVolume, node: &str) {
        let ask = Ask { to: node.into(), by: AskedBy::Reading, warm: true, ..Ask::default() };
        happen(volume, Event::Asked(ask, crate::write::now()));
    }

    #[test]
    fn its_owner_makes_it_read_only_before_anything_else() {
        let mut volume = shared(Some("a"));
        copy_to(&mut volume, "b");
        let writable = Local { readonly: false, ..local(&[]) };
        assert_eq!(plan("a", &volume, Some(&writable), &[]), [Action::SetReadonly(true)]);
        let open = Local { open: true, ..writable.clone() };
        assert_eq!(plan("a", &volume, Some(&open), &[]), [Action::SetReadonly(true), Action::Replay]);
        let cut_short = Local { open: true, mounted: true, ..local(&[]) };
        assert_eq!(plan("a", &volume, Some(&cut_short), &[]), [Action::Replay]);
        let done = plan("a", &volume, Some(&local(&[])), &[]);
        assert!(done.contains(&Action::PublishRound { name: "portolan-2".into(), rests: false }), "{done:?}");
        for (name, local) in [("writable", &writable), ("open", &open)] {
            assert!(check_whole("a", &volume, local).unwrap_err().contains("read-only"), "{name}");
        }
        assert_eq!(check_whole("a", &volume, &local(&[])), Ok(()));
    }

    #[test]
    fn nothing_of_it_is_ever_made_writable() {
        let phases =
            [HandoffPhase::PreCopy, HandoffPhase::Quiescing, HandoffPhase::FinalSync, HandoffPhase::Activating];
        for phase in phases.map(Some).into_iter().chain([None]) {
            for (me, owner) in [("a", "a"), ("b", "a"), ("b", "b"), ("c", "a")] {
                let mut volume = shared(Some(owner));
                let handoff = Handoff { from: "a".into(), to: "b".into(), epoch: 2, ..Handoff::default() };
                let known = (Some("portolan-2".to_owned()), Some("g-portolan-2".to_owned()));
                volume.status.as_mut().unwrap().handoff = phase.map(|phase| Handoff {
                    phase,
                    snapshot: known.0.clone(),
                    guid: known.1.clone(),
                    ..handoff.clone()
                });
                for snapshots in [&[][..], &["portolan-2"]] {
                    for (open, mounted) in [(false, false), (false, true), (true, false), (true, true)] {
                        let local = Local { open, mounted, ..local(snapshots) };
                        let actions = plan(me, &volume, Some(&local), &[]);
                        assert!(
                            !actions.contains(&Action::SetReadonly(false)),
                            "{me} {phase:?} {local:?}: {actions:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_copy_is_complete_when_it_has_what_the_owner_took_and_one_round_is_enough() {
        let mut volume = shared(Some("a"));
        assert!(is_complete(&volume, "a") && !is_complete(&volume, "b"));
        copy_to(&mut volume, "b");
        assert_eq!(copying(&volume), Some("b"));
        // What an imported dataset had before is no proof.
        for name in ["daily", "portolan-0-7"] {
            let old = Known { name: name.into(), guid: "g-daily".into() };
            happen(&mut volume, Event::Recorded { node: "b".into(), snapshot: Some(old) });
            assert!(!is_complete(&volume, "b"), "{name}");
        }
        assert!(check_whole("b", &volume, &local(&["daily"])).unwrap_err().contains("not complete"));
        let round = Known { name: "portolan-2".into(), guid: "g-portolan-2".into() };
        let at = crate::write::now();
        happen(&mut volume, Event::RoundTaken { node: "a".into(), epoch: 2, snapshot: round, at });
        assert!(!is_complete(&volume, "b"), "it is on its way");
        // So slow that another volume's would be followed by a second round.
        let figures = Some(crate::handoff::Round { bytes: 1 << 30, milliseconds: 60_000 });
        let received = Event::RoundReceived { node: "b".into(), epoch: 2, guid: "g-portolan-2".into(), round: figures };
        happen(&mut volume, received);
        assert!(is_complete(&volume, "b"));
        let rounds = |volume: &PortableVolume| {
            let actions = plan("a", volume, Some(&local(&["portolan-2"])), &[]);
            actions.iter().any(|action| matches!(action, Action::PublishRound { .. }))
        };
        assert!(!rounds(&volume), "it has all there is");
        let asked_by = |volume: &mut PortableVolume, by| {
            volume.status.as_mut().unwrap().handoff.as_mut().unwrap().asked_by = by;
        };
        asked_by(&mut volume, AskedBy::Migration);
        assert!(rounds(&volume), "until it is warm");
        asked_by(&mut volume, AskedBy::Cordon);
        assert!(!rounds(&volume));
        volume.spec.read_only = false;
        assert!(rounds(&volume), "another's second round");
        volume.spec.read_only = true;
        assert_eq!(check_whole("b", &volume, &local(&["daily", "portolan-2"])), Ok(()));
        let why = |local: Local| check_whole("b", &volume, &local).unwrap_err();
        assert!(why(local(&["daily"])).contains("lost"), "rolled back by hand");
        assert!(why(Local { readonly: false, ..local(&["portolan-2"]) }).contains("read-only"));
        assert!(why(Local { uid: Some("other".into()), ..local(&["portolan-2"]) }).contains("not this volume's"));
    }

    #[test]
    fn a_copy_that_is_read_waits_to_be_received_into_and_to_be_destroyed() {
        let mut volume = shared(Some("a"));
        let status = volume.status.as_mut().unwrap();
        let (snapshot, guid) = (Some("portolan-2".to_owned()), Some("g-portolan-2".to_owned()));
        status.replicas.push(Replica { node: "b".into(), snapshot, guid });
        let read = Local { mounted: true, ..local(&["portolan-2"]) };
        assert_eq!(plan("b", &volume, Some(&read), &[]), []);
        let mut moving = volume.clone();
        happen(&mut moving, Event::Asked(Ask { to: "b".into(), ..Ask::default() }, crate::write::now()));
        let published = Known { name: "portolan-3".into(), guid: "g-portolan-3".into() };
        let at = crate::write::now();
        happen(&mut moving, Event::Published { node: "a".into(), epoch: 2, snapshot: published, quiesced_at: at });
        assert!(matches!(plan("b", &moving, Some(&read), &[])[..], [Action::Wait(_)]));
        let actions = plan("b", &moving, Some(&local(&["portolan-2"])), &[]);
        assert!(
            matches!(actions[0], Action::Fetch(_)) && !actions.contains(&Action::SetReadonly(false)),
            "{actions:?}"
        );
        let epoch = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH);
        volume.metadata.deletion_timestamp = Some(epoch);
        assert!(matches!(plan("b", &volume, Some(&read), &[])[..], [Action::Wait(_)]));
    }
}
