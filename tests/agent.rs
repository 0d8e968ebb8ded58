//! The network agent's journal and the kernel, after a crash between any two steps.

use std::{net::IpAddr, path::Path, process::Command};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RecordType},
};
use portolan_agent::{
    collect::collect,
    journal::{Endpoint, Journal},
    resolver::Resolvers,
    snapshot::Snapshot,
};
use portolan_dns::{Host, Member, NetworkZone};
use portolan_net::{Allowed, BRIDGE_ADDRESS, Bandwidth, Dataplane, Multicast, Namespace, NetworkSpec, endpoint_mac};

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
        // Lazily, as runtimes do: a process that another test is just starting may have it open for a moment.
        assert!(Command::new("umount").arg("--lazy").arg(&file).status().unwrap().success());
        std::fs::remove_file(file).unwrap();
    }

    /// The journal as an agent finds it that starts now.
    fn journal(&self) -> Journal {
        Journal::open(self.root.path().join("var/lib/portolan/network/endpoints")).unwrap()
    }

    fn endpoint(&self, pod: &str, last: u8) -> Endpoint {
        let address = IpAddr::from([10, 32, 0, last]);
        Endpoint {
            container: format!("container-{pod}"),
            netns: Path::new("/run/netns").join(pod),
            interface: "eth1".into(),
            network: "backend".into(),
            vni: VNI,
            address,
            prefix: 24,
            second: Some(format!("fd32::{last}/64").parse().unwrap()),
            asks_from: None,
            mac: endpoint_mac("backend", address),
            mtu: 1450,
            resolver: true,
            redirected: None,
            allowed: Allowed::default(),
            bandwidth: Bandwidth::default(),
            gateways: Vec::new(),
            namespace: "shop".into(),
            pod: pod.into(),
            uid: pod.into(),
            owner: None,
        }
    }

    /// A pod of a network without IPv4.
    fn ipv6_endpoint(&self, pod: &str, last: u8) -> Endpoint {
        let address = format!("fd32::{last}").parse().unwrap();
        let asks_from = Some(std::net::Ipv4Addr::new(169, 254, 56, last));
        let mac = endpoint_mac("backend", address);
        Endpoint { address, prefix: 64, second: None, asks_from, mac, ..self.endpoint(pod, last) }
    }

    async fn network(&self) {
        self.network_of(&["10.32.0.0/24", "fd32::/64"]).await;
    }

    async fn network_of(&self, subnets: &[&str]) {
        let vtep = std::net::Ipv4Addr::LOCALHOST.into();
        let subnets = subnets.iter().map(|subnet| subnet.parse().unwrap()).collect();
        let spec = NetworkSpec {
            vni: VNI,
            mtu: 1450,
            vtep,
            subnets,
            port: 7789,
            suppression: false,
            multicast: Multicast::Flood,
            encrypted: false,
            gateway: false,
        };
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

/// What a pod is answered at a network that has IPv6 only: the server is reached though the pod has no IPv4 address of it.
#[tokio::test(flavor = "multi_thread")]
async fn names_are_answered_at_a_network_without_ipv4() {
    let node = Node::new();
    node.network_of(&["fd32::/64", &portolan_crds::RESOLVER_RANGE.to_string()]).await;
    node.netns("pod");
    let endpoint = node.ipv6_endpoint("pod", 5);
    node.journal().put(endpoint.clone()).unwrap();
    node.dataplane.add_port(&endpoint.port()).await.unwrap();
    node.dataplane.check_port(&endpoint.port()).await.unwrap();

    let there = Host {
        namespace: "shop".into(),
        pod: "db-1".into(),
        addresses: vec!["fd32::77".parse().unwrap()],
        ready: true,
        ..Host::default()
    };
    // The pod's own namespace comes first for a short name that two have: so the answer also tells whether the server knows who asks.
    let other = Host { namespace: "prod".into(), addresses: vec!["fd32::66".parse().unwrap()], ..there.clone() };
    let asker = Member {
        address: endpoint.asks_from.unwrap().into(),
        namespace: "shop".into(),
        networks: vec!["backend".into()],
    };
    let zone = NetworkZone {
        name: "backend".into(),
        subnets: vec!["fd32::/64".parse().unwrap()],
        hosts: vec![there, other],
        members: vec![asker],
        ..NetworkZone::default()
    };
    let snapshot = Snapshot { upstream: vec![], zones: vec![zone] };
    let mut resolvers =
        Resolvers::resume(&node.dataplane, &node.journal(), snapshot, None, portolan_dns::Metrics::default());
    let pod = Namespace::open(node.root.path(), Path::new("/run/netns/pod")).unwrap();
    let ask = |name: &str, kind: RecordType| {
        let mut question = Message::new(4711, MessageType::Query, OpCode::Query);
        question.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        let answer = pod.run(|| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(std::time::Duration::from_secs(10)))?;
            socket.send_to(&question.to_vec().unwrap(), (BRIDGE_ADDRESS, 53))?;
            let mut answer = [0; 512];
            let length = socket.recv(&mut answer)?;
            Ok(answer[..length].to_vec())
        });
        let answer = Message::from_vec(&answer.unwrap()).unwrap();
        let texts: Vec<String> = answer.answers.iter().map(|record| record.data.to_string()).collect();
        (answer.metadata.response_code, texts)
    };
    assert_eq!(ask("db-1.backend.", RecordType::AAAA), (ResponseCode::NoError, vec!["fd32::77".to_owned()]));
    assert_eq!(ask("db-1.backend.", RecordType::A), (ResponseCode::NoError, vec![]));
    let reverse = format!("7.7.{}2.3.d.f.ip6.arpa.", "0.".repeat(26));
    assert_eq!(ask(&reverse, RecordType::PTR), (ResponseCode::NoError, vec!["db-1.shop.backend.".to_owned()]));
    resolvers.stop(VNI).await;
    drop(pod);
    assert_eq!(node.restart().await, (false, 1, 1));
    node.end("pod");
    assert_eq!(node.restart().await, (true, 0, 0));
}
