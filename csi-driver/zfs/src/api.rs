//! The trait that the rest of Portolan sees.

use std::future::Future;

use crate::error::ZfsError;
use crate::model::{Dataset, PoolHealth, Snapshot, Space};
use crate::name::{DatasetName, Property, SnapshotName};
use crate::probe::Probe;
use crate::stream::{ReceiveProcess, SendStream};

type Result<T> = std::result::Result<T, ZfsError>;

/// What Portolan asks of ZFS. Each call is one step that is done or not done; where it says idempotent, doing it again is no error.
///
/// A missing dataset is [`NotFound`](crate::ErrorKind::NotFound) only if its pool is there: a pool that is not imported is
/// [`PoolUnavailable`](crate::ErrorKind::PoolUnavailable), never taken to be empty.
pub trait Zfs: Send + Sync + 'static {
    /// Which ZFS this is and what it can do. Changes nothing.
    fn probe(&self) -> impl Future<Output = Result<Probe>> + Send;

    /// The health of the pool that `dataset` is in.
    fn pool_health(&self, dataset: &DatasetName) -> impl Future<Output = Result<PoolHealth>> + Send;

    /// The room in a dataset.
    fn space(&self, dataset: &DatasetName) -> impl Future<Output = Result<Space>> + Send;

    /// Makes a filesystem with all `properties` in one step. Its parent must be there. Not mounted if `canmount=noauto` is among them.
    fn create_filesystem(&self, name: &DatasetName, properties: &[Property])
    -> impl Future<Output = Result<()>> + Send;

    /// A dataset's state.
    fn dataset(&self, name: &DatasetName) -> impl Future<Output = Result<Dataset>> + Send;

    /// The datasets directly below `parent`, by name.
    fn children(&self, parent: &DatasetName) -> impl Future<Output = Result<Vec<Dataset>>> + Send;

    /// Sets one property. Idempotent.
    fn set_property(&self, name: &DatasetName, property: &Property) -> impl Future<Output = Result<()>> + Send;

    /// Sets `readonly` and reads it back. Idempotent.
    fn set_readonly(&self, name: &DatasetName, readonly: bool) -> impl Future<Output = Result<()>> + Send;

    /// A dataset's own snapshots, oldest first.
    fn snapshots(&self, dataset: &DatasetName) -> impl Future<Output = Result<Vec<Snapshot>>> + Send;

    /// Takes a snapshot.
    fn snapshot(&self, name: &SnapshotName) -> impl Future<Output = Result<Snapshot>> + Send;

    /// Destroys one snapshot. A held one is `Busy`.
    fn destroy_snapshot(&self, name: &SnapshotName) -> impl Future<Output = Result<()>> + Send;

    /// Destroys an unmounted dataset that has neither snapshots nor children.
    fn destroy_dataset(&self, name: &DatasetName) -> impl Future<Output = Result<()>> + Send;

    /// Unmounts a dataset (never by force) and destroys its own snapshots and itself. Refused if there are datasets below it or holds or
    /// clones of its snapshots. Interrupted anywhere, it goes on when called again; `NotFound` if there is nothing to destroy.
    fn destroy_with_snapshots(&self, name: &DatasetName) -> impl Future<Output = Result<()>> + Send;

    /// Keeps a snapshot from being destroyed until `tag` is released. Idempotent.
    fn hold(&self, name: &SnapshotName, tag: &str) -> impl Future<Output = Result<()>> + Send;

    /// Releases a hold. Idempotent.
    fn release(&self, name: &SnapshotName, tag: &str) -> impl Future<Output = Result<()>> + Send;

    /// Mounts a dataset at its mountpoint. Idempotent.
    fn mount(&self, name: &DatasetName) -> impl Future<Output = Result<()>> + Send;

    /// Unmounts a dataset, never by force: open files make it `Busy`. Idempotent.
    fn unmount(&self, name: &DatasetName) -> impl Future<Output = Result<()>> + Send;

    /// Whether a dataset is mounted.
    fn is_mounted(&self, name: &DatasetName) -> impl Future<Output = Result<bool>> + Send;

    /// Renames an unmounted dataset within its pool.
    fn rename(&self, from: &DatasetName, to: &DatasetName) -> impl Future<Output = Result<()>> + Send;

    /// Starts the stream of a snapshot: in full, or what came after `base`, an older snapshot of the same dataset. Without properties.
    fn send(&self, name: &SnapshotName, base: Option<&SnapshotName>)
    -> impl Future<Output = Result<SendStream>> + Send;

    /// Starts to receive a stream into `dataset`: a new one for a full stream, one whose newest snapshot is the base for an incremental one.
    /// Never forced, never mounted. `properties` are set by the receive itself where the userland can (`recv -o`), else right after it.
    fn receive(
        &self,
        dataset: &DatasetName,
        properties: &[Property],
    ) -> impl Future<Output = Result<ReceiveProcess>> + Send;
}
