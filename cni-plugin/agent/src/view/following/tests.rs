use std::net::Ipv4Addr;

use portolan_crds::NetworkNodeSliceSpec;
use portolan_dns::NetworkZone;
use proptest::prelude::*;

use super::{super::View, *};

/// What may be there of one node or another: few addresses, so that they meet.
#[derive(Clone, Debug)]
enum Step {
    /// A node writes its slice.
    Write {
        node: u8,
        vtep: u8,
        endpoints: Vec<Endpoint>,
    },
    /// It goes, and its slice with it.
    Go(u8),
    /// The watch begins anew: all objects are others, and what they say is the same.
    Relist,
    Local(Vec<Local>),
    Silent(BTreeSet<IpAddr>),
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    let second = proptest::option::weighted(0.3, 0..6u8);
    (0..14u8, second, 0..16u8, any::<bool>(), 0..3u8).prop_map(|(last, second, mac, ready, owner)| Endpoint {
        address: format!("10.32.0.{last}"),
        second_address: second.map(|last| format!("fd32::{last}")),
        mac: if mac == 15 { "no mac".into() } else { format!("02:00:00:00:00:{last:02x}") },
        namespace: "shop".into(),
        pod: format!("web-{last}"),
        owner: Some(format!("web{owner}")),
        ready,
        ..Endpoint::default()
    })
}

fn vtep(last: u8) -> IpAddr {
    [192, 0, 2, last].into()
}

fn step() -> impl Strategy<Value = Step> {
    let endpoints = || proptest::collection::vec(endpoint(), 0..5);
    let local = (endpoint(), any::<bool>(), proptest::option::of(0..9u8)).prop_map(|(endpoint, current, asks)| {
        let asks_from = asks.map(|last| Ipv4Addr::new(169, 254, 56, last));
        Local { endpoint, asks_from, current }
    });
    let silent = proptest::collection::btree_set((1..7u8).prop_map(vtep), 0..3);
    prop_oneof![
        8 => (0..6u8, 1..7u8, endpoints()).prop_map(|(node, vtep, endpoints)| Step::Write { node, vtep, endpoints }),
        2 => (0..6u8).prop_map(Step::Go),
        1 => Just(Step::Relist),
        2 => proptest::collection::vec(local, 0..4).prop_map(Step::Local),
        1 => silent.prop_map(Step::Silent),
    ]
}

fn slice(node: u8, last: u8, version: u64, endpoints: Vec<Endpoint>) -> Arc<NetworkNodeSlice> {
    let vtep = if last == 6 { "none".to_owned() } else { vtep(last).to_string() };
    let spec = NetworkNodeSliceSpec {
        network: "backend".into(),
        node: format!("node-{node}"),
        vtep,
        endpoints,
        ..NetworkNodeSliceSpec::default()
    };
    let mut slice = NetworkNodeSlice::new(&format!("backend.node-{node}"), spec);
    slice.metadata.resource_version = Some(version.to_string());
    Arc::new(slice)
}

/// In one order, whatever the order of what it was made from.
fn sorted(mut forwarding: Forwarding) -> Forwarding {
    forwarding.local.sort();
    forwarding.peers.iter_mut().for_each(|peer| peer.endpoints.sort());
    forwarding
}

fn told(hosts: impl IntoIterator<Item = Host>) -> Vec<String> {
    let mut told: Vec<String> = hosts.into_iter().map(|host| format!("{host:?}")).collect();
    told.sort();
    told
}

fn names(groups: Vec<Group>) -> Vec<String> {
    told(NetworkZone::from(&NetworkNames { groups, ..NetworkNames::default() }).hosts)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn it_comes_to_what_the_whole_is(steps in proptest::collection::vec(step(), 1..25)) {
        let (mut slices, mut local, mut silent) = (BTreeMap::new(), Vec::new(), BTreeSet::new());
        let mut following = Following::default();
        for (version, step) in (1..).zip(steps) {
            match step {
                // Version 0 is none that can be read.
                Step::Write { node, vtep, endpoints } => drop(slices.insert(node, slice(node, vtep, version / 2, endpoints))),
                Step::Go(node) => drop(slices.remove(&node)),
                Step::Relist => slices.values_mut().for_each(|it| *it = Arc::new(NetworkNodeSlice::clone(it))),
                Step::Local(now) => local = now,
                Step::Silent(now) => silent = now,
            }
            following.follow("node-0", &local, slices.values(), &silent);
            let whole = View::new("node-0", &local, slices.values().map(AsRef::as_ref));
            prop_assert_eq!(sorted(following.forwarding(true)), sorted(whole.forwarding(true)));
            let zone = whole.zone("backend", vec![], vec![], &silent);
            prop_assert_eq!(names(following.groups()), told(zone.hosts));
        }
    }
}

