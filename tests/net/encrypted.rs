//! Encrypted networks: nothing goes out or comes in but by WireGuard.
//!
//! Where the kernel has no WireGuard a pair of veth stands in for it, which shows that there is no other way. The rest is played where it has.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use portolan_net::{Encrypted, Encryption, Error, Namespace, NetworkSpec, PrivateKey, PublicKey, wireguard_overhead};

use super::{ECHO, Ipv4Addr, Node, Pod, UNDERLAYS, Underlay, forward, two_nodes, two_nodes_over, udp, wire::Wire};

const VNI: u32 = 77;
const PORT: u16 = 7795;
/// How long a handshake may take to be made: the kernel tries every five seconds.
const HANDSHAKE: Duration = Duration::from_secs(20);
/// What is sent; nothing else has it.
const MARKER: &[u8] = b"marker-of-the-encrypted-network";

fn encrypted(node: &Node) -> NetworkSpec {
    NetworkSpec { encrypted: true, mtu: node.mtu() - wireguard_overhead(node.vtep), ..node.spec(VNI, false) }
}

/// Makes the namespace that encrypted networks leave by, with another device than WireGuard's. It asks nobody for MACs, as WireGuard doesn't: in IPv6
/// nobody would answer for an address that he has on `lo`.
fn stand_in(a: &Node, b: &Node) {
    for node in [a, b] {
        node.netns("portolan-encrypted");
    }
    let (name, at_b) = ("portolan-encrypted", b.file("portolan-encrypted").display().to_string());
    a.enter(name, &["ip", "link", "add", "wg0", "type", "veth", "peer", "name", "wg0", "netns", &at_b]);
    for (node, peer) in [(a, b), (b, a)] {
        node.enter(name, &["ip", "address", "add", &IpNet::from(node.vtep).to_string(), "dev", "lo"]);
        node.enter(name, &["ip", "link", "set", "wg0", "address", "02:00:00:00:00:01", "arp", "off", "up"]);
        node.enter(name, &["ip", "route", "add", &peer.vtep.to_string(), "dev", "wg0"]);
    }
}

fn set(node: &Node, name: &str, device: &str, state: &str) {
    node.enter(name, &["ip", "link", "set", device, state]);
}

async fn plug<'a>(a: &'a Node, b: &'a Node) -> (Pod<'a>, Pod<'a>) {
    let (one, two) = (a.plug(VNI, "one", 5).await, b.plug(VNI, "two", 21).await);
    forward(a, VNI, &[&one], b, &[&two], false).await;
    forward(b, VNI, &[&two], a, &[&one], false).await;
    (one, two)
}

