//! Who has which name: an immutable snapshot, swapped as a whole. The rules of naming are here and nowhere else.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::domain::Domain;
use crate::names::Names;
use crate::reverse;

/// The names of all networks that a node takes part in. Built once, then only read.
#[derive(Debug, Default)]
pub struct Zone {
    domain: Option<Domain>,
    networks: HashMap<String, Names>,
}

/// One network, as given to [`Zone::new`].
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct NetworkZone {
    /// The network's name, which is also the domain of its short names.
    pub name: String,
    /// The node that answers, whose pods may be preferred; empty for a server that is asked from all nodes.
    pub node: String,
    /// Its subnets: no address in them is asked for elsewhere.
    pub subnets: Vec<IpNet>,
    /// The pods that are plugged in, on all nodes.
    pub hosts: Vec<Host>,
    /// The pods of this node that may ask.
    pub members: Vec<Member>,
}

/// Pods that are as they were as long as this is the same allocation: one node's, as a rule.
pub type Group = Arc<[Arc<Host>]>;

/// One network, as given to [`ZoneHandle::follow`].
#[derive(Clone, Debug, Default)]
pub struct NetworkNames {
    /// As in [`NetworkZone`].
    pub name: String,
    /// As in [`NetworkZone`].
    pub node: String,
    /// As in [`NetworkZone`].
    pub subnets: Vec<IpNet>,
    /// The pods that are plugged in, on all nodes. No two of them have an address in common, and each is in one group.
    pub groups: Vec<Group>,
    /// As in [`NetworkZone`].
    pub members: Vec<Member>,
}

impl From<NetworkZone> for NetworkNames {
    fn from(NetworkZone { name, node, subnets, hosts, members }: NetworkZone) -> Self {
        Self { name, node, subnets, groups: vec![hosts.into_iter().map(Arc::new).collect()], members }
    }
}

impl From<&NetworkNames> for NetworkZone {
    fn from(names: &NetworkNames) -> Self {
        let NetworkNames { name, node, subnets, groups, members } = names.clone();
        let hosts = groups.iter().flat_map(|group| group.iter()).map(|host| Host::clone(host)).collect();
        Self { name, node, subnets, hosts, members }
    }
}

/// A pod on a network, and what it is called.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Host {
    /// Its namespace: a DNS label.
    pub namespace: String,
    /// Its own name. One with dots is known by its name with namespace only: see [`Zone`].
    pub pod: String,
    /// The workload whose name it answers to as well.
    pub owner: Option<String>,
    /// More names that it answers to.
    pub aliases: Vec<String>,
    /// The node it is on.
    pub node: String,
    /// Its addresses on this network.
    pub addresses: Vec<IpAddr>,
    /// Its named ports.
    pub ports: Vec<Port>,
    /// Whether it is Ready.
    pub ready: bool,
    /// Whether it is in answers even if it isn't.
    pub publish_not_ready: bool,
    /// Whether it is answered without its like on other nodes where it is.
    pub prefer_same_node: bool,
    /// Whether its node seems to be gone: it is in answers only if all others of its name are on such nodes, too.
    #[serde(default)]
    pub node_is_silent: bool,
}

/// A named port of a pod.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Port {
    /// Its name: `http`.
    pub name: String,
    /// Its protocol in lower case: `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// Its number.
    pub number: u16,
}

/// A pod of this node.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Member {
    /// Its address on the network that lists it.
    pub address: IpAddr,
    /// Its namespace, which comes first for short names.
    pub namespace: String,
    /// All networks it is on: their names are what it can resolve.
    pub networks: Vec<String>,
}

/// What a zone says of a name in one of the asker's networks.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Found<'a> {
    /// The network.
    pub(crate) network: &'a str,
    /// The top of the zone that the name is in.
    pub(crate) apex: Cow<'a, str>,
    pub(crate) data: Data<'a>,
    /// Whether pods, nodes and readiness may be told of.
    pub(crate) is_explained: bool,
}

/// Who asks for a name.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Asker<'a> {
    /// A pod of this namespace.
    Of(&'a str),
    /// Somebody on the network, of no namespace that is known.
    Stranger,
    /// Somebody elsewhere.
    Outsider,
}

