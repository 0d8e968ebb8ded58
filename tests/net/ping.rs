//! Whether another node is there.

use std::{net::Ipv4Addr, path::Path, time::Duration};

use portolan_net::{Heard, Namespace, Pinger};
use tokio::{runtime::Handle, time::timeout};

use super::{Node, two_nodes};

pub fn pinger(node: &Node) -> Pinger {
    let runtime = Handle::current();
    let host = Namespace::open(node.root.path(), Path::new("/run/netns/host")).unwrap();
    host.run(|| {
        let _context = runtime.enter();
        Ok(Pinger::open().unwrap())
    })
    .unwrap()
}

async fn answers(pinger: &Pinger, node: Ipv4Addr) -> Option<Ipv4Addr> {
    // Nowhere to send it to is as good as no answer.
    let _ = pinger.ask(node).await;
    match timeout(Duration::from_secs(2), pinger.answer()).await.ok()?.unwrap() {
        Heard::Answer { node, .. } => Some(node),
        Heard::TooBig { .. } => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_answers_without_any_process_of_ours_until_its_power_is_cut() {
    let (a, b) = two_nodes();
    let (own, other) = (pinger(&a), pinger(&a));
    assert_eq!(answers(&own, b.vtep).await, Some(b.vtep));
    assert_eq!(answers(&own, a.vtep).await, Some(a.vtep), "and so does this one");
    // What was asked by another agent of the node is not answered to us.
    other.ask(b.vtep).await.unwrap();
    let heard = timeout(Duration::from_millis(500), own.answer()).await;
    assert!(heard.is_err(), "{heard:?}");
    b.enter("host", &["ip", "link", "set", "u0", "down"]);
    assert_eq!(answers(&own, b.vtep).await, None);
    b.enter("host", &["ip", "link", "set", "u0", "up"]);
    let again = async { while answers(&own, b.vtep).await.is_none() {} };
    timeout(Duration::from_secs(60), again).await.expect("it is back");
}

/// They come while the last ones are still being asked.
#[tokio::test(flavor = "multi_thread")]
async fn the_answers_of_two_thousand_nodes_find_room() {
    let (a, b) = two_nodes();
    let pinger = pinger(&a);
    assert_eq!(answers(&pinger, b.vtep).await, Some(b.vtep));
    for _ in 0..2000 {
        pinger.ask(b.vtep).await.unwrap();
    }
    let mut heard = 0;
    while let Ok(answer) = timeout(Duration::from_millis(500), pinger.answer()).await {
        answer.unwrap();
        heard += 1;
    }
    assert_eq!(heard, 2000);
}
