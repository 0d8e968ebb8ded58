//! Which block a node takes, and which address in it, of either family. Pure: the lock is the IPBlock's name, not this code.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv6Net};

/// The most bits that the addresses of one block differ in: 64 addresses.
const BLOCK_BITS: u8 = 6;
/// Of a larger IPv6 subnet only the first part of this prefix length is given out: as many addresses as an IPv4 /8 has. So the addresses of
/// one network differ in their last 24 bits, and [`crate::endpoint_mac`] never makes one MAC of two.
const IPV6_POOL: u8 = 104;

/// There is no address or block to give.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AddressError {
    /// Each block of the subnet belongs to a node.
    #[error(
        "each of the {blocks} blocks of subnet {subnet} belongs to a node already: no address is left for this one"
    )]
    SubnetFull {
        /// The subnet.
        subnet: IpNet,
        /// How many usable blocks it has.
        blocks: usize,
    },
}

/// The prefix of a subnet's blocks: sixteen blocks to a subnet, but never more than 64 addresses or less than one in a block.
///
/// So an IPv4 /20 or larger has blocks of 64, a /24 has 16 blocks of 16, and a /29 has blocks of a single address. IPv6 is the same: a /64 has
/// blocks of 64 (/122), a /120 has 16 blocks of 16 (/124). A node that takes a block of each family can serve as many pods with both.
pub fn block_prefix(subnet: IpNet) -> u8 {
    let longest = subnet.max_prefix_len();
    subnet.prefix_len().saturating_add(4).clamp(longest - BLOCK_BITS, longest)
}

/// The part of a subnet that is given out.
fn pool(subnet: IpNet) -> IpNet {
    match subnet {
        IpNet::V6(net) => Ipv6Net::new(net.network(), net.prefix_len().max(IPV6_POOL)).unwrap_or(net).into(),
        IpNet::V4(_) => subnet,
    }
}

/// The blocks of a subnet that hold at least one address a pod can have, in order.
pub fn blocks(subnet: IpNet) -> impl Iterator<Item = IpNet> + Clone {
    pool(subnet)
        .subnets(block_prefix(subnet))
        .into_iter()
        .flatten()
        .filter(move |block| usable(subnet, *block).next().is_some())
}

/// The address of a subnet's gateway: its first host address, which no pod is given.
pub fn gateway(subnet: IpNet) -> IpAddr {
    address(number(subnet.network()).saturating_add(1), subnet)
}

/// The addresses of a block that a pod can have: not the subnet's own (in IPv6 that of any of its routers: RFC 4291, section 2.6.1), not an
/// IPv4 subnet's broadcast address.
///
/// The subnet's first host address is kept free too: people expect a gateway there.
pub fn usable(subnet: IpNet, block: IpNet) -> impl Iterator<Item = IpAddr> {
    let gateway = number(gateway(subnet));
    let broadcast = matches!(subnet, IpNet::V4(_)).then(|| subnet.broadcast());
    (number(block.network())..=number(block.broadcast()))
        .filter(move |n| *n != gateway)
        .map(move |n| address(n, subnet))
        .filter(move |a| *a != subnet.network() && Some(*a) != broadcast)
}

