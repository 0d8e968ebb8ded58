//! How fast a pod may receive and send.

use std::{
    io::{Read, Write},
    net::{IpAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use portolan_net::{Allowed, Bandwidth, Limit, Mac, PortSpec};
use rustix::time::{ClockId, clock_gettime};

use super::{
    ECHO, Node, PATIENCE, Pod, forward, ip,
    leaks::state,
    two_nodes, udp,
    wire::{BROADCAST, EXPERIMENTAL, Wire, frame},
};

const VNI: u32 = 77;
/// How much of a processor's time is spent on sending and receiving before it is called slow. Without a limit a tenth of it does.
const WHILE: Duration = Duration::from_millis(100);
/// A megabyte a second, and a tenth of it at once.
const SLOW: Option<Limit> = Some(Limit { rate: 8_000_000, burst: 800_000 });
const SLOW_BYTES_PER_MS: usize = 1000;
/// What may come beside: from two buckets, and from what waits there since the last time.
const AT_ONCE: usize = 300_000;

/// Whether a pod's datagrams, as many as can be sent, get to another as slowly as [`SLOW`] lets them. However busy the machine is, no more than that
/// come by a limit; and what comes without one doesn't depend on how long, but on how much of a processor's time was there for it.
fn is_slow(from: &Pod<'_>, to: &Pod<'_>) -> bool {
    let begun = Instant::now();
    let socket = |pod: &Pod<'_>, port| {
        let socket = pod.inside(|| udp((pod.address, port)));
        socket.set_nonblocking(true).unwrap();
        socket
    };
    let (listener, sender) = (socket(to, ECHO), socket(from, 0));
    let (datagram, mut buffer) = ([0; 1400], [0; 2000]);
    let (mut start, mut used, mut received) = (begun, processor_time(), 0);
    while processor_time() - used < WHILE {
        // A full queue of a pod's own is no failure: whoever empties it may need this processor.
        if (0..20).any(|_| sender.send_to(&datagram, (to.address, ECHO)).is_err()) {
            std::thread::yield_now();
        }
        while let Ok((length, _)) = listener.recv_from(&mut buffer) {
            received += length;
        }
        if received == 0 {
            // Counted from the first on, which may have to wait: for the receiver's MAC, and for what is before it in the queue.
            assert!(begun.elapsed() < PATIENCE, "nothing arrives");
            std::thread::sleep(Duration::from_millis(1));
            (start, used) = (Instant::now(), processor_time());
        }
        if received > usize::try_from(start.elapsed().as_millis()).unwrap() * SLOW_BYTES_PER_MS + AT_ONCE {
            return false;
        }
    }
    true
}

/// Of this thread.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
}

async fn limit(pod: &mut Pod<'_>, bandwidth: Bandwidth) {
    pod.port.bandwidth = bandwidth;
    pod.node.dataplane.add_port(&pod.port).await.unwrap();
    pod.node.dataplane.check_port(&pod.port).await.unwrap();
}

