//! What this node knows of a pod on the pod network, kept on disk.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use portolan_cni::{Attached, Interface, Ip, PortMapping, Route, Transport};
use portolan_net::{HostPort, POD_GATEWAY_MAC, PodNetwork, PodSpec, Protocol, pod_link, pod_mac};
use serde::{Deserialize, Serialize};

use crate::store::{JournalError, Kept};

/// One pod's interface on the pod network.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodRecord {
    /// The container (the pod's sandbox).
    pub container: String,
    /// The pod's network namespace, as the host sees it.
    pub netns: PathBuf,
    /// The interface's name in the pod.
    pub interface: String,
    /// The pod's addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// The interface's MTU in bytes.
    pub mtu: u32,
    /// Which ports of the host lead to it.
    #[serde(default)]
    pub ports: Vec<PortMapping>,
    /// Whether they do so no more, as it is being taken off.
    #[serde(default)]
    pub leaving: bool,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
}

impl Kept for PodRecord {
    fn id(&self) -> String {
        id(&self.container, &self.interface)
    }
}

/// What a container's interface is known by.
pub(crate) fn id(container: &str, interface: &str) -> String {
    format!("{container}.{interface}")
}

impl PodRecord {
    /// What the host's end of its link is called.
    pub fn link(&self) -> String {
        pod_link(&self.container, &self.interface)
    }

    /// Its link, as the kernel is to have it.
    pub fn spec(&self, network: &PodNetwork) -> PodSpec {
        let itself = network.vtep.into();
        PodSpec {
            link: self.link(),
            netns: self.netns.clone(),
            interface: self.interface.clone(),
            mac: self.addresses.first().map(|first| pod_mac(*first)).unwrap_or_default(),
            addresses: self.addresses.clone(),
            mtu: self.mtu,
            host: network.vtep,
            near: network.blocks.iter().copied().chain([itself]).collect(),
        }
    }

    /// The ports of the host that lead to it, or did so if it is leaving.
    pub fn host_ports(&self) -> impl Iterator<Item = HostPort> {
        self.ports.iter().map(|mapping| HostPort {
            at: mapping.host_ip,
            protocol: match mapping.protocol {
                Transport::Tcp => Protocol::Tcp,
                Transport::Udp => Protocol::Udp,
                Transport::Sctp => Protocol::Sctp,
            },
            port: mapping.host_port,
            pod: self.addresses.clone(),
            pod_port: mapping.container_port,
        })
    }
}

/// What the container runtime is told of a pod's link.
pub(crate) fn attached(spec: &PodSpec) -> Attached {
    let routes = spec.routes();
    let gateway = |of: &IpAddr| routes.iter().map(|(_, by)| *by).find(|by| by.is_ipv4() == of.is_ipv4());
    let ip = |address: &IpAddr| {
        let length = if address.is_ipv4() { 32 } else { 128 };
        Some(Ip { address: format!("{address}/{length}"), gateway: gateway(address)?, interface: 1 })
    };
    let host = Interface { name: spec.link.clone(), mac: POD_GATEWAY_MAC.to_string(), sandbox: None };
    let sandbox = Some(spec.netns.display().to_string());
    let pod = Interface { name: spec.interface.clone(), mac: spec.mac.to_string(), sandbox };
    Attached {
        interfaces: vec![host, pod],
        ips: spec.addresses.iter().filter_map(ip).collect(),
        routes: routes.iter().map(|(to, by)| Route { dst: to.to_string(), gw: *by }).collect(),
    }
}

/// Which addresses were given last, at most one of a family. It need not survive a power cut, as no pod does.
#[derive(Debug)]
pub(crate) struct Last {
    path: PathBuf,
    addresses: Vec<IpAddr>,
}

impl Last {
    /// Reads a file. What can't be read is nothing: addresses are then given from the first again.
    pub fn read(path: PathBuf) -> Self {
        let addresses = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        Self { path, addresses }
    }

    /// That of an address' family.
    pub fn like(&self, of: IpAddr) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|it| it.is_ipv4() == of.is_ipv4())
    }

    /// These were given.
    pub fn set(&mut self, addresses: &[IpAddr]) -> Result<(), JournalError> {
        self.addresses = addresses.to_vec();
        let temporary = self.path.with_extension("new");
        let write = |path: &Path| -> io::Result<()> {
            fs::write(&temporary, serde_json::to_vec(addresses)?)?;
            fs::rename(&temporary, path)
        };
        write(&self.path).map_err(|source| JournalError::new(&self.path, "write", source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_last_is_known_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("last.json");
        let mut last = Last::read(path.clone());
        let given: [IpAddr; 2] = ["10.244.1.5".parse().unwrap(), "fd44::5".parse().unwrap()];
        assert_eq!(last.like(given[0]), None);
        last.set(&given).unwrap();
        let last = Last::read(path.clone());
        assert_eq!(given.map(|it| last.like(it)), given.map(Some));
        fs::write(&path, "[").unwrap();
        assert_eq!(Last::read(path).like(given[1]), None);
    }
}
