//! A cluster in miniature: nodes take the steps of their plans one by one, are killed between any two of them and then know nothing but
//! their disks; writes come too late, or arrive when the node that sent them is dead. What runs here is [`step`] and [`decide`] themselves.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{Hash, Hasher};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use portolan_crds::{
    AskedBy, HandoffPhase, Placement, PortableSnapshot, PortableVolume, PortableVolumeSpec, PortableVolumeStatus,
    VolumePhase,
};

use super::disk::Disk;
use crate::controller::decide::{Decision, decide};
use crate::handoff::{Action, Ask, Event, transition};
use crate::volume;

pub(super) const UID: &str = "uid-1";

/// The nodes, by name.
pub const NODES: [&str; 3] = ["a", "b", "c"];

/// A guard that is taken out, to see that the model notices.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Weakness {
    /// All guards are in place.
    #[default]
    None,
    /// A write goes through whatever has been written since what it was made from was read.
    StaleWrites,
    /// A source doesn't look whether the volume is mounted.
    BlindToMounts,
    /// A source doesn't make its copy read-only.
    StaysWritable,
    /// A target keeps a stream that was cut.
    KeepsCutStreams,
    /// The kubelet's mounts don't ask who owns the volume.
    MountsAnywhere,
    /// Nobody has ZFS play the log of a dataset that was in use when its node failed.
    ForgetsLogs,
    /// A node says that it has no copy of a deleted volume any more before that is so.
    ForgetsFirst,
    /// A source sends people's snapshots that its target has said it has none of any more.
    SendsAgain,
    /// A source takes a round's snapshot for the last though the volume was in use since.
    RestsForEver,
    /// A person's snapshot whose object goes is destroyed though a copy is known to share it.
    DestroysShared,
    /// The same though a target may have come as far as it.
    DestroysComing,
}

/// What is left of a node's plan.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plan {
    pub(super) read: PortableVolume,
    /// Whether nobody else has written since.
    pub(super) fresh: bool,
    pub(super) rest: VecDeque<Action>,
}

/// A write under way, whose sender is dead.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Late {
    pub(super) status: PortableVolumeStatus,
    pub(super) fresh: bool,
}

/// What happens next.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Happening {
    /// A node does one action of its plan; it makes one from what is known now if it has none.
    Step(usize),
    /// A node is killed.
    Kill(usize),
    /// A node is killed when it has sent the write that is the next action of its plan.
    KillSending(usize),
    /// The oldest of such writes arrives.
    Arrive,
    /// A pod that needs the volume is on a node.
    Want(usize),
    /// Somebody wants the volume to be on a node soon.
    WantWarm(usize),
    /// Somebody wants the handoff to end.
    Abort,
    /// The kubelet of a node mounts.
    Mount(usize),
    /// A node is killed when it has begun to mount, and the mount is still to come.
    MountLate(usize),
    /// It comes.
    MountComes,
    /// The kubelet of a node unmounts.
    Unmount(usize),
    /// The pod writes, wherever it can.
    Write,
    /// A node loses its power, and comes back.
    PowerCut(usize),
    /// Somebody deletes the volume.
    Delete,
    /// Somebody wants a snapshot of it.
    WantSnapshot,
    /// The oldest snapshot is not wanted any more.
    DropSnapshot,
}

/// All of it.
#[derive(Clone, Debug, PartialEq)]
pub struct World {
    /// The object.
    pub volume: PortableVolume,
    /// What is on the nodes' disks.
    pub disks: [Option<Disk>; NODES.len()],
    pub(super) plans: [Option<Plan>; NODES.len()],
    pub(super) late: Vec<Late>,
    /// Mounts whose caller is dead.
    pub(super) late_mounts: Vec<usize>,
    /// The snapshots that somebody wants.
    pub(super) snapshots: Vec<PortableSnapshot>,
    /// What was in the volume when each was taken, by its GUID.
    pub(super) taken: BTreeMap<String, u32>,
    pub(super) snapshots_wanted: u32,
    pub(super) guids: u32,
    /// How many writes were acknowledged.
    pub written: u32,
    pub(super) weakness: Weakness,
    /// What must never be and was.
    pub wrong: Option<String>,
    /// How often a copy had to be put out of the way.
    pub quarantined: u32,
}

