//! The names of one network, in parts that are shared with the snapshot before: what makes a snapshot anew is as much work as what has changed.

use std::{
    collections::{HashMap, HashSet, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use crate::zone::{Asker, Data, Group, Host, Member, NetworkNames, Port, Prefix, prefix};

/// Into how many parts names and addresses are divided. Of a network of 150,000 pods one has some hundreds of each.
const PARTS: usize = 1024;

/// Who has which name and which address.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    node: String,
    pub(crate) subnets: Vec<IpNet>,
    pub(crate) members: HashMap<IpAddr, Member>,
    groups: Vec<Group>,
    /// How many pods there are in each namespace (lower case).
    namespaces: Arc<HashMap<String, usize>>,
    parts: Vec<Arc<Part>>,
}

/// Those names and addresses that have the same hash, in a way.
#[derive(Clone, Debug, Default)]
struct Part {
    /// By name without a namespace (lower case).
    names: HashMap<String, Vec<InNamespace>>,
    addresses: HashMap<IpAddr, Arc<Host>>,
}

/// What there is of a name in one namespace (lower case).
#[derive(Clone, Debug, Default)]
struct InNamespace {
    namespace: String,
    /// The pods of that name, those that aren't Ready among them.
    hosts: Vec<Arc<Host>>,
    /// How many names there are below it: it exists, though it may be nobody's (an empty non-terminal, RFC 8020).
    below: usize,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            node: String::new(),
            subnets: Vec::new(),
            members: HashMap::new(),
            groups: Vec::new(),
            namespaces: Arc::default(),
            // All of them the same one, until there is something in it.
            parts: vec![Arc::default(); PARTS],
        }
    }
}

fn part_of(key: impl Hash) -> usize {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    usize::try_from(hasher.finish() % PARTS as u64).unwrap_or_default()
}

/// Whether something is added or taken away.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Change {
    Added,
    Gone,
}

impl Names {
    /// The names of a network, made from those that it had before.
    pub(crate) fn following(before: Option<&Self>, network: NetworkNames) -> Self {
        let mut names = before.cloned().unwrap_or_default();
        (names.node, names.subnets) = (network.node, network.subnets);
        let members = network.members.into_iter();
        names.members = members.map(|member| (member.address, member.in_lower_case())).collect();
        let address_of = |group: &Group| Arc::as_ptr(group).cast::<()>();
        let (old, new): (HashSet<_>, HashSet<_>) =
            (names.groups.iter().map(address_of).collect(), network.groups.iter().map(address_of).collect());
        let gone: Vec<Group> = names.groups.iter().filter(|group| !new.contains(&address_of(group))).cloned().collect();
        let come: Vec<Group> =
            network.groups.iter().filter(|group| !old.contains(&address_of(group))).cloned().collect();
        names.groups = network.groups;
        // A group that has changed has most of its pods as they were.
        let of = |groups: &[Group]| -> HashSet<*const Host> {
            groups.iter().flat_map(|group| group.iter()).map(Arc::as_ptr).collect()
        };
        let (stayed, known) = (of(&come), of(&gone));
        for host in gone.iter().flat_map(|group| group.iter()).filter(|host| !stayed.contains(&Arc::as_ptr(host))) {
            names.change(host, Change::Gone);
        }
        for host in come.iter().flat_map(|group| group.iter()).filter(|host| !known.contains(&Arc::as_ptr(host))) {
            names.change(host, Change::Added);
        }
        names
    }

    fn change(&mut self, host: &Arc<Host>, change: Change) {
        // A namespace is one label, which is what makes a name with one unambiguous.
        if !is_label(&host.namespace) {
            return;
        }
        let namespace = host.namespace.to_ascii_lowercase();
        count(Arc::make_mut(&mut self.namespaces), &namespace, change);
        let own: HashSet<String> = host.names().collect();
        for name in &own {
            self.change_name(name, &namespace, change, |there| match change {
                Change::Added => there.hosts.push(Arc::clone(host)),
                Change::Gone => there.hosts.retain(|it| !Arc::ptr_eq(it, host)),
            });
            let above = std::iter::successors(name.split_once('.'), |(_, rest)| rest.split_once('.'));
            for (_, rest) in above {
                self.change_name(rest, &namespace, change, |there| match change {
                    Change::Added => there.below += 1,
                    Change::Gone => there.below = there.below.saturating_sub(1),
                });
            }
        }
        for address in &host.addresses {
            let addresses = &mut self.part_mut(address).addresses;
            match change {
                Change::Added => drop(addresses.insert(*address, Arc::clone(host))),
                Change::Gone if addresses.get(address).is_some_and(|it| Arc::ptr_eq(it, host)) => {
                    addresses.remove(address);
                }
                Change::Gone => {}
            }
        }
    }

