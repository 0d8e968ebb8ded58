//! [`Zfs`] by the commands `zfs` and `zpool`.

mod datasets;
mod keys;
mod look;
mod snapshots;
mod streams;

pub(crate) use self::streams::refuse_mixing;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, OnceCell};

use crate::api::Zfs;
use crate::error::{ErrorKind, ZfsError};
use crate::key::Key;
use crate::model::{Bookmark, Dataset, PoolHealth, Rest, Snapshot, Space};
use crate::name::{BookmarkName, DatasetName, Guid, Property, SnapshotName};
use crate::options::{ReceiveOptions, SendOptions};
use crate::parse;
use crate::probe::Probe;
use crate::runner::Runner;
use crate::stream::{ReceiveProcess, SendStream};

/// How often, and how far apart, a call is made again that ZFS refuses as busy: zfs-fuse does so at random right after an unmount, to
/// a mount as well as to a destroy.
const BUSY_TRIES: u32 = 8;
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// The host's own ZFS.
#[derive(Clone, Debug)]
pub struct CommandLine {
    runner: Runner,
    probed: OnceCell<Probe>,
    /// Held while something is mounted: two mounts at once make zfs-fuse hang for good.
    mounting: Arc<Mutex<()>>,
}

impl CommandLine {
    /// Runs `zfs` and `zpool` with this runner.
    pub fn new(runner: Runner) -> Self {
        Self { runner, probed: OnceCell::new(), mounting: Arc::default() }
    }

    /// Runs a command about a dataset.
    async fn run(&self, about: &DatasetName, words: &[&str]) -> Result<String, ZfsError> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        match self.runner.run(&words).await {
            Ok(output) => Ok(output.stdout),
            Err(error) if error.kind == ErrorKind::NotFound => Err(self.missing(about, error).await),
            Err(error) => Err(error),
        }
    }

    /// `zfs` says "dataset does not exist" of every dataset of a pool that is not imported: only a pool that answers makes that an absence.
    async fn missing(&self, about: &DatasetName, error: ZfsError) -> ZfsError {
        match self.pool_state(about.pool()).await {
            Ok(_) => error,
            Err(pool) => ZfsError {
                kind: ErrorKind::PoolUnavailable,
                stderr: format!("{}\n{}", error.stderr.trim_end(), pool.stderr),
                ..error
            },
        }
    }

    async fn pool_state(&self, pool: &str) -> Result<String, ZfsError> {
        self.zpool(&["list", "-H", "-o", "health", pool]).await.map(|state| state.trim().to_owned())
    }

    async fn zpool(&self, words: &[&str]) -> Result<String, ZfsError> {
        let words: Vec<String> = ["zpool"].iter().chain(words).map(|word| (*word).to_owned()).collect();
        Ok(self.runner.run(&words).await?.stdout)
    }

    /// Runs a command again while it is refused as busy, a bounded number of times.
    async fn run_unless_busy(&self, about: &DatasetName, words: &[&str]) -> Result<String, ZfsError> {
        for _ in 1..BUSY_TRIES {
            match self.run(about, words).await {
                Err(error) if error.kind == ErrorKind::Busy => tokio::time::sleep(BUSY_PAUSE).await,
                result => return result,
            }
        }
        self.run(about, words).await
    }

    /// Runs a command that reads a key from its standard input.
    async fn run_with_key(&self, about: &DatasetName, words: &[String], key: &Key) -> Result<(), ZfsError> {
        match self.runner.run_with_input(words, key.material()).await {
            Ok(_) => Ok(()),
            Err(error) if error.kind == ErrorKind::NotFound => Err(self.missing(about, error).await),
            Err(error) => Err(error),
        }
    }
}

/// A command that ended well and printed what we don't understand.
fn odd_output(words: &[&str], why: &str) -> ZfsError {
    ZfsError::new(ErrorKind::Other, words.join(" "), why)
}

/// `Ok` if the error says that what was wanted is so already.
fn already<T>(result: Result<T, ZfsError>, message: &str) -> Result<(), ZfsError> {
    match result {
        Err(error) if !error.stderr.contains(message) => Err(error),
        _ => Ok(()),
    }
}

impl Zfs for CommandLine {
    async fn probe(&self) -> Result<Probe, ZfsError> {
        self.probed().await.cloned()
    }

    async fn pool_health(&self, dataset: &DatasetName) -> Result<PoolHealth, ZfsError> {
        self.pool_state(dataset.pool()).await.map(|state| PoolHealth::parse(&state))
    }

