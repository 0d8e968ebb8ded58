//! `portolan-operator uninstall`: takes Portolan out of every node's container runtime, before Helm deletes the agents.
//!
//! Left behind, the CNI configuration would keep every new pod waiting for an agent that is gone. So the agents' DaemonSet is
//! given the agent's own `uninstall` to run, and each node is waited for.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::time::Instant;

const DAEMON_SET: &str = "portolan-network";
/// The DaemonSet controller's mark of the template that a pod was made from.
const TEMPLATE_GENERATION: &str = "pod-template-generation";
const PATIENCE: Duration = Duration::from_secs(180);
const POLL_EVERY: Duration = Duration::from_secs(1);

/// Uninstalling did not end well.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    /// The API refused something.
    #[error("can't {verb}")]
    Api {
        /// What was tried.
        verb: &'static str,
        /// Why.
        source: kube::Error,
    },
    /// Some nodes didn't answer.
    #[error(
        "Portolan's CNI configuration is still on {nodes}: bring them back and uninstall again, or uninstall with --no-hooks \
         and delete 00-portolan.conflist there by hand"
    )]
    Unreached {
        /// Their names.
        nodes: String,
    },
}

fn failed(verb: &'static str) -> impl Fn(kube::Error) -> UninstallError {
    move |source| UninstallError::Api { verb, source }
}

/// Runs `portolan-agent uninstall` on every node that has an agent, and waits until it has.
///
/// # Errors
/// When the DaemonSet can't be changed, or a node didn't do it in time.
pub async fn run(client: Client, namespace: &str) -> Result<(), UninstallError> {
    let daemon_sets = Api::<DaemonSet>::namespaced(client.clone(), namespace);
    let Some(daemon_set) = daemon_sets.get_opt(DAEMON_SET).await.map_err(failed("read DaemonSet portolan-network"))?
    else {
        return Ok(());
    };
    let patch = Patch::Strategic(changed(&daemon_set));
    let daemon_set = daemon_sets
        .patch(DAEMON_SET, &PatchParams::default(), &patch)
        .await
        .map_err(failed("change DaemonSet portolan-network"))?;
    let generation = daemon_set.metadata.generation.unwrap_or_default().to_string();
    let wanted = daemon_set.status.as_ref().map_or(0, |status| status.desired_number_scheduled);

    let pods = Api::<Pod>::namespaced(client, namespace);
    let ours = ListParams::default().labels(&format!("app.kubernetes.io/name={DAEMON_SET}"));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let pods = pods.list(&ours).await.map_err(failed("list the agents' Pods"))?.items;
        let (done, open) = progress(&pods, &generation);
        if open.is_empty() && i32::try_from(done).unwrap_or(i32::MAX) >= wanted {
            tracing::info!(nodes = done, "Portolan is out of the nodes' container runtimes");
            return Ok(());
        }
        if Instant::now() >= deadline {
            let nodes =
                if open.is_empty() { "a node without an agent".to_owned() } else { Vec::from_iter(open).join(", ") };
            return Err(UninstallError::Unreached { nodes });
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
}

/// The DaemonSet with `uninstall` in place of the agent's own work, everywhere at once.
fn changed(daemon_set: &DaemonSet) -> Value {
    let containers =
        daemon_set.spec.iter().flat_map(|spec| spec.template.spec.iter()).flat_map(|spec| &spec.containers);
    let containers: Vec<Value> = containers
        .map(|container| {
            let args = container.args.iter().flatten().filter(|arg| {
                ["uninstall", "--host-root=", "--cni-conf-dir=", "--cni-bin-dir="]
                    .iter()
                    .any(|kept| arg.starts_with(kept))
            });
            let mut args: Vec<String> = args.filter(|arg| *arg != "uninstall").cloned().collect();
            args.insert(0, "uninstall".to_owned());
            json!({"name": container.name, "args": args, "readinessProbe": null, "livenessProbe": null})
        })
        .collect();
    json!({"spec": {
        "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%", "maxSurge": 0}},
        "template": {"spec": {"containers": containers, "terminationGracePeriodSeconds": 5}},
    }})
}

/// How many nodes have done it, and which have not.
fn progress(pods: &[Pod], generation: &str) -> (usize, BTreeSet<String>) {
    let (done, open): (Vec<&Pod>, Vec<&Pod>) = pods.iter().partition(|pod| {
        pod.labels().get(TEMPLATE_GENERATION).is_some_and(|made_from| made_from == generation)
            && pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten()).any(has_succeeded)
    });
    let node = |pod: &&Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_else(|| pod.name_any());
    (done.len(), open.iter().map(node).collect())
}

/// A DaemonSet's container is started again whenever it ends: what counts is how it ended.
fn has_succeeded(status: &ContainerStatus) -> bool {
    [&status.state, &status.last_state]
        .into_iter()
        .flatten()
        .filter_map(|state| state.terminated.as_ref())
        .any(|terminated| terminated.exit_code == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_paths_stay() {
        let daemon_set = json!({"spec": {"selector": {}, "template": {"spec": {"containers": [{
            "name": "network",
            "args": ["--host-root=/host", "--cni-conf-dir=/etc/cni/net.d", "--cni-bin-dir=/opt/cni/bin", "--vxlan-port=7789"],
        }]}}}});
        let patch = changed(&serde_json::from_value(daemon_set).unwrap());
        let args = &patch["spec"]["template"]["spec"]["containers"][0]["args"];
        assert_eq!(
            *args,
            json!(["uninstall", "--host-root=/host", "--cni-conf-dir=/etc/cni/net.d", "--cni-bin-dir=/opt/cni/bin"])
        );
    }

    #[test]
    fn a_node_is_done_when_the_new_pod_has_succeeded() {
        let pod = |node: &str, generation: &str, state: Value| -> Pod {
            serde_json::from_value(json!({
                "metadata": {"name": node, "labels": {TEMPLATE_GENERATION: generation}},
                "spec": {"nodeName": node, "containers": []},
                "status": {"containerStatuses": [
                    {"name": "network", "image": "", "imageID": "", "ready": false, "restartCount": 0, "lastState": state},
                ]},
            }))
            .unwrap()
        };
        let ended = |code: i32| json!({"terminated": {"exitCode": code}});
        let pods =
            [pod("a", "2", ended(0)), pod("b", "1", ended(0)), pod("c", "2", ended(1)), pod("d", "2", json!({}))];
        let (done, open) = progress(&pods, "2");
        assert_eq!(done, 1);
        assert_eq!(Vec::from_iter(open), ["b", "c", "d"]);
    }
}
