//! Which pods are plugged in here: one file an endpoint, written before the kernel is touched and removed after.

use std::{
    collections::BTreeMap,
    fs, io,
    io::Write,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use ipnet::Ipv4Net;
use portolan_net::{Mac, PortSpec, port_name};
use serde::{Deserialize, Serialize};

/// One interface of one pod of this node.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// The container (the pod's sandbox).
    pub container: String,
    /// The pod's network namespace, as the host sees it.
    pub netns: PathBuf,
    /// The interface's name in the pod.
    pub interface: String,
    /// The network.
    pub network: String,
    /// The network's VXLAN identifier.
    pub vni: u32,
    /// The pod's address.
    pub address: Ipv4Addr,
    /// The prefix length of the network's subnet.
    pub prefix: u8,
    /// The interface's MAC.
    pub mac: Mac,
    /// The interface's MTU in bytes.
    pub mtu: u32,
    /// Whether the pod reaches the DNS server by this interface.
    pub resolver: bool,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID.
    pub uid: String,
    /// The workload that the pod belongs to.
    #[serde(default)]
    pub owner: Option<String>,
}

impl Endpoint {
    /// What the journal knows it by.
    pub fn id(&self) -> String {
        format!("{}.{}", self.container, self.interface)
    }

    /// Its address with the prefix length of its subnet; with the full length if the journal has one that can't be.
    fn subnet_address(&self) -> Ipv4Net {
        Ipv4Net::new(self.address, self.prefix).unwrap_or_else(|_| self.address.into())
    }

    /// Its port.
    pub fn port(&self) -> PortSpec {
        PortSpec {
            vni: self.vni,
            port: port_name(&self.container, &self.interface),
            netns: self.netns.clone(),
            interface: self.interface.clone(),
            mac: self.mac,
            addresses: vec![self.subnet_address().into()],
            mtu: self.mtu,
            resolver: self.resolver,
            locked: true,
        }
    }
}

/// The journal can't be read or written.
#[derive(Debug, thiserror::Error)]
#[error("journal {path}: {action}: {source}")]
pub struct JournalError {
    path: PathBuf,
    action: &'static str,
    source: io::Error,
}

/// All endpoints of this node.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    endpoints: Mutex<BTreeMap<String, Endpoint>>,
}

impl Journal {
    /// Reads the journal in a directory, which is made if it isn't there.
    ///
    /// # Errors
    /// When it can't be read. A file that is no endpoint is an error too: forgetting one would give its address away twice.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, JournalError> {
        let directory = directory.into();
        let fail = |path: &Path, action, source| JournalError { path: path.to_owned(), action, source };
        fs::create_dir_all(&directory).map_err(|e| fail(&directory, "make directory", e))?;
        let mut endpoints = BTreeMap::new();
        for entry in fs::read_dir(&directory).map_err(|e| fail(&directory, "list", e))? {
            let path = entry.map_err(|e| fail(&directory, "list", e))?.path();
            if path.extension().is_none_or(|e| e != "json") {
                // Left by a writer that was killed: it was never part of the journal.
                fs::remove_file(&path).map_err(|e| fail(&path, "remove", e))?;
                continue;
            }
            let bytes = fs::read(&path).map_err(|e| fail(&path, "read", e))?;
            let endpoint: Endpoint = serde_json::from_slice(&bytes).map_err(|e| fail(&path, "read", e.into()))?;
            endpoints.insert(endpoint.id(), endpoint);
        }
        Ok(Self { directory, endpoints: Mutex::new(endpoints) })
    }

    /// Adds or replaces an endpoint; it is on disk when this returns.
    ///
    /// # Errors
    /// When it can't be written; then it isn't in the journal.
    pub fn put(&self, endpoint: Endpoint) -> Result<(), JournalError> {
        let path = self.path(&endpoint.id());
        let temporary = path.with_extension("new");
        let write = || {
            let mut file = fs::File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(&endpoint)?)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            fs::File::open(&self.directory)?.sync_all()
        };
        write().map_err(|source| JournalError { path: path.clone(), action: "write", source })?;
        self.lock().insert(endpoint.id(), endpoint);
        Ok(())
    }

    /// Forgets an endpoint; it is right if it isn't there.
    ///
    /// # Errors
    /// When its file can't be removed; then it stays in the journal.
    pub fn remove(&self, id: &str) -> Result<(), JournalError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(JournalError { path, action: "remove", source });
            }
            _ => {}
        }
        self.lock().remove(id);
        Ok(())
    }

    /// All endpoints, or those that are chosen.
    pub fn select(&self, chosen: impl Fn(&Endpoint) -> bool) -> Vec<Endpoint> {
        self.lock().values().filter(|e| chosen(e)).cloned().collect()
    }

    fn path(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Endpoint>> {
        // Every change under this lock is a single insertion or removal: a panic can't leave half of one.
        self.endpoints.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(container: &str) -> Endpoint {
        Endpoint {
            container: container.into(),
            netns: "/run/netns/x".into(),
            interface: "eth1".into(),
            network: "backend".into(),
            vni: 77,
            address: Ipv4Addr::new(10, 32, 0, 5),
            prefix: 16,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            resolver: true,
            namespace: "shop".into(),
            pod: "db-0".into(),
            uid: "u".into(),
            owner: Some("db".into()),
        }
    }

    #[test]
    fn survives_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        journal.put(endpoint("a")).unwrap();
        journal.put(endpoint("b")).unwrap();
        journal.remove("a.eth1").unwrap();
        journal.remove("a.eth1").unwrap();
        // Killed while it wrote.
        fs::write(directory.path().join("c.eth1.new"), "{\"cont").unwrap();
        let again = Journal::open(directory.path()).unwrap();
        assert_eq!(again.select(|_| true), [endpoint("b")]);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_broken_entry_is_never_taken_for_nothing() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("c.eth1.json"), "{").unwrap();
        let error = Journal::open(directory.path()).unwrap_err().to_string();
        assert!(error.contains("c.eth1.json"), "{error}");
    }
}
