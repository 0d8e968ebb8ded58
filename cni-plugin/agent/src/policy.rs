//! From NetworkPolicies to what may pass at this node's ports of one network (networking.k8s.io/v1; the meaning of each field is as in
//! Kubernetes' own reference). Pure.
//!
//! A pod is known on a network by its addresses there. What isn't known never opens anything: a pod whose labels aren't known is isolated
//! by each policy of its namespace, and is let in or out only by selectors that choose all.

mod peers;
mod selector;

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use k8s_openapi::{
    api::networking::v1::{NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPort},
    apimachinery::pkg::util::intstr::IntOrString,
};
use kube::ResourceExt;
use portolan_crds::{Endpoint, NETWORKS_ANNOTATION, NamedPort, policy_networks};
use portolan_net::{Filter, PortFilter, Protocol, Rule, Service};

use selector::Labels;

/// What bears on the rules of one network.
pub struct Policies<'a> {
    policies: Vec<&'a NetworkPolicy>,
    /// The labels of the cluster's namespaces, by name.
    namespaces: BTreeMap<String, Labels>,
    /// Who is on the network, on whatever node.
    endpoints: Vec<&'a Endpoint>,
}

/// Whether a policy is also about a network. One whose annotation can't be read is about none: the operator says so in an Event.
pub fn is_about(policy: &NetworkPolicy, network: &str) -> bool {
    let annotation = policy.annotations().get(NETWORKS_ANNOTATION);
    annotation.is_some_and(|text| policy_networks(text).is_ok_and(|networks| networks.contains(network)))
}

/// A policy's rules, as far as they are the same for all pods that it selects.
struct Resolved<'a> {
    policy: &'a NetworkPolicy,
    ingress: Option<Vec<Ingress<'a>>>,
    egress: Option<Vec<Rule>>,
}

/// A rule of ingress. Named ports are the selected pod's own.
struct Ingress<'a> {
    peers: Option<Vec<IpNet>>,
    ports: &'a [NetworkPolicyPort],
}

impl<'a> Policies<'a> {
    /// `policies` are those that are about the network.
    pub fn new(
        policies: impl IntoIterator<Item = &'a NetworkPolicy>,
        namespaces: impl IntoIterator<Item = (String, Labels)>,
        endpoints: impl IntoIterator<Item = &'a Endpoint>,
    ) -> Self {
        Self {
            policies: policies.into_iter().collect(),
            namespaces: namespaces.into_iter().collect(),
            endpoints: endpoints.into_iter().collect(),
        }
    }

