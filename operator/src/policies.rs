//! Says on a NetworkPolicy what is wrong with its annotation `portolan.dev/networks`. The agents, who enforce policies, leave out what can't be
//! read; here there is one that speaks.

use futures::StreamExt;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use portolan_crds::{NETWORKS_ANNOTATION, policy_networks};
use portolan_runtime::events::Events;
use tokio_util::sync::CancellationToken;

const REASON: &str = "NotEnforced";

/// Tells policies until `stop` is cancelled.
pub async fn run(client: Client, events: Events, stop: CancellationToken) {
    let policies = watcher(Api::<NetworkPolicy>::all(client), watcher::Config::default());
    let mut policies = std::pin::pin!(policies.default_backoff().applied_objects().take_until(stop.cancelled()));
    while let Some(policy) = policies.next().await {
        match policy {
            Ok(policy) => {
                if let Some(message) = problem(&policy) {
                    events.warning(&policy.object_ref(&()), REASON, "Enforce", &message).await;
                }
            }
            Err(error) => tracing::warn!(%error, "the watch of NetworkPolicies was interrupted"),
        }
    }
}

fn problem(policy: &NetworkPolicy) -> Option<String> {
    let error = policy_networks(policy.annotations().get(NETWORKS_ANNOTATION)?).err()?;
    Some(format!("{error}; until then the policy is enforced on no ContainerNetwork"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_named() {
        let problem = |annotation: Option<&str>| {
            let mut policy = NetworkPolicy::default();
            policy.metadata.annotations = annotation.map(|text| [(NETWORKS_ANNOTATION.into(), text.into())].into());
            problem(&policy)
        };
        assert_eq!((problem(None), problem(Some("backend, frontend"))), (None, None));
        let message = problem(Some("backend, Frontend")).unwrap();
        assert!(
            message.starts_with("annotation portolan.dev/networks: \"Frontend\" was given; allowed: "),
            "{message}"
        );
        assert!(message.ends_with("enforced on no ContainerNetwork"), "{message}");
    }
}
