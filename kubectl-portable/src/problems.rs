//! What is wrong, in the words of the object's own condition, and the next command. Pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use portolan_crds::{ContainerNetwork, PortableVolume, StorageNode, condition};
use serde::Serialize;

/// One thing that is not as it should be.
#[derive(Debug, Eq, PartialEq, Serialize)]
pub struct Problem {
    /// Kind (short) and name, as kubectl takes them.
    pub object: String,
    /// What is wrong.
    pub message: String,
    /// What to do or look at next.
    pub next: String,
}

/// The problems of a volume.
pub fn of_volume(volume: &PortableVolume) -> Vec<Problem> {
    let status = volume.status.clone().unwrap_or_default();
    let object = format!("pvol/{}", volume.name_any());
    let next = match volume.spec.claim.split_once('/') {
        Some((namespace, claim)) => format!("kubectl -n {namespace} describe pvc {claim}"),
        None => format!("kubectl describe {object}"),
    };
    let mut problems: Vec<Problem> = not_ready(&status.conditions)
        .map(|message| Problem { object: object.clone(), message, next })
        .into_iter()
        .collect();
    if let Some(handoff) = status.handoff
        && let Some(error) = handoff.last_error
    {
        let message = format!("the move from {} to {} fails: {error}", handoff.from, handoff.to);
        if !problems.iter().any(|problem| problem.message.contains(&error)) {
            problems.push(Problem { next: format!("kubectl describe {object}"), object, message });
        }
    }
    problems
}

/// The problems of a storage node.
pub fn of_storage_node(node: &StorageNode) -> Vec<Problem> {
    let name = node.name_any();
    let conditions = node.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    let message = not_ready(conditions);
    let next = format!("kubectl describe snode/{name}; on {name}: zpool status {}", node.spec.pool);
    message.map(|message| Problem { object: format!("snode/{name}"), message, next }).into_iter().collect()
}

/// The problems of a network.
pub fn of_network(network: &ContainerNetwork) -> Vec<Problem> {
    let object = format!("cnet/{}", network.name_any());
    let conditions = network.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    let missed = conditions.iter().find(|it| it.type_ == condition::NAMES_INJECTED && it.status == condition::FALSE);
    let missed = missed.map(|it| Problem {
        object: object.clone(),
        message: it.message.clone(),
        next: "kubectl rollout restart the workloads of the pods that it names".to_owned(),
    });
    let narrow = conditions.iter().find(|it| it.type_ == condition::MTU_MISMATCH && it.status == condition::TRUE);
    let narrow = narrow.map(|it| Problem {
        object: object.clone(),
        message: it.message.clone(),
        next: format!("kubectl edit {object}, or repair the network between the nodes that it names"),
    });
    let split = conditions.iter().find(|it| it.type_ == condition::FAMILY_MISMATCH && it.status == condition::TRUE);
    let split = split.map(|it| Problem {
        object: object.clone(),
        message: it.message.clone(),
        next: "kubectl get nodes -o wide shows each node's first address".to_owned(),
    });
    let others = missed.into_iter().chain(narrow).chain(split);
    let Some(message) = not_ready(conditions) else { return others.collect() };
    let reason = conditions.iter().find(|it| it.type_ == condition::READY).map_or("", |it| it.reason.as_str());
    let next = match reason {
        // A subnet can't be changed: the pods on it would keep their addresses.
        "SubnetOverlaps" | "SubnetInvalid" => format!("kubectl delete {object}, then create it with another subnet"),
        "VNIInUse" | "VNIChanged" | "NoFreeVNI" | "MTUTooSmall" => format!("kubectl edit {object}"),
        "Deleting" => "kubectl delete the pods that it names".to_owned(),
        _ => format!("kubectl describe {object}"),
    };
    [Problem { object, message, next }].into_iter().chain(others).collect()
}

