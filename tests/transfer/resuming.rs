//! Streams that go on where they were cut, and parts of streams that nobody goes on with.

use portolan_csi::transfer::{Limits, TransferError, fetch};
use portolan_tests::contract::{Node, create, noise, write_and_snapshot};
use portolan_zfs::memory::{Fault, Memory};
use portolan_zfs::{Capabilities, DatasetName, ErrorKind, Property, Snapshot, Zfs};

use super::broken::request_of;
use super::rogue::{Lie, Rogue, asked};
use super::setup::{Authority, Server, cut_after, fetching};
use super::{assert_nothing, memory};

const SIZE: usize = 4 << 20;

/// A node whose ZFS can go on with a stream.
fn able() -> Memory {
    memory().with_capabilities(Capabilities::all())
}

async fn part(node: &Memory, dataset: &DatasetName) -> Option<String> {
    node.dataset(dataset).await.unwrap().resume_token
}

async fn snapshots(node: &Memory, dataset: &DatasetName) -> Vec<u64> {
    node.snapshots(dataset).await.unwrap().iter().map(|snapshot| snapshot.guid.0).collect()
}

/// Two nodes, one with a volume, and the other with the first 60 % of its snapshot.
struct Cut {
    ca: Authority,
    a: Memory,
    b: Memory,
    server: Server,
    volume: DatasetName,
    one: Snapshot,
}

impl Cut {
    async fn new() -> Self {
        let (a, b, ca) = (able(), able(), Authority::new());
        let volume = create(&a, "pvc-1").await;
        let one = write_and_snapshot(&a, &volume, &noise(SIZE), "portolan-1").await;
        let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
        let cut = Self { ca, a, b, server, volume, one };
        cut.again(&cut.one).await;
        cut
    }

    /// Fetches a snapshot, and is cut at 60 %.
    async fn again(&self, snapshot: &Snapshot) {
        let through = cut_after(self.server.address, (SIZE * 6 / 10) as u64).await;
        let what = fetching(through, "node-a", snapshot, &self.b);
        let identity = self.ca.identity("node-b");
        let error = fetch(&identity, &self.b, Limits::default(), what, |_| {}).await.unwrap_err();
        assert!(matches!(error, TransferError::Truncated { .. } | TransferError::Connection { .. }), "{error}");
        assert!(part(&self.b, &self.volume).await.is_some(), "what came is kept");
    }

    /// How many bytes the rest of it takes, or all of it.
    async fn fetch(&self, snapshot: &Snapshot) -> usize {
        let mut what = fetching(self.server.address, "node-a", snapshot, &self.b);
        what.properties = vec![Property::canmount_noauto(), self.b.mountpoint("pvc-1"), Property::readonly(true)];
        let fetched = fetch(&self.ca.identity("node-b"), &self.b, Limits::default(), what, |_| {}).await.unwrap();
        assert_eq!((fetched.snapshot.guid, part(&self.b, &self.volume).await), (snapshot.guid, None));
        fetched.bytes as usize
    }
}

#[tokio::test]
async fn a_stream_that_was_cut_sends_only_the_rest() {
    let cut = Cut::new().await;
    assert!(snapshots(&cut.b, &cut.volume).await.is_empty(), "a part counts for nothing");
    let bytes = cut.fetch(&cut.one).await;
    assert!(bytes < SIZE * 6 / 10 && bytes > SIZE / 10, "{bytes} of {SIZE}");
    assert!(cut.b.read(&cut.volume).unwrap() == noise(SIZE));
    let copy = cut.b.dataset(&cut.volume).await.unwrap();
    assert!(copy.readonly && !copy.mounted);

    // A delta, cut twice: the second time it is the rest that is cut.
    let two = write_and_snapshot(&cut.a, &cut.volume, &noise(SIZE + 1), "portolan-2").await;
    cut.again(&two).await;
    assert_eq!(snapshots(&cut.b, &cut.volume).await, [cut.one.guid.0]);
    let first = part(&cut.b, &cut.volume).await;
    cut.a.inject("send_end", 1, Fault::Fail(ErrorKind::Other));
    let what = fetching(cut.server.address, "node-a", &two, &cut.b);
    let error = fetch(&cut.ca.identity("node-b"), &cut.b, Limits::default(), what, |_| {}).await.unwrap_err();
    assert!(matches!(error, TransferError::Truncated { .. }), "{error}");
    let second = part(&cut.b, &cut.volume).await;
    assert!(second.is_some() && second != first, "{second:?}");
    let bytes = cut.fetch(&two).await;
    assert!(bytes < SIZE / 5, "{bytes}");
    assert!(cut.b.read(&cut.volume).unwrap() == noise(SIZE + 1));
}

