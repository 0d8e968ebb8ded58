//! A cluster in miniature: nodes take the steps of their plans one by one, are killed between any two of them and then know nothing but
//! their disks; writes come too late, or arrive when the node that sent them is dead. What runs here is [`step`] and [`decide`] themselves.

use std::collections::VecDeque;
use std::hash::{Hash, Hasher};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use portolan_crds::{
    AskedBy, HandoffPhase, Placement, PortableVolume, PortableVolumeSpec, PortableVolumeStatus, VolumePhase,
};

use crate::controller::decide::{Decision, decide};
use crate::handoff::{
    Action, Ask, Event, Known, Local, Round, State, applied, ready, shared_guids, step, transition, travels,
};
use crate::volume;

const UID: &str = "uid-1";

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
}

/// A dataset: what is in it, and what was when each snapshot was taken. The content is how often somebody wrote to it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Disk {
    /// What a plan sees of it.
    pub local: Local,
    /// What is in it now.
    pub content: u32,
    frozen: Vec<u32>,
    /// Mounted so that a pod can write.
    pub writable: bool,
}

/// What is left of a node's plan.
#[derive(Clone, Debug, PartialEq)]
struct Plan {
    read: PortableVolume,
    /// Whether nobody else has written since.
    fresh: bool,
    rest: VecDeque<Action>,
}

/// A write under way, whose sender is dead.
#[derive(Clone, Debug, PartialEq)]
struct Late {
    status: PortableVolumeStatus,
    fresh: bool,
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
}

