//! Which pods admission tells to ask Portolan's DNS server: what the webhook goes by, and who looks whether it was there.

use k8s_openapi::api::core::v1::PodSpec;

/// Whether a pod leaves its DNS settings to the cluster. Those that admission has changed don't any more, nor do those that have
/// chosen another policy or use the host's network.
pub fn follows_cluster_dns(spec: &PodSpec) -> bool {
    matches!(spec.dns_policy.as_deref(), None | Some("" | "ClusterFirst")) && spec.host_network != Some(true)
}

/// Whether pods of `namespace` go through admission, Portolan being in `own`: the `namespaceSelector` of the chart's webhooks.
pub fn is_admitted(namespace: &str, own: &str) -> bool {
    namespace != "kube-system" && namespace != own
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn follows(mut spec: Value) -> bool {
        spec["containers"] = json!([]);
        follows_cluster_dns(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn who_leaves_it_to_the_cluster() {
        assert!(follows(json!({})) && follows(json!({"dnsPolicy": "ClusterFirst"})));
        for policy in ["None", "Default", "ClusterFirstWithHostNet"] {
            assert!(!follows(json!({"dnsPolicy": policy})), "{policy}");
        }
        assert!(!follows(json!({"dnsPolicy": "ClusterFirst", "hostNetwork": true})));
    }

    #[test]
    fn namespaces_that_the_webhook_passes_over() {
        assert!(is_admitted("shop", "portolan-system"));
        assert!(!is_admitted("kube-system", "portolan-system") && !is_admitted("portolan-system", "portolan-system"));
    }
}
