//! A snapshot that is made from the one before answers as one that is made from nothing.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use proptest::prelude::*;

use crate::zone::{Data, Found};
use crate::{Group, Host, Member, NetworkNames, Zone, ZoneHandle};

const NODES: u8 = 4;
const OWN: [&str; 3] = ["shop", "Prod", "no.label"];
const NAMES: [&str; 6] = ["db", "Web", "db.shop", "a.b.c", "shop", ""];

/// Few names, so that they meet. No two pods have one address.
fn host(node: u8, last: u8) -> impl Strategy<Value = Host> {
    let name = || prop::sample::select(&NAMES[..]);
    let more = (proptest::option::of(name()), proptest::collection::vec(name(), 0..3), any::<bool>());
    (prop::sample::select(&OWN[..]), name(), more).prop_map(move |(namespace, pod, (owner, aliases, ready))| Host {
        namespace: namespace.to_owned(),
        pod: pod.to_owned(),
        owner: owner.map(str::to_owned),
        aliases: aliases.into_iter().map(str::to_owned).collect(),
        node: format!("node-{node}"),
        addresses: vec![Ipv4Addr::new(10, 0, node, last).into()],
        ready,
        ..Host::default()
    })
}

/// What a node has from now on; at the positions that are false it keeps the pod that was there.
fn change() -> impl Strategy<Value = (u8, Vec<(bool, Host)>)> {
    (0..NODES).prop_flat_map(|node| {
        let hosts: Vec<_> = (0..3).map(|last| (any::<bool>(), host(node, last))).collect();
        (Just(node), hosts, 0..4usize).prop_map(|(node, mut hosts, length)| {
            hosts.truncate(length);
            (node, hosts)
        })
    })
}

fn names(groups: Vec<Group>) -> NetworkNames {
    let member = |last: u8, namespace: &str| Member {
        address: Ipv4Addr::new(10, 0, 99, last).into(),
        namespace: namespace.to_owned(),
        networks: vec!["net".into()],
    };
    let members = vec![member(1, "shop"), member(2, "PROD"), member(3, "other")];
    NetworkNames {
        name: "Net".into(),
        subnets: vec!["10.0.0.0/16".parse().unwrap()],
        groups,
        members,
        ..Default::default()
    }
}

/// What is told of all names and addresses that there may be, to all who may ask.
fn told(zone: &Zone) -> Vec<String> {
    let labels = ["db", "web", "db.shop", "shop", "a.b.c", "b.c", "c", "none", "prod"];
    let long = labels.iter().flat_map(|name| ["shop", "prod", "none"].map(|end| format!("{name}.{end}.net")));
    let names: Vec<String> = labels.iter().map(|name| format!("{name}.net")).chain(long).collect();
    let reverse = (0..NODES).flat_map(|node| (0..3).map(move |last| format!("{last}.{node}.0.10.in-addr.arpa")));
    let names: Vec<String> = names.into_iter().chain(reverse).collect();
    let asking = (0..4).map(|last| IpAddr::from([10, 0, 99, last]));
    let tell = |found: Option<Found<'_>>| {
        let hosts = |all: Vec<&Host>| {
            let mut all: Vec<String> = all.into_iter().map(|host| format!("{host:?}")).collect();
            all.sort();
            all
        };
        match found.map(|found| found.data) {
            Some(Data::Hosts { all, answered }) => format!("{:?} {:?}", hosts(all), hosts(answered)),
            Some(Data::Ambiguous(mut namespaces)) => {
                namespaces.sort_unstable();
                format!("{namespaces:?}")
            }
            other => format!("{other:?}"),
        }
    };
    asking
        .flat_map(|source| names.iter().map(move |name| (source, name)))
        .map(|(source, name)| format!("{source} {name}: {}", tell(zone.find("net", source, name))))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn it_answers_as_one_that_is_made_from_nothing(changes in proptest::collection::vec(change(), 1..12)) {
        let handle = ZoneHandle::new(Zone::default());
        let mut groups: BTreeMap<u8, Group> = BTreeMap::new();
        for (node, hosts) in changes {
            let before = groups.remove(&node).unwrap_or_default();
            let kept = |(position, (is_new, host)): (usize, (bool, Host))| match before.get(position) {
                Some(there) if !is_new => Arc::clone(there),
                _ => Arc::new(host),
            };
            // Without pods it goes.
            if !hosts.is_empty() {
                groups.insert(node, hosts.into_iter().enumerate().map(kept).collect());
            }
            handle.follow(vec![names(groups.values().cloned().collect())]);
            let anew = ZoneHandle::new(Zone::default());
            let copy = |group: &Group| -> Group { group.iter().map(|host| Arc::new(Host::clone(host))).collect() };
            anew.follow(vec![names(groups.values().map(copy).collect())]);
            prop_assert_eq!(told(&handle.current()), told(&anew.current()));
        }
    }
}
