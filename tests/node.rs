//! A node with a whole network agent: it watches an API server in memory, has its networks in namespaces of a directory's own, and answers
//! CNI's verbs at its socket, as a container runtime asks it.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use portolan_agent::{AgentError, Settings, run_with};
use portolan_cni::Environment;
use portolan_net::{Dataplane, Namespace};
use serde_json::{Value, json};
use tokio::{runtime::Runtime, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::api::FakeApi;

/// The node's name.
pub const NODE: &str = "node1";
/// Its address on the underlay, if it isn't to be another one.
const VTEP: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
/// The address of the cluster's DNS. Nobody is there.
pub const CLUSTER_DNS: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 53);
/// Where pods ask for names that admission has told to: to the agent, the others are pods that it has to warn of.
const RESOLVER: &str = "169.254.53.53";
/// How long is waited for what comes by itself.
const PATIENCE: Duration = Duration::from_secs(10);
/// A node, until it is dropped.
pub struct Node {
    root: tempfile::TempDir,
    /// What its agent takes for the API server.
    pub api: FakeApi,
    runtime: Runtime,
    agent: Option<Running>,
    options: Options,
}

/// How its agent is started.
#[derive(Clone, Copy)]
struct Options {
    primary: bool,
    redirect: bool,
    vtep: IpAddr,
}

struct Running {
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), AgentError>>,
}

/// A pod as the container runtime knows it.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its name, which is also that of its network namespace.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its UID.
    pub uid: String,
    /// Its sandbox.
    pub container: String,
    /// The path of its network namespace, as the node sees it.
    pub netns: PathBuf,
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

impl Node {
    /// A node whose agent isn't started.
    pub fn new() -> Self {
        Self::at(VTEP)
    }

