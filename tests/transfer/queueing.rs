//! Who is served when not all can be: over real TLS, between real pools where what arrives matters.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use portolan_csi::transfer::{Class, Fetch, Fetching, Identity, Limits, Next, TransferError, Turns, Waits, fetch};
use portolan_tests::contract::{Node, create, noise, write_and_snapshot};
use portolan_zfs::memory::Memory;
use portolan_zfs::{Capabilities, Snapshot, Zfs};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::client::TlsStream;

use super::broken::request_of;
use super::rogue::{Lie, Rogue, asked, forget};
use super::setup::{self, Authority, Server, fetching};
use super::{memory, source};

const ONE: Limits = Limits {
    handshake: Duration::from_secs(10),
    idle: Duration::from_secs(60),
    silent: Duration::from_secs(60),
    streams: 1,
    connections: 64,
};
const PATIENCE: Duration = Duration::from_secs(30);

/// Takes a place at the source and keeps it: it takes nothing of what comes.
async fn occupy(identity: &Identity, server: &Server, snapshot: &Snapshot) -> TlsStream<TcpStream> {
    let (reply, stream) = asked(identity, server.address, "node-a", &request_of(snapshot)).await;
    assert_eq!(reply["ok"], true, "{reply}");
    stream
}

/// A transfer on a task of its own.
struct Waiter {
    told: Arc<Mutex<Vec<Waits>>>,
    task: JoinHandle<Result<(), TransferError>>,
}

impl Waiter {
    /// Its name is put into `turns` when its turn has come.
    fn start(identity: &Identity, zfs: &(impl Zfs + Clone), what: Fetch, turns: &Arc<Mutex<Vec<String>>>) -> Self {
        let told = Arc::new(Mutex::new(Vec::new()));
        let (identity, zfs, turns, tell) = (identity.clone(), zfs.clone(), turns.clone(), told.clone());
        let task = tokio::spawn(async move {
            let name = what.request.volume.clone();
            let mut fetching = Fetching::new(&identity, &zfs, ONE, what);
            loop {
                match fetching.next(|now| tell.lock().unwrap().push(now)).await? {
                    Next::Done(_) => return Ok(()),
                    Next::Stream(offer) => {
                        turns.lock().unwrap().push(name.clone());
                        fetching.receive(offer, |_| {}).await?;
                    }
                }
            }
        });
        Self { told, task }
    }