    async fn pool_status(&self, dataset: &DatasetName) -> Result<String, ZfsError> {
        self.zpool(&["status", dataset.pool()]).await.map(|text| parse::pool_summary(&text))
    }

    async fn pool_guid(&self, dataset: &DatasetName) -> Result<Guid, ZfsError> {
        let words = ["list", "-H", "-o", "guid", dataset.pool()];
        let printed = self.zpool(&words).await?;
        printed.trim().parse().map_err(|error| odd_output(&words, &format!("{error}")))
    }

    async fn receives_compressed(&self, dataset: &DatasetName) -> Result<bool, ZfsError> {
        if !self.probed().await?.capabilities.compressed_send {
            return Ok(false);
        }
        // In one command, and refused as a whole by a ZFS that doesn't know them all.
        let features = "feature@lz4_compress,feature@zstd_compress";
        match self.zpool(&["get", "-H", "-o", "value", features, dataset.pool()]).await {
            Ok(printed) => Ok(parse::are_enabled(&printed, 2)),
            Err(error) if error.kind == ErrorKind::PoolUnavailable => Err(error),
            Err(_) => Ok(false),
        }
    }

    async fn space(&self, dataset: &DatasetName) -> Result<Space, ZfsError> {
        let words = ["zfs", "get", "-Hp", "-o", parse::COLUMNS, "used,available", dataset.as_str()];
        parse::space(&self.run(dataset, &words).await?).map_err(|why| odd_output(&words, &why))
    }

    async fn create_filesystem(
        &self,
        name: &DatasetName,
        properties: &[Property],
        key: Option<&Key>,
    ) -> Result<(), ZfsError> {
        self.create(name, None, properties, key).await
    }

    async fn create_volume(
        &self,
        name: &DatasetName,
        size: u64,
        properties: &[Property],
        key: Option<&Key>,
    ) -> Result<(), ZfsError> {
        self.create(name, Some(size), properties, key).await
    }

    async fn clone_snapshot(
        &self,
        snapshot: &SnapshotName,
        target: &DatasetName,
        properties: &[Property],
    ) -> Result<(), ZfsError> {
        self.clone_to(snapshot, target, properties).await
    }

    async fn dataset(&self, name: &DatasetName) -> Result<Dataset, ZfsError> {
        let found = self.datasets(name, "0").await?;
        let is_it = |dataset: &Dataset| dataset.name == *name;
        found.into_iter().find(is_it).ok_or_else(|| {
            ZfsError::new(ErrorKind::Other, format!("zfs get all {name}"), "is neither a filesystem nor a volume")
        })
    }

