//! The paths to all nodes, and when which is checked. Pure: it is told the time by being asked once a second.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::path::{Outcome, Path};

/// How long after a check the next one begins, in seconds.
const INTERVAL: u64 = 60;
/// Over how many seconds the first checks of nodes that are there at once are spread. So are those of a node that all others see at once.
const SPREAD: u64 = 16;
/// So many seconds without an answer, and the node may be another one when it is back.
const SILENT: u32 = 3;
/// Large questions a second at most: more than twice what a thousand nodes need.
const AT_ONCE: usize = 64;

/// What is known of the paths to other nodes, by their addresses on the underlay.
#[derive(Debug)]
pub struct Paths {
    own: IpAddr,
    now: u64,
    paths: BTreeMap<IpAddr, Checked>,
    /// What was known before, of nodes that nobody has asked for yet.
    before: BTreeMap<IpAddr, u16>,
}

#[derive(Debug)]
struct Checked {
    path: Path,
    /// When the next check begins; in the past while one is under way.
    due: u64,
    /// The size of the last question, while nothing is heard of it.
    asked: Option<u16>,
    /// Seconds since the last one in which the node answered.
    silent: u32,
}

impl Paths {
    /// The paths from a node that knew some to be too small.
    pub fn new(own: IpAddr, before: BTreeMap<IpAddr, u16>) -> Self {
        Self { own, now: 0, paths: BTreeMap::new(), before }
    }

    /// A second has passed. `wanted` are the nodes with the largest packets that have to pass, in bytes with the IP header; others are
    /// forgotten. `answering` are those that have answered a small question since the last time. Returns whom to ask, and of what size.
    ///
    /// A small question is to follow: by its answer the large one is known to be lost.
    pub fn tick(&mut self, wanted: &BTreeMap<IpAddr, u16>, answering: &BTreeSet<IpAddr>) -> Vec<(IpAddr, u16)> {
        self.now += 1;
        self.paths.retain(|node, _| wanted.contains_key(node));
        for (node, size) in wanted {
            let first = self.now + spread(self.own, *node);
            let before = self.before.remove(node);
            let new = || Checked { path: Path::new(*size, before), due: u64::MAX, asked: None, silent: SILENT };
            let checked = self.paths.entry(*node).or_insert_with(new);
            checked.take_stock(answering.contains(node), first);
            if checked.path.want(*size) {
                checked.asked = None;
                checked.due = checked.due.min(first);
            }
        }
        let due = self.paths.iter().filter(|(node, it)| it.due <= self.now && answering.contains(node));
        let mut due: Vec<(u64, IpAddr)> = due.map(|(node, it)| (it.due, *node)).collect();
        due.sort_unstable();
        due.truncate(AT_ONCE);
        let paths = &mut self.paths;
        due.into_iter().filter_map(|(_, node)| Some((node, paths.get_mut(&node)?.ask()))).collect()
    }

    /// Something was heard of a large question.
    pub fn heard(&mut self, node: IpAddr, size: u16, outcome: Outcome) {
        let now = self.now;
        if let Some(checked) = self.paths.get_mut(&node) {
            checked.step(size, outcome, now);
        }
    }

    /// The nodes to which less passes than has to, and how much does, in bytes with the IP header.
    pub fn too_small(&self) -> BTreeMap<IpAddr, u16> {
        self.paths.iter().filter_map(|(node, it)| Some((*node, it.path.too_small()?))).collect()
    }
}

impl Checked {
    fn ask(&mut self) -> u16 {
        let size = self.path.ask();
        self.asked = Some(size);
        size
    }

    /// Before anything else is asked; `first` is when a node that has just come is checked.
    fn take_stock(&mut self, answered: bool, first: u64) {
        if let Some(size) = self.asked {
            let outcome = if answered { Outcome::Lost } else { Outcome::Unknown };
            self.step(size, outcome, first);
        }
        if !answered {
            self.silent = self.silent.saturating_add(1);
            return;
        }
        if self.silent >= SILENT {
            self.path.abandon();
            self.due = first;
        }
        self.silent = 0;
    }