    /// What may pass at these ports, each of which is an endpoint's.
    pub fn filter<'e>(&self, ports: impl IntoIterator<Item = (String, &'e Endpoint)>) -> Filter {
        let resolved: Vec<Resolved<'_>> = self.policies.iter().filter_map(|policy| self.resolve(policy)).collect();
        let of_port = |(port, endpoint)| (port, port_filter(&resolved, endpoint));
        Filter { ports: ports.into_iter().map(of_port).filter(|(_, filter)| !filter.is_open()).collect() }
    }

    fn resolve(&self, policy: &'a NetworkPolicy) -> Option<Resolved<'a>> {
        let spec = policy.spec.as_ref()?;
        let (ingress, egress) = (spec.ingress.as_deref().unwrap_or(&[]), spec.egress.as_deref().unwrap_or(&[]));
        // Without policyTypes: always for ingress, and for egress if there are rules for it.
        let has = |direction: &str, default| match spec.policy_types.as_deref() {
            None | Some([]) => default,
            Some(types) => types.iter().any(|one| one == direction),
        };
        let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
        let ingress =
            has("Ingress", true).then(|| ingress.iter().map(|rule| self.ingress_rule(namespace, rule)).collect());
        let egress = has("Egress", !egress.is_empty())
            .then(|| egress.iter().flat_map(|rule| self.egress_rules(namespace, rule)).collect());
        Some(Resolved { policy, ingress, egress })
    }

    fn ingress_rule(&self, namespace: &str, rule: &'a NetworkPolicyIngressRule) -> Ingress<'a> {
        let from = rule.from.as_deref().unwrap_or(&[]);
        Ingress { peers: self.peers(namespace, from), ports: rule.ports.as_deref().unwrap_or(&[]) }
    }

    /// One rule for all peers, and one more for those that have the same numbers for named ports: these are each peer's own.
    fn egress_rules(&self, namespace: &str, rule: &NetworkPolicyEgressRule) -> Vec<Rule> {
        let (to, ports) = (rule.to.as_deref().unwrap_or(&[]), rule.ports.as_deref().unwrap_or(&[]));
        let mut rules: Vec<Rule> = rule_of(self.peers(namespace, to), services(ports, &[])).into_iter().collect();
        if ports.iter().any(is_named) {
            let mut by_services: BTreeMap<BTreeSet<Service>, Vec<IpNet>> = BTreeMap::new();
            for endpoint in self.chosen(namespace, to) {
                let named = ports.iter().filter(|port| is_named(port));
                let services = named.flat_map(|port| service(port, &endpoint.ports)).collect();
                by_services.entry(services).or_default().extend(endpoint.addresses().map(IpNet::from));
            }
            rules.extend(by_services.into_iter().filter_map(|(services, peers)| rule_of(Some(peers), Some(services))));
        }
        rules
    }
}

/// A rule, unless it lets nothing pass.
fn rule_of(peers: Option<Vec<IpNet>>, services: Option<BTreeSet<Service>>) -> Option<Rule> {
    let is_nobody = peers.as_ref().is_some_and(Vec::is_empty);
    let is_nothing = services.as_ref().is_some_and(BTreeSet::is_empty);
    (!is_nobody && !is_nothing).then_some(Rule { peers, services })
}

/// All that the policies let pass at an endpoint's port: they add up.
fn port_filter(policies: &[Resolved<'_>], endpoint: &Endpoint) -> PortFilter {
    let mut filter = PortFilter::default();
    let selecting = policies.iter().filter(|it| selector::may_select(it.policy, endpoint));
    for policy in selecting {
        let is_certain = selector::selects(policy.policy, endpoint);
        if let Some(rules) = &policy.ingress {
            let of_port = |rule: &Ingress<'_>| rule_of(rule.peers.clone(), services(rule.ports, &endpoint.ports));
            let rules = rules.iter().filter(|_| is_certain).filter_map(of_port);
            filter.ingress.get_or_insert_default().extend(rules);
        }
        if let Some(rules) = &policy.egress {
            let rules = rules.iter().filter(|_| is_certain).cloned();
            filter.egress.get_or_insert_default().extend(rules);
        }
    }
    // In one order, so that ports with the same rules have them word for word.
    for rules in [&mut filter.ingress, &mut filter.egress].into_iter().flatten() {
        rules.sort();
        rules.dedup();
    }
    filter
}

/// What the ports of a rule are, `named` being those of the pod that the traffic is for. `None` is all.
fn services(ports: &[NetworkPolicyPort], named: &[NamedPort]) -> Option<BTreeSet<Service>> {
    (!ports.is_empty()).then(|| ports.iter().flat_map(|port| service(port, named)).collect())
}

fn service(port: &NetworkPolicyPort, named: &[NamedPort]) -> Vec<Service> {
    let name = port.protocol.as_deref().unwrap_or("TCP");
    let protocol = match name {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        _ => return Vec::new(),
    };
    let range = |first: u16, last: u16| Service { protocol, first, last };
    match &port.port {
        None => vec![range(0, u16::MAX)],
        Some(IntOrString::Int(first)) => {
            let last = port.end_port.unwrap_or(*first);
            let both = (u16::try_from(*first), u16::try_from(last));
            if let (Ok(first), Ok(last)) = both { vec![range(first, last)] } else { Vec::new() }
        }
        Some(IntOrString::String(wanted)) => {
            let same = named.iter().filter(|port| port.name == *wanted && port.protocol == name);
            same.map(|port| range(port.port, port.port)).collect()
        }
    }
}

fn is_named(port: &NetworkPolicyPort) -> bool {
    matches!(port.port, Some(IntOrString::String(_)))
}

#[cfg(test)]
mod tests;
