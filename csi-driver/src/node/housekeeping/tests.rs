use std::path::Path;
use std::sync::Mutex;

use portolan_crds::{
    Handoff, PortableSnapshot, PortableSnapshotSpec, PortableVolumeSpec, PortableVolumeStatus, Replica,
};
use portolan_zfs::memory::Memory;
use portolan_zfs::{Capabilities, Property};

use super::*;
use crate::block::mounts::{DeviceNumber, Mount};
use crate::volume::EPOCH_PROPERTY;

const UUID: &str = "0b8a3a52-9f0c-4c1e-8d59-0e5d2c7a9f11";

/// What the API says.
#[derive(Default)]
struct Fake {
    known: Known,
    down: bool,
    /// What it says when it is asked once more, if that is something else.
    later: Mutex<Option<kube::Result<Option<PortableVolume>>>>,
}

impl Registry for Fake {
    async fn all(&self) -> kube::Result<Known> {
        if self.down { Err(kube::Error::TlsRequired) } else { Ok(self.known.clone()) }
    }

    async fn volume(&self, name: &str) -> kube::Result<Option<PortableVolume>> {
        let later = self.later.lock().unwrap().take();
        later.unwrap_or_else(|| Ok(self.known.volumes.iter().find(|volume| volume.name_any() == name).cloned()))
    }
}

fn name(text: &str) -> DatasetName {
    DatasetName::new(text).unwrap()
}

fn pool() -> DatasetName {
    name("tank/portolan")
}

/// A volume whose owner is `owner`, with a UID that follows from its name.
fn volume(called: &str, owner: &str) -> PortableVolume {
    let mut volume = PortableVolume::new(called, PortableVolumeSpec::default());
    volume.metadata.uid = Some(format!("uid-{called}"));
    let replicas = vec![Replica { node: owner.into(), ..Replica::default() }];
    let owner = Some(owner.to_owned());
    volume.status = Some(PortableVolumeStatus { owner, epoch: 2, replicas, ..PortableVolumeStatus::default() });
    volume
}

/// A dataset with these user properties, as `uid=...,epoch=...`.
async fn dataset(zfs: &Memory, called: &str, properties: &[(&str, &str)]) -> DatasetName {
    let dataset = pool().child(called).unwrap();
    let mut all = vec![Property::canmount_noauto(), Property::new("mountpoint", format!("/m/{called}")).unwrap()];
    all.extend(properties.iter().map(|(name, value)| Property::new(*name, *value).unwrap()));
    zfs.create_filesystem(&dataset, &all, None).await.unwrap();
    dataset
}

struct World {
    zfs: Memory,
    api: Fake,
    root: tempfile::TempDir,
}

impl World {
    /// A node a with a volume of its own, as all nodes have.
    async fn new() -> Self {
        let zfs = Memory::new(&pool(), 1 << 30).with_capabilities(Capabilities::all());
        dataset(&zfs, "own", &[(EPOCH_PROPERTY, "2"), (VOLUME_PROPERTY, "own"), (UID_PROPERTY, "uid-own")]).await;
        let known = Known { volumes: vec![volume("own", "a")], ..Known::default() };
        Self { zfs, api: Fake { known, ..Fake::default() }, root: tempfile::tempdir().unwrap() }
    }

    /// A dataset that was marked and never owned, of a volume that is gone.
    async fn cut_short(&self) -> DatasetName {
        dataset(&self.zfs, "short", &[(VOLUME_PROPERTY, "short"), (UID_PROPERTY, "uid-short")]).await
    }

    async fn look(&self) -> Result<Orphans, LookError> {
        let (mounts, locks) = (Mounts::new(self.root.path()), Locks::default());
        self.look_with(&mounts, &locks).await
    }

    async fn look_with(&self, mounts: &Mounts, locks: &Locks) -> Result<Orphans, LookError> {
        let (pool, mountpoints) = (pool(), Path::new("/volumes").to_owned());
        let (zfs, registry) = (&self.zfs, &self.api);
        House { me: "a", pool: &pool, mountpoints, mounts, locks, zfs, registry }.look().await
    }

    fn destroyed(&self) -> bool {
        self.zfs.calls().iter().any(|call| call.starts_with("destroy"))
    }
}

fn reasons(found: &Orphans) -> Vec<(&str, &str)> {
    found.items.iter().map(|orphan| (orphan.name.as_str(), orphan.reason.as_str())).collect()
}

#[tokio::test]
async fn a_house_in_order_has_no_orphans() {
    let world = World::new().await;
    dataset(&world.zfs, "home", &[]).await;
    let found = world.look().await.unwrap();
    assert_eq!((found.count, found.bytes, found.foreign, found.items.len()), (0, 0, 1, 0));
    assert!(!world.destroyed());
}

