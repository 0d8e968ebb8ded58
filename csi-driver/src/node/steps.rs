//! Doing what the plan says, one action at a time. Each may be done again after any failure.

use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::ResourceExt;
use portolan_crds::PortableVolume;
use portolan_zfs::{Dataset, DatasetName, ErrorKind, InvalidName, Property, Snapshot, Zfs, ZfsError};
use tokio::sync::OwnedMutexGuard;

use super::disk::{self, ReadError};
use super::fetch::{self, Progress};
use super::write::WriteError;
use super::{Node, import, restore, take, write};
use crate::block::device::{Device, DeviceError};
use crate::block::mounts::MountError;
use crate::handoff::{self, Action, Event, Known, Refused};
use crate::transfer::{There, TransferError};
use crate::volume;

/// How long the source's last users of a zvol's device, udev among them, may take to let it go.
const QUIET_WITHIN: Duration = Duration::from_secs(5);

/// A step that failed. The text is for people: it goes into the volume's status and an Event.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// ZFS failed.
    #[error(transparent)]
    Zfs(#[from] ZfsError),
    /// A mount operation failed.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A zvol's device is not as it must be.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The API failed or refused.
    #[error("the Kubernetes API: {0}")]
    Api(#[from] kube::Error),
    /// The stream did not come, or not whole.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// A name that ZFS doesn't take.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// ZFS has said that it made the dataset read-only.
    #[error("dataset {0} was made read-only and is not")]
    Writable(DatasetName),
    /// Something has mounted the dataset since the plan was made.
    #[error("dataset {dataset} is mounted at {}", at.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "))]
    NotQuiet {
        /// The dataset.
        dataset: DatasetName,
        /// Where.
        at: Vec<PathBuf>,
    },
    /// The operator has not signed our certificate yet.
    #[error("node {0} has no certificate yet: is portolan-operator running?")]
    NoCertificate(String),
    /// The source has not said where it can be reached.
    #[error("StorageNode {0} has no status.transferAddress yet: is its storage agent running?")]
    NoAddress(String),
    /// The snapshot that a new volume begins as can't be had.
    #[error("PortableSnapshot {snapshot}, from which the volume is to be made, {why}")]
    Source {
        /// The snapshot.
        snapshot: String,
        /// What is the matter.
        why: String,
    },
    /// The dataset that the spec names can't be this volume's. Nothing was changed.
    #[error("spec.import.dataset {dataset} {why}")]
    Import {
        /// The dataset.
        dataset: String,
        /// What is the matter, and what is allowed.
        why: String,
    },
    /// What was acknowledged may be in the dataset's log only, which is behind its key.
    #[error(
        "{0} was in use when this node failed, and what was written last is behind its key: let a pod that uses it start here once"
    )]
    NeedsKey(DatasetName),
    /// A group's snapshots can't be of one moment.
    #[error("group {group}: {why}")]
    Group {
        /// The group.
        group: String,
        /// What is the matter.
        why: String,
    },
    /// The volume is being deleted, so that the transfer is of no use.
    #[error("the volume is being deleted")]
    Deleted,
    /// The handoff has been aborted, so that the transfer is of no use.
    #[error("the handoff has been aborted")]
    Superseded,
    /// Somebody has decided otherwise since the plan was made.
    #[error(transparent)]
    Refused(#[from] Refused),
}

impl From<WriteError> for StepError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Refused(error) => error.into(),
            WriteError::Api(error) => error.into(),
        }
    }
}

impl From<ReadError> for StepError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Zfs(error) => error.into(),
            ReadError::Mounts(error) => error.into(),
            ReadError::Device(error) => error.into(),
        }
    }
}

/// One volume, its lock held but while a transfer waits for its turn.
pub(super) struct Steps<'a, Z> {
    pub(super) node: &'a Node<Z>,
    pub(super) dataset: DatasetName,
    /// As it was read, or as our last write left it.
    pub(super) volume: PortableVolume,
    /// What has been received and is not yet in the status.
    pub(super) progress: Option<Progress>,
    /// What was on the disk when the plan was made, if it is so still.
    pub(super) there: Option<There>,
    /// None while others may have the volume.
    pub(super) lock: Option<OwnedMutexGuard<()>>,
}

