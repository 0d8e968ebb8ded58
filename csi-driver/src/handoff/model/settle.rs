//! Where every history has to be able to end.

use kube::ResourceExt;
use portolan_crds::{PortableSnapshot, VolumePhase};

use super::{Happening, NODES, World};

impl World {
    /// Everything that is under way ends, nothing fails any more, and the volume is wanted on a node: it gets there, with all that was
    /// written. How often a copy was put out of the way up to then; or what is in the way of that.
    pub fn settle(mut self, at: usize) -> Result<u32, String> {
        self.late.clear();
        for node in std::mem::take(&mut self.late_mounts) {
            self.mount(node);
        }
        self.plans = Default::default();
        self.run_down();
        if self.is_deleted() {
            return self.settle_deleted();
        }
        // Once to be heard, once more if that was only to end what was under way.
        for _ in 0..3 {
            self.want(at);
            self.run_down();
        }
        self.happen(&Happening::Mount(at));
        match self.wrong {
            Some(wrong) => Err(wrong),
            None => self.check_settled(at).map(|()| self.quarantined),
        }
    }

    /// A deleted volume is kept by its snapshots alone, and goes with the last.
    fn settle_deleted(mut self) -> Result<u32, String> {
        let lost = self.lost_snapshots(|world, guid| world.disks.iter().flatten().find_map(|disk| disk.frozen(guid)));
        if let Some(lost) = lost {
            return Err(lost);
        }
        while self.snapshots.iter().any(|snapshot| snapshot.metadata.deletion_timestamp.is_none()) {
            self.happen(&Happening::DropSnapshot);
        }
        self.run_down();
        match self.wrong {
            Some(wrong) => Err(wrong),
            None if self.is_gone() && self.snapshots.is_empty() => Ok(self.quarantined),
            None => Err(format!("it is deleted and stays: {:?}, {:?}", self.volume.status, self.snapshots)),
        }
    }

    /// Each node does what it has to, until there is nothing left.
    fn run_down(&mut self) {
        for _ in 0..100 {
            let before = (self.volume.status.clone(), self.disks.clone(), self.snapshots.clone());
            for node in 0..NODES.len() {
                self.happen(&Happening::Unmount(node));
                self.happen(&Happening::Step(node));
                while self.is_busy(node) {
                    self.happen(&Happening::Step(node));
                }
            }
            if before == (self.volume.status.clone(), self.disks.clone(), self.snapshots.clone()) {
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
        if disk.acknowledged() != self.written || !disk.writable {
            let (found, written) = (disk.acknowledged(), self.written);
            return Err(format!("{found} of {written} writes, a pod can write: {}", disk.writable));
        }
        if let Some(lost) = self.lost_snapshots(|_, guid| disk.frozen(guid)) {
            return Err(lost);
        }
        let untaken =
            |snapshot: &&PortableSnapshot| snapshot.guid().is_none() && snapshot.metadata.deletion_timestamp.is_none();
        if let Some(snapshot) = self.snapshots.iter().find(untaken) {
            return Err(format!("{} was never taken", snapshot.name_any()));
        }
        for (node, disk) in self.disks.iter().enumerate() {
            let Some(disk) = disk else { continue };
            if !status.replicas.iter().any(|entry| entry.node == NODES[node]) {
                return Err(format!("nobody knows of the copy on {}", NODES[node]));
            }
            // What each other copy shares, and what the newest attempts have left.
            if disk.local.snapshots.len() > NODES.len() + 2 + self.snapshots.len() {
                return Err(format!("{} keeps {:?} for {status:?}", NODES[node], disk.local.snapshots));
            }
        }
        Ok(())
    }
}
