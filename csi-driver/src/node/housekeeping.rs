//! Looks now and then for what is left over on this node, takes away what holds nobody's data, and names the rest.
//!
//! What is absent from the API proves little: it may be down, or restored from a backup that is older than the volume. So nothing is
//! concluded from an answer that was not whole, and nothing is destroyed that a node has ever owned or that has a snapshot.

use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use kube::ResourceExt;
use kube::api::ListParams;
use portolan_crds::{Orphan, Orphans, PortableVolume};
use portolan_zfs::{Dataset, DatasetName, ErrorKind, Zfs, ZfsError};
use tokio_util::sync::CancellationToken;

use super::Node;
use super::locks::Locks;
use super::orphans::{Collect, Disk, Known, judge, never_used};
use crate::block::mounts::{MountError, Mounts};
use crate::volume::{self, UID_PROPERTY, VOLUME_PROPERTY};

/// How often.
const EVERY: Duration = Duration::from_secs(180);
/// How many are named in the status.
const NAMED: usize = 20;

/// A look that came to nothing; what was found before stands.
#[derive(Debug, thiserror::Error)]
pub(super) enum LookError {
    /// The pool did not answer.
    #[error(transparent)]
    Zfs(#[from] ZfsError),
    /// The mount table or the mountpoints could not be read.
    #[error(transparent)]
    Mounts(#[from] MountError),
    /// The API did not answer.
    #[error("the Kubernetes API: {0}")]
    Api(#[from] kube::Error),
}

/// Who knows which volumes there are.
pub(super) trait Registry {
    /// All volumes and snapshots, or an error.
    fn all(&self) -> impl Future<Output = kube::Result<Known>> + Send;
    /// A volume as it is now; none if there is none of that name.
    fn volume(&self, name: &str) -> impl Future<Output = kube::Result<Option<PortableVolume>>> + Send;
}

impl<Z: Zfs> Registry for Node<Z> {
    async fn all(&self) -> kube::Result<Known> {
        // Without a version: read from a quorum, not from a cache that may lag behind.
        let whole = ListParams::default();
        let (volumes, snapshots) = tokio::try_join!(self.volumes.list(&whole), self.snapshots.list(&whole))?;
        Ok(Known { volumes: volumes.items, snapshots: snapshots.items })
    }

    async fn volume(&self, name: &str) -> kube::Result<Option<PortableVolume>> {
        self.volumes.get_opt(name).await
    }
}

/// Looks at the start and every few minutes until `shutdown`.
pub(super) async fn keep<Z: Zfs>(node: Arc<Node<Z>>, shutdown: CancellationToken) {
    let house = House {
        me: &node.name,
        pool: &node.pool,
        mountpoints: volume::plugin_dir(&node.kubelet_dir).join("volumes"),
        mounts: &node.mounts,
        locks: &node.locks,
        zfs: node.zfs.as_ref(),
        registry: node.as_ref(),
    };
    let work = async {
        loop {
            match house.look().await {
                Ok(found) => *node.orphans.lock().unwrap_or_else(PoisonError::into_inner) = Some(found),
                Err(error) => tracing::warn!(%error, "could not look for what is left over"),
            }
            tokio::time::sleep(EVERY).await;
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = work => {}
    }
}

struct House<'a, Z, R> {
    me: &'a str,
    pool: &'a DatasetName,
    /// Below it volumes are mounted, as the host sees it.
    mountpoints: PathBuf,
    mounts: &'a Mounts,
    locks: &'a Locks,
    zfs: &'a Z,
    registry: &'a R,
}

impl<Z: Zfs, R: Registry> House<'_, Z, R> {
    async fn look(&self) -> Result<Orphans, LookError> {
        // The disk first: what is made meanwhile is in the API and not on the list, never the other way round.
        let disk = self.disk().await?;
        let known = self.registry.all().await?;
        let mut verdict = judge(self.me, self.pool, &disk, &known);
        for collect in std::mem::take(&mut verdict.collect) {
            if let Err(error) = self.collect(&collect).await {
                tracing::warn!(?collect, %error, "something left over that holds nobody's data stays for now");
            }
        }
        for orphan in &verdict.orphans {
            tracing::debug!(name = orphan.name, reason = orphan.reason, message = orphan.message, "left over");
        }
        Ok(summed(verdict.orphans, verdict.foreign))
    }

    async fn disk(&self) -> Result<Disk, LookError> {
        let mut datasets = Vec::new();
        for dataset in self.zfs.children(self.pool).await? {
            if !dataset.user.contains_key(UID_PROPERTY) {
                datasets.push((dataset, Vec::new()));
                continue;
            }
            match self.zfs.snapshots(&dataset.name).await {
                // Destroyed meanwhile, or renamed.
                Err(error) if error.kind == ErrorKind::NotFound => {}
                snapshots => datasets.push((dataset, snapshots?)),
            }
        }
        let mounts = self.mounts.table()?;
        let mut directories = Vec::new();
        for path in self.mounts.directories(&self.mountpoints)? {
            // One of a dataset is not looked into: its pool may hang.
            let named = |dataset: &Dataset| path.file_name().is_some_and(|name| name == dataset.name.short());
            let used = mounts.iter().any(|mount| mount.target.starts_with(&path))
                || datasets.iter().any(|(dataset, _)| named(dataset));
            if !used {
                let empty = self.mounts.is_empty(&path)?;
                directories.push((path, empty));
            }
        }
        Ok(Disk { datasets, mounts, directories })
    }

    /// Takes away what holds nobody's data. What somebody works on is left to the next look.
    async fn collect(&self, what: &Collect) -> Result<(), LookError> {
        match what {
            Collect::Directory(path) => {
                let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                let Some(_lock) = self.locks.try_lock(&name) else { return Ok(()) };
                self.mounts.remove_directory(path)?;
                tracing::info!(path = %path.display(), "removed an empty mountpoint that was left over");
            }
            Collect::Dataset(dataset) => {
                let Some(_lock) = self.locks.try_lock(dataset.name.short()) else { return Ok(()) };
                if self.is_still_nobodys(dataset).await? {
                    self.zfs.destroy_dataset(&dataset.name).await?;
                    tracing::info!(dataset = %dataset.name, "destroyed a dataset that was never used, of a volume that is gone");
                }
            }
        }
        Ok(())
    }

    /// Asks once more, disk and API, right before the end.
    async fn is_still_nobodys(&self, judged: &Dataset) -> Result<bool, LookError> {
        let (now, snapshots) = tokio::try_join!(self.zfs.dataset(&judged.name), self.zfs.snapshots(&judged.name))?;
        let uid = now.user.get(UID_PROPERTY);
        if now.guid != judged.guid || uid != judged.user.get(UID_PROPERTY) || !never_used(&now, &snapshots) {
            return Ok(false);
        }
        let names = [Some(judged.name.short()), now.user.get(VOLUME_PROPERTY).map(String::as_str)];
        for name in names.into_iter().flatten() {
            if self.registry.volume(name).await?.is_some_and(|volume| volume.uid().as_ref() == uid) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn summed(mut orphans: Vec<Orphan>, foreign: i64) -> Orphans {
    let count = i64::try_from(orphans.len()).unwrap_or(i64::MAX);
    let bytes = orphans.iter().filter_map(|orphan| orphan.bytes).fold(0, i64::saturating_add);
    orphans.sort_by(|a, b| (b.bytes, &a.name).cmp(&(a.bytes, &b.name)));
    orphans.truncate(NAMED);
    Orphans { count, bytes, foreign, items: orphans }
}

#[cfg(test)]
mod tests;
