//! What each implementation of `Zfs` must do, whatever it stands on.

mod copies;
mod sealed;
mod streams;
mod volumes;

use portolan_zfs::memory::Memory;
use portolan_zfs::{
    DatasetName, ErrorKind, Property, ReceiveOptions, SendOptions, SendStream, Snapshot, Zfs, ZfsError,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A node under test: its ZFS, and what a pod would do to its volumes.
pub trait Node {
    /// The implementation.
    type Zfs: Zfs;
    /// Its ZFS.
    fn zfs(&self) -> &Self::Zfs;
    /// Its pool.
    fn pool(&self) -> DatasetName;
    /// The property that says where a volume is mounted.
    fn mountpoint(&self, volume: &str) -> Property;
    /// Writes a mounted volume's content.
    fn write(&self, dataset: &DatasetName, content: &[u8]);
    /// Reads it.
    fn read(&self, dataset: &DatasetName) -> Vec<u8>;
    /// Writes to the beginning of a volume's block device.
    fn write_device(&self, volume: &DatasetName, content: &[u8]);
    /// Reads that much from its beginning.
    fn read_device(&self, volume: &DatasetName, length: usize) -> Vec<u8>;
    /// Opens a file in it, or closes that.
    fn set_open(&self, dataset: &DatasetName, open: bool);
}

impl Node for Memory {
    type Zfs = Self;

    fn zfs(&self) -> &Self {
        self
    }

    fn pool(&self) -> DatasetName {
        DatasetName::new("tank").unwrap()
    }

    fn mountpoint(&self, volume: &str) -> Property {
        Property::new("mountpoint", format!("/mnt/{volume}")).unwrap()
    }

    fn write(&self, dataset: &DatasetName, content: &[u8]) {
        Memory::write(self, dataset, content).unwrap();
    }

    fn read(&self, dataset: &DatasetName) -> Vec<u8> {
        Memory::read(self, dataset).unwrap()
    }

    fn write_device(&self, volume: &DatasetName, content: &[u8]) {
        Memory::write(self, volume, content).unwrap();
    }

    fn read_device(&self, volume: &DatasetName, length: usize) -> Vec<u8> {
        let mut content = Memory::read(self, volume).unwrap();
        content.truncate(length);
        content
    }

    fn set_open(&self, dataset: &DatasetName, open: bool) {
        Memory::set_open(self, dataset, open).unwrap();
    }
}

/// The whole contract, on two nodes.
pub async fn holds(a: &impl Node, b: &impl Node) {
    names_and_properties(a).await;
    mounting(a).await;
    snapshots_and_holds(a).await;
    unchanged(a).await;
    destroying(a).await;
    copies::clones(a).await;
    copies::deferred(a).await;
    copies::several_at_once(a).await;
    volumes::block_devices(a, b).await;
    full_and_incremental(a, b).await;
    streams_that_must_not_count(a, b).await;
    streams::resumed(a, b).await;
    streams::from_bookmarks(a, b).await;
    streams::compressed_and_estimated(a, b).await;
    sealed::keys_are_asked_for(a).await;
    sealed::raw_streams(a, b).await;
    pools(a, b).await;
}

pub(crate) fn kind<T>(result: Result<T, ZfsError>) -> ErrorKind {
    result.err().expect("must fail").kind
}

/// Makes a volume as the agent does.
pub async fn create(node: &impl Node, volume: &str) -> DatasetName {
    let name = node.pool().child(volume).unwrap();
    let properties = [
        Property::canmount_noauto(),
        node.mountpoint(volume),
        Property::refquota(64 << 20),
        Property::new("portolan:volume", volume).unwrap(),
    ];
    node.zfs().create_filesystem(&name, &properties, None).await.unwrap();
    name
}

/// Mounts it, writes it, unmounts it and takes a snapshot.
pub async fn write_and_snapshot(node: &impl Node, volume: &DatasetName, content: &[u8], snapshot: &str) -> Snapshot {
    node.zfs().mount(volume).await.unwrap();
    node.write(volume, content);
    node.zfs().unmount(volume).await.unwrap();
    node.zfs().snapshot(&volume.snapshot(snapshot).unwrap()).await.unwrap()
}

/// The bytes of a stream.
pub async fn stream(node: &impl Node, snapshot: &Snapshot, base: Option<&Snapshot>) -> Vec<u8> {
    let options = SendOptions::since(base.map(|base| &base.name));
    drained(node.zfs().send(&snapshot.name, &options).await.unwrap()).await
}

pub(crate) async fn drained(mut stream: SendStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    stream.finish().await.unwrap();
    bytes
}

/// Most of a stream of a volume of 4 MiB.
pub async fn truncated_stream(node: &impl Node) -> Vec<u8> {
    let volume = create(node, "truncated").await;
    let snapshot = write_and_snapshot(node, &volume, &noise(4 << 20), "s").await;
    let mut bytes = stream(node, &snapshot, None).await;
    bytes.truncate(bytes.len() - 1);
    bytes
}

/// Receives bytes as the stream of a replica.
async fn receive(node: &impl Node, target: &DatasetName, bytes: &[u8]) -> Result<(), ZfsError> {
    let properties = [Property::canmount_noauto(), node.mountpoint(target.short()), Property::readonly(true)];
    receive_with(node, target, bytes, &ReceiveOptions::with(&properties)).await
}

/// Receives bytes as these options say.
///
/// # Errors
/// As ZFS says.
pub async fn receive_with(
    node: &impl Node,
    target: &DatasetName,
    bytes: &[u8],
    options: &ReceiveOptions,
) -> Result<(), ZfsError> {
    let mut receive = node.zfs().receive(target, options).await?;
    // What refuses the stream at once closes the pipe; why, it says at the end.
    let _ = receive.write_all(bytes).await;
    receive.finish().await
}

/// Bytes that don't compress.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| next()).collect()
}

