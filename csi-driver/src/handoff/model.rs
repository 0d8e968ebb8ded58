//! A cluster in miniature: nodes take the steps of their plans in any order, are cut off between any two of them and then know
//! nothing but their disks; writes come too late, or arrive when the node has given them up. Whatever happens, one node at most
//! can write, nothing that was written is lost, and in the end each move ends.

use std::collections::{BTreeMap, VecDeque};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use portolan_crds::{Placement, PortableVolumeSpec};
use proptest::prelude::*;

use super::*;
use crate::controller::decide;
use crate::node::write;

const UID: &str = "uid-1";
const NODES: [&str; 3] = ["a", "b", "c"];

/// A dataset: what is in it, and what was when each snapshot was taken. The content is how often somebody wrote to it.
#[derive(Clone, Debug, Default)]
struct Disk {
    local: Local,
    content: u32,
    frozen: Vec<u32>,
}

/// What happens next.
#[derive(Clone, Debug)]
enum Event {
    /// A node does so many actions of its plan; it makes one from the object as it is now if it has none.
    Step {
        node: usize,
        actions: usize,
    },
    /// A node is killed.
    Kill {
        node: usize,
    },
    /// A node takes its final snapshot, and what it writes then is under way while it is killed.
    Delay {
        node: usize,
    },
    /// The oldest of such writes arrives.
    Arrive,
    /// Somebody wants the volume on a node.
    Want {
        node: usize,
    },
    /// The kubelet of a node mounts or unmounts.
    Mount {
        node: usize,
    },
    Unmount {
        node: usize,
    },
    /// The pod writes, wherever it can.
    Write,
}

struct World {
    /// Every version of the object, the newest last: what a compare-and-set has read must be that one.
    versions: Vec<PortableVolume>,
    disks: BTreeMap<&'static str, Disk>,
    /// What is left of each node's plan, and the version it was made from or wrote since.
    plans: BTreeMap<&'static str, (usize, VecDeque<Action>)>,
    /// Writes under way: who, from which version, and what.
    late: VecDeque<(&'static str, usize, Known)>,
    guids: u32,
    written: u32,
}

impl World {
    fn new() -> Self {
        let spec = PortableVolumeSpec { placement: Placement { node: "a".into() }, ..PortableVolumeSpec::default() };
        let mut volume = PortableVolume::new("pvc-1", spec);
        volume.metadata.uid = Some(UID.into());
        Self {
            versions: vec![volume],
            disks: BTreeMap::new(),
            plans: BTreeMap::new(),
            late: VecDeque::new(),
            guids: 0,
            written: 0,
        }
    }

    fn status(&self) -> PortableVolumeStatus {
        volume::status(&self.versions[self.versions.len() - 1])
    }

    /// A compare-and-set: false if what was read is not the newest any more.
    fn write(&mut self, read: &mut usize, change: impl FnOnce(&mut PortableVolumeStatus)) -> bool {
        if *read != self.versions.len() - 1 {
            return false;
        }
        let mut next = self.versions[*read].clone();
        change(next.status.get_or_insert_default());
        self.versions.push(next);
        *read += 1;
        true
    }

    fn step(&mut self, me: &'static str, actions: usize) {
        let (mut read, mut rest) = self.plans.remove(me).unwrap_or_else(|| self.plan(me));
        for _ in 0..actions {
            let Some(action) = rest.pop_front() else { return };
            if !self.apply(me, &mut read, action) {
                return;
            }
        }
        if !rest.is_empty() {
            self.plans.insert(me, (read, rest));
        }
    }

    fn plan(&self, me: &'static str) -> (usize, VecDeque<Action>) {
        let read = self.versions.len() - 1;
        let local = self.disks.get(me).map(|disk| disk.local.clone());
        (read, plan(me, &self.versions[read], local.as_ref(), &[]).into())
    }

    fn delay(&mut self, me: &'static str) {
        self.plans.remove(me);
        let (read, plan) = self.plan(me);
        if let Some(Action::PublishFinal(name)) = plan.back() {
            self.disk(me).local.readonly = true;
            let known = self.snapshot(me, name.clone());
            self.late.push_back((me, read, known));
        }
    }

