//! Where a pod's volumes are wanted: a preference that its node affinity gets. Pure.

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, Pod, PreferredSchedulingTerm};
use portolan_crds::{AskedBy, HandoffPhase, PortableVolume};
use serde_json::{Value, json};

/// The strongest preference there is (core/v1 validation: 1 to 100).
const WEIGHT: i32 = 100;

/// The claims of this pod's namespace that it mounts.
pub(super) fn claims(pod: &Pod) -> Vec<String> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let mut claims: Vec<String> =
        volumes.filter_map(|it| Some(it.persistent_volume_claim.as_ref()?.claim_name.clone())).collect();
    claims.sort();
    claims.dedup();
    claims
}

/// The node where a pod that uses the volume starts soonest: where it is wanted; or, of a node that is to be emptied, where
/// the data go ahead.
pub(super) fn node(volume: &PortableVolume) -> Option<String> {
    let handoff = volume.status.as_ref().and_then(|status| status.handoff.as_ref());
    let ahead = handoff.filter(|it| it.phase == HandoffPhase::PreCopy && it.asked_by == AskedBy::Cordon);
    let node = ahead.map_or(&volume.spec.placement.node, |handoff| &handoff.to);
    (!node.is_empty()).then(|| node.clone())
}

/// JSON Patch operations (RFC 6902) that make `pod` prefer `nodes`. What it has stays as it is, unknown fields included.
pub(super) fn patch(pod: &Pod, nodes: &[String]) -> Vec<Value> {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref());
    let of_nodes = affinity.and_then(|affinity| affinity.node_affinity.as_ref());
    let present = of_nodes.and_then(|of_nodes| of_nodes.preferred_during_scheduling_ignored_during_execution.as_ref());
    let mut wanted: Vec<PreferredSchedulingTerm> = Vec::new();
    for term in nodes.iter().map(|node| term(node)) {
        if !wanted.contains(&term) && !present.is_some_and(|present| present.contains(&term)) {
            wanted.push(term);
        }
    }
    if wanted.is_empty() {
        return Vec::new();
    }
    const LIST: &str = "preferredDuringSchedulingIgnoredDuringExecution";
    let add = |path: String, value: Value| json!({ "op": "add", "path": path, "value": value });
    match (affinity, of_nodes, present) {
        (None, ..) => vec![add("/spec/affinity".into(), json!({ "nodeAffinity": { LIST: wanted } }))],
        (_, None, _) => vec![add("/spec/affinity/nodeAffinity".into(), json!({ LIST: wanted }))],
        (_, _, None) => vec![add(format!("/spec/affinity/nodeAffinity/{LIST}"), json!(wanted))],
        _ => wanted.iter().map(|term| add(format!("/spec/affinity/nodeAffinity/{LIST}/-"), json!(term))).collect(),
    }
}

/// A node by its own name: its label `kubernetes.io/hostname` may be another.
fn term(node: &str) -> PreferredSchedulingTerm {
    let by_name = NodeSelectorRequirement {
        key: "metadata.name".to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![node.to_owned()]),
    };
    let preference = NodeSelectorTerm { match_fields: Some(vec![by_name]), match_expressions: None };
    PreferredSchedulingTerm { weight: WEIGHT, preference }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";

    fn pod(spec: Value) -> Pod {
        let mut pod = json!({ "spec": { "containers": [] } });
        for (key, value) in spec.as_object().into_iter().flatten() {
            pod["spec"][key] = value.clone();
        }
        serde_json::from_value(pod).unwrap()
    }

    fn by_name(node: &str) -> Value {
        let fields = json!([{ "key": "metadata.name", "operator": "In", "values": [node] }]);
        json!({ "weight": 100, "preference": { "matchFields": fields } })
    }

    #[test]
    fn the_preference_is_put_where_the_pod_has_none() {
        let b = ["b".to_owned(), "b".to_owned()];
        for (affinity, path, value) in [
            (json!(null), "/spec/affinity", json!({ "nodeAffinity": { PREFERRED: [by_name("b")] } })),
            (json!({ "podAffinity": {} }), "/spec/affinity/nodeAffinity", json!({ PREFERRED: [by_name("b")] })),
            (
                json!({ "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": [] } } }),
                "/spec/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution",
                json!([by_name("b")]),
            ),
            (
                json!({ "nodeAffinity": { PREFERRED: [by_name("a")] } }),
                "/spec/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution/-",
                by_name("b"),
            ),
        ] {
            let made = patch(&pod(json!({ "affinity": affinity })), &b);
            assert_eq!(made, [json!({ "op": "add", "path": path, "value": value })]);
        }
    }

    #[test]
    fn a_pod_that_has_it_is_left_alone() {
        let has = pod(json!({ "affinity": { "nodeAffinity": { PREFERRED: [by_name("b")] } } }));
        assert!(patch(&has, &["b".to_owned()]).is_empty());
        assert!(patch(&pod(json!({})), &[]).is_empty());
    }

    #[test]
    fn the_claims_of_a_pod() {
        let mounts = |claim: &str| json!({ "name": claim, "persistentVolumeClaim": { "claimName": claim } });
        let pod = pod(json!({ "volumes": [mounts("b"), { "name": "x", "emptyDir": {} }, mounts("a"), mounts("b")] }));
        assert_eq!(claims(&pod), ["a", "b"]);
    }

    #[test]
    fn where_a_volume_is_wanted() {
        let volume = |by: &str, phase: &str| -> PortableVolume {
            serde_json::from_value(json!({
                "metadata": { "name": "pvc-1" },
                "spec": { "size": "1Gi", "sizeBytes": 1, "claim": "default/db", "placement": { "node": "a" } },
                "status": { "handoff": { "from": "a", "to": "b", "epoch": 2, "phase": phase, "askedBy": by } },
            }))
            .unwrap()
        };
        assert_eq!(node(&volume("Cordon", "PreCopy")).as_deref(), Some("b"));
        assert_eq!(node(&volume("Migration", "PreCopy")).as_deref(), Some("a"), "it says so itself when it is warm");
    }
}
