//! What nodes send each other between their own addresses.

use super::{Node, UNDERLAYS, Underlay, forward, two_nodes_over};

const VNI: u32 = 77;

/// What its tunnel is like, in the words of ip(8).
fn tunnel(node: &Node) -> String {
    node.enter("portolan-77", &["ip", "-d", "link", "show", "vx0"])
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mtu_is_that_of_the_interface_with_the_nodes_address() {
    for underlay in UNDERLAYS {
        let (a, _b) = two_nodes_over(underlay);
        assert_eq!(a.dataplane.underlay_mtu(a.vtep).await.unwrap(), 1500);
        a.enter("host", &["ip", "link", "set", "u0", "mtu", "1400"]);
        assert_eq!(a.dataplane.underlay_mtu(a.vtep).await.unwrap(), 1400);
        let nobodys = underlay.vtep(0, 77);
        let error = a.dataplane.underlay_mtu(nobodys).await.unwrap_err().to_string();
        assert_eq!(error, format!("no interface of this node has the address {nobodys}"));
    }
}

/// The kernel gives each interface such an address.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_local_address_is_refused_by_name() {
    let (a, _b) = two_nodes_over(Underlay::Ipv6);
    a.enter("host", &["ip", "address", "add", "fe80::77/64", "dev", "u0", "nodad"]);
    let error = a.dataplane.underlay_mtu("fe80::77".parse().unwrap()).await.unwrap_err().to_string();
    assert!(error.starts_with("fe80::77 can't be this node's address on the underlay: it is link-local"), "{error}");
}

/// A node gets another address, of the same family or the other: its tunnel is made anew, and no entry of the other family is left.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_may_get_an_address_of_the_other_family() {
    let (mut a, mut b) = two_nodes_over(Underlay::Ipv4);
    for (underlay, last) in [(Underlay::Ipv4, 1), (Underlay::Ipv6, 1), (Underlay::Ipv6, 5), (Underlay::Ipv4, 5)] {
        for (node, last) in [(&mut a, last), (&mut b, last + 1)] {
            node.vtep = underlay.vtep(0, last);
            node.enter("host", &["ip", "address", "flush", "dev", "u0", "scope", "global"]);
            underlay.give(node, node.vtep, "u0");
            node.dataplane.ensure_network(&node.spec(VNI, false)).await.unwrap();
        }
        let (one, two) = (a.plug(VNI, "one", 5).await, b.plug(VNI, "two", 21).await);
        forward(&a, VNI, &[&one], &b, &[&two], false).await;
        forward(&b, VNI, &[&two], &a, &[&one], false).await;
        let listener = two.listen();
        assert!(one.reaches(two.address, &listener), "{underlay:?} {last}: {}", tunnel(&a));
        drop(listener);
        let entries = a.enter("portolan-77", &["bridge", "fdb", "show", "dev", "vx0"]);
        let to: Vec<&str> = entries.lines().filter_map(|line| line.split(" dst ").nth(1)?.split(' ').next()).collect();
        assert!(!to.is_empty() && to.iter().all(|it| *it == b.vtep.to_string()), "{entries}");
        assert_eq!(forward(&a, VNI, &[&one], &b, &[&two], false).await, 0, "what is so is seen to be so");
    }
}
