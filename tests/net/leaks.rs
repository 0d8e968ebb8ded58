//! Ports that come and go leave nothing.

use super::{Node, two_nodes};

const VNI: u32 = 77;
const CYCLES: usize = 1000;

/// What the kernel has of the network on a node: links, forwarding entries, neighbours, addresses, routes, what its ports
/// are guarded by.
pub fn state(node: &Node) -> String {
    let questions: [&[&str]; 7] = [
        &["ip", "-o", "link", "show"],
        &["bridge", "fdb", "show"],
        &["ip", "neighbour", "show"],
        &["ip", "-6", "neighbour", "show"],
        &["ip", "-o", "address", "show"],
        &["ip", "route", "show", "table", "all"],
        &["tc", "qdisc", "show"],
    ];
    let answer = |question: &&[&str]| {
        let answer = node.enter(&format!("portolan-{VNI}"), question);
        let mut lines: Vec<_> = answer.lines().collect();
        lines.sort();
        lines.join("\n")
    };
    questions.iter().map(answer).collect::<Vec<_>>().join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_ports_leave_nothing() {
    let (a, _b) = two_nodes();
    a.dataplane.ensure_network(&a.spec(VNI, false)).await.unwrap();
    let resident = a.plug(VNI, "resident", 5).await;
    let before = state(&a);
    for _ in 0..CYCLES {
        let pod = a.plug(VNI, "pod", 6).await;
        a.dataplane.remove_port(VNI, &pod.port.port, &pod.port.addresses).await.unwrap();
    }
    assert_eq!(state(&a), before);
    a.dataplane.check_port(&resident.port).await.unwrap();
}