/// The volume was made anew meanwhile: what is there of the old one is no part of it.
#[tokio::test]
async fn a_part_of_another_stream_is_dropped_and_all_of_it_comes() {
    let cut = Cut::new().await;
    cut.a.destroy_with_snapshots(&cut.volume).await.unwrap();
    create(&cut.a, "pvc-1").await;
    let other = write_and_snapshot(&cut.a, &cut.volume, &noise(SIZE), "portolan-1").await;
    assert!(cut.fetch(&other).await > SIZE);

    // Of a delta the target's own snapshot stays, and stays the base.
    let two = write_and_snapshot(&cut.a, &cut.volume, &noise(SIZE), "portolan-2").await;
    cut.again(&two).await;
    cut.a.destroy_snapshot(&two.name).await.unwrap();
    let three = write_and_snapshot(&cut.a, &cut.volume, &noise(SIZE), "portolan-3").await;
    assert!(cut.fetch(&three).await > SIZE);
    assert_eq!(snapshots(&cut.b, &cut.volume).await, [other.guid.0, three.guid.0]);
}

/// ZFS sends whatever a token names, so the source looks at that first.
#[tokio::test]
async fn a_token_opens_nothing_that_isnt_granted() {
    let cut = Cut::new().await;
    let secret = create(&cut.a, "pvc-secret").await;
    let secret = write_and_snapshot(&cut.a, &secret, &noise(SIZE), "portolan-1").await;
    let answer = async |guid: u64| {
        let token = format!(r#","token":"1-{guid:x}-0-10-0"}}"#);
        let request = request_of(&cut.one).replace('}', &token);
        asked(&cut.ca.identity("node-b"), cut.server.address, "node-a", &request).await.0
    };
    let (other, own) = (answer(secret.guid.0).await, answer(cut.one.guid.0).await);
    assert_eq!((&other["ok"], &other["resumes"]), (&true.into(), &false.into()), "{other}");
    assert_eq!((&own["ok"], &own["resumes"]), (&true.into(), &true.into()), "{own}");
    assert_eq!(cut.a.calls().iter().filter(|call| call.starts_with("send_resume ")).count(), 1);
}

/// What was damaged is not built upon, nor what ZFS has refused: it may be that the pool is full.
#[tokio::test]
async fn only_what_was_cut_is_kept() {
    let (a, ca) = (able(), Authority::new());
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, &noise(SIZE), "portolan-1").await;
    for lie in [Lie::WrongHash, Lie::WrongLength, Lie::HugeFrame] {
        let (b, rogue) = (able(), Rogue::start(&ca.identity("node-a"), &a, &one.name, lie).await);
        let what = fetching(rogue.address, "node-a", &one, &b);
        fetch(&ca.identity("node-b"), &b, Limits::default(), what, |_| {}).await.unwrap_err();
        assert_nothing(&b, "pvc-1").await;
    }
    let (b, rogue) = (able(), Rogue::start(&ca.identity("node-a"), &a, &one.name, Lie::NoTrailer).await);
    let what = fetching(rogue.address, "node-a", &one, &b);
    fetch(&ca.identity("node-b"), &b, Limits::default(), what, |_| {}).await.unwrap_err();
    assert!(part(&b, &volume).await.is_some() && snapshots(&b, &volume).await.is_empty());
}

/// A rest that never comes further is not asked for for ever.
#[tokio::test]
async fn a_rest_that_brings_nothing_is_given_up() {
    let (a, b, ca) = (able(), able(), Authority::new());
    let volume = create(&a, "pvc-1").await;
    // The last frame is held back until the trailer has come: it is all that the rest has.
    let one = write_and_snapshot(&a, &volume, &noise((512 << 10) + 10), "portolan-1").await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let attempt = async || {
        a.inject("send_end", 1, Fault::Fail(ErrorKind::Other));
        let what = fetching(server.address, "node-a", &one, &b);
        fetch(&ca.identity("node-b"), &b, Limits::default(), what, |_| {}).await.unwrap_err()
    };
    attempt().await;
    assert!(part(&b, &volume).await.is_some());
    attempt().await;
    assert_nothing(&b, "pvc-1").await;
}
