//! The trait that the rest of Portolan sees.

use std::future::Future;

use crate::error::ZfsError;
use crate::key::Key;
use crate::model::{Bookmark, Dataset, PoolHealth, Rest, Snapshot, Space};
use crate::name::{BookmarkName, DatasetName, Guid, Property, SnapshotName};
use crate::options::{ReceiveOptions, SendOptions};
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

    /// What `zpool status` says of that pool's state, for people to read.
    fn pool_status(&self, dataset: &DatasetName) -> impl Future<Output = Result<String>> + Send;

    /// What identifies that pool, whatever it is called.
    fn pool_guid(&self, dataset: &DatasetName) -> impl Future<Output = Result<Guid>> + Send;

    /// Whether that pool takes streams of blocks as they are compressed at the sender, whichever compression Portolan knows they have
    /// ([`SendOptions::compressed`]): the features `lz4_compress` and `zstd_compress` must be enabled (zfs-send(8), `-c`; zpool-features(7)).
    fn receives_compressed(&self, dataset: &DatasetName) -> impl Future<Output = Result<bool>> + Send;

    /// The room in a dataset.
    fn space(&self, dataset: &DatasetName) -> impl Future<Output = Result<Space>> + Send;

    /// Makes a filesystem with all `properties` in one step. Its parent must be there. Not mounted if `canmount=noauto` is among them.
    ///
    /// With a key it is encrypted, by `aes-256-gcm` unless `properties` say otherwise: `Unsupported` where ZFS can't.
    fn create_filesystem(
        &self,
        name: &DatasetName,
        properties: &[Property],
        key: Option<&Key>,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Makes a sparse volume (zvol) of `size` bytes, which ZFS rounds up to whole blocks; it grows by [`Property::volsize`].
    /// `Unsupported` where ZFS can't.
    fn create_volume(
        &self,
        name: &DatasetName,
        size: u64,
        properties: &[Property],
        key: Option<&Key>,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Makes a dataset of the same pool that begins as the snapshot is, and keeps the snapshot from being destroyed. Not mounted if
    /// `canmount=noauto` is among `properties`. Where they can't be set in one step (zfs-fuse) they are set in the order given, so that
    /// the last of them may say that the clone is complete.
    fn clone_snapshot(
        &self,
        snapshot: &SnapshotName,
        target: &DatasetName,
        properties: &[Property],
    ) -> impl Future<Output = Result<()>> + Send;

    /// A filesystem's or volume's state.
    fn dataset(&self, name: &DatasetName) -> impl Future<Output = Result<Dataset>> + Send;

    /// The filesystems and volumes directly below `parent`, by name. Those whose names [`DatasetName`] doesn't allow are left out.
    fn children(&self, parent: &DatasetName) -> impl Future<Output = Result<Vec<Dataset>>> + Send;

    /// Sets one property. Idempotent.
    fn set_property(&self, name: &DatasetName, property: &Property) -> impl Future<Output = Result<()>> + Send;

    /// Sets `readonly`. Idempotent.
    fn set_readonly(&self, name: &DatasetName, readonly: bool) -> impl Future<Output = Result<()>> + Send;

    /// A dataset's own snapshots, oldest first.
    fn snapshots(&self, dataset: &DatasetName) -> impl Future<Output = Result<Vec<Snapshot>>> + Send;

    /// Takes a snapshot.
    fn snapshot(&self, name: &SnapshotName) -> impl Future<Output = Result<Snapshot>> + Send;

    /// Takes snapshots of several datasets, all with the same short name, at one moment (in one transaction of the pool): all of them or
    /// none. Idempotent: those of an earlier call are given again, known by their common transaction; `AlreadyExists` if there are
    /// others of that name.
    ///
    /// `parent` is above all of the datasets. Where ZFS takes only one name (zfs-fuse) everything below it is snapshotted, and what was not
    /// asked for is destroyed right after: it carries the user property `portolan:snapshot-all`, and the same call, or
    /// [`clean_up_snapshot_all`](Self::clean_up_snapshot_all), cleans up after one that was killed. Until then a receive into one of those
    /// datasets is refused as `Diverged`.
    fn snapshot_all(
        &self,
        parent: &DatasetName,
        datasets: &[DatasetName],
        short: &str,
    ) -> impl Future<Output = Result<Vec<Snapshot>>> + Send;

    /// Destroys what a [`snapshot_all`](Self::snapshot_all) of this short name that was killed has taken besides `datasets`. Takes nothing;
    /// idempotent; not while that call runs.
    fn clean_up_snapshot_all(
        &self,
        parent: &DatasetName,
        datasets: &[DatasetName],
        short: &str,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Gives a snapshot another short name; its GUID and its clones stay. `AlreadyExists` if another has that name.
    fn rename_snapshot(&self, name: &SnapshotName, short: &str) -> impl Future<Output = Result<()>> + Send;

    /// Destroys one snapshot. A held one is `Busy`, one with clones `HasClones`, and so is one on which a resumable receive has begun to build.
    fn destroy_snapshot(&self, name: &SnapshotName) -> impl Future<Output = Result<()>> + Send;

    /// Destroys a snapshot at once if nothing holds or clones it, else as soon as nothing does. Idempotent until it is gone.
    fn destroy_snapshot_deferred(&self, name: &SnapshotName) -> impl Future<Output = Result<()>> + Send;

    /// Destroys an unmounted dataset that has neither snapshots nor children.
    fn destroy_dataset(&self, name: &DatasetName) -> impl Future<Output = Result<()>> + Send;

    /// Unmounts a dataset (never by force) and destroys its own snapshots and itself. Refused, with all left as it is, if there are datasets
    /// below it, if one of its snapshots is held (`Busy`), or if one has clones (`HasClones`, naming them).
    /// A volume whose device is open is `Busy`, but its snapshots are gone by then.
    /// What a resumable receive has kept goes first. Interrupted anywhere, it goes on when called again; `NotFound` if there is nothing to destroy.
    fn destroy_with_snapshots(&self, name: &DatasetName) -> impl Future<Output = Result<()>> + Send;

    /// Keeps a snapshot from being destroyed until `tag` is released. Idempotent.
    fn hold(&self, name: &SnapshotName, tag: &str) -> impl Future<Output = Result<()>> + Send;

    /// Releases a hold. Idempotent.
    fn release(&self, name: &SnapshotName, tag: &str) -> impl Future<Output = Result<()>> + Send;

    /// Mounts a dataset at its mountpoint; `KeyNotLoaded` if it is sealed. Idempotent.
    fn mount(&self, name: &DatasetName) -> impl Future<Output = Result<()>> + Send;

    /// Unmounts a dataset, never by force: open files make it `Busy`. Idempotent.
    fn unmount(&self, name: &DatasetName) -> impl Future<Output = Result<()>> + Send;

    /// Whether a dataset is mounted.
    fn is_mounted(&self, name: &DatasetName) -> impl Future<Output = Result<bool>> + Send;

    /// Renames an unmounted dataset within its pool.
    fn rename(&self, from: &DatasetName, to: &DatasetName) -> impl Future<Output = Result<()>> + Send;

    /// Starts the stream of a snapshot: in full, or what came after a base. `Unsupported` if the options ask for what ZFS can't do.
    fn send(&self, name: &SnapshotName, options: &SendOptions) -> impl Future<Output = Result<SendStream>> + Send;

    /// About how many bytes that stream would have; none where ZFS doesn't say.
    fn send_size(&self, name: &SnapshotName, options: &SendOptions)
    -> impl Future<Output = Result<Option<u64>>> + Send;

    /// What [`send_resume`](Self::send_resume) would send for a token. `NotFound` if its snapshot, or the one it started from, is there no more. A token
    /// that says anything else than Portolan's own streams have in theirs is an error.
    fn rest_of(&self, token: &str) -> impl Future<Output = Result<Rest>> + Send;

    /// Starts the rest of a stream that was cut: the receiver's [`Dataset::resume_token`] says which. As it began, so it goes on: raw or not.
    fn send_resume(&self, token: &str) -> impl Future<Output = Result<SendStream>> + Send;

    /// Starts to receive a stream into `dataset`: a new one for a full stream, one whose newest snapshot is the base for an incremental one,
    /// one with a resume token for the rest of a stream.
    fn receive(
        &self,
        dataset: &DatasetName,
        options: &ReceiveOptions,
    ) -> impl Future<Output = Result<ReceiveProcess>> + Send;

    /// Gives up what a resumable receive has kept: the dataset is as it was before, or gone if there was none. Idempotent.
    fn abort_receive(&self, dataset: &DatasetName) -> impl Future<Output = Result<()>> + Send;

    /// Makes a bookmark of a snapshot of the same dataset. Idempotent; `AlreadyExists` if one of that name is another snapshot's.
    fn bookmark(&self, snapshot: &SnapshotName, name: &BookmarkName) -> impl Future<Output = Result<()>> + Send;

    /// A dataset's bookmarks, in the order of their snapshots.
    fn bookmarks(&self, dataset: &DatasetName) -> impl Future<Output = Result<Vec<Bookmark>>> + Send;

    /// Destroys a bookmark.
    fn destroy_bookmark(&self, name: &BookmarkName) -> impl Future<Output = Result<()>> + Send;

    /// Loads the key of an encryption root; `WrongKey` if it is another's, also where the right one is loaded already. Idempotent.
    fn load_key(&self, name: &DatasetName, key: &Key) -> impl Future<Output = Result<()>> + Send;

    /// Unloads it; `Busy` while something it seals is mounted. Idempotent.
    fn unload_key(&self, name: &DatasetName) -> impl Future<Output = Result<()>> + Send;
}
