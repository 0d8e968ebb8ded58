//! A running pod is plugged into networks, and out of them, by its annotation.

use anyhow::{Result, ensure};

use crate::{
    bad_input::event,
    lab::{Lab, same, text},
    scene::{nothing_left, ready},
};

const NAMESPACE: &str = "hotplug";
const ANNOTATION: &str = "portolan.dev/networks";

/// Plays it. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    lab.step("a running pod gets an annotation, and is plugged in");
    lab.apply(include_str!("../manifests/hotplug.yaml"))?;
    for pod in ["server", "late"] {
        lab.wait(&format!("pod {pod} is Ready"), 90, || ready(&lab.json(&["-n", NAMESPACE, "get", "pod", pod])?))?;
    }
    same("its interfaces at first", interfaces(lab)?, vec!["eth0".to_owned()])?;
    annotate(lab, "one")?;
    is_on(lab, &["eth0", "eth1"])?;
    let first = reaches(lab, "10.81.0.")?;

    lab.step("a second network, written before the first: what is there stays as it is");
    annotate(lab, "two, one")?;
    is_on(lab, &["eth0", "eth1", "eth2"])?;
    same("its address on the first", reaches(lab, "10.81.0.")?, first)?;
    reaches(lab, "10.82.0.")?;

    lab.step("a network that isn't there: an Event, and all stays");
    annotate(lab, "two, one, three")?;
    event(lab, NAMESPACE, "Pod", "late", &["three", "no such ContainerNetwork"])?;
    same("its interfaces", interfaces(lab)?.len(), 3)?;

    lab.step("out of one, and out of all");
    annotate(lab, "two")?;
    is_on(lab, &["eth0", "eth2"])?;
    reaches(lab, "10.82.0.")?;
    lab.kubectl(&["-n", NAMESPACE, "annotate", "pod", "late", &format!("{ANNOTATION}-")])?;
    is_on(lab, &["eth0"])?;
    lab.wait("its network-status is empty", 30, || {
        let pod = lab.json(&["-n", NAMESPACE, "get", "pod", "late"])?;
        let status = text(&pod, "/metadata/annotations/k8s.v1.cni.cncf.io~1network-status")?;
        same("network-status", status, "[]")
    })?;

    lab.step("plugged in once more, and deleted with all the rest; then look for what is left");
    annotate(lab, "one")?;
    is_on(lab, &["eth0", "eth1"])?;
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=2m"])?;
    lab.kubectl(&["delete", "containernetworks", "one", "two", "--timeout=60s"])?;
    nothing_left(lab)
}

fn annotate(lab: &Lab, networks: &str) -> Result<()> {
    let annotation = format!("{ANNOTATION}={networks}");
    lab.kubectl(&["-n", NAMESPACE, "annotate", "pod", "late", "--overwrite", &annotation]).map(drop)
}

fn inside(lab: &Lab, command: &str) -> Result<String> {
    lab.kubectl(&["-n", NAMESPACE, "exec", "late", "--", "sh", "-c", command])
}

/// But for the loopback one, in their order.
fn interfaces(lab: &Lab) -> Result<Vec<String>> {
    Ok(inside(lab, "ls /sys/class/net")?
        .split_whitespace()
        .filter(|name| name.starts_with("eth"))
        .map(str::to_owned)
        .collect())
}

fn is_on(lab: &Lab, wanted: &[&str]) -> Result<()> {
    lab.wait(&format!("its interfaces are {wanted:?}"), 30, || {
        same("interfaces", interfaces(lab)?, wanted.iter().map(|&name| name.to_owned()).collect())
    })
}

/// The pod's own address, as the server sees it, on the network whose addresses begin so.
fn reaches(lab: &Lab, subnet: &str) -> Result<String> {
    let server = lab.kubectl(&["-n", NAMESPACE, "exec", "server", "--", "hostname", "-I"])?;
    let server = server.split_whitespace().find(|address| address.starts_with(subnet)).unwrap_or_default().to_owned();
    lab.wait(&format!("a connection to {server}"), 30, || {
        let query = format!("psql -h {server} -U postgres -tAc 'select host(inet_client_addr())'");
        let own = inside(lab, &query)?.trim().to_owned();
        ensure!(own.starts_with(subnet), "{own}");
        Ok(own)
    })
}
