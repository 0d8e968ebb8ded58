//! Networks' ways outside: who gets there, as whom, and what is said when nobody does.

use std::{
    io::{BufRead, BufReader},
    process::Child,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::{
    bad_input::event,
    lab::{Lab, same, text},
    pods::{Pods, condition, node_address},
    scene::nothing_left,
};

const NAMESPACE: &str = "egress";
/// The control plane's: on none of the cluster's networks, and all nodes know the way there.
const OUTSIDE: &str = "10.89.0.1";
const PORT: &str = "7007";
/// What the pods of the network `outward` ask for that go outside.
const BY_GATEWAY: &str = r#"[{"name": "outward", "default-route": ["10.90.0.1"]}]"#;
/// A claim that nobody but a user who writes one by hand ever makes: for the gateway's address.
const CLAIM: &str = "outward.egress.taker-0";

/// Plays it, on the lab's first two nodes. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes()?;
    let [here, there, ..] = &nodes[..] else { bail!("the lab has {} nodes: two are needed", nodes.len()) };
    let pods = Pods { lab, namespace: NAMESPACE };
    let outside = Outside::start(lab)?;
    let addresses = (node_address(lab, here)?, node_address(lab, there)?);

    lab.step("a pod has the address that is to be the gateway's: it stays, there is no way outside, and the network says why");
    lab.apply(&include_str!("../manifests/egress.yaml").replace("@HERE@", here).replace("@THERE@", there))?;
    claim_the_gateways_address(lab)?;
    pods.are_ready(&["web-0", "taker-0", "far", "other"])?;
    same("the taker's address", pods.address("taker-0", "10.90.0.")?.as_str(), "10.90.0.1")?;
    lab.kubectl(&["patch", "containernetwork", "outward", "--type=merge", "-p", r#"{"spec": {"egressNAT": true}}"#])?;
    let why = condition(lab, "outward", "EgressReady", "False", "GatewayTaken")?;
    ensure!(why.contains("10.90.0.1") && why.contains("egress/taker-0"), "{why}");
    is_described(lab, &["EgressReady", "False", "GatewayTaken", "pod egress/taker-0"])?;
    pods.annotate("pod", "web-0", BY_GATEWAY)?;
    lab.wait("an Event tells of the new route", 30, || {
        let about = ["--field-selector", "reason=Routed,involvedObject.name=web-0", "-o", "name"];
        let events = lab.kubectl(&[&["-n", NAMESPACE, "get", "events"][..], &about].concat())?;
        ensure!(!events.is_empty(), "none");
        Ok(())
    })?;
    ensure!(outside.sees(&pods, "web-0").is_err(), "there is a way outside");

    lab.step("when the pod is made anew its claim keeps it from starting; without the claim it gets another address");
    lab.kubectl(&["-n", NAMESPACE, "delete", "pod", "taker-0", "--timeout=60s"])?;
    let by = condition(lab, "outward", "EgressReady", "True", "GatewayOnEachNode")?;
    same("the condition's message", by.as_str(), "by 10.90.0.1")?;
    is_described(lab, &["EgressReady", "True", "GatewayOnEachNode", "by 10.90.0.1"])?;
    let_start(lab)?;
    event(lab, NAMESPACE, "Pod", "taker-0", &["10.90.0.1", CLAIM])?;
    lab.kubectl(&["delete", "ipclaim", CLAIM, "--timeout=60s"])?;

    lab.step("pods are seen outside as their node; who isn't asked for it goes by eth0, as ever");
    // It has asked at which MAC the gateway is while that was the taker's: the gateway has told it.
    outside.is_seen(&pods, "web-0", &addresses.0)?;
    let by_eth0 = outside.sees(&pods, "far")?;
    ensure!(by_eth0.starts_with("10.244."), "far is seen as {by_eth0}");
    pods.annotate("pod", "far", r#"[{"name": "beside", "default-route": ["10.91.0.1"]}, {"name": "six"}]"#)?;
    outside.is_seen(&pods, "far", &addresses.1)?;
    pods.exec("far", &["ping", "-c", "1", "-W", "2", "-I", "eth1", OUTSIDE])?;
    let by_inward = pods.exec("other", &["ping", "-c", "1", "-W", "2", "-I", "eth2", OUTSIDE]);
    ensure!(by_inward.is_err(), "a network without egressNAT has a way outside");
    event(lab, NAMESPACE, "Pod", "refused", &["default-route: 10.92.0.1", "inward", "egressNAT"])?;
    let why = condition(lab, "six", "EgressReady", "False", "NodesDoNotForward")?;
    ensure!(why.contains(&**there) && why.contains("net.ipv6.conf.all.forwarding"), "{why}");
    lab.show(why);

    lab.step("no pod of another network is reached by it, though the node knows the way");
    let other = pods.address("other", "10.91.0.")?;
    let ping = |pod: &str| pods.exec(pod, &["ping", "-c", "1", "-W", "2", &other]);
    lab.wait("it answers on its own network", 30, || ping("far"))?;
    let network = lab.json(&["get", "containernetwork", "beside"])?;
    let vni = network["status"]["vni"].as_u64().context("no VNI")?;
    let inner = format!("$(ip -n portolan-{vni} -4 -o address show dev gw0 | awk '{{print $4}}' | cut -d/ -f1)");
    lab.on_node(here, &format!("ip route add {other}/32 dev pgw{vni} via {inner}"))?;
    ensure!(ping("web-0").is_err(), "web-0 reaches a pod of another network");

    lab.step("a NetworkPolicy on the network closes it outside, and opens it again");
    policy(lab, "[]")?;
    lab.wait("web-0 gets nowhere", 30, || {
        ensure!(outside.sees(&pods, "web-0").is_err(), "it gets out");
        Ok(())
    })?;
    outside.is_seen(&pods, "far", &addresses.1)?;
    policy(lab, &format!("[{{to: [{{ipBlock: {{cidr: {OUTSIDE}/32}}}}]}}]"))?;
    outside.is_seen(&pods, "web-0", &addresses.0)?;

    lab.step("moved, it has its address still, and is seen as the other node");
    let before = pods.address("web-0", "10.90.0.")?;
    let template = json!({"spec": {"template": {
        "metadata": {"annotations": {"portolan.dev/networks": BY_GATEWAY}},
        "spec": {"nodeSelector": {"kubernetes.io/hostname": there}}}}});
    lab.kubectl(&["-n", NAMESPACE, "patch", "statefulset", "web", "--type=merge", "-p", &template.to_string()])?;
    lab.wait("it is on the other node", 60, || {
        let pod = lab.json(&["-n", NAMESPACE, "get", "pod", "web-0"])?;
        same("its node", text(&pod, "/spec/nodeName")?, there)
    })?;
    pods.are_ready(&["web-0"])?;
    same("its address", pods.address("web-0", "10.90.0.")?, before)?;
    outside.is_seen(&pods, "web-0", &addresses.1)?;

    lab.step("all of it is deleted; then look for what is left");
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=2m"])?;
    lab.kubectl(&["delete", "containernetworks", "outward", "beside", "inward", "six", "--timeout=60s"])?;
    outside.end()?;
    nothing_left(lab)
}

/// The StatefulSet has to be there first: a claim of one that isn't is taken for what was left.
fn claim_the_gateways_address(lab: &Lab) -> Result<()> {
    let set = lab.json(&["-n", NAMESPACE, "get", "statefulset", "taker"])?;
    let uid = text(&set, "/metadata/uid")?;
    lab.apply(&format!(
        "apiVersion: portolan.dev/v1alpha1\nkind: IPClaim\nmetadata: {{name: {CLAIM}}}\nspec: {{network: outward, address: 10.90.0.1, \
         namespace: {NAMESPACE}, pod: taker-0, owner: taker, ownerUid: {uid}}}\n"
    ))?;
    let_start(lab)
}

/// Opens the gate that the pod waits at.
fn let_start(lab: &Lab) -> Result<()> {
    let open = r#"[{"op": "remove", "path": "/spec/schedulingGates"}]"#;
    lab.wait("the pod is there", 30, || {
        lab.kubectl(&["-n", NAMESPACE, "patch", "pod", "taker-0", "--type=json", "-p", open]).map(drop)
    })
}

fn is_described(lab: &Lab, words: &[&str]) -> Result<()> {
    let text = lab.kubectl(&["describe", "containernetwork", "outward"])?;
    ensure!(words.iter().all(|word| text.contains(word)), "{words:?} in: {text}");
    lab.show(text.lines().skip_while(|line| !line.contains("Conditions:")).collect::<Vec<_>>().join("\n"));
    Ok(())
}

fn policy(lab: &Lab, egress: &str) -> Result<()> {
    lab.apply(&include_str!("../manifests/egress-policy.yaml").replace("@EGRESS@", egress)).map(drop)
}

/// A server that is on none of the networks.
pub(crate) struct Outside(Child);

impl Outside {
    pub fn start(lab: &Lab) -> Result<Self> {
        let mut child = lab.start(&["run", "perl", "-e", include_str!("outside.pl"), PORT])?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no pipe")?).read_line(&mut line)?;
        same("what the server says", line.trim(), "listening")?;
        Ok(Self(child))
    }

    /// As whom it sees a pod.
    pub fn sees(&self, pods: &Pods<'_>, pod: &str) -> Result<String> {
        let ask = format!("timeout 3 cat < /dev/tcp/{OUTSIDE}/{PORT}");
        Ok(pods.exec(pod, &["timeout", "3", "bash", "-c", &ask])?.trim().to_owned())
    }

    pub fn is_seen(&self, pods: &Pods<'_>, pod: &str, node: &str) -> Result<()> {
        pods.lab.wait(&format!("{pod} is seen as {node}"), 30, || same("it", &*self.sees(pods, pod)?, node))?;
        pods.lab.show(format!("{pod} is seen as {node}"));
        Ok(())
    }

    pub fn end(mut self) -> Result<()> {
        drop(self.0.stdin.take());
        ensure!(self.0.wait()?.success(), "the server failed");
        Ok(())
    }
}
