//! Which snapshots a copy takes, fetches and lets go of.
//!
//! Portolan's snapshots are called `portolan-<epoch>`, after the epoch that the handoff they were taken for establishes, then
//! `portolan-<epoch>-2` and so on: one for each round of PreCopy, and for each attempt at the final one. A snapshot that was
//! taken before the last look at the mount table proves nothing, and zfs-fuse can't tell what was written since one.

use kube::ResourceExt;
use portolan_crds::{PortableSnapshot, PortableVolumeStatus, Replica, SnapshotGroup};

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

/// Destroys those whose objects are being deleted, and says so.
pub(super) fn destroy_asked(me: &str, local: Option<&Local>, asked: &[Asked]) -> Vec<Action> {
    let mut actions = Vec::new();
    for asked in asked.iter().filter(|asked| asked.deleting) {
        let here = local.and_then(|local| local.snapshots.iter().find(|snapshot| asked.is(snapshot)));
        // One that was never taken is somebody else's of the same name.
        if let Some(here) = here.filter(|_| asked.guid.is_some() || !asked.import) {
            actions.extend(clean_up(asked));
            actions.push(Action::DestroyTaken(here.clone()));
        }
        if here.is_some() || !asked.destroyed_on.iter().any(|node| node == me) {
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
}

/// Whether a snapshot is called as the final snapshots of handoffs are.
pub fn is_final_name(short: &str) -> bool {
    order(short).is_some()
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

/// The newest snapshot here that others are known to have too.
pub(super) fn shared<'a>(status: &PortableVolumeStatus, here: &'a [Known]) -> Option<&'a Known> {
    let known = known_guids(status);
    here.iter().rev().find(|snapshot| snapshot.is_ours() && known.contains(&snapshot.guid))
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
/// those. Others of ours are of attempts that have ended.
pub fn travels(shared: &[String], snapshot: &Known) -> bool {
    !snapshot.is_ours() || shared.contains(&snapshot.guid)
}

/// Our snapshots that nobody needs, oldest first: no copy is known to share them, nor may a target have received them. None while any
/// copy's newest is unknown: it may be one of these.
pub(super) fn unneeded<'a>(status: &PortableVolumeStatus, here: &'a [Known]) -> impl Iterator<Item = Known> + 'a {
    let all_known = status.replicas.iter().all(|replica| replica.guid.is_some());
    let needed = known_guids(status);
    here.iter().filter(move |snapshot| all_known && snapshot.is_ours() && !needed.contains(&snapshot.guid)).cloned()
}

#[cfg(test)]
mod tests {
    use portolan_crds::{HandoffOutcome, HandoffReport};

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
        let destroyed = |member: &Asked| destroy_asked("a", Some(&local), std::slice::from_ref(member));
        let never_recorded = member(None, true);
        assert_eq!(destroyed(&never_recorded)[..2], [clean_up(&never_recorded), Action::DestroyTaken(known("g"))]);
        assert_eq!(destroyed(&member(Some("g-g"), true))[0], Action::DestroyTaken(known("g")));
    }

    #[test]
    fn what_is_deleted_is_destroyed_by_its_guid_and_acknowledged_once() {
        let local = Local { snapshots: vec![known("daily"), known("weekly")], ..Local::default() };
        let acknowledged = |name: &str| Action::RecordDestroyed { object: format!("o-{name}") };
        let all =
            [asked("daily", Some("g-daily"), true), asked("weekly", Some("another"), true), asked("x", None, false)];
        let wanted = [Action::DestroyTaken(known("daily")), acknowledged("daily"), acknowledged("weekly")];
        assert_eq!(destroy_asked("a", Some(&local), &all), wanted);
        let done = Asked { destroyed_on: vec!["a".into()], ..all[1].clone() };
        assert_eq!(destroy_asked("a", Some(&local), &[done]), []);
        assert_eq!(destroy_asked("a", None, &all[..1]), [acknowledged("daily")]);
        let imported = Asked { import: true, ..asked("daily", None, true) };
        assert_eq!(destroy_asked("a", Some(&local), &[imported]), [acknowledged("daily")], "never ours");
        assert_eq!(kept(&local, &[asked("daily", Some("g-daily"), false), all[1].clone()]), ["o-daily"]);
    }

    #[test]
    fn only_what_nobody_needs_is_destroyed() {
        let here = [known("portolan-2"), known("daily"), known("portolan-3"), known("portolan-4")];
        let replicas = vec![replica("a", Some("portolan-4")), replica("b", Some("portolan-3"))];
        let mut status = PortableVolumeStatus { replicas, ..PortableVolumeStatus::default() };
        assert_eq!(unneeded(&status, &here).collect::<Vec<_>>(), [known("portolan-2")]);
        let (outcome, round_guid) = (HandoffOutcome::Aborted, Some("g-portolan-2".into()));
        status.last_handoff = Some(HandoffReport { outcome, round_guid, ..HandoffReport::default() });
        assert_eq!(unneeded(&status, &here).count(), 0, "its target may have it and nothing newer");
        status.last_handoff =
            status.last_handoff.map(|report| HandoffReport { outcome: HandoffOutcome::Done, ..report });
        assert_eq!(unneeded(&status, &here).count(), 1);
        (status.last_handoff, status.replicas[1].guid) = (None, None);
        assert_eq!(unneeded(&status, &here).count(), 0);
    }
}