    fn change_name(&mut self, name: &str, namespace: &str, change: Change, make: impl FnOnce(&mut InNamespace)) {
        let names = &mut self.part_mut(name).names;
        if change == Change::Added && !names.contains_key(name) {
            names.insert(name.to_owned(), Vec::new());
        }
        let Some(there) = names.get_mut(name) else { return };
        let position = there.iter().position(|it| it.namespace == namespace).unwrap_or_else(|| {
            there.push(InNamespace { namespace: namespace.to_owned(), ..InNamespace::default() });
            there.len() - 1
        });
        make(&mut there[position]);
        there.retain(|it| !it.hosts.is_empty() || it.below > 0);
        if there.is_empty() {
            names.remove(name);
        }
    }

    fn part_mut(&mut self, key: impl Hash) -> &mut Part {
        Arc::make_mut(&mut self.parts[part_of(key)])
    }

    /// The pod that has an address.
    pub(crate) fn host_at(&self, address: IpAddr) -> Option<&Host> {
        self.parts[part_of(address)].addresses.get(&address).map(AsRef::as_ref)
    }

    fn named(&self, name: &str) -> &[InNamespace] {
        self.parts[part_of(name)].names.get(name).map(Vec::as_slice).unwrap_or_default()
    }

    /// What `rest`, the name without the network's, is to that asker.
    pub(crate) fn find(&self, rest: &str, asker: Asker<'_>) -> Data<'_> {
        let (prefix, rest) = prefix(rest);
        let data = self.find_hosts(rest, asker);
        let Data::Hosts { all: hosts, .. } = &data else {
            return if matches!(prefix, Prefix::None) { data } else { Data::Missing };
        };
        let ports = || hosts.iter().flat_map(|host| host.ports.iter().map(move |port| (*host, port)));
        match prefix {
            Prefix::None => data,
            Prefix::Protocol(protocol) if ports().any(|(_, port)| port.protocol == protocol) => Data::empty(),
            Prefix::Service { port: name, protocol } => {
                let is_it = |port: &Port| port.protocol == protocol && port.name.eq_ignore_ascii_case(name);
                if !ports().any(|(_, port)| is_it(port)) {
                    return Data::Missing;
                }
                let offered = ports().filter(|(_, port)| is_it(port));
                Data::Services(self.answered(offered.map(|(host, port)| (host, port.number)), |(host, _)| host))
            }
            Prefix::Protocol(_) => Data::Missing,
        }
    }

    /// Those that are in answers: of the published ones those of this node that want to be preferred, if there are any; else those
    /// on nodes that answer; else all, since silence proves nothing.
    fn answered<'a, T>(&self, all: impl Iterator<Item = T>, host: impl Fn(&T) -> &'a Host) -> Vec<T> {
        let mut answered: Vec<T> = all.filter(|one| host(one).is_published()).collect();
        let better =
            [&|host: &Host| host.prefer_same_node && host.node == self.node, &|host: &Host| !host.node_is_silent]
                as [&dyn Fn(&Host) -> bool; 2];
        if let Some(better) = better.into_iter().find(|better| answered.iter().any(|one| better(host(one)))) {
            answered.retain(|one| better(host(one)));
        }
        answered
    }

    /// The namespaces that have a short name. One with dots is none, as it would look like a name with a namespace.
    fn holders(&self, name: &str) -> Vec<&str> {
        let named = if name.contains('.') { &[] } else { self.named(name) };
        named.iter().filter(|it| !it.hosts.is_empty()).map(|it| it.namespace.as_str()).collect()
    }

    fn find_hosts(&self, rest: &str, asker: Asker<'_>) -> Data<'_> {
        let (name, namespace) = match rest.rsplit_once('.') {
            Some(both) => both,
            None => {
                let holders = match asker {
                    Asker::Outsider => Vec::new(),
                    Asker::Of(_) | Asker::Stranger => self.holders(rest),
                };
                match (&holders[..], asker) {
                    (holders, Asker::Of(asker)) if holders.contains(&asker) => (rest, asker),
                    ([only], _) => (rest, *only),
                    ([], _) if self.namespaces.contains_key(rest) => return Data::empty(),
                    ([], _) => return Data::Missing,
                    _ => return Data::Ambiguous(holders),
                }
            }
        };
        let there = self.named(name).iter().find(|it| it.namespace == namespace);
        there.map_or(Data::Missing, |there| {
            let all: Vec<&Host> = there.hosts.iter().map(AsRef::as_ref).collect();
            Data::Hosts { answered: self.answered(all.iter().copied(), |host| host), all }
        })
    }
}

fn count(all: &mut HashMap<String, usize>, namespace: &str, change: Change) {
    match (all.get_mut(namespace), change) {
        (Some(count), Change::Added) => *count += 1,
        (Some(count), Change::Gone) if *count > 1 => *count -= 1,
        (Some(_), Change::Gone) => drop(all.remove(namespace)),
        (None, Change::Added) => drop(all.insert(namespace.to_owned(), 1)),
        (None, Change::Gone) => {}
    }
}

fn is_label(text: &str) -> bool {
    !text.is_empty() && !text.contains('.')
}