/// What there is of a name.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Data<'a> {
    /// The name does not exist.
    Missing,
    /// It is these pods' name, be they Ready or not; none for an empty non-terminal. If some are preferred here, only they are
    /// answered.
    Hosts { all: Vec<&'a Host>, answered: Vec<&'a Host> },
    /// It is a service of these pods (those to be told of), at these ports.
    Services(Vec<(&'a Host, u16)>),
    /// It is the address of this pod.
    Address(&'a Host),
    /// It is the short name of pods in these namespaces and nobody's without a namespace.
    Ambiguous(Vec<&'a str>),
}

impl Data<'_> {
    /// A name that only has names below it.
    pub(crate) fn empty() -> Self {
        Self::Hosts { all: Vec::new(), answered: Vec::new() }
    }
}

/// A name of one network.
struct Match<'a, 'n> {
    network: &'a str,
    /// The domain that the network's names are in, be they short or full.
    apex: Cow<'a, str>,
    /// What stands before.
    rest: &'n str,
}

/// What stands before a name: `_http._tcp.` or, with nothing at it, `_tcp.` (RFC 2782).
pub(crate) enum Prefix<'a> {
    None,
    Protocol(&'a str),
    Service { port: &'a str, protocol: &'a str },
}

impl Host {
    /// Whether it is in answers.
    pub fn is_published(&self) -> bool {
        self.ready || self.publish_not_ready
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = String> {
        let all = [Some(&self.pod), self.owner.as_ref()].into_iter().flatten().chain(&self.aliases);
        all.map(|name| name.to_ascii_lowercase()).filter(|name| !name.is_empty())
    }
}

impl Zone {
    /// A snapshot of these networks.
    ///
    /// A pod is `<name>.<namespace>.<network>`, the name being its own, its workload's or an alias. Without the namespace it is
    /// its namesake in the asker's namespace; if there is none, the only namespace's that has the name. What several other namespaces
    /// have is nobody's: no namespace can take another's name by being the first. A name with dots has no short form, as it
    /// would look like a name with a namespace.
    pub fn new(networks: Vec<NetworkZone>) -> Self {
        Self::default().following(networks.into_iter().map(NetworkNames::from).collect())
    }

    /// The snapshot that comes after this one. It is as much work as the groups in which they differ.
    fn following(&self, networks: Vec<NetworkNames>) -> Self {
        let following = |network: NetworkNames| {
            let name = network.name.to_ascii_lowercase();
            let names = Names::following(self.networks.get(&name), network);
            (name, names)
        };
        Self { domain: self.domain.clone(), networks: networks.into_iter().map(following).collect() }
    }

    /// The same with full names: what is `<name>.<network>` is `<name>.<network>.<domain>`, too.
    ///
    /// A name that could be both, as a network may be called like the end of the domain, is what the longest match of network, or
    /// network and domain, makes it; of two that are as long, that of the network that is called so.
    pub fn within(self, domain: Option<Domain>) -> Self {
        Self { domain, ..self }
    }

    /// Looks `name` (lower case, without trailing dot) up for the pod that asked from `source` on `network`. None if it is in
    /// no network that the pod is on.
    pub(crate) fn find<'a>(&'a self, network: &'a str, source: IpAddr, name: &str) -> Option<Found<'a>> {
        let asker = self.networks.get(network).and_then(|names| names.members.get(&source));
        let own = asker.into_iter().flat_map(|asker| &asker.networks).map(String::as_str).chain([network]);
        if let Some(address) = reverse::address(name) {
            return own.into_iter().find_map(|network| self.find_address(network, address));
        }
        let matches = own.clone().filter_map(|network| self.below_network(name, network));
        let found = matches.max_by_key(|it| (it.apex.len(), it.apex == it.network)).map(|it| {
            let data = match self.networks.get(it.network) {
                // The network itself is always there, empty or not.
                _ if it.rest.is_empty() => Data::empty(),
                Some(names) => names.find(it.rest, asker.map_or(Asker::Stranger, |asker| Asker::Of(&asker.namespace))),
                None => Data::Missing,
            };
            Found { network: it.network, apex: it.apex, data, is_explained: true }
        });
        match found {
            None | Some(Found { data: Data::Missing, .. }) if self.is_above(name, own.clone()) => {
                Some(Found { network, apex: self.domain()?.into(), data: Data::empty(), is_explained: true })
            }
            found => found,
        }
    }

    /// Looks a full name (lower case, without trailing dot) up for whoever asks. None if it isn't in the domain.
    ///
    /// Only names with a namespace are known: without an asking pod, whose a name without it is would depend on who else has it.
    pub(crate) fn find_for_everyone<'a>(&'a self, name: &str) -> Option<Found<'a>> {
        let domain = self.domain()?;
        let in_domain = below(name, domain)?;
        // The longest match: one network's name may end in another's.
        let ends = std::iter::successors(Some(in_domain), |name| name.split_once('.').map(|(_, rest)| rest));
        let found = ends.filter_map(|end| self.networks.get_key_value(end)).next().and_then(|(network, names)| {
            let data = match below(in_domain, network)? {
                "" => Data::empty(),
                rest => names.find(rest, Asker::Outsider),
            };
            let apex = format!("{network}.{domain}").into();
            Some(Found { network, apex, data, is_explained: false })
        });
        let at_domain = |data| Found { network: "", apex: domain.into(), data, is_explained: false };
        match found {
            None | Some(Found { data: Data::Missing, .. })
                if self.is_above(name, self.networks.keys().map(String::as_str)) =>
            {
                Some(at_domain(Data::empty()))
            }
            // The domain itself is there, even without networks.
            None if in_domain.is_empty() => Some(at_domain(Data::empty())),
            None => Some(at_domain(Data::Missing)),
            found => found,
        }
    }

    fn domain(&self) -> Option<&str> {
        self.domain.as_ref().map(Domain::as_str)
    }

    /// What `name` is below a network: by a full name, else by a short one.
    fn below_network<'a, 'n>(&self, name: &'n str, network: &'a str) -> Option<Match<'a, 'n>> {
        let full = self.domain().and_then(|domain| {
            let rest = below(below(name, domain)?, network)?;
            Some(Match { network, apex: format!("{network}.{domain}").into(), rest })
        });
        full.or_else(|| Some(Match { network, apex: network.into(), rest: below(name, network)? }))
    }

    /// Whether full names of these networks end in `name`: then it exists (RFC 8020), though it may be nobody's.
    fn is_above<'a>(&self, name: &str, mut networks: impl Iterator<Item = &'a str>) -> bool {
        let in_domain = self.domain().and_then(|domain| below(name, domain));
        in_domain.is_some_and(|rest| networks.any(|network| rest.is_empty() || is_below(network, rest)))
    }

    fn find_address<'a>(&'a self, network: &'a str, address: IpAddr) -> Option<Found<'a>> {
        let names = self.networks.get(network)?;
        let subnet = names.subnets.iter().find(|subnet| subnet.contains(&address))?;
        let data = names.host_at(address).map_or(Data::Missing, Data::Address);
        Some(Found { network, apex: reverse::apex(subnet).into(), data, is_explained: true })
    }
}

