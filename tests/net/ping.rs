//! Whether another node is there.

use std::{net::IpAddr, path::Path, time::Duration};

use portolan_net::{Heard, Namespace, Pinger};
use tokio::{runtime::Handle, time::timeout};

use super::{Node, UNDERLAYS, Underlay, two_nodes_over};

pub fn pinger(node: &Node) -> Pinger {
    let runtime = Handle::current();
    let host = Namespace::open(node.root.path(), Path::new("/run/netns/host")).unwrap();
    host.run(|| {
        let _context = runtime.enter();
        Ok(Pinger::open(node.vtep).unwrap())
    })
    .unwrap()
}

async fn answers(pinger: &Pinger, node: IpAddr) -> Option<IpAddr> {
    // Nowhere to send it to is as good as no answer.
    let _ = pinger.ask(node).await;
    match timeout(Duration::from_secs(2), pinger.answer()).await.ok()?.unwrap() {
        Heard::Answer { node, .. } => Some(node),
        Heard::TooBig { .. } => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_answers_without_any_process_of_ours_until_its_power_is_cut() {
    for underlay in UNDERLAYS {
        let (a, b) = two_nodes_over(underlay);
        let (own, other) = (pinger(&a), pinger(&a));
        assert_eq!(answers(&own, b.vtep).await, Some(b.vtep), "{underlay:?}");
        assert_eq!(answers(&own, a.vtep).await, Some(a.vtep), "and so does this one");
        // What was asked by another agent of the node is not answered to us.
        other.ask(b.vtep).await.unwrap();
        let heard = timeout(Duration::from_millis(500), own.answer()).await;
        assert!(heard.is_err(), "{heard:?}");
        b.enter("host", &["ip", "link", "set", "u0", "down"]);
        assert_eq!(answers(&own, b.vtep).await, None, "{underlay:?}");
        b.enter("host", &["ip", "link", "set", "u0", "up"]);
        if underlay == Underlay::Ipv6 {
            // The kernel takes IPv6 addresses from an interface that goes down.
            underlay.give(&b, b.vtep, "u0");
        }
        let again = async { while answers(&own, b.vtep).await.is_none() {} };
        timeout(Duration::from_secs(60), again).await.expect("it is back");
    }
}

/// They come while the last ones are still being asked.
#[tokio::test(flavor = "multi_thread")]
async fn the_answers_of_two_thousand_nodes_find_room() {
    for underlay in UNDERLAYS {
        let (a, b) = two_nodes_over(underlay);
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
        assert_eq!(heard, 2000, "{underlay:?}");
    }
}