#[test]
fn what_has_not_changed_is_the_same() {
    let pod = |last: u8| Endpoint {
        address: format!("10.32.0.{last}"),
        mac: format!("02:00:00:00:00:{last:02x}"),
        namespace: "shop".into(),
        pod: format!("web-{last}"),
        ..Endpoint::default()
    };
    let mut slices = vec![slice(1, 1, 1, vec![pod(1), pod(2)]), slice(2, 2, 1, vec![pod(3)])];
    let mut following = Following::default();
    following.follow("node-0", &[], &slices, &BTreeSet::new());
    let before = following.groups();
    slices[0] = slice(1, 1, 2, vec![pod(1), Endpoint { ready: true, ..pod(2) }]);
    following.follow("node-0", &[], &slices, &BTreeSet::new());
    let after = following.groups();
    let is_same = |group: usize| Arc::ptr_eq(&before[group], &after[group]);
    assert!(is_same(0) && !is_same(1) && is_same(2), "this node, node 1, node 2");
    assert!(Arc::ptr_eq(&before[1][0], &after[1][0]) && !Arc::ptr_eq(&before[1][1], &after[1][1]));
}

#[test]
fn everyone_is_told_of_all_networks() {
    let of = |network: &str, node: u8, pod: &str, last: u8| {
        let endpoint = Endpoint {
            address: format!("10.32.0.{last}"),
            mac: format!("02:00:00:00:00:{last:02x}"),
            namespace: "shop".into(),
            pod: pod.into(),
            ready: true,
            ..Endpoint::default()
        };
        let mut slice = NetworkNodeSlice::clone(&slice(node, node + 1, 9, vec![endpoint]));
        slice.metadata.name = Some(format!("{network}.node-{node}"));
        slice.spec.network = network.into();
        Arc::new(slice)
    };
    // The first is older than what this node itself knows.
    let slices = [of("backend", 0, "gone", 9), of("backend", 1, "db-1", 6), of("frontend", 1, "web", 5)];
    let silent = BTreeSet::from([vtep(2)]);
    let mut own = Following::default();
    let endpoint = Endpoint { pod: "db-0".into(), ..slices[1].spec.endpoints[0].clone() };
    let endpoint = Endpoint { address: "10.32.0.5".into(), mac: "02:00:00:00:00:05".into(), ..endpoint };
    own.follow("node-0", &[Local { endpoint, asks_from: None, current: true }], &slices[..2], &silent);
    let (views, mut others) = (BTreeMap::from([("backend".to_owned(), own)]), BTreeMap::new());
    let by_network: BTreeMap<&str, Vec<&Arc<NetworkNodeSlice>>> =
        BTreeMap::from([("backend", slices[..2].iter().collect()), ("frontend", vec![&slices[2]])]);
    let known = ["empty".to_owned(), "backend".to_owned()];
    for _ in 0..2 {
        let zones = names_for_everyone(known.clone(), &views, &mut others, &by_network, &silent);
        let told: Vec<_> = zones
            .iter()
            .map(|zone| {
                let hosts = NetworkZone::from(zone).hosts;
                let pods: Vec<_> = hosts.into_iter().map(|it| (it.pod, it.node_is_silent)).collect();
                (zone.name.as_str(), pods)
            })
            .collect();
        let pod = |name: &str, is_silent| (name.to_owned(), is_silent);
        let expected = [
            ("backend", vec![pod("db-0", false), pod("db-1", true)]),
            ("empty", vec![]),
            ("frontend", vec![pod("web", true)]),
        ];
        assert_eq!(told, expected);
        assert!(zones.iter().all(|zone| zone.node.is_empty() && zone.members.is_empty()));
    }
}
