//! Clones, deferred destruction, snapshots of several datasets at once.

use portolan_zfs::{DatasetName, ErrorKind, Property, Zfs};

use super::{Node, create, kind, write_and_snapshot};

pub(super) async fn clones(node: &impl Node) {
    let (zfs, pool) = (node.zfs(), node.pool());
    let origin = create(node, "origin").await;
    let snapshot = write_and_snapshot(node, &origin, b"kept", "s").await;
    let clone = pool.child("clone").unwrap();
    let properties = [
        Property::canmount_noauto(),
        node.mountpoint("clone"),
        Property::refquota(64 << 20),
        Property::new("portolan:volume", "clone").unwrap(),
        Property::new("portolan:complete", "yes").unwrap(),
    ];
    zfs.clone_snapshot(&snapshot.name, &clone, &properties).await.unwrap();
    let found = zfs.dataset(&clone).await.unwrap();
    assert_eq!((found.mounted, found.refquota, found.origin.as_ref()), (false, Some(64 << 20), Some(&snapshot.name)));
    assert_eq!(found.user.get("portolan:complete").map(String::as_str), Some("yes"));
    assert_eq!(found.mountpoint.as_deref(), Some(std::path::Path::new(node.mountpoint("clone").value())));
    assert_eq!(kind(zfs.clone_snapshot(&snapshot.name, &clone, &properties).await), ErrorKind::AlreadyExists);
    let missing = origin.snapshot("none").unwrap();
    assert_eq!(kind(zfs.clone_snapshot(&missing, &pool.child("x").unwrap(), &[]).await), ErrorKind::NotFound);
    let orphan = pool.child("nowhere").unwrap().child("x").unwrap();
    assert_eq!(kind(zfs.clone_snapshot(&snapshot.name, &orphan, &[]).await), ErrorKind::NotFound);

    zfs.mount(&clone).await.unwrap();
    assert_eq!(node.read(&clone), b"kept");
    node.write(&clone, b"changed");
    zfs.unmount(&clone).await.unwrap();
    zfs.mount(&origin).await.unwrap();
    assert_eq!(node.read(&origin), b"kept");

    zfs.snapshot(&origin.snapshot("later").unwrap()).await.unwrap();
    assert_eq!(kind(zfs.destroy_snapshot(&snapshot.name).await), ErrorKind::HasClones);
    let refused = zfs.destroy_with_snapshots(&origin).await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::HasClones);
    assert!(refused.stderr.contains(clone.as_str()), "{refused}");
    assert_eq!(zfs.snapshots(&origin).await.unwrap().len(), 2, "a refused destroy leaves all");
    assert!(zfs.is_mounted(&origin).await.unwrap(), "a refused destroy leaves all");
    zfs.unmount(&origin).await.unwrap();
    let renamed = pool.child("origin-renamed").unwrap();
    zfs.rename(&origin, &renamed).await.unwrap();
    assert_eq!(zfs.dataset(&clone).await.unwrap().origin, Some(renamed.snapshot("s").unwrap()));
    let other = renamed.snapshot("portolan-0-5").unwrap();
    zfs.rename_snapshot(&renamed.snapshot("s").unwrap(), other.short()).await.unwrap();
    let found = zfs.snapshots(&renamed).await.unwrap();
    assert_eq!((&found[0].name, found[0].guid), (&other, snapshot.guid), "its GUID and its place stay");
    assert_eq!(zfs.dataset(&clone).await.unwrap().origin.as_ref(), Some(&other));
    assert_eq!(kind(zfs.rename_snapshot(&renamed.snapshot("s").unwrap(), "t").await), ErrorKind::NotFound);
    assert_eq!(kind(zfs.rename_snapshot(&other, "later").await), ErrorKind::AlreadyExists);
    zfs.destroy_with_snapshots(&clone).await.unwrap();
    zfs.destroy_with_snapshots(&renamed).await.unwrap();
}

