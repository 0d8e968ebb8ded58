//! Pods that admission has missed: it fails open, so a pod that is made while it is away starts, and asks the cluster's DNS only. Pure.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use portolan_runtime::admission;

use crate::pod;

/// The Event's reason.
pub(crate) const REASON: &str = "NamesNotInjected";

/// Whether a pod on a network should ask our DNS server and doesn't, Portolan being in the namespace `own`. One on its way out
/// is past help.
pub(crate) fn is_missed(pod: &Pod, own: &str) -> bool {
    let follows_cluster = pod.spec.as_ref().is_some_and(admission::follows_cluster_dns);
    follows_cluster && pod::is_current(pod) && admission::is_admitted(&pod.namespace().unwrap_or_default(), own)
}

/// What is the matter with such a pod, and what helps.
pub(crate) fn message(pod: &Pod) -> String {
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    let remedy = match pod::owner(pod).map(|owner| (owner.kind.to_lowercase(), owner.name)) {
        Some((kind, owner)) if matches!(kind.as_str(), "statefulset" | "deployment" | "daemonset") => {
            format!("kubectl -n {namespace} rollout restart {kind}/{owner}")
        }
        Some(_) => format!("kubectl -n {namespace} delete pod {name}"),
        None => format!("kubectl -n {namespace} delete pod {name}, then create it again"),
    };
    format!(
        "names of its networks don't resolve in this pod: it was made while portolan-operator's webhook could not be reached, so it asks the cluster's DNS only. Once the webhook is back: {remedy}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(namespace: &str, metadata: Value, mut spec: Value) -> Pod {
        spec["containers"] = json!([]);
        let mut pod = json!({"metadata": metadata, "spec": spec});
        pod["metadata"]["namespace"] = json!(namespace);
        pod["metadata"]["name"] = json!("web-0");
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn who_was_missed() {
        let is = |namespace, spec| is_missed(&pod(namespace, json!({}), spec), "portolan-system");
        assert!(is("shop", json!({})) && is("shop", json!({"dnsPolicy": "ClusterFirst"})));
        assert!(!is("shop", json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["169.254.53.53"]}})), "admitted");
        assert!(
            !is("shop", json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["192.0.2.1"]}})),
            "its own choice"
        );
        assert!(!is("shop", json!({"dnsPolicy": "Default"})) && !is("shop", json!({"hostNetwork": true})));
        assert!(!is("kube-system", json!({})) && !is("portolan-system", json!({})), "never admitted");
        let going = pod("shop", json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}), json!({}));
        assert!(!is_missed(&going, "portolan-system"));
    }

    #[test]
    fn what_helps() {
        let of = |kind: &str| {
            let owner = json!({"apiVersion": "apps/v1", "kind": kind, "name": "web", "uid": "u", "controller": true});
            message(&pod("shop", json!({"ownerReferences": [owner]}), json!({})))
        };
        assert!(
            of("StatefulSet").ends_with(": kubectl -n shop rollout restart statefulset/web"),
            "{}",
            of("StatefulSet")
        );
        assert!(of("Job").ends_with(": kubectl -n shop delete pod web-0"));
        let alone = message(&pod("shop", json!({}), json!({})));
        assert!(alone.ends_with(": kubectl -n shop delete pod web-0, then create it again"));
    }
}