    async fn children(&self, parent: &DatasetName) -> Result<Vec<Dataset>, ZfsError> {
        let mut found = self.datasets(parent, "1").await?;
        found.retain(|dataset| dataset.name != *parent);
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    async fn set_property(&self, name: &DatasetName, property: &Property) -> Result<(), ZfsError> {
        self.run(name, &["zfs", "set", &property.to_string(), name.as_str()]).await.map(drop)
    }

    async fn set_readonly(&self, name: &DatasetName, readonly: bool) -> Result<(), ZfsError> {
        self.set_property(name, &Property::readonly(readonly)).await
    }

    async fn snapshots(&self, dataset: &DatasetName) -> Result<Vec<Snapshot>, ZfsError> {
        self.snapshots_of(dataset).await
    }

    async fn snapshot(&self, name: &SnapshotName) -> Result<Snapshot, ZfsError> {
        self.take(name).await
    }

    async fn snapshot_all(
        &self,
        parent: &DatasetName,
        datasets: &[DatasetName],
        short: &str,
    ) -> Result<Vec<Snapshot>, ZfsError> {
        self.take_all(parent, datasets, short).await
    }

    async fn clean_up_snapshot_all(
        &self,
        parent: &DatasetName,
        datasets: &[DatasetName],
        short: &str,
    ) -> Result<(), ZfsError> {
        self.clean_up(parent, datasets, short).await
    }

    async fn destroy_snapshot(&self, name: &SnapshotName) -> Result<(), ZfsError> {
        self.run_unless_busy(name.dataset(), &["zfs", "destroy", &name.to_string()]).await.map(drop)
    }

    async fn destroy_snapshot_deferred(&self, name: &SnapshotName) -> Result<(), ZfsError> {
        self.run_unless_busy(name.dataset(), &["zfs", "destroy", "-d", &name.to_string()]).await.map(drop)
    }

    async fn destroy_dataset(&self, name: &DatasetName) -> Result<(), ZfsError> {
        // `zfs destroy` would unmount it.
        if self.is_mounted(name).await? {
            return Err(ZfsError::new(ErrorKind::Busy, format!("zfs destroy {name}"), "it is mounted"));
        }
        self.run_unless_busy(name, &["zfs", "destroy", name.as_str()]).await.map(drop)
    }

    async fn destroy_with_snapshots(&self, name: &DatasetName) -> Result<(), ZfsError> {
        self.destroy_all_of(name).await
    }

    async fn hold(&self, name: &SnapshotName, tag: &str) -> Result<(), ZfsError> {
        let tag = checked_tag(tag)?;
        already(self.run(name.dataset(), &["zfs", "hold", tag, &name.to_string()]).await, "tag already exists")
    }

    async fn release(&self, name: &SnapshotName, tag: &str) -> Result<(), ZfsError> {
        let tag = checked_tag(tag)?;
        already(self.run(name.dataset(), &["zfs", "release", tag, &name.to_string()]).await, "no such tag")
    }

    async fn mount(&self, name: &DatasetName) -> Result<(), ZfsError> {
        let _alone = self.mounting.lock().await;
        already(self.run_unless_busy(name, &["zfs", "mount", name.as_str()]).await, "already mounted")
    }

    async fn unmount(&self, name: &DatasetName) -> Result<(), ZfsError> {
        already(self.run_unless_busy(name, &["zfs", "unmount", name.as_str()]).await, "not currently mounted")
    }

    async fn is_mounted(&self, name: &DatasetName) -> Result<bool, ZfsError> {
        let mounted = self.run(name, &["zfs", "get", "-Hp", "-o", "value", "mounted", name.as_str()]).await?;
        Ok(mounted.trim() == "yes")
    }

    async fn rename_snapshot(&self, name: &SnapshotName, short: &str) -> Result<(), ZfsError> {
        self.rename_taken(name, short).await
    }

    async fn rename(&self, from: &DatasetName, to: &DatasetName) -> Result<(), ZfsError> {
        self.run_unless_busy(from, &["zfs", "rename", from.as_str(), to.as_str()]).await.map(drop)
    }

    async fn send(&self, name: &SnapshotName, options: &SendOptions) -> Result<SendStream, ZfsError> {
        self.send_snapshot(name, options).await
    }

    async fn send_size(&self, name: &SnapshotName, options: &SendOptions) -> Result<Option<u64>, ZfsError> {
        self.estimate(name, options).await
    }

    async fn rest_of(&self, token: &str) -> Result<Rest, ZfsError> {
        self.look_at_rest(token).await
    }

    async fn send_resume(&self, token: &str) -> Result<SendStream, ZfsError> {
        self.resume(token).await
    }

    async fn receive(&self, dataset: &DatasetName, options: &ReceiveOptions) -> Result<ReceiveProcess, ZfsError> {
        self.receive_into(dataset, options).await
    }

    async fn abort_receive(&self, dataset: &DatasetName) -> Result<(), ZfsError> {
        self.abort(dataset).await
    }

    async fn bookmark(&self, snapshot: &SnapshotName, name: &BookmarkName) -> Result<(), ZfsError> {
        self.make_bookmark(snapshot, name).await
    }

    async fn bookmarks(&self, dataset: &DatasetName) -> Result<Vec<Bookmark>, ZfsError> {
        self.bookmarks_of(dataset).await
    }

    async fn destroy_bookmark(&self, name: &BookmarkName) -> Result<(), ZfsError> {
        self.drop_bookmark(name).await
    }

    async fn load_key(&self, name: &DatasetName, key: &Key) -> Result<(), ZfsError> {
        self.key_in(name, key).await
    }

    async fn unload_key(&self, name: &DatasetName) -> Result<(), ZfsError> {
        self.key_out(name).await
    }
}

/// A hold's tag may be what a snapshot's short name may be, and not begin like an option.
fn checked_tag(tag: &str) -> Result<&str, ZfsError> {
    let good = tag.len() < 256
        && tag.starts_with(|c: char| c.is_ascii_alphanumeric())
        && tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':'));
    match good {
        true => Ok(tag),
        false => Err(ZfsError::new(
            ErrorKind::Other,
            "zfs hold",
            format!("tag {tag:?} is not valid: allowed is A-Z a-z 0-9 - _ . :, not beginning with a sign"),
        )),
    }
}
