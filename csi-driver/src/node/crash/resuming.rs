//! A stream that is cut half-way, where ZFS can go on with it: it does, unless nobody wants it any more.

use portolan_crds::HandoffPhase;
use portolan_zfs::memory::Fault;
use portolan_zfs::{Capabilities, ErrorKind};

use super::failures::get;
use super::picture::datasets;
use super::world::World;
use crate::volume;

const SIZE: usize = 1 << 20;

/// A part of the volume's final snapshot is on node b.
async fn cut() -> World {
    let mut world = World::new(Capabilities::all()).await;
    world.ask_volume("db", "a", |_| ()).await;
    world.settle().await;
    world.write("db", &"x".repeat(SIZE)).await;
    world.ask_move("db", "b").await;
    world.pools["a"].inject("send_end", 1, Fault::Fail(ErrorKind::Other));
    for node in ["b", "a", "a", "b"] {
        let volume = get(&world, "db").await;
        world.look(node, volume).await;
    }
    let handoff = volume::status(&get(&world, "db").await).handoff.unwrap();
    assert_eq!(handoff.phase, HandoffPhase::FinalSync);
    assert!(has_part(&world), "{}", world.picture());
    world
}

fn has_part(world: &World) -> bool {
    datasets(&world.pools["b"]).iter().any(|found| found.dataset.resume_token.is_some())
}

fn is_on_b(world: &World) -> bool {
    datasets(&world.pools["b"]).iter().any(|found| found.dataset.name.short() == "db")
}

#[tokio::test]
async fn a_move_that_was_cut_sends_only_the_rest() {
    let mut world = cut().await;
    world.settle().await;
    let status = volume::status(&get(&world, "db").await);
    let last = status.last_handoff.unwrap();
    assert_eq!((status.owner.as_deref(), last.base), (Some("b"), None));
    let bytes = usize::try_from(last.bytes).unwrap();
    assert!(bytes > 0 && bytes < SIZE / 2, "{bytes} of {SIZE}");
    assert!(!has_part(&world));
    let copy = datasets(&world.pools["b"]).into_iter().find(|found| found.dataset.name.short() == "db").unwrap();
    assert_eq!(copy.data.len(), SIZE);
}

#[tokio::test]
async fn a_part_goes_with_the_move_that_is_aborted() {
    let mut world = cut().await;
    world.ask_abort("db").await;
    world.settle().await;
    let status = volume::status(&get(&world, "db").await);
    assert_eq!((status.owner.as_deref(), status.handoff.is_none()), (Some("a"), true));
    assert!(!is_on_b(&world), "{}", world.picture());
    assert!(status.replicas.iter().all(|replica| replica.node != "b"));
    // The next one begins anew.
    world.ask_move("db", "b").await;
    world.settle().await;
    let last = volume::status(&get(&world, "db").await).last_handoff.unwrap();
    assert!(usize::try_from(last.bytes).unwrap() > SIZE, "{}", last.bytes);
}

#[tokio::test]
async fn a_part_goes_with_the_volume() {
    let mut world = cut().await;
    world.delete_all().await;
    world.settle().await;
    assert!(!is_on_b(&world), "{}", world.picture());
    assert!(world.volumes().get_opt("db").await.unwrap().is_none());
}

/// The source is another than the one that had begun, at another epoch, and has taken another snapshot.
#[tokio::test]
async fn a_part_of_an_earlier_epoch_is_no_part_of_this_one() {
    let mut world = cut().await;
    world.ask_abort("db").await;
    // The target sees none of it before the next move is under way.
    for _ in 0..3 {
        let volume = get(&world, "db").await;
        world.look("a", volume).await;
    }
    world.ask_move("db", "b").await;
    assert!(has_part(&world));
    world.settle().await;
    let status = volume::status(&get(&world, "db").await);
    assert_eq!(status.owner.as_deref(), Some("b"));
    let last = status.last_handoff.unwrap();
    assert!(usize::try_from(last.bytes).unwrap() > SIZE, "{}", last.bytes);
    assert!(!has_part(&world));
}