    fn snapshot(&mut self, me: &'static str, name: String) -> Known {
        self.guids += 1;
        let known = Known { name, guid: self.guids.to_string() };
        let disk = self.disk(me);
        disk.frozen.push(disk.content);
        disk.local.snapshots.push(known.clone());
        known
    }

    /// Does an action as the node's agent does; false if it failed.
    fn apply(&mut self, me: &'static str, read: &mut usize, action: Action) -> bool {
        match action {
            Action::Wait(_) | Action::Report { .. } | Action::Keep(_) => return false,
            Action::RecordReplica => return self.write(read, |status| write::replica(status, me, None)),
            Action::ForgetReplica => {
                return self.write(read, |status| status.replicas.retain(|entry| entry.node != me));
            }
            Action::RecordSnapshot(known) => return self.write(read, |status| write::replica(status, me, Some(known))),
            Action::RecordUsed(bytes) => {
                return self.write(read, |status| {
                    write::used(status, bytes);
                    write::ready(status);
                });
            }
            Action::Own => return self.write(read, |status| write::own(status, me, &PortableVolumeSpec::default())),
            Action::TakeOver => return self.write(read, |status| write::taken_over(status, me)),
            Action::Finish => return self.write(read, |status| write::finished(status, now())),
            Action::Create => {
                assert!(self.status().replicas.iter().any(|entry| entry.node == me), "a dataset nobody knows of");
                let local = Local { uid: Some(UID.into()), epoch: Some(1), ..Local::default() };
                self.disks.entry(me).or_insert(Disk { local, ..Disk::default() });
            }
            Action::SetReadonly(on) => self.disk(me).local.readonly = on,
            Action::CheckQuiet => return !self.disk(me).local.mounted,
            Action::PublishFinal(name) => {
                let known = self.snapshot(me, name);
                return self.write(read, |status| write::published(status, me, known, now()));
            }
            Action::Fetch(snapshot) => return self.fetch(me, &snapshot),
            Action::Adopt => self.disk(me).local.uid = Some(UID.into()),
            Action::Stamp(epoch) => self.disk(me).local.epoch = Some(epoch),
            Action::Destroy => {
                assert!(self.status().owner.is_none(), "a copy was destroyed that may be the only one");
                self.disks.remove(me);
            }
            // Nobody asks for snapshots, sources or other sizes here.
            Action::Restore
            | Action::Import
            | Action::Take(_)
            | Action::RecordTaken { .. }
            | Action::DestroyTaken(_)
            | Action::RecordDestroyed { .. } => unreachable!("nobody has asked for {action:?}"),
            Action::ApplySpec => {
                return self.write(read, |status| write::applied(status, &PortableVolumeSpec::default()));
            }
            Action::DestroySnapshot(known) => {
                let disk = self.disk(me);
                if let Some(at) = disk.local.snapshots.iter().position(|there| *there == known) {
                    disk.local.snapshots.remove(at);
                    disk.frozen.remove(at);
                }
            }
        }
        true
    }

    fn disk(&mut self, node: &'static str) -> &mut Disk {
        self.disks.entry(node).or_default()
    }

    /// Receives from the source of the handoff what is authorised now; refuses what ZFS refuses.
    fn fetch(&mut self, me: &'static str, wanted: &Known) -> bool {
        let Some(handoff) = self.status().handoff else { return false };
        if handoff.to != me || handoff.phase != HandoffPhase::FinalSync {
            return false;
        }
        let Some(source) = self.disks.get(handoff.from.as_str()).cloned() else { return false };
        let Some(at) = source.local.snapshots.iter().position(|there| there == wanted) else { return false };
        // One stream, one snapshot: cut off there, the next attempt brings the next.
        let known = known_guids(&self.status());
        let mine = self.disks.get(me).map(|disk| disk.local.snapshots.clone());
        let after = match &mine {
            None => 0,
            Some(mine) => {
                let newest =
                    mine.last().and_then(|newest| source.local.snapshots[..at].iter().position(|it| it == newest));
                let disk = self.disk(me);
                assert_eq!(disk.frozen.last(), Some(&disk.content), "{me} was written behind the handoff's back");
                newest.unwrap_or_else(|| panic!("{me} has no common snapshot with {}: {mine:?}", handoff.from)) + 1
            }
        };
        let next = (after..at).find(|next| travels(&known, &source.local.snapshots[*next])).unwrap_or(at);
        let disk = self.disk(me);
        disk.local.readonly = true;
        disk.local.snapshots.push(source.local.snapshots[next].clone());
        disk.frozen.push(source.frozen[next]);
        disk.content = source.frozen[next];
        next == at
    }

