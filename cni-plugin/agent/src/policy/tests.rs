use serde_json::{Value, json};

use super::*;

fn pod(namespace: &str, name: &str, last: u8, labels: &[(&str, &str)]) -> Endpoint {
    let label = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    Endpoint {
        address: format!("10.32.0.{last}"),
        second_address: Some(format!("fd32::{last}")),
        namespace: namespace.into(),
        pod: name.into(),
        labels: Some(labels.iter().map(label).collect()),
        ..Endpoint::default()
    }
}

fn named(mut pod: Endpoint, name: &str, protocol: &str, port: u16) -> Endpoint {
    pod.ports.push(NamedPort { name: name.into(), protocol: protocol.into(), port });
    pod
}

/// The pods of the tests, each of one label: db (5), web (6) and an old release's, whose labels nobody knows (9), all of shop; web of
/// test (7); db of prod (8), whose namespace isn't known.
fn pods() -> Vec<Endpoint> {
    let unknown = Endpoint { labels: None, ..pod("shop", "old", 9, &[]) };
    vec![
        pod("shop", "db", 5, &[("app", "db")]),
        pod("shop", "web", 6, &[("app", "web")]),
        pod("test", "web", 7, &[("app", "web")]),
        pod("prod", "db", 8, &[("app", "db")]),
        unknown,
    ]
}

fn policy(spec: Value) -> NetworkPolicy {
    let metadata = json!({"name": "p", "namespace": "shop", "annotations": {NETWORKS_ANNOTATION: "backend"}});
    serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
}

fn filter_of(policies: &[NetworkPolicy], pods: &[Endpoint]) -> Filter {
    let namespaces = [("shop", "shop"), ("test", "test")]
        .map(|(name, stage)| (name.to_owned(), BTreeMap::from([("stage".to_owned(), stage.to_owned())])));
    let ports = pods.iter().map(|pod| (format!("{}/{}", pod.namespace, pod.pod), pod));
    Policies::new(policies, namespaces, pods).filter(ports)
}

/// `10.32.0.5` is `5`; `tcp 80`; `*` is all.
fn text(rules: Option<&Vec<Rule>>) -> String {
    let peer = |peer: &IpNet| {
        let text = peer.to_string();
        text.strip_suffix("/32").and_then(|t| t.strip_prefix("10.32.0.")).map_or(text.clone(), str::to_owned)
    };
    let service = |s: &Service| match (s.first, s.last) {
        (0, u16::MAX) => format!("{}", s.protocol),
        (first, last) if first == last => format!("{} {first}", s.protocol),
        (first, last) => format!("{} {first}-{last}", s.protocol),
    };
    let rule = |rule: &Rule| {
        let ipv4 =
            |peers: &Vec<IpNet>| peers.iter().filter(|p| p.addr().is_ipv4()).map(peer).collect::<Vec<_>>().join(" ");
        let peers = rule.peers.as_ref().map_or("*".to_owned(), ipv4);
        let services = |all: &BTreeSet<Service>| all.iter().map(service).collect::<Vec<_>>().join(", ");
        format!("{peers}: {}", rule.services.as_ref().map_or("*".to_owned(), services))
    };
    rules.map_or("open".to_owned(), |rules| rules.iter().map(rule).collect::<Vec<_>>().join("; "))
}

/// Ingress of shop/db under one policy that selects all pods of its namespace.
fn ingress(rules: Value) -> String {
    let filter =
        filter_of(&[policy(json!({"podSelector": {}, "policyTypes": ["Ingress"], "ingress": rules}))], &pods());
    text(filter.ports["shop/db"].ingress.as_ref())
}

