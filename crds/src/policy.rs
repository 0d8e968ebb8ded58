//! The annotation by which a NetworkPolicy is also about ContainerNetworks.

use std::collections::BTreeSet;

use crate::NETWORKS_ANNOTATION;

/// An annotation of a NetworkPolicy that can't be followed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "annotation {NETWORKS_ANNOTATION}: {given:?} was given; allowed: names of ContainerNetworks, each once, separated by commas, such as \"backend, frontend\" (a policy's networks have no interfaces)"
)]
pub struct PolicyNetworksError {
    given: String,
}

/// The ContainerNetworks that a policy's annotation names.
///
/// # Errors
/// When a part is not the name of a ContainerNetwork, or comes twice.
pub fn policy_networks(text: &str) -> Result<BTreeSet<&str>, PolicyNetworksError> {
    let mut networks = BTreeSet::new();
    for part in text.split(',').map(str::trim) {
        if !is_network_name(part) || !networks.insert(part) {
            return Err(PolicyNetworksError { given: part.to_owned() });
        }
    }
    Ok(networks)
}

/// Whether a ContainerNetwork can be called so: a Kubernetes object's name (RFC 1123 subdomain).
pub fn is_network_name(name: &str) -> bool {
    let label = |l: &str| {
        let fine = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        l.bytes().all(|b| fine(b) || b == b'-')
            && l.bytes().next().is_some_and(fine)
            && l.bytes().last().is_some_and(fine)
    };
    name.len() <= 253 && name.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_interfaces() {
        assert_eq!(policy_networks("backend"), Ok(["backend"].into()));
        assert_eq!(policy_networks(" backend ,a.b"), Ok(["a.b", "backend"].into()));
        for (text, given) in [
            ("", ""),
            ("backend,", ""),
            ("Backend", "Backend"),
            ("backend@eth1", "backend@eth1"),
            ("a, a", "a"),
            (r#"[{"name": "backend"}]"#, r#"[{"name": "backend"}]"#),
        ] {
            let error = policy_networks(text).unwrap_err().to_string();
            let named = format!("annotation portolan.dev/networks: {given:?} was given; allowed: names of");
            assert!(error.starts_with(&named), "{error}");
        }
    }
}
