//! Portolan as the cluster's only CNI plugin: what nodes and pods see of the network that it makes.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::{
    lab::{Lab, same, text},
    pods::{Pods, node_address},
    scene::{install_with, ready},
};

const NAMESPACE: &str = "primary";
const CONFLIST: &str = "/etc/cni/net.d/00-portolan.conflist";
/// All that a node has of its pods.
const STATE: &str = "ls /sys/class/net | grep ^plp | sort; ip route | grep plp | sort; ip neigh show nud permanent | sort; \
                     nft list table inet portolan_pods; ls /var/lib/portolan/network/pods";

/// Installs it in a lab without a plugin (`LAB_CNI=none`), and plays it.
///
/// # Errors
/// At the first thing that isn't so.
pub fn play(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes()?;
    let [here, there, ..] = &nodes[..] else { bail!("the lab has {} nodes: two are needed", nodes.len()) };
    for node in &nodes {
        if lab.on_node(node, &format!("test ! -e {CONFLIST}")).is_ok() {
            ensure!(ready(&lab.json(&["get", "node", node])?).is_err(), "{node} is Ready without a pod network");
        }
    }
    install_with(lab, &["network.primary.enabled=true"])?;
    for node in &nodes {
        lab.wait(&format!("{node} is Ready"), 60, || ready(&lab.json(&["get", "node", node])?))?;
        let only = lab.on_node(node, "ls /etc/cni/net.d | grep conf")?;
        same("the runtime's configurations", only.trim(), "00-portolan.conflist")?;
    }
    lab.kubectl(&["-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=120s"])?;

    let pods = Pods { lab, namespace: NAMESPACE };
    let before = states(lab, &nodes)?;
    lab.step("pods on both nodes");
    lab.apply(&include_str!("../manifests/primary.yaml").replace("@HERE@", here).replace("@THERE@", there))?;
    pods.are_ready(&["here", "there", "both", "both-there"])?;
    lab.show(lab.kubectl(&["-n", NAMESPACE, "get", "pods", "-o", "wide"])?);
    let scene = Scene { pods, address: [pod_address(lab, "here")?, pod_address(lab, "there")?] };
    scene.pods_and_nodes(lab, here, there)?;
    scene.services(lab)?;
    scene.host_port(lab, here, there)?;
    scene.a_network_beside()?;
    scene.the_agent_is_killed(lab, here)?;
    lab.step("the pods are deleted, and nothing of them is left");
    lab.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=120s"])?;
    lab.kubectl(&["delete", "containernetwork", "beside", "--timeout=60s"])?;
    lab.wait("each node is as before", 30, || same("what the nodes have of pods", states(lab, &nodes)?, before.clone()))
}

fn states(lab: &Lab, nodes: &[String]) -> Result<Vec<String>> {
    nodes.iter().map(|node| lab.on_node(node, STATE)).collect()
}

fn pod_address(lab: &Lab, pod: &str) -> Result<String> {
    text(&lab.json(&["-n", NAMESPACE, "get", "pod", pod])?, "/status/podIP").map(str::to_owned)
}

struct Scene<'a> {
    pods: Pods<'a>,
    /// Of the pods `here` and `there`.
    address: [String; 2],
}