impl Hash for World {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let plans = self.plans.iter().map(|plan| plan.as_ref().map(|plan| (plan.fresh, &plan.rest)));
        // The text of what has no Hash of its own; what a plan has read is what the object was, or matters no more.
        format!("{:?}{:?}{:?}{:?}", self.volume.status, self.disks, plans.collect::<Vec<_>>(), self.late).hash(hasher);
        format!("{:?}{:?}{:?}", self.snapshots, self.taken, self.is_deleted()).hash(hasher);
        (&self.late_mounts, self.guids, self.written, &self.wrong, self.quarantined).hash(hasher);
    }
}

impl World {
    /// A volume that is wanted on the first node and not made yet.
    pub fn new(weakness: Weakness) -> Self {
        let spec =
            PortableVolumeSpec { placement: Placement { node: NODES[0].into() }, ..PortableVolumeSpec::default() };
        let mut volume = PortableVolume::new("pvc-1", spec);
        volume.metadata.uid = Some(UID.into());
        Self {
            volume,
            disks: Default::default(),
            plans: Default::default(),
            late: Vec::new(),
            late_mounts: Vec::new(),
            snapshots: Vec::new(),
            taken: BTreeMap::new(),
            snapshots_wanted: 0,
            guids: 0,
            written: 0,
            weakness,
            wrong: None,
            quarantined: 0,
        }
    }

    /// The same, made and owned by the first node.
    pub fn owned(weakness: Weakness) -> Self {
        let mut world = Self::new(weakness);
        for _ in 0..8 {
            world.happen(&Happening::Step(0));
        }
        world
    }

    /// The object's status.
    pub fn status(&self) -> PortableVolumeStatus {
        volume::status(&self.volume)
    }

    /// Whether the node has a plan that it hasn't carried out.
    pub fn is_busy(&self, node: usize) -> bool {
        self.plans[node].is_some()
    }

    /// Whether a write is under way whose sender is dead.
    pub fn has_late(&self) -> bool {
        !self.late.is_empty()
    }

    /// Whether a mount is under way whose caller is dead.
    pub fn has_late_mount(&self) -> bool {
        !self.late_mounts.is_empty()
    }

    /// Lets something happen; what can't is nothing.
    pub fn happen(&mut self, what: &Happening) {
        match *what {
            Happening::Step(node) => self.act(node),
            Happening::Kill(node) => self.plans[node] = None,
            Happening::KillSending(node) => self.kill_sending(node),
            Happening::Arrive => self.arrive(),
            Happening::Want(node) => self.want(node),
            Happening::WantWarm(node) => {
                let ask = Ask { to: NODES[node].into(), by: AskedBy::Migration, warm: true, ..Ask::default() };
                self.control(Event::Asked(ask, now()));
            }
            Happening::Abort => self.control(Event::Aborted { why: "not wanted".into(), at: now() }),
            Happening::Mount(node) if self.may_mount(node) => {
                self.make_writable(node);
                self.mount(node);
                if self.disks[node].as_ref().is_some_and(|disk| disk.acknowledged() != self.written) {
                    self.note("a pod starts with what the volume was once");
                }
            }
            Happening::MountLate(node) if self.may_mount(node) => {
                self.make_writable(node);
                self.late_mounts.push(node);
            }
            Happening::Mount(_) | Happening::MountLate(_) => {}
            Happening::MountComes => {
                if let Some(node) = self.late_mounts.pop() {
                    self.mount(node);
                }
            }
            Happening::Unmount(node) => {
                if let Some(disk) = &mut self.disks[node] {
                    disk.unmount();
                }
            }
            Happening::Write => self.pods_write(),
            Happening::PowerCut(node) => {
                self.plans[node] = None;
                self.late_mounts.retain(|late| *late != node);
                if let Some(disk) = &mut self.disks[node] {
                    disk.lose_power();
                }
            }
            Happening::Delete => {
                self.volume.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
                self.outdate();
            }
            Happening::WantSnapshot => self.want_snapshot(),
            Happening::DropSnapshot => {
                let kept = |snapshot: &&mut PortableSnapshot| snapshot.metadata.deletion_timestamp.is_none();
                if let Some(oldest) = self.snapshots.iter_mut().find(kept) {
                    oldest.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
                }
            }
        }
        self.let_go();
        let writers = self.disks.iter().flatten().filter(|disk| disk.writable).count();
        if writers > 1 {
            self.note(format!("{writers} nodes can write"));
        }
    }

