//! One network from pass to pass: what is made anew is what has changed. It comes to what [`View`](super::View) says of the whole.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, hash_map},
    net::IpAddr,
    sync::Arc,
};

use portolan_crds::{Endpoint, NetworkNodeSlice};
use portolan_dns::{Group, Host, NetworkNames};
use portolan_net::{Forwarding, Mac, Peer};

use super::{Local, Rank, host, identities, written};

/// Who is on a network, and where, and who has which name.
#[derive(Default)]
pub(crate) struct Following {
    local: Vec<Local>,
    here: Part,
    /// What each of these asks the DNS server from, if that is none of its addresses.
    asking: Vec<Option<(IpAddr, Mac)>>,
    /// What other nodes say, by the names of their slices.
    there: BTreeMap<String, Slice>,
    /// How many endpoints have an address.
    counts: HashMap<IpAddr, u32>,
    /// Addresses that several have.
    shared: BTreeSet<IpAddr>,
    pass: u64,
}

struct Slice {
    /// What it was made from.
    object: Arc<NetworkNodeSlice>,
    vtep: IpAddr,
    is_silent: bool,
    part: Part,
    /// When it was there last.
    pass: u64,
}

/// The endpoints of one node that can be read.
#[derive(Default)]
struct Part {
    /// As many as `hosts`.
    endpoints: Vec<Readable>,
    hosts: Group,
}

struct Readable {
    rank: Rank,
    /// Each address with its MAC; the second is none if there is one only.
    identities: [Option<(IpAddr, Mac)>; 2],
}

impl Readable {
    fn new(endpoint: &Endpoint, rank: Rank) -> Option<Self> {
        let mut all = identities(endpoint);
        let first = all.next()?;
        Some(Self { rank, identities: [Some(first), all.next()] })
    }

    fn identities(&self) -> impl Iterator<Item = (IpAddr, Mac)> + use<> {
        self.identities.into_iter().flatten()
    }

    fn addresses(&self) -> impl Iterator<Item = IpAddr> + Clone + use<> {
        self.identities.into_iter().flatten().map(|(address, _)| address)
    }
}

impl Part {
    /// Pods that are as they were before are the same.
    fn new(endpoints: impl Iterator<Item = (Readable, Host)>, before: &Self) -> Self {
        let before: HashMap<&[IpAddr], &Arc<Host>> =
            before.hosts.iter().map(|host| (&host.addresses[..], host)).collect();
        let again = |host: Host| match before.get(&host.addresses[..]) {
            Some(there) if ***there == host => Arc::clone(there),
            _ => Arc::new(host),
        };
        let (endpoints, hosts): (Vec<Readable>, Vec<Arc<Host>>) =
            endpoints.map(|(endpoint, host)| (endpoint, again(host))).unzip();
        Self { endpoints, hosts: hosts.into() }
    }

    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.endpoints.iter().flat_map(Readable::addresses)
    }
}

/// Endpoints that a better one has an address of, by slice (none: of this node) and position.
type Losers<'a> = BTreeSet<(Option<&'a str>, usize)>;