impl Scene<'_> {
    /// Who a server says that a pod is, by which pod.
    fn asked_by(&self, pod: &str, at: &str) -> Result<String> {
        // The image's wget looks for libraries that a static program hasn't got.
        let (host, port) = at.split_once(':').unwrap_or((at, "80"));
        let line = format!("printf 'GET /cgi-bin/who HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {host} {port} | tail -n 1");
        let said = self.pods.exec(pod, &["sh", "-c", &line])?;
        ensure!(said.contains(" asks "), "{at} does not answer {pod}: {said:?}");
        Ok(said.trim().replace("[::ffff:", "").replace(']', ""))
    }

    fn pods_and_nodes(&self, lab: &Lab, here: &str, there: &str) -> Result<()> {
        lab.step("pods reach pods as themselves, nodes reach pods, and pods nodes");
        let [a, b] = &self.address;
        same("asked from here", self.asked_by("here", b)?, format!("{a} asks there"))?;
        same("asked from there", self.asked_by("there", a)?, format!("{b} asks here"))?;
        same("asked from the same node", self.asked_by("here", a)?, format!("{a} asks here"))?;
        for (node, pod) in [(here, a), (there, a), (here, b), (there, b)] {
            lab.on_node(node, &format!("curl -sf -m 3 {}", url(pod))).with_context(|| format!("{node} to {pod}"))?;
        }
        for pod in ["here", "there"] {
            for node in [here, there] {
                self.pods.exec(pod, &["ping", "-c", "2", "-i", "0.2", "-W", "2", &node_address(lab, node)?])?;
            }
            // Large packets, too.
            self.pods.exec(pod, &["ping", "-c", "2", "-i", "0.2", "-W", "2", "-s", "8000", a])?;
            self.pods.exec(pod, &["ping", "-c", "2", "-i", "0.2", "-W", "2", "-s", "8000", b])?;
        }
        Ok(())
    }

    fn services(&self, lab: &Lab) -> Result<()> {
        lab.step("a Service leads to the pods of both nodes, and the cluster's DNS knows its name");
        let service = lab.json(&["-n", NAMESPACE, "get", "service", "web"])?;
        let address = text(&service, "/spec/clusterIP")?;
        for server in ["here", "there"] {
            lab.wait(&format!("{server} answers for the Service"), 30, || {
                let said = self.asked_by("both", address)?;
                ensure!(said.ends_with(&format!("asks {server}")), "{said}");
                Ok(())
            })?;
        }
        let name = format!("web.{NAMESPACE}.svc.cluster.local");
        let answer = self.pods.exec("here", &["nslookup", "-type=a", &name])?;
        ensure!(answer.contains(address), "{answer}");
        Ok(())
    }

    fn host_port(&self, lab: &Lab, here: &str, there: &str) -> Result<()> {
        lab.step("a port of the host leads to its pod");
        let node = node_address(lab, here)?;
        let at_port = format!("{node}:8080");
        for (from, at) in [(here, at_port.as_str()), (here, "127.0.0.1:8080"), (there, &at_port)] {
            let said = lab.on_node(from, &format!("curl -sf -m 3 {}", url(at)));
            let said = said.with_context(|| format!("{from} to {at}"))?;
            ensure!(said.trim_end().ends_with("asks here"), "{said}");
        }
        for pod in ["here", "there", "both"] {
            let said = self.asked_by(pod, &at_port).with_context(|| format!("{pod} to {at_port}"))?;
            ensure!(said.ends_with("asks here"), "{said}");
        }
        Ok(())
    }

    fn a_network_beside(&self) -> Result<()> {
        let other = self.pods.exec("both-there", &["ip", "-4", "-o", "address", "show", "dev", "eth1"])?;
        let other = other.split_whitespace().find_map(|word| word.strip_suffix("/24")).context("no eth1")?.to_owned();
        self.pods.exec("both", &["ping", "-c", "2", "-i", "0.2", "-W", "2", "-I", "eth1", &other])?;
        self.asked_by("both", &self.address[1]).map(drop)
    }

    fn the_agent_is_killed(&self, lab: &Lab, node: &str) -> Result<()> {
        lab.step(format!("the agent of {node} is killed while a pod sends to another node's: nothing is lost"));
        let before = lab.on_node(node, STATE)?;
        let mut pinging = lab.start(
            &[
                &["run", "kubectl", "-n", NAMESPACE, "exec", "here", "--"][..],
                &["ping", "-c", "150", "-i", "0.1", "-W", "1", &self.address[1]],
            ]
            .concat(),
        )?;
        std::thread::sleep(Duration::from_secs(2));
        lab.on_node(node, "kill -KILL $(pidof portolan-agent)")?;
        drop(pinging.stdin.take());
        let said = pinging.wait_with_output()?;
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        ensure!(said.contains("150 packets transmitted, 150 packets received"), "{said}");
        lab.show(said.lines().find(|line| line.contains("packets")).unwrap_or_default());
        lab.wait("the agent is back", 60, || {
            let of = ["-n", crate::scene::RELEASE_NAMESPACE, "rollout", "status", "daemonset/portolan-network"];
            lab.kubectl(&[&of[..], &["--timeout=5s"]].concat())
        })?;
        same("what the node has of pods", lab.on_node(node, STATE)?, before)
    }
}

fn url(at: &str) -> String {
    format!("http://{at}/cgi-bin/who")
}
