//! Connections that die without a word: a path that swallows everything, a peer whose kernel starts anew.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use portolan_csi::transfer::{Fetch, Identity, Limits, Pace, Received, SoFar, TransferError, fetch};
use portolan_net::Namespace;
use portolan_tests::contract::{create, noise, write_and_snapshot};
use portolan_zfs::{CommandLine, Snapshot};
use tempfile::TempDir;
use tokio::sync::watch;

use super::rogue::{Lie, Rogue, ask, asked, forget};
use super::setup::{self, Authority, Server, fetching};
use super::{Node, assert_nothing};

/// What TCP is told in these tests. The idle limit is out of the way: that it is TCP that gives up is what they are about.
const LIMITS: Limits = Limits {
    handshake: Duration::from_secs(10),
    idle: Duration::from_secs(120),
    silent: Duration::from_secs(3),
    streams: 1,
    connections: 64,
};
/// When both ends must have given up: what they were told, and what a timer of the kernel and a busy machine add.
const BOUND: Duration = Duration::from_secs(3 + 5);

/// Two nodes as network namespaces, joined by a veth pair.
struct Link(TempDir);

impl Link {
    fn new() -> Self {
        let link = Self(tempfile::tempdir().unwrap());
        for node in ["a", "b"] {
            std::fs::write(link.file(node), "").unwrap();
            let file = format!("--net={}", link.file(node).display());
            run("unshare", &[&file, "ip", "link", "set", "lo", "up"]);
        }
        let b = link.file("b").display().to_string();
        link.ip("a", &["link", "add", "u0", "type", "veth", "peer", "name", "u0", "netns", &b]);
        for (node, address, _) in SIDES {
            link.ip(node, &["address", "add", &format!("{address}/24"), "dev", "u0"]);
            link.ip(node, &["link", "set", "u0", "up"]);
        }
        link
    }

    fn file(&self, node: &str) -> PathBuf {
        self.0.path().join(node)
    }

    fn ip(&self, node: &str, words: &[&str]) {
        let file = format!("--net={}", self.file(node).display());
        run("nsenter", &[&[&file, "ip"], words].concat());
    }

    /// Lets all that either node sends go to a station that isn't there: nobody is told.
    fn cut(&self) {
        for (node, _, peer) in SIDES {
            let nobody = ["neighbour", "replace", peer, "lladdr", "02:00:00:00:00:99", "dev", "u0", "nud", "permanent"];
            self.ip(node, &nobody);
        }
    }

    fn mend(&self) {
        for (node, _, peer) in SIDES {
            self.ip(node, &["neighbour", "del", peer, "dev", "u0"]);
        }
    }
}

const SIDES: [(&str, &str, &str); 2] = [("a", "192.0.2.1", "192.0.2.2"), ("b", "192.0.2.2", "192.0.2.1")];

impl Drop for Link {
    fn drop(&mut self) {
        for node in ["a", "b"] {
            let _ = Command::new("umount").arg("-l").arg(self.file(node)).status();
        }
    }
}

fn run(program: &str, words: &[&str]) {
    let output = Command::new(program).args(words).output().unwrap();
    assert!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Does something on a thread and a runtime of its own in a node's namespace: its sockets are opened there.
async fn at<T: Send + 'static, F: Future<Output = T>>(
    namespace: PathBuf,
    work: impl FnOnce() -> F + Send + 'static,
) -> T {
    let inside = move || {
        Namespace::open(Path::new("/"), &namespace).unwrap().run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok::<T, io::Error>(runtime.block_on(work()))
        })
    };
    tokio::task::spawn_blocking(inside).await.unwrap().unwrap()
}

async fn fetch_at(
    namespace: PathBuf,
    identity: Identity,
    zfs: CommandLine,
    what: Fetch,
    begun: mpsc::Sender<()>,
) -> Result<Received, TransferError> {
    let tell = move |now: SoFar| {
        if now.bytes > 3 << 20 {
            let _ = begun.send(());
        }
    };
    at(namespace, move || async move { fetch(&identity, &zfs, LIMITS, what, tell).await }).await
}