    /// Whether the volume is being deleted, or is.
    pub fn is_deleted(&self) -> bool {
        self.volume.metadata.deletion_timestamp.is_some()
    }

    /// Whether the object is gone: nobody looks after what is left.
    pub fn is_gone(&self) -> bool {
        self.is_deleted() && self.status().replicas.is_empty()
    }

    pub(super) fn note(&mut self, wrong: impl Into<String>) {
        self.wrong.get_or_insert_with(|| wrong.into());
    }

    /// The controller's write, of an object that it has just read.
    fn control(&mut self, event: Event) {
        if let Ok(status) = transition(&self.volume, event) {
            self.write(status);
        }
    }

    pub(super) fn want(&mut self, node: usize) {
        match decide(&self.volume, NODES[node], &[]) {
            Decision::Move => {
                let ask = Ask { to: NODES[node].into(), ..Ask::default() };
                self.control(Event::Asked(ask, now()));
            }
            Decision::Stay => self.control(Event::Aborted { why: "wanted here".into(), at: now() }),
            _ => {}
        }
    }

    /// The object is another now.
    pub(super) fn write(&mut self, mut status: PortableVolumeStatus) {
        if self.is_gone() {
            return;
        }
        let before = self.status();
        if status.epoch < before.epoch {
            self.note("the epoch went back");
        }
        for condition in &mut status.conditions {
            condition.last_transition_time = Time(Timestamp::UNIX_EPOCH);
        }
        self.volume.status = Some(status);
        self.outdate();
    }

    /// What was made from the object as it was can't be written any more.
    fn outdate(&mut self) {
        for plan in self.plans.iter_mut().flatten() {
            plan.fresh = false;
        }
        for late in &mut self.late {
            late.fresh = false;
        }
    }

    fn may_mount(&self, node: usize) -> bool {
        if self.weakness == Weakness::MountsAnywhere {
            return self.disks[node].is_some();
        }
        let status = self.status();
        let epoch = self.disks[node].as_ref().and_then(|disk| disk.local.epoch);
        status.owner.as_deref() == Some(NODES[node])
            && status.handoff.is_none_or(|handoff| handoff.phase == HandoffPhase::PreCopy)
            && status.phase == VolumePhase::Ready
            && !self.is_deleted()
            && epoch == Some(status.epoch)
            // The agent holds the volume's lock from the reading of the object to the last action of the plan.
            && !self.is_busy(node)
    }

    /// What the last round of a move has made read-only, which is not the last now.
    fn make_writable(&mut self, node: usize) {
        let moves = self.status().handoff.is_some();
        if let Some(disk) = self.disks[node].as_mut().filter(|disk| moves && !disk.local.open) {
            disk.local.readonly = false;
        }
    }

    pub(super) fn mount(&mut self, node: usize) {
        if let Some(disk) = &mut self.disks[node] {
            disk.mount();
        }
    }

    fn pods_write(&mut self) {
        let writable = self.disks.iter().flatten().filter(|disk| disk.writable);
        let behind = writable.filter(|disk| disk.acknowledged() != self.written).count();
        if behind > 0 {
            self.note("a pod doesn't see what was written before");
        }
        for disk in self.disks.iter_mut().flatten().filter(|disk| disk.writable) {
            disk.write();
            self.written += 1;
        }
    }
}

pub(super) fn now() -> MicroTime {
    MicroTime(Timestamp::UNIX_EPOCH)
}
