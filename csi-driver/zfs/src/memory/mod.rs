//! [`Zfs`] in memory, for tests of what stands on it: the same answers as the real one, and failures where they are asked for.

mod state;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use self::state::{Entry, State, Stream, Taken, failure};
use crate::api::Zfs;
use crate::error::{ErrorKind, ZfsError};
use crate::model::{Dataset, PoolHealth, Snapshot, Space};
use crate::name::{DatasetName, Property, SnapshotName};
use crate::probe::{Capabilities, Implementation, Probe};
use crate::stream::{ReceiveProcess, SendStream};

/// What to do instead of an operation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// Fail and do nothing.
    Fail(ErrorKind),
    /// Do it, then fail: the answer was lost.
    FailAfter(ErrorKind),
    /// Never answer.
    Hang,
}

/// ZFS in memory. Clones are the same.
#[derive(Clone, Debug)]
pub struct Memory {
    state: Arc<Mutex<State>>,
}

type Result<T> = std::result::Result<T, ZfsError>;

impl Memory {
    /// A pool with nothing in it.
    pub fn new(pool: &DatasetName, capacity: u64) -> Self {
        let root = Entry { guid: 1, ..Entry::default() };
        let state = State {
            pool: pool.pool().to_owned(),
            capacity,
            health: PoolHealth::Online,
            imported: true,
            // GUIDs must differ between pools: where it lies in memory does.
            last: 0,
            datasets: BTreeMap::new(),
            faults: Vec::new(),
            calls: Vec::new(),
        };
        let memory = Self { state: Arc::new(Mutex::new(state)) };
        let seed = (Arc::as_ptr(&memory.state) as usize as u64) << 16;
        let mut state = memory.lock();
        state.last = seed;
        // The pool's own dataset, and those on the way to the one that was named.
        let mut name = String::new();
        for part in pool.as_str().split('/') {
            name = if name.is_empty() { part.to_owned() } else { format!("{name}/{part}") };
            if let Ok(name) = DatasetName::new(name.clone()) {
                state.datasets.insert(name, root.clone());
            }
        }
        drop(state);
        memory
    }

    /// Lets the `nth` call of an operation from now on (1 is the next) go wrong. Operations are called as the trait's functions are;
    /// `send_end` and `receive_end` are what the processes do when their streams have ended.
    pub fn inject(&self, operation: &'static str, nth: u32, fault: Fault) {
        self.lock().faults.push((operation, nth, fault));
    }

    /// Whether the pool is there.
    pub fn set_imported(&self, imported: bool) {
        self.lock().imported = imported;
    }

    /// The pool's health.
    pub fn set_health(&self, health: PoolHealth) {
        self.lock().health = health;
    }

    /// All calls so far: `create_filesystem tank/a`.
    pub fn calls(&self) -> Vec<String> {
        self.lock().calls.clone()
    }

    /// Writes a dataset's content, as a pod would: it must be mounted and writable.
    pub fn write(&self, name: &DatasetName, data: &[u8]) -> Result<()> {
        let mut state = self.lock();
        let entry = state.entry(name, "write")?;
        if !entry.mounted || entry.get("readonly") == Some("on") {
            return Err(failure(ErrorKind::Other, "write", name, "not mounted, or read-only"));
        }
        entry.data = data.to_vec();
        entry.modified = true;
        Ok(())
    }

    /// A dataset's content.
    pub fn read(&self, name: &DatasetName) -> Result<Vec<u8>> {
        Ok(self.lock().entry(name, "read")?.data.clone())
    }

    /// Whether somebody has a file open in it.
    pub fn set_open(&self, name: &DatasetName, open: bool) -> Result<()> {
        self.lock().entry(name, "open")?.open = open;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One call: counts it, lets it go wrong if that was asked for, else does it.
    async fn call<T>(
        &self,
        operation: &'static str,
        about: impl ToString,
        act: impl FnOnce(&mut State) -> Result<T>,
    ) -> Result<T> {
        let about = about.to_string();
        let failed = |kind| ZfsError::new(kind, format!("{operation} {about}"), "injected");
        let fault = {
            let mut state = self.lock();
            state.calls.push(format!("{operation} {about}"));
            state.fault(operation)
        };
        match fault {
            Some(Fault::Fail(kind)) => return Err(failed(kind)),
            Some(Fault::Hang) => std::future::pending::<()>().await,
            Some(Fault::FailAfter(_)) | None => {}
        }
        let mut state = self.lock();
        if !state.imported {
            return Err(ZfsError::new(ErrorKind::PoolUnavailable, format!("{operation} {about}"), "no such pool"));
        }
        let done = act(&mut state)?;
        match fault {
            Some(Fault::FailAfter(kind)) => Err(failed(kind)),
            _ => Ok(done),
        }
    }
}

impl Zfs for Memory {
    async fn probe(&self) -> Result<Probe> {
        let probe = Probe {
            implementation: Implementation::Memory,
            version: "0".into(),
            capabilities: Capabilities::default(),
        };
        self.call("probe", "", |_| Ok(probe)).await
    }

