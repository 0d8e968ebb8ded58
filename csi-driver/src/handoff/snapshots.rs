//! Which snapshots a copy takes, fetches and lets go of.
//!
//! Portolan's snapshots are called `portolan-<epoch>`, after the epoch that the handoff they were taken for establishes, then
//! `portolan-<epoch>-2` and so on: one for each round of PreCopy, and for each attempt at the final one. A snapshot that was
//! taken before the last look at the mount table proves nothing, and zfs-fuse can't tell what was written since one.
//!
//! People's are called as they like. One whose object goes while a copy's next delta may begin there is *retired*: it becomes Portolan's,
//! called `portolan-0-<GUID>`, and goes when no copy needs it. No handoff establishes epoch 0, and a GUID comes only once.

use kube::ResourceExt;
use portolan_crds::{HandoffOutcome, PortableSnapshot, PortableVolumeStatus, Replica, SnapshotGroup};

use super::{Action, Local, known_guids};

const PREFIX: &str = "portolan-";

/// A snapshot by its short name and its GUID (decimal), which is the same on every pool that has received it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Known {
    /// What stands behind the `@`.
    pub name: String,
    /// The GUID.
    pub guid: String,
}

/// A snapshot that somebody wants, by its PortableSnapshot.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Asked {
    /// The PortableSnapshot's name.
    pub object: String,
    /// Its short name in ZFS.
    pub short: String,
    /// Its GUID, once it is taken.
    pub guid: Option<String>,
    /// Whether it is never to be taken, only found.
    pub import: bool,
    /// The group that it is one of.
    pub group: Option<SnapshotGroup>,
    /// Whether its object is being deleted.
    pub deleting: bool,
    /// The nodes that have said that they have none any more.
    pub destroyed_on: Vec<String>,
}

impl Asked {
    /// What an object asks for.
    pub fn of(object: &PortableSnapshot) -> Self {
        Self {
            object: object.name_any(),
            short: object.short_name(),
            guid: object.guid().map(str::to_owned),
            import: object.spec.import,
            group: object.spec.group.clone(),
            deleting: object.metadata.deletion_timestamp.is_some(),
            destroyed_on: object.status.as_ref().map(|status| status.destroyed_on.clone()).unwrap_or_default(),
        }
    }

    fn is(&self, snapshot: &Known) -> bool {
        match &self.guid {
            Some(guid) => snapshot.guid == *guid,
            None => snapshot.name == self.short,
        }
    }

    /// Whether a snapshot goes with this object. One that was never taken is somebody else's of the same name.
    fn is_end_of(&self, snapshot: &Known) -> bool {
        self.deleting && (self.guid.is_some() || !self.import) && !snapshot.is_retired() && self.is(snapshot)
    }
}

/// Takes what is asked for and not there; writes down what is.
pub(super) fn take_asked(local: &Local, asked: &[Asked]) -> Vec<Action> {
    let open = asked.iter().filter(|asked| asked.guid.is_none() && !asked.deleting);
    let steps = |asked: &Asked| match local.snapshots.iter().find(|snapshot| asked.is(snapshot)) {
        Some(found) => {
            let record = Action::RecordTaken { object: asked.object.clone(), snapshot: found.clone() };
            clean_up(asked).into_iter().chain([record]).collect()
        }
        None if asked.import => Vec::new(),
        None => vec![Action::Take(Box::new(asked.clone()))],
    };
    open.flat_map(steps).collect()
}

/// Whether a copy has any snapshot that was asked for.
pub(super) fn has_asked(local: &Local, asked: &[Asked]) -> bool {
    asked.iter().any(|asked| local.snapshots.iter().any(|snapshot| asked.is(snapshot)))
}

/// Comes before a group's snapshot is recorded or destroyed: nobody comes back to it after.
fn clean_up(asked: &Asked) -> Option<Action> {
    (asked.group.is_some() && asked.guid.is_none()).then(|| Action::CleanUp(Box::new(asked.clone())))
}

