//! Thousands of nodes that take addresses of one network by the agent's own code, for hours, while everything fails that can: requests and answers
//! are lost, watches are silent, nodes are cut off, agents and machines are killed between any two steps, Node objects are deleted, StatefulSets
//! come, shrink and go, and the operator collects what is left. No two pods ever have one address.
//!
//! What is assumed: a machine whose Node object was deleted is off within ten minutes, and when it is back, nothing of before runs on it; a request
//! that its sender has heard nothing of is carried out at once or never.
//!
//! All of it is one thread and one seed: what was found is found again.

mod operator;
mod server;
mod world;

use server::Without;
use world::{Sizes, World};

/// One network of 5,000 nodes.
const LARGE: Sizes =
    Sizes { nodes: 5000, subnets: &["10.32.0.0/13"], sets: 100, replicas: 4, most: 10_000, steps: 60_000 };
/// More nodes than blocks: they meet all the time.
const CROWDED: Sizes =
    Sizes { nodes: 24, subnets: &["10.32.0.0/24", "fd32::/120"], sets: 6, replicas: 3, most: 120, steps: 40_000 };
const SEEDS: u64 = 40;

fn play(sizes: Sizes, seed: u64, without: Without) -> Result<World, String> {
    let mut world = World::new(sizes, seed, without);
    world.play().map(|()| world).map_err(|why| format!("seed {seed}: {why}"))
}

#[test]
fn no_address_is_two_pods_on_five_thousand_nodes() {
    let begun = std::time::Instant::now();
    let world = play(LARGE, 1, Without::Nothing).unwrap();
    println!("5,000 nodes: {}; {:.1} s", world.told(), begun.elapsed().as_secs_f64());
    world.check_all();
}

#[test]
fn no_address_is_two_pods_where_blocks_are_few() {
    for seed in 0..SEEDS {
        let world = play(CROWDED, seed, Without::Nothing).unwrap();
        println!("24 nodes, seed {seed}: {}", world.told());
        world.check_all();
    }
}

/// Each of what it rests on is missed as soon as it isn't there.
#[test]
fn it_is_seen_when_something_is_missing() {
    use Without::{AtomicCreate, FormerNodes, NodesEnd, PodsEnd, Quarantine, Versions};
    // Each with a seed that shows it, as long as nothing else is changed.
    for (without, seed) in
        [(AtomicCreate, 0), (Versions, 13), (Quarantine, 0), (PodsEnd, 0), (NodesEnd, 0), (FormerNodes, 20)]
    {
        let found = (seed..seed + 100).find_map(|seed| play(CROWDED, seed, without).err());
        println!("without {without:?}: {found:?}");
        let found = found.unwrap_or_else(|| panic!("a world without {without:?} seems to be right"));
        assert!(found.contains("is also"), "{found}");
    }
}