    async fn pool_health(&self, dataset: &DatasetName) -> Result<PoolHealth> {
        self.call("pool_health", dataset, |state| match dataset.pool() == state.pool {
            true => Ok(state.health.clone()),
            false => Err(failure(ErrorKind::PoolUnavailable, "pool_health", dataset, "no such pool")),
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

    async fn create_filesystem(&self, name: &DatasetName, properties: &[Property]) -> Result<()> {
        self.call("create_filesystem", name, |state| {
            let entry = state.create(name, "create")?;
            entry.modified = true;
            entry.properties = properties.iter().map(|p| (p.name().to_owned(), p.value().to_owned())).collect();
            entry.mounted = entry.get("canmount") != Some("noauto")
                && entry.get("mountpoint").is_some_and(|path| path.starts_with('/'));
            Ok(())
        })
        .await
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
            let entry = state.entry(name, "set")?;
            entry.properties.insert(property.name().to_owned(), property.value().to_owned());
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
            state.entry(dataset, "snapshots")?.snapshots.iter().map(|taken| taken.snapshot(dataset)).collect()
        })
        .await
    }

    async fn snapshot(&self, name: &SnapshotName) -> Result<Snapshot> {
        self.call("snapshot", name, |state| {
            let (guid, txg) = (state.next(), state.next());
            let entry = state.entry(name.dataset(), "snapshot")?;
            if entry.snapshots.iter().any(|taken| taken.short == name.short()) {
                return Err(failure(ErrorKind::AlreadyExists, "snapshot", name, "dataset already exists"));
            }
            entry.modified = false;
            let taken =
                Taken { short: name.short().to_owned(), guid, txg, holds: Vec::new(), data: entry.data.clone() };
            let snapshot = taken.snapshot(name.dataset());
            entry.snapshots.push(taken);
            snapshot
        })
        .await
    }

    async fn destroy_snapshot(&self, name: &SnapshotName) -> Result<()> {
        self.call("destroy_snapshot", name, |state| {
            if !state.taken(name, "destroy")?.holds.is_empty() {
                return Err(failure(ErrorKind::Busy, "destroy", name, "dataset is busy"));
            }
            state.entry(name.dataset(), "destroy")?.snapshots.retain(|taken| taken.short != name.short());
            Ok(())
        })
        .await
    }

    async fn destroy_dataset(&self, name: &DatasetName) -> Result<()> {
        self.call("destroy_dataset", name, |state| state.destroy(name)).await
    }

    async fn destroy_with_snapshots(&self, name: &DatasetName) -> Result<()> {
        self.call("destroy_with_snapshots", name, |state| {
            let children = state.has_children(name);
            let entry = state.entry(name, "destroy")?;
            if children {
                return Err(failure(ErrorKind::Other, "destroy", name, "there are datasets below it"));
            }
            if entry.snapshots.iter().any(|taken| !taken.holds.is_empty()) {
                return Err(failure(ErrorKind::Busy, "destroy", name, "a snapshot is held"));
            }
            state.unmount(name)?;
            state.entry(name, "destroy")?.snapshots.clear();
            state.destroy(name)
        })
        .await
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
            Ok(())
        })
        .await
    }

    async fn mount(&self, name: &DatasetName) -> Result<()> {
        self.call("mount", name, |state| {
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

    async fn rename(&self, from: &DatasetName, to: &DatasetName) -> Result<()> {
        self.call("rename", format!("{from} {to}"), |state| {
            if state.entry(from, "rename")?.mounted {
                return Err(failure(ErrorKind::Busy, "rename", from, "dataset is busy"));
            }
            state.create(to, "rename")?;
            if let Some(entry) = state.datasets.remove(from) {
                state.datasets.insert(to.clone(), entry);
            }
            Ok(())
        })
        .await
    }

    async fn send(&self, name: &SnapshotName, base: Option<&SnapshotName>) -> Result<SendStream> {
        let stream = self
            .call("send", name, |state| {
                let base = base.map(|base| state.taken(base, "send").map(|taken| taken.guid)).transpose()?;
                let taken = state.taken(name, "send")?;
                let (short, guid, data) = (taken.short.clone(), taken.guid, taken.data.clone());
                Ok(Stream { base, short, guid, data, end: "END".into() })
            })
            .await?;
        let bytes = serde_json::to_vec(&stream).map_err(|e| failure(ErrorKind::Other, "send", name, &e.to_string()))?;
        let (memory, name) = (self.clone(), name.clone());
        let outcome = async move { memory.call("send_end", &name, |_| Ok(())).await };
        Ok(SendStream::new(std::io::Cursor::new(bytes), Box::pin(outcome)))
    }

    async fn receive(&self, dataset: &DatasetName, properties: &[Property]) -> Result<ReceiveProcess> {
        self.call("receive", dataset, |_| Ok(())).await?;
        let (writer, mut reader) = tokio::io::duplex(64 * 1024);
        // The process at the other end of the pipe: it reads whether or not somebody waits for it.
        let (memory, name, properties) = (self.clone(), dataset.clone(), properties.to_vec());
        let received = tokio::spawn(async move {
            let mut bytes = Vec::new();
            let _ = reader.read_to_end(&mut bytes).await;
            let _ = reader.shutdown().await;
            memory.call("receive_end", &name, |state| state.receive(&name, &bytes, &properties)).await
        });
        let outcome = async move {
            received.await.unwrap_or_else(|e| Err(ZfsError::new(ErrorKind::Other, "receive", e.to_string())))
        };
        Ok(ReceiveProcess::new(writer, Box::pin(outcome)))
    }
}
