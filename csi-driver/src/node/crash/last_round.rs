//! The round after a pod's end: what the pod has written last is at the target before the volume is wanted there, unless anybody has written since.

use portolan_crds::{AskedBy, HandoffReport};
use portolan_zfs::{Capabilities, Zfs};

use super::failures::get;
use super::kubelet::{Call, END, START};
use super::world::{World, name};
use crate::handoff::{Ask, Event};
use crate::node::write;
use crate::volume;

/// Asks for a move that leaves the pod where it is at first.
pub(super) async fn ask_warm(world: &World, to: &str) {
    let ask = Ask { to: to.to_owned(), by: AskedBy::Migration, warm: true, ..Ask::default() };
    write::event(&world.volumes(), &get(world, "db").await, Event::Asked(ask, write::now())).await.unwrap();
}

/// A volume that is near at node b, and whose pod has written more on node a since and has ended.
async fn ended() -> World {
    let mut world = World::new(Capabilities::all()).await;
    world.ask_volume("db", "a", |_| ()).await;
    world.settle().await;
    world.ask_kubelet("a", START);
    world.settle().await;
    ask_warm(&world, "b").await;
    world.settle().await;
    world.pools["a"].write(&name("tank/portolan/db"), b"written last").unwrap();
    world.expect("db", "written last");
    world.ask_kubelet("a", END);
    world
}

/// The move's end; the rules see to it that node b has what was written.
async fn moved(mut world: World) -> HandoffReport {
    world.begin(&[]);
    world.ask_move("db", "b").await;
    world.settle().await;
    assert_eq!(world.fate.wrong(), Vec::<String>::new());
    let status = volume::status(&get(&world, "db").await);
    assert_eq!(status.owner.as_deref(), Some("b"));
    status.last_handoff.unwrap()
}

async fn calls(world: &World, node: &'static str, calls: [Call; 2]) {
    for call in calls {
        world.call(node, call).await.unwrap();
    }
}

#[tokio::test]
async fn nothing_is_left_to_be_sent_when_the_volume_is_wanted() {
    let mut world = ended().await;
    world.settle().await;
    assert_eq!(moved(world).await.bytes, 0);
}

#[tokio::test]
async fn it_is_sent_when_the_volume_is_wanted_if_there_was_no_time() {
    let mut world = ended().await;
    calls(&world, "a", END).await;
    world.forget_calls();
    assert!(moved(world).await.bytes > 0);
}

#[tokio::test]
async fn what_a_pod_has_written_that_came_back_is_sent() {
    let mut world = ended().await;
    world.settle().await;
    calls(&world, "a", START).await;
    world.pools["a"].write(&name("tank/portolan/db"), b"written after all").unwrap();
    world.expect("db", "written after all");
    // Its agent sees nothing of it before the volume is wanted elsewhere.
    calls(&world, "a", END).await;
    assert!(moved(world).await.bytes > 0);
}

#[tokio::test]
async fn what_was_written_by_hand_is_sent() {
    let mut world = ended().await;
    world.settle().await;
    let (pool, dataset) = (&world.pools["a"], name("tank/portolan/db"));
    pool.set_readonly(&dataset, false).await.unwrap();
    pool.mount(&dataset).await.unwrap();
    pool.write(&dataset, b"written by hand").unwrap();
    pool.unmount(&dataset).await.unwrap();
    world.expect("db", "written by hand");
    assert!(moved(world).await.bytes > 0);
}