/// Why something isn't ready; none if it is.
fn not_ready(conditions: &[Condition]) -> Option<String> {
    match conditions.iter().find(|it| it.type_ == condition::READY) {
        Some(ready) if ready.status == condition::TRUE => None,
        Some(ready) if ready.message.is_empty() => Some(format!("not ready: {}", ready.reason)),
        Some(ready) => Some(ready.message.clone()),
        None => Some("nobody has taken it up yet: are Portolan's pods running?".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn network(status: Value) -> ContainerNetwork {
        let network = json!({"metadata": {"name": "backend"}, "spec": {"subnets": ["10.32.0.0/16"]}, "status": status});
        serde_json::from_value(network).unwrap()
    }

    fn ready(status: &str, reason: &str, message: &str) -> Value {
        let condition = json!({"type": "Ready", "status": status, "reason": reason, "message": message,
            "lastTransitionTime": "2026-01-01T00:00:00Z"});
        json!({"conditions": [condition]})
    }

    #[test]
    fn what_is_ready_has_no_problem() {
        assert_eq!(of_network(&network(ready("True", "Accepted", ""))), []);
    }

    #[test]
    fn a_problem_has_the_conditions_words_and_a_next_step() {
        let problem = of_network(&network(ready("False", "SubnetOverlaps", "subnet x overlaps y"))).remove(0);
        assert_eq!(problem.object, "cnet/backend");
        assert_eq!(problem.message, "subnet x overlaps y");
        assert!(problem.next.starts_with("kubectl delete cnet/backend"));
        assert!(of_network(&network(json!({})))[0].message.contains("nobody has taken it up"));
    }

    #[test]
    fn pods_without_names_are_a_problem_of_their_network() {
        let mut status = ready("True", "Accepted", "");
        let missed = json!({"type": "NamesInjected", "status": "False", "reason": "PodsNotAdmitted",
            "message": "2 of the pods", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        status["conditions"].as_array_mut().unwrap().push(missed);
        let problems = of_network(&network(status));
        assert_eq!((problems.len(), problems[0].message.as_str()), (1, "2 of the pods"));
        assert!(problems[0].next.starts_with("kubectl rollout restart"));
    }

    #[test]
    fn a_path_that_is_too_small_is_a_problem_of_its_network() {
        let mut status = ready("True", "Accepted", "");
        let mismatch = |status: &str| {
            json!({"type": "MTUMismatch", "status": status, "reason": "PathTooSmall",
                "message": "from a to b 1420 pass", "lastTransitionTime": "2026-01-01T00:00:00Z"})
        };
        status["conditions"].as_array_mut().unwrap().push(mismatch("True"));
        let problems = of_network(&network(status.clone()));
        assert_eq!((problems.len(), problems[0].message.as_str()), (1, "from a to b 1420 pass"));
        status["conditions"][1] = mismatch("False");
        assert_eq!(of_network(&network(status)), []);
    }

    #[test]
    fn nodes_that_do_not_reach_each_other_are_a_problem_of_their_network() {
        let mut status = ready("True", "Accepted", "");
        let mismatch = json!({"type": "IPFamilyMismatch", "status": "True", "reason": "NodesOfBothFamilies",
            "message": "pods on a and pods on b", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        status["conditions"].as_array_mut().unwrap().push(mismatch);
        let problems = of_network(&network(status));
        assert_eq!((problems.len(), problems[0].message.as_str()), (1, "pods on a and pods on b"));
    }

    #[test]
    fn a_failing_move_says_why() {
        let volume = json!({
            "metadata": {"name": "pvc-1"},
            "spec": {"size": "1Gi", "sizeBytes": 1, "claim": "default/db", "placement": {"node": "b"}},
            "status": {
                "conditions": ready("True", "Ready", "")["conditions"],
                "handoff": {"from": "a", "to": "b", "epoch": 2, "phase": "FinalSync", "lastError": "a is unreachable"},
            },
        });
        let problems = of_volume(&serde_json::from_value(volume).unwrap());
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].message, "the move from a to b fails: a is unreachable");
    }
}