/// What a target asks for, in the protocol's words.
pub fn request_of(snapshot: &Snapshot) -> String {
    let (volume, short, guid) = (snapshot.name.dataset().short(), snapshot.name.short(), snapshot.guid.0);
    format!(r#"{{"version":2,"volume":"{volume}","epoch":2,"snapshot":"{short}","guid":"{guid}"}}"#)
}

/// Until the server gives its only place to another; how long that took.
async fn freed(mut asks: impl AsyncFnMut() -> serde_json::Value) -> Duration {
    let begin = Instant::now();
    while asks().await["ok"] != true {
        assert!(begin.elapsed() < BOUND, "the source still sends to nobody");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    begin.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_swallows_everything_ends_both_sides_in_time() {
    let (link, ca) = (Link::new(), Authority::new());
    let (a, b) = (setup::real(), setup::real());
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, &noise(24 << 20), "portolan-1").await;
    let listener = at(link.file("a"), || async {
        let listener = std::net::TcpListener::bind(("192.0.2.1", 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    });
    let listener = tokio::net::TcpListener::from_std(listener.await).unwrap();
    let server = Server::start_at(listener, &ca.identity("node-a"), &a, "node-b", LIMITS);

    // The machine may be busy: the link is to be cut long before the end.
    let (limit, follows) = watch::channel(Some(1 << 20));
    let mut what = fetching(server.address, "node-a", &one, &b);
    what.pace = Pace::following(follows);
    let (sender, begun) = mpsc::channel();
    let fetching = tokio::spawn(fetch_at(link.file("b"), ca.identity("node-b"), b.zfs().clone(), what.clone(), sender));
    tokio::task::spawn_blocking(move || begun.recv_timeout(Duration::from_secs(60)).unwrap()).await.unwrap();
    link.cut();
    let cut = Instant::now();
    // What has come is taken at once, so that the target has nothing left to do but wait.
    limit.send_replace(None);

    let (identity, request, address) = (ca.identity("node-b"), request_of(&one), server.address);
    let freed = freed(async || {
        let (identity, request) = (identity.clone(), request.clone());
        at(link.file("a"), move || async move { ask(&identity, address, "node-a", &request).await }).await
    });
    let (freed, ended) = tokio::join!(freed, async { (fetching.await.unwrap(), cut.elapsed()) });
    let (error, gave_up) = (ended.0.unwrap_err(), ended.1);
    assert!(matches!(error, TransferError::Idle { .. } | TransferError::Connection { .. }), "{error}");
    assert!(error.is_retryable() && error.to_string().contains("node-a"), "{error}");
    assert!(gave_up < BOUND, "the target waited {gave_up:?} for nothing");
    assert!(freed > Duration::from_secs(1), "the cut was none: {freed:?}");
    assert_nothing(&b, "pvc-1").await;

    link.mend();
    let received = fetch_at(link.file("b"), identity, b.zfs().clone(), what.clone(), mpsc::channel().0).await.unwrap();
    assert_eq!(received.snapshot.guid, one.guid);
}

#[tokio::test]
async fn a_source_whose_kernel_starts_anew_is_given_up() {
    let (a, b, ca) = (setup::real(), setup::real(), Authority::new());
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, &noise(4 << 20), "portolan-1").await;
    let rogue = Rogue::start(&ca.identity("node-a"), a.zfs(), &one.name, Lie::Forgets).await;
    let (what, begin) = (fetching(rogue.address, "node-a", &one, &b), Instant::now());
    let error = fetch(&ca.identity("node-b"), b.zfs(), LIMITS, what, |_| {}).await.unwrap_err();
    assert!(begin.elapsed() < BOUND, "{:?}: {error}", begin.elapsed());
    assert!(matches!(error, TransferError::Connection { .. }) && error.is_retryable(), "{error}");
    assert_nothing(&b, "pvc-1").await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let what = fetching(server.address, "node-a", &one, &b);
    fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), what, |_| {}).await.unwrap();
}

#[tokio::test]
async fn a_target_whose_kernel_starts_anew_leaves_its_place() {
    let (a, ca) = (setup::real(), Authority::new());
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, &noise(24 << 20), "portolan-1").await;
    let server = Server::start_with(&ca.identity("node-a"), &a, "node-b", LIMITS).await;
    let (identity, request) = (ca.identity("node-b"), request_of(&one));
    let (reply, stream) = asked(&identity, server.address, "node-a", &request).await;
    assert_eq!(reply["ok"], true, "{reply}");
    let waits = ask(&identity, server.address, "node-a", &request).await;
    assert_eq!(waits["before"], 0, "the source sends, to us: {waits}");
    forget(stream.get_ref().0);
    drop(stream);
    freed(async || ask(&identity, server.address, "node-a", &request).await).await;
}
