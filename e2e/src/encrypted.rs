//! Encryption of networks: what pods say to each other is not on the wire, and nothing gets in that isn't encrypted. Where the kernel has no
//! WireGuard, only that it says so.

use std::{
    io::{BufRead, BufReader, Read},
    process::Child,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    bad_input::event,
    egress::Outside,
    lab::{Lab, same, text},
    pods::{Pods, node_address},
    scene::{nothing_left, ready},
};

const NAMESPACE: &str = "encrypted";
/// What the server answers; nothing else has it.
const MARKER: &str = "e2e-marker-of-the-encrypted-network";
/// Frames that are sent into a network from outside.
const FRAMES: u64 = 200;

/// Plays it, on the lab's first two nodes. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes()?;
    let [here, there, ..] = &nodes[..] else { bail!("the lab has {} nodes: two are needed", nodes.len()) };
    lab.step("a network with encryption, and one without, and pods of two nodes on both");
    lab.apply(&include_str!("../manifests/encrypted.yaml").replace("@HERE@", here).replace("@THERE@", there))?;
    match lab.has_wireguard() {
        true => played(lab, here, there)?,
        false => refused(lab)?,
    }
    lab.step("all of it is deleted; then look for what is left");
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=4m"])?;
    lab.kubectl(&["delete", "containernetworks", "secret", "plain", "--timeout=60s"])?;
    nothing_left(lab)?;
    for node in [here, there] {
        let left = lab.on_node(node, "ls /var/lib/portolan/network/keys.json 2>/dev/null || true")?;
        ensure!(left.is_empty(), "keys are left on {node}");
    }
    Ok(())
}

/// A pod doesn't start, and its Event says why.
fn refused(lab: &Lab) -> Result<()> {
    for pod in ["server", "client"] {
        event(lab, NAMESPACE, "Pod", pod, &["ContainerNetwork secret is encrypted", "kernel has no WireGuard"])?;
        let pod = lab.json(&["-n", NAMESPACE, "get", "pod", pod])?;
        same("the pod's phase", text(&pod, "/status/phase")?, "Pending")?;
    }
    Ok(())
}

fn played(lab: &Lab, here: &str, there: &str) -> Result<()> {
    for pod in ["server", "client"] {
        lab.wait(&format!("pod {pod} is Ready"), 90, || ready(&lab.json(&["-n", NAMESPACE, "get", "pod", pod])?))?;
    }
    let addresses = shell(lab, "server", "hostname -I")?;
    let on = |subnet: &str| addresses.split_whitespace().find(|it| it.starts_with(subnet)).context("no address");
    let (secret, plain) = (on("10.85.0.")?, on("10.86.0.")?);
    lab.wait("both networks' pods reach each other", 60, || {
        ask(lab, plain)?;
        ask(lab, secret)
    })?;

    lab.step("what the server answers is on the wire of the one, and not of the other");
    let wire = Sniffer::start(lab, here, "plain")?;
    ask(lab, plain)?;
    let (marked, vxlan, _) = wire.end()?;
    ensure!(marked > 0 && vxlan > 0, "without encryption: {marked} frames with the marker, {vxlan} of VXLAN");
    let wire = Sniffer::start(lab, here, "secret")?;
    ask(lab, secret)?;
    let (marked, vxlan, wireguard) = wire.end()?;
    lab.show(format!("with encryption: {marked} frames with the marker, {vxlan} of VXLAN, {wireguard} of WireGuard"));
    ensure!(marked == 0 && vxlan == 0 && wireguard > 0, "something is not encrypted");
    lab.show(lab.on_node(here, "ip -n portolan-encrypted route; ip -n portolan-encrypted -o link")?);

    lab.step("who isn't a node can put frames into the one, and not into the other");
    let injected = |network: &str, interface: &str| injected(lab, here, there, network, interface);
    let (open, closed) = (injected("plain", "eth2")?, injected("secret", "eth1")?);
    lab.show(format!("of {} frames came {open} without encryption, {closed} with it", 2 * FRAMES));
    ensure!(open >= FRAMES && closed < FRAMES / 2, "of {} frames came {open} and {closed}", 2 * FRAMES);

    lab.step("the client goes outside by the encrypted network, as its node; who hasn't asked for that goes by eth0");
    let (outside, pods) = (Outside::start(lab)?, Pods { lab, namespace: NAMESPACE });
    outside.is_seen(&pods, "client", &node_address(lab, there)?)?;
    let by_eth0 = outside.sees(&pods, "server")?;
    ensure!(by_eth0.starts_with("10.244."), "the server is seen as {by_eth0}");
    outside.end()?;

    lab.step("keys are rotated, and the agents end and start, under load: no packet is lost");
    let before = keys(lab)?;
    let ping = Ping::start(lab, secret)?;
    rotate(lab)?;
    lab.wait("both nodes have keys of the next generation only", 60, || {
        let now = keys(lab)?;
        same("keys", now.len(), 2)?;
        ensure!(now.iter().all(|key| !before.contains(key)), "{now:?}");
        Ok(())
    })?;
    lab.kubectl(&["-n", "portolan-system", "delete", "pods", "-l", "app.kubernetes.io/name=portolan-network"])?;
    lab.kubectl(&["-n", "portolan-system", "rollout", "status", "daemonset/portolan-network", "--timeout=5m"])?;
    let (sent, received) = ping.end(lab)?;
    lab.show(format!("{sent} pings were sent, {received} answered"));
    // The last one may be under way.
    ensure!(sent > 50 && sent - received <= 1, "{sent} pings were sent, {received} answered");

    lab.step("without a way through WireGuard nothing is sent; the agent makes it again");
    let wire = Sniffer::start(lab, here, "secret")?;
    lab.on_node(there, "ip -n portolan-encrypted route flush table main")?;
    let asked = ask_once(lab, secret);
    let (marked, vxlan, _) = wire.end()?;
    lab.show(format!("asked: {}; {marked} frames with the marker, {vxlan} of VXLAN", asked.is_ok()));
    ensure!(marked == 0 && vxlan == 0, "something is not encrypted");
    lab.wait("the server is reached again", 90, || ask(lab, secret))
}

