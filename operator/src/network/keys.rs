//! Which generation of keys the nodes of encrypted networks are to have. Pure.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use portolan_crds::{ContainerNetwork, Encryption, KeyGeneration, NetworkNodeSlice, NodeEncryption};

/// The first generation.
const FIRST: u32 = 1;

/// The newest generation, which all encrypted networks share, as the nodes' keys do. A new one begins when the last is `rotation` old (never,
/// if there is none) and all nodes have it, and no other.
pub fn generation(
    networks: &[ContainerNetwork],
    slices: &[NetworkNodeSlice],
    now: Timestamp,
    rotation: Option<Duration>,
) -> KeyGeneration {
    let held = networks.iter().filter_map(|network| network.status.as_ref()?.keys.as_ref());
    let Some(held) = held.max_by_key(|keys| keys.generation) else { return begun(FIRST, now) };
    let says = slices.iter().filter_map(|slice| slice.spec.encryption.as_ref());
    if is_old(held, now, rotation) && says.into_iter().all(|node| is_over(node, held.generation)) {
        return begun(held.generation + 1, now);
    }
    held.clone()
}

/// Whether a network's nodes need keys.
pub fn is_encrypted(network: &ContainerNetwork) -> bool {
    network.spec.encryption == Encryption::WireGuard
}

fn begun(generation: u32, now: Timestamp) -> KeyGeneration {
    KeyGeneration { generation, since: Some(Time(now)) }
}

/// Without a time it is: someone took it away.
fn is_old(keys: &KeyGeneration, now: Timestamp, rotation: Option<Duration>) -> bool {
    let Some(rotation) = rotation else { return false };
    keys.since.as_ref().is_none_or(|Time(since)| {
        let age = now.duration_since(*since);
        u64::try_from(age.as_secs()).is_ok_and(|age| age >= rotation.as_secs())
    })
}

fn is_over(node: &NodeEncryption, generation: u32) -> bool {
    node.sends == generation && node.keys.len() == 1 && node.keys.iter().all(|key| key.generation == generation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_crds::{ContainerNetworkSpec, ContainerNetworkStatus, NetworkNodeSliceSpec, NodeKey};

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn now() -> Timestamp {
        "2026-11-27T12:00:00Z".parse().unwrap()
    }

    fn network(generation: Option<u32>, since: &str) -> ContainerNetwork {
        let spec = ContainerNetworkSpec { encryption: Encryption::WireGuard, ..Default::default() };
        let mut network = ContainerNetwork::new("n", spec);
        let keys = generation.map(|generation| KeyGeneration { generation, since: since.parse().ok().map(Time) });
        network.status = Some(ContainerNetworkStatus { keys, ..Default::default() });
        network
    }

    fn slice(generations: &[u32], sends: u32) -> NetworkNodeSlice {
        let key = |generation: &u32| NodeKey { generation: *generation, public_key: String::new() };
        let encryption = Some(NodeEncryption { keys: generations.iter().map(key).collect(), sends });
        NetworkNodeSlice::new("n.x", NetworkNodeSliceSpec { encryption, ..Default::default() })
    }

    fn number(networks: &[ContainerNetwork], slices: &[NetworkNodeSlice], rotation: Option<Duration>) -> u32 {
        generation(networks, slices, now(), rotation).generation
    }

    #[test]
    fn a_new_network_has_the_generation_of_the_others() {
        assert_eq!(number(&[network(None, "")], &[], Some(DAY)), FIRST);
        let both = [network(None, ""), network(Some(7), "2026-11-27T11:00:00Z")];
        assert_eq!(number(&both, &[slice(&[7], 7)], Some(DAY)), 7);
    }

    #[test]
    fn it_is_followed_by_the_next_when_it_is_old() {
        for (since, expected) in [
            ("2026-11-26T12:00:01Z", 7),
            ("2026-11-26T12:00:00Z", 8),
            ("1970-01-01T00:00:00Z", 8),
            ("2026-12-24T12:00:00Z", 7), // by another clock
            ("", 8),
        ] {
            let networks = [network(Some(7), since)];
            assert_eq!(number(&networks, &[slice(&[7], 7)], Some(DAY)), expected, "{since}");
            assert_eq!(number(&networks, &[slice(&[7], 7)], None), 7, "never");
        }
    }

    #[test]
    fn all_nodes_must_have_the_last_one_before() {
        let networks = [network(Some(7), "2020-01-01T00:00:00Z")];
        for (generations, sends) in [(&[6, 7][..], 6), (&[6, 7], 7), (&[6], 6), (&[7], 6), (&[], 0)] {
            assert_eq!(
                number(&networks, &[slice(&[7], 7), slice(generations, sends)], Some(DAY)),
                7,
                "{generations:?}"
            );
        }
        let without = NetworkNodeSlice::new("n.y", NetworkNodeSliceSpec::default());
        assert_eq!(number(&networks, &[slice(&[7], 7), without], Some(DAY)), 8, "of other networks");
    }
}
