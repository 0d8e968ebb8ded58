//! Which snapshots a copy takes, fetches and lets go of.
//!
//! Portolan's snapshots are called `portolan-<epoch>`, after the epoch that the handoff they were taken for establishes. If an
//! attempt that was cut short has left one of that name, the next takes `portolan-<epoch>-2` and so on: a snapshot that was
//! taken before the last look at the mount table proves nothing, and zfs-fuse can't tell what was written since one.

use portolan_crds::Replica;

use super::Local;

const PREFIX: &str = "portolan-";

/// A snapshot by its short name and its GUID (decimal), which is the same on every pool that has received it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Known {
    /// What stands behind the `@`.
    pub name: String,
    /// The GUID.
    pub guid: String,
}

impl Known {
    pub(super) fn is_ours(&self) -> bool {
        order(&self.name).is_some()
    }
}

/// The place of one of our snapshots in the volume's history: epoch, then attempt.
fn order(name: &str) -> Option<(u64, u64)> {
    let rest = name.strip_prefix(PREFIX)?;
    match rest.split_once('-') {
        Some((epoch, attempt)) => Some((epoch.parse().ok()?, attempt.parse().ok()?)),
        None => Some((rest.parse().ok()?, 1)),
    }
}

/// A name for a final snapshot that none of `present` has.
pub fn fresh_name(epoch: i64, present: &[Known]) -> String {
    let taken = |name: &String| present.iter().any(|snapshot| snapshot.name == *name);
    let first = format!("{PREFIX}{epoch}");
    if !taken(&first) {
        return first;
    }
    let mut attempt = 2;
    loop {
        let name = format!("{PREFIX}{epoch}-{attempt}");
        if !taken(&name) {
            return name;
        }
        attempt += 1;
    }
}

/// What a target fetches, in order, and whether the handoff can go on without it: before the last snapshot come those that other
/// replicas have as their newest, so that a later move to one of them is a delta from here too.
pub(super) fn to_fetch(replicas: &[Replica], last: Known, local: Option<&Local>) -> Vec<(Known, bool)> {
    let here = local.map(|local| local.snapshots.as_slice()).unwrap_or_default();
    let newest_here = here.iter().filter_map(|snapshot| order(&snapshot.name)).max();
    let mut between: Vec<((u64, u64), Known)> = replicas
        .iter()
        .filter_map(|replica| Some(Known { name: replica.snapshot.clone()?, guid: replica.guid.clone()? }))
        .filter(|snapshot| snapshot.guid != last.guid)
        .filter_map(|snapshot| Some((order(&snapshot.name)?, snapshot)))
        .filter(|(place, _)| newest_here.is_none_or(|newest| *place > newest) && Some(*place) < order(&last.name))
        .collect();
    between.sort_by_key(|(place, _)| *place);
    between.dedup_by(|a, b| a.1.guid == b.1.guid);
    let between = between.into_iter().map(|(_, snapshot)| (snapshot, true));
    between.chain([(last, false)]).collect()
}

/// Our snapshots that come after the one recorded for this copy and that nobody knows of: attempts at a final snapshot whose write
/// was lost. Nothing was written between them, and they would make the copy look as if something had been.
pub(super) fn unpublished<'a>(
    known: &'a [String],
    entry: &'a Replica,
    here: &'a [Known],
) -> impl Iterator<Item = Known> + 'a {
    let recorded = here.iter().position(|snapshot| entry.guid.as_ref() == Some(&snapshot.guid));
    let later = recorded.map_or(&[][..], |at| &here[at + 1..]);
    later.iter().filter(|snapshot| snapshot.is_ours() && !known.contains(&snapshot.guid)).cloned()
}

/// Our snapshots that no copy's newest is, oldest first. None while any copy's newest is unknown: it may be one of these.
pub(super) fn unneeded<'a>(replicas: &'a [Replica], here: &'a [Known]) -> impl Iterator<Item = Known> + 'a {
    let all_known = replicas.iter().all(|replica| replica.guid.is_some());
    here.iter()
        .filter(move |snapshot| all_known && snapshot.is_ours())
        .filter(|snapshot| !replicas.iter().any(|replica| replica.guid.as_ref() == Some(&snapshot.guid)))
        .cloned()
}

#[cfg(test)]
mod tests {
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
        assert_eq!(fresh_name(4, &[known("portolan-3")]), "portolan-4");
        assert_eq!(fresh_name(4, &[known("portolan-4"), known("portolan-4-2")]), "portolan-4-3");
        assert_eq!(order("portolan-4-3"), Some((4, 3)));
        assert!(order("portolan-4-2") > order("portolan-4") && order("portolan-10") > order("portolan-9-7"));
        assert_eq!((order("daily-1"), order("portolan-x"), order("portolan-1-x")), (None, None, None));
    }

    #[test]
    fn a_third_node_gets_the_snapshots_that_others_share() {
        // a moved to b at 2, b moves to c at 3: c also gets what a has.
        let replicas = [replica("a", Some("portolan-2")), replica("b", Some("portolan-3")), replica("c", None)];
        let all = vec![(known("portolan-2"), true), (known("portolan-3"), false)];
        assert_eq!(to_fetch(&replicas, known("portolan-3"), None), all);
        // What is here already is not fetched again, nor anything older.
        let local = Local { snapshots: vec![known("portolan-2")], ..Local::default() };
        assert_eq!(to_fetch(&replicas, known("portolan-3"), Some(&local)), all[1..]);
    }

    #[test]
    fn only_what_nobody_needs_is_destroyed() {
        let here = [known("portolan-2"), known("daily"), known("portolan-3"), known("portolan-4")];
        let needed = [replica("a", Some("portolan-4")), replica("b", Some("portolan-3"))];
        assert_eq!(unneeded(&needed, &here).collect::<Vec<_>>(), [known("portolan-2")]);
        let unknown = [replica("a", Some("portolan-4")), replica("b", None)];
        assert_eq!(unneeded(&unknown, &here).count(), 0);
    }
}