/// Destroys or retires those whose objects are being deleted, and says so.
pub(super) fn end_asked(
    me: &str,
    status: &PortableVolumeStatus,
    local: Option<&Local>,
    asked: &[Asked],
) -> Vec<Action> {
    let mut actions = Vec::new();
    let here = local.map(|local| local.snapshots.as_slice()).unwrap_or_default();
    for asked in asked.iter().filter(|asked| asked.deleting) {
        let found = here.iter().find(|snapshot| asked.is_end_of(snapshot));
        if let Some(found) = found {
            actions.extend(clean_up(asked));
            actions.push(match is_base(me, status, here, found) {
                true => Action::Retire(found.clone()),
                false => Action::DestroyTaken(found.clone()),
            });
        }
        if found.is_some() || !asked.destroyed_on.iter().any(|node| node == me) {
            actions.push(Action::RecordDestroyed { object: asked.object.clone() });
        }
    }
    actions
}

/// The objects whose snapshots a copy must stay for.
pub(super) fn kept<'a>(local: &Local, asked: &'a [Asked]) -> Vec<&'a str> {
    let is_here = |asked: &&Asked| local.snapshots.iter().any(|snapshot| asked.is(snapshot));
    asked.iter().filter(|asked| !asked.deleting).filter(is_here).map(|asked| asked.object.as_str()).collect()
}

impl Known {
    pub(super) fn is_ours(&self) -> bool {
        is_final_name(&self.name)
    }

    fn is_retired(&self) -> bool {
        self.name == retired_name(&self.guid)
    }
}

/// What a person's snapshot with this GUID is called once it is Portolan's.
pub fn retired_name(guid: &str) -> String {
    format!("{PREFIX}0-{guid}")
}

/// Whether a snapshot is called as the final snapshots of handoffs are.
pub fn is_final_name(short: &str) -> bool {
    order(short).is_some()
}

/// Whether a snapshot is called as those that a handoff takes. A retired one is not: a person took it, and nobody knows when.
pub(super) fn is_of_handoff(short: &str) -> bool {
    order(short).is_some_and(|(epoch, _)| epoch > 0)
}

/// The place of one of our snapshots in the volume's history: epoch, then attempt.
fn order(name: &str) -> Option<(u64, u64)> {
    let rest = name.strip_prefix(PREFIX)?;
    match rest.split_once('-') {
        Some((epoch, attempt)) => Some((epoch.parse().ok()?, attempt.parse().ok()?)),
        None => Some((rest.parse().ok()?, 1)),
    }
}

/// A name for the next snapshot of the handoff that establishes `epoch`: none of `present` has it, nor any of the `taken` ones that may
/// be gone here already and still be elsewhere.
pub fn fresh_name<'a>(epoch: i64, present: &'a [Known], taken: impl Iterator<Item = &'a str>) -> String {
    let names = present.iter().map(|snapshot| snapshot.name.as_str()).chain(taken);
    let attempts =
        names.filter_map(order).filter(|(of, _)| i64::try_from(*of) == Ok(epoch)).map(|(_, attempt)| attempt);
    match attempts.max() {
        None => format!("{PREFIX}{epoch}"),
        Some(attempt) => format!("{PREFIX}{epoch}-{}", attempt + 1),
    }
}

/// What this node has to say of its copy and hasn't: the newest snapshot there that others have too. A person's may be newer than any of ours:
/// the move that was to bring the rest was cut short. It is said again if a source waits to hear it.
pub(super) fn unsaid<'a>(
    me: &str,
    status: &PortableVolumeStatus,
    here: &'a [Known],
    asked: &[Asked],
) -> Option<&'a Known> {
    let known = known_guids(status);
    let is_shared = |snapshot: &&Known| match snapshot.is_ours() {
        true => known.contains(&snapshot.guid),
        false => asked.iter().any(|asked| asked.is(snapshot)),
    };
    let waited_for = aborted(status).is_some_and(|(to, brought)| to == me && !brought.is_empty());
    let shared = here.iter().rev().find(is_shared)?;
    (waited_for || newest_of(me, status) != Some(&shared.guid)).then_some(shared)
}