    fn step(&mut self, size: u16, outcome: Outcome, now: u64) {
        if self.asked == Some(size) {
            self.asked = None;
        }
        let was_checked = self.path.is_checked();
        self.path.step(size, outcome);
        if was_checked && !self.path.is_checked() {
            self.due = now + INTERVAL;
        }
    }
}

/// Which of the seconds from the next one on is a pair of nodes': the same every time, and another one for most of the others
/// (multiplicative hashing).
fn spread(own: IpAddr, node: IpAddr) -> u64 {
    let mixed = (folded(own).rotate_left(16) ^ folded(node)).wrapping_mul(0x9e37_79b1);
    u64::from(mixed >> 16) % SPREAD
}

/// An IPv4 address, or the four parts of an IPv6 one in which nodes may differ.
fn folded(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(address) => address.to_bits(),
        IpAddr::V6(address) => address
            .octets()
            .chunks_exact(4)
            .fold(0, |all, part| all ^ part.iter().fold(0, |it, byte| it << 8 | u32::from(*byte))),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    const OWN: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7));
    const SMALL: u16 = 36;

    /// A network whose nodes answer or don't, and whose paths carry so much.
    struct Network {
        paths: Paths,
        wanted: BTreeMap<IpAddr, u16>,
        answering: BTreeSet<IpAddr>,
        carries: u16,
    }

    impl Network {
        fn new(nodes: impl IntoIterator<Item = IpAddr>, carries: u16) -> Self {
            let wanted: BTreeMap<_, _> = nodes.into_iter().map(|node| (node, 1500)).collect();
            let answering = wanted.keys().copied().collect();
            Self { paths: Paths::new(OWN, BTreeMap::new()), wanted, answering, carries }
        }

        /// Lets seconds pass; returns how many questions were asked in each.
        fn seconds(&mut self, count: u64) -> Vec<usize> {
            let second = |_| {
                let asked = self.paths.tick(&self.wanted, &self.answering);
                // The small questions' answers are heard like all others.
                for node in &self.answering {
                    self.paths.heard(*node, SMALL, Outcome::Passed);
                }
                for (node, size) in &asked {
                    if self.answering.contains(node) && *size <= self.carries {
                        self.paths.heard(*node, *size, Outcome::Passed);
                    }
                }
                asked.len()
            };
            (0..count).map(second).collect()
        }

        fn found(&self) -> Option<u16> {
            self.paths.too_small().get(&NODE).copied()
        }
    }

    #[test]
    fn each_node_is_checked_soon_and_then_every_minute() {
        let mut network = Network::new([NODE], 1500);
        assert_eq!(network.seconds(SPREAD).iter().sum::<usize>(), 1);
        assert_eq!(network.seconds(10 * INTERVAL).iter().sum::<usize>(), 10);
        assert_eq!(network.found(), None);
    }

    #[test]
    fn a_path_that_is_too_small_is_found_and_seen_to_be_repaired() {
        let mut network = Network::new([NODE], 1420);
        network.seconds(INTERVAL);
        assert_eq!(network.found(), Some(1420));
        network.seconds(3 * INTERVAL);
        assert_eq!(network.found(), Some(1420));
        network.carries = 1300;
        network.seconds(2 * INTERVAL);
        assert_eq!(network.found(), Some(1300));
        network.carries = 1500;
        network.seconds(INTERVAL + u64::from(SILENT));
        assert_eq!(network.found(), None);
    }

    #[test]
    fn a_silent_node_is_not_asked_and_nothing_is_said_of_its_path() {
        let mut network = Network::new([NODE], 1420);
        network.answering.clear();
        assert_eq!(network.seconds(3 * INTERVAL).iter().sum::<usize>(), 0);
        assert_eq!(network.found(), None);
        network.answering.insert(NODE);
        network.seconds(INTERVAL);
        assert_eq!(network.found(), Some(1420));
        // It goes in the middle of a check, and comes back with a path that is fine.
        network.seconds(INTERVAL / 2);
        network.answering.clear();
        assert_eq!(network.seconds(2 * INTERVAL).iter().sum::<usize>(), 0);
        assert_eq!(network.found(), Some(1420), "what was known stays");
        network.answering.insert(NODE);
        network.carries = 1500;
        network.seconds(SPREAD);
        assert_eq!(network.found(), None, "it is checked soon after it is back");
    }

    #[test]
    fn a_node_that_is_back_is_checked_soon() {
        let mut network = Network::new([NODE], 1500);
        network.seconds(SPREAD);
        network.answering.clear();
        network.seconds(u64::from(SILENT));
        network.answering.insert(NODE);
        assert_eq!(network.seconds(SPREAD).iter().sum::<usize>(), 1);
    }

    #[test]
    fn what_passed_to_a_node_before_its_silence_is_forgotten() {
        let mut network = Network::new([NODE], 1420);
        network.seconds(SPREAD + 10);
        assert_eq!(network.found(), None, "the search is under way");
        network.answering.clear();
        network.seconds(u64::from(SILENT));
        (network.answering, network.carries) = (BTreeSet::from([NODE]), 600);
        let mut found = BTreeSet::new();
        for _ in 0..2 * INTERVAL {
            network.seconds(1);
            found.insert(network.found());
        }
        assert_eq!(found, BTreeSet::from([None, Some(600)]));
    }

    #[test]
    fn what_is_lost_together_with_small_questions_says_nothing() {
        let mut network = Network::new([NODE], 1420);
        for _ in 0..2 * INTERVAL {
            network.answering.insert(NODE);
            network.seconds(1);
            network.answering.clear();
            network.seconds(1);
        }
        assert_eq!(network.found(), None);
    }

    #[test]
    fn what_a_predecessor_knew_stays_until_it_is_checked() {
        let mut network = Network::new([NODE], 1420);
        network.paths = Paths::new(OWN, BTreeMap::from([(NODE, 1420), (OWN, 1400)]));
        for _ in 0..2 * INTERVAL {
            network.seconds(1);
            assert_eq!(network.paths.too_small(), BTreeMap::from([(NODE, 1420)]));
        }
        network.wanted.clear();
        network.seconds(1);
        assert_eq!(network.paths.too_small(), BTreeMap::new(), "no network in common");
    }

    #[test]
    fn more_that_is_wanted_is_checked_soon() {
        let mut network = Network::new([NODE], 1500);
        network.seconds(SPREAD);
        network.wanted.insert(NODE, 1550);
        network.seconds(INTERVAL);
        assert_eq!(network.found(), Some(1500));
        network.wanted.insert(NODE, 1500);
        network.seconds(1);
        assert_eq!(network.found(), None);
    }

    fn ipv4(n: u32) -> IpAddr {
        Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 9).to_bits() + n).into()
    }

    fn ipv6(n: u32) -> IpAddr {
        Ipv6Addr::from_bits(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 9).to_bits() + u128::from(n)).into()
    }

    /// Each in a rack of its own.
    fn racks(n: u32) -> IpAddr {
        Ipv6Addr::from_bits(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).to_bits() + (u128::from(n) << 64)).into()
    }

    #[test]
    fn nodes_are_not_asked_all_at_once() {
        for address in [ipv4, ipv6, racks] {
            let mut network = Network::new((0..200).map(address), 1500);
            let first = network.seconds(SPREAD);
            assert_eq!(first.iter().sum::<usize>(), 200, "{first:?}");
            assert!(first.iter().all(|count| *count <= 30), "{first:?}");
            // Nor is a node by all others.
            let mut seconds = BTreeMap::new();
            for n in 0..200 {
                *seconds.entry(spread(address(n), NODE)).or_insert(0) += 1;
            }
            assert!(seconds.values().all(|count| *count <= 30), "{seconds:?}");
            let mut network = Network::new((0..5000).map(address), 1500);
            let asked = network.seconds(2 * INTERVAL);
            assert!(asked.iter().all(|count| *count <= AT_ONCE), "{asked:?}");
            assert!(asked.iter().sum::<usize>() >= 5000, "each of them once at least");
        }
    }
}