impl Member {
    pub(crate) fn in_lower_case(mut self) -> Self {
        self.namespace.make_ascii_lowercase();
        self.networks.iter_mut().for_each(|network| network.make_ascii_lowercase());
        self
    }
}

pub(crate) fn prefix(rest: &str) -> (Prefix<'_>, &str) {
    match rest.strip_prefix('_').and_then(|text| text.split_once('.')) {
        None => (Prefix::None, rest),
        Some((first, below)) => match below.strip_prefix('_').and_then(|text| text.split_once('.')) {
            None => (Prefix::Protocol(first), below),
            Some((protocol, below)) => (Prefix::Service { port: first, protocol }, below),
        },
    }
}

/// What stands before `domain` in `name`, without the dot between; none if the name isn't in the domain.
fn below<'a>(name: &'a str, domain: &str) -> Option<&'a str> {
    let rest = name.strip_suffix(domain)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_suffix('.') }
}

fn is_below(name: &str, domain: &str) -> bool {
    below(name, domain).is_some_and(|rest| !rest.is_empty())
}

/// The current snapshot, shared with the servers. Replacing it never makes a reader wait.
#[derive(Clone, Debug)]
pub struct ZoneHandle(Arc<ArcSwap<Zone>>);

impl ZoneHandle {
    /// A handle that serves `zone`.
    pub fn new(zone: Zone) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(zone)))
    }

    /// Serves `zone` from now on. The memory of the one before is given back by a thread of its own: that of a large one takes longer than
    /// an agent may stand still.
    pub fn replace(&self, zone: Zone) {
        let before = self.0.swap(Arc::new(zone));
        // Without a thread the closure is dropped here, and the zone with it.
        let _ = std::thread::Builder::new().name("dns old zone".into()).spawn(move || drop(before));
    }

    /// Serves the names of these networks from now on, in the same domain.
    pub fn follow(&self, networks: Vec<NetworkNames>) {
        self.replace(self.current().following(networks));
    }

    pub(crate) fn current(&self) -> Arc<Zone> {
        self.0.load_full()
    }
}
