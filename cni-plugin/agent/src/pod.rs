//! What the agent needs to know of a Pod.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

/// The annotation that the kubelet puts on the API's image of a static pod: the UID that the container runtime knows it by.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

/// The workload that gives a pod its name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Owner {
    pub kind: String,
    pub name: String,
    pub uid: String,
}

/// Whether this is the pod that a container runtime knows by that UID.
pub(crate) fn is_pod(pod: &Pod, uid: Option<&str>) -> bool {
    let Some(uid) = uid else { return true };
    pod.metadata.uid.as_deref() == Some(uid) || pod.annotations().get(MIRROR_ANNOTATION).is_some_and(|u| u == uid)
}

/// Whether the pod may be in DNS answers: its `Ready` condition holds and it isn't on its way out.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    is_current(pod) && conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// Whether the pod is wanted.
pub(crate) fn is_current(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none()
}

/// The address that the cluster gave the pod.
pub(crate) fn address(pod: &Pod) -> Option<IpAddr> {
    pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()
}

/// The pod's workload. A ReplicaSet's pod belongs to the Deployment that the ReplicaSet's name is made from.
pub(crate) fn owner(pod: &Pod) -> Option<Owner> {
    let reference = pod.owner_references().iter().find(|r| r.controller == Some(true))?;
    let mut owner = Owner { kind: reference.kind.clone(), name: reference.name.clone(), uid: reference.uid.clone() };
    if owner.kind == "ReplicaSet"
        && let Some(hash) = pod.labels().get("pod-template-hash")
        && let Some(name) = owner.name.strip_suffix(&format!("-{hash}"))
    {
        owner.kind = "Deployment".into();
        owner.name = name.to_owned();
    }
    matches!(owner.kind.as_str(), "StatefulSet" | "Deployment" | "ReplicaSet" | "DaemonSet" | "Job").then_some(owner)
}

/// The StatefulSet whose pod this is: its address is kept for it.
pub(crate) fn stateful_set(pod: &Pod) -> Option<Owner> {
    owner(pod).filter(|o| o.kind == "StatefulSet")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(value: serde_json::Value) -> Pod {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn owners() {
        let of = |kind: &str, name: &str| {
            pod(json!({"metadata": {"labels": {"pod-template-hash": "6d4f"}, "ownerReferences": [
                {"apiVersion": "apps/v1", "kind": kind, "name": name, "uid": "u", "controller": true}]}}))
        };
        let name = |pod: &Pod| owner(pod).map(|o| format!("{} {}", o.kind, o.name));
        assert_eq!(name(&of("StatefulSet", "db")).as_deref(), Some("StatefulSet db"));
        assert_eq!(name(&of("ReplicaSet", "web-6d4f")).as_deref(), Some("Deployment web"));
        assert_eq!(name(&of("ReplicaSet", "lonely")).as_deref(), Some("ReplicaSet lonely"));
        assert_eq!(name(&of("Node", "n")), None);
        assert!(stateful_set(&of("StatefulSet", "db")).is_some() && stateful_set(&of("Job", "j")).is_none());
    }

    #[test]
    fn readiness() {
        let ready = json!({"conditions": [{"type": "Ready", "status": "True"}]});
        assert!(is_ready(&pod(json!({"metadata": {}, "status": ready}))));
        assert!(!is_ready(&pod(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "status": ready}))));
        assert!(!is_ready(&pod(
            json!({"metadata": {}, "status": {"conditions": [{"type": "Ready", "status": "False"}]}})
        )));
        assert!(!is_ready(&pod(json!({"metadata": {}}))));
    }

    #[test]
    fn static_pods_have_two_uids() {
        let mirror = pod(json!({"metadata": {"uid": "api", "annotations": {"kubernetes.io/config.mirror": "file"}}}));
        assert!(is_pod(&mirror, Some("file")) && is_pod(&mirror, Some("api")) && is_pod(&mirror, None));
        assert!(!is_pod(&mirror, Some("other")));
    }
}
