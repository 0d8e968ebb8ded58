//! One node's networks, as a whole.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    error::{Error, Result},
    namespace::{Namespace, within},
    netlink::Netlink,
    removal::Removals,
};

/// Where named namespaces are on a host.
const NETNS_DIRECTORY: &str = "/run/netns";
/// What the namespaces of networks are called, before the VNI.
const PREFIX: &str = "portolan-";

/// The networks of one node.
#[derive(Clone, Debug)]
pub struct Dataplane {
    root: PathBuf,
    underlay: Option<PathBuf>,
    programs: Option<PathBuf>,
    removals: Arc<Removals>,
}

impl Dataplane {
    /// The networks of the host whose root directory is seen at `root`. Tunnels leave by this process's own namespace.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), underlay: None, programs: None, removals: Arc::default() }
    }

    /// Lets tunnels leave by another namespace, known by its path on the host.
    #[must_use]
    pub fn with_underlay(mut self, path: impl Into<PathBuf>) -> Self {
        self.underlay = Some(path.into());
        self
    }

    /// Where the host's programs are seen, if not in its root directory.
    #[must_use]
    pub fn with_programs(mut self, root: impl Into<PathBuf>) -> Self {
        self.programs = Some(root.into());
        self
    }

    /// The links that are to go.
    pub(crate) fn removals(&self) -> &Removals {
        &self.removals
    }

    /// The root directory in which the host's programs are run.
    pub(crate) fn programs(&self) -> &Path {
        self.programs.as_deref().unwrap_or(&self.root)
    }

    /// Where the host's root directory is seen.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The VNIs of the networks that are set up here.
    ///
    /// # Errors
    /// When the directory of namespaces can't be read.
    pub fn networks(&self) -> Result<Vec<u32>> {
        let names = self.named_namespaces()?;
        let mut found: Vec<u32> = names.iter().filter_map(|name| name.strip_prefix(PREFIX)?.parse().ok()).collect();
        found.sort_unstable();
        Ok(found)
    }

    /// The path on the host of the named namespace that has an address on one of its interfaces: container runtimes name those of their
    /// pods. None if there is no such namespace, or several: one of them is on its way out then.
    ///
    /// # Errors
    /// When the directory of namespaces can't be read. A namespace that goes meanwhile is no error.
    pub async fn namespace_with(&self, address: IpAddr) -> Result<Option<PathBuf>> {
        let mut found = Vec::new();
        for name in self.named_namespaces()?.into_iter().filter(|name| !name.starts_with(PREFIX)) {
            let path = Path::new(NETNS_DIRECTORY).join(name);
            let Ok(namespace) = Namespace::open(&self.root, &path) else { continue };
            let Ok(netlink) = Netlink::open(&namespace) else { continue };
            if netlink.all_addresses().await.is_ok_and(|all| all.contains(&address)) {
                found.push(path);
            }
        }
        Ok(found.pop().filter(|_| found.is_empty()))
    }

    fn named_namespaces(&self) -> Result<Vec<String>> {
        let fail = |source| Error::Namespace { path: NETNS_DIRECTORY.into(), action: "list", source };
        let entries = match std::fs::read_dir(within(&self.root, Path::new(NETNS_DIRECTORY))) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(fail)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            names.extend(entry.map_err(fail)?.file_name().into_string().ok());
        }
        Ok(names)
    }

    /// The namespace of a network.
    ///
    /// # Errors
    /// [`Error::NoNetwork`] when it isn't set up here.
    pub fn namespace(&self, vni: u32) -> Result<Namespace> {
        let path = namespace_path(vni);
        if Namespace::is_gone(&self.root, &path) {
            return Err(Error::NoNetwork { vni });
        }
        Namespace::open(&self.root, &path)
    }

    /// Runs `work` inside a network's namespace, on a thread of its own.
    ///
    /// # Errors
    /// When the network isn't set up here, or what `work` returns.
    pub fn run_in<T: Send>(&self, vni: u32, work: impl FnOnce() -> io::Result<T> + Send) -> Result<T> {
        self.namespace(vni)?.run(work)
    }

    /// The namespace that tunnels leave by.
    pub(crate) fn underlay(&self) -> Result<Namespace> {
        match &self.underlay {
            Some(path) => Namespace::open(&self.root, path),
            None => Namespace::own(),
        }
    }
}

/// The path on the host of a network's namespace.
pub(crate) fn namespace_path(vni: u32) -> PathBuf {
    Path::new(NETNS_DIRECTORY).join(format!("{PREFIX}{vni}"))
}
