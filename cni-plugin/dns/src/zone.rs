//! Who has which name: an immutable snapshot, swapped as a whole.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::sync::Arc;

use arc_swap::ArcSwap;

/// The names of all networks that a node takes part in. Built once, then only read.
#[derive(Debug, Default)]
pub struct Zone {
    networks: HashMap<String, Names>,
}

/// One network, as given to [`Zone::new`].
#[derive(Clone, Debug, Default)]
pub struct NetworkZone {
    /// The network's name, which is also the domain its names are in.
    pub name: String,
    /// Its names.
    pub records: Vec<Record>,
    /// The pods of this node that may ask.
    pub members: Vec<Member>,
}

/// One name and one of its addresses; a name with several has several records.
#[derive(Clone, Debug)]
pub struct Record {
    /// The whole name without trailing dot: `db-0.backend`.
    pub name: String,
    /// An address it resolves to.
    pub address: Ipv4Addr,
}

/// A pod of this node.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its address on the network that lists it.
    pub address: Ipv4Addr,
    /// All networks it is on: their names are what it can resolve.
    pub networks: Vec<String>,
}

#[derive(Debug, Default)]
struct Names {
    /// Addresses by name (lower case); none for a name that only has names below it (an empty non-terminal, RFC 8020).
    addresses: BTreeMap<String, Vec<Ipv4Addr>>,
    members: HashMap<Ipv4Addr, Vec<String>>,
}

/// What a zone says of a name.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Found<'a> {
    /// The name is in no network that the asker is on.
    Foreign,
    /// The name is in `network` and exists; it may have no address itself.
    Addresses { network: &'a str, addresses: &'a [Ipv4Addr] },
    /// The name would be in `network`, and isn't.
    Missing { network: &'a str },
}

impl Zone {
    /// A snapshot of these networks.
    pub fn new(networks: Vec<NetworkZone>) -> Self {
        let networks = networks.into_iter().map(|network| {
            let domain = network.name.to_ascii_lowercase();
            let names = Names::new(&domain, network);
            (domain, names)
        });
        Self { networks: networks.collect() }
    }

    /// Looks `name` (lower case, without trailing dot) up for the pod that asked from `source` on `network`.
    pub(crate) fn find<'a>(&'a self, network: &'a str, source: Ipv4Addr, name: &str) -> Found<'a> {
        let view = self.networks.get(network).and_then(|names| names.members.get(&source));
        let own = view.into_iter().flatten().map(String::as_str).chain([network]);
        // The longest match: one network's name may end in another's.
        let Some(domain) = own.filter(|domain| is_in(name, domain)).max_by_key(|domain| domain.len()) else {
            return Found::Foreign;
        };
        match self.networks.get(domain).and_then(|names| names.addresses.get(name)) {
            Some(addresses) => Found::Addresses { network: domain, addresses },
            // The network itself is always there, empty or not.
            None if name == domain => Found::Addresses { network: domain, addresses: &[] },
            None => Found::Missing { network: domain },
        }
    }
}

impl Names {
    fn new(domain: &str, network: NetworkZone) -> Self {
        let mut names = Self::default();
        for record in network.records {
            let name = record.name.to_ascii_lowercase();
            if !is_in(&name, domain) {
                continue;
            }
            let mut above = name.as_str();
            while let Some((_, rest)) = above.split_once('.') {
                if !is_in(rest, domain) {
                    break;
                }
                names.addresses.entry(rest.to_owned()).or_default();
                above = rest;
            }
            let addresses = names.addresses.entry(name).or_default();
            if !addresses.contains(&record.address) {
                addresses.push(record.address);
            }
        }
        let lower = |all: Vec<String>| all.iter().map(|name| name.to_ascii_lowercase()).collect();
        names.members = network.members.into_iter().map(|member| (member.address, lower(member.networks))).collect();
        names
    }
}

/// True if `name` is `domain` or below it.
fn is_in(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The current snapshot, shared with the servers. Replacing it never makes a reader wait.
#[derive(Clone, Debug)]
pub struct ZoneHandle(Arc<ArcSwap<Zone>>);

impl ZoneHandle {
    /// A handle that serves `zone`.
    pub fn new(zone: Zone) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(zone)))
    }

    /// Serves `zone` from now on.
    pub fn replace(&self, zone: Zone) {
        self.0.store(Arc::new(zone));
    }

    pub(crate) fn current(&self) -> Arc<Zone> {
        self.0.load_full()
    }
}