fn egress(rules: Value) -> String {
    let filter = filter_of(&[policy(json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": rules}))], &pods());
    text(filter.ports["shop/db"].egress.as_ref())
}

#[test]
fn the_annotation_names_the_networks() {
    let about = |annotation: Option<&str>| {
        let mut policy = policy(json!({"podSelector": {}}));
        policy.metadata.annotations = annotation.map(|text| [(NETWORKS_ANNOTATION.to_owned(), text.to_owned())].into());
        is_about(&policy, "backend")
    };
    assert!(about(Some("backend")) && about(Some("frontend, backend")));
    assert!(!about(None) && !about(Some("frontend")) && !about(Some("backend@eth1")), "not this one");
}

#[test]
fn who_is_selected() {
    let isolated = |selector: Value| {
        let policy = policy(json!({"podSelector": selector}));
        filter_of(&[policy], &pods()).ports.into_keys().collect::<Vec<_>>()
    };
    assert_eq!(isolated(json!({})), ["shop/db", "shop/old", "shop/web"], "of its own namespace only");
    let known = |selector: Value| isolated(selector).into_iter().filter(|name| name != "shop/old").collect::<Vec<_>>();
    assert_eq!(known(json!({"matchLabels": {"app": "db"}})), ["shop/db"]);
    let expression = |key: &str, operator: &str, values: &[&str]| {
        let expression = json!({"key": key, "operator": operator, "values": values});
        known(json!({"matchExpressions": [expression]}))
    };
    assert_eq!(expression("app", "In", &["db", "x"]), ["shop/db"]);
    assert_eq!(expression("app", "NotIn", &["db", "x"]), ["shop/web"]);
    assert_eq!(expression("tier", "NotIn", &["db"]), ["shop/db", "shop/web"], "without the label, too");
    assert_eq!(expression("app", "Exists", &[]), ["shop/db", "shop/web"]);
    assert_eq!(expression("app", "DoesNotExist", &[]), [""; 0]);
    assert_eq!(expression("app", "Equals", &["db"]), [""; 0], "nobody knows that operator");
    let both = json!({"matchLabels": {"app": "db"}, "matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["db"]}]});
    assert_eq!(known(both), [""; 0], "all must hold");
}

#[test]
fn directions_by_default() {
    let directions = |spec: Value| {
        let filter = filter_of(&[policy(spec)], &pods());
        let port = filter.ports.get("shop/db").cloned().unwrap_or_default();
        (text(port.ingress.as_ref()), text(port.egress.as_ref()))
    };
    let (open, closed, all) = ("open".to_owned(), String::new(), "*: *".to_owned());
    assert_eq!(directions(json!({"podSelector": {}})), (closed.clone(), open.clone()));
    assert_eq!(directions(json!({"podSelector": {}, "egress": [{}]})), (closed.clone(), all.clone()));
    assert_eq!(directions(json!({"podSelector": {}, "egress": []})), (closed.clone(), open.clone()));
    assert_eq!(directions(json!({"podSelector": {}, "policyTypes": ["Egress"]})), (open.clone(), closed.clone()));
    assert_eq!(
        directions(json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [{}]})),
        (all, closed)
    );
    let unselected = json!({"podSelector": {"matchLabels": {"app": "web"}}});
    assert_eq!(directions(unselected), (open.clone(), open), "who isn't selected");
}

#[test]
fn who_may_come() {
    assert_eq!(ingress(json!([])), "", "nobody");
    assert_eq!(ingress(json!([{}])), "*: *");
    assert_eq!(ingress(json!([{"from": []}])), "*: *", "an empty list names nobody in particular");
    let from = |peer: Value| ingress(json!([{ "from": [peer] }]));
    let web = json!({"matchLabels": {"app": "web"}});
    assert_eq!(from(json!({"podSelector": web})), "6: *", "of the policy's namespace");
    assert_eq!(from(json!({"podSelector": {}})), "5 6 9: *");
    assert_eq!(from(json!({"namespaceSelector": {"matchLabels": {"stage": "test"}}})), "7: *");
    assert_eq!(from(json!({"namespaceSelector": {}})), "5 6 7 8 9: *");
    assert_eq!(from(json!({"namespaceSelector": {}, "podSelector": web})), "6 7: *", "both at once");
    let not_test = json!({"matchExpressions": [{"key": "stage", "operator": "NotIn", "values": ["test"]}]});
    assert_eq!(from(json!({"namespaceSelector": not_test})), "5 6 9: *", "not of a namespace that isn't known");
    let not_web = json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]});
    assert_eq!(from(json!({"podSelector": not_web})), "5: *", "not one whose labels aren't known");
    assert_eq!(from(json!({"podSelector": {"matchLabels": {"app": "none"}}})), "", "nobody is called so");
    let block = json!({"ipBlock": {"cidr": "10.32.0.0/30", "except": ["10.32.0.2/31"]}});
    assert_eq!(from(block), "10.32.0.0/31: *");
    assert_eq!(from(json!({"ipBlock": {"cidr": "no"}})), "");
    assert_eq!(
        ingress(json!([{"from": [{"podSelector": web}, {"ipBlock": {"cidr": "10.33.0.0/16"}}]}])),
        "6 10.33.0.0/16: *"
    );
}

#[test]
fn a_peer_has_all_its_addresses() {
    let rules = json!([{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]}]);
    let filter = filter_of(&[policy(json!({"podSelector": {}, "ingress": rules}))], &pods());
    let peers = filter.ports["shop/db"].ingress.as_ref().unwrap()[0].peers.as_ref().unwrap();
    assert_eq!(peers.iter().map(IpNet::to_string).collect::<Vec<_>>(), ["10.32.0.6/32", "fd32::6/128"]);
}