/// The newest snapshot that a node's copy is known to share, by its GUID.
fn newest_of<'a>(node: &str, status: &'a PortableVolumeStatus) -> Option<&'a String> {
    status.replicas.iter().find(|replica| replica.node == node)?.guid.as_ref()
}

/// To whom the newest move went if it was aborted, and the snapshots that it may have brought there without anybody having said so.
fn aborted(status: &PortableVolumeStatus) -> Option<(&str, Vec<&String>)> {
    let report = status.last_handoff.as_ref().filter(|report| report.outcome == HandoffOutcome::Aborted)?;
    Some((&report.to, [&report.guid, &report.round_guid].into_iter().flatten().collect()))
}

/// Whether the next delta to a copy may begin at a person's snapshot: a copy is known to share it, or, at the owner, it lies on the way to one that
/// a target may be receiving, or may have begun to receive: it has come as far as this one, perhaps. One that has been lost here may have been
/// anywhere.
fn is_base(me: &str, status: &PortableVolumeStatus, here: &[Known], snapshot: &Known) -> bool {
    let running = status
        .handoff
        .iter()
        .map(|handoff| (handoff.to.as_str(), [&handoff.guid, &handoff.round_guid].into_iter().flatten().collect()));
    let coming = running.chain(aborted(status)).filter(|_| status.owner.as_deref() == Some(me));
    let mut coming = coming.flat_map(|(to, brought): (&str, Vec<&String>)| {
        brought.into_iter().filter(move |guid| newest_of(to, status) != Some(guid))
    });
    let at = here.iter().position(|there| there == snapshot);
    let place = |guid: &String| here.iter().position(|there| there.guid == *guid);
    known_guids(status).contains(&snapshot.guid) || coming.any(|guid| place(guid).is_none_or(|place| Some(place) > at))
}

/// Our snapshots that come after the one recorded for this copy and that nobody knows of: attempts at a final snapshot whose write
/// was lost, when this copy was the source. Nothing was written between them, and they would make the copy look as if something had been.
pub(super) fn unpublished<'a>(
    known: &'a [String],
    entry: &'a Replica,
    here: &'a [Known],
) -> impl Iterator<Item = Known> + 'a {
    let recorded = here.iter().position(|snapshot| entry.guid.as_ref() == Some(&snapshot.guid));
    let later = recorded.map_or(&[][..], |at| &here[at + 1..]);
    later.iter().filter(|snapshot| snapshot.is_ours() && !known.contains(&snapshot.guid)).cloned()
}

/// Whether a snapshot goes along on the way to the one that is wanted: a person's, or one that some copy shares. `shared` are the GUIDs of
/// those. Others of ours are of attempts that have ended. Nor does a person's once node `to`, which receives, has said that it has none
/// any more: its object may be gone before it comes. It says so only while it receives nothing, so `asked` must have been read since it asked
/// for the stream.
pub fn travels(shared: &[String], asked: &[Asked], to: &str, snapshot: &Known) -> bool {
    let is_over = |asked: &Asked| asked.is_end_of(snapshot) && asked.destroyed_on.iter().any(|node| node == to);
    match snapshot.is_ours() {
        true => shared.contains(&snapshot.guid),
        false => !asked.iter().any(is_over),
    }
}

/// Lets go of our snapshots that nobody needs, oldest first: no copy is known to share them, nor may a target have received them. Of none while any
/// copy's newest is unknown: it may be one of these.
pub(super) fn prune<'a>(
    me: &'a str,
    status: &'a PortableVolumeStatus,
    here: &'a [Known],
) -> impl Iterator<Item = Action> + 'a {
    let all_known = status.replicas.iter().all(|replica| replica.guid.is_some());
    let known = known_guids(status);
    let is_needed = move |snapshot: &Known| match snapshot.is_retired() {
        true => is_base(me, status, here, snapshot),
        false => known.contains(&snapshot.guid),
    };
    let unneeded = here.iter().filter(move |it| all_known && it.is_ours() && !is_needed(it));
    unneeded.map(|snapshot| match snapshot.is_retired() {
        // A clone may still need it.
        true => Action::DestroyTaken(snapshot.clone()),
        false => Action::DestroySnapshot(snapshot.clone()),
    })
}

