//! The ways between pods of two nodes that are encrypted: Portolan's, and one made by hand. For kernels that have WireGuard.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use portolan_net::{Encryption, PrivateKey, PublicKey};

use crate::{
    nodes::Node,
    ways::{self, Network, Way},
};

/// What pods have behind VXLAN and WireGuard on an Ethernet of 1500 bytes.
const MTU: u32 = 1390;
const NETWORK: Network =
    Network { name: "Portolan, encrypted", vni: 79, mtu: MTU, encrypted: true, addresses: [10, 36, 0], pods: "sealed" };
/// How long a handshake may take to be made: the kernel tries every five seconds.
const HANDSHAKE: Duration = Duration::from_secs(60);

/// Whether this kernel can make a device of WireGuard's.
pub fn is_possible(node: &Node) -> bool {
    node.ip("host", "link add try0 type wireguard").and_then(|()| node.ip("host", "link del try0")).is_ok()
}

/// Portolan's, made by the code that the agent runs, in its order.
pub async fn portolan(nodes: &[Node; 2]) -> Result<Way> {
    let keys = [PrivateKey::generate()?, PrivateKey::generate()?];
    let side = |which: usize, peer: BTreeMap<u32, PublicKey>| Encryption {
        vtep: nodes[which].address.into(),
        underlay_mtu: 1500,
        port: 7795,
        keys: BTreeMap::from([(1, keys[which].clone())]),
        peers: BTreeMap::from([(nodes[1 - which].address.into(), peer)]),
    };
    // Which public keys it has a node learns from its kernel, and the other one from it.
    let mut public = Vec::new();
    for (which, node) in nodes.iter().enumerate() {
        public.push(node.dataplane.ensure_encryption(&side(which, BTreeMap::new())).await?.keys);
    }
    let begun = Instant::now();
    loop {
        let mut waiting = 0;
        for (which, node) in nodes.iter().enumerate() {
            let found = node.dataplane.ensure_encryption(&side(which, public[1 - which].clone())).await?;
            waiting += found.waiting.len();
        }
        if waiting == 0 {
            break;
        }
        ensure!(begun.elapsed() < HANDSHAKE, "{waiting} of the nodes wait for a handshake in vain");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let [across, _] = ways::portolan(nodes, &NETWORK).await?;
    Ok(across)
}

/// The shape of the way without encryption that is made by hand, in a namespace whose only way out is a device of WireGuard's, which was made on the
/// node and so sends from there (wireguard(4), "NETWORK NAMESPACES").
pub fn by_hand(nodes: &[Node; 2]) -> Result<Way> {
    let name = "tunnel";
    let tunnels = [Ipv4Addr::new(10, 99, 0, 1), Ipv4Addr::new(10, 99, 0, 2)];
    for node in nodes {
        node.netns(name)?;
        let inside = node.file(name).display().to_string();
        node.ip("host", "link add hand type wireguard")?;
        node.ip("host", &format!("link set hand netns {inside} name wg0"))?;
        let key = node.file("tunnel.key");
        std::fs::write(&key, PrivateKey::generate()?.reveal())?;
        node.run_in(name, &format!("wg set wg0 listen-port 7799 private-key {}", key.display()))?;
        std::fs::remove_file(key)?;
    }
    for (node, peer, own, other) in
        [(&nodes[0], &nodes[1], tunnels[0], tunnels[1]), (&nodes[1], &nodes[0], tunnels[1], tunnels[0])]
    {
        let public = peer.ask_in(name, "wg show wg0 public-key")?;
        let endpoint = format!("endpoint {}:7799 allowed-ips {other}/32", peer.address);
        node.run_in(name, &format!("wg set wg0 peer {public} {endpoint}"))?;
        node.ip(name, &format!("address add {own}/32 dev wg0"))?;
        node.ip(name, &format!("link set wg0 mtu {} up", MTU + 50))?;
        node.ip(name, &format!("route add {other}/32 dev wg0"))?;
        node.ip(name, &format!("link add vx0 type vxlan id 80 local {own} dstport 7790 nolearning"))?;
    }
    let [across, _] = ways::bridged_by_hand(nodes, name, MTU, [10, 37, 0], tunnels)?;
    Ok(Way { name: "VXLAN in WireGuard by hand", ..across })
}
