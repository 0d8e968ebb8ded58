//! Who the other side may be.

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{IPBlock, NetworkPolicyPeer};
use portolan_crds::Endpoint;

use super::{Policies, selector::matches};

impl<'a> Policies<'a> {
    /// The addresses of a rule's peers; `None` if it names none: then it is whoever it is.
    pub(super) fn peers(&self, namespace: &str, peers: &[NetworkPolicyPeer]) -> Option<Vec<IpNet>> {
        if peers.is_empty() {
            return None;
        }
        let pods = self.chosen(namespace, peers).flat_map(Endpoint::addresses).map(IpNet::from);
        let blocks = peers.iter().filter_map(|peer| peer.ip_block.as_ref()).flat_map(addresses);
        let mut all: Vec<IpNet> = pods.chain(blocks).collect();
        all.sort();
        all.dedup();
        Some(all)
    }

    /// The pods of the network that are peers of a rule: all if it names no peers.
    pub(super) fn chosen(&self, namespace: &str, peers: &[NetworkPolicyPeer]) -> impl Iterator<Item = &'a Endpoint> {
        let is_one = move |endpoint: &&Endpoint| {
            peers.is_empty() || peers.iter().any(|peer| self.is_chosen(namespace, peer, endpoint))
        };
        self.endpoints.iter().copied().filter(is_one)
    }

    fn is_chosen(&self, namespace: &str, peer: &NetworkPolicyPeer, endpoint: &Endpoint) -> bool {
        let is_of_namespace = match &peer.namespace_selector {
            None => endpoint.namespace == namespace,
            Some(selector) => matches(selector, self.namespaces.get(&endpoint.namespace)),
        };
        let is_pod = peer.pod_selector.as_ref().is_none_or(|selector| matches(selector, endpoint.labels.as_ref()));
        let has_selector = peer.namespace_selector.is_some() || peer.pod_selector.is_some();
        has_selector && is_of_namespace && is_pod
    }
}

/// The addresses of a block but for its exceptions; none if one of them can't be read.
fn addresses(block: &IPBlock) -> Vec<IpNet> {
    let read = |text: &String| text.parse::<IpNet>().map(|net| net.trunc());
    let except: Result<Vec<IpNet>, _> = block.except.iter().flatten().map(read).collect();
    match (read(&block.cidr), except) {
        (Ok(block), Ok(except)) => without(block, &except),
        _ => Vec::new(),
    }
}

/// Halves what an exception is in, until it is one of the parts.
fn without(block: IpNet, except: &[IpNet]) -> Vec<IpNet> {
    if except.iter().any(|one| one.contains(&block)) {
        return Vec::new();
    }
    if !except.iter().any(|one| block.contains(one)) {
        return vec![block];
    }
    let halves = block.subnets(block.prefix_len() + 1).into_iter().flatten();
    halves.flat_map(|half| without(half, except)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_without_its_exceptions() {
        let of = |cidr: &str, except: &[&str]| {
            let except = Some(except.iter().map(|&one| one.to_owned()).collect());
            addresses(&IPBlock { cidr: cidr.into(), except })
        };
        let texts = |nets: Vec<IpNet>| nets.iter().map(IpNet::to_string).collect::<Vec<_>>();
        assert_eq!(texts(of("10.32.0.0/24", &[])), ["10.32.0.0/24"]);
        assert_eq!(texts(of("10.32.0.0/24", &["10.32.0.0/25"])), ["10.32.0.128/25"]);
        assert_eq!(texts(of("10.32.0.0/29", &["10.32.0.1/32", "10.32.0.4/30"])), ["10.32.0.0/32", "10.32.0.2/31"]);
        assert_eq!(of("0.0.0.0/0", &["10.32.0.5/32"]).len(), 32);
        assert_eq!(of("::/0", &["fd32::5/128"]).len(), 128);
        assert_eq!(texts(of("10.32.0.0/24", &["10.0.0.0/8"])), [""; 0]);
        assert_eq!(texts(of("10.32.0.0/24", &["10.33.0.0/24", "fd32::/64"])), ["10.32.0.0/24"], "beside it");
        assert_eq!(texts(of("10.32.0.7/24", &["10.32.0.9/25"])), ["10.32.0.128/25"], "with host bits");
        assert_eq!(texts(of("10.32.0.0/24", &["10.32"])), [""; 0], "an exception that can't be read opens nothing");
        assert_eq!(texts(of("10.32", &[])), [""; 0]);
    }
}