/// The block of an address that a pod can have; none for any other address.
pub fn block_of(subnet: IpNet, address: IpAddr) -> Option<IpNet> {
    let block = IpNet::new(address, block_prefix(subnet)).ok()?.trunc();
    let is_given = pool(subnet).contains(&address) && usable(subnet, block).any(|it| it == address);
    is_given.then_some(block)
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// The address of a number, in the family of `subnet`.
fn address(number: u128, subnet: IpNet) -> IpAddr {
    match subnet {
        IpNet::V4(_) => Ipv4Addr::from_bits(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        IpNet::V6(_) => Ipv6Addr::from_bits(number).into(),
    }
}

/// The next block to claim: the first that nobody has, searched from a place that depends on the node, so that nodes that
/// start at once rarely ask for the same.
///
/// # Errors
/// When every block is taken.
pub fn free_block(subnet: IpNet, taken: &BTreeSet<IpNet>, node: &str) -> Result<IpNet, AddressError> {
    let (pool, prefix) = (pool(subnet), block_prefix(subnet));
    let (first, count) = (number(pool.network()), 1u128 << prefix.saturating_sub(pool.prefix_len()));
    let size = 1u128 << pool.max_prefix_len().saturating_sub(prefix);
    let start = node.bytes().fold(0u128, |sum, b| (sum * 31 + u128::from(b)) % count);
    let nth = |n: u128| IpNet::new(address(first + (start + n) % count * size, subnet), prefix).ok();
    // A block is taken whole as a rule; one of another size is there only if the rule has changed since.
    let is_taken =
        |block: &IpNet| taken.contains(block) || taken.iter().any(|t| t.contains(block) || block.contains(t));
    (0..count)
        .filter_map(nth)
        .find(|block| usable(subnet, *block).next().is_some() && !is_taken(block))
        .ok_or_else(|| AddressError::SubnetFull { subnet, blocks: blocks(subnet).count() })
}

/// The next address of a node's own blocks of a subnet to give to a pod: the first free one after that which was given last, so that one that
/// was given back is given again as late as can be, when nobody takes it for its former pod's any more; none when all are in use.
pub fn free_address(subnet: IpNet, own: &[IpNet], used: &BTreeSet<IpAddr>, last: Option<IpAddr>) -> Option<IpAddr> {
    let of_subnet = own.iter().filter(|block| subnet.contains(*block));
    let free = || of_subnet.clone().flat_map(|block| usable(subnet, *block)).filter(|address| !used.contains(address));
    free().filter(|address| Some(*address) > last).min().or_else(|| free().min())
}

/// The next address of a block to give to a pod: the first free one after that which was given last, so that one that was given back is given
/// again as late as can be; none when all are in use.
pub fn next_address(block: IpNet, used: &BTreeSet<IpAddr>, last: Option<IpAddr>) -> Option<IpAddr> {
    let first = number(gateway(block)) + 1;
    let end = number(block.broadcast()) + u128::from(block.addr().is_ipv6());
    let size = end.checked_sub(first).filter(|size| *size > 0)?;
    let after = last.filter(|last| block.contains(last)).map_or(0, |last| (number(last) + 1).saturating_sub(first));
    // Of more candidates than there are addresses in use one is free.
    let candidates = 0..size.min(used.len() as u128 + 1);
    candidates.map(|n| address(first + (after + n) % size, block)).find(|address| !used.contains(address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn blocks_of_addresses() {
        let of = |subnet: &str, address: &str| block_of(net(subnet), address.parse().unwrap()).map(|it| it.to_string());
        assert_eq!(of("10.32.0.0/16", "10.32.0.100").as_deref(), Some("10.32.0.64/26"));
        assert_eq!(of("fd32::/64", "fd32::100").as_deref(), Some("fd32::100/122"));
        for (subnet, address) in [
            ("10.32.0.0/16", "10.32.0.0"),
            ("10.32.0.0/16", "10.32.0.1"),
            ("10.32.0.0/16", "10.32.255.255"),
            ("10.32.0.0/16", "10.33.0.5"),
            ("10.32.0.0/16", "fd32::5"),
            ("fd32::/64", "fd32::1:0:0:5"),
            ("fd32::/64", "10.32.0.5"),
        ] {
            assert_eq!(of(subnet, address), None, "{address} of {subnet}");
        }
        for subnet in ["10.32.0.0/24", "10.32.0.0/29", "fd32::/120"].map(net) {
            for block in blocks(subnet) {
                assert!(usable(subnet, block).all(|address| block_of(subnet, address) == Some(block)));
            }
        }
    }

    #[test]
    fn addresses_are_given_in_turn() {
        for (block, size) in [("10.244.1.0/29", 5), ("fd44::/125", 6)] {
            let (block, mut used, mut last) = (net(block), BTreeSet::new(), None);
            for _ in 0..size {
                last = next_address(block, &used, last);
                assert!(used.insert(last.unwrap()), "{last:?} was given twice");
            }
            assert!(used.iter().all(|it| usable(block, block).any(|usable| usable == *it)));
            assert_eq!(next_address(block, &used, last), None);
            let all: Vec<IpAddr> = used.iter().copied().collect();
            for back in [all[1], all[3]] {
                used.remove(&back);
            }
            let next = next_address(block, &used, Some(all[2]));
            assert_eq!((next, next_address(block, &used, next)), (Some(all[3]), Some(all[1])), "after the last");
            assert_eq!(next_address(block, &BTreeSet::new(), Some(all[size - 1])), Some(all[0]), "from the beginning");
            assert_eq!(next_address(block, &BTreeSet::new(), Some("10.9.9.9".parse().unwrap())), Some(all[0]));
        }
        for tiny in ["10.244.1.0/30", "10.244.1.0/31", "10.244.1.0/32", "fd44::/127", "fd44::/128"] {
            let given = next_address(net(tiny), &BTreeSet::new(), None);
            assert_eq!(given.is_some(), tiny == "10.244.1.0/30", "{tiny}: {given:?}");
        }
        let large = (net("fd44::/16"), "fd44:ffff:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap());
        assert_eq!(next_address(large.0, &BTreeSet::new(), Some(large.1)), Some("fd44::2".parse().unwrap()));
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
            ("fd32::/48", 122),
            ("fd32::/64", 122),
            ("fd32::/118", 122),
            ("fd32::/120", 124),
        ];
        for (subnet, prefix) in cases {
            assert_eq!(block_prefix(net(subnet)), prefix, "{subnet}");
        }
        for subnet in ["10.0.0.0/8", "fd32::/48", "fd32::/64"] {
            assert_eq!(blocks(net(subnet)).count(), 1 << 18, "{subnet}");
        }
        assert_eq!((blocks(net("10.32.0.0/24")).count(), blocks(net("fd32::/120")).count()), (16, 16));
    }

    #[test]
    fn a_29_gives_five_addresses_and_then_says_so() {
        let subnet = net("10.32.0.0/29");
        let mut taken = BTreeSet::new();
        let mut used = BTreeSet::new();
        for _ in 0..5 {
            let block = free_block(subnet, &taken, "node").unwrap();
            taken.insert(block);
            assert!(used.insert(free_address(subnet, &[block], &used, None).unwrap()));
        }
        let error = free_block(subnet, &taken, "node").unwrap_err();
        assert_eq!(error, AddressError::SubnetFull { subnet, blocks: 5 });
        let wrong: [IpAddr; 3] = ["10.32.0.0", "10.32.0.1", "10.32.0.7"].map(|a| a.parse().unwrap());
        assert!(wrong.iter().all(|address| !used.contains(address)));
    }

    #[test]
    fn a_120_gives_254_addresses_and_then_says_so() {
        let subnet = net("fd32::/120");
        let taken: BTreeSet<IpNet> = blocks(subnet).collect();
        let own: Vec<IpNet> = taken.iter().copied().collect();
        let mut used = BTreeSet::new();
        while let Some(address) = free_address(subnet, &own, &used, None) {
            used.insert(address);
        }
        assert_eq!(used.len(), 254);
        assert_eq!(used.first().copied(), Some("fd32::2".parse().unwrap()), "neither the routers' nor a gateway's");
        assert_eq!(used.last().copied(), Some("fd32::ff".parse().unwrap()), "IPv6 has no broadcast address");
        let error = free_block(subnet, &taken, "node").unwrap_err().to_string();
        assert!(error.starts_with("each of the 16 blocks of subnet fd32::/120 belongs to a node"), "{error}");
    }

    #[test]
    fn an_address_that_is_given_back_is_the_last_to_be_given_again() {
        // A node's blocks are in no order.
        let (subnet, own) = (net("10.32.0.0/24"), [net("10.32.0.32/28"), net("10.32.0.16/28")]);
        let mut last = None;
        let mut given = BTreeSet::new();
        for _ in 0..32 {
            let address = free_address(subnet, &own, &BTreeSet::new(), last).unwrap();
            assert!(given.insert(address), "{address} is given again before others were");
            last = Some(address);
        }
        let first = given.first().copied();
        assert_eq!(free_address(subnet, &own, &BTreeSet::new(), last), first, "and then from the first on");
        let used: BTreeSet<IpAddr> = given.into_iter().filter(|address| Some(*address) != last).collect();
        assert_eq!(free_address(subnet, &own, &used, last), last, "which is the only one left");
    }

    #[test]
    fn blocks_of_the_other_family_are_no_use() {
        let own = [net("10.32.0.0/26")];
        assert_eq!(free_address(net("fd32::/64"), &own, &BTreeSet::new(), None), None);
        assert!(free_block(net("fd32::/64"), &own.into_iter().collect(), "node").is_ok());
    }

    proptest! {
        /// Nodes that take turns in any order never give the same address twice, and never one outside of the subnet.
        #[test]
        fn no_duplicates(
            (prefix, is_ipv6) in prop_oneof![(20u8..=29, Just(false)), (116u8..=120, Just(true))],
            turns in proptest::collection::vec(0usize..4, 1..120),
        ) {
            let first = if is_ipv6 { "fd32::".parse().unwrap() } else { IpAddr::from([10, 32, 0, 0]) };
            let subnet = IpNet::new(first, prefix).unwrap().trunc();
            let mut taken = BTreeSet::new();
            let mut own = vec![Vec::new(); 4];
            let (mut given, mut last) = (BTreeSet::new(), None);
            for node in turns {
                let used = given.clone();
                let address = match free_address(subnet, &own[node], &used, last) {
                    Some(address) => address,
                    None => match free_block(subnet, &taken, &format!("node-{node}")) {
                        Ok(block) => {
                            prop_assert!(taken.insert(block));
                            own[node].push(block);
                            free_address(subnet, &[block], &used, None).unwrap()
                        }
                        Err(_) => continue,
                    },
                };
                last = Some(address);
                prop_assert!(given.insert(address));
                prop_assert!(subnet.contains(&address));
                prop_assert!(address != subnet.network() && (is_ipv6 || address != subnet.broadcast()));
            }
        }
    }
}