async fn names_and_properties(node: &impl Node) {
    let (zfs, pool) = (node.zfs(), node.pool());
    let missing = pool.child("missing").unwrap();
    assert_eq!(kind(zfs.dataset(&missing).await), ErrorKind::NotFound);
    assert_eq!(kind(zfs.snapshots(&missing).await), ErrorKind::NotFound);
    assert_eq!(kind(zfs.children(&missing).await), ErrorKind::NotFound);
    assert_eq!(kind(zfs.destroy_with_snapshots(&missing).await), ErrorKind::NotFound);
    assert_eq!(kind(zfs.create_filesystem(&missing.child("x").unwrap(), &[], None).await), ErrorKind::NotFound);
    let elsewhere = DatasetName::new("nopool/v").unwrap();
    assert_eq!(kind(zfs.dataset(&elsewhere).await), ErrorKind::PoolUnavailable);
    assert_eq!(kind(zfs.create_filesystem(&elsewhere, &[], None).await), ErrorKind::PoolUnavailable);

    let volume = create(node, "named").await;
    assert_eq!(kind(zfs.create_filesystem(&volume, &[], None).await), ErrorKind::AlreadyExists);
    let found = zfs.dataset(&volume).await.unwrap();
    assert_eq!(
        (found.name.clone(), found.refquota, found.readonly, found.mounted),
        (volume.clone(), Some(64 << 20), false, false)
    );
    assert_eq!(found.mountpoint.as_deref(), Some(std::path::Path::new(node.mountpoint("named").value())));
    assert_eq!(found.user.get("portolan:volume").map(String::as_str), Some("named"));
    assert_ne!(found.guid.0, 0);
    assert!(found.available > 0 && found.available <= 64 << 20, "{}", found.available);

    zfs.set_property(&volume, &Property::new("portolan:epoch", "7").unwrap()).await.unwrap();
    zfs.set_property(&volume, &Property::new("portolan:epoch", "7").unwrap()).await.unwrap();
    zfs.set_readonly(&volume, true).await.unwrap();
    zfs.create_filesystem(&volume.child("kid").unwrap(), &[Property::canmount_noauto()], None).await.unwrap();
    let children = zfs.children(&pool).await.unwrap();
    assert_eq!(children.iter().map(|child| child.name.short()).collect::<Vec<_>>(), ["named"]);
    assert!(children[0].readonly);
    assert_eq!(children[0].user.get("portolan:epoch").map(String::as_str), Some("7"));
    let below = zfs.children(&volume).await.unwrap();
    assert_eq!(below.len(), 1);
    assert!(!below[0].user.contains_key("portolan:epoch"), "inherited properties are not its own");

    let snapshot = zfs.snapshot(&volume.snapshot("s").unwrap()).await.unwrap();
    assert_eq!(kind(zfs.destroy_with_snapshots(&volume).await), ErrorKind::Other, "there is a dataset below it");
    assert_eq!(zfs.snapshots(&volume).await.unwrap(), std::slice::from_ref(&snapshot), "a refused destroy leaves all");
    zfs.destroy_dataset(&volume.child("kid").unwrap()).await.unwrap();
    zfs.destroy_snapshot(&snapshot.name).await.unwrap();
    let renamed = pool.child("renamed").unwrap();
    zfs.rename(&volume, &renamed).await.unwrap();
    assert_eq!(kind(zfs.dataset(&volume).await), ErrorKind::NotFound);
    assert_eq!(zfs.dataset(&renamed).await.unwrap().guid, found.guid);
    zfs.destroy_dataset(&renamed).await.unwrap();
}