#[tokio::test]
async fn what_was_never_used_is_collected() {
    let world = World::new().await;
    let short = world.cut_short().await;
    assert_eq!(world.look().await.unwrap().count, 0);
    assert_eq!(world.zfs.dataset(&short).await.unwrap_err().kind, ErrorKind::NotFound);
    assert!(world.zfs.dataset(&pool().child("own").unwrap()).await.is_ok());
}

#[tokio::test]
async fn an_api_that_is_down_proves_nothing() {
    let mut world = World::new().await;
    world.cut_short().await;
    world.api.down = true;
    assert!(matches!(world.look().await, Err(LookError::Api(_))));
    assert!(!world.destroyed());
    world.api.down = false;
    // It goes down, or learns of the volume, between the list and the end.
    for later in [Err(kube::Error::TlsRequired), Ok(Some(volume("short", "b")))] {
        *world.api.later.lock().unwrap() = Some(later);
        world.look().await.unwrap();
        assert!(!world.destroyed());
    }
    // An empty answer is no proof either.
    world.api.known = Known::default();
    world.look().await.unwrap();
    assert!(!world.destroyed());
}

#[tokio::test]
async fn an_api_restored_from_a_backup_costs_no_data() {
    let world = World::new().await;
    // All of these were made after the backup.
    let marks = |epoch: &'static str| [(EPOCH_PROPERTY, epoch), (VOLUME_PROPERTY, "v"), (UID_PROPERTY, "uid-v")];
    let written = dataset(&world.zfs, "written", &marks("1")).await;
    world.zfs.mount(&written).await.unwrap();
    world.zfs.write(&written, b"dear").unwrap();
    world.zfs.unmount(&written).await.unwrap();
    dataset(&world.zfs, "empty-but-owned", &marks("1")).await;
    let replica = dataset(&world.zfs, "replica", &marks("1")[1..]).await;
    world.zfs.snapshot(&replica.snapshot("portolan-2").unwrap()).await.unwrap();
    let copy = dataset(&world.zfs, "received", &marks("1")[1..]).await;
    world.zfs.set_readonly(&copy, true).await.unwrap();
    // This one could go, if the others didn't show that the API has lost volumes.
    world.cut_short().await;
    let found = world.look().await.unwrap();
    assert!(!world.destroyed());
    assert_eq!((found.count, found.items.len()), (5, 5));
    assert!(found.items.iter().all(|orphan| orphan.reason == "VolumeGone" && orphan.bytes > Some(0)));
    assert!(found.bytes >= 5 * 1024 && found.items[0].message.contains("zfs destroy -r tank/portolan/"));
    assert!(found.items[0].message.contains("zfs inherit portolan:uid tank/portolan/"));
}

#[tokio::test]
async fn each_alone_is_never_collected() {
    let marks = [(EPOCH_PROPERTY, "1"), (VOLUME_PROPERTY, "v"), (UID_PROPERTY, "uid-v")];
    for what in ["owned", "snapshot", "mounted", "data", "received"] {
        let world = World::new().await;
        let one = dataset(&world.zfs, "one", if what == "owned" { &marks } else { &marks[1..] }).await;
        match what {
            "snapshot" => _ = world.zfs.snapshot(&one.snapshot("s").unwrap()).await.unwrap(),
            "mounted" => world.zfs.mount(&one).await.unwrap(),
            "received" => world.zfs.set_readonly(&one, true).await.unwrap(),
            "data" => {
                world.zfs.mount(&one).await.unwrap();
                world.zfs.write(&one, &vec![1; 256 << 10]).unwrap();
                world.zfs.unmount(&one).await.unwrap();
            }
            _ => {}
        }
        assert_eq!(reasons(&world.look().await.unwrap()), [("tank/portolan/one", "VolumeGone")], "{what}");
        assert!(!world.destroyed(), "{what}");
    }
}

#[tokio::test]
async fn what_somebody_works_on_is_left_alone() {
    let world = World::new().await;
    world.cut_short().await;
    let (mounts, locks) = (Mounts::new(world.root.path()), Locks::default());
    let held = locks.lock("short").await;
    world.look_with(&mounts, &locks).await.unwrap();
    assert!(!world.destroyed());
    drop(held);
    world.look_with(&mounts, &locks).await.unwrap();
    assert!(world.destroyed());
}

