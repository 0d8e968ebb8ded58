//! A node whose ZFS hangs, whose pool is gone or full: other volumes go on, nothing is taken to be gone, and all ends as without it.

use std::pin::pin;
use std::sync::Arc;

use futures::poll;
use kube::api::DeleteParams;
use portolan_crds::{PortableVolume, VolumePhase, condition};
use portolan_runtime::conditions;
use portolan_zfs::memory::Fault;
use portolan_zfs::{Capabilities, ErrorKind, Zfs};

use super::world::{World, name};
use crate::handoff;
use crate::node::agent;
use crate::volume;

/// A volume that node a has made and written to.
pub(super) async fn with_volume() -> World {
    let mut world = World::new(Capabilities::default()).await;
    world.ask_volume("db", "a", |_| ()).await;
    world.settle().await;
    world.write("db", "first").await;
    world
}

pub(super) async fn get(world: &World, name: &str) -> PortableVolume {
    world.volumes().get(name).await.unwrap()
}

async fn owner(world: &World, name: &str) -> String {
    volume::status(&get(world, name).await).owner.unwrap_or_default()
}

#[tokio::test]
async fn a_command_that_hangs_holds_up_its_own_volume_only() {
    for operation in ["dataset", "snapshots", "create_filesystem"] {
        let mut world = World::new(Capabilities::default()).await;
        world.ask_volume("stuck", "a", |_| ()).await;
        let stuck = get(&world, "stuck").await;
        world.pools["a"].inject(operation, 1, Fault::Hang);
        {
            let mut hangs = pin!(agent::reconcile(Arc::new(stuck), world.agent("a")));
            while !world.pools["a"].calls().iter().any(|call| call.starts_with(operation)) {
                assert!(poll!(&mut hangs).is_pending());
                tokio::task::yield_now().await;
            }
            world.ask_volume("db", "a", |_| ()).await;
            for _ in 0..3 {
                let db = get(&world, "db").await;
                world.look("a", db).await;
            }
            assert_eq!(volume::status(&get(&world, "db").await).phase, VolumePhase::Ready, "{operation}");
            assert!(poll!(&mut hangs).is_pending());
        }
        // Killed at its deadline: what it did is not known.
        world.settle().await;
        assert_eq!(owner(&world, "stuck").await, "a", "{operation}");
    }
}

#[tokio::test]
async fn a_pool_that_is_gone_is_not_empty() {
    let mut world = with_volume().await;
    world.ask_move("db", "b").await;
    world.settle().await;
    // The owner's: nobody else becomes it.
    world.pools["b"].set_imported(false);
    world.ask_move("db", "a").await;
    world.settle().await;
    let waits = volume::status(&get(&world, "db").await);
    assert_eq!((waits.owner.as_deref(), waits.epoch, waits.replicas.len()), (Some("b"), 2, 2));
    let said = waits.handoff.unwrap().last_error.unwrap();
    assert!(said.contains("pool unavailable"), "{said}");
    world.pools["b"].set_imported(true);
    world.settle().await;
    assert_eq!(owner(&world, "db").await, "a");
    // Of a copy that is to go: it is waited for.
    world.pools["b"].set_imported(false);
    world.volumes().delete("db", &DeleteParams::default()).await.unwrap();
    world.settle().await;
    let waits = volume::status(&get(&world, "db").await);
    assert_eq!(waits.replicas.iter().map(|replica| replica.node.as_str()).collect::<Vec<_>>(), ["b"]);
    let said = conditions::find(&waits.conditions, condition::READY).unwrap();
    assert!(said.message.contains("pool unavailable"), "{said:?}");
    world.pools["b"].set_imported(true);
    world.settle().await;
    assert!(world.volumes().get_opt("db").await.unwrap().is_none());
    assert!(!world.picture().contains("tank/portolan/db"));
}

#[tokio::test]
async fn a_step_that_fails_is_taken_again() {
    let moved = async |node: &str, operation: &'static str, fault: Option<Fault>| {
        let mut world = with_volume().await;
        if let Some(fault) = fault {
            world.pools[node].inject(operation, 1, fault);
        }
        world.ask_move("db", "b").await;
        world.settle().await;
        assert_eq!(owner(&world, "db").await, "b", "{node} {operation} {fault:?}");
        world.picture()
    };
    let wanted = moved("a", "", None).await;
    let steps =
        [("a", "set_readonly"), ("a", "snapshot"), ("a", "send_end"), ("b", "receive_end"), ("b", "set_property")];
    for (node, operation) in steps {
        for kind in [ErrorKind::NoSpace, ErrorKind::Timeout, ErrorKind::PoolUnavailable] {
            for fault in [Fault::Fail(kind), Fault::FailAfter(kind)] {
                assert_eq!(moved(node, operation, Some(fault)).await, wanted, "{node} {operation} {fault:?}");
            }
        }
    }
}