    /// Returns when so many are said to go before it.
    async fn told(&self, at_source: bool, before: usize) {
        let (begin, wanted) = (Instant::now(), Waits { at_source, before });
        while self.told.lock().unwrap().last() != Some(&wanted) {
            assert!(!self.task.is_finished(), "it doesn't wait");
            assert!(begin.elapsed() < PATIENCE, "{wanted:?}: {:?}", self.told.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn what_a_pod_waits_for_goes_first_and_equals_in_the_order_of_their_coming() {
    let (a, b, ca) = (setup::real(), setup::real(), Authority::new());
    let server = Server::start_with(&ca.identity("node-a"), &a, "node-b", ONE).await;
    let identity = ca.identity("node-b");
    let long = create(&a, "pvc-long").await;
    let long = write_and_snapshot(&a, &long, &noise(24 << 20), "portolan-1").await;
    let holder = occupy(&identity, &server, &long).await;
    let (turns, mut waiters, mut snapshots) = (Arc::default(), Vec::new(), Vec::new());
    for (name, class, before) in
        [("pvc-1", Class::Background, 0), ("pvc-2", Class::Background, 1), ("pvc-awaited", Class::Final, 0)]
    {
        let volume = create(&a, name).await;
        let snapshot = write_and_snapshot(&a, &volume, name.as_bytes(), "portolan-1").await;
        let mut what = fetching(server.address, "node-a", &snapshot, &b);
        what.class = class;
        what.properties = vec![portolan_zfs::Property::canmount_noauto(), b.mountpoint(name)];
        let waiter = Waiter::start(&identity, b.zfs(), what, &turns);
        waiter.told(true, before).await;
        waiters.push(waiter);
        snapshots.push(snapshot);
    }
    waiters[0].told(true, 1).await;
    waiters[1].told(true, 2).await;
    assert!(b.zfs().children(&b.pool()).await.unwrap().is_empty(), "nothing is made while it waits");
    drop(holder);
    for waiter in waiters {
        waiter.task.await.unwrap().unwrap();
    }
    assert_eq!(*turns.lock().unwrap(), ["pvc-awaited", "pvc-1", "pvc-2"]);
    for snapshot in snapshots {
        let copy = b.pool().child(snapshot.name.dataset().short()).unwrap();
        assert_eq!(b.zfs().snapshots(&copy).await.unwrap()[0].guid, snapshot.guid);
        b.zfs().mount(&copy).await.unwrap();
        assert_eq!(b.read(&copy), copy.short().as_bytes());
    }
}

/// With two places the second is kept for finals: none of them waits for a long background transfer to end.
#[tokio::test]
async fn a_final_doesnt_wait_for_the_end_of_what_nobody_waits_for() {
    let (a, ca) = (memory(), Authority::new());
    let limits = Limits { streams: 2, ..ONE };
    let server = Server::start_with(&ca.identity("node-a"), &a, "node-b", limits).await;
    let identity = ca.identity("node-b");
    let long = create(&a, "pvc-long").await;
    let long = write_and_snapshot(&a, &long, &noise(64 << 20), "portolan-1").await;
    let _holder = occupy(&identity, &server, &long).await;
    let (other, awaited) = (memory(), memory());
    let one = source(&a).await;
    let turns = Arc::default();
    let waiter = Waiter::start(&identity, &other, fetching(server.address, "node-a", &one, &other), &turns);
    waiter.told(true, 0).await;
    let volume = create(&a, "pvc-awaited").await;
    let last = write_and_snapshot(&a, &volume, b"last", "portolan-1").await;
    let mut what = fetching(server.address, "node-a", &last, &awaited);
    what.class = Class::Final;
    let fetched = tokio::time::timeout(PATIENCE, fetch(&identity, &awaited, ONE, what, |_| {})).await;
    fetched.expect("it waits").unwrap();
    assert!(turns.lock().unwrap().is_empty() && !waiter.task.is_finished());
}

/// How urgent a transfer is at the source is what the source knows of it, not what the target thinks.
#[tokio::test]
async fn nobody_is_urgent_who_only_says_so() {
    let (a, ca) = (memory(), Authority::new());
    let one = source(&a).await;
    let server = Server::start_with(&ca.identity("node-a"), &a, "node-b", ONE).await;
    let identity = ca.identity("node-b");
    let long = create(&a, "pvc-long").await;
    let long = write_and_snapshot(&a, &long, &noise(64 << 20), "portolan-1").await;
    let _holder = occupy(&identity, &server, &long).await;
    let mut waiters = Vec::new();
    for (before, class) in [Class::Background, Class::Final, Class::Restore].into_iter().enumerate() {
        let b = memory();
        let mut what = fetching(server.address, "node-a", &one, &b);
        what.class = class;
        let waiter = Waiter::start(&identity, &b, what, &Arc::default());
        waiter.told(true, before).await;
        waiters.push(waiter);
    }
}

#[tokio::test]
async fn who_goes_away_or_dies_while_it_waits_leaves_no_gap() {
    let (a, b, ca) = (memory(), memory(), Authority::new());
    let server = Server::start_with(&ca.identity("node-a"), &a, "node-b", ONE).await;
    let identity = ca.identity("node-b");
    let long = create(&a, "pvc-long").await;
    let long = write_and_snapshot(&a, &long, &noise(64 << 20), "portolan-1").await;
    let holder = occupy(&identity, &server, &long).await;
    let one = source(&a).await;
    let what = fetching(server.address, "node-a", &one, &b);
    let turns = Arc::default();
    let (reply, dies) = asked(&identity, server.address, "node-a", &request_of(&one)).await;
    assert_eq!(reply["before"], 0, "{reply}");
    let cancelled = Waiter::start(&identity, &memory(), what.clone(), &turns);
    cancelled.told(true, 1).await;
    let stays = Waiter::start(&identity, &b, what, &turns);
    stays.told(true, 2).await;
    cancelled.task.abort();
    let gone = Instant::now();
    stays.told(true, 1).await;
    assert!(
        gone.elapsed() < Duration::from_secs(2),
        "its end is seen, not only that it takes nothing: {:?}",
        gone.elapsed()
    );
    // Its kernel says nothing by itself, but answers what the source tells it.
    forget(dies.get_ref().0);
    drop(dies);
    stays.told(true, 0).await;
    drop(holder);
    stays.task.await.unwrap().unwrap();
    assert_eq!(*turns.lock().unwrap(), ["pvc-1"]);
}

#[tokio::test]
async fn a_target_takes_so_many_at_a_time_and_asks_no_source_before() {
    let (a, b, ca) = (memory(), memory(), Authority::new());
    let one = source(&a).await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let (identity, receives) = (ca.identity("node-b"), Turns::new(1));
    let held = receives.enter(Class::Background);
    let mut what = fetching(server.address, "node-a", &one, &b);
    what.turns = receives.clone();
    let waiter = Waiter::start(&identity, &b, what, &Arc::default());
    waiter.told(false, 0).await;
    let first = receives.enter(Class::Final);
    waiter.told(false, 1).await;
    assert_eq!(server.asked(), 0);
    drop((held, first));
    waiter.task.await.unwrap().unwrap();
    assert_eq!(b.snapshots(&b.pool().child("pvc-1").unwrap()).await.unwrap()[0].guid, one.guid);
    let next = receives.enter(Class::Background);
    assert_eq!(next.before(), None, "its place is free again");
}

/// Nothing is held while it waits, so anything may have happened meanwhile: to the handoff, and to the target's dataset.
#[tokio::test]
async fn what_has_changed_meanwhile_is_seen() {
    let (a, ca) = (memory(), Authority::new());
    let server = Server::start_with(&ca.identity("node-a"), &a, "node-b", ONE).await;
    let identity = ca.identity("node-b");
    let long = create(&a, "pvc-long").await;
    let long = write_and_snapshot(&a, &long, &noise(64 << 20), "portolan-1").await;
    let one = source(&a).await;
    let waiting = async |b: &Memory| {
        let holder = occupy(&identity, &server, &long).await;
        let what = fetching(server.address, "node-a", &one, b);
        let waiter = Waiter::start(&identity, b, what, &Arc::default());
        waiter.told(true, 0).await;
        (holder, waiter)
    };
    let b = memory();
    let (holder, waiter) = waiting(&b).await;
    create(&b, "pvc-1").await;
    drop(holder);
    let error = waiter.task.await.unwrap().unwrap_err();
    assert!(matches!(error, TransferError::Changed { .. }) && error.is_retryable(), "{error}");
    assert!(b.snapshots(&b.pool().child("pvc-1").unwrap()).await.unwrap().is_empty());

    let (holder, waiter) = waiting(&memory()).await;
    server.closed.store(true, std::sync::atomic::Ordering::Relaxed);
    drop(holder);
    let error = waiter.task.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("the handoff has ended"), "{error}");
}

/// During an upgrade some agents are of the release before: whichever end they are, volumes go there.
#[tokio::test]
async fn agents_of_the_release_before_are_understood() {
    let (a, ca) = (memory().with_capabilities(Capabilities::all()), Authority::new());
    let (identity, one) = (ca.identity("node-b"), source(&a).await);
    let server = Server::start_with(&ca.identity("node-a"), &a, "node-b", ONE).await;
    let request = request_of(&one).replace(r#""version":2"#, r#""version":1"#);
    let (reply, _) = asked(&identity, server.address, "node-a", &request).await;
    assert_eq!(reply["ok"], true, "{reply}");
    let long = create(&a, "pvc-long").await;
    let long = write_and_snapshot(&a, &long, &noise(64 << 20), "portolan-1").await;
    let _holder = occupy(&identity, &server, &long).await;
    let (reply, _) = asked(&identity, server.address, "node-a", &request).await;
    // It would take a word that it has to wait for an answer.
    assert_eq!((&reply["error"]["code"], &reply["before"]), (&"failed".into(), &serde_json::Value::Null), "{reply}");

    for lie in [Lie::FirstVersion, Lie::SecondVersion] {
        let b = memory().with_capabilities(Capabilities::all());
        let old = Rogue::start(&ca.identity("node-a"), &a, &one.name, lie).await;
        fetch(&identity, &b, ONE, fetching(old.address, "node-a", &one, &b), |_| {}).await.unwrap();
        assert_eq!(b.snapshots(&b.pool().child("pvc-1").unwrap()).await.unwrap()[0].guid, one.guid, "{lie:?}");
    }
}