    /// The same, with this address and none of the other family.
    pub fn at(vtep: IpAddr) -> Self {
        let root = tempfile::tempdir().unwrap();
        for directory in ["run/netns", "etc/cni/net.d", "opt/cni/bin"] {
            std::fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        std::fs::write(root.path().join("plugin"), "").unwrap();
        let options = Options { primary: false, redirect: false, vtep };
        let node = Self { root, api: FakeApi::default(), runtime: new_runtime(), agent: None, options };
        node.make_netns("host");
        node.run_in("host", "ip link add u0 type veth peer name u1");
        let rest = if vtep.is_ipv4() { "/24 dev u0" } else { "/64 dev u0 nodad" };
        node.run_in("host", &format!("ip address add {vtep}{rest}"));
        node.run_in("host", "ip link set u0 up");
        node.api.make("/api/v1/nodes", json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}));
        node
    }

    /// A node with a network `backend` (VNI 77, these subnets), whose agent is ready.
    pub fn with_network(subnets: &[&str]) -> Self {
        Self::with_network_at(VTEP, subnets)
    }

    /// The same with that address.
    pub fn with_network_at(vtep: IpAddr, subnets: &[&str]) -> Self {
        let mut node = Self::at(vtep);
        node.make_network("backend", 77, subnets);
        node.start();
        node.wait_for("the agent to be ready", || node.status().is_ok());
        node
    }

    /// A node without another plugin, whose agent isn't started.
    pub fn without_plugin() -> Self {
        Self::without_plugin_at(VTEP)
    }

    /// The same with that address.
    pub fn without_plugin_at(vtep: IpAddr) -> Self {
        let mut node = Self::at(vtep);
        node.options.primary = true;
        node
    }

    /// A node without another plugin, with these blocks of pods' addresses, whose agent is ready.
    pub fn primary(blocks: &[&str]) -> Self {
        Self::primary_at(VTEP, blocks)
    }

    /// The same with that address.
    pub fn primary_at(vtep: IpAddr, blocks: &[&str]) -> Self {
        let mut node = Self::without_plugin_at(vtep);
        node.give_blocks(blocks);
        node.start();
        node.wait_for("the agent to be ready", || node.status().is_ok());
        node
    }

    /// Gives the node blocks of pods' addresses, as the controller manager does.
    pub fn give_blocks(&self, blocks: &[&str]) {
        let spec = json!({"podCIDR": blocks.first(), "podCIDRs": blocks});
        self.api.edit(&format!("/api/v1/nodes/{NODE}"), json!({ "spec": spec }));
    }

    /// Whether another plugin makes the pod network from the agent's next start on.
    pub fn set_primary(&mut self, is_primary: bool) {
        self.options.primary = is_primary;
    }

    /// From the agent's next start on, pods that ask the cluster's DNS alone are answered by it.
    pub fn redirect(&mut self) {
        self.options.redirect = true;
    }

    /// A ContainerNetwork as the operator leaves it.
    pub fn make_network(&self, name: &str, vni: u32, subnets: &[&str]) {
        let ready = json!({"type": "Ready", "status": "True", "reason": "Ready", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let network = json!({"apiVersion": "portolan.dev/v1alpha1", "kind": "ContainerNetwork",
            "metadata": {"name": name}, "spec": {"subnets": subnets}, "status": {"vni": vni, "conditions": [ready]}});
        self.api.make("/apis/portolan.dev/v1alpha1/containernetworks", network);
    }

    /// Starts the agent.
    ///
    /// # Panics
    /// When it runs.
    pub fn start(&mut self) {
        assert!(self.agent.is_none(), "the agent runs");
        let shutdown = CancellationToken::new();
        let _context = self.runtime.enter();
        let task =
            self.runtime.spawn(run_as(self.options, self.root.path().to_owned(), self.api.client(), shutdown.clone()));
        self.agent = Some(Running { shutdown, task });
        let socket = self.socket();
        self.wait_for("the agent to listen", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    }

    /// Ends the agent, if it runs. Its networks stay.
    ///
    /// # Panics
    /// When it doesn't end.
    pub fn stop(&mut self) {
        if let Some(Running { shutdown, task }) = self.agent.take() {
            shutdown.cancel();
            let ended = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, task).await });
            ended.expect("it doesn't end").unwrap().unwrap();
        }
    }

    /// Kills the agent after some time of an ADD: whatever it was about to do is never done. Returns what the plugin said.
    pub fn kill_while_adding(&mut self, pod: &Pod, after: Duration) -> Result<Value, Value> {
        let (environment, config) = (environment("ADD", Some(pod)), self.config(&no_result()));
        let adding = std::thread::spawn(move || invoke(&environment, &config));
        std::thread::sleep(after);
        self.kill();
        adding.join().unwrap()
    }

    /// Kills the agent.
    pub fn kill(&mut self) {
        self.agent = None;
        std::mem::replace(&mut self.runtime, new_runtime()).shutdown_timeout(PATIENCE);
    }

    /// Where its root directory is.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Where the agent listens, as this process sees it.
    pub fn socket(&self) -> PathBuf {
        self.root.path().join("run/portolan/cni.sock")
    }

    /// A path of the node as this process sees it.
    pub fn on_host(&self, path: &Path) -> PathBuf {
        self.root.path().join(path.strip_prefix("/").unwrap())
    }

    /// A pod with these annotations and labels, in the API and with a network namespace.
    pub fn pod(&self, name: &str, annotations: Value, labels: Value) -> Pod {
        self.make_netns(name);
        self.pod_in(name, name, annotations, labels)
    }

    /// The same in a network namespace that is there already.
    pub fn pod_in(&self, netns: &str, name: &str, annotations: Value, labels: Value) -> Pod {
        let made = self.api.make(
            "/api/v1/namespaces/shop/pods",
            json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "annotations": annotations, "labels": labels},
                "spec": {"nodeName": NODE, "containers": [],
                    "dnsPolicy": "None", "dnsConfig": {"nameservers": [RESOLVER]}}}),
        );
        let uid = made["metadata"]["uid"].as_str().unwrap();
        Pod {
            name: name.into(),
            namespace: "shop".into(),
            uid: uid.into(),
            container: format!("sandbox-of-{uid}"),
            netns: Path::new("/run/netns").join(netns),
        }
    }

    /// Another sandbox of the same pod, with a namespace of its own.
    pub fn another_sandbox(&self, pod: &Pod, netns: &str) -> Pod {
        self.make_netns(netns);
        let container = format!("{}-in-{netns}", pod.container);
        Pod { container, netns: Path::new("/run/netns").join(netns), ..pod.clone() }
    }

    /// Makes a namespace with its loopback up.
    pub fn make_netns(&self, name: &str) {
        let file = self.root.path().join("run/netns").join(name);
        std::fs::write(&file, "").unwrap();
        run("unshare", &[&format!("--net={}", file.display()), "ip", "link", "set", "lo", "up"]);
    }

    /// Takes a namespace away, as a container runtime does.
    pub fn remove_netns(&self, path: &Path) {
        let file = self.on_host(path);
        // Lazily: a process that is just starting may have it open for a moment.
        run("umount", &["--lazy", &file.display().to_string()]);
        std::fs::remove_file(file).unwrap();
    }

    /// ADD by the plugin; its result, or CNI's error.
    pub fn add(&self, pod: &Pod) -> Result<Value, Value> {
        self.ask("ADD", Some(pod))
    }

    /// ADD by the plugin, with ports of the host that lead to the pod as runtimes tell it.
    pub fn add_with_ports(&self, pod: &Pod, ports: &Value) -> Result<Value, Value> {
        let mut config = self.config(&no_result());
        config["runtimeConfig"] = json!({ "portMappings": ports });
        invoke(&environment("ADD", Some(pod)), &config)
    }

    /// DEL by the plugin.
    pub fn delete(&self, pod: &Pod) -> Result<Value, Value> {
        self.ask("DEL", Some(pod))
    }

    /// CHECK by the plugin.
    pub fn check(&self, pod: &Pod) -> Result<Value, Value> {
        self.ask("CHECK", Some(pod))
    }

    /// STATUS by the plugin.
    pub fn status(&self) -> Result<Value, Value> {
        self.ask("STATUS", None)
    }

    /// GC by the plugin, of all but these.
    pub fn collect_all_but(&self, pods: &[&Pod]) -> Result<Value, Value> {
        let listed: Vec<Value> =
            pods.iter().map(|pod| json!({"containerID": pod.container, "ifname": "eth0"})).collect();
        let mut config = self.config(&no_result());
        config["cni.dev/valid-attachments"] = json!(listed);
        invoke(&environment("GC", None), &config)
    }

    fn ask(&self, command: &str, pod: Option<&Pod>) -> Result<Value, Value> {
        invoke(&environment(command, pod), &self.config(&no_result()))
    }

    /// What the plugin is given at its standard input, after one with that result if there is another one.
    pub fn config(&self, previous: &Value) -> Value {
        if self.options.primary {
            return json!({"cniVersion": "1.1.0", "name": "portolan", "type": "portolan", "primary": true,
                "agentSocket": self.socket()});
        }
        json!({"cniVersion": "1.1.0", "name": "primary", "type": "portolan", "agentSocket": self.socket(),
            "prevResult": previous})
    }

    /// Runs these words in a namespace; returns what they print.
    pub fn run_in(&self, netns: &str, words: &str) -> String {
        let enter = format!("--net={}", self.root.path().join("run/netns").join(netns).display());
        let words: Vec<&str> = [enter.as_str()].into_iter().chain(words.split(' ')).collect();
        run("nsenter", &words)
    }

    /// Does something in a namespace, on a thread of its own.
    pub fn inside<T: Send>(&self, netns: &str, work: impl FnOnce() -> std::io::Result<T> + Send) -> T {
        Namespace::open(self.root.path(), &Path::new("/run/netns").join(netns)).unwrap().run(work).unwrap()
    }

    /// Waits until something that comes by itself is so.
    ///
    /// # Panics
    /// When it does not come.
    pub fn wait_for(&self, what: &str, is_so: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_so() {
            if let Some(agent) = &self.agent {
                assert!(!agent.task.is_finished(), "the agent ended while it was waited for {what}");
            }
            assert!(Instant::now() < end, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(Running { shutdown, task }) = self.agent.take() {
            shutdown.cancel();
            let _ = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, task).await });
        }
        for entry in std::fs::read_dir(self.root.path().join("run/netns")).into_iter().flatten().flatten() {
            let _ = Command::new("umount").arg("-l").arg(entry.path()).status();
        }
    }
}

