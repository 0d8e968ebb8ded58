//! A volume that nobody writes, and pods that read it on both nodes.

use portolan_crds::{AskedBy, Cipher, PortableVolume, VolumeEncryption, VolumeSource};
use portolan_zfs::{Capabilities, Dataset, Zfs};

use super::Verb;
use super::kubelet::{Call, END, START};
use super::world::{World, name};
use crate::handoff::{Ask, Event, is_complete};
use crate::node::write;
use crate::volume;

/// What was before.
pub(super) async fn prepare(verb: Verb, world: &mut World) {
    world.ask_volume("source", "a", |_| ()).await;
    world.settle().await;
    world.write("source", "first").await;
    world.ask_snapshot("s", "source", |_| ()).await;
    world.settle().await;
    world.write("source", "second").await;
    if verb == Verb::CopyToRead {
        return;
    }
    ask(world, "a").await;
    world.settle().await;
    match verb {
        Verb::Read => world.ask_kubelet("a", START),
        Verb::EndReading => {
            ask_copy(world, "b").await;
            world.ask_kubelet("a", START);
            world.ask_kubelet("b", START);
        }
        _ => ask_copy(world, "b").await,
    }
    world.settle().await;
}

/// Asks for the volume `db`, which begins as the snapshot and is never written.
pub(super) async fn ask(world: &World, node: &str) {
    let snapshot = world.snapshots().get("s").await.unwrap();
    let guid = snapshot.guid().unwrap().to_owned();
    let source = VolumeSource { snapshot: "s".into(), volume: "source".into(), short_name: "s".into(), guid };
    world.expect("db", "first");
    world.ask_volume("db", node, |spec| (spec.source, spec.read_only) = (Some(source), true)).await;
}

/// Asks for a copy of it, as an attachment does.
pub(super) async fn ask_copy(world: &World, to: &str) {
    let volume = get(world).await;
    let ask = Ask { to: to.to_owned(), by: AskedBy::Reading, warm: true, ..Ask::default() };
    write::event(&world.volumes(), &volume, Event::Asked(ask, write::now())).await.unwrap();
}

async fn get(world: &World) -> PortableVolume {
    world.volumes().get("db").await.unwrap()
}

/// A volume on a of which b has a copy, and nobody reads it.
async fn with_two_copies() -> World {
    let mut world = World::new(Capabilities::default()).await;
    prepare(Verb::DeleteRead, &mut world).await;
    world.begin(&[]);
    world
}

async fn dataset(world: &World, node: &str) -> Dataset {
    world.pools[node].dataset(&name("tank/portolan/db")).await.unwrap()
}

async fn mounted(world: &World, node: &str) -> bool {
    dataset(world, node).await.mounted
}

#[tokio::test]
async fn it_is_mounted_only_where_its_copy_is_complete_and_by_nobody_who_writes() {
    let mut world = World::new(Capabilities::default()).await;
    prepare(Verb::Read, &mut world).await;
    let refused = world.call("b", Call::Stage).await.unwrap_err();
    assert!(refused.message().contains("no dataset"), "{refused}");
    ask_copy(&world, "b").await;
    // Its copy is on its way.
    for node in ["a", "b"] {
        let db = get(&world).await;
        world.look(node, db).await;
        let refused = world.call("b", Call::Stage).await;
        assert!(is_complete(&get(&world).await, "b") || refused.is_err(), "{refused:?}");
    }
    world.ask_kubelet("b", START);
    world.settle().await;
    assert!(mounted(&world, "a").await && mounted(&world, "b").await);
    let status = volume::status(&get(&world).await);
    assert_eq!((status.owner.as_deref(), status.epoch, status.handoff), (Some("a"), 1, None), "it has not moved");
    // A mount that somebody has made writable by hand is none that is made again.
    world.ask_kubelet("b", END);
    world.settle().await;
    world.pools["b"].set_readonly(&name("tank/portolan/db"), false).await.unwrap();
    let refused = world.call("b", Call::Stage).await.unwrap_err();
    assert!(refused.message().contains("read-only"), "{refused}");
}

#[tokio::test]
async fn who_has_a_copy_reads_on_without_the_owner() {
    let mut world = with_two_copies().await;
    world.pools["a"].set_imported(false);
    world.ask_kubelet("b", START);
    world.settle().await;
    world.ask_kubelet("b", END);
    world.ask_kubelet("b", START);
    world.settle().await;
    assert!(mounted(&world, "b").await);
    assert!(world.fate.wrong().iter().all(|wrong| wrong.contains("on a has None")), "{:#?}", world.fate.wrong());
}

#[tokio::test]
async fn another_owner_comes_when_neither_of_the_two_reads_and_all_read_on() {
    for reader in ["a", "b"] {
        let mut world = with_two_copies().await;
        world.ask_kubelet(reader, START);
        world.settle().await;
        world.ask_move("db", "b").await;
        world.settle().await;
        let waits = volume::status(&get(&world).await);
        assert_eq!(waits.owner.as_deref(), Some("a"), "{reader} reads: it waits");
        assert!(mounted(&world, reader).await);
        let other = if reader == "a" { "b" } else { "a" };
        let refused = world.call(other, Call::Stage).await.unwrap_err();
        assert!(refused.message().contains("moving"), "{refused}");
        world.ask_kubelet(reader, END);
        world.settle().await;
        assert_eq!(volume::status(&get(&world).await).owner.as_deref(), Some("b"));
        for node in ["a", "b"] {
            assert!(is_complete(&get(&world).await, node), "{node}");
            world.ask_kubelet(node, START);
        }
        world.settle().await;
        assert!(mounted(&world, "a").await && mounted(&world, "b").await);
        assert_eq!(world.fate.wrong(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn an_encrypted_one_is_opened_on_each_node_that_reads_it_and_shut_where_nobody_does() {
    let mut world = World::new(Capabilities::all()).await;
    let encryption = Some(VolumeEncryption { cipher: Cipher::Aes256Gcm, secret: None });
    world.ask_volume("db", "a", |spec| (spec.encryption, spec.read_only) = (encryption, true)).await;
    world.settle().await;
    world.begin(&[]);
    world.ask_kubelet("a", START);
    world.settle().await;
    ask_copy(&world, "b").await;
    world.ask_kubelet("b", START);
    world.settle().await;
    for node in ["a", "b"] {
        let found = dataset(&world, node).await;
        assert!(found.mounted && found.readonly && found.key_available, "{node}: {found:?}");
        assert_eq!(found.encryption_root.as_ref(), Some(&found.name), "{node}");
    }
    world.ask_kubelet("b", END);
    world.settle().await;
    let (a, b) = (dataset(&world, "a").await, dataset(&world, "b").await);
    assert!(!b.mounted && !b.key_available && a.mounted && a.key_available, "{a:?} {b:?}");
    assert_eq!(world.fate.wrong(), Vec::<String>::new());
}

#[tokio::test]
async fn it_is_destroyed_on_each_node_when_nobody_there_reads_it_any_more() {
    let mut world = with_two_copies().await;
    world.ask_kubelet("b", START);
    world.settle().await;
    world.delete_all().await;
    world.settle().await;
    let left = volume::status(&get(&world).await).replicas;
    assert_eq!(left.iter().map(|replica| replica.node.as_str()).collect::<Vec<_>>(), ["b"], "it is read there");
    world.ask_kubelet("b", END);
    world.settle().await;
    assert!(!world.picture().contains("tank/portolan/"), "{}", world.picture());
}
