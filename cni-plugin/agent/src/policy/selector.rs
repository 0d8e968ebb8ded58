//! Who is chosen by labels.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::networking::v1::NetworkPolicy,
    apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement},
};
use portolan_crds::Endpoint;

/// An object's labels.
pub type Labels = BTreeMap<String, String>;

/// Whether a selector chooses an object with these labels; `None` if they aren't known.
pub(super) fn matches(selector: &LabelSelector, labels: Option<&Labels>) -> bool {
    let (wanted, expressions) = (selector.match_labels.iter().flatten(), selector.match_expressions.iter().flatten());
    match labels {
        None => wanted.count() == 0 && expressions.count() == 0,
        Some(labels) => {
            wanted.into_iter().all(|(key, value)| labels.get(key) == Some(value))
                && expressions.into_iter().all(|one| holds(one, labels))
        }
    }
}

fn holds(expression: &LabelSelectorRequirement, labels: &Labels) -> bool {
    let value = labels.get(&expression.key);
    let is_listed = || value.is_some_and(|value| expression.values.iter().flatten().any(|one| one == value));
    match expression.operator.as_str() {
        "In" => is_listed(),
        "NotIn" => !is_listed(),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        _ => false,
    }
}

/// Whether a policy selects a pod, as far as the pod's labels are known.
pub(super) fn selects(policy: &NetworkPolicy, endpoint: &Endpoint) -> bool {
    let selector = policy.spec.as_ref().and_then(|spec| spec.pod_selector.as_ref());
    is_of_its_namespace(policy, endpoint) && selector.is_none_or(|selector| matches(selector, endpoint.labels.as_ref()))
}

/// Whether it does so, or the labels aren't known.
pub(super) fn may_select(policy: &NetworkPolicy, endpoint: &Endpoint) -> bool {
    is_of_its_namespace(policy, endpoint) && (endpoint.labels.is_none() || selects(policy, endpoint))
}

fn is_of_its_namespace(policy: &NetworkPolicy, endpoint: &Endpoint) -> bool {
    policy.metadata.namespace.as_deref() == Some(&endpoint.namespace)
}
