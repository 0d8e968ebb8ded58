//! NetworkPolicies on a network: who connects, and who doesn't.

use anyhow::{Context, Result, bail, ensure};

use crate::{
    bad_input::event,
    lab::Lab,
    scene::{nothing_left, ready},
};

const NAMESPACE: &str = "policies";
const ANNOTATION: &str = "portolan.dev/networks";

/// Plays it, on the lab's first two nodes. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes()?;
    let [here, there, ..] = &nodes[..] else { bail!("the lab has {} nodes: two are needed", nodes.len()) };
    lab.step("without policies everybody connects");
    lab.apply(&include_str!("../manifests/policies.yaml").replace("@HERE@", here).replace("@THERE@", there))?;
    for pod in ["server", "friend", "stranger"] {
        lab.wait(&format!("pod {pod} is Ready"), 90, || ready(&lab.json(&["-n", NAMESPACE, "get", "pod", pod])?))?;
    }
    let server = lab.kubectl(&["-n", NAMESPACE, "exec", "server", "--", "hostname", "-I"])?;
    let server = server.split_whitespace().find(|address| address.starts_with("10.83.0.")).context("no address")?;
    connects(lab, "friend", server)?;
    connects(lab, "stranger", server)?;

    lab.step("a policy that lets nobody in, and another that lets in who has a label, to a port with a name");
    lab.apply(include_str!("../manifests/policy-deny.yaml"))?;
    is_kept_out(lab, "friend", server)?;
    lab.apply(include_str!("../manifests/policy-allow.yaml"))?;
    connects(lab, "friend", server)?;
    is_kept_out(lab, "stranger", server)?;

    lab.step("who gets the label comes in");
    lab.kubectl(&["-n", NAMESPACE, "label", "pod", "stranger", "app=friend", "--overwrite"])?;
    connects(lab, "stranger", server)?;

    lab.step("a wrong annotation is told of, and without the policies everybody connects again");
    lab.kubectl(&[
        "-n",
        NAMESPACE,
        "annotate",
        "networkpolicy",
        "allow",
        "--overwrite",
        &format!("{ANNOTATION}=Walled"),
    ])?;
    event(lab, NAMESPACE, "NetworkPolicy", "allow", &[ANNOTATION, "\"Walled\" was given", "allowed"])?;
    is_kept_out(lab, "friend", server)?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "networkpolicies", "--all"])?;
    connects(lab, "friend", server)?;

    lab.step("all of it is deleted; then look for what is left");
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=2m"])?;
    lab.kubectl(&["delete", "containernetwork", "walled", "--timeout=60s"])?;
    nothing_left(lab)
}

fn connects(lab: &Lab, pod: &str, server: &str) -> Result<()> {
    lab.wait(&format!("{pod} connects to {server}"), 30, || query(lab, pod, server).map(drop))
}

fn is_kept_out(lab: &Lab, pod: &str, server: &str) -> Result<()> {
    lab.wait(&format!("{pod} is kept out of {server}"), 30, || {
        let error = query(lab, pod, server).err().context("it connects")?.to_string();
        // Not for another reason, such as a server that is gone.
        ensure!(error.contains("timeout expired"), "{error}");
        Ok(())
    })
}

fn query(lab: &Lab, pod: &str, server: &str) -> Result<String> {
    let to = format!("host={server} user=postgres connect_timeout=2");
    lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "psql", &to, "-tAc", "select 1"])
}
