//! Which block a node takes, and which address in it. Pure: the lock is the IPBlock's name, not this code.

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::Ipv4Net;

/// There is no address or block to give.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AddressError {
    /// Each block of the subnet belongs to a node.
    #[error(
        "each of the {blocks} blocks of subnet {subnet} belongs to a node already: no address is left for this one"
    )]
    SubnetFull {
        /// The subnet.
        subnet: Ipv4Net,
        /// How many usable blocks it has.
        blocks: usize,
    },
}

/// The prefix of a subnet's blocks: sixteen blocks to a subnet, but never more than 64 addresses or less than one in a block.
///
/// So a /20 or larger has blocks of 64, a /24 has 16 blocks of 16, and a /29 has blocks of a single address.
pub fn block_prefix(subnet: Ipv4Net) -> u8 {
    subnet.prefix_len().saturating_add(4).clamp(26, 32)
}

/// The blocks of a subnet that hold at least one address a pod can have, in order.
pub fn blocks(subnet: Ipv4Net) -> impl Iterator<Item = Ipv4Net> {
    subnet
        .subnets(block_prefix(subnet))
        .into_iter()
        .flatten()
        .filter(move |block| usable(subnet, *block).next().is_some())
}

/// The addresses of a block that a pod can have: not the subnet's own, not its broadcast address.
///
/// The subnet's first host address is kept free too: people expect a gateway there.
fn usable(subnet: Ipv4Net, block: Ipv4Net) -> impl Iterator<Item = Ipv4Addr> {
    let gateway = Ipv4Addr::from(u32::from(subnet.network()).saturating_add(1));
    (u32::from(block.network())..=u32::from(block.broadcast()))
        .map(Ipv4Addr::from)
        .filter(move |a| *a != subnet.network() && *a != subnet.broadcast() && *a != gateway)
}

/// The next block to claim: the first that nobody has, searched from a place that depends on the node, so that nodes that
/// start at once rarely ask for the same.
///
/// # Errors
/// When every block is taken.
pub fn free_block(subnet: Ipv4Net, taken: &BTreeSet<Ipv4Net>, node: &str) -> Result<Ipv4Net, AddressError> {
    let all: Vec<Ipv4Net> = blocks(subnet).collect();
    let start = node.bytes().fold(0usize, |sum, b| sum.wrapping_mul(31).wrapping_add(usize::from(b)));
    let count = all.len();
    (0..count)
        .filter_map(|i| all.get(start.wrapping_add(i) % count.max(1)))
        .find(|block| !taken.iter().any(|t| t.contains(*block) || block.contains(t)))
        .copied()
        .ok_or(AddressError::SubnetFull { subnet, blocks: count })
}

/// The first address of a node's own blocks that is not in use; none when they are full.
pub fn free_address(subnet: Ipv4Net, own: &[Ipv4Net], used: &BTreeSet<Ipv4Addr>) -> Option<Ipv4Addr> {
    own.iter().flat_map(|block| usable(subnet, *block)).find(|address| !used.contains(address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn block_sizes() {
        let cases = [
            ("10.0.0.0/8", 26),
            ("10.32.0.0/16", 26),
            ("10.32.0.0/22", 26),
            ("10.32.0.0/24", 28),
            ("10.32.0.0/27", 31),
            ("10.32.0.0/29", 32),
        ];
        for (subnet, prefix) in cases {
            assert_eq!(block_prefix(net(subnet)), prefix, "{subnet}");
        }
    }

    #[test]
    fn a_29_gives_five_addresses_and_then_says_so() {
        let subnet = net("10.32.0.0/29");
        let mut taken = BTreeSet::new();
        let mut used = BTreeSet::new();
        for _ in 0..5 {
            let block = free_block(subnet, &taken, "node").unwrap();
            taken.insert(block);
            assert!(used.insert(free_address(subnet, &[block], &used).unwrap()));
        }
        let error = free_block(subnet, &taken, "node").unwrap_err();
        assert_eq!(error, AddressError::SubnetFull { subnet, blocks: 5 });
        assert!(!used.contains(&Ipv4Addr::new(10, 32, 0, 0)) && !used.contains(&Ipv4Addr::new(10, 32, 0, 1)));
        assert!(!used.contains(&Ipv4Addr::new(10, 32, 0, 7)));
    }

    proptest! {
        /// Nodes that take turns in any order never give the same address twice, and never one outside of the subnet.
        #[test]
        fn no_duplicates(prefix in 20u8..=29, turns in proptest::collection::vec(0usize..4, 1..120)) {
            let subnet = Ipv4Net::new(Ipv4Addr::new(10, 32, 0, 0), prefix).unwrap().trunc();
            let mut taken = BTreeSet::new();
            let mut own = vec![Vec::new(); 4];
            let mut given = BTreeSet::new();
            for node in turns {
                let used = given.clone();
                let address = match free_address(subnet, &own[node], &used) {
                    Some(address) => address,
                    None => match free_block(subnet, &taken, &format!("node-{node}")) {
                        Ok(block) => {
                            prop_assert!(taken.insert(block));
                            own[node].push(block);
                            free_address(subnet, &[block], &used).unwrap()
                        }
                        Err(_) => continue,
                    },
                };
                prop_assert!(given.insert(address));
                prop_assert!(subnet.contains(&address));
                prop_assert!(address != subnet.network() && address != subnet.broadcast());
            }
        }
    }
}
