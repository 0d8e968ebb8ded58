//! Names of pods whose node is gone.

use std::{collections::BTreeSet, time::Instant};

use anyhow::{Context, Result, ensure};

use crate::{
    lab::{Lab, same, text},
    scene::{NAMESPACE, ready},
};

/// A name that a Ready pod of each node has. With the last dot it isn't sought below the cluster's domains first, whose DNS server may have
/// been on the dead node.
const NAME: &str = "probe.backend.";

/// Waits until a node's pod is left out of the answers that a pod of another node gets, and shows how long that took. The dead
/// node itself says to its end that its pods are Ready.
///
/// # Errors
/// When it is still answered after half a minute.
pub(crate) fn without(lab: &Lab, node: &str) -> Result<()> {
    let since = Instant::now();
    lab.wait("the dead node's pod is left out of answers", 30, || {
        same("answers", answers(lab, node)?.len(), lab.nodes()?.len() - 1)
    })?;
    lab.show(format!("{NAME} has no address on {node}, {:.1} s after its power cut", since.elapsed().as_secs_f64()));
    Ok(())
}

/// Waits until a node's pod is in answers again.
///
/// # Errors
/// When it isn't after two minutes.
pub(crate) fn with(lab: &Lab, node: &str) -> Result<()> {
    lab.wait("the node's pod is in answers again", 120, || {
        same("answers", answers(lab, node)?.len(), lab.nodes()?.len())
    })
}

/// What a pod of another node is told.
fn answers(lab: &Lab, node: &str) -> Result<BTreeSet<String>> {
    let pods = lab.json(&["-n", NAMESPACE, "get", "pods", "-l", "app=probe"])?;
    let pods = pods["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let elsewhere = pods.iter().find(|pod| text(pod, "/spec/nodeName").is_ok_and(|at| at != node));
    let asking = elsewhere.context("a probe on another node")?;
    ready(asking)?;
    let asking = text(asking, "/metadata/name")?;
    let printed = lab.kubectl(&["-n", NAMESPACE, "exec", asking, "--", "getent", "ahostsv4", NAME])?;
    let found = printed.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    ensure!(!printed.is_empty(), "no answer for {NAME}");
    Ok(found)
}
