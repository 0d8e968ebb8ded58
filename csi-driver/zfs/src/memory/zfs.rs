//! Each of the trait's calls.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::state::{State, failure};
use super::{Memory, Result};
use crate::api::Zfs;
use crate::error::{ErrorKind, ZfsError};
use crate::key::Key;
use crate::model::{Bookmark, Dataset, PoolHealth, Rest, Snapshot, Space};
use crate::name::{BookmarkName, DatasetName, Guid, Property, SnapshotName};
use crate::options::{ReceiveOptions, SendOptions};
use crate::probe::Probe;
use crate::stream::{ReceiveProcess, SendStream};

impl Zfs for Memory {
    async fn probe(&self) -> Result<Probe> {
        self.call("probe", "", |state| Ok(state.probe())).await
    }

    async fn pool_health(&self, dataset: &DatasetName) -> Result<PoolHealth> {
        self.call("pool_health", dataset, |state| match dataset.pool() == state.pool {
            true => Ok(state.health.clone()),
            false => Err(failure(ErrorKind::PoolUnavailable, "pool_health", dataset, "no such pool")),
        })
        .await
    }

    async fn pool_status(&self, dataset: &DatasetName) -> Result<String> {
        self.pool_health(dataset).await.map(|health| health.to_string())
    }

    async fn receives_compressed(&self, _: &DatasetName) -> Result<bool> {
        Ok(self.lock().capabilities.compressed_send)
    }

    async fn pool_guid(&self, dataset: &DatasetName) -> Result<Guid> {
        self.call("pool_guid", dataset, |state| match dataset.pool() == state.pool {
            true => Ok(Guid(state.guid)),
            false => Err(failure(ErrorKind::PoolUnavailable, "pool_guid", dataset, "no such pool")),
        })
        .await
    }

    async fn space(&self, dataset: &DatasetName) -> Result<Space> {
        self.call("space", dataset, |state| {
            state.entry(dataset, "space")?;
            let used = state.used();
            Ok(Space { used, available: state.capacity.saturating_sub(used) })
        })
        .await
    }

    async fn create_filesystem(&self, name: &DatasetName, properties: &[Property], key: Option<&Key>) -> Result<()> {
        self.call("create_filesystem", name, |state| {
            state.make(name, properties, key)?.mount_if_automatic();
            Ok(())
        })
        .await
    }

    async fn create_volume(
        &self,
        name: &DatasetName,
        size: u64,
        properties: &[Property],
        key: Option<&Key>,
    ) -> Result<()> {
        self.call("create_volume", name, |state| {
            state.need("zvol", |can| can.zvol, "create_volume", name)?;
            state.make(name, properties, key)?.size = Some(size);
            Ok(())
        })
        .await
    }

    async fn clone_snapshot(
        &self,
        snapshot: &SnapshotName,
        target: &DatasetName,
        properties: &[Property],
    ) -> Result<()> {
        // As with zfs-fuse, which can't do both at once.
        let apart = !self.lock().capabilities.receive_properties;
        let first = match apart {
            true => &[Property::canmount_noauto()],
            false => properties,
        };
        let act = |state: &mut State| state.clone_to(snapshot, target, first);
        self.call("clone_snapshot", format!("{snapshot} {target}"), act).await?;
        for property in properties.iter().filter(|_| apart) {
            self.set_property(target, property).await?;
        }
        Ok(())
    }

    async fn dataset(&self, name: &DatasetName) -> Result<Dataset> {
        self.call("dataset", name, |state| {
            let entry = state.entry(name, "dataset")?.clone();
            Ok(state.dataset(name, &entry))
        })
        .await
    }

    async fn children(&self, parent: &DatasetName) -> Result<Vec<Dataset>> {
        self.call("children", parent, |state| {
            state.entry(parent, "children")?;
            let below =
                |name: &DatasetName| name.as_str().rsplit_once('/').is_some_and(|(above, _)| above == parent.as_str());
            Ok(state
                .datasets
                .iter()
                .filter(|(name, _)| below(name))
                .map(|(name, entry)| state.dataset(name, entry))
                .collect())
        })
        .await
    }

    async fn set_property(&self, name: &DatasetName, property: &Property) -> Result<()> {
        self.call("set_property", format!("{name} {property}"), |state| {
            state.entry(name, "set")?;
            // It is kept inside the volume.
            if property.name() == "volsize" && !state.key_available(name) {
                return Err(failure(ErrorKind::KeyNotLoaded, "set", name, "encryption key not loaded"));
            }
            state.entry(name, "set")?.set(std::slice::from_ref(property));
            Ok(())
        })
        .await
    }

