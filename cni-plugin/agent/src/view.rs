//! From what the nodes say to what this node does: who is where, and who has which name. Pure.
//!
//! Large networks are followed from pass to pass ([`following`]), which comes to the same.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;
use portolan_crds::{Endpoint, NamedPort, NetworkNodeSlice};
use portolan_dns::{Host, Member, NetworkZone, Port};
use portolan_net::{Forwarding, Mac, Peer};

mod following;

pub(crate) use following::{Following, names_for_everyone};

/// An endpoint of this node, as the API knows its pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Local {
    /// The endpoint, as the slice has it.
    pub endpoint: Endpoint,
    /// What it asks the DNS server from, if that is none of its addresses: this node's bridge has to know it.
    pub asks_from: Option<Ipv4Addr>,
    /// Whether its pod is wanted here: it is in the API by this UID, and not being deleted.
    pub current: bool,
}

/// Who is on a network, and where.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View<'a> {
    local: Vec<&'a Local>,
    /// By tunnel endpoint, each with its node's name.
    remote: BTreeMap<IpAddr, Vec<(&'a Endpoint, &'a str)>>,
    node: String,
}

/// Which of two endpoints with an address in common is the right one; the greater wins. A pod that is wanted here is: its address
/// was given to it here, last. Else a ready one, else the one that was written last.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Rank {
    wanted_here: bool,
    ready: bool,
    written: u64,
}

/// An endpoint that somebody says is there.
struct Offer<'a> {
    rank: Rank,
    place: Place<'a>,
    endpoint: &'a Endpoint,
}