/// The agent of the node whose root directory it is, which may be another process' node.
///
/// # Errors
/// What the agent can't work without.
pub async fn run_agent(root: PathBuf, client: kube::Client, shutdown: CancellationToken) -> Result<(), AgentError> {
    run_as(Options { primary: false, redirect: false, vtep: VTEP }, root, client, shutdown).await
}

async fn run_as(
    options: Options,
    root: PathBuf,
    client: kube::Client,
    shutdown: CancellationToken,
) -> Result<(), AgentError> {
    let settings = Settings {
        node_name: NODE.into(),
        host_ip: options.vtep,
        host_root: root.clone(),
        cni_conf_dir: "/etc/cni/net.d".into(),
        cni_bin_dir: "/opt/cni/bin".into(),
        cni_plugin: root.join("plugin"),
        primary: options.primary,
        vxlan_port: 7789,
        wireguard_port: 7795,
        http_port: 0,
        cluster_dns: Some(CLUSTER_DNS.into()),
        dns_domain: None,
        dns_redirect: options.redirect,
        dns_everyone_port: None,
    };
    let dataplane = Dataplane::new(root).with_underlay("/run/netns/host").with_programs("/");
    run_with(settings, client, dataplane, shutdown).await
}

fn new_runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap()
}

/// All that the host's kernel has of the pod network, asked by commands in its namespace.
pub fn state_of_host(ask: impl Fn(&str) -> String) -> String {
    let questions = [
        "ip -o address show",
        "ip route show table all",
        "ip -6 route show table all",
        "bridge fdb show",
        "ip neighbour show nud permanent",
        "nft list ruleset",
    ];
    let answer = |question: &&str| {
        let text = ask(question);
        // What the kernel makes by itself, and changes when it likes.
        // Groups are joined when a link's own address is found to be nobody else's, a second or two after the link came up.
        let is_kernels = |line: &&str| ["fe80:", "ff00:", "33:33:ff:"].iter().any(|it| line.contains(it));
        let mut lines: Vec<&str> = text.lines().filter(|line| !is_kernels(line)).collect();
        lines.sort_unstable();
        lines.join("\n")
    };
    questions.iter().map(answer).collect::<Vec<_>>().join("\n")
}

