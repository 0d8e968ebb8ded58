//! Bad input: a message where the user looks, naming the field and what is allowed, and nothing half-made.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    lab::{Lab, text},
    scene::RELEASE_NAMESPACE,
};

const NAMESPACE: &str = "bad-input";

/// Gives each kind of bad input and reads the answer. Portolan must be installed.
///
/// # Errors
/// When an answer isn't there, or something was made all the same.
pub fn play(lab: &Lab) -> Result<()> {
    lab.step("bad input: a StorageClass parameter, an annotation, a subnet, a size");
    lab.apply(&include_str!("../manifests/bad-input.yaml").replace("@NODE_SUBNET@", &node_subnet(lab)?))?;
    event(lab, NAMESPACE, "PersistentVolumeClaim", "typo", &["compresion", "compression"])?;
    event(lab, NAMESPACE, "Pod", "typo", &["portolan.dev/networks", "bckend"])?;
    lab.wait("the overlapping network says so", 20, || {
        let network = lab.json(&["get", "containernetwork", "overlapping"])?;
        let conditions = network["status"]["conditions"].as_array().context("no conditions")?;
        let ready = conditions.iter().find(|condition| condition["type"] == "Ready").context("no Ready")?;
        ensure!(ready["status"] == "False" && ready["reason"] == "SubnetOverlaps", "{ready}");
        ensure!(text(ready, "/message")?.contains("overlaps"), "{ready}");
        lab.show(format!("containernetwork/overlapping: {}", text(ready, "/message")?));
        Ok(())
    })?;
    let refused = lab.apply(include_str!("../manifests/bad-network.yaml"));
    let reason = refused.err().context("a subnet with host bits was accepted")?.to_string();
    ensure!(reason.contains("10.32.0.0/16"), "{reason}");

    for (kind, what) in [("portablevolumes", "volume"), ("ipclaims", "address"), ("networknodeslices", "slice")] {
        let made = lab.kubectl(&["get", kind, "-o", "name"])?;
        ensure!(made.trim().is_empty(), "a {what} was made: {made}");
    }
    lab.kubectl(&["delete", "containernetwork", "overlapping", "--timeout=60s"])?;
    lab.kubectl(&["delete", "storageclass", "typo"])?;
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=4m"])?;
    of_another_node(lab)?;
    crate::scene::nothing_left(lab)
}

/// What one node's agent says of another node is refused: its name in the token is what the API server knows it by.
fn of_another_node(lab: &Lab) -> Result<()> {
    lab.step("what an agent would say of another node");
    let nodes = lab.nodes()?;
    let (here, there) = nodes.first().zip(nodes.get(1)).context("the lab has two nodes")?;
    let mut slice = tempfile::NamedTempFile::new()?;
    let spec = format!("{{network: nothing, node: {here}, vtep: 192.0.2.1}}");
    writeln!(
        slice,
        "apiVersion: portolan.dev/v1alpha1\nkind: NetworkNodeSlice\nmetadata: {{name: nothing.{here}}}\nspec: {spec}"
    )?;
    let file = slice.path().to_string_lossy().into_owned();
    let annotation = r#"{"metadata": {"annotations": {"portolan.dev/e2e": "bad input"}}}"#;
    let writes = [
        ("portolan-network", vec!["create", "--dry-run=server", "-f", &file]),
        ("portolan-storage", vec!["patch", "storagenode", here, "--dry-run=server", "--type=merge", "-p", annotation]),
    ];
    for (account, write) in writes {
        let user = format!("--as=system:serviceaccount:{RELEASE_NAMESPACE}:{account}");
        let on = |node: &str| format!("--as-user-extra=authentication.kubernetes.io/node-name={node}");
        lab.kubectl(&[&write[..], &[&user, &on(here)]].concat()).with_context(|| format!("{account} of {here}"))?;
        for extra in [vec![on(there)], Vec::new()] {
            let who: Vec<&str> = [&user].into_iter().chain(&extra).map(String::as_str).collect();
            let refused = lab.kubectl(&[&write[..], &who].concat());
            let reason =
                refused.err().with_context(|| format!("{account}: {write:?} as {who:?} was accepted"))?.to_string();
            ensure!(reason.contains("its own node's"), "{reason}");
        }
    }
    Ok(())
}

/// Waits for a Warning on the object whose message has all the words.
///
/// # Errors
/// When there is none in time, with those that there are.
pub fn event(lab: &Lab, namespace: &str, kind: &str, name: &str, words: &[&str]) -> Result<()> {
    lab.wait(&format!("a Warning on {kind} {name} with {words:?}"), 60, || {
        let selector = format!("involvedObject.kind={kind},involvedObject.name={name},type=Warning");
        let events = lab.json(&["-n", namespace, "get", "events", "--field-selector", &selector])?;
        let events = events["items"].as_array().context("no list")?;
        let message = |event: &Value| event["message"].as_str().unwrap_or_default().to_string();
        let found = events.iter().map(message).find(|text| words.iter().all(|word| text.contains(word)));
        let all: Vec<String> = events.iter().map(message).collect();
        lab.show(format!("{kind}/{name}: {}", found.with_context(|| format!("events so far: {all:?}"))?));
        Ok(())
    })
}

/// A subnet that the first node's address lies in.
fn node_subnet(lab: &Lab) -> Result<String> {
    let nodes = lab.json(&["get", "nodes"])?;
    let address = text(&nodes, "/items/0/status/addresses/0/address")?;
    let (network, _) = address.rsplit_once('.').with_context(|| format!("{address} is no IPv4 address"))?;
    Ok(format!("{network}.0/24"))
}
