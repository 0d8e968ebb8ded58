//! Volumes (zvols), where there are any.

use portolan_zfs::{ErrorKind, Kind, Property, ReceiveOptions, Snapshot, Zfs};

use super::{Node, kind, receive_with, stream};

/// A multiple of any block size.
const SIZE: u64 = 16 << 20;

pub(super) async fn block_devices(node: &impl Node, other: &impl Node) {
    let (zfs, pool) = (node.zfs(), node.pool());
    let (volume, clone) = (pool.child("block").unwrap(), pool.child("block-clone").unwrap());
    let label = Property::new("portolan:volume", "block").unwrap();
    if !zfs.probe().await.unwrap().capabilities.zvol {
        let refused = zfs.create_volume(&volume, SIZE, &[label], None).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Unsupported);
        assert!(refused.stderr.contains("zvol"), "{refused}");
        assert_eq!(kind(zfs.dataset(&volume).await), ErrorKind::NotFound);
        return;
    }
    zfs.create_volume(&volume, SIZE, &[label], None).await.unwrap();
    assert_eq!(kind(zfs.create_volume(&volume, SIZE, &[], None).await), ErrorKind::AlreadyExists);
    let found = zfs.dataset(&volume).await.unwrap();
    assert_eq!((found.kind, found.mounted, found.mountpoint), (Kind::Volume { size: SIZE }, false, None));
    assert!(found.used < SIZE, "it takes room as it is written: {}", found.used);
    assert_eq!(found.user.get("portolan:volume").map(String::as_str), Some("block"));
    assert_eq!(zfs.children(&pool).await.unwrap().len(), 1);
    assert!(!zfs.is_mounted(&volume).await.unwrap());

    node.write_device(&volume, b"blocks");
    let snapshot = zfs.snapshot(&volume.snapshot("s").unwrap()).await.unwrap();
    zfs.set_property(&volume, &Property::volsize(2 * SIZE)).await.unwrap();
    assert_eq!(zfs.dataset(&volume).await.unwrap().kind, Kind::Volume { size: 2 * SIZE });
    assert_eq!(node.read_device(&volume, 6), b"blocks");
    moves(node, other, &snapshot).await;

    zfs.clone_snapshot(&snapshot.name, &clone, &[]).await.unwrap();
    assert_eq!(zfs.dataset(&clone).await.unwrap().kind, Kind::Volume { size: SIZE });
    assert_eq!(node.read_device(&clone, 6), b"blocks");
    assert_eq!(kind(zfs.destroy_with_snapshots(&volume).await), ErrorKind::HasClones);
    node.set_open(&clone, true);
    assert_eq!(kind(zfs.destroy_with_snapshots(&clone).await), ErrorKind::Busy);
    node.set_open(&clone, false);
    zfs.destroy_with_snapshots(&clone).await.unwrap();
    zfs.destroy_with_snapshots(&volume).await.unwrap();
}

/// In full, and what came after: its new content and size.
async fn moves(a: &impl Node, b: &impl Node, one: &Snapshot) {
    let (source, target) = (one.name.dataset(), b.pool().child("block-copy").unwrap());
    let options = ReceiveOptions::with(&[Property::readonly(true)]);
    receive_with(b, &target, &stream(a, one, None).await, &options).await.unwrap();
    let copy = b.zfs().dataset(&target).await.unwrap();
    assert_eq!((copy.kind, copy.readonly), (Kind::Volume { size: SIZE }, true));
    assert_eq!(b.read_device(&target, 6), b"blocks");
    a.write_device(source, b"BLOCKS");
    let two = a.zfs().snapshot(&source.snapshot("two").unwrap()).await.unwrap();
    receive_with(b, &target, &stream(a, &two, Some(one)).await, &options).await.unwrap();
    assert_eq!(b.zfs().dataset(&target).await.unwrap().kind, Kind::Volume { size: 2 * SIZE });
    assert_eq!(b.read_device(&target, 6), b"BLOCKS");
    b.zfs().destroy_with_snapshots(&target).await.unwrap();
}
