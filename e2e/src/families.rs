//! Networks with IPv6: beside IPv4, and alone.

use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};

use crate::{
    lab::{Lab, same},
    scene::{nothing_left, ready},
};

const NAMESPACE: &str = "families";

/// Plays it, on the lab's first two nodes. Portolan must be installed.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes()?;
    let [here, there, ..] = &nodes[..] else { bail!("the lab has {} nodes: two are needed", nodes.len()) };
    lab.step("pods of two nodes on a network of both families, and on one without IPv4");
    let manifest = include_str!("../manifests/families.yaml").replace("@HERE@", here).replace("@THERE@", there);
    lab.apply(&manifest)?;
    for pod in ["server", "both", "only"] {
        lab.wait(&format!("pod {pod} is Ready"), 90, || ready(&lab.json(&["-n", NAMESPACE, "get", "pod", pod])?))?;
    }
    lab.wait("the server is in answers on both nodes", 30, || {
        for (pod, network) in [("both", "dual"), ("only", "six")] {
            address(lab, pod, "ahostsv6", &format!("server.{network}."))?;
        }
        Ok(())
    })?;
    for (pod, family, name, subnet) in [
        ("both", "ahostsv4", "server.dual.", "10.77.0."),
        ("both", "ahostsv6", "server.dual.", "fd77::"),
        ("both", "ahostsv6", "server.six.", "fd66::"),
        ("both", "ahostsv6", "server.families.dual.portolan.internal.", "fd77::"),
        ("only", "ahostsv6", "server.six.", "fd66::"),
    ] {
        let found = address(lab, pod, family, name)?;
        ensure!(found.to_string().starts_with(subnet), "{pod} is told that {name} is {found}");
        same("the address that a connection reaches", reached(lab, pod, &found)?, found)?;
        lab.show(format!("{pod}: {name} is {found}, and answers there"));
    }
    ensure!(address(lab, "only", "ahostsv4", "server.six.").is_err(), "a network without IPv4 has an IPv4 answer");
    lab.show(lab.kubectl(&["get", "containernetworks", "-o", "wide"])?);

    lab.step("all of it is deleted; then look for what is left");
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=2m"])?;
    lab.kubectl(&["delete", "containernetworks", "dual", "six", "--timeout=60s"])?;
    nothing_left(lab)
}

/// What a pod's resolver says that a name is, in one family.
fn address(lab: &Lab, pod: &str, family: &str, name: &str) -> Result<IpAddr> {
    let printed = lab.kubectl(&["-n", NAMESPACE, "exec", pod, "--", "getent", family, name])?;
    let first = printed.split_whitespace().next().with_context(|| format!("{pod} finds no {name}"))?;
    first.parse().with_context(|| format!("{name} is {first}"))
}

/// The server's own address of a connection to it.
fn reached(lab: &Lab, pod: &str, address: &IpAddr) -> Result<IpAddr> {
    let query = ["psql", "-h", &address.to_string(), "-U", "postgres", "-tAc", "select host(inet_server_addr())"];
    let printed = lab.kubectl(&[&["-n", NAMESPACE, "exec", pod, "--"], &query[..]].concat())?;
    printed.trim().parse().with_context(|| format!("the server says that it is {printed}"))
}
