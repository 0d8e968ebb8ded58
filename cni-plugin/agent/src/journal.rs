//! Which pods are plugged in here: one file an endpoint, written before the kernel is touched and removed after.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use ipnet::IpNet;
use portolan_net::{Allowed, BRIDGE_ADDRESS, Bandwidth, Mac, PortSpec, port_name};
use serde::{Deserialize, Serialize};

pub use crate::store::JournalError;
use crate::store::{Kept, Store};

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
    /// The pod's address: IPv4, or IPv6 where the network has no IPv4.
    pub address: IpAddr,
    /// The prefix length of that address' subnet.
    pub prefix: u8,
    /// The pod's IPv6 address beside an IPv4 one, with the prefix length of its subnet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second: Option<IpNet>,
    /// What a pod without an IPv4 address asks the DNS server from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asks_from: Option<Ipv4Addr>,
    /// The interface's MAC.
    pub mac: Mac,
    /// The interface's MTU in bytes.
    pub mtu: u32,
    /// Whether the pod reaches the DNS server by this interface.
    pub resolver: bool,
    /// The address of the cluster's DNS, if the pod reaches our server there, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirected: Option<Ipv4Addr>,
    /// What addresses the pod may use beside its own.
    #[serde(default, skip_serializing_if = "Allowed::is_none")]
    pub allowed: Allowed,
    /// How fast the pod may receive and send by this interface.
    #[serde(default, skip_serializing_if = "Bandwidth::is_none")]
    pub bandwidth: Bandwidth,
    /// By whom the pod reaches what is on none of its networks, at most one of a family.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<IpAddr>,
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

    /// Its addresses on the network, IPv4 first.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        std::iter::once(self.address).chain(self.second.map(|second| second.addr()))
    }

    /// Its addresses, each with its MAC, and what it asks the DNS server from.
    pub(crate) fn identities(&self) -> impl Iterator<Item = (IpAddr, Mac)> {
        self.addresses().chain(self.asks_from.map(IpAddr::from)).map(|address| (address, self.mac))
    }

    /// All that its interface has: the addresses with the prefix lengths of their subnets, and what it asks the DNS server from.
    fn interface_addresses(&self) -> Vec<IpNet> {
        // With the full length if the journal has one that can't be.
        let first = IpNet::new(self.address, self.prefix).unwrap_or_else(|_| self.address.into());
        let asks_from = self.asks_from.map(|address| IpNet::from(IpAddr::from(address)));
        [Some(first), self.second, asks_from].into_iter().flatten().collect()
    }

    /// At which addresses it reaches the DNS server.
    pub fn resolvers(&self) -> impl Iterator<Item = Ipv4Addr> + use<> {
        [self.resolver.then_some(BRIDGE_ADDRESS), self.redirected].into_iter().flatten()
    }

    /// Its port.
    pub fn port(&self) -> PortSpec {
        PortSpec {
            vni: self.vni,
            port: port_name(&self.container, &self.interface),
            netns: self.netns.clone(),
            interface: self.interface.clone(),
            mac: self.mac,
            addresses: self.interface_addresses(),
            mtu: self.mtu,
            resolvers: self.resolvers().collect(),
            locked: true,
            allowed: self.allowed.clone(),
            bandwidth: self.bandwidth,
            gateways: self.gateways.clone(),
        }
    }
}

impl Kept for Endpoint {
    fn id(&self) -> String {
        Self::id(self)
    }
}

/// All endpoints of this node.
#[derive(Debug)]
pub struct Journal {
    endpoints: Store<Endpoint>,
    gone: Mutex<BTreeSet<Gone>>,
}

/// What was an endpoint's: its network's VNI, one of its addresses, its MAC.
pub(crate) type Gone = (u32, IpAddr, Mac);