/// CNI's environment, as a container runtime sets it.
pub fn variables(command: &str, pod: Option<&Pod>) -> Vec<(String, String)> {
    let mut all = vec![("CNI_COMMAND".into(), command.into()), ("CNI_PATH".into(), "/opt/cni/bin".into())];
    if let Some(pod) = pod {
        let Pod { namespace, name, uid, .. } = pod;
        let arguments = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={uid}");
        all.extend([
            ("CNI_CONTAINERID".into(), pod.container.clone()),
            ("CNI_NETNS".into(), pod.netns.display().to_string()),
            ("CNI_IFNAME".into(), "eth0".into()),
            ("CNI_ARGS".into(), arguments),
        ]);
    }
    all
}

/// What the plugin before ours answers where there is none.
fn no_result() -> Value {
    json!({"cniVersion": "1.1.0"})
}

fn environment(command: &str, pod: Option<&Pod>) -> Environment {
    variables(command, pod).into_iter().collect()
}

fn invoke(environment: &Environment, config: &Value) -> Result<Value, Value> {
    let mut output = Vec::new();
    let code = portolan_cni::run(environment, &mut config.to_string().as_bytes(), &mut output);
    let printed = if output.is_empty() { Value::Null } else { serde_json::from_slice(&output).unwrap() };
    if code == 0 { Ok(printed) } else { Err(printed) }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