#[cfg(test)]
mod tests {
    use portolan_crds::{Handoff, HandoffReport};

    use super::*;

    fn known(name: &str) -> Known {
        Known { name: name.into(), guid: format!("g-{name}") }
    }

    fn replica(node: &str, snapshot: Option<&str>) -> Replica {
        Replica {
            node: node.into(),
            snapshot: snapshot.map(Into::into),
            guid: snapshot.map(|name| format!("g-{name}")),
        }
    }

    #[test]
    fn names_are_fresh() {
        let fresh = |present: &[&str], taken: &[&str]| {
            let present: Vec<Known> = present.iter().map(|name| known(name)).collect();
            fresh_name(4, &present, taken.iter().copied())
        };
        assert_eq!(fresh(&["portolan-3"], &[]), "portolan-4");
        assert_eq!(fresh(&["portolan-4", "portolan-4-2"], &[]), "portolan-4-3");
        assert_eq!(fresh(&["portolan-4-7"], &["portolan-4-9", "portolan-3-20"]), "portolan-4-10", "no name comes back");
        assert_eq!(order("portolan-4-3"), Some((4, 3)));
        assert!(order("portolan-4-2") > order("portolan-4") && order("portolan-10") > order("portolan-9-7"));
        assert_eq!((order("daily-1"), order("portolan-x"), order("portolan-1-x")), (None, None, None));
        assert!(is_of_handoff("portolan-1-2") && !is_of_handoff(&retired_name("7")) && !is_of_handoff("daily"));
    }

    fn asked(name: &str, guid: Option<&str>, deleting: bool) -> Asked {
        let guid = guid.map(Into::into);
        Asked { object: format!("o-{name}"), short: name.into(), guid, deleting, ..Asked::default() }
    }

    #[test]
    fn what_is_asked_for_is_taken_once() {
        let local = Local { snapshots: vec![known("there")], ..Local::default() };
        let all = [
            asked("there", None, false),
            asked("new", None, false),
            asked("done", Some("g-done"), false),
            asked("going", None, true),
            Asked { import: true, ..asked("by-hand", None, false) },
        ];
        let record = Action::RecordTaken { object: "o-there".into(), snapshot: known("there") };
        assert_eq!(take_asked(&local, &all), [record, Action::Take(Box::new(all[1].clone()))]);
    }

    #[test]
    fn a_group_is_cleaned_up_before_one_of_it_is_recorded_or_destroyed() {
        let local = Local { snapshots: vec![known("g")], ..Local::default() };
        let group = Some(SnapshotGroup { name: "group".into(), members: 2 });
        let member = |guid, deleting| Asked { group: group.clone(), ..asked("g", guid, deleting) };
        let clean_up = |member: &Asked| Action::CleanUp(Box::new(member.clone()));
        let record = Action::RecordTaken { object: "o-g".into(), snapshot: known("g") };
        let new = member(None, false);
        assert_eq!(take_asked(&local, std::slice::from_ref(&new)), [clean_up(&new), record]);
        let nothing = PortableVolumeStatus::default();
        let destroyed = |member: &Asked| end_asked("a", &nothing, Some(&local), std::slice::from_ref(member));
        let never_recorded = member(None, true);
        assert_eq!(destroyed(&never_recorded)[..2], [clean_up(&never_recorded), Action::DestroyTaken(known("g"))]);
        assert_eq!(destroyed(&member(Some("g-g"), true))[0], Action::DestroyTaken(known("g")));
    }