impl Following {
    /// What the slices of the network and this node's own endpoints say by now. `own` is this node's name; its slice is not asked.
    pub fn follow<'a>(
        &mut self,
        own: &str,
        local: &[Local],
        slices: impl IntoIterator<Item = &'a Arc<NetworkNodeSlice>>,
        silent: &BTreeSet<IpAddr>,
    ) {
        self.pass += 1;
        if self.local != local {
            let read = |it: &Local| {
                let rank = Rank { wanted_here: it.current, ready: it.endpoint.ready && it.current, written: 0 };
                Some((Readable::new(&it.endpoint, rank)?, host(&it.endpoint, own)))
            };
            let here = Part::new(local.iter().filter_map(read), &self.here);
            let before = std::mem::replace(&mut self.here, here);
            let is_read = |it: &&Local| identities(&it.endpoint).next().is_some();
            let asking = |it: &Local| Some((it.asks_from?.into(), it.endpoint.mac.parse().ok()?));
            self.asking = local.iter().filter(is_read).map(asking).collect();
            self.local = local.to_vec();
            count(&mut self.counts, &mut self.shared, &before, -1);
            count(&mut self.counts, &mut self.shared, &self.here, 1);
        }
        for slice in slices.into_iter().filter(|slice| slice.spec.node != own) {
            self.follow_slice(slice, silent);
        }
        let pass = self.pass;
        for (_, gone) in self.there.extract_if(.., |_, slice| slice.pass != pass) {
            count(&mut self.counts, &mut self.shared, &gone.part, -1);
        }
    }

    fn follow_slice(&mut self, object: &Arc<NetworkNodeSlice>, silent: &BTreeSet<IpAddr>) {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        if let Some(there) = self.there.get_mut(name)
            && Arc::ptr_eq(&there.object, object)
            && there.is_silent == silent.contains(&there.vtep)
        {
            there.pass = self.pass;
            return;
        }
        let Ok(vtep) = object.spec.vtep.parse::<IpAddr>() else { return };
        let (is_silent, written) = (silent.contains(&vtep), written(object));
        let read = |endpoint: &Endpoint| {
            let readable = Readable::new(endpoint, Rank { wanted_here: false, ready: endpoint.ready, written })?;
            Some((readable, Host { node_is_silent: is_silent, ..host(endpoint, &object.spec.node) }))
        };
        let none = Part::default();
        let before = self.there.get(name).map_or(&none, |there| &there.part);
        let part = Part::new(object.spec.endpoints.iter().filter_map(read), before);
        count(&mut self.counts, &mut self.shared, &part, 1);
        let slice = Slice { object: Arc::clone(object), vtep, is_silent, part, pass: self.pass };
        if let Some(before) = self.there.insert(name.to_owned(), slice) {
            count(&mut self.counts, &mut self.shared, &before.part, -1);
        }
    }

    fn parts(&self) -> impl Iterator<Item = (Option<&str>, &Part)> {
        let there = self.there.iter().map(|(name, slice)| (Some(name.as_str()), &slice.part));
        std::iter::once((None, &self.here)).chain(there)
    }

    /// As [`super::winners`] does it, among those that share an address with any other.
    fn losers(&self) -> Losers<'_> {
        if self.shared.is_empty() {
            return Losers::new();
        }
        let mut offers = Vec::new();
        for (name, part) in self.parts() {
            let endpoints = part.endpoints.iter().enumerate();
            let sharing = endpoints.filter(|(_, it)| it.addresses().any(|address| self.shared.contains(&address)));
            offers.extend(sharing.map(|(position, it)| ((name, position), it)));
        }
        offers.sort_by_key(|(_, it)| Reverse(it.rank));
        let (mut taken, mut losers) = (HashSet::new(), Losers::new());
        for (place, it) in offers {
            if it.addresses().any(|address| taken.contains(&address)) {
                losers.insert(place);
            } else {
                taken.extend(it.addresses());
            }
        }
        losers
    }

    /// Where frames go.
    pub fn forwarding(&self, suppression: bool) -> Forwarding {
        let losers = self.losers();
        let winners = |name, part: &Part| -> Vec<(IpAddr, Mac)> {
            let all = part.endpoints.iter().enumerate();
            let winners = all.filter(|(position, _)| losers.is_empty() || !losers.contains(&(name, *position)));
            winners.flat_map(|(_, it)| it.identities()).collect()
        };
        let mut local = winners(None, &self.here);
        let asking = self.asking.iter().enumerate().filter(|(position, _)| !losers.contains(&(None, *position)));
        local.extend(asking.filter_map(|(_, it)| *it));
        let mut peers: BTreeMap<IpAddr, Vec<(IpAddr, Mac)>> = BTreeMap::new();
        for (name, slice) in &self.there {
            // Even a node whose endpoints all lost takes part in broadcasts.
            let endpoints = winners(Some(name), &slice.part);
            peers.entry(slice.vtep).or_default().extend(endpoints);
        }
        let peers = peers.into_iter().map(|(vtep, endpoints)| Peer { vtep, endpoints }).collect();
        Forwarding { local, peers, suppression }
    }

    /// Who has which name, by node.
    pub fn groups(&self) -> Vec<Group> {
        let losers = self.losers();
        let losing: BTreeSet<Option<&str>> = losers.iter().map(|(name, _)| *name).collect();
        let group = |(name, part): (_, &Part)| -> Group {
            if !losing.contains(&name) {
                return Arc::clone(&part.hosts);
            }
            let winners = part.hosts.iter().enumerate().filter(|(position, _)| !losers.contains(&(name, *position)));
            winners.map(|(_, host)| Arc::clone(host)).collect()
        };
        self.parts().map(group).collect()
    }
}

/// Counts the addresses of endpoints that have come or gone.
fn count(counts: &mut HashMap<IpAddr, u32>, shared: &mut BTreeSet<IpAddr>, part: &Part, by: i32) {
    for address in part.addresses() {
        let after = match counts.entry(address) {
            hash_map::Entry::Vacant(none) => *none.insert(u32::from(by > 0)),
            hash_map::Entry::Occupied(mut there) => {
                *there.get_mut() = there.get().saturating_add_signed(by);
                let after = *there.get();
                if after == 0 {
                    there.remove();
                }
                after
            }
        };
        if after > 1 {
            shared.insert(address);
        } else {
            shared.remove(&address);
        }
    }
}

/// All networks as a server for everyone knows them: `known` by name, those in `views` as this node sees them, the others from
/// their slices, which `others` follow. No pod is preferred for its node: it isn't known where the asking one is.
pub(crate) fn names_for_everyone(
    known: impl IntoIterator<Item = String>,
    views: &BTreeMap<String, Following>,
    others: &mut BTreeMap<String, Following>,
    slices: &BTreeMap<&str, Vec<&Arc<NetworkNodeSlice>>>,
    silent: &BTreeSet<IpAddr>,
) -> Vec<NetworkNames> {
    let names: BTreeSet<String> = known.into_iter().chain(slices.keys().map(|name| (*name).to_owned())).collect();
    others.retain(|name, _| names.contains(name) && !views.contains_key(name));
    let network = |name: String| {
        let groups = match views.get(&name) {
            Some(view) => view.groups(),
            None => {
                let view = others.entry(name.clone()).or_default();
                view.follow("", &[], slices.get(name.as_str()).into_iter().flatten().copied(), silent);
                view.groups()
            }
        };
        NetworkNames { name, groups, ..NetworkNames::default() }
    };
    names.into_iter().map(network).collect()
}

#[cfg(test)]
mod tests;
