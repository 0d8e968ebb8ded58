//! What an annotated pod's DNS settings become. Pure.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Pod, PodDNSConfig, PodDNSConfigOption};
use kube::ResourceExt;
use portolan_crds::{DNS_ADDRESS, NETWORKS_ANNOTATION};
use portolan_runtime::admission::follows_cluster_dns;

/// Kubernetes' limits (core/v1 validation): more than these make the pod invalid.
const NAMESERVERS: usize = 3;
const SEARCHES: usize = 32;

/// The DNS settings that `pod`, in `namespace`, shall have; none if it keeps its own.
///
/// A pod that asks for the cluster's DNS (the default) gets ours first and the cluster's second, with the search path it would
/// have had. A pod that chose another policy, or uses the host's network, is left alone.
pub(super) fn dns_config(
    pod: &Pod,
    namespace: &str,
    cluster_dns: Option<IpAddr>,
    cluster_domain: &str,
) -> Option<PodDNSConfig> {
    let spec = pod.spec.as_ref()?;
    if !pod.annotations().contains_key(NETWORKS_ANNOTATION) || !follows_cluster_dns(spec) {
        return None;
    }
    let own = spec.dns_config.clone().unwrap_or_default();
    let servers = [Some(DNS_ADDRESS.to_string()), cluster_dns.map(|address| address.to_string())];
    let searches =
        [format!("{namespace}.svc.{cluster_domain}"), format!("svc.{cluster_domain}"), cluster_domain.to_owned()];
    let mut options = own.options.unwrap_or_default();
    if !options.iter().any(|option| option.name.as_deref() == Some("ndots")) {
        options.push(PodDNSConfigOption { name: Some("ndots".to_owned()), value: Some("5".to_owned()) });
    }
    Some(PodDNSConfig {
        nameservers: Some(merged(servers.into_iter().flatten(), own.nameservers, NAMESERVERS)),
        searches: Some(merged(searches.into_iter(), own.searches, SEARCHES)),
        options: Some(options),
    })
}

fn merged(first: impl Iterator<Item = String>, then: Option<Vec<String>>, limit: usize) -> Vec<String> {
    let mut all = Vec::new();
    for value in first.chain(then.unwrap_or_default()) {
        if !all.contains(&value) && all.len() < limit {
            all.push(value);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn result(spec: Value) -> Option<Value> {
        let pod = json!({"metadata": {"annotations": {NETWORKS_ANNOTATION: "backend"}}, "spec": spec});
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let config = dns_config(&pod, "prod", Some("10.96.0.10".parse().unwrap()), "cluster.local");
        config.map(|config| serde_json::to_value(config).unwrap())
    }

    #[test]
    fn the_default_policy_gets_our_server_first() {
        let expected = json!({
            "nameservers": ["169.254.53.53", "10.96.0.10"],
            "searches": ["prod.svc.cluster.local", "svc.cluster.local", "cluster.local"],
            "options": [{"name": "ndots", "value": "5"}],
        });
        assert_eq!(result(json!({"containers": []})), Some(expected.clone()));
        assert_eq!(result(json!({"containers": [], "dnsPolicy": "ClusterFirst"})), Some(expected));
    }

    #[test]
    fn what_the_pod_set_itself_stays() {
        let given = json!({"containers": [], "dnsConfig": {
            "nameservers": ["192.0.2.1", "192.0.2.2"],
            "searches": ["example.org", "cluster.local"],
            "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}],
        }});
        let expected = json!({
            "nameservers": ["169.254.53.53", "10.96.0.10", "192.0.2.1"],
            "searches": ["prod.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.org"],
            "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}],
        });
        assert_eq!(result(given), Some(expected));
    }

    #[test]
    fn a_pod_that_was_changed_needs_no_more() {
        let changed = result(json!({"containers": []}));
        assert_eq!(result(json!({"containers": [], "dnsPolicy": "None", "dnsConfig": changed})), None);
    }

    #[test]
    fn a_pod_that_chose_otherwise_is_left_alone() {
        for spec in [
            json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {"nameservers": ["192.0.2.1"]}}),
            json!({"containers": [], "dnsPolicy": "Default"}),
            json!({"containers": [], "hostNetwork": true}),
        ] {
            assert_eq!(result(spec.clone()), None, "{spec}");
        }
        let plain: Pod = serde_json::from_value(json!({"spec": {"containers": []}})).unwrap();
        assert_eq!(dns_config(&plain, "prod", None, "cluster.local"), None);
    }
}
