//! A pod sends by its own MAC only.

use portolan_net::Mac;

use super::{
    Pod, forward, two_nodes,
    wire::{BROADCAST, EXPERIMENTAL, Wire, frame},
};

const VNI: u32 = 77;

#[tokio::test(flavor = "multi_thread")]
async fn frames_with_a_forged_mac_do_not_cross() {
    let (a, b) = two_nodes();
    for node in [&a, &b] {
        node.dataplane.ensure_network(&node.spec(VNI, false)).await.unwrap();
    }
    let (forger, neighbour) = (a.plug(VNI, "forger", 5).await, a.plug(VNI, "neighbour", 6).await);
    let (remote, victim) = (b.plug(VNI, "remote", 21).await, b.plug(VNI, "victim", 22).await);
    forward(&a, VNI, &[&forger, &neighbour], &b, &[&remote, &victim], false).await;
    forward(&b, VNI, &[&remote, &victim], &a, &[&forger, &neighbour], false).await;

    // A pod's of the same node, one's of the other node, nobody's.
    let forged = [neighbour.port.mac, victim.port.mac, Mac([2, 0, 0, 0, 0, 9])];
    assert_eq!(arrived(&forger, &[&neighbour, &remote], &forged), 0);
    let listener = victim.listen();
    assert!(remote.reaches(victim.address, &listener), "nobody believes the forger");

    // The same pod, let go: the frames do arrive, so their absence above was the lock's doing.
    let mut free = forger.port.clone();
    free.locked = false;
    a.dataplane.add_port(&free).await.unwrap();
    assert_eq!(arrived(&forger, &[&neighbour, &remote], &forged[2..]), 2);
    let error = a.dataplane.check_port(&forger.port).await.unwrap_err().to_string();
    assert!(error.contains("is not locked to its MAC"), "{error}");
    // Locked again, the bridge has forgotten what it learnt in between.
    a.dataplane.add_port(&forger.port).await.unwrap();
    a.dataplane.check_port(&forger.port).await.unwrap();
    assert_eq!(arrived(&forger, &[&neighbour, &remote], &forged[2..]), 0, "and locked again");
    assert!(remote.reaches(forger.address, &forger.listen()), "the port's own entry is still there");
}

/// How many broadcasts by these MACs arrive at these pods, each of which has to see an honest one after them.
fn arrived(from: &Pod<'_>, to: &[&Pod<'_>], macs: &[Mac]) -> usize {
    let mut wires: Vec<_> = to.iter().map(|pod| Wire::open(pod)).collect();
    let mut wire = Wire::open(from);
    let forged: Vec<_> = macs.iter().map(|mac| frame(BROADCAST, *mac, EXPERIMENTAL, b"forged")).collect();
    let honest = frame(BROADCAST, from.port.mac, EXPERIMENTAL, b"honest");
    for frame in forged.iter().chain([&honest]) {
        wire.send(frame);
    }
    let seen = wires.iter_mut().flat_map(|wire| wire.until(&honest).expect("the honest frame"));
    seen.filter(|frame| forged.contains(frame)).count()
}
