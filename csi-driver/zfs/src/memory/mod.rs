//! [`Zfs`] in memory, for tests of what stands on it: the same answers as the real one, and failures where they are asked for.

mod keys;
mod snapshots;
mod state;
mod stream;
mod zfs;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::state::{Entry, State, failure};
#[cfg(doc)]
use crate::api::Zfs;
use crate::error::{ErrorKind, ZfsError};
use crate::model::{Dataset, PoolHealth, Snapshot};
use crate::name::DatasetName;
use crate::probe::Capabilities;

/// What to do instead of an operation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// Fail and do nothing.
    Fail(ErrorKind),
    /// Do it, then fail: the answer was lost.
    FailAfter(ErrorKind),
    /// Answer as if it were done, and leave all datasets as they are.
    Lie,
    /// Never answer.
    Hang,
}

/// Sees each call that is made by a handle, and decides when it goes on: never, if whoever made it has been killed. Operations are called
/// as for [`Memory::inject`].
pub trait Witness: fmt::Debug + Send + Sync + 'static {
    /// Nothing is done yet.
    fn before<'a>(&'a self, operation: &'static str, about: &'a str) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>;
    /// It is done, or has failed, and nobody has been told.
    fn after<'a>(&'a self, operation: &'static str, about: &'a str) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>;
}

/// A dataset and all that is in it.
#[derive(Clone, Debug)]
pub struct Contents {
    /// Its state.
    pub dataset: Dataset,
    /// Every property that was set on it.
    pub properties: BTreeMap<String, String>,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// What was written to it.
    pub data: Vec<u8>,
}

/// ZFS in memory. Clones are the same. What takes the commands several steps takes it several too, so that it can end between them.
#[derive(Clone, Debug)]
pub struct Memory {
    state: Arc<Mutex<State>>,
    witness: Option<Arc<dyn Witness>>,
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
            capabilities: Capabilities::default(),
            // GUIDs must differ between pools: where it lies in memory does.
            last: 0,
            guid: 0,
            datasets: BTreeMap::new(),
            faults: Vec::new(),
            calls: Vec::new(),
        };
        let memory = Self { state: Arc::new(Mutex::new(state)), witness: None };
        let seed = (Arc::as_ptr(&memory.state) as usize as u64) << 16;
        let mut state = memory.lock();
        state.last = seed;
        state.guid = seed;
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

    /// With these capabilities: what they don't have is refused as `Unsupported`. At first there are none, as with zfs-fuse.
    pub fn with_capabilities(self, capabilities: Capabilities) -> Self {
        self.lock().capabilities = capabilities;
        self
    }

    /// Another handle of the same pool, whose calls `by` sees.
    pub fn witnessed(&self, by: Arc<dyn Witness>) -> Self {
        Self { state: self.state.clone(), witness: Some(by) }
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

    /// Writes a dataset's content, as a pod would: it must be writable, and mounted if it is a filesystem.
    pub fn write(&self, name: &DatasetName, data: &[u8]) -> Result<()> {
        let mut state = self.lock();
        let entry = state.entry(name, "write")?;
        if !(entry.mounted || entry.is_volume()) || entry.get("readonly") == Some("on") {
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

    /// All datasets, by name. No call: nobody sees it, and nothing can go wrong.
    pub fn contents(&self) -> Result<Vec<Contents>> {
        let state = self.lock();
        let contents = |(name, entry): (&DatasetName, &Entry)| {
            let snapshots: Result<Vec<Snapshot>> = entry.snapshots.iter().map(|taken| taken.snapshot(name)).collect();
            Ok(Contents {
                dataset: state.dataset(name, entry),
                properties: entry.properties.clone(),
                snapshots: snapshots?,
                data: entry.data.clone(),
            })
        };
        state.datasets.iter().map(contents).collect()
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
        if let Some(witness) = &self.witness {
            witness.before(operation, &about).await;
        }
        let done = self.answer(operation, &about, act).await;
        if let Some(witness) = &self.witness {
            witness.after(operation, &about).await;
        }
        done
    }

    async fn answer<T>(
        &self,
        operation: &'static str,
        about: &str,
        act: impl FnOnce(&mut State) -> Result<T>,
    ) -> Result<T> {
        let failed = |kind| ZfsError::new(kind, format!("{operation} {about}"), "injected");
        let fault = {
            let mut state = self.lock();
            state.calls.push(format!("{operation} {about}"));
            state.fault(operation)
        };
        match fault {
            Some(Fault::Fail(kind)) => return Err(failed(kind)),
            Some(Fault::Hang) => std::future::pending::<()>().await,
            Some(Fault::FailAfter(_) | Fault::Lie) | None => {}
        }
        let mut state = self.lock();
        if !state.imported {
            return Err(ZfsError::new(ErrorKind::PoolUnavailable, format!("{operation} {about}"), "no such pool"));
        }
        let before = matches!(fault, Some(Fault::Lie)).then(|| state.datasets.clone());
        let done = act(&mut state)?;
        if let Some(before) = before {
            state.datasets = before;
        }
        match fault {
            Some(Fault::FailAfter(kind)) => Err(failed(kind)),
            _ => Ok(done),
        }
    }
}