async fn pools(a: &impl Node, b: &impl Node) {
    let guid = a.zfs().pool_guid(&a.pool()).await.unwrap();
    assert_eq!(a.zfs().pool_guid(&a.pool().child("x").unwrap()).await.unwrap(), guid);
    assert_ne!(b.zfs().pool_guid(&b.pool()).await.unwrap(), guid);
    assert!(a.zfs().pool_status(&a.pool()).await.unwrap().contains("ONLINE"));
    let elsewhere = DatasetName::new("nopool").unwrap();
    assert_eq!(kind(a.zfs().pool_guid(&elsewhere).await), ErrorKind::PoolUnavailable);
    assert_eq!(kind(a.zfs().pool_status(&elsewhere).await), ErrorKind::PoolUnavailable);
}

async fn mounting(node: &impl Node) {
    let zfs = node.zfs();
    let volume = create(node, "mounted").await;
    zfs.unmount(&volume).await.unwrap();
    zfs.mount(&volume).await.unwrap();
    zfs.mount(&volume).await.unwrap();
    assert!(zfs.is_mounted(&volume).await.unwrap());
    node.write(&volume, b"one");
    node.set_open(&volume, true);
    assert_eq!(kind(zfs.unmount(&volume).await), ErrorKind::Busy);
    assert_eq!(kind(zfs.destroy_dataset(&volume).await), ErrorKind::Busy);
    assert_eq!(kind(zfs.destroy_with_snapshots(&volume).await), ErrorKind::Busy);
    assert_eq!(node.read(&volume), b"one");
    node.set_open(&volume, false);
    assert_eq!(kind(zfs.destroy_dataset(&volume).await), ErrorKind::Busy, "a mounted dataset");
    zfs.unmount(&volume).await.unwrap();
    zfs.unmount(&volume).await.unwrap();
    assert!(!zfs.is_mounted(&volume).await.unwrap());
    zfs.destroy_dataset(&volume).await.unwrap();
}

async fn snapshots_and_holds(node: &impl Node) {
    let zfs = node.zfs();
    let volume = create(node, "snapped").await;
    let mut taken = Vec::new();
    for name in ["z", "a", "m"] {
        taken.push(zfs.snapshot(&volume.snapshot(name).unwrap()).await.unwrap());
    }
    assert_eq!(zfs.snapshots(&volume).await.unwrap(), taken, "in the order of their making");
    assert!(taken[0].guid != taken[1].guid && taken[1].guid != taken[2].guid);
    let (z, newest) = (volume.snapshot("z").unwrap(), volume.snapshot("m").unwrap());
    assert_eq!(kind(zfs.snapshot(&z).await), ErrorKind::AlreadyExists);
    assert_eq!(kind(zfs.destroy_snapshot(&volume.snapshot("none").unwrap()).await), ErrorKind::NotFound);
    zfs.hold(&newest, "portolan").await.unwrap();
    zfs.hold(&newest, "portolan").await.unwrap();
    assert_eq!(zfs.snapshots(&volume).await.unwrap()[2].holds, 1);
    assert_eq!(kind(zfs.destroy_snapshot(&newest).await), ErrorKind::Busy);
    assert_eq!(kind(zfs.destroy_with_snapshots(&volume).await), ErrorKind::Busy);
    assert_eq!(zfs.snapshots(&volume).await.unwrap().len(), 3, "a refused destroy leaves all");
    zfs.release(&newest, "portolan").await.unwrap();
    zfs.release(&newest, "portolan").await.unwrap();
    zfs.destroy_snapshot(&z).await.unwrap();
    assert_eq!(zfs.snapshots(&volume).await.unwrap(), taken[1..]);
    zfs.destroy_with_snapshots(&volume).await.unwrap();
}

/// The newest snapshot has no byte for itself as long as its dataset is as it was, whatever is set on that.
async fn unchanged(node: &impl Node) {
    let volume = create(node, "unchanged").await;
    let used = async || node.zfs().snapshots(&volume).await.unwrap().last().unwrap().used;
    write_and_snapshot(node, &volume, b"one", "s1").await;
    assert_eq!(used().await, 0);
    node.zfs().set_readonly(&volume, true).await.unwrap();
    node.zfs().set_property(&volume, &Property::new("portolan:epoch", "7").unwrap()).await.unwrap();
    node.zfs().set_readonly(&volume, false).await.unwrap();
    assert_eq!(used().await, 0);
    node.zfs().mount(&volume).await.unwrap();
    node.write(&volume, b"two");
    node.zfs().unmount(&volume).await.unwrap();
    assert!(used().await > 0);
    write_and_snapshot(node, &volume, b"two", "s2").await;
    assert_eq!(used().await, 0);
    node.zfs().destroy_with_snapshots(&volume).await.unwrap();
}