fn shell(lab: &Lab, pod: &str, command: &str) -> Result<String> {
    lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "bash", "-c", command])
}

/// The client asks the server for something with the marker in it, more than a packet holds.
fn ask(lab: &Lab, server: &str) -> Result<()> {
    let answer = ask_once(lab, server)?;
    same("bytes of the answer", answer.trim().parse()?, MARKER.len() * 1000 + 1)
}

fn ask_once(lab: &Lab, server: &str) -> Result<String> {
    // The marker is only made at the server: the question doesn't have it.
    let (first, second) = MARKER.split_at(MARKER.len() / 2);
    let query = format!("select repeat('{first}' || '{second}', 1000)");
    let options = "PGCONNECT_TIMEOUT=10 PGSSLMODE=disable";
    shell(lab, "client", &format!("set -o pipefail; {options} psql -h {server} -U postgres -tAc \"{query}\" | wc -c"))
}

/// The public keys of the nodes.
fn keys(lab: &Lab) -> Result<Vec<String>> {
    let slices = lab.json(&["get", "networknodeslices"])?;
    let slices = slices["items"].as_array().context("no list")?;
    let of_network = slices.iter().filter(|slice| slice["spec"]["network"] == "secret");
    let keys = of_network.flat_map(|slice| slice["spec"]["encryption"]["keys"].as_array().into_iter().flatten());
    keys.map(|key| Ok(text(key, "/publicKey")?.to_owned())).collect()
}

fn rotate(lab: &Lab) -> Result<()> {
    let long_ago = r#"{"status": {"keys": {"since": "2020-01-01T00:00:00Z"}}}"#;
    lab.kubectl(&["patch", "containernetwork", "secret", "--subresource=status", "--type=merge", "-p", long_ago])
        .map(drop)
}

fn vni(lab: &Lab, network: &str) -> Result<String> {
    let network = lab.json(&["get", "containernetwork", network])?;
    Ok(network["status"]["vni"].as_u64().context("no VNI")?.to_string())
}

/// How many frames reach the server that the other node sends it, not encrypted.
fn injected(lab: &Lab, here: &str, there: &str, network: &str, interface: &str) -> Result<u64> {
    let vni = vni(lab, network)?;
    let count = || -> Result<u64> {
        Ok(shell(lab, "server", &format!("cat /sys/class/net/{interface}/statistics/rx_packets"))?.trim().parse()?)
    };
    let before = count()?;
    let arguments = format!("{} {vni} {FRAMES}", node_address(lab, here)?);
    lab.pipe_on_node(there, &format!("perl - {arguments}"), "inject", include_bytes!("inject.pl"))?;
    Ok(count()? - before)
}

/// Looks at all that a node sends to others and gets from them, for a network's frames.
struct Sniffer {
    child: Child,
    told: BufReader<std::process::ChildStdout>,
}

impl Sniffer {
    fn start(lab: &Lab, node: &str, network: &str) -> Result<Self> {
        let (address, vni) = (node_address(lab, node)?, vni(lab, network)?);
        let mut child = lab.start(&["node", node, "perl", "-e", include_str!("sniff.pl"), &address, MARKER, &vni])?;
        let mut told = BufReader::new(child.stdout.take().context("no pipe")?);
        let mut line = String::new();
        told.read_line(&mut line)?;
        ensure!(line.starts_with("looking at "), "{line}");
        Ok(Self { child, told })
    }

    /// Frames with the marker, the network's of VXLAN, and all of WireGuard.
    fn end(mut self) -> Result<(u64, u64, u64)> {
        drop(self.child.stdin.take());
        let mut text = String::new();
        self.told.read_to_string(&mut text)?;
        ensure!(self.child.wait()?.success(), "{text}");
        let counts = text.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>()?;
        let [marked, vxlan, wireguard] = counts[..] else { bail!("{text}") };
        Ok((marked, vxlan, wireguard))
    }
}

/// Pings of the client that go on.
struct Ping(Child);

impl Ping {
    fn start(lab: &Lab, server: &str) -> Result<Self> {
        let ping = format!("echo $$ > /tmp/ping; exec ping -q -i 0.1 {server}");
        let child = lab.start(&["run", "kubectl", "-n", NAMESPACE, "exec", "client", "--", "bash", "-c", &ping])?;
        lab.wait("pings are sent", 10, || shell(lab, "client", "kill -0 $(cat /tmp/ping)"))?;
        Ok(Self(child))
    }

    /// How many were sent, and how many answered.
    fn end(self, lab: &Lab) -> Result<(u64, u64)> {
        shell(lab, "client", "kill -INT $(cat /tmp/ping)")?;
        let out = self.0.wait_with_output()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        // 73 packets transmitted, 73 received, 0% packet loss, time 7304ms
        let line = text.lines().find(|line| line.contains(" packets transmitted")).with_context(|| text.clone())?;
        let counts: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
        let [sent, received, ..] = counts[..] else { bail!("{line}") };
        Ok((sent, received))
    }
}