    async fn set_readonly(&self, name: &DatasetName, readonly: bool) -> Result<()> {
        self.call("set_readonly", format!("{name} {readonly}"), |state| {
            let property = Property::readonly(readonly);
            state.entry(name, "set")?.properties.insert(property.name().to_owned(), property.value().to_owned());
            Ok(())
        })
        .await
    }

    async fn snapshots(&self, dataset: &DatasetName) -> Result<Vec<Snapshot>> {
        self.call("snapshots", dataset, |state| {
            let entry = state.entry(dataset, "snapshots")?;
            let mut found = entry.snapshots.iter().map(|taken| taken.snapshot(dataset)).collect::<Result<Vec<_>>>()?;
            if let Some(newest) = found.last_mut().filter(|_| entry.modified) {
                newest.used = 1;
            }
            Ok(found)
        })
        .await
    }

    async fn snapshot(&self, name: &SnapshotName) -> Result<Snapshot> {
        self.call("snapshot", name, |state| {
            let txg = state.next();
            state.take(name, txg)
        })
        .await
    }

    async fn snapshot_all(&self, parent: &DatasetName, datasets: &[DatasetName], short: &str) -> Result<Vec<Snapshot>> {
        let act = |state: &mut State| state.take_all(parent, datasets, short);
        let taken = self.call("snapshot_all", format!("{parent}@{short}"), act).await?;
        self.clean_up_snapshot_all(parent, datasets, short).await?;
        Ok(taken)
    }