    #[test]
    fn what_is_deleted_is_destroyed_by_its_guid_and_acknowledged_once() {
        let local = Local { snapshots: vec![known("daily"), known("weekly")], ..Local::default() };
        let nothing = PortableVolumeStatus::default();
        let acknowledged = |name: &str| Action::RecordDestroyed { object: format!("o-{name}") };
        let all =
            [asked("daily", Some("g-daily"), true), asked("weekly", Some("another"), true), asked("x", None, false)];
        let wanted = [Action::DestroyTaken(known("daily")), acknowledged("daily"), acknowledged("weekly")];
        assert_eq!(end_asked("a", &nothing, Some(&local), &all), wanted);
        let done = Asked { destroyed_on: vec!["a".into()], ..all[1].clone() };
        assert_eq!(end_asked("a", &nothing, Some(&local), &[done]), []);
        assert_eq!(end_asked("a", &nothing, None, &all[..1]), [acknowledged("daily")]);
        let imported = Asked { import: true, ..asked("daily", None, true) };
        assert_eq!(end_asked("a", &nothing, Some(&local), &[imported]), [acknowledged("daily")], "never ours");
        assert_eq!(kept(&local, &[asked("daily", Some("g-daily"), false), all[1].clone()]), ["o-daily"]);
    }

    fn numbered(name: &str, guid: &str) -> Known {
        Known { name: name.into(), guid: guid.into() }
    }

    fn shares(node: &str, guid: &str) -> Replica {
        Replica { node: node.into(), snapshot: None, guid: Some(guid.into()) }
    }

    fn aborted_to(node: &str, guid: &str) -> Option<HandoffReport> {
        let (outcome, to, guid) = (HandoffOutcome::Aborted, node.into(), Some(guid.into()));
        Some(HandoffReport { outcome, to, guid, ..HandoffReport::default() })
    }

    #[test]
    fn what_a_delta_may_begin_at_is_retired() {
        let (daily, weekly) = (numbered("daily", "5"), numbered("weekly", "6"));
        let snapshots = vec![numbered("portolan-2", "2"), daily.clone(), numbered("portolan-4", "4"), weekly.clone()];
        let local = Local { snapshots, ..Local::default() };
        let all = [asked("daily", Some("5"), true), asked("weekly", Some("6"), true)];
        let ends = |status: &PortableVolumeStatus| -> Vec<Action> {
            let actions = end_asked("a", status, Some(&local), &all);
            actions.into_iter().filter(|action| !matches!(action, Action::RecordDestroyed { .. })).collect()
        };
        let destroyed = [&daily, &weekly].map(|known| Action::DestroyTaken(known.clone()));
        let retired = [Action::Retire(daily.clone()), destroyed[1].clone()];
        let owner = Some("a".to_owned());
        let with =
            |replicas| PortableVolumeStatus { replicas, owner: owner.clone(), ..PortableVolumeStatus::default() };
        assert_eq!(ends(&with(vec![shares("a", "4"), shares("b", "4")])), destroyed);
        assert_eq!(ends(&with(vec![shares("a", "4"), shares("b", "5")])), retired, "b shares it");
        // b was to receive portolan-4, and may have come as far as daily, but never as far as weekly.
        let behind = with(vec![shares("a", "4"), shares("b", "2")]);
        assert_eq!(ends(&PortableVolumeStatus { last_handoff: aborted_to("b", "4"), ..behind.clone() }), retired);
        let handoff = Some(Handoff { to: "b".into(), guid: Some("4".into()), ..Handoff::default() });
        assert_eq!(ends(&PortableVolumeStatus { handoff: handoff.clone(), ..behind.clone() }), retired);
        let come = with(vec![shares("a", "4"), shares("b", "4")]);
        assert_eq!(ends(&PortableVolumeStatus { handoff, ..come }), destroyed, "it has come");
        assert_eq!(ends(&behind), destroyed, "b has said what it has");
        let lost = PortableVolumeStatus { last_handoff: aborted_to("b", "9"), ..behind.clone() };
        assert_eq!(ends(&lost)[1], Action::Retire(weekly), "where portolan-4-2 was nobody knows");
        let elsewhere = PortableVolumeStatus { owner: Some("c".into()), ..lost };
        assert_eq!(ends(&elsewhere), destroyed, "it is not sent from here");
    }