    fn want(&mut self, node: &'static str) {
        let newest = self.versions.len() - 1;
        if decide::decide(&self.versions[newest], node, &[]) == decide::Decision::Move {
            self.write(&mut { newest }, |status| decide::start(status, node, Timestamp::UNIX_EPOCH));
        }
    }

    fn may_mount(&self, node: &str) -> bool {
        let status = self.status();
        let epoch = self.disks.get(node).and_then(|disk| disk.local.epoch);
        status.owner.as_deref() == Some(node)
            && status.handoff.is_none()
            && status.phase == VolumePhase::Ready
            && epoch == Some(status.epoch)
            // The agent holds the volume's lock from the reading of the object to the last action of the plan.
            && !self.plans.contains_key(node)
    }

    fn happen(&mut self, event: &Event) {
        match *event {
            Event::Step { node, actions } => self.step(NODES[node], actions),
            Event::Kill { node } => _ = self.plans.remove(NODES[node]),
            Event::Delay { node } => self.delay(NODES[node]),
            Event::Arrive => {
                if let Some((me, mut read, known)) = self.late.pop_front() {
                    self.write(&mut read, |status| write::published(status, me, known, now()));
                }
            }
            Event::Want { node } => self.want(NODES[node]),
            Event::Mount { node } if self.may_mount(NODES[node]) => self.disk(NODES[node]).local.mounted = true,
            Event::Mount { .. } => {}
            Event::Unmount { node } => {
                if let Some(disk) = self.disks.get_mut(NODES[node]) {
                    disk.local.mounted = false;
                }
            }
            Event::Write => {
                for disk in self.disks.values_mut().filter(|disk| disk.local.mounted && !disk.local.readonly) {
                    assert_eq!(disk.content, self.written, "a pod doesn't see what was written before");
                    disk.content += 1;
                    self.written += 1;
                }
            }
        }
        let mounted = self.disks.values().filter(|disk| disk.local.mounted).count();
        assert!(mounted <= 1, "{mounted} nodes have it mounted");
    }
}

fn now() -> MicroTime {
    MicroTime(Timestamp::UNIX_EPOCH)
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let node = 0..NODES.len();
    let event = prop_oneof![
        6 => (node.clone(), 1..5usize).prop_map(|(node, actions)| Event::Step { node, actions }),
        12 => node.clone().prop_map(|node| Event::Step { node, actions: usize::MAX }),
        2 => node.clone().prop_map(|node| Event::Kill { node }),
        2 => node.clone().prop_map(|node| Event::Delay { node }),
        1 => Just(Event::Arrive),
        3 => node.clone().prop_map(|node| Event::Want { node }),
        4 => node.clone().prop_map(|node| Event::Mount { node }),
        4 => node.prop_map(|node| Event::Unmount { node }),
        4 => Just(Event::Write),
    ];
    proptest::collection::vec(event, 0..300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_writer_nothing_lost_every_move_ends(events in events(), last in 0..NODES.len()) {
        let mut world = World::new();
        for event in &events {
            world.happen(event);
        }
        // From here on nothing is in the way.
        for round in 0..40 {
            for node in 0..NODES.len() {
                world.happen(&Event::Unmount { node });
                world.happen(&Event::Step { node, actions: usize::MAX });
            }
            if round == 20 {
                world.want(NODES[last]);
            }
        }
        let status = world.status();
        prop_assert_eq!(status.phase, VolumePhase::Ready);
        prop_assert_eq!(status.owner.as_deref(), Some(NODES[last]));
        prop_assert_eq!(world.disks[NODES[last]].content, world.written);
        world.happen(&Event::Mount { node: last });
        prop_assert!(world.disks[NODES[last]].local.mounted && !world.disks[NODES[last]].local.readonly);
        for (node, disk) in &world.disks {
            prop_assert!(status.replicas.iter().any(|entry| entry.node == *node));
            prop_assert!(disk.local.snapshots.len() <= NODES.len(), "{} keeps {:?}", node, disk.local.snapshots);
        }
    }
}