/// All of it.
#[derive(Clone, Debug, PartialEq)]
pub struct World {
    /// The object.
    pub volume: PortableVolume,
    /// What is on the nodes' disks.
    pub disks: [Option<Disk>; NODES.len()],
    plans: [Option<Plan>; NODES.len()],
    late: Vec<Late>,
    /// Mounts whose caller is dead.
    late_mounts: Vec<usize>,
    guids: u32,
    /// How many writes were acknowledged.
    pub written: u32,
    weakness: Weakness,
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
                self.mount(node);
                if self.disks[node].as_ref().is_some_and(|disk| disk.content != self.written) {
                    self.note("a pod starts with what the volume was once");
                }
            }
            Happening::MountLate(node) if self.may_mount(node) => self.late_mounts.push(node),
            Happening::Mount(_) | Happening::MountLate(_) => {}
            Happening::MountComes => {
                if let Some(node) = self.late_mounts.pop() {
                    self.mount(node);
                }
            }
            Happening::Unmount(node) => {
                if let Some(disk) = &mut self.disks[node] {
                    (disk.local.mounted, disk.writable) = (false, false);
                }
            }
            Happening::Write => self.pods_write(),
        }
        let writers = self.disks.iter().flatten().filter(|disk| disk.writable).count();
        if writers > 1 {
            self.note(format!("{writers} nodes can write"));
        }
    }

    fn note(&mut self, wrong: impl Into<String>) {
        self.wrong.get_or_insert_with(|| wrong.into());
    }

    /// Everything that is under way ends, nothing fails any more, and the volume is wanted on a node: it gets there, with all that was
    /// written. What is in the way of that.
    pub fn settle(mut self, at: usize) -> Result<(), String> {
        self.late.clear();
        for node in std::mem::take(&mut self.late_mounts) {
            self.mount(node);
        }
        self.plans = Default::default();
        self.run_down();
        // Once to be heard, once more if that was only to end what was under way.
        for _ in 0..3 {
            self.want(at);
            self.run_down();
        }
        match self.wrong {
            Some(wrong) => Err(wrong),
            None => self.check_settled(at),
        }
    }

    /// Each node does what it has to, until there is nothing left.
    fn run_down(&mut self) {
        for _ in 0..100 {
            let before = (self.volume.status.clone(), self.disks.clone());
            for node in 0..NODES.len() {
                self.happen(&Happening::Unmount(node));
                self.happen(&Happening::Step(node));
                while self.is_busy(node) {
                    self.happen(&Happening::Step(node));
                }
            }
            if before == (self.volume.status.clone(), self.disks.clone()) {
                return;
            }
        }
        self.note("it doesn't come to rest");
    }

    fn check_settled(&self, at: usize) -> Result<(), String> {
        let status = self.status();
        if status.phase != VolumePhase::Ready || status.owner.as_deref() != Some(NODES[at]) {
            return Err(format!("the volume is {:?} on {:?}, not Ready on {}", status.phase, status.owner, NODES[at]));
        }
        let disk = self.disks[at].as_ref().ok_or("the owner has no copy")?;
        if disk.content != self.written || disk.local.readonly {
            return Err(format!("{} of {} writes, read-only: {}", disk.content, self.written, disk.local.readonly));
        }
        for (node, disk) in self.disks.iter().enumerate() {
            let Some(disk) = disk else { continue };
            if !status.replicas.iter().any(|entry| entry.node == NODES[node]) {
                return Err(format!("nobody knows of the copy on {}", NODES[node]));
            }
            // What each other copy shares, and what the newest attempts have left.
            if disk.local.snapshots.len() > NODES.len() + 2 {
                return Err(format!("{} keeps {:?} for {status:?}", NODES[node], disk.local.snapshots));
            }
        }
        Ok(())
    }

    /// The controller's write, of an object that it has just read.
    fn control(&mut self, event: Event) {
        if let Ok(status) = transition(&self.volume, event) {
            self.write(status);
        }
    }

    fn want(&mut self, node: usize) {
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
    fn write(&mut self, mut status: PortableVolumeStatus) {
        let before = self.status();
        if status.epoch < before.epoch {
            self.note("the epoch went back");
        }
        for condition in &mut status.conditions {
            condition.last_transition_time = Time(Timestamp::UNIX_EPOCH);
        }
        self.volume.status = Some(status);
        for plan in self.plans.iter_mut().flatten() {
            plan.fresh = false;
        }
        for late in &mut self.late {
            late.fresh = false;
        }
    }

    fn plan(&mut self, node: usize) -> &mut Plan {
        let state = State {
            volume: self.volume.clone(),
            local: self.disks[node].as_ref().map(|disk| disk.local.clone()).map(|local| self.seen(local)),
            asked: Vec::new(),
        };
        let (state, actions) = step(NODES[node], state, None).unwrap_or_else(|refused| panic!("{refused}"));
        let rest = actions.into_iter().filter(|action| self.is_done(action)).collect();
        self.plans[node].get_or_insert(Plan { read: state.volume, fresh: true, rest })
    }

    /// A copy as the plan sees it.
    fn seen(&self, local: Local) -> Local {
        match self.weakness {
            Weakness::BlindToMounts => Local { mounted: false, ..local },
            _ => local,
        }
    }

    fn is_done(&self, action: &Action) -> bool {
        match self.weakness {
            Weakness::BlindToMounts => *action != Action::CheckQuiet,
            Weakness::StaysWritable => *action != Action::SetReadonly(true),
            _ => true,
        }
    }

    fn act(&mut self, node: usize) {
        if !self.is_busy(node) {
            self.plan(node);
        }
        let Some(plan) = &mut self.plans[node] else { return };
        let goes_on = match plan.rest.pop_front() {
            Some(action) => self.apply(node, action),
            None => false,
        };
        if !goes_on || self.plans[node].as_ref().is_some_and(|plan| plan.rest.is_empty()) {
            self.plans[node] = None;
        }
    }

    /// A node's write of what an event makes of the object that it has read. False if it fails.
    fn happens(&mut self, node: usize, event: Event) -> bool {
        match self.prepared(node, event) {
            Some((status, true)) => {
                self.send(node, status);
                true
            }
            _ => false,
        }
    }

    /// What an event makes of the object that a node has read, and whether it is that still.
    fn prepared(&self, node: usize, event: Event) -> Option<(PortableVolumeStatus, bool)> {
        let plan = self.plans[node].as_ref()?;
        let fresh = plan.fresh || self.weakness == Weakness::StaleWrites;
        transition(&plan.read, event).ok().map(|status| (status, fresh))
    }

    fn send(&mut self, node: usize, status: PortableVolumeStatus) {
        self.write(status);
        let now = self.volume.clone();
        if let Some(plan) = &mut self.plans[node] {
            (plan.read, plan.fresh) = (now, true);
        }
    }

    fn kill_sending(&mut self, node: usize) {
        let Some(plan) = &mut self.plans[node] else { return };
        let action = plan.rest.pop_front();
        let event = action.and_then(|action| self.event(node, &action));
        if let Some((status, fresh)) = event.and_then(|event| self.prepared(node, event)) {
            self.late.push(Late { status, fresh });
        }
        self.plans[node] = None;
    }

    fn arrive(&mut self) {
        if self.late.is_empty() {
            return;
        }
        let Late { status, fresh } = self.late.remove(0);
        if fresh || self.weakness == Weakness::StaleWrites {
            self.write(status);
        }
    }

    /// What an action that writes an event writes; a snapshot that goes with it is taken.
    fn event(&mut self, node: usize, action: &Action) -> Option<Event> {
        let me = NODES[node].to_owned();
        let epoch = volume::status(&self.plans[node].as_ref()?.read).handoff.map_or(0, |handoff| handoff.epoch);
        Some(match action {
            Action::RecordReplica => Event::Recorded { node: me, snapshot: None },
            Action::ForgetReplica => Event::Forgotten { node: me },
            Action::RecordSnapshot(known) => Event::Recorded { node: me, snapshot: Some(known.clone()) },
            Action::Own => Event::Owned { node: me, spec: Box::default() },
            Action::RecordRound(guid) => {
                let round = Some(Round { bytes: 1, milliseconds: 10_000 });
                Event::RoundReceived { node: me, epoch, guid: guid.clone(), round }
            }
            Action::TakeOver(guid) => Event::TookOver { node: me, epoch, guid: guid.clone(), bytes: 0, base: None },
            Action::Finish => Event::Finished { node: me, epoch, at: now() },
            Action::PublishRound(name) => {
                Event::RoundTaken { node: me, epoch, snapshot: self.snapshot(node, name), at: now() }
            }
            Action::PublishFinal(name) => {
                Event::Published { node: me, epoch, snapshot: self.snapshot(node, name), quiesced_at: now() }
            }
            _ => return None,
        })
    }

    /// Does an action as the node's agent does; false if it failed, which ends the plan.
    fn apply(&mut self, node: usize, action: Action) -> bool {
        if let Some(event) = self.event(node, &action) {
            return self.happens(node, event);
        }
        match action {
            Action::RecordUsed(_) | Action::ApplySpec => {
                let Some(plan) = self.plans[node].as_ref().filter(|plan| plan.fresh) else { return false };
                let mut status = volume::status(&plan.read);
                match action {
                    Action::ApplySpec => applied(&mut status, &plan.read.spec),
                    _ => {
                        status.used_bytes = Some(0);
                        ready(&mut status);
                    }
                }
                self.send(node, status);
            }
            Action::Create => {
                let local = Local { uid: Some(UID.into()), epoch: Some(1), ..Local::default() };
                self.disks[node].get_or_insert(Disk { local, ..Disk::default() });
            }
            Action::SetReadonly(on) => {
                // Who has it mounted already may write on: nothing is taken for granted of ZFS there.
                self.disk(node).local.readonly = on;
            }
            Action::CheckQuiet => return !self.disk(node).local.mounted,
            Action::Fetch(snapshot) => return self.fetch(node, &snapshot),
            Action::Adopt => self.disk(node).local.uid = Some(UID.into()),
            Action::Stamp(epoch) => self.disk(node).local.epoch = Some(epoch),
            Action::Destroy => {
                if self.status().owner.is_some() {
                    self.note("a copy was destroyed that may be the only one");
                }
                self.disks[node] = None;
            }
            Action::DestroySnapshot(known) => {
                let disk = self.disk(node);
                if let Some(at) = disk.local.snapshots.iter().position(|there| *there == known) {
                    disk.local.snapshots.remove(at);
                    disk.frozen.remove(at);
                }
            }
            // The end of a plan; or of what nobody asks for here.
            _ => return false,
        }
        true
    }

    fn disk(&mut self, node: usize) -> &mut Disk {
        self.disks[node].get_or_insert_default()
    }

    fn snapshot(&mut self, node: usize, name: &str) -> Known {
        self.guids += 1;
        let known = Known { name: name.to_owned(), guid: self.guids.to_string() };
        let disk = self.disk(node);
        disk.frozen.push(disk.content);
        disk.local.snapshots.push(known.clone());
        known
    }

    /// Receives from the source of the handoff what is authorised now, a stream of one snapshot; refuses what ZFS refuses.
    fn fetch(&mut self, node: usize, wanted: &Known) -> bool {
        let status = self.status();
        let Some(handoff) = &status.handoff else { return false };
        let sends = matches!(handoff.phase, HandoffPhase::PreCopy | HandoffPhase::FinalSync);
        if handoff.to != NODES[node] || !sends || handoff.guid.as_ref() != Some(&wanted.guid) {
            return false;
        }
        let from = NODES.iter().position(|name| *name == handoff.from);
        let Some(source) = from.and_then(|from| self.disks[from].clone()) else { return false };
        let Some(at) = source.local.snapshots.iter().position(|there| there == wanted) else { return false };
        let after = match &self.disks[node] {
            None => 0,
            Some(disk) => match common(disk, &source.local.snapshots[..at]) {
                Some(common) => common + 1,
                None => {
                    self.quarantine(node);
                    return false;
                }
            },
        };
        let shared = shared_guids(&status);
        let next = (after..at).find(|next| travels(&shared, &source.local.snapshots[*next])).unwrap_or(at);
        let cut = self.weakness == Weakness::KeepsCutStreams;
        let disk = self.disk(node);
        disk.content = if cut { disk.content } else { source.frozen[next] };
        disk.local.readonly = true;
        disk.local.snapshots.push(source.local.snapshots[next].clone());
        disk.frozen.push(disk.content);
        next == at
    }

    /// A copy that isn't from the volume's history is put out of the way.
    fn quarantine(&mut self, node: usize) {
        let event = Event::Quarantined { node: NODES[node].into(), message: "kept".into() };
        if self.happens(node, event) {
            self.disks[node] = None;
            self.quarantined += 1;
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
            && epoch == Some(status.epoch)
            // The agent holds the volume's lock from the reading of the object to the last action of the plan.
            && !self.is_busy(node)
    }

    fn mount(&mut self, node: usize) {
        if let Some(disk) = &mut self.disks[node] {
            (disk.local.mounted, disk.writable) = (true, !disk.local.readonly);
        }
    }

    fn pods_write(&mut self) {
        let writable = self.disks.iter().flatten().filter(|disk| disk.writable);
        let behind = writable.filter(|disk| disk.content != self.written).count();
        if behind > 0 {
            self.note("a pod doesn't see what was written before");
        }
        for disk in self.disks.iter_mut().flatten().filter(|disk| disk.writable) {
            disk.content += 1;
            self.written += 1;
        }
    }
}

/// Where the newest snapshot of a copy is among those of the source, if nothing was written since: where a stream can begin.
fn common(disk: &Disk, source: &[Known]) -> Option<usize> {
    let newest = disk.local.snapshots.last()?;
    let at = source.iter().position(|it| it == newest)?;
    (disk.frozen.last() == Some(&disk.content)).then_some(at)
}

fn now() -> MicroTime {
    MicroTime(Timestamp::UNIX_EPOCH)
}