    async fn clean_up_snapshot_all(&self, parent: &DatasetName, datasets: &[DatasetName], short: &str) -> Result<()> {
        let others = self.lock().others(parent, datasets, short);
        for other in others {
            match self.destroy_snapshot_deferred(&other).await {
                Err(error) if error.kind != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    async fn destroy_snapshot(&self, name: &SnapshotName) -> Result<()> {
        self.call("destroy_snapshot", name, |state| state.destroy_snapshot(name)).await
    }

    async fn destroy_snapshot_deferred(&self, name: &SnapshotName) -> Result<()> {
        self.call("destroy_snapshot_deferred", name, |state| {
            state.taken(name, "destroy")?.deferred = true;
            state.reap(name);
            Ok(())
        })
        .await
    }

    async fn destroy_dataset(&self, name: &DatasetName) -> Result<()> {
        self.call("destroy_dataset", name, |state| state.destroy(name)).await
    }

    async fn destroy_with_snapshots(&self, name: &DatasetName) -> Result<()> {
        let act = |state: &mut State| {
            let part = state.entry(name, "destroy")?.partial.is_some();
            Ok((state.all_to_destroy(name)?, part))
        };
        let (snapshots, part) = self.call("destroy_with_snapshots", name, act).await?;
        if part {
            self.abort_receive(name).await?;
            if !self.lock().datasets.contains_key(name) {
                return Ok(());
            }
        }
        self.unmount(name).await?;
        for snapshot in snapshots {
            self.destroy_snapshot(&snapshot).await?;
        }
        self.destroy_dataset(name).await
    }

    async fn hold(&self, name: &SnapshotName, tag: &str) -> Result<()> {
        self.call("hold", format!("{name} {tag}"), |state| {
            let holds = &mut state.taken(name, "hold")?.holds;
            if !holds.iter().any(|held| held == tag) {
                holds.push(tag.to_owned());
            }
            Ok(())
        })
        .await
    }

    async fn release(&self, name: &SnapshotName, tag: &str) -> Result<()> {
        self.call("release", format!("{name} {tag}"), |state| {
            state.taken(name, "release")?.holds.retain(|held| held != tag);
            state.reap(name);
            Ok(())
        })
        .await
    }

    async fn mount(&self, name: &DatasetName) -> Result<()> {
        self.call("mount", name, |state| {
            if !state.key_available(name) {
                return Err(failure(ErrorKind::KeyNotLoaded, "mount", name, "encryption key not loaded"));
            }
            let entry = state.entry(name, "mount")?;
            if entry.get("mountpoint").is_none_or(|path| !path.starts_with('/')) {
                return Err(failure(ErrorKind::Other, "mount", name, "no mountpoint set"));
            }
            entry.mounted = true;
            Ok(())
        })
        .await
    }

    async fn unmount(&self, name: &DatasetName) -> Result<()> {
        self.call("unmount", name, |state| state.unmount(name)).await
    }

    async fn is_mounted(&self, name: &DatasetName) -> Result<bool> {
        self.call("is_mounted", name, |state| Ok(state.entry(name, "is_mounted")?.mounted)).await
    }

    async fn rename_snapshot(&self, name: &SnapshotName, short: &str) -> Result<()> {
        self.call("rename_snapshot", format!("{name} {short}"), |state| state.rename_snapshot(name, short)).await
    }

    async fn rename(&self, from: &DatasetName, to: &DatasetName) -> Result<()> {
        self.call("rename", format!("{from} {to}"), |state| {
            if state.entry(from, "rename")?.mounted {
                return Err(failure(ErrorKind::Busy, "rename", from, "dataset is busy"));
            }
            state.create(to, "rename")?;
            if let Some(entry) = state.datasets.remove(from) {
                state.datasets.insert(to.clone(), entry);
            }
            state.move_origins(from, to);
            Ok(())
        })
        .await
    }

    async fn send(&self, name: &SnapshotName, options: &SendOptions) -> Result<SendStream> {
        let about = if options.compressed { format!("{name} -c") } else { name.to_string() };
        let bytes = self.call("send", about, |state| state.stream(name, options)).await?;
        Ok(self.sending(bytes, name.to_string()))
    }

    async fn send_size(&self, name: &SnapshotName, options: &SendOptions) -> Result<Option<u64>> {
        self.call("send_size", name, |state| match state.capabilities.send_size {
            true => state.stream(name, options).map(|bytes| Some(bytes.len() as u64)),
            false => Ok(None),
        })
        .await
    }

    async fn rest_of(&self, token: &str) -> Result<Rest> {
        self.call("rest_of", token, |state| state.rest_of(token)).await
    }

    async fn send_resume(&self, token: &str) -> Result<SendStream> {
        let bytes = self.call("send_resume", token, |state| state.rest(token)).await?;
        Ok(self.sending(bytes, token.to_owned()))
    }

    async fn receive(&self, dataset: &DatasetName, options: &ReceiveOptions) -> Result<ReceiveProcess> {
        self.call("receive", dataset, |state| match options.resumable {
            true => state.need("resume", |can| can.resume, "receive", dataset),
            false => Ok(()),
        })
        .await?;
        let (writer, mut reader) = tokio::io::duplex(64 * 1024);
        // The process at the other end of the pipe: it reads whether or not somebody waits for it.
        // As with zfs-fuse: whoever waits for the process sets them when it has ended.
        let apart = !self.lock().capabilities.receive_properties;
        let mut options = options.clone();
        let later = if apart { std::mem::take(&mut options.properties) } else { Vec::new() };
        let (memory, name) = (self.clone(), dataset.clone());
        let received = tokio::spawn(async move {
            let mut bytes = Vec::new();
            let _ = reader.read_to_end(&mut bytes).await;
            let _ = reader.shutdown().await;
            memory.call("receive_end", &name, |state| state.receive(&name, &bytes, &options)).await
        });
        let (memory, name) = (self.clone(), dataset.clone());
        let outcome = async move {
            received.await.unwrap_or_else(|e| Err(ZfsError::new(ErrorKind::Other, "receive", e.to_string())))?;
            for property in &later {
                memory.set_property(&name, property).await?;
            }
            Ok(())
        };
        Ok(ReceiveProcess::new(writer, Box::pin(outcome)))
    }

    async fn abort_receive(&self, dataset: &DatasetName) -> Result<()> {
        self.call("abort_receive", dataset, |state| state.abort_receive(dataset)).await
    }

    async fn bookmark(&self, snapshot: &SnapshotName, name: &BookmarkName) -> Result<()> {
        self.call("bookmark", format!("{snapshot} {name}"), |state| state.bookmark(snapshot, name)).await
    }

    async fn bookmarks(&self, dataset: &DatasetName) -> Result<Vec<Bookmark>> {
        self.call("bookmarks", dataset, |state| state.bookmarks(dataset)).await
    }

    async fn destroy_bookmark(&self, name: &BookmarkName) -> Result<()> {
        self.call("destroy_bookmark", name, |state| state.destroy_bookmark(name)).await
    }

    async fn load_key(&self, name: &DatasetName, key: &Key) -> Result<()> {
        self.call("load_key", name, |state| state.load_key(name, key)).await
    }

    async fn unload_key(&self, name: &DatasetName) -> Result<()> {
        self.call("unload_key", name, |state| state.unload_key(name)).await
    }
}

impl Memory {
    fn sending(&self, bytes: Vec<u8>, about: String) -> SendStream {
        let memory = self.clone();
        let outcome = async move { memory.call("send_end", about, |_| Ok(())).await };
        SendStream::new(std::io::Cursor::new(bytes), Box::pin(outcome))
    }
}
