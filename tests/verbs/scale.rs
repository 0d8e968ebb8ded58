//! An agent of a large cluster: 5,000 nodes, and 150,000 pods on one network. What it costs is printed (docs/benchmarks.md), and nothing of that
//! is asserted; what is asserted is that it knows all of them, and follows.

use std::{
    net::UdpSocket,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RecordType},
};
use portolan_net::BRIDGE_ADDRESS;
use portolan_tests::node::{Node, Pod};
use serde_json::{Value, json};

use super::on_backend;

const NODES: u32 = 5000;
/// On each.
const PODS: u32 = 30;
/// Changes that come one at a time, and nodes that change one pod each as fast as they can.
const EVENTS: u32 = 10;
const BURST: u32 = 500;
const SLICES: &str = "/apis/portolan.dev/v1alpha1/networknodeslices";
/// How long is waited for anything.
const PATIENCE: Duration = Duration::from_secs(300);

fn pod_of(node: u32, pod: u32, is_ready: bool) -> Value {
    let [_, b, c, d] = (10 << 24 | 64 << 16 | (node * 64 + pod + 2)).to_be_bytes();
    json!({"address": format!("10.{b}.{c}.{d}"), "mac": format!("02:77:0a:{b:02x}:{c:02x}:{d:02x}"), "interface": "eth1", "namespace": "shop",
        "pod": format!("web-{node}-{pod}"), "owner": "web", "labels": {"app": "web"}, "ready": is_ready})
}

fn pods_of(node: u32, is_first_ready: bool) -> Value {
    (0..PODS).map(|pod| pod_of(node, pod, pod != 0 || is_first_ready)).collect()
}

fn slice(node: u32) -> Value {
    let [_, _, c, d] = (node + 256).to_be_bytes();
    json!({"apiVersion": "portolan.dev/v1alpha1", "kind": "NetworkNodeSlice", "metadata": {"name": format!("backend.far-{node}")},
        "spec": {"network": "backend", "node": format!("far-{node}"), "vtep": format!("198.18.{c}.{d}"), "endpoints": pods_of(node, true)}})
}

/// Whether a name has an address, to a pod that asks its node.
fn is_answered(node: &Node, asking: &Pod, name: &str) -> bool {
    let mut question = Message::new(4711, MessageType::Query, OpCode::Query);
    question.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    let answer = node.inside(super::netns(asking), || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send_to(&question.to_vec().unwrap(), (BRIDGE_ADDRESS, 53))?;
        let mut answer = [0; 4096];
        let length = socket.recv(&mut answer)?;
        Ok(answer[..length].to_vec())
    });
    !Message::from_vec(&answer).unwrap().answers.is_empty()
}

fn wait(what: &str, is_so: impl Fn() -> bool) -> Duration {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    begun.elapsed()
}

/// This process's memory in MiB, and the seconds of processors that it has used (proc_pid_status(5), getrusage(2)).
fn used() -> (f64, f64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    // SAFETY: a plain structure that the call fills in.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    (kib / 1024.0, seconds(usage.ru_utime) + seconds(usage.ru_stime))
}

/// The network's forwarding entries that lead to other nodes.
fn tunnels(node: &Node) -> usize {
    node.run_in("portolan-77", "bridge fdb show dev vx0").lines().filter(|line| line.contains(" dst ")).count()
}

#[test]
fn an_agent_of_five_thousand_nodes_knows_all_pods_and_follows() {
    let mut node = Node::new();
    node.make_network("backend", 77, &["10.64.0.0/10"]);
    for far in 0..NODES {
        node.api.make(SLICES, slice(far));
    }
    let pod = node.pod("here", on_backend(), json!({}));
    let (before, cpu) = used();
    node.start();
    wait("the agent to be ready", || node.status().is_ok());
    let (ready, ready_cpu) = used();
    println!(
        "{} pods of {NODES} nodes: heard of with {:.0} MiB and {:.1} s of a processor",
        NODES * PODS,
        ready - before,
        ready_cpu - cpu
    );

    let (_, cpu) = used();
    let begun = Instant::now();
    node.add(&pod).unwrap();
    println!("the first pod's ADD: {:.0} ms", begun.elapsed().as_secs_f64() * 1000.0);
    wait("the last name", || is_answered(&node, &pod, &format!("web-{}-{}.backend.", NODES - 1, PODS - 1)));
    wait("all forwarding entries", || tunnels(&node) == (NODES * PODS + NODES) as usize);
    let (there, there_cpu) = used();
    println!(
        "all in the kernel and in names after {:.1} s, with {:.1} s of a processor; {:.0} MiB in all",
        begun.elapsed().as_secs_f64(),
        there_cpu - cpu,
        there - before
    );

    let (_, cpu) = used();
    let mut took = Vec::new();
    for far in 0..EVENTS {
        let name = format!("web-{far}-0.backend.");
        node.api.edit(&format!("{SLICES}/backend.far-{far}"), json!({"spec": {"endpoints": pods_of(far, false)}}));
        took.push(
            wait("a pod that isn't ready to be out of answers", || !is_answered(&node, &pod, &name)).as_secs_f64(),
        );
    }
    took.sort_by(f64::total_cmp);
    let (_, after) = used();
    println!(
        "a change at a time: in answers after {:.2} s (median), {:.2} s of a processor each",
        took[took.len() / 2],
        (after - cpu) / f64::from(EVENTS)
    );

    let (_, cpu) = used();
    let begun = Instant::now();
    for far in 1000..1000 + BURST {
        node.api.edit(&format!("{SLICES}/backend.far-{far}"), json!({"spec": {"endpoints": pods_of(far, false)}}));
    }
    let last = format!("web-{}-0.backend.", 1000 + BURST - 1);
    wait("the last change", || !is_answered(&node, &pod, &last));
    let (took, (memory, after)) = (begun.elapsed().as_secs_f64(), used());
    println!(
        "{BURST} changes at once: {:.0} a second, {:.1} ms of a processor each; {:.0} MiB in all",
        f64::from(BURST) / took,
        (after - cpu) * 1000.0 / f64::from(BURST),
        memory - before
    );
    let begun = Instant::now();
    let another = node.pod("another", on_backend(), json!({}));
    node.add(&another).unwrap();
    println!("another pod's ADD: {:.0} ms", begun.elapsed().as_secs_f64() * 1000.0);
    assert!(
        (0..PODS).skip(1).all(|it| is_answered(&node, &pod, &format!("web-1000-{it}.backend."))),
        "the others stay"
    );
}