impl Journal {
    /// Reads the journal in a directory, which is made if it isn't there.
    ///
    /// # Errors
    /// When it can't be read. A file that is no endpoint is an error too: forgetting one would give its address away twice.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, JournalError> {
        Ok(Self { endpoints: Store::open(directory)?, gone: Mutex::default() })
    }

    /// Adds or replaces an endpoint; it is on disk when this returns.
    ///
    /// # Errors
    /// When it can't be written; then it isn't in the journal.
    pub fn put(&self, endpoint: Endpoint) -> Result<(), JournalError> {
        self.endpoints.put(endpoint)
    }

    /// Forgets an endpoint; it is right if it isn't there.
    ///
    /// # Errors
    /// When its file can't be removed; then it stays in the journal.
    pub fn remove(&self, id: &str) -> Result<(), JournalError> {
        if let Some(gone) = self.endpoints.remove(id)? {
            let mut all = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(gone.identities().map(|(address, mac)| (gone.vni, address, mac)));
        }
        Ok(())
    }

    /// What was removed since this was asked last.
    pub(crate) fn take_gone(&self) -> BTreeSet<Gone> {
        std::mem::take(&mut *self.gone.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All endpoints, or those that are chosen.
    pub fn select(&self, chosen: impl Fn(&Endpoint) -> bool) -> Vec<Endpoint> {
        self.endpoints.select(chosen)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use portolan_net::Limit;

    use super::*;

    /// Also for others to begin with.
    pub(crate) fn endpoint(container: &str) -> Endpoint {
        Endpoint {
            container: container.into(),
            netns: "/run/netns/x".into(),
            interface: "eth1".into(),
            network: "backend".into(),
            vni: 77,
            address: "10.32.0.5".parse().unwrap(),
            prefix: 16,
            second: None,
            asks_from: None,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            resolver: true,
            redirected: None,
            allowed: Allowed::default(),
            bandwidth: Bandwidth::default(),
            gateways: Vec::new(),
            namespace: "shop".into(),
            pod: "db-0".into(),
            uid: "u".into(),
            owner: Some("db".into()),
        }
    }

    #[test]
    fn what_is_gone_is_told_once_with_all_of_its_addresses() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let asks_from = Some(Ipv4Addr::new(169, 254, 56, 1));
        let gone = Endpoint { second: Some("fd32::5/64".parse().unwrap()), asks_from, ..endpoint("a") };
        journal.put(gone.clone()).unwrap();
        journal.put(endpoint("b")).unwrap();
        journal.remove("a.eth1").unwrap();
        journal.remove("a.eth1").unwrap();
        let of = |address: &str| (77, address.parse().unwrap(), gone.mac);
        assert_eq!(journal.take_gone(), BTreeSet::from([of("10.32.0.5"), of("fd32::5"), of("169.254.56.1")]));
        assert!(journal.take_gone().is_empty());
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

    /// As releases before IPv6 wrote it, and as they can still read it.
    #[test]
    fn an_entry_of_an_ipv4_network_has_not_changed() {
        let old = r#"{"container":"a","netns":"/run/netns/x","interface":"eth1","network":"backend","vni":77,
            "address":"10.32.0.5","prefix":16,"mac":"02:00:00:00:00:01","mtu":1450,"resolver":true,
            "namespace":"shop","pod":"db-0","uid":"u","owner":"db"}"#;
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a.eth1.json"), old).unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        assert_eq!(journal.select(|_| true), [endpoint("a")]);
        journal.put(endpoint("a")).unwrap();
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(value(&fs::read_to_string(directory.path().join("a.eth1.json")).unwrap()), value(old));
    }

    #[test]
    fn a_port_has_all_addresses() {
        let mut both = endpoint("a");
        both.second = Some("fd32::5/64".parse().unwrap());
        let mut ipv6 = endpoint("b");
        (ipv6.address, ipv6.prefix) = ("fd32::6".parse().unwrap(), 64);
        ipv6.asks_from = Some("169.254.56.1".parse().unwrap());
        ipv6.allowed = Allowed::Further(vec!["fd32::100/128".parse().unwrap()]);
        let mut free = endpoint("c");
        free.allowed = Allowed::Any;
        free.bandwidth.egress = Some(Limit { rate: 8_000_000, burst: 800_000 });
        let directory = tempfile::tempdir().unwrap();
        for endpoint in [&both, &ipv6, &free] {
            Journal::open(directory.path()).unwrap().put(endpoint.clone()).unwrap();
        }
        let read = Journal::open(directory.path()).unwrap().select(|_| true);
        let texts = |endpoint: &Endpoint| endpoint.port().addresses.iter().map(IpNet::to_string).collect::<Vec<_>>();
        assert_eq!(texts(&read[0]), ["10.32.0.5/16", "fd32::5/64"]);
        assert_eq!(texts(&read[1]), ["fd32::6/64", "169.254.56.1/32"]);
        let allowed: Vec<Allowed> = read.iter().map(|endpoint| endpoint.port().allowed).collect();
        assert_eq!(allowed, [both.allowed, ipv6.allowed, free.allowed]);
        let limits: Vec<Bandwidth> = read.iter().map(|endpoint| endpoint.port().bandwidth).collect();
        assert_eq!(limits, [Bandwidth::default(), Bandwidth::default(), free.bandwidth]);
    }

    #[test]
    fn a_broken_entry_is_never_taken_for_nothing() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("c.eth1.json"), "{").unwrap();
        let error = Journal::open(directory.path()).unwrap_err().to_string();
        assert!(error.contains("c.eth1.json"), "{error}");
    }
}
