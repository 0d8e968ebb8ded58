//! What a pod gets of a network: no more than its bandwidth, and of multicast what it has joined.

use anyhow::{Context, Result, bail, ensure};

use crate::{
    lab::Lab,
    scene::{nothing_left, ready},
};

const NAMESPACE: &str = "limits";
/// Nobody on the network says anything to it but us.
const GROUP: &str = "239.83.84.85";
/// Packets that are sent to it at a time.
const PACKETS: u64 = 40;
/// Bytes that are fetched: at 8 Mbit/s in two seconds, less what the bucket has at first.
const BYTES: usize = 2_000_000;
const LEAST_SECONDS: f64 = 1.5;

/// Plays it, on the lab's first two nodes. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes()?;
    let [here, there, ..] = &nodes[..] else { bail!("the lab has {} nodes: two are needed", nodes.len()) };
    lab.step("a pod gets no more than its bandwidth, one beside it all that there is");
    lab.apply(&include_str!("../manifests/limits.yaml").replace("@HERE@", here).replace("@THERE@", there))?;
    for pod in ["source", "member", "other"] {
        lab.wait(&format!("pod {pod} is Ready"), 90, || ready(&lab.json(&["-n", NAMESPACE, "get", "pod", pod])?))?;
    }
    let source = shell(lab, "source", "hostname -I")?;
    let source = source.split_whitespace().find(|it| it.starts_with("10.84.0.")).context("no address")?.to_owned();
    let limited = fetch(lab, "member", &source)?;
    ensure!(limited >= LEAST_SECONDS, "{BYTES} bytes in {limited} s");
    lab.show(format!("{BYTES} bytes: {limited} s with the limit, {} s without", fetch(lab, "other", &source)?));

    lab.step("its bandwidth is changed while it runs: no limit, and one again");
    let limited = r#"[{"name": "limited", "bandwidth": {"ingressRate": 8000000}}]"#;
    for (text, is_slow) in [("limited", false), (limited, true)] {
        annotate(lab, text)?;
        lab.wait("it gets what its annotation says", 30, || {
            let took = fetch(lab, "member", &source)?;
            ensure!((took >= LEAST_SECONDS) == is_slow, "{BYTES} bytes in {took} s");
            Ok(())
        })?;
    }

    lab.step("multicast goes to who has joined, on another node, and to nobody else");
    shell(lab, "member", &format!("ip address add {GROUP}/32 dev eth1 autojoin"))?;
    lab.wait("the member alone is sent the group", 30, || {
        let (member, other) = sent(lab)?;
        ensure!(member >= PACKETS && other < PACKETS / 2, "member: {member}, other: {other} of {PACKETS}");
        Ok(())
    })?;
    shell(lab, "member", &format!("ip address del {GROUP}/32 dev eth1"))?;
    lab.wait("nobody is sent the group", 30, || {
        let (member, other) = sent(lab)?;
        ensure!(member < PACKETS / 2 && other < PACKETS / 2, "member: {member}, other: {other} of {PACKETS}");
        Ok(())
    })?;
    let flood = r#"{"spec": {"multicast": "Flood"}}"#;
    lab.kubectl(&["patch", "containernetwork", "limited", "--type=merge", "-p", flood])?;
    lab.wait("all are sent the group", 30, || {
        let (member, other) = sent(lab)?;
        ensure!(member >= PACKETS && other >= PACKETS, "member: {member}, other: {other} of {PACKETS}");
        Ok(())
    })?;

    lab.step("all of it is deleted; then look for what is left");
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=2m"])?;
    lab.kubectl(&["delete", "containernetwork", "limited", "--timeout=60s"])?;
    nothing_left(lab)
}

fn shell(lab: &Lab, pod: &str, command: &str) -> Result<String> {
    lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "bash", "-c", command])
}

fn annotate(lab: &Lab, networks: &str) -> Result<()> {
    let annotation = format!("portolan.dev/networks={networks}");
    lab.kubectl(&["-n", NAMESPACE, "annotate", "pod", "member", "--overwrite", &annotation]).map(drop)
}

/// Seconds that a pod needs for the bytes.
fn fetch(lab: &Lab, pod: &str, source: &str) -> Result<f64> {
    let ask = format!("psql -h {source} -U postgres -tAc \"select repeat('x', {BYTES})\" | wc -c");
    let told = shell(lab, pod, &format!("a=$EPOCHREALTIME; {ask}; echo $a $EPOCHREALTIME"))?;
    let words: Vec<&str> = told.split_whitespace().collect();
    let [bytes, begin, end] = words[..] else { bail!("{told}") };
    ensure!(bytes.parse::<usize>()? > BYTES, "{bytes} bytes came");
    Ok(end.parse::<f64>()? - begin.parse::<f64>()?)
}

/// Sends to the group; how many packets the interfaces of the member and of the other pod got meanwhile.
fn sent(lab: &Lab) -> Result<(u64, u64)> {
    let count = |pod| {
        Ok::<u64, anyhow::Error>(shell(lab, pod, "cat /sys/class/net/eth1/statistics/rx_packets")?.trim().parse()?)
    };
    let before = (count("member")?, count("other")?);
    // Nobody answers: its exit status says so.
    shell(lab, "source", &format!("ping -q -c {PACKETS} -i 0.02 -W 1 -t 4 -I eth1 {GROUP} || true"))?;
    Ok((count("member")? - before.0, count("other")? - before.1))
}
