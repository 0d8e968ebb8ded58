//! `helm uninstall`: the nodes' pod network works on as if Portolan had never been there, and data stays.

use anyhow::{Result, ensure};

use crate::{
    lab::Lab,
    scene::{RELEASE_NAMESPACE, ready},
};

/// Uninstalls the release, and starts a pod after it.
///
/// # Errors
/// When something of Portolan is left in a pod's way.
pub fn play(lab: &Lab) -> Result<()> {
    lab.step("helm uninstall portolan; then a pod starts as if it had never been there");
    lab.helm(&["uninstall", "portolan", "--namespace", RELEASE_NAMESPACE, "--wait", "--timeout", "15m"])?;
    for node in lab.nodes()? {
        let left = lab.on_node(&node, "ls /etc/cni/net.d | grep portolan || true")?;
        ensure!(left.trim().is_empty(), "left in {node}'s CNI configuration: {left}");
    }
    lab.apply(include_str!("../manifests/plain-pod.yaml"))?;
    lab.wait("a pod is Ready without Portolan", 60, || ready(&lab.json(&["get", "pod", "plain"])?))?;
    lab.kubectl(&["delete", "pod", "plain", "--timeout=15m"])?;
    lab.show("no CNI configuration is left, and a pod starts");
    Ok(())
}
