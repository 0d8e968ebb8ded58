//! What a pod says of its own names: annotations and named ports.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Container, Pod};
use kube::ResourceExt;
use portolan_crds::{DNS_NAMES_ANNOTATION, NamedPort, PREFER_SAME_NODE_ANNOTATION, PUBLISH_NOT_READY_ANNOTATION};

use crate::pod;

/// The longest DNS label (RFC 1035, 2.3.4).
const LABEL: usize = 63;
/// More names than this in one annotation are left out: they are written to every node.
const NAMES: usize = 16;

/// What the other nodes are to know of a pod's names.
#[derive(Debug, Default, Eq, PartialEq)]
pub(crate) struct Names {
    pub aliases: Vec<String>,
    pub ports: Vec<NamedPort>,
    pub publish_not_ready: bool,
    pub prefer_same_node: bool,
}

/// A name in the annotation that can't be one.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum NameError {
    /// It is no DNS label.
    #[error(
        "annotation portolan.dev/dns-names: {0:?} is left out: names are DNS labels of 1 to 63 characters a-z, 0-9 and '-' that neither begin nor end with '-'"
    )]
    NoLabel(String),
    /// There are too many.
    #[error("annotation portolan.dev/dns-names: {0:?} is left out: a pod may have 16 names")]
    TooMany(String),
}

/// The names of a pod, as far as they are right. A pod on its way out publishes nothing.
pub(crate) fn of(pod: &Pod) -> Names {
    let is_true = |annotation| pod.annotations().get(annotation).is_some_and(|value| value == "true");
    Names {
        aliases: aliases(pod).0,
        ports: ports(pod),
        publish_not_ready: is_true(PUBLISH_NOT_READY_ANNOTATION) && pod::is_current(pod),
        prefer_same_node: is_true(PREFER_SAME_NODE_ANNOTATION),
    }
}

/// What is wrong in the annotation.
pub(crate) fn errors(pod: &Pod) -> Vec<NameError> {
    aliases(pod).1
}

fn aliases(pod: &Pod) -> (Vec<String>, Vec<NameError>) {
    let text = pod.annotations().get(DNS_NAMES_ANNOTATION).map(String::as_str).unwrap_or_default();
    let (mut names, mut errors) = (BTreeSet::new(), Vec::new());
    for name in text.split(',').map(str::trim) {
        if text.trim().is_empty() || names.contains(name) {
            continue;
        }
        if !is_label(name) {
            errors.push(NameError::NoLabel(name.to_owned()));
        } else if names.len() == NAMES {
            errors.push(NameError::TooMany(name.to_owned()));
        } else {
            names.insert(name.to_owned());
        }
    }
    (names.into_iter().collect(), errors)
}

fn is_label(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=LABEL).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('-') && !name.ends_with('-')
}

/// The named ports of all containers that run beside each other: sidecars are init containers that are restarted.
fn ports(pod: &Pod) -> Vec<NamedPort> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let is_sidecar = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let sidecars = spec.init_containers.iter().flatten().filter(is_sidecar);
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    let named = ports.filter_map(|port| {
        let number = u16::try_from(port.container_port).ok()?;
        let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
        Some(NamedPort { name: port.name.clone()?, protocol, port: number })
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(value: serde_json::Value) -> Pod {
        serde_json::from_value(value).unwrap()
    }

    fn named(text: &str) -> Pod {
        pod(json!({"metadata": {"annotations": {DNS_NAMES_ANNOTATION: text}}}))
    }

    #[test]
    fn aliases_are_labels_and_the_rest_is_left_out() {
        assert_eq!(of(&named("www, cache,www")).aliases, ["cache", "www"]);
        assert_eq!(of(&named(" ")), Names::default());
        let long = "a".repeat(64);
        for wrong in ["Www", "db.prod", "-a", "a-", "a_b", "*", "ä", &long, ""] {
            let pod = named(&format!("{wrong},www"));
            assert_eq!(of(&pod).aliases, ["www"], "{wrong}");
            let errors: Vec<String> = errors(&pod).iter().map(ToString::to_string).collect();
            assert!(errors.len() == 1 && errors[0].contains(&format!("{wrong:?} is left out")), "{errors:?}");
        }
        let many: Vec<String> = (10..27).map(|n| format!("n{n}")).collect();
        let pod = named(&many.join(","));
        assert_eq!((of(&pod).aliases.len(), errors(&pod)), (16, vec![NameError::TooMany("n26".to_owned())]));
    }

    #[test]
    fn ports_with_names() {
        let pod = pod(json!({"spec": {
            "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 80}, {"containerPort": 81}]}],
            "initContainers": [
                {"name": "s", "restartPolicy": "Always", "ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
                {"name": "i", "ports": [{"name": "once", "containerPort": 1}]}],
        }}));
        let port = |name: &str, protocol: &str, port| NamedPort { name: name.into(), protocol: protocol.into(), port };
        assert_eq!(of(&pod).ports, [port("http", "TCP", 80), port("dns", "UDP", 53)]);
    }

    #[test]
    fn a_pod_that_ends_publishes_nothing() {
        let publishes = |value: &str, deleted: serde_json::Value| {
            let annotations = json!({PUBLISH_NOT_READY_ANNOTATION: value});
            of(&pod(json!({"metadata": {"annotations": annotations, "deletionTimestamp": deleted}}))).publish_not_ready
        };
        assert!(publishes("true", json!(null)));
        assert!(!publishes("yes", json!(null)));
        assert!(!publishes("true", json!("2026-01-01T00:00:00Z")));
    }
}