pub(super) async fn deferred(node: &impl Node) {
    let (zfs, pool) = (node.zfs(), node.pool());
    let origin = create(node, "deferred").await;
    let shorts = async || -> Vec<String> {
        let snapshots = zfs.snapshots(&origin).await.unwrap();
        snapshots.iter().map(|taken| format!("{} {}", taken.name.short(), taken.defer_destroy)).collect()
    };
    let take = async |short: &str| zfs.snapshot(&origin.snapshot(short).unwrap()).await.unwrap().name;
    let (free, held, cloned) = (take("free").await, take("held").await, take("cloned").await);
    zfs.hold(&held, "portolan").await.unwrap();
    let clone = pool.child("clone").unwrap();
    zfs.clone_snapshot(&cloned, &clone, &[Property::canmount_noauto()]).await.unwrap();

    zfs.destroy_snapshot_deferred(&free).await.unwrap();
    assert_eq!(shorts().await, ["held false", "cloned false"], "what nothing keeps goes at once");
    assert_eq!(kind(zfs.destroy_snapshot_deferred(&free).await), ErrorKind::NotFound);
    for _ in 0..2 {
        zfs.destroy_snapshot_deferred(&held).await.unwrap();
        zfs.destroy_snapshot_deferred(&cloned).await.unwrap();
    }
    assert_eq!(shorts().await, ["held true", "cloned true"]);
    assert_eq!(kind(zfs.destroy_with_snapshots(&origin).await), ErrorKind::Busy);
    zfs.release(&held, "portolan").await.unwrap();
    assert_eq!(shorts().await, ["cloned true"]);
    assert_eq!(kind(zfs.destroy_with_snapshots(&origin).await), ErrorKind::HasClones);
    zfs.destroy_with_snapshots(&clone).await.unwrap();
    assert!(shorts().await.is_empty(), "{:?}", shorts().await);
    zfs.destroy_with_snapshots(&origin).await.unwrap();
}

pub(super) async fn several_at_once(node: &impl Node) {
    let (zfs, pool) = (node.zfs(), node.pool());
    let mut all = Vec::new();
    for volume in ["group-1", "group-2", "bystander"] {
        all.push(create(node, volume).await);
    }
    let group: [DatasetName; 2] = [all[0].clone(), all[1].clone()];
    let count = async |dataset: &DatasetName| zfs.snapshots(dataset).await.unwrap().len();
    zfs.snapshot(&group[0].snapshot("apart").unwrap()).await.unwrap();

    let taken = zfs.snapshot_all(&pool, &group, "together").await.unwrap();
    assert_eq!(taken.iter().map(|taken| taken.name.dataset()).collect::<Vec<_>>(), [&group[0], &group[1]]);
    assert_eq!(taken[0].created_txg, taken[1].created_txg, "one transaction");
    assert_ne!(taken[0].guid, taken[1].guid);
    assert_eq!((count(&all[2]).await, count(&pool).await), (0, 0), "what was not asked for has none");
    assert_eq!(zfs.snapshot_all(&pool, &group, "together").await.unwrap(), taken, "idempotent");

    assert_eq!(kind(zfs.snapshot_all(&pool, &group, "apart").await), ErrorKind::AlreadyExists);
    assert_eq!((count(&group[0]).await, count(&group[1]).await), (2, 1), "all or none");
    for dataset in &group {
        zfs.snapshot(&dataset.snapshot("one-by-one").unwrap()).await.unwrap();
    }
    let refused = kind(zfs.snapshot_all(&pool, &group, "one-by-one").await);
    assert_eq!(refused, ErrorKind::AlreadyExists, "they are of two moments");
    let with_missing = [group[0].clone(), pool.child("missing").unwrap()];
    assert_eq!(kind(zfs.snapshot_all(&pool, &with_missing, "new").await), ErrorKind::NotFound);
    assert_eq!(kind(zfs.snapshot_all(&pool, &[], "new").await), ErrorKind::Other);
    assert_eq!(kind(zfs.snapshot_all(&all[2], &group, "new").await), ErrorKind::Other, "they are not below it");
    assert_eq!(count(&group[0]).await, 3, "all or none");
    for volume in &all {
        zfs.destroy_with_snapshots(volume).await.unwrap();
    }
}