#[tokio::test]
async fn copies_and_snapshots_without_an_object_are_named() {
    let mut world = World::new().await;
    let own = pool().child("own").unwrap();
    let take = async |short: &str| zfs_snapshot(&world.zfs, &own, short).await;
    for short in ["daily", "portolan-2", &format!("snapshot-{UUID}"), &format!("clone-pvc-{UUID}"), "snapshot-mine"] {
        take(short).await;
    }
    world.zfs.hold(&own.snapshot("portolan-2").unwrap(), "me").await.unwrap();
    let spec = PortableSnapshotSpec { volume: "own".into(), ..PortableSnapshotSpec::default() };
    world.api.known.snapshots = vec![PortableSnapshot::new(&format!("clone-pvc-{UUID}"), spec)];
    world.api.known.volumes.extend([volume("theirs", "b"), volume("moved", "b")]);
    let marks = |epoch: &'static str, uid: &'static str| [(EPOCH_PROPERTY, epoch), (UID_PROPERTY, uid)];
    dataset(&world.zfs, "theirs", &marks("3", "uid-theirs")).await;
    dataset(&world.zfs, "moved-by-hand", &marks("1", "uid-moved")).await;
    // Being received or restored: it has no mark yet.
    world.api.known.volumes.push(volume("coming", "b"));
    dataset(&world.zfs, "coming", &[]).await;
    let found = world.look().await.unwrap();
    let snapshot = format!("tank/portolan/own@snapshot-{UUID}");
    let wanted = [
        ("tank/portolan/moved-by-hand", "Renamed"),
        ("tank/portolan/theirs", "NotListed"),
        ("tank/portolan/own@portolan-2", "Held"),
        (snapshot.as_str(), "SnapshotGone"),
    ];
    assert_eq!(reasons(&found), wanted);
    assert_eq!(found.foreign, 0);
    assert!(found.items[1].message.contains("NEWER"), "{}", found.items[1].message);
    assert!(!world.destroyed());
}

async fn zfs_snapshot(zfs: &Memory, dataset: &DatasetName, short: &str) {
    zfs.snapshot(&dataset.snapshot(short).unwrap()).await.unwrap();
}

#[tokio::test]
async fn only_empty_directories_are_removed() {
    let world = World::new().await;
    let at = |name: &str| world.root.path().join("volumes").join(name);
    for name in ["own", "empty", "full"] {
        std::fs::create_dir_all(at(name)).unwrap();
    }
    std::fs::write(at("full").join("file"), "dear").unwrap();
    let found = world.look().await.unwrap();
    assert_eq!(reasons(&found), [("/volumes/full", "FilesLeft")]);
    assert_eq!((at("own").exists(), at("empty").exists(), at("full").join("file").exists()), (true, false, true));
}

#[tokio::test]
async fn a_mount_of_a_volume_that_is_elsewhere_is_named() {
    let world = World::new().await;
    let mut known = world.api.known.clone();
    let mut disk = Disk { mounts: Vec::new(), datasets: Vec::new(), directories: Vec::new() };
    disk.datasets.push((world.zfs.dataset(&pool().child("own").unwrap()).await.unwrap(), Vec::new()));
    let target = "/var/lib/kubelet/pods/1".into();
    let (root, kind, number) = ("/".into(), "zfs".into(), DeviceNumber { major: 0, minor: 50 });
    disk.mounts.push(Mount { target, source: "tank/portolan/own".into(), readonly: false, kind, root, number });
    assert_eq!(judge("a", &pool(), &disk, &known).orphans, []);
    let moved = known.volumes[0].status.as_mut().unwrap();
    moved.owner = Some("b".into());
    let found = judge("a", &pool(), &disk, &known).orphans;
    assert_eq!(found[0].reason, "Mounted");
    assert!(found[0].message.contains("umount /var/lib/kubelet/pods/1") && found[0].message.contains("node b"));
    // A complete copy of what nobody writes is there to be read.
    let mut shared = known.clone();
    shared.volumes[0].spec.read_only = true;
    let copy = |snapshot: &str| Replica { node: "a".into(), snapshot: Some(snapshot.into()), guid: Some("7".into()) };
    shared.volumes[0].status.as_mut().unwrap().replicas = vec![copy("daily")];
    assert_eq!(judge("a", &pool(), &disk, &shared).orphans[0].reason, "Mounted", "it is not complete");
    shared.volumes[0].status.as_mut().unwrap().replicas = vec![copy("portolan-2")];
    assert_eq!(judge("a", &pool(), &disk, &shared).orphans, []);
    // On its way: the agent's to unmount.
    let handoff = Handoff { from: "a".into(), to: "b".into(), ..Handoff::default() };
    known.volumes[0].status.as_mut().unwrap().handoff = Some(handoff);
    assert_eq!(judge("a", &pool(), &disk, &known).orphans, []);
}

#[test]
fn no_more_are_named_than_fit() {
    let orphans = (0..30).map(|n| Orphan { name: format!("{n:02}"), bytes: Some(n), ..Orphan::default() }).collect();
    let summed = summed(orphans, 0);
    assert_eq!((summed.count, summed.bytes, summed.items.len(), summed.items[0].name.as_str()), (30, 435, 20, "29"));
}
