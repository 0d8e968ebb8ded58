//! Who waits: a transfer for its turn, whose status says so, which holds up nobody and ends when nobody wants it any more; the
//! kubelet for a step of the agent.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use portolan_crds::HandoffPhase;

use super::failures::{get, with_volume};
use super::kubelet::{Call, VOLUME};
use super::world::World;
use crate::handoff::Event;
use crate::node::{agent, write};
use crate::transfer::{Class, Place};
use crate::volume;

const PATIENCE: Duration = Duration::from_secs(30);

/// A volume that is about to be fetched by node b, all of whose places are taken.
async fn before_the_fetch() -> (World, Vec<Place>) {
    let mut world = with_volume().await;
    let held = (0..4).map(|_| world.node("b").receives.enter(Class::Final)).collect();
    world.ask_move("db", "b").await;
    for node in ["b", "a", "a"] {
        let volume = get(&world, "db").await;
        world.look(node, volume).await;
    }
    let handoff = volume::status(&get(&world, "db").await).handoff.unwrap();
    assert_eq!(handoff.phase, HandoffPhase::FinalSync);
    (world, held)
}

/// Lets node b's look go on until its status says that it waits.
async fn until_it_waits(world: &World, look: &mut Pin<&mut impl Future>) {
    let begin = Instant::now();
    loop {
        let said = volume::status(&get(world, "db").await).handoff.and_then(|handoff| handoff.waits);
        if let Some(said) = said {
            return assert_eq!(said, "its turn to be received by node b: 0 before it");
        }
        assert!(begin.elapsed() < PATIENCE, "nothing says that it waits");
        tokio::select! {
            _ = look.as_mut() => panic!("it doesn't wait"),
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
    }
}

#[tokio::test]
async fn who_waits_says_so_and_holds_nothing_until_its_turn_comes() {
    let (mut world, held) = before_the_fetch().await;
    {
        let mut look = pin!(agent::reconcile(Arc::new(get(&world, "db").await), world.agent("b")));
        until_it_waits(&world, &mut look).await;
        let locked = world.node("b").locks.try_lock("db");
        assert!(locked.is_some(), "others may have the volume");
        drop(held);
        // Until they let it go.
        assert!(tokio::time::timeout(Duration::from_millis(500), look.as_mut()).await.is_err());
        assert!(!world.pools["b"].calls().iter().any(|call| call.starts_with("receive ")));
        drop(locked);
        tokio::time::timeout(PATIENCE, look).await.expect("its turn has come").unwrap();
    }
    world.settle().await;
    let status = volume::status(&get(&world, "db").await);
    assert_eq!((status.owner.as_deref(), status.handoff), (Some("b"), None));
}

#[tokio::test]
async fn who_waits_goes_away_when_the_move_is_aborted() {
    let (mut world, held) = before_the_fetch().await;
    {
        let mut look = pin!(agent::reconcile(Arc::new(get(&world, "db").await), world.agent("b")));
        until_it_waits(&world, &mut look).await;
        let aborted = Event::Aborted { why: "no more".into(), at: write::now() };
        write::event(&world.volumes(), &get(&world, "db").await, aborted).await.unwrap();
        world.see("b");
        tokio::time::timeout(PATIENCE, look).await.expect("nobody wants it").unwrap();
    }
    drop(held);
    let receives = &world.node("b").receives;
    let all: Vec<Place> = (0..4).map(|_| receives.enter(Class::Final)).collect();
    assert!(all.iter().all(|place| place.before().is_none()), "it has left the queue");
    drop(all);
    world.settle().await;
    let status = volume::status(&get(&world, "db").await);
    assert_eq!((status.owner.as_deref(), status.handoff), (Some("a"), None));
}

/// A step of the agent is a handful of `zfs` commands, each of which takes a second on a busy node.
#[tokio::test]
async fn the_kubelet_waits_out_a_step_that_takes_seconds() {
    let world = with_volume().await;
    let step = world.node("a").locks.try_lock(VOLUME).expect("nobody has it");
    let staged = tokio::spawn(world.call("a", Call::Stage));
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(!staged.is_finished(), "one operation on a volume at a time");
    drop(step);
    staged.await.unwrap().expect("it had only to wait");
}