enum Place<'a> {
    /// On this node.
    Here(&'a Local),
    /// On the node with this tunnel endpoint and name.
    Behind(IpAddr, &'a str),
}

/// Those of which no better one has an address, in the order of their addresses. An endpoint is there with all of its addresses or not at
/// all: they are behind the same port.
fn winners(mut offers: Vec<Offer<'_>>) -> impl Iterator<Item = Offer<'_>> {
    offers.sort_by_key(|offer| Reverse(offer.rank));
    let mut taken = BTreeSet::new();
    let mut winners = BTreeMap::new();
    for offer in offers {
        let addresses: Vec<IpAddr> = identities(offer.endpoint).map(|(address, _)| address).collect();
        if let Some(first) = addresses.first().copied()
            && !addresses.iter().any(|address| taken.contains(address))
        {
            taken.extend(addresses);
            winners.insert(first, offer);
        }
    }
    winners.into_values()
}

impl<'a> View<'a> {
    /// Puts together what the slices of one network and this node's own endpoints say.
    ///
    /// `own` is this node's name; its slice is not asked, being made from `local`.
    pub fn new(own: &str, local: &'a [Local], slices: impl IntoIterator<Item = &'a NetworkNodeSlice>) -> Self {
        let mut view = Self { node: own.to_owned(), ..Self::default() };
        let mut offers = Vec::new();
        let mut offer = |endpoint, place, rank| offers.push(Offer { rank, place, endpoint });
        for it in local {
            let rank = Rank { wanted_here: it.current, ready: it.endpoint.ready && it.current, written: 0 };
            offer(&it.endpoint, Place::Here(it), rank);
        }
        for slice in slices.into_iter().filter(|s| s.spec.node != own) {
            let Ok(vtep) = slice.spec.vtep.parse::<IpAddr>() else { continue };
            // Even a node whose endpoints all lost takes part in broadcasts.
            view.remote.entry(vtep).or_default();
            let written = written(slice);
            for endpoint in &slice.spec.endpoints {
                offer(
                    endpoint,
                    Place::Behind(vtep, &slice.spec.node),
                    Rank { wanted_here: false, ready: endpoint.ready, written },
                );
            }
        }
        for Offer { place, endpoint, .. } in winners(offers) {
            match place {
                Place::Here(local) => view.local.push(local),
                Place::Behind(vtep, node) => view.remote.entry(vtep).or_default().push((endpoint, node)),
            }
        }
        view
    }

    /// Who is there, on whatever node.
    pub fn endpoints(&self) -> impl Iterator<Item = &'a Endpoint> {
        self.local
            .iter()
            .map(|local| &local.endpoint)
            .chain(self.remote.values().flatten().map(|(endpoint, _)| *endpoint))
    }

    /// Where frames go.
    pub fn forwarding(&self, suppression: bool) -> Forwarding {
        let peer = |(vtep, endpoints): (&IpAddr, &Vec<(&Endpoint, &str)>)| Peer {
            vtep: *vtep,
            endpoints: endpoints.iter().flat_map(|(endpoint, _)| identities(endpoint)).collect(),
        };
        let asking = |local: &Local| Some((local.asks_from?.into(), local.endpoint.mac.parse().ok()?));
        let local = self.local.iter().flat_map(|local| identities(&local.endpoint).chain(asking(local)));
        Forwarding { local: local.collect(), peers: self.remote.iter().map(peer).collect(), suppression }
    }

    /// Who has which name, `members` being the pods of this node that may ask, and `silent` the nodes that don't answer.
    pub fn zone(
        &self,
        network: &str,
        subnets: Vec<IpNet>,
        members: Vec<Member>,
        silent: &BTreeSet<IpAddr>,
    ) -> NetworkZone {
        let local = self.local.iter().map(|local| host(&local.endpoint, &self.node));
        let remote = self.remote.iter().flat_map(|(vtep, endpoints)| {
            let is_silent = silent.contains(vtep);
            endpoints.iter().map(move |(endpoint, node)| Host { node_is_silent: is_silent, ..host(endpoint, node) })
        });
        let hosts = local.chain(remote).collect();
        NetworkZone { name: network.to_owned(), node: self.node.clone(), subnets, hosts, members }
    }
}

/// Versions order the writes of one API server; they are compared for no other purpose.
fn written(slice: &NetworkNodeSlice) -> u64 {
    slice.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

/// An endpoint as the DNS server knows it.
fn host(endpoint: &Endpoint, node: &str) -> Host {
    let port = |port: &NamedPort| Port {
        name: port.name.clone(),
        protocol: port.protocol.to_ascii_lowercase(),
        number: port.port,
    };
    Host {
        namespace: endpoint.namespace.clone(),
        pod: endpoint.pod.clone(),
        owner: endpoint.owner.clone(),
        aliases: endpoint.aliases.clone(),
        node: node.to_owned(),
        addresses: endpoint.addresses().collect(),
        ports: endpoint.ports.iter().map(port).collect(),
        ready: endpoint.ready,
        publish_not_ready: endpoint.publish_not_ready,
        prefer_same_node: endpoint.prefer_same_node,
        node_is_silent: false,
    }
}

/// The addresses of an endpoint, each with its MAC; none if that can't be read.
fn identities(endpoint: &Endpoint) -> impl Iterator<Item = (IpAddr, Mac)> {
    let mac: Option<Mac> = endpoint.mac.parse().ok();
    endpoint.addresses().filter_map(move |address| Some((address, mac?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::NetworkNodeSliceSpec;

    fn endpoint(namespace: &str, pod: &str, owner: Option<&str>, last: u8, ready: bool) -> Endpoint {
        Endpoint {
            address: format!("10.32.0.{last}"),
            mac: format!("02:00:00:00:00:{last:02x}"),
            namespace: namespace.into(),
            pod: pod.into(),
            owner: owner.map(str::to_owned),
            ready,
            ..Endpoint::default()
        }
    }

    fn slice(node: &str, vtep: u8, version: &str, endpoints: Vec<Endpoint>) -> NetworkNodeSlice {
        let vtep = format!("192.0.2.{vtep}");
        let (network, node_name) = ("backend".into(), node.into());
        let spec = NetworkNodeSliceSpec { network, node: node_name, vtep, endpoints, ..Default::default() };
        let mut slice = NetworkNodeSlice::new(&format!("backend.{node}"), spec);
        slice.metadata.resource_version = Some(version.into());
        slice
    }

    fn places(view: &View<'_>) -> Vec<(u8, usize)> {
        view.remote
            .iter()
            .map(|(vtep, endpoints)| (vtep.to_string().rsplit('.').next().unwrap().parse().unwrap(), endpoints.len()))
            .collect()
    }

    /// `pod node` of those in answers.
    fn published(view: &View<'_>) -> Vec<String> {
        let hosts = view.zone("backend", vec![], vec![], &BTreeSet::new()).hosts;
        let mut names: Vec<String> =
            hosts.iter().filter(|h| h.is_published()).map(|h| format!("{} {}", h.pod, h.node)).collect();
        names.sort();
        names
    }

    #[test]
    fn the_ready_ones_are_answered() {
        let local = [Local { endpoint: endpoint("shop", "db-0", Some("db"), 5, true), asks_from: None, current: true }];
        let there = slice(
            "b",
            2,
            "9",
            vec![endpoint("shop", "db-1", Some("db"), 6, true), endpoint("shop", "db-2", Some("db"), 7, false)],
        );
        let view = View::new("a", &local, [&there]);
        assert_eq!(published(&view), ["db-0 a", "db-1 b"]);
        assert_eq!(
            view.zone("backend", vec![], vec![], &BTreeSet::new()).hosts.len(),
            3,
            "the others can be explained"
        );
        let forwarding = view.forwarding(false);
        assert_eq!((forwarding.local.len(), forwarding.peers[0].endpoints.len()), (1, 2), "unready pods are reachable");
    }

    #[test]
    fn pods_of_silent_nodes_are_told_apart() {
        let (b, c) = (slice("b", 2, "9", vec![endpoint("shop", "db-1", None, 6, true)]), slice("c", 3, "9", vec![]));
        let local = [Local { endpoint: endpoint("shop", "db-0", None, 5, true), asks_from: None, current: true }];
        let silent = BTreeSet::from([IpAddr::from([192, 0, 2, 2])]);
        let zone = View::new("a", &local, [&b, &c]).zone("backend", vec![], vec![], &silent);
        let told: Vec<_> = zone.hosts.iter().map(|h| (h.pod.as_str(), h.node_is_silent)).collect();
        assert_eq!(told, [("db-0", false), ("db-1", true)]);
    }

    #[test]
    fn what_a_pod_asks_for_reaches_the_zone() {
        let mut early = endpoint("shop", "db-0", Some("db"), 5, false);
        early.aliases = vec!["cache".into()];
        early.ports = vec![NamedPort { name: "http".into(), protocol: "TCP".into(), port: 80 }];
        (early.publish_not_ready, early.prefer_same_node) = (true, true);
        let slice = slice("b", 2, "9", vec![early]);
        let view = View::new("a", &[], [&slice]);
        assert_eq!(published(&view), ["db-0 b"]);
        let host = &view.zone("backend", vec![], vec![], &BTreeSet::new()).hosts[0];
        assert_eq!((&*host.aliases, host.owner.as_deref()), (&["cache".to_owned()][..], Some("db")));
        assert!(host.prefer_same_node);
        assert_eq!(host.ports, [Port { name: "http".into(), protocol: "tcp".into(), number: 80 }]);
    }

    #[test]
    fn the_own_slice_is_not_asked() {
        let own = slice("a", 1, "9", vec![endpoint("shop", "gone", None, 9, true)]);
        assert!(View::new("a", &[], [&own]).zone("backend", vec![], vec![], &BTreeSet::new()).hosts.is_empty());
    }

    #[test]
    fn a_moved_pod_is_where_it_is_wanted() {
        // The old node can't be reached: its slice says "ready" for ever.
        let stale = slice("old", 2, "9", vec![endpoint("shop", "db-0", None, 5, true)]);
        let mut here = Local { endpoint: endpoint("shop", "db-0", None, 5, false), asks_from: None, current: true };
        let view = View::new("a", std::slice::from_ref(&here), [&stale]);
        assert_eq!((view.local.len(), places(&view)), (1, vec![(2, 0)]), "wanted here, though not ready yet");
        assert!(published(&view).is_empty());
        // A third node: the later of two ready ones.
        let new = slice("new", 3, "12", vec![endpoint("shop", "db-0", None, 5, true)]);
        assert_eq!(places(&View::new("c", &[], [&new, &stale])), [(2, 0), (3, 1)]);
        assert_eq!(places(&View::new("c", &[], [&stale, &new])), [(2, 0), (3, 1)]);
        // On its way out here, and ready there.
        here.current = false;
        here.endpoint.ready = true;
        assert_eq!(places(&View::new("a", &[here], [&new])), [(3, 1)]);
    }

    fn dual(pod: &str, ipv4: u8, ipv6: u8, ready: bool) -> Endpoint {
        Endpoint { second_address: Some(format!("fd32::{ipv6}")), ..endpoint("shop", pod, None, ipv4, ready) }
    }

    #[test]
    fn both_addresses_are_forwarded_and_named() {
        let here = Local { endpoint: dual("db-0", 5, 5, true), asks_from: None, current: true };
        let (local, there) = ([here], slice("b", 2, "9", vec![dual("db-1", 6, 6, true)]));
        let view = View::new("a", &local, [&there]);
        let forwarding = view.forwarding(false);
        let texts =
            |endpoints: &[(IpAddr, Mac)]| endpoints.iter().map(|(a, mac)| format!("{a} {mac}")).collect::<Vec<_>>();
        assert_eq!(texts(&forwarding.local), ["10.32.0.5 02:00:00:00:00:05", "fd32::5 02:00:00:00:00:05"]);
        let there = texts(&forwarding.peers[0].endpoints);
        assert_eq!(there, ["10.32.0.6 02:00:00:00:00:06", "fd32::6 02:00:00:00:00:06"]);
        let hosts = view.zone("backend", vec![], vec![], &BTreeSet::new()).hosts;
        let addresses: Vec<_> = hosts.iter().flat_map(|host| &host.addresses).map(IpAddr::to_string).collect();
        assert_eq!(addresses, ["10.32.0.5", "fd32::5", "10.32.0.6", "fd32::6"]);
    }

    #[test]
    fn what_an_ipv6_pod_asks_from_is_known_to_its_own_node_only() {
        let mut ipv6 = endpoint("shop", "db-0", None, 5, true);
        ipv6.address = "fd32::5".into();
        let asks_from = Some(Ipv4Addr::new(169, 254, 56, 1));
        let mut here = Local { endpoint: ipv6, asks_from, current: true };
        let view = View::new("a", std::slice::from_ref(&here), []);
        let addresses: Vec<_> = view.forwarding(true).local.iter().map(|(address, _)| address.to_string()).collect();
        assert_eq!(addresses, ["fd32::5", "169.254.56.1"]);
        let hosts = view.zone("backend", vec![], vec![], &BTreeSet::new()).hosts;
        assert_eq!(hosts[0].addresses, ["fd32::5".parse::<IpAddr>().unwrap()], "it is no name's address");
        // The pod is on another node by now: nothing of it is here.
        here.current = false;
        let mut moved = here.endpoint.clone();
        moved.ready = true;
        assert!(View::new("a", &[here], [&slice("b", 2, "9", vec![moved])]).forwarding(true).local.is_empty());
    }

    /// Its addresses are behind one port: an endpoint that has lost one of them has lost the other too.
    #[test]
    fn an_endpoint_is_there_with_all_its_addresses_or_not_at_all() {
        let stale = slice("old", 2, "9", vec![dual("gone", 5, 5, true), dual("stays", 7, 7, true)]);
        for new in [dual("new", 5, 6, true), dual("new", 6, 5, true)] {
            let there = slice("new", 3, "12", vec![new]);
            for order in [[&stale, &there], [&there, &stale]] {
                assert_eq!(published(&View::new("c", &[], order)), ["new new", "stays old"]);
            }
        }
    }

    #[test]
    fn what_can_not_be_read_is_left_out() {
        let mut odd = endpoint("shop", "odd", None, 5, true);
        odd.mac = "no mac".into();
        let slice = slice("b", 2, "9", vec![odd]);
        let view = View::new("a", &[], [&slice]);
        assert!(published(&view).is_empty());
        assert!(view.forwarding(true).peers[0].endpoints.is_empty());
    }
}