async fn network(node: &Node) {
    node.dataplane.ensure_network(&node.spec(VNI, false)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_held_to_its_bandwidth() {
    let (a, b) = two_nodes();
    network(&a).await;
    network(&b).await;
    let (mut pod, neighbour, remote) =
        (a.plug(VNI, "pod", 5).await, a.plug(VNI, "neighbour", 6).await, b.plug(VNI, "remote", 21).await);
    forward(&a, VNI, &[&pod, &neighbour], &b, &[&remote], false).await;
    forward(&b, VNI, &[&remote], &a, &[&pod, &neighbour], false).await;
    let before = state(&a);

    // Each way: whether it is slow.
    let cases = [
        (Bandwidth { ingress: SLOW, egress: None }, true, false),
        (Bandwidth { ingress: SLOW, egress: SLOW }, true, true),
        (Bandwidth { ingress: None, egress: SLOW }, false, true),
        (Bandwidth { ingress: None, egress: Some(Limit { rate: 8_000_000_000, burst: 8_000_000 }) }, false, false),
        (Bandwidth::default(), false, false),
    ];
    for (bandwidth, receives, sends) in cases {
        limit(&mut pod, bandwidth).await;
        for other in [&neighbour, &remote] {
            let slow = (is_slow(other, &pod), is_slow(&pod, other));
            assert_eq!(slow, (receives, sends), "to it and from it with {bandwidth:?}");
        }
    }
    assert_eq!(state(&a), before, "a limit that is gone leaves nothing");

    // A connection's packets are larger than the network's frames until they leave.
    limit(&mut pod, Bandwidth { ingress: SLOW, egress: SLOW }).await;
    for (from, to) in [(&pod, &remote), (&remote, &pod)] {
        let server = to.inside(|| TcpListener::bind((to.address, 80)));
        let mut client = from.inside(|| TcpStream::connect((to.address, 80)));
        let (mut stream, _) = server.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let sent = vec![7; 400_000];
        std::thread::scope(|scope| {
            scope.spawn(|| client.write_all(&sent).unwrap());
            let mut received = vec![0; sent.len()];
            stream.read_exact(&mut received).unwrap();
            assert!(received == sent);
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_pod_is_guarded_like_any_other() {
    let (a, b) = two_nodes();
    network(&a).await;
    network(&b).await;
    let (mut pod, neighbour) = (a.plug(VNI, "pod", 5).await, a.plug(VNI, "neighbour", 6).await);
    limit(&mut pod, Bandwidth { ingress: SLOW, egress: SLOW }).await;
    let arp = |sender: IpAddr| {
        let IpAddr::V4(sender) = sender else { panic!("ARP is of IPv4") };
        super::wire::gratuitous_arp(pod.port.mac, sender)
    };
    let nobodys = frame(BROADCAST, Mac([2, 0, 0, 0, 0, 9]), EXPERIMENTAL, b"by nobody's MAC");
    let foreign = arp(neighbour.address.into());
    let honest = arp(pod.address.into());
    let sees = |forged: &Vec<u8>| {
        let (mut from, mut to) = (Wire::open(&pod), Wire::open(&neighbour));
        from.send(forged);
        from.send(&honest);
        to.until(&honest).expect("the honest frame").contains(forged)
    };
    assert!(!sees(&nobodys) && !sees(&foreign));
    // Let go, it is as slow, and may say what it likes.
    let free = PortSpec { allowed: Allowed::Any, ..pod.port.clone() };
    a.dataplane.add_port(&free).await.unwrap();
    a.dataplane.check_port(&free).await.unwrap();
    assert!(sees(&foreign));
    assert!(is_slow(&pod, &neighbour));
    let error = a.dataplane.check_port(&pod.port).await.unwrap_err().to_string();
    assert!(error.contains("is not held to its pod's addresses"), "{error}");
    a.dataplane.add_port(&pod.port).await.unwrap();
    a.dataplane.check_port(&pod.port).await.unwrap();
    assert!(!sees(&foreign), "and held again");
    drop(b);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_is_gone_is_missed_and_put_back() {
    let (a, _b) = two_nodes();
    network(&a).await;
    let neighbour = a.plug(VNI, "neighbour", 6).await;
    let before = state(&a);
    let mut pod = a.plug(VNI, "pod", 5).await;
    limit(&mut pod, Bandwidth { ingress: SLOW, egress: SLOW }).await;
    let (port, shaper) = (pod.port.port.clone(), pod.port.port.replacen('p', "i", 1));
    let harms: [&[&str]; 5] = [
        &["tc", "qdisc", "delete", "dev", &port, "root"],
        &["tc", "qdisc", "delete", "dev", &shaper, "root"],
        &["ip", "link", "delete", &shaper],
        &["tc", "qdisc", "delete", "dev", &port, "ingress"],
        &["tc", "filter", "delete", "dev", &port, "ingress", "pref", "1"],
    ];
    for harm in harms {
        a.enter(&format!("portolan-{VNI}"), harm);
        assert!(a.dataplane.check_port(&pod.port).await.is_err(), "{harm:?} is not missed");
        a.dataplane.add_port(&pod.port).await.unwrap();
        a.dataplane.check_port(&pod.port).await.unwrap();
        assert!(is_slow(&neighbour, &pod) && is_slow(&pod, &neighbour), "after {harm:?}");
    }
    let without = PortSpec { bandwidth: Bandwidth::default(), ..pod.port.clone() };
    let error = a.dataplane.check_port(&without).await.unwrap_err().to_string();
    assert!(error.contains("is not held to its pod's bandwidth"), "{error}");
    for _ in 0..2 {
        a.dataplane.remove_port(VNI, &port, &pod.port.addresses).await.unwrap();
    }
    assert_eq!(state(&a), before, "nothing goes on without its port");
    // A pod that is gone takes its own end with it, and the port: what is left is removed like a port.
    let mut pod = a.plug(VNI, "pod", 5).await;
    limit(&mut pod, Bandwidth { ingress: None, egress: SLOW }).await;
    ip(&pod, &["link", "delete", "eth1"]);
    a.dataplane.remove_port(VNI, &port, &pod.port.addresses).await.unwrap();
    assert_eq!(state(&a), before, "nor without its pod");
    let mut pod = a.plug(VNI, "pod", 5).await;
    limit(&mut pod, Bandwidth { ingress: None, egress: SLOW }).await;
    a.dataplane.remove_network(VNI).await.unwrap();
    assert!(!a.file(&format!("portolan-{VNI}")).exists());
}