/// Not to be believed at once: a datagram that is late would be taken for one that never comes.
fn hears_nothing(from: &Pod<'_>, to: &Pod<'_>) -> bool {
    let listener = to.listen();
    !from.reaches(to.address, &listener)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_underlay_is_no_way_for_an_encrypted_network() {
    for underlay in UNDERLAYS {
        let (a, b) = two_nodes_over(underlay);
        assert!(a.dataplane.ensure_network(&encrypted(&a)).await.is_err(), "without the other way it isn't set up");
        stand_in(&a, &b);
        for node in [&a, &b] {
            for _ in 0..2 {
                node.dataplane.ensure_network(&encrypted(node)).await.unwrap();
            }
        }
        let (one, two) = plug(&a, &b).await;
        set(&a, "host", "u0", "down");
        let listener = two.listen();
        assert!(one.reaches(two.address, &listener), "it goes another way");
        drop(listener);
        set(&a, "host", "u0", "up");
        set(&a, "portolan-encrypted", "wg0", "down");
        assert!(hears_nothing(&one, &two) && hears_nothing(&two, &one), "{underlay:?} is there, and isn't used");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_by_the_underlay_is_not_heard() {
    for underlay in UNDERLAYS {
        let (a, b) = two_nodes_over(underlay);
        stand_in(&a, &b);
        a.dataplane.ensure_network(&encrypted(&a)).await.unwrap();
        // The other node doesn't encrypt, and knows all else, even the port.
        for port in [7788, 7789] {
            let spec = NetworkSpec { port, ..b.spec(VNI, false) };
            b.dataplane.ensure_network(&spec).await.unwrap();
            let (one, two) = plug(&a, &b).await;
            assert!(hears_nothing(&two, &one) && hears_nothing(&one, &two), "port {port} over {underlay:?}");
        }
        // It does by now: the same number doesn't make it the same device.
        b.dataplane.ensure_network(&encrypted(&b)).await.unwrap();
        let (one, two) = plug(&a, &b).await;
        let listener = one.listen();
        assert!(two.reaches(one.address, &listener));
    }
}

/// As when a network was made anew under the same number.
#[tokio::test(flavor = "multi_thread")]
async fn a_network_does_not_stay_open_that_is_to_be_encrypted() {
    let (a, b) = two_nodes();
    for node in [&a, &b] {
        node.dataplane.ensure_network(&node.spec(VNI, false)).await.unwrap();
    }
    let (one, two) = plug(&a, &b).await;
    let listener = two.listen();
    assert!(one.reaches(two.address, &listener));
    drop(listener);
    stand_in(&a, &b);
    a.dataplane.ensure_network(&encrypted(&a)).await.unwrap();
    forward(&a, VNI, &[&one], &b, &[&two], false).await;
    assert!(hears_nothing(&one, &two) && hears_nothing(&two, &one));
}

fn public(found: &Encrypted) -> BTreeMap<u32, PublicKey> {
    found.keys.clone()
}

/// A node's side of encryption.
struct Side<'a> {
    node: &'a Node,
    wanted: Encryption,
}

impl<'a> Side<'a> {
    fn new(node: &'a Node) -> Self {
        let keys = BTreeMap::from([(1, PrivateKey::generate().unwrap())]);
        let wanted = Encryption { vtep: node.vtep, underlay_mtu: 1500, port: PORT, keys, peers: BTreeMap::new() };
        Self { node, wanted }
    }

    async fn apply(&self) -> Encrypted {
        self.node.dataplane.ensure_encryption(&self.wanted).await.unwrap()
    }

    /// Hears of the other's keys.
    fn meet(&mut self, other: &Node, keys: BTreeMap<u32, PublicKey>) {
        self.wanted.peers.insert(other.vtep, keys);
    }

    /// Waits for a handshake by the newest key.
    async fn wait(&self) -> Encrypted {
        let end = Instant::now() + HANDSHAKE;
        loop {
            let found = self.apply().await;
            if found.waiting.is_empty() || Instant::now() > end {
                assert!(found.waiting.is_empty(), "{found:?}");
                return found;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Whether the kernel has WireGuard. Where it hasn't, that is what it must say, and nothing may be left.
async fn has_wireguard(node: &Node) -> bool {
    match node.dataplane.ensure_encryption(&Side::new(node).wanted).await {
        Ok(_) => true,
        Err(error @ Error::NoWireGuard { .. }) => {
            assert!(error.to_string().starts_with("this node's kernel has no WireGuard: "), "{error}");
            println!("SKIPPED: {error}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

async fn remove(node: &Node) {
    for _ in 0..2 {
        node.dataplane.remove_encryption().await.unwrap();
    }
    assert!(!node.file("portolan-encrypted").exists() && !node.dataplane.has_encryption());
}

/// Ends what waits for it, when the test fails, too.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends the marker until it is told to end, a hundred datagrams a second; returns how many were sent.
fn send_until(pod: &Pod<'_>, to: Ipv4Addr, end: &AtomicBool) -> usize {
    pod.inside(|| {
        let socket = udp((pod.address, 0))?;
        let mut sent = 0;
        while !end.load(Ordering::Relaxed) {
            socket.send_to(MARKER, (to, ECHO))?;
            sent += 1;
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(sent)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kernel_encrypts_rotates_without_a_loss_and_fails_closed() {
    let (a, b) = two_nodes();
    if !has_wireguard(&a).await {
        remove(&a).await;
        return;
    }
    let (mut at_a, mut at_b) = (Side::new(&a), Side::new(&b));
    let (of_a, of_b) = (public(&at_a.apply().await), public(&at_b.apply().await));
    at_a.meet(&b, of_b.clone());
    at_b.meet(&a, of_a);
    at_a.apply().await;
    at_b.wait().await;
    at_a.wait().await;
    for node in [&a, &b] {
        node.dataplane.ensure_network(&encrypted(node)).await.unwrap();
    }
    let (one, two) = plug(&a, &b).await;
    let mut wire = Namespace::open(a.root.path(), "/run/netns/host".as_ref()).unwrap().run(|| Wire::at("u0")).unwrap();
    let (there, back) = (two.listen(), one.listen());
    assert!(one.reaches(two.address, &there) && two.reaches(one.address, &back));
    drop((there, back));

    // Rotation, both ways under load.
    let end = AtomicBool::new(false);
    let received = AtomicUsize::new(0);
    let receive = |pod: &Pod<'_>| {
        let socket = pod.listen();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let mut buffer = [0; 100];
        while socket.recv_from(&mut buffer).is_ok() {
            received.fetch_add(1, Ordering::Relaxed);
        }
    };
    let runtime = tokio::runtime::Handle::current();
    let sent = tokio::task::block_in_place(|| {
        std::thread::scope(|scope| {
            let ended = Ended(&end);
            scope.spawn(|| receive(&one));
            scope.spawn(|| receive(&two));
            std::thread::sleep(Duration::from_millis(200));
            let sending = [
                scope.spawn(|| send_until(&one, two.address, &end)),
                scope.spawn(|| send_until(&two, one.address, &end)),
            ];
            for generation in 2..=4 {
                runtime.block_on(rotate(&mut at_a, &mut at_b, generation));
                println!("generation {generation}");
            }
            drop(ended);
            sending.map(|it| it.join().unwrap()).iter().sum::<usize>()
        })
    });
    println!("{sent} datagrams were sent in three rotations");
    assert!(sent > 20);
    assert_eq!(received.load(Ordering::Relaxed), sent, "none is lost");

    // What was on the wire.
    let frames = wire.all();
    let holds = |what: &[u8]| frames.iter().filter(|frame| frame.windows(what.len()).any(|it| it == what)).count();
    assert_eq!(holds(MARKER), 0, "what is sent is not on the wire");
    let is_wireguard = |frame: &&Vec<u8>| {
        let ports = |at: usize| frame.get(at..at + 2).map(|it| u16::from_be_bytes([it[0], it[1]]));
        frame.get(12..14) == Some(&[8, 0])
            && frame.get(23) == Some(&17)
            && ports(36).is_some_and(|it| it == PORT || it == PORT + 1)
    };
    let udp = frames.iter().filter(|frame| frame.get(12..14) == Some(&[8, 0]) && frame.get(23) == Some(&17)).count();
    assert!(udp > 20, "{udp} datagrams on the wire");
    assert_eq!(frames.iter().filter(is_wireguard).count(), udp, "all of them are WireGuard's");
    assert!(frames.iter().all(|frame| frame.len() <= 1514));

    // The other node isn't known any more: nothing goes there, encrypted or not.
    at_a.wanted.peers.clear();
    let found = at_a.apply().await;
    assert!(found.sends.is_empty());
    drop(wire.all());
    assert!(hears_nothing(&one, &two) && hears_nothing(&two, &one));
    assert!(!wire.all().iter().any(|frame| frame.windows(MARKER.len()).any(|it| it == MARKER)));
    // And it is again, by an agent that knows nothing of what was before.
    at_a.meet(&b, of_b_now(&at_b).await);
    at_a.wait().await;
    let listener = two.listen();
    assert!(one.reaches(two.address, &listener));
    drop(listener);

    for node in [&a, &b] {
        node.dataplane.remove_network(VNI).await.unwrap();
        remove(node).await;
    }
}

async fn of_b_now(at_b: &Side<'_>) -> BTreeMap<u32, PublicKey> {
    public(&at_b.apply().await)
}

/// As the agents do it: each step when the other's last one is known.
async fn rotate<'a>(at_a: &mut Side<'a>, at_b: &mut Side<'a>, generation: u32) {
    at_a.wanted.keys.insert(generation, PrivateKey::generate().unwrap());
    let of_a = public(&at_a.apply().await);
    at_b.wanted.keys.insert(generation, PrivateKey::generate().unwrap());
    at_b.meet(at_a.node, of_a);
    let of_b = public(&at_b.apply().await);
    at_a.meet(at_b.node, of_b);
    at_a.apply().await;
    for side in [&*at_a, &*at_b] {
        let found = side.wait().await;
        assert_eq!(found.oldest, Some(generation));
    }
    for side in [&mut *at_a, &mut *at_b] {
        side.wanted.keys.remove(&(generation - 1));
    }
    let (of_a, of_b) = (public(&at_a.apply().await), public(&at_b.apply().await));
    at_a.meet(at_b.node, of_b);
    at_b.meet(at_a.node, of_a);
    at_a.apply().await;
    at_b.apply().await;
}

/// All of it but the devices, which this kernel may not have.
#[tokio::test(flavor = "multi_thread")]
async fn the_way_has_the_nodes_address_of_either_family() {
    for (underlay, other) in [(Underlay::Ipv4, Underlay::Ipv6), (Underlay::Ipv6, Underlay::Ipv4)] {
        let (a, _b) = two_nodes_over(underlay);
        let mut wanted = Side::new(&a).wanted;
        wanted.keys.clear();
        let has = || {
            let shown = a.enter("portolan-encrypted", &["ip", "-o", "address", "show", "dev", "lo"]);
            let addresses = shown.lines().filter_map(|line| line.split_whitespace().nth(3).map(str::to_owned));
            addresses.filter(|it| it != "127.0.0.1/8" && it != "::1/128").collect::<Vec<_>>()
        };
        // It becomes another one of the same family, and of the other.
        for vtep in [underlay.vtep(0, 1), underlay.vtep(0, 7), other.vtep(0, 1), underlay.vtep(0, 1)] {
            wanted.vtep = vtep;
            for _ in 0..2 {
                a.dataplane.ensure_encryption(&wanted).await.unwrap();
            }
            assert_eq!(has(), [IpNet::from(vtep).to_string()]);
        }
        assert_eq!(a.get("portolan-encrypted", "ipv6/conf/all/forwarding"), "0");
        remove(&a).await;
    }
}

/// WireGuard's device can't carry IPv6 then.
#[tokio::test(flavor = "multi_thread")]
async fn an_underlay_that_is_too_small_for_encrypted_ipv6_is_named() {
    let (a, _b) = two_nodes_over(Underlay::Ipv6);
    let wanted = Encryption { underlay_mtu: 1359, ..Side::new(&a).wanted };
    let error = a.dataplane.ensure_encryption(&wanted).await.unwrap_err().to_string();
    assert_eq!(error, "MTU 1279 of interface wg1 is too small for its address fd00::1/128; allowed: 1280 or more");
    remove(&a).await;
}
