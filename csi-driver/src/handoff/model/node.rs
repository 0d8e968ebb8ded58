//! What a node does: as its agent, one action at a time.

use portolan_crds::{HandoffPhase, PortableVolumeStatus};

use super::disk::Disk;
use super::world::{Late, Plan, UID, Weakness, now};
use super::{NODES, World};
use crate::handoff::{
    Action, Asked, Event, Known, Local, Round, State, applied, ready, retired_name, shared_guids, step, transition,
    travels,
};
use crate::volume;

impl World {
    fn plan(&mut self, node: usize) -> &mut Plan {
        let state = State {
            volume: self.volume.clone(),
            local: self.disks[node].as_ref().map(|disk| disk.local.clone()).map(|local| self.seen(local)),
            asked: self.snapshots.iter().map(Asked::of).collect(),
        };
        let (state, mut actions) = step(NODES[node], state, None).unwrap_or_else(|refused| panic!("{refused}"));
        if self.weakness == Weakness::ForgetsFirst {
            actions.sort_by_key(|action| *action != Action::ForgetReplica);
        }
        let (done, status) = (actions.into_iter().filter(|action| self.is_done(action)), volume::status(&state.volume));
        let rest = done.map(|action| self.done_instead(action, &status)).collect();
        self.plans[node].get_or_insert(Plan { read: state.volume, fresh: true, rest })
    }

    /// A copy as the plan sees it.
    fn seen(&self, local: Local) -> Local {
        match self.weakness {
            Weakness::BlindToMounts => Local { mounted: false, ..local },
            Weakness::RestsForEver => {
                Local { rests_at: local.snapshots.last().map(|newest| newest.guid.clone()), ..local }
            }
            _ => local,
        }
    }

    fn is_done(&self, action: &Action) -> bool {
        match self.weakness {
            Weakness::BlindToMounts => !matches!(action, Action::CheckQuiet | Action::Replay),
            Weakness::StaysWritable => *action != Action::SetReadonly(true),
            Weakness::ForgetsLogs => *action != Action::Replay,
            _ => true,
        }
    }

    fn done_instead(&self, action: Action, status: &PortableVolumeStatus) -> Action {
        let is_shared = |snapshot: &Known| shared_guids(status).contains(&snapshot.guid);
        match (self.weakness, action) {
            (Weakness::DestroysShared, Action::Retire(it)) if is_shared(&it) => Action::DestroyTaken(it),
            (Weakness::DestroysComing, Action::Retire(it)) if !is_shared(&it) => Action::DestroyTaken(it),
            (_, action) => action,
        }
    }

    pub(super) fn act(&mut self, node: usize) {
        if !self.is_busy(node) && self.is_gone() {
            return;
        }
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

    pub(super) fn kill_sending(&mut self, node: usize) {
        let Some(plan) = &mut self.plans[node] else { return };
        let action = plan.rest.pop_front();
        let event = action.and_then(|action| self.event(node, &action));
        if let Some((status, fresh)) = event.and_then(|event| self.prepared(node, event)) {
            self.late.push(Late { status, fresh });
        }
        self.plans[node] = None;
    }

    pub(super) fn arrive(&mut self) {
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
            Action::PublishRound { name, rests } => {
                let snapshot = self.snapshot(node, name);
                let local = &mut self.disk(node).local;
                if *rests && !local.mounted {
                    (local.open, local.rests_at) = (false, Some(snapshot.guid.clone()));
                }
                Event::RoundTaken { node: me, epoch, snapshot, at: now() }
            }
            Action::PublishFinal { name, resting } => {
                let snapshot = match resting {
                    Some(resting) if self.rests_at(node, resting) => resting.clone(),
                    _ => self.snapshot(node, name),
                };
                Event::Published { node: me, epoch, snapshot, quiesced_at: now() }
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
                self.disks[node].get_or_insert(Disk::new(local));
            }
            Action::SetReadonly(on) => {
                // Who has it mounted already may write on: nothing is taken for granted of ZFS there.
                self.disk(node).local.readonly = on;
            }
            Action::Replay => {
                let disk = self.disk(node);
                // What a pod uses can't be unmounted.
                if disk.writable {
                    return false;
                }
                disk.mount();
                disk.unmount();
            }
            Action::CheckQuiet => return !self.disk(node).local.mounted,
            Action::Fetch(snapshot) => return self.fetch(node, &snapshot),
            Action::Adopt => self.disk(node).local.uid = Some(UID.into()),
            Action::Stamp(epoch) => self.disk(node).local.epoch = Some(epoch),
            Action::Destroy => {
                if self.status().owner.is_some() && !self.is_deleted() {
                    self.note("a copy was destroyed that may be the only one");
                }
                self.disks[node] = None;
            }
            Action::DestroySnapshot(known) | Action::DestroyTaken(known) => self.disk(node).thaw(&known),
            Action::Retire(known) => self.disk(node).rename(&known, retired_name(&known.guid)),
            Action::Take(asked) => {
                let disk = self.disk(node);
                if disk.frozen_now() != disk.acknowledged() {
                    self.note("a snapshot is taken without all that was acknowledged");
                }
                self.snapshot(node, &asked.short);
            }
            Action::RecordTaken { object, snapshot } => self.record_taken(node, &object, snapshot),
            Action::RecordDestroyed { object } => {
                let status = self.object(&object).map(|object| object.status.get_or_insert_default());
                let me = NODES[node].to_owned();
                if let Some(status) = status.filter(|status| !status.destroyed_on.contains(&me)) {
                    status.destroyed_on.push(me);
                }
            }
            // The end of a plan; or of what nobody asks for here.
            _ => return false,
        }
        true
    }

    pub(super) fn disk(&mut self, node: usize) -> &mut Disk {
        self.disks[node].get_or_insert_default()
    }

    fn snapshot(&mut self, node: usize, name: &str) -> Known {
        self.guids += 1;
        let known = Known { name: name.to_owned(), guid: self.guids.to_string() };
        self.disk(node).freeze(known.clone());
        known
    }

    /// What an agent asks of ZFS once more before it publishes a round's snapshot as the last. What nobody does with Portolan, writing by hand, isn't
    /// played here.
    fn rests_at(&self, node: usize, resting: &Known) -> bool {
        let local = self.disks[node].as_ref().map(|disk| self.seen(disk.local.clone()));
        local.is_some_and(|local| {
            local.rests_at.as_ref() == Some(&resting.guid) && local.snapshots.last() == Some(resting)
        })
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
            // It may be somebody's: see `TransferError::Unsettled`.
            Some(disk) if disk.local.snapshots.is_empty() => return false,
            Some(disk) => match disk.common(&source.local.snapshots[..at]) {
                Some(common) => common + 1,
                None => {
                    self.quarantine(node);
                    return false;
                }
            },
        };
        let shared = shared_guids(&status);
        let asked: Vec<Asked> = match self.weakness {
            Weakness::SendsAgain => Vec::new(),
            _ => self.snapshots.iter().map(Asked::of).collect(),
        };
        let goes = |next: &usize| travels(&shared, &asked, NODES[node], &source.local.snapshots[*next]);
        let next = (after..at).find(goes).unwrap_or(at);
        let cut = self.weakness == Weakness::KeepsCutStreams;
        let snapshot = source.local.snapshots[next].clone();
        let content = source.frozen(&snapshot.guid).unwrap_or_default();
        self.disk(node).receive(snapshot, content, cut);
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
}
