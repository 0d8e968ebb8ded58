//! The network agent's journal and the kernel, after a crash between any two steps.

use std::{path::Path, process::Command};

use portolan_agent::{
    collect::collect,
    journal::{Endpoint, Journal},
    resolver::Resolvers,
    snapshot::Snapshot,
};
use portolan_dns::{Host, NetworkZone};
use portolan_net::{BRIDGE_ADDRESS, Dataplane, Namespace, NetworkSpec, endpoint_mac};

const VNI: u32 = 91;

struct Node {
    root: tempfile::TempDir,
    dataplane: Dataplane,
}

impl Node {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("run/netns")).unwrap();
        let dataplane = Dataplane::new(root.path()).with_underlay("/run/netns/host");
        let node = Self { root, dataplane };
        node.netns("host");
        node
    }

    fn netns(&self, name: &str) {
        let file = self.root.path().join("run/netns").join(name);
        std::fs::write(&file, "").unwrap();
        let made = Command::new("unshare").arg(format!("--net={}", file.display())).arg("true").status().unwrap();
        assert!(made.success());
    }

    fn end(&self, name: &str) {
        let file = self.root.path().join("run/netns").join(name);
        assert!(Command::new("umount").arg(&file).status().unwrap().success());
        std::fs::remove_file(file).unwrap();
    }

    /// The journal as an agent finds it that starts now.
    fn journal(&self) -> Journal {
        Journal::open(self.root.path().join("var/lib/portolan/network/endpoints")).unwrap()
    }

    fn endpoint(&self, pod: &str, last: u8) -> Endpoint {
        let address = std::net::Ipv4Addr::new(10, 32, 0, last);
        Endpoint {
            container: format!("container-{pod}"),
            netns: Path::new("/run/netns").join(pod),
            interface: "eth1".into(),
            network: "backend".into(),
            vni: VNI,
            address,
            prefix: 24,
            mac: endpoint_mac("backend", address),
            mtu: 1450,
            resolver: true,
            namespace: "shop".into(),
            pod: pod.into(),
            uid: pod.into(),
            owner: None,
        }
    }

    async fn network(&self) {
        let vtep = std::net::Ipv4Addr::LOCALHOST;
        let subnet = "10.32.0.0/24".parse().unwrap();
        let spec = NetworkSpec { vni: VNI, mtu: 1450, vtep, subnets: vec![subnet], port: 7789, suppression: false };
        self.dataplane.ensure_network(&spec).await.unwrap();
    }

    /// What an agent that starts now collects, and what is there afterwards: pods in the journal, ports in the kernel.
    async fn restart(&self) -> (bool, usize, usize) {
        let journal = self.journal();
        let found = collect(&self.dataplane, &journal).await.unwrap();
        assert!(!collect(&self.dataplane, &journal).await.unwrap(), "once is enough");
        let pods = self.journal().select(|_| true).len();
        (found, pods, self.dataplane.ports(VNI).await.unwrap().len())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.root.path().join("run/netns")).unwrap().flatten() {
            let _ = Command::new("umount").arg("-l").arg(entry.path()).status();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_between_the_steps_of_add_leaves_nothing() {
    let node = Node::new();
    // A pod that stays.
    node.netns("stays");
    node.network().await;
    let stays = node.endpoint("stays", 5);
    node.journal().put(stays.clone()).unwrap();
    node.dataplane.add_port(&stays.port()).await.unwrap();
    assert_eq!(node.restart().await, (false, 1, 1));

    // After each step of an ADD the agent is killed; the runtime gives the pod up and takes its namespace away.
    for steps in 1..=3 {
        let pod = format!("pod-{steps}");
        node.netns(&pod);
        let endpoint = node.endpoint(&pod, 20 + steps);
        node.journal().put(endpoint.clone()).unwrap();
        if steps > 1 {
            node.network().await;
        }
        if steps > 2 {
            node.dataplane.add_port(&endpoint.port()).await.unwrap();
        }
        let before = node.restart().await;
        assert!(!before.0 && before.1 == 2, "a pod whose namespace is there is not collected");
        node.end(&pod);
        assert_eq!(node.restart().await, (true, 1, 1), "killed after step {steps}");
    }
    node.dataplane.check_port(&stays.port()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_between_the_steps_of_del_leaves_nothing() {
    let node = Node::new();
    node.network().await;
    for steps in 0..=1 {
        let pod = format!("pod-{steps}");
        node.netns(&pod);
        let endpoint = node.endpoint(&pod, 20 + steps);
        node.journal().put(endpoint.clone()).unwrap();
        node.dataplane.add_port(&endpoint.port()).await.unwrap();
        if steps > 0 {
            node.dataplane.remove_port(VNI, &endpoint.port().port, &endpoint.port().addresses).await.unwrap();
        }
        node.end(&pod);
        assert_eq!(node.restart().await, (true, 0, 0), "killed after step {steps}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_the_journal_does_not_know_goes() {
    let node = Node::new();
    node.network().await;
    node.netns("pod");
    node.dataplane.add_port(&node.endpoint("pod", 5).port()).await.unwrap();
    assert_eq!(node.restart().await, (true, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_answered_before_the_api_server_is() {
    let node = Node::new();
    node.network().await;
    node.netns("pod");
    let endpoint = node.endpoint("pod", 5);
    node.journal().put(endpoint.clone()).unwrap();
    node.dataplane.add_port(&endpoint.port()).await.unwrap();
    // An agent has ended that knew of a pod on another node.
    let there = Host {
        namespace: "shop".into(),
        pod: "db-1".into(),
        addresses: vec!["10.32.0.77".parse().unwrap()],
        ready: true,
        ..Host::default()
    };
    let file = node.root.path().join("var/lib/portolan/network/names.json");
    let zone = NetworkZone { name: "backend".into(), hosts: vec![there], ..NetworkZone::default() };
    Snapshot { upstream: vec![], zones: vec![zone] }.write(&file).unwrap();

    let (snapshot, metrics) = (Snapshot::read(&file), portolan_dns::Metrics::default());
    let mut resolvers = Resolvers::resume(&node.dataplane, &node.journal(), snapshot, None, metrics);
    let pod = Namespace::open(node.root.path(), Path::new("/run/netns/pod")).unwrap();
    let answer = pod.run(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(std::time::Duration::from_secs(10)))?;
        socket.send_to(b"\x12\x67\x01\0\0\x01\0\0\0\0\0\0\x04db-1\x07backend\0\0\x01\0\x01", (BRIDGE_ADDRESS, 53))?;
        let mut answer = [0; 512];
        let length = socket.recv(&mut answer)?;
        Ok(answer[..length].to_vec())
    });
    assert!(answer.unwrap().ends_with(&[10, 32, 0, 77]));
    resolvers.stop(VNI).await;
}