#[tokio::test]
async fn nothing_final_is_published_of_what_is_writable_still() {
    let mut world = with_volume().await;
    world.pools["a"].inject("set_readonly", 1, Fault::Lie);
    world.ask_move("db", "b").await;
    world.settle().await;
    assert_eq!(owner(&world, "db").await, "b");
    let status = volume::status(&get(&world, "db").await);
    let published = status.replicas.iter().find_map(|replica| replica.snapshot.clone()).unwrap();
    let calls = world.pools["a"].calls();
    let before = calls.iter().take_while(|call| **call != format!("snapshot tank/portolan/db@{published}"));
    let asked = before.filter(|call| *call == "set_readonly tank/portolan/db true").count();
    assert_eq!(asked, 2, "it was not read-only the first time: {calls:?}");
}

#[tokio::test]
async fn a_full_pool_is_said_and_waited_for() {
    let mut world = World::new(Capabilities::default()).await;
    world.ask_volume("db", "a", |_| ()).await;
    world.pools["a"].inject("create_filesystem", 1, Fault::Fail(ErrorKind::NoSpace));
    let db = get(&world, "db").await;
    world.look("a", db).await;
    let status = volume::status(&get(&world, "db").await);
    let said = conditions::find(&status.conditions, condition::READY).unwrap();
    assert!(said.reason == "StepFailed" && said.message.contains("no space"), "{said:?}");
    world.settle().await;
    assert_eq!(owner(&world, "db").await, "a");
}

/// On zfs-fuse a group's snapshot is taken of every dataset, and goes from those it isn't of.
#[tokio::test]
async fn a_passing_snapshot_is_no_divergence() {
    for stays in [false, true] {
        let mut world = with_volume().await;
        world.ask_move("db", "b").await;
        world.settle().await;
        let passing = name("tank/portolan/db").snapshot("group-g").unwrap();
        world.pools["a"].snapshot(&passing).await.unwrap();
        world.ask_move("db", "a").await;
        for node in ["b", "a"] {
            let db = get(&world, "db").await;
            world.look(node, db).await;
            let status = volume::status(&get(&world, "db").await);
            assert!(conditions::find(&status.conditions, handoff::DIVERGED).is_none(), "it may pass");
            assert_eq!(status.handoff.unwrap().last_error, None);
        }
        assert_eq!(owner(&world, "db").await, "b");
        if !stays {
            world.pools["a"].destroy_snapshot(&passing).await.unwrap();
        }
        world.settle().await;
        assert_eq!(owner(&world, "db").await, "a");
        assert_eq!(world.picture().contains("@group-g"), stays, "what stays is put out of the way and kept");
    }
}

/// What the target of a move has said it has none of any more isn't sent to it, though the source still has it.
#[tokio::test]
async fn a_deleted_snapshot_does_not_come_again() {
    let mut world = with_volume().await;
    for to in ["b", "a"] {
        world.ask_move("db", to).await;
        world.settle().await;
    }
    world.ask_snapshot("s", "db", |_| ()).await;
    world.settle().await;
    world.snapshots().delete("s", &DeleteParams::default()).await.unwrap();
    world.look_all("b").await;
    world.ask_move("db", "b").await;
    world.look_all("a").await;
    // Were it sent it would be alone: b would let go of it right after the rest.
    world.pools["a"].inject("send", 2, Fault::Fail(ErrorKind::Timeout));
    world.look_all("b").await;
    let shorts = async |node: &str| -> Vec<String> {
        let found = world.pools[node].snapshots(&name("tank/portolan/db")).await.unwrap();
        found.iter().map(|taken| taken.name.short().to_owned()).collect()
    };
    assert!(shorts("a").await.contains(&"s".to_owned()), "the source has not come to it yet");
    assert!(!shorts("b").await.contains(&"s".to_owned()), "{:?}", shorts("b").await);
    world.settle().await;
    assert!(world.snapshots().get_opt("s").await.unwrap().is_none());
    assert!(!world.picture().contains("@s "), "{}", world.picture());
}