    #[test]
    fn what_is_retired_goes_when_no_delta_may_begin_there() {
        let (old, retired, newest) =
            (numbered("portolan-2", "2"), numbered("portolan-0-5", "5"), numbered("portolan-4", "4"));
        assert_eq!((retired_name("5"), retired.is_ours()), (retired.name.clone(), true));
        let here = vec![old.clone(), retired.clone(), newest.clone()];
        let owner = Some("a".to_owned());
        let with =
            |replicas| PortableVolumeStatus { replicas, owner: owner.clone(), ..PortableVolumeStatus::default() };
        let pruned = |status: &PortableVolumeStatus| prune("a", status, &here).collect::<Vec<_>>();
        let destroyed = [Action::DestroySnapshot(old), Action::DestroyTaken(retired)];
        assert_eq!(pruned(&with(vec![shares("a", "4"), shares("b", "5")])), destroyed[..1]);
        assert_eq!(pruned(&with(vec![shares("a", "4"), shares("b", "4")])), destroyed);
        let behind = with(vec![shares("a", "2"), shares("b", "2")]);
        assert_eq!(pruned(&PortableVolumeStatus { last_handoff: aborted_to("b", "4"), ..behind }), []);
        // Its object is still there: what was said once is not said again.
        let local = Local { snapshots: here.clone(), ..Local::default() };
        let said = Asked { destroyed_on: vec!["a".into()], ..asked("daily", Some("5"), true) };
        assert_eq!(end_asked("a", &PortableVolumeStatus::default(), Some(&local), &[said]), []);
    }

    #[test]
    fn what_the_target_has_said_is_gone_does_not_come_again() {
        let daily = known("daily");
        let goes = |asked: Asked, to: &str| travels(&[], &[asked], to, &daily);
        let said = |asked: Asked| Asked { destroyed_on: vec!["b".into()], ..asked };
        let going = asked("daily", Some("g-daily"), true);
        assert!(goes(going.clone(), "b"), "b has not said so");
        assert!(!goes(said(going.clone()), "b"));
        assert!(goes(said(going.clone()), "c"));
        assert!(!goes(said(asked("daily", None, true)), "b"), "by its name: it was never recorded");
        let by_hand = Asked { import: true, ..asked("daily", None, true) };
        assert!(goes(said(by_hand), "b"), "it was somebody else's");
        assert!(travels(&[], &[], "b", &daily), "nobody's object");
        let ours = known("portolan-3");
        assert!(!travels(&[], &[], "b", &ours) && travels(&["g-portolan-3".into()], &[], "b", &ours));
    }

    #[test]
    fn only_what_nobody_needs_is_destroyed() {
        let here = [known("portolan-2"), known("daily"), known("portolan-3"), known("portolan-4")];
        let replicas = vec![replica("a", Some("portolan-4")), replica("b", Some("portolan-3"))];
        let mut status = PortableVolumeStatus { replicas, ..PortableVolumeStatus::default() };
        assert_eq!(prune("a", &status, &here).collect::<Vec<_>>(), [Action::DestroySnapshot(known("portolan-2"))]);
        let (outcome, round_guid) = (HandoffOutcome::Aborted, Some("g-portolan-2".into()));
        status.last_handoff = Some(HandoffReport { outcome, round_guid, ..HandoffReport::default() });
        assert_eq!(prune("a", &status, &here).count(), 0, "its target may have it and nothing newer");
        status.last_handoff =
            status.last_handoff.map(|report| HandoffReport { outcome: HandoffOutcome::Done, ..report });
        assert_eq!(prune("a", &status, &here).count(), 1);
        (status.last_handoff, status.replicas[1].guid) = (None, None);
        assert_eq!(prune("a", &status, &here).count(), 0);
    }
}
