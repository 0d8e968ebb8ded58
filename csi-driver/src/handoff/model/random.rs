use proptest::prelude::*;

use super::{Happening, NODES, Weakness, World};

fn happenings() -> impl Strategy<Value = Vec<Happening>> {
    let node = 0..NODES.len();
    let happening = prop_oneof![
        40 => node.clone().prop_map(Happening::Step),
        2 => node.clone().prop_map(Happening::Kill),
        2 => node.clone().prop_map(Happening::KillSending),
        1 => Just(Happening::Arrive),
        3 => node.clone().prop_map(Happening::Want),
        2 => node.clone().prop_map(Happening::WantWarm),
        1 => Just(Happening::Abort),
        4 => node.clone().prop_map(Happening::Mount),
        1 => node.clone().prop_map(Happening::MountLate),
        1 => Just(Happening::MountComes),
        4 => node.clone().prop_map(Happening::Unmount),
        4 => Just(Happening::Write),
        2 => node.prop_map(Happening::PowerCut),
        2 => Just(Happening::WantSnapshot),
        2 => Just(Happening::DropSnapshot),
    ];
    proptest::collection::vec(happening, 0..500)
}

/// How many histories: more with `HISTORIES=200000`, which is for a release build.
fn cases() -> u32 {
    std::env::var("HISTORIES").ok().and_then(|histories| histories.parse().ok()).unwrap_or(400)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_writer_nothing_lost_every_move_ends(happenings in happenings(), last in 0..NODES.len()) {
        let mut world = World::new(Weakness::None);
        for happening in &happenings {
            world.happen(happening);
            prop_assert_eq!(&world.wrong, &None);
        }
        prop_assert_eq!(world.settle(last).map(|_| ()), Ok(()));
    }
}
