//! csi-sanity (csi-test v5, by the makers of CSI) against the driver as it is installed: the sockets of a node's storage agent and of
//! the controller, the latter as the sidecars see it.

use std::process::Child;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{
    ginkgo::{Outcome, PENDING, Report},
    lab::{Lab, text},
    scene::{RELEASE_NAMESPACE, nothing_left, ready},
};

/// Where everything of a run lies on the node; in memory.
const WORK: &str = "/run/csi-sanity";
/// Where the suite stages and publishes; the agent sees what is below the kubelet's folder.
const MOUNTS: &str = "/var/lib/kubelet/csi-sanity";
const NODE_SOCKET: &str = "/var/lib/kubelet/plugins/portolan.dev/csi.sock";
/// Where a controller's socket is reachable that is on another node than the suite.
const RELAY_PORT: u16 = 7799;
/// Bytes, before and after growing.
const SIZE: u64 = 64 << 20;
const GROWN: u64 = 128 << 20;
const MUTABLE_PARAMETERS: &str = "compression: \"off\"\n";

/// Specs that are not asked for: a regular expression of their names, and why not.
const LEFT_OUT: &[(&str, &str)] = &[];

/// Specs that the suite itself skips: a part of what it says, and why that is right.
const SKIPPED: &[(&str, &str)] = &[
    ("testnodevolumeattachlimit not enabled", "it would make as many volumes as a node takes: hundreds"),
    ("ControllerPublishVolume.readonly field not supported", "the node mounts read-only; who may write is the owner"),
    (PENDING, "its authors have switched it off (pagination while volumes come and go)"),
];

/// Runs the suite: with block volumes where the lane's pools have them, else with filesystems. Portolan must be installed.
///
/// # Errors
/// When a spec fails, is skipped without a reason, or leaves something behind.
pub fn play(lab: &Lab) -> Result<()> {
    // Of filesystems the native lane says all there is to say, ten times as fast.
    let access = if lab.has_zvols() { "block" } else { "mount" };
    lab.step(format!("csi-sanity, access type {access}"));
    let (controller_node, socket) = lab.wait("a replica of the controller is Ready", 60, || controller(lab))?;
    let with_pool = lab.nodes()?;
    let (node, report) = if with_pool.contains(&controller_node) {
        let report = run(lab, access, &controller_node, &format!("unix:{socket}"))?;
        (controller_node, report)
    } else {
        let node = with_pool.into_iter().next().context("no node has a pool")?;
        let relay = Relay::start(lab, &controller_node, &socket)?;
        let report = run(lab, access, &node, &relay.endpoint)?;
        relay.stop()?;
        (node, report)
    };
    lab.show(report.totals());
    for (reason, count) in report.reasons() {
        let why = SKIPPED.iter().find(|(part, _)| reason.contains(part)).map_or("not expected", |(_, why)| why);
        lab.show(format!("{count} skipped: {reason} ({why})"));
    }
    for (name, why) in LEFT_OUT {
        let count = report.of(Outcome::LeftOut).count();
        lab.show(format!("left out (of {count}): {name} ({why})"));
    }
    report.check(SKIPPED)?;
    lab.on_node(&node, &format!("rmdir {MOUNTS}")).context("the suite has left something mounted")?;
    nothing_left(lab)
}

fn run(lab: &Lab, access: &str, node: &str, controller: &str) -> Result<Report> {
    lab.on_node(node, &format!("rm -rf {WORK}; mkdir -p {WORK} {MOUNTS}"))?;
    lab.copy_to_node(node, &lab.binaries("csi")?.join("csi-sanity"), &format!("{WORK}/csi-sanity"))?;
    let parameter = if access == "block" { "volblocksize" } else { "recordsize" };
    lab.on_node(
        node,
        &format!("echo '{parameter}: 16K' > {WORK}/parameters; printf '{MUTABLE_PARAMETERS}' > {WORK}/mutable"),
    )?;
    let skip = LEFT_OUT.iter().map(|(name, _)| format!(" --ginkgo.skip='{name}'")).collect::<String>();
    // Its exit status says no more than the report.
    lab.on_node(
        node,
        &format!(
            "chmod +x {WORK}/csi-sanity; {WORK}/csi-sanity --csi.endpoint=unix:{NODE_SOCKET} \
             --csi.controllerendpoint={controller} --csi.stagingdir={MOUNTS}/staging --csi.mountdir={MOUNTS}/mount \
             --csi.testvolumesize={SIZE} --csi.testvolumeexpandsize={GROWN} --csi.testvolumeaccesstype={access} \
             --csi.testvolumeparameters={WORK}/parameters --csi.testvolumemutableparameters={WORK}/mutable \
             --ginkgo.no-color --ginkgo.timeout=30m --ginkgo.json-report={WORK}/report.json{skip} > {WORK}/log 2>&1 || true"
        ),
    )?;
    let report = lab.on_node(node, &format!("cat {WORK}/report.json || {{ tail -n 60 {WORK}/log >&2; exit 1; }}"))?;
    lab.on_node(node, &format!("rm -rf {WORK}"))?;
    Report::parse(&report)
}

/// Makes a socket on one node reachable by TCP from the others.
struct Relay {
    child: Child,
    /// As gRPC names it.
    endpoint: String,
}

impl Relay {
    fn start(lab: &Lab, node: &str, socket: &str) -> Result<Self> {
        let object = lab.json(&["get", "node", node])?;
        let addresses = object["status"]["addresses"].as_array().map(Vec::as_slice).unwrap_or_default();
        let internal = addresses.iter().find(|address| address["type"] == "InternalIP");
        let address = text(internal.context("the node has no InternalIP")?, "/address")?;
        // It ends with its standard input, so with us, however we end.
        let command = format!(
            "socat TCP-LISTEN:{RELAY_PORT},bind={address},fork,reuseaddr UNIX-CONNECT:{socket} <&- & cat > /dev/null; kill $!"
        );
        let child = lab.start(&["node", node, "sh", "-c", &command])?;
        Ok(Self { child, endpoint: format!("dns:///{address}:{RELAY_PORT}") })
    }

    fn stop(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        self.child.wait()?;
        Ok(())
    }
}

/// A node that has a Ready replica of the controller, and the path of that replica's socket there: a file of an emptyDir, whose
/// folder the kubelet names by the pod's UID.
fn controller(lab: &Lab) -> Result<(String, String)> {
    let selector = "app.kubernetes.io/name=portolan-csi-controller";
    let pods = lab.json(&["-n", RELEASE_NAMESPACE, "get", "pods", "-l", selector])?;
    let pods = pods["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let pod: &Value = pods.iter().find(|pod| ready(pod).is_ok()).context("no replica is Ready")?;
    let uid = text(pod, "/metadata/uid")?;
    let socket = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/csi/csi.sock");
    Ok((text(pod, "/spec/nodeName")?.to_string(), socket))
}
