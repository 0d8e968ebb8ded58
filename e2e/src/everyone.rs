//! Who doesn't ask the node's own DNS server: pods on no network, by way of the cluster's DNS, and pods that admission has missed.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    lab::{Lab, repository, text},
    scene::{RELEASE_NAMESPACE, nothing_left, ready},
};

const NAMESPACE: &str = "names";
/// Of the Service `portolan-dns`, out of the lab's range for Services.
const SERVER: &str = "10.96.0.53";
/// The resolver that admission gives to pods.
const RESOLVER: &str = "169.254.53.53";

/// Plays it. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    lab.apply(include_str!("../manifests/names-everyone.yaml"))?;
    for pod in ["server", "stranger"] {
        is_ready(lab, pod)?;
    }
    network_status(lab)?;
    by_the_clusters_dns(lab)?;
    missed_by_admission(lab)?;
    redirected(lab)?;
    lab.step("all of it is deleted; then look for what is left");
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=2m"])?;
    lab.kubectl(&["delete", "containernetwork", "known", "--timeout=60s"])?;
    nothing_left(lab)
}

/// What other programs look for a pod's addresses in.
fn network_status(lab: &Lab) -> Result<()> {
    let annotation = "/metadata/annotations/k8s.v1.cni.cncf.io~1network-status";
    lab.wait("the pod is told of its interface", 30, || {
        let pod = lab.json(&["-n", NAMESPACE, "get", "pod", "server"])?;
        let told: Value = serde_json::from_str(text(&pod, annotation)?)?;
        let ip = text(&told, "/0/ips/0")?;
        ensure!(told[0]["name"] == "portolan/known" && told[0]["interface"] == "eth1", "{told}");
        ensure!(ip.starts_with("10.78.0."), "{told}");
        lab.show(&told);
        Ok(())
    })
}

/// As docs/dns.md tells an operator to set it up, and back.
fn by_the_clusters_dns(lab: &Lab) -> Result<()> {
    lab.step("names for everyone: a pod on no network asks the cluster's DNS for a full name");
    let full = "server.names.known.portolan.internal.";
    ensure!(address(lab, "stranger", full).is_err(), "{full} is known before anybody has asked for that");
    let everyone = |enabled| format!("dns.everyone.enabled={enabled},dns.everyone.clusterIP={SERVER}");
    upgrade(lab, &everyone(true))?;
    let before = corefile(lab)?;
    let block = format!("portolan.internal:53 {{\n    errors\n    forward . {SERVER}\n}}\n");
    set_corefile(lab, &format!("{before}{block}"))?;
    let found = lab.wait(&format!("{full} is known"), 60, || address(lab, "stranger", full))?;
    ensure!(found.starts_with("10.78.0."), "{full} is {found}");
    lab.show(format!("stranger: {full} is {found}"));
    ensure!(address(lab, "stranger", "server.known.").is_err(), "the short name is somebody's for everyone");
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod", "server", "--timeout=60s"])?;
    lab.wait("its name is gone with the pod", 15, || {
        ensure!(address(lab, "stranger", full).is_err(), "{full} is still known");
        // And not because nothing is.
        address(lab, "stranger", "kubernetes.default.svc.cluster.local.")
    })?;
    set_corefile(lab, &before)?;
    upgrade(lab, &everyone(false))
}

/// A pod that is made while the operator is away starts all the same, and its lack of names is told.
fn missed_by_admission(lab: &Lab) -> Result<()> {
    lab.step("a pod that is made while the operator is away: it starts, and is told to lack the network's names");
    make_missed(lab, || Ok(()))?;
    lab.wait("an Event on the pod", 90, || {
        let about = ["--field-selector", "reason=NamesNotInjected,involvedObject.name=missed"];
        let events = lab.json(&[&["-n", NAMESPACE, "get", "events"][..], &about].concat())?;
        let message = text(&events, "/items/0/message")?;
        lab.show(message);
        Ok(())
    })?;
    let why = names_injected(lab, "False")?;
    ensure!(why.contains("names/missed"), "the network's condition doesn't name the pod: {why}");
    lab.show(why);
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod", "missed", "--timeout=60s"])?;
    lab.apply(include_str!("../manifests/names-missed.yaml"))?;
    is_ready(lab, "missed")?;
    ensure!(asks_the_node(lab, "missed")?, "made anew, the pod hasn't got the node's resolver");
    names_injected(lab, "True").map(drop)
}