#[test]
fn ports_of_rules() {
    let ports = |ports: Value| ingress(json!([{ "ports": ports }]));
    assert_eq!(ports(json!([])), "*: *");
    assert_eq!(ports(json!([{"port": 80}])), "*: tcp 80", "TCP if nothing else is said");
    assert_eq!(ports(json!([{"port": 53, "protocol": "UDP"}, {"port": 5, "protocol": "SCTP"}])), "*: udp 53, sctp 5");
    assert_eq!(ports(json!([{"protocol": "UDP"}])), "*: udp");
    assert_eq!(ports(json!([{}])), "*: tcp");
    assert_eq!(ports(json!([{"port": 8000, "endPort": 8010}])), "*: tcp 8000-8010");
    assert_eq!(ports(json!([{"port": "http"}])), "", "the pod has no such port");
    assert_eq!(ports(json!([{"port": 80, "protocol": "GRE"}])), "");
    assert_eq!(ports(json!([{"port": 80000}])), "");
}

#[test]
fn named_ports_are_the_selected_pods_own() {
    let pods = [
        named(pod("shop", "a", 1, &[]), "http", "TCP", 80),
        named(pod("shop", "b", 2, &[]), "http", "TCP", 8080),
        named(pod("shop", "c", 3, &[]), "http", "UDP", 80),
    ];
    let policy = policy(json!({"podSelector": {}, "ingress": [{"ports": [{"port": "http"}, {"port": 22}]}]}));
    let filter = filter_of(&[policy], &pods);
    let of = |name: &str| text(filter.ports[name].ingress.as_ref());
    assert_eq!(
        (of("shop/a"), of("shop/b"), of("shop/c")),
        ("*: tcp 22, tcp 80".into(), "*: tcp 22, tcp 8080".into(), "*: tcp 22".into())
    );
}

#[test]
fn named_ports_of_egress_are_the_peers_own() {
    let mut pods = pods();
    pods[1] = named(pods[1].clone(), "http", "TCP", 80);
    pods[2] = named(pods[2].clone(), "http", "TCP", 8080);
    let egress = |rule: Value| {
        let policy = policy(json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [rule]}));
        text(filter_of(&[policy], &pods).ports["shop/db"].egress.as_ref())
    };
    let http = json!([{"port": "http"}]);
    assert_eq!(egress(json!({"ports": http})), "6: tcp 80; 7: tcp 8080");
    assert_eq!(egress(json!({"ports": http, "to": [{"podSelector": {}}]})), "6: tcp 80");
    assert_eq!(egress(json!({"ports": http, "to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]})), "", "a block has no names");
    let both = json!([{"port": "http"}, {"port": 22}]);
    assert_eq!(
        egress(json!({"ports": both, "to": [{"namespaceSelector": {}}]})),
        "5 6 7 8 9: tcp 22; 6: tcp 80; 7: tcp 8080"
    );
}

#[test]
fn where_it_may_go() {
    assert_eq!(egress(json!([])), "");
    assert_eq!(egress(json!([{}])), "*: *");
    assert_eq!(
        egress(json!([{"to": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": 80}]}])),
        "6: tcp 80"
    );
}

#[test]
fn rules_and_policies_add_up() {
    let one = json!([{"from": [{"ipBlock": {"cidr": "10.33.0.0/16"}}]}, {"ports": [{"port": 80}]}]);
    assert_eq!(ingress(one.clone()), "*: tcp 80; 10.33.0.0/16: *");
    let policies = [
        policy(json!({"podSelector": {}, "ingress": one})),
        policy(json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{"ports": [{"port": 22}]}]})),
        policy(json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{}]})),
        policy(json!({"podSelector": {}, "policyTypes": ["Egress"]})),
    ];
    let filter = filter_of(&policies, &pods());
    let (db, web) = (&filter.ports["shop/db"], &filter.ports["shop/web"]);
    assert_eq!(text(db.ingress.as_ref()), "*: tcp 22; *: tcp 80; 10.33.0.0/16: *");
    assert!(text(web.ingress.as_ref()).contains("*: *") && text(web.egress.as_ref()).is_empty());
}

#[test]
fn whose_labels_are_not_known_is_isolated_by_all_and_let_by_few() {
    let policies = [
        policy(json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{}]})),
        policy(json!({"podSelector": {}, "ingress": [{"ports": [{"port": 22}]}]})),
    ];
    let filter = filter_of(&policies, &pods());
    assert_eq!(text(filter.ports["shop/old"].ingress.as_ref()), "*: tcp 22");
    let filter = filter_of(&policies[..1], &pods());
    assert_eq!(text(filter.ports["shop/old"].ingress.as_ref()), "");
}

#[test]
fn the_same_rules_are_the_same_word_for_word() {
    let rule = |port: u16| json!({"ports": [{"port": port}]});
    let one = filter_of(&[policy(json!({"podSelector": {}, "ingress": [rule(1), rule(2), rule(1)]}))], &pods());
    let other = filter_of(&[policy(json!({"podSelector": {}, "ingress": [rule(2), rule(1)]}))], &pods());
    assert_eq!(one, other);
}
