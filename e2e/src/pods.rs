//! What the parts of the test do with pods of a namespace of their own.

use anyhow::{Context, Result, ensure};

use crate::{lab::Lab, lab::text, scene::ready};

/// The annotation that plugs pods into networks, and says which networks a NetworkPolicy is for.
pub const NETWORKS: &str = "portolan.dev/networks";

/// A namespace of the cluster.
#[derive(Clone, Copy)]
pub struct Pods<'a> {
    /// The cluster.
    pub lab: &'a Lab,
    /// Its name.
    pub namespace: &'static str,
}

impl Pods<'_> {
    /// Waits until all of these are Ready.
    ///
    /// # Errors
    /// When one isn't in time.
    pub fn are_ready(&self, pods: &[&str]) -> Result<()> {
        pods.iter().try_for_each(|pod| self.is_ready(pod, 90))
    }

    /// Waits until a pod is Ready; `seconds` is for the native lane.
    ///
    /// # Errors
    /// When it isn't in time.
    pub fn is_ready(&self, pod: &str, seconds: u32) -> Result<()> {
        self.lab.wait(&format!("pod {pod} is Ready"), seconds, || {
            ready(&self.lab.json(&["-n", self.namespace, "get", "pod", pod])?)
        })
    }

    /// Runs a program in a pod and returns what it prints.
    ///
    /// # Errors
    /// When it exits other than with 0; the message has its standard error.
    pub fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        self.lab.kubectl(&[&["-n", self.namespace, "exec", pod, "--"], command].concat())
    }

    /// Runs a line of `bash` in a pod and returns what it prints.
    ///
    /// # Errors
    /// As [`Pods::exec`].
    pub fn shell(&self, pod: &str, line: &str) -> Result<String> {
        self.exec(pod, &["bash", "-c", line])
    }

    /// The pod's address that begins so.
    ///
    /// # Errors
    /// When it has none.
    pub fn address(&self, pod: &str, subnet: &str) -> Result<String> {
        let all = self.exec(pod, &["hostname", "-I"])?;
        let found = all.split_whitespace().find(|address| address.starts_with(subnet));
        found.map(str::to_owned).with_context(|| format!("{pod} has no address {subnet}…: {all}"))
    }

    /// Says anew which networks an object (`pod`, `networkpolicy`) is for.
    ///
    /// # Errors
    /// When it can't be said.
    pub fn annotate(&self, kind: &str, name: &str, networks: &str) -> Result<()> {
        let annotation = format!("{NETWORKS}={networks}");
        self.lab.kubectl(&["-n", self.namespace, "annotate", kind, name, "--overwrite", &annotation]).map(drop)
    }
}

/// Waits until a network's condition is so; returns its message.
///
/// # Errors
/// When it isn't in time.
pub fn condition(lab: &Lab, network: &str, kind: &str, status: &str, reason: &str) -> Result<String> {
    lab.wait(&format!("{kind} of {network} is {status}: {reason}"), 90, || {
        let object = lab.json(&["get", "containernetwork", network])?;
        let conditions = object["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
        let found = conditions.iter().find(|condition| condition["type"] == kind);
        let found = found.with_context(|| format!("no condition {kind}"))?;
        ensure!(found["status"] == status && found["reason"] == reason, "{found}");
        Ok(text(found, "/message").unwrap_or_default().to_owned())
    })
}

/// A node's address, as kubelet says it.
///
/// # Errors
/// When it has none.
pub fn node_address(lab: &Lab, node: &str) -> Result<String> {
    let node = lab.json(&["get", "node", node])?;
    let addresses = node["status"]["addresses"].as_array().context("no addresses")?;
    let internal = addresses.iter().find(|it| it["type"] == "InternalIP").context("no InternalIP")?;
    text(internal, "/address").map(str::to_owned)
}