async fn destroying(node: &impl Node) {
    let zfs = node.zfs();
    let volume = create(node, "doomed").await;
    write_and_snapshot(node, &volume, b"data", "s").await;
    assert_eq!(kind(zfs.destroy_dataset(&volume).await), ErrorKind::Other, "it has a snapshot");
    zfs.mount(&volume).await.unwrap();
    zfs.destroy_with_snapshots(&volume).await.unwrap();
    assert_eq!(kind(zfs.destroy_with_snapshots(&volume).await), ErrorKind::NotFound);
}

async fn full_and_incremental(a: &impl Node, b: &impl Node) {
    let (source, target) = (create(a, "moving").await, b.pool().child("moved").unwrap());
    let one = write_and_snapshot(a, &source, b"first", "one").await;
    receive(b, &target, &stream(a, &one, None).await).await.unwrap();
    let copy = b.zfs().dataset(&target).await.unwrap();
    assert!(copy.readonly && !copy.mounted, "{copy:?}");
    assert_eq!(b.zfs().snapshots(&target).await.unwrap()[0].guid, one.guid);
    b.zfs().mount(&target).await.unwrap();
    assert_eq!(b.read(&target), b"first");
    b.zfs().unmount(&target).await.unwrap();

    let two = write_and_snapshot(a, &source, b"second", "two").await;
    receive(b, &target, &stream(a, &two, Some(&one)).await).await.unwrap();
    let guids: Vec<_> = b.zfs().snapshots(&target).await.unwrap().into_iter().map(|s| s.guid).collect();
    assert_eq!(guids, [one.guid, two.guid]);
    b.zfs().mount(&target).await.unwrap();
    assert_eq!(b.read(&target), b"second");
    b.zfs().destroy_with_snapshots(&target).await.unwrap();
    a.zfs().destroy_with_snapshots(&source).await.unwrap();
}

async fn streams_that_must_not_count(a: &impl Node, b: &impl Node) {
    let (source, target) = (create(a, "cut").await, b.pool().child("copy").unwrap());
    let one = write_and_snapshot(a, &source, &noise(300_000), "one").await;
    let full = stream(a, &one, None).await;
    let cut = |bytes: &[u8], at: usize| bytes[..at].to_vec();
    for at in [0, 100, full.len() / 2, full.len() - 1] {
        assert_eq!(kind(receive(b, &target, &cut(&full, at)).await), ErrorKind::BrokenStream, "cut at {at}");
        assert_eq!(kind(b.zfs().dataset(&target).await), ErrorKind::NotFound, "cut at {at}");
    }
    receive(b, &target, &full).await.unwrap();
    assert_eq!(kind(receive(b, &target, &full).await), ErrorKind::AlreadyExists);

    let two = write_and_snapshot(a, &source, &noise(400_000), "two").await;
    let delta = stream(a, &two, Some(&one)).await;
    for at in [100, delta.len() / 2, delta.len() - 1] {
        assert_eq!(kind(receive(b, &target, &cut(&delta, at)).await), ErrorKind::BrokenStream, "cut at {at}");
        assert_eq!(b.zfs().snapshots(&target).await.unwrap().len(), 1, "cut at {at}");
    }
    let nowhere = b.pool().child("nowhere").unwrap();
    assert_eq!(kind(receive(b, &nowhere, &delta).await), ErrorKind::NotFound);

    // Written behind our back: not ours to roll back.
    b.zfs().set_readonly(&target, false).await.unwrap();
    b.zfs().mount(&target).await.unwrap();
    b.write(&target, b"mine");
    b.zfs().unmount(&target).await.unwrap();
    assert_eq!(kind(receive(b, &target, &delta).await), ErrorKind::Diverged);
    b.zfs().mount(&target).await.unwrap();
    assert_eq!(b.read(&target), b"mine");
    b.zfs().unmount(&target).await.unwrap();
    b.zfs().snapshot(&target.snapshot("own").unwrap()).await.unwrap();
    assert_eq!(kind(receive(b, &target, &delta).await), ErrorKind::Diverged);
    b.zfs().destroy_with_snapshots(&target).await.unwrap();
    a.zfs().destroy_with_snapshots(&source).await.unwrap();
}