impl<Z: Zfs> Steps<'_, Z> {
    /// Waits for the volume if it has been let go.
    pub(super) async fn lock(&mut self) {
        if self.lock.is_none() {
            self.lock = Some(self.node.locks.lock(&self.volume.name_any()).await);
        }
    }

    /// Lets others have the volume. What is known of the disk may be otherwise when it is locked again.
    pub(super) fn unlock(&mut self) {
        self.lock = None;
    }

    /// Does one action of a plan.
    pub(super) async fn apply(&mut self, action: Action) -> Result<(), StepError> {
        let me = self.node.name.clone();
        let zfs = self.node.zfs.as_ref();
        match action {
            // The caller's.
            Action::Wait(_) | Action::Report { .. } | Action::Keep(_) | Action::AwaitKey => {}
            Action::RecordReplica => self.happen(Event::Recorded { node: me, snapshot: None }).await?,
            Action::ForgetReplica => self.happen(Event::Forgotten { node: me }).await?,
            Action::RecordSnapshot(snapshot) => {
                self.happen(Event::Recorded { node: me, snapshot: Some(snapshot) }).await?;
            }
            Action::RecordUsed(bytes) => {
                self.write(|status| {
                    write::used(status, bytes);
                    handoff::ready(status);
                })
                .await?;
            }
            Action::Create => self.create().await?,
            // The largest futures by far: all others would be as large.
            Action::Restore => Box::pin(restore::run(self)).await?,
            Action::Import => import::run(self).await?,
            Action::Own => {
                let spec = Box::new(self.volume.spec.clone());
                self.happen(Event::Owned { node: me, spec }).await?;
            }
            Action::ApplySpec => self.apply_spec().await?,
            Action::Take(asked) => take::run(self, &asked).await?,
            Action::CleanUp(asked) => take::clean_up(self, &asked).await?,
            Action::RecordTaken { object, snapshot } => take::record(self, &object, &snapshot).await?,
            Action::DestroyTaken(snapshot) => {
                ignore_missing(zfs.destroy_snapshot_deferred(&self.dataset.snapshot(&snapshot.name)?).await)?;
            }
            Action::Retire(snapshot) => {
                let name = self.dataset.snapshot(&snapshot.name)?;
                ignore_missing(zfs.rename_snapshot(&name, &handoff::retired_name(&snapshot.guid)).await)?;
            }
            Action::RecordDestroyed { object } => take::record_destroyed(self.node, &object).await?,
            Action::SetReadonly(on) => zfs.set_readonly(&self.dataset, on).await?,
            Action::Replay => replay(self.node, &self.dataset).await?,
            Action::CheckQuiet => self.check_quiet().await?,
            Action::PublishRound { name, rests } => self.publish_round(&name, rests).await?,
            Action::PublishFinal { name, resting } => self.publish(&name, resting).await?,
            Action::RecordRound(guid) => {
                let epoch = self.epoch();
                let round = self.progress.as_ref().filter(|progress| progress.is_of(epoch)).map(Progress::round);
                self.happen_still(Event::RoundReceived { node: me, epoch, guid, round }).await?;
                self.progress = None;
            }
            Action::Fetch(snapshot) => Box::pin(fetch::run(self, snapshot)).await?,
            Action::Adopt => self.adopt().await?,
            Action::TakeOver(guid) => {
                let epoch = self.epoch();
                let received = self.progress.clone().filter(|progress| progress.is_of(epoch));
                let (bytes, base) = received.unwrap_or_default().total();
                self.happen_still(Event::TookOver { node: me, epoch, guid, bytes, base }).await?;
                self.progress = None;
            }
            Action::Stamp(epoch) => zfs.set_property(&self.dataset, &volume::epoch_property(epoch)?).await?,
            Action::Finish => self.finish().await?,
            Action::Destroy => self.destroy().await?,
            Action::DestroySnapshot(snapshot) => {
                ignore_missing(zfs.destroy_snapshot(&self.dataset.snapshot(&snapshot.name)?).await)?;
            }
        }
        Ok(())
    }

    pub(super) async fn write(
        &mut self,
        change: impl FnOnce(&mut portolan_crds::PortableVolumeStatus),
    ) -> kube::Result<()> {
        self.volume = write::status(&self.node.volumes, &self.volume, change).await?;
        Ok(())
    }

    /// Writes what an event makes of the object as we know it.
    pub(super) async fn happen(&mut self, event: Event) -> Result<(), StepError> {
        self.volume = write::event(&self.node.volumes, &self.volume, event).await?;
        Ok(())
    }

    /// Writes what an event makes of the object, whoever else writes meanwhile: the volume's lock is held, so what it says of our disk stays
    /// true, and whether it can happen still is checked on each object anew.
    async fn happen_still(&mut self, event: Event) -> Result<(), StepError> {
        loop {
            match self.happen(event.clone()).await {
                Err(StepError::Api(error)) if write::is_conflict(&error) => {
                    self.volume = self.node.volumes.get(&self.volume.name_any()).await?;
                    if self.volume.metadata.deletion_timestamp.is_some() {
                        return Err(StepError::Deleted);
                    }
                }
                result => return result,
            }
        }
    }

    /// The epoch of the running handoff; 0, which none has, if there is none.
    fn epoch(&self) -> i64 {
        self.volume.status.as_ref().and_then(|status| status.handoff.as_ref()).map_or(0, |handoff| handoff.epoch)
    }

    /// What a received dataset is given, the mark that it is ours last.
    pub(super) fn received_properties(&self) -> Result<Vec<Property>, StepError> {
        let mountpoint = volume::mountpoint(&self.node.kubelet_dir, &self.volume.name_any());
        let mut properties = vec![Property::readonly(true)];
        properties.extend(volume::properties(&self.volume, &mountpoint)?);
        Ok(properties)
    }

    /// What the dataset of a new volume is given, the mark that it is ours last.
    pub(super) fn new_properties(&self) -> Result<Vec<Property>, StepError> {
        let mountpoint = volume::mountpoint(&self.node.kubelet_dir, &self.volume.name_any());
        Ok(volume::new_properties(&self.volume, &mountpoint)?)
    }

    async fn create(&self) -> Result<(), StepError> {
        let properties = self.new_properties()?;
        let spec = &self.volume.spec;
        let size = u64::try_from(spec.size_bytes).unwrap_or_default();
        match spec.is_zvol() {
            true => self.node.zfs.create_volume(&self.dataset, size, &properties, None).await?,
            false => self.node.zfs.create_filesystem(&self.dataset, &properties, None).await?,
        }
        tracing::info!(dataset = %self.dataset, "made the dataset of a new volume");
        Ok(())
    }

    /// Sets what the spec says and the dataset can be given while it is in use.
    async fn apply_spec(&mut self) -> Result<(), StepError> {
        for property in volume::changeable(&self.volume)? {
            self.node.zfs.set_property(&self.dataset, &property).await?;
        }
        let spec = self.volume.spec.clone();
        tracing::info!(volume = self.volume.name_any(), size = spec.size_bytes, "the dataset is as the spec says");
        self.write(|status| handoff::applied(status, &spec)).await?;
        Ok(())
    }

    /// Makes sure that nothing can write to the dataset, which has been made read-only: nothing has it mounted, and a zvol's device is open
    /// nowhere since before.
    async fn check_quiet(&self) -> Result<(), StepError> {
        let (node, dataset) = (self.node, &self.dataset);
        let at = disk::mounts(&node.mounts, dataset)?;
        if !at.is_empty() {
            return Err(StepError::NotQuiet { dataset: dataset.clone(), at });
        }
        // Of a filesystem's dataset that is all, but for what is looked at while its snapshot is taken.
        if !self.volume.spec.is_zvol() {
            return Ok(());
        }
        match self.check_readonly().await?.key_available {
            // Without its key it has no device, and a key that anybody still needs isn't taken away.
            false => Ok(()),
            true => Ok(Device::check_unwritable(&node.mounts, &dataset.device(), QUIET_WITHIN).await?),
        }
    }

    /// ZFS has said that it made the dataset read-only: whether it is.
    async fn check_readonly(&self) -> Result<Dataset, StepError> {
        let dataset = &self.dataset;
        let found = self.node.zfs.dataset(dataset).await?;
        match (found.readonly, found.mounted) {
            (true, false) => Ok(found),
            (false, _) => Err(StepError::Writable(dataset.clone())),
            (true, true) => Err(StepError::NotQuiet { dataset: dataset.clone(), at: Vec::new() }),
        }
    }

    /// Takes the snapshot of a round of PreCopy, while the volume may be in use, and writes it.
    async fn publish_round(&mut self, name: &str, rests: bool) -> Result<(), StepError> {
        let known = self.snapshot(name).await?;
        // A mount may come late that an agent had begun which was killed.
        if rests && disk::mounts(&self.node.mounts, &self.dataset)?.is_empty() {
            self.node.zfs.set_property(&self.dataset, &volume::resting_property(&known.guid)?).await?;
        }
        let (node, epoch) = (self.node.name.clone(), self.epoch());
        self.happen_still(Event::RoundTaken { node, epoch, snapshot: known, at: write::now() }).await
    }

    /// Takes the final snapshot and writes it, if the dataset is read-only indeed. Whoever else writes meanwhile doesn't cost another snapshot: the
    /// lock is held, so the dataset stays as it is.
    async fn publish(&mut self, name: &str, resting: Option<Known>) -> Result<(), StepError> {
        let snapshot = match resting {
            Some(resting) if self.rests_at(&resting).await? => resting,
            _ => {
                // At once: a pod waits for it. What isn't published counts for nothing.
                let (snapshot, readonly) = tokio::join!(self.snapshot(name), self.check_readonly());
                readonly?;
                snapshot?
            }
        };
        let volume = self.volume.name_any();
        let quiesced_at = self.node.unstaged_at(&volume).map_or_else(write::now, MicroTime);
        let (node, epoch) = (self.node.name.clone(), self.epoch());
        self.happen_still(Event::Published { node, epoch, snapshot, quiesced_at }).await
    }

    /// Whether the dataset, which is read-only, has nothing that this snapshot hasn't: no pod has come since, and nobody has by hand.
    async fn rests_at(&self, resting: &Known) -> Result<bool, StepError> {
        let (found, snapshots) = tokio::join!(self.check_readonly(), self.node.zfs.snapshots(&self.dataset));
        let (found, snapshots) = (found?, snapshots?);
        let marked = found.user.get(volume::OPEN_PROPERTY) == Some(&resting.guid);
        let unchanged = |newest: &Snapshot| newest.guid.to_string() == resting.guid && newest.used == 0;
        Ok(marked && snapshots.last().is_some_and(unchanged))
    }

    async fn snapshot(&self, name: &str) -> Result<Known, StepError> {
        let taken = self.node.zfs.snapshot(&self.dataset.snapshot(name)?).await?;
        Ok(Known { name: name.to_owned(), guid: taken.guid.to_string() })
    }

    /// Puts a copy that doesn't fit the volume's history out of the way, for a person to look at: the next fetch brings all of it.
    pub(super) async fn quarantine(&mut self, why: &str) -> Result<(), StepError> {
        let name = volume::quarantine(&self.dataset, self.epoch())?;
        let node = self.node.name.clone();
        let message = format!(
            "the copy on node {node} is not from the volume's history ({why}): it is kept there as dataset {name}. Look at what it has; \
             if nobody needs that, run there `zfs destroy -r {name}`"
        );
        self.happen(Event::Quarantined { node, message: message.clone() }).await?;
        self.node.zfs.rename(&self.dataset, &name).await?;
        tracing::warn!(volume = self.volume.name_any(), message, "quarantined");
        self.node.events.warning(&volume::reference(&self.volume), handoff::DIVERGED, "Quarantine", &message).await;
        Ok(())
    }

    /// Sets what a received dataset lacks. One without the mark may lack anything; one with it has all.
    async fn adopt(&self) -> Result<(), StepError> {
        let found = disk::read(self.node.zfs.as_ref(), &self.node.mounts, &self.dataset).await?;
        if found.is_none_or(|local| local.uid.is_some()) {
            return Ok(());
        }
        for property in self.received_properties()? {
            self.node.zfs.set_property(&self.dataset, &property).await?;
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), StepError> {
        let (node, epoch) = (self.node.name.clone(), self.epoch());
        self.happen(Event::Finished { node, epoch, at: write::now() }).await?;
        let Some(report) = volume::status(&self.volume).last_handoff else { return Ok(()) };
        let metrics = &self.node.metrics;
        metrics.handoffs.inc();
        metrics.received.inc_by(u64::try_from(report.bytes).unwrap_or_default());
        metrics.downtime.observe(report.downtime_milliseconds as f64 / 1000.0);
        let how = report.base.map_or("in full".to_owned(), |base| format!("as a delta of {base}"));
        let message = format!(
            "moved from node {} to {}: {} bytes {how}, {} ms from unmounted there to writable here",
            report.from, report.to, report.bytes, report.downtime_milliseconds
        );
        tracing::info!(volume = self.volume.name_any(), message, "handoff finished");
        // Nothing waits for an Event.
        let (events, about) = (self.node.events.clone(), volume::reference(&self.volume));
        tokio::spawn(async move { events.normal(&about, "Moved", "Handoff", &message).await });
        Ok(())
    }

    async fn destroy(&self) -> Result<(), StepError> {
        ignore_missing(self.node.zfs.destroy_with_snapshots(&self.dataset).await)?;
        tracing::info!(dataset = %self.dataset, "destroyed the dataset");
        let mountpoint = volume::mountpoint(&self.node.kubelet_dir, &self.volume.name_any());
        if let Err(error) = self.node.mounts.remove_directory(&mountpoint) {
            tracing::warn!(%error, "a mountpoint stays behind");
        }
        Ok(())
    }
}

/// Has ZFS play the log of a dataset that is read-only, which it does when it mounts it, read-only too.
pub(super) async fn replay<Z: Zfs>(node: &Node<Z>, dataset: &DatasetName) -> Result<(), StepError> {
    let mountpoint = volume::mountpoint(&node.kubelet_dir, dataset.short());
    node.mounts.make_directory(&mountpoint)?;
    node.zfs.mount(dataset).await?;
    node.zfs.unmount(dataset).await?;
    node.mounts.remove_directory(&mountpoint)?;
    tracing::info!(%dataset, "played the log of a dataset that was in use when its node failed");
    Ok(node.zfs.set_property(dataset, &volume::open_property(false)?).await?)
}

pub(super) fn ignore_missing(result: Result<(), ZfsError>) -> Result<(), ZfsError> {
    match result {
        Err(error) if error.kind == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