/// As before, and the chart's value lets such pods ask all the same.
fn redirected(lab: &Lab) -> Result<()> {
    lab.step("the same with dns.redirect: it finds the network's names, and all others");
    upgrade(lab, "dns.redirect=true")?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod", "missed", "--timeout=60s"])?;
    make_missed(lab, || {
        let own = lab.wait("its own name is known to it", 30, || address(lab, "missed", "missed.known."))?;
        ensure!(own.starts_with("10.78.0."), "missed.known. is {own}");
        address(lab, "missed", "kubernetes.default.svc.cluster.local.").map(drop)
    })?;
    names_injected(lab, "True")?;
    upgrade(lab, "dns.redirect=false")
}

/// Makes the pod while the operator, and admission with it, is away, and does `then` before the operator is back.
fn make_missed(lab: &Lab, then: impl FnOnce() -> Result<()>) -> Result<()> {
    let operator = ["-n", RELEASE_NAMESPACE, "get", "deployment", "portolan-operator"];
    let replicas = lab.json(&operator)?["spec"]["replicas"].clone();
    scale_operator(lab, &json!(0))?;
    lab.apply(include_str!("../manifests/names-missed.yaml"))?;
    is_ready(lab, "missed")?;
    ensure!(!asks_the_node(lab, "missed")?, "admission is away, and the pod has the node's resolver");
    then()?;
    scale_operator(lab, &replicas)
}

fn is_ready(lab: &Lab, pod: &str) -> Result<()> {
    lab.wait(&format!("pod {pod} is Ready"), 90, || ready(&lab.json(&["-n", NAMESPACE, "get", "pod", pod])?))
}

/// What a pod's resolver says that a name is.
fn address(lab: &Lab, pod: &str, name: &str) -> Result<String> {
    let printed = lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "getent", "ahostsv4", name])?;
    printed.split_whitespace().next().map(str::to_owned).with_context(|| format!("{pod} finds no {name}"))
}

fn asks_the_node(lab: &Lab, pod: &str) -> Result<bool> {
    Ok(lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "cat", "/etc/resolv.conf"])?.contains(RESOLVER))
}

pub(crate) fn upgrade(lab: &Lab, values: &str) -> Result<()> {
    let chart = repository().join("charts/portolan").canonicalize()?;
    let upgrade = ["upgrade", "portolan", &chart.to_string_lossy(), "--namespace", RELEASE_NAMESPACE, "--reuse-values"];
    lab.helm(&[&upgrade[..], &["--set", values, "--wait", "--timeout", "5m"]].concat()).map(drop)
}

fn corefile(lab: &Lab) -> Result<String> {
    let map = lab.json(&["-n", "kube-system", "get", "configmap", "coredns"])?;
    Ok(text(&map, "/data/Corefile")?.to_owned())
}

/// The lab's CoreDNS doesn't read it again by itself.
fn set_corefile(lab: &Lab, corefile: &str) -> Result<()> {
    let patch = json!({ "data": { "Corefile": corefile } }).to_string();
    lab.kubectl(&["-n", "kube-system", "patch", "configmap", "coredns", "--type=merge", "-p", &patch])?;
    lab.kubectl(&["-n", "kube-system", "rollout", "restart", "deployment/coredns"])?;
    lab.kubectl(&["-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=2m"]).map(drop)
}

fn scale_operator(lab: &Lab, replicas: &Value) -> Result<()> {
    let scale = ["-n", RELEASE_NAMESPACE, "scale", "deployment/portolan-operator"];
    lab.kubectl(&[&scale[..], &[&format!("--replicas={replicas}")]].concat())?;
    lab.wait("the operator is there, or not", 90, || {
        let operator = lab.json(&["-n", RELEASE_NAMESPACE, "get", "deployment", "portolan-operator"])?;
        let status = &operator["status"];
        let count = |field: &str| status[field].as_u64().unwrap_or_default();
        let wanted = replicas.as_u64().unwrap_or_default();
        ensure!(count("replicas") == wanted && count("readyReplicas") == wanted, "{status}");
        Ok(())
    })
}

/// The message of the network's condition, once it is so.
fn names_injected(lab: &Lab, wanted: &str) -> Result<String> {
    lab.wait(&format!("NamesInjected is {wanted}"), 90, || {
        let network = lab.json(&["get", "containernetwork", "known"])?;
        let conditions = network["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
        let found = conditions.iter().find(|condition| condition["type"] == "NamesInjected");
        let found = found.context("no condition NamesInjected")?;
        ensure!(found["status"] == wanted, "{found}");
        Ok(text(found, "/message").unwrap_or_default().to_owned())
    })
}
