//! Streams between two agents: over real TLS on loopback, between two real pools.

mod broken;
mod queueing;
mod resuming;
mod rogue;
mod setup;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use portolan_csi::transfer::{Limits, Pace, RefusalCode, SoFar, TransferError, fetch};
use portolan_zfs::memory::{Fault, Memory};
use portolan_zfs::{Capabilities, DatasetName, ErrorKind, Key, Property, Zfs};

use portolan_tests::contract::{Node, create, noise, write_and_snapshot};
use rogue::{Lie, Rogue, ask};
use setup::{Authority, SEALED, Server, cut_after, fetching};

fn memory() -> Memory {
    Memory::new(&DatasetName::new("tank").unwrap(), 1 << 30)
}

/// Nothing of the volume is on the target.
async fn assert_nothing(target: &impl Node, volume: &str) {
    let dataset = target.pool().child(volume).unwrap();
    assert_eq!(target.zfs().dataset(&dataset).await.unwrap_err().kind, ErrorKind::NotFound);
}

/// The whole way there, a delta after it, and the way back as a delta.
async fn there_and_back(a: &(impl Node<Zfs: Clone> + Sync), b: &(impl Node<Zfs: Clone> + Sync)) {
    let ca = Authority::new();
    let (at_a, at_b) = (ca.identity("node-a"), ca.identity("node-b"));
    let volume = create(a, "pvc-1").await;
    let data = noise(3 << 20);
    let one = write_and_snapshot(a, &volume, &data, "portolan-1").await;
    let server_a = Server::start(&at_a, a, "node-b").await;
    let server_b = Server::start(&at_b, b, "node-a").await;

    let progress = AtomicU64::new(0);
    let mut what = fetching(server_a.address, "node-a", &one, b);
    what.properties = vec![Property::canmount_noauto(), b.mountpoint("pvc-1"), Property::readonly(true)];
    let tell = |now: SoFar| progress.store(now.bytes, Ordering::Relaxed);
    let full = fetch(&at_b, b.zfs(), Limits::default(), what.clone(), tell).await.unwrap();
    assert_eq!((full.snapshot.guid, full.base.clone()), (one.guid, None));
    assert!(full.bytes > 3 << 20, "{}", full.bytes);
    assert_eq!(progress.load(Ordering::Relaxed), full.bytes);
    let copy = b.zfs().dataset(&what.target).await.unwrap();
    assert!(copy.readonly && !copy.mounted);

    let again = fetch(&at_b, b.zfs(), Limits::default(), what, |_| {}).await.unwrap();
    assert_eq!((again.bytes, again.snapshot.guid), (0, one.guid), "what is there is not sent again");

    // B becomes the owner, writes a little, and A takes it back.
    b.zfs().set_readonly(&volume, false).await.unwrap();
    b.zfs().mount(&volume).await.unwrap();
    assert_eq!(b.read(&volume), data);
    b.zfs().unmount(&volume).await.unwrap();
    a.zfs().set_readonly(&volume, true).await.unwrap();
    let two = write_and_snapshot(b, &volume, b"after", "portolan-2").await;
    let what = fetching(server_b.address, "node-b", &two, a);
    let delta = fetch(&at_a, a.zfs(), Limits::default(), what, |_| {}).await.unwrap();
    assert_eq!((delta.snapshot.guid, delta.base.unwrap().short()), (two.guid, "portolan-1"));
    assert!(delta.bytes < 200_000, "a delta of a few bytes took {}", delta.bytes);
    a.zfs().mount(&volume).await.unwrap();
    assert_eq!(a.read(&volume), b"after");
    a.zfs().unmount(&volume).await.unwrap();
}

#[tokio::test]
async fn a_volume_goes_there_and_comes_back_as_a_delta() {
    there_and_back(&setup::real(), &setup::real()).await;
}

#[tokio::test]
async fn a_volume_in_memory_goes_there_and_comes_back() {
    there_and_back(&memory(), &memory()).await;
}

/// Neither end has the key while it goes there, and comes back as a delta.
#[tokio::test]
async fn an_encrypted_volume_goes_sealed() {
    let (a, b) = (memory().with_capabilities(Capabilities::all()), memory().with_capabilities(Capabilities::all()));
    let (ca, key) = (Authority::new(), Key::passphrase("correct horse").unwrap());
    let (at_a, at_b) = (ca.identity("node-a"), ca.identity("node-b"));
    let volume = a.pool().child(SEALED).unwrap();
    let properties = vec![Property::canmount_noauto(), a.mountpoint(SEALED)];
    a.create_filesystem(&volume, &properties, Some(&key)).await.unwrap();
    let one = write_and_snapshot(&a, &volume, b"secret", "portolan-1").await;
    a.unload_key(&volume).await.unwrap();
    let (server_a, server_b) = (Server::start(&at_a, &a, "node-b").await, Server::start(&at_b, &b, "node-a").await);
    let mut what = fetching(server_a.address, "node-a", &one, &b);
    what.properties = properties.into_iter().chain([Property::readonly(true)]).collect();
    fetch(&at_b, &b, Limits::default(), what, |_| {}).await.unwrap();
    assert!(!b.dataset(&volume).await.unwrap().key_available);

    b.set_readonly(&volume, false).await.unwrap();
    b.load_key(&volume, &key).await.unwrap();
    let two = write_and_snapshot(&b, &volume, b"another", "portolan-2").await;
    b.unload_key(&volume).await.unwrap();
    let what = fetching(server_b.address, "node-b", &two, &a);
    let delta = fetch(&at_a, &a, Limits::default(), what, |_| {}).await.unwrap();
    assert_eq!(delta.base.unwrap().short(), "portolan-1");
    a.load_key(&volume, &key).await.unwrap();
    assert_eq!(a.read(&volume).unwrap(), b"another");
}

/// What a StorageNode says of a server with an IPv6 address is where the other agents find it.
#[tokio::test]
async fn nodes_without_ipv4_send_each_other_copies() {
    let ca = Authority::new();
    let (a, b) = (memory(), memory());
    let one = source(&a).await;
    let listener = tokio::net::TcpListener::bind("[::1]:0").await.unwrap();
    let server = Server::start_at(listener, &ca.identity("node-a"), &a, "node-b", Limits::default());
    let told = server.address.to_string();
    assert!(told.starts_with("[::1]:"), "{told}");
    let what = fetching(told.parse().unwrap(), "node-a", &one, &b);
    fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), what, |_| {}).await.unwrap();
}

#[tokio::test]
async fn strangers_are_refused() {
    let (ca, other) = (Authority::new(), Authority::new());
    let (a, b) = (memory(), memory());
    let one = source(&a).await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let what = fetching(server.address, "node-a", &one, &b);
    let try_as = async |identity| fetch(&identity, b.zfs(), Limits::default(), what.clone(), |_| {}).await;

    let error = try_as(other.identity("node-b")).await.unwrap_err();
    assert!(matches!(error, TransferError::Connection { .. }), "another authority: {error}");
    // The client trusts the server's authority, but its own certificate is from another: the server must be the one to refuse.
    let error = try_as(other.identity_trusting("node-b", &ca)).await.unwrap_err();
    assert!(matches!(error, TransferError::Connection { .. } | TransferError::Truncated { .. }), "{error}");
    assert_eq!(server.asked(), 0, "nobody without a certificate gets as far as asking");

    let error = try_as(ca.identity("node-c")).await.unwrap_err();
    assert!(
        matches!(&error, TransferError::Refused { refusal, .. } if refusal.code == RefusalCode::NotAuthorised),
        "{error}"
    );
    assert!(error.to_string().contains("node-c"), "{error}");
    assert!(!a.calls().iter().any(|call| call.starts_with("send ")), "nothing was sent");

    // A server with a good certificate, but another node's.
    let mut wrong = what.clone();
    wrong.node = "node-x".into();
    let error = fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), wrong, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("node-x"), "{error}");
    assert_eq!(server.asked(), 1, "a server that isn't the one we mean gets no request");
    assert_nothing(&b, "pvc-1").await;
    try_as(ca.identity("node-b")).await.unwrap();
}

#[tokio::test]
async fn a_certificate_that_names_no_node_is_no_identity() {
    let ca = Authority::new();
    let error = ca.try_identity("webhook", "node-a").unwrap_err();
    assert!(error.to_string().contains("node:<name>"), "{error}");
    // One with another node's DNS name, as a careless authority might issue: the common name must fit, too.
    let (a, b) = (memory(), memory());
    let one = source(&a).await;
    let server = Server::start(&ca.try_identity("node:node-z", "node-a").unwrap(), &a, "node-b").await;
    let what = fetching(server.address, "node-a", &one, &b);
    let error = fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), what, |_| {}).await.unwrap_err();
    assert!(matches!(error, TransferError::WrongPeer { .. }), "{error}");
    assert_eq!(server.asked(), 0);
}

#[tokio::test]
async fn a_cut_connection_leaves_nothing() {
    let (a, b, ca) = (setup::real(), setup::real(), Authority::new());
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, &noise(6 << 20), "portolan-1").await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    for bytes in [2_000, 100_000, 3 << 20, 6 << 20] {
        let address = cut_after(server.address, bytes).await;
        let what = fetching(address, "node-a", &one, &b);
        let error = fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), what, |_| {}).await.unwrap_err();
        let expected = matches!(error, TransferError::Truncated { .. } | TransferError::Connection { .. });
        assert!(expected && error.is_retryable(), "cut after {bytes}: {error}");
        assert_nothing(&b, "pvc-1").await;
    }
    let what = fetching(server.address, "node-a", &one, &b);
    fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), what, |_| {}).await.unwrap();
}

#[tokio::test]
async fn a_source_that_dies_in_the_middle_leaves_nothing() {
    let (a, b, ca) = (setup::real(), setup::real(), Authority::new());
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, &noise(24 << 20), "portolan-1").await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let what = fetching(server.address, "node-a", &one, &b);
    let kill = |SoFar { bytes, .. }: SoFar| {
        if bytes > 4 << 20 {
            a.node.signal("KILL");
        }
    };
    let error = fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), what, kill).await.unwrap_err();
    assert!(matches!(error, TransferError::Truncated { .. }), "{error}");
    assert_nothing(&b, "pvc-1").await;
}

#[tokio::test]
async fn a_fetch_that_was_dropped_can_be_begun_again_at_once() {
    let (a, b, ca) = (setup::real(), setup::real(), Authority::new());
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, &noise(16 << 20), "portolan-1").await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let (what, identity) = (fetching(server.address, "node-a", &one, &b), ca.identity("node-b"));
    let begun = tokio::sync::Notify::new();
    let tell = |SoFar { bytes, .. }: SoFar| {
        if bytes > 4 << 20 {
            begun.notify_one();
        }
    };
    let first = fetch(&identity, b.zfs(), Limits::default(), what.clone(), tell);
    tokio::select! {
        ended = first => panic!("too early: {ended:?}"),
        () = begun.notified() => {}
    }
    let begin = Instant::now();
    while let Err(error) = fetch(&identity, b.zfs(), Limits::default(), what.clone(), |_| {}).await {
        assert!(error.is_retryable(), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(60), "{error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(b.zfs().snapshots(&what.target).await.unwrap()[0].guid, one.guid);
}

#[tokio::test]
async fn properties_that_an_interrupted_receive_left_out_are_made_up_for() {
    let (a, b, ca) = (memory(), memory(), Authority::new());
    let one = source(&a).await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let mut what = fetching(server.address, "node-a", &one, &b);
    for readonly in [false, true] {
        fetch(&ca.identity("node-b"), &b, Limits::default(), what.clone(), |_| {}).await.unwrap();
        assert_eq!(b.dataset(&what.target).await.unwrap().readonly, readonly);
        what.properties = vec![Property::readonly(true)];
    }
}

#[tokio::test]
async fn a_server_that_is_shut_down_in_the_middle_leaves_nothing() {
    let (a, b, ca) = (setup::real(), setup::real(), Authority::new());
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, &noise(24 << 20), "portolan-1").await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let what = fetching(server.address, "node-a", &one, &b);
    let stop = |SoFar { bytes, .. }: SoFar| {
        if bytes > 2 << 20 {
            server.shutdown.cancel();
        }
    };
    let error = fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), what, stop).await.unwrap_err();
    assert!(matches!(error, TransferError::Truncated { .. } | TransferError::Connection { .. }), "{error}");
    assert_nothing(&b, "pvc-1").await;
}

#[tokio::test]
async fn a_send_that_fails_gets_no_trailer() {
    let (a, b, ca) = (memory(), memory(), Authority::new());
    let one = source(&a).await;
    a.inject("send_end", 1, Fault::Fail(ErrorKind::Other));
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let what = fetching(server.address, "node-a", &one, &b);
    let try_with = async || fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), what.clone(), |_| {}).await;
    let error = try_with().await.unwrap_err();
    assert!(matches!(error, TransferError::Truncated { .. }), "{error}");
    assert_nothing(&b, "pvc-1").await;
    try_with().await.unwrap();
}

#[tokio::test]
async fn a_stream_without_its_right_trailer_leaves_nothing() {
    let (a, b, ca) = (setup::real(), setup::real(), Authority::new());
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, &noise(2 << 20), "portolan-1").await;
    for lie in [Lie::WrongHash, Lie::WrongLength, Lie::NoTrailer, Lie::HugeFrame] {
        let rogue = Rogue::start(&ca.identity("node-a"), a.zfs(), &one.name, lie).await;
        let what = fetching(rogue.address, "node-a", &one, &b);
        let error = fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), what, |_| {}).await.unwrap_err();
        match lie {
            Lie::WrongHash | Lie::WrongLength => {
                assert!(matches!(error, TransferError::Damaged { .. }), "{lie:?}: {error}")
            }
            Lie::NoTrailer => assert!(matches!(error, TransferError::Truncated { .. }), "{lie:?}: {error}"),
            _ => assert!(matches!(error, TransferError::Protocol(_)), "{lie:?}: {error}"),
        }
        assert_nothing(&b, "pvc-1").await;
    }
}

#[tokio::test]
async fn another_snapshot_than_the_one_asked_for_is_reported() {
    let (a, b, ca) = (memory(), memory(), Authority::new());
    let one = source(&a).await;
    let rogue = Rogue::start(&ca.identity("node-a"), a.zfs(), &one.name, Lie::None).await;
    let mut what = fetching(rogue.address, "node-a", &one, &b);
    what.request.guid.0 += 1;
    let error = fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), what, |_| {}).await.unwrap_err();
    assert!(matches!(error, TransferError::WrongGuid { .. }), "{error}");
    // An honest server says that it has no such snapshot.
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let mut what = fetching(server.address, "node-a", &one, &memory());
    what.request.guid.0 += 1;
    let error = fetch(&ca.identity("node-b"), &memory(), Limits::default(), what, |_| {}).await.unwrap_err();
    assert!(
        matches!(&error, TransferError::Refused { refusal, .. } if refusal.code == RefusalCode::NotFound),
        "{error}"
    );
}

#[tokio::test]
async fn silence_ends_a_transfer() {
    let (a, b, ca) = (setup::real(), setup::real(), Authority::new());
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, &noise(1 << 20), "portolan-1").await;
    let rogue = Rogue::start(&ca.identity("node-a"), a.zfs(), &one.name, Lie::Silence).await;
    let limits = Limits { idle: Duration::from_secs(2), ..Limits::default() };
    let what = fetching(rogue.address, "node-a", &one, &b);
    let error = fetch(&ca.identity("node-b"), b.zfs(), limits, what, |_| {}).await.unwrap_err();
    assert!(matches!(error, TransferError::Idle { .. }), "{error}");
    assert_nothing(&b, "pvc-1").await;
}

#[tokio::test]
async fn a_copy_that_was_written_is_neither_overwritten_nor_rolled_back() {
    let (a, b, ca) = (setup::real(), setup::real(), Authority::new());
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, b"one", "portolan-1").await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let try_with = async |snapshot| {
        let mut what = fetching(server.address, "node-a", snapshot, &b);
        what.properties = vec![Property::canmount_noauto(), b.mountpoint("pvc-1")];
        fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), what, |_| {}).await
    };
    try_with(&one).await.unwrap();
    b.zfs().mount(&volume).await.unwrap();
    b.write(&volume, b"mine");
    b.zfs().unmount(&volume).await.unwrap();
    let refused = async |snapshot| {
        let error = try_with(snapshot).await.unwrap_err();
        assert!(matches!(error, TransferError::Diverged { .. }) && !error.is_retryable(), "{error}");
    };
    // One that `zfs recv` refuses after all of it is in the pipe, and one that is refused half-way.
    let small = write_and_snapshot(&a, &volume, b"two", "portolan-2").await;
    refused(&small).await;
    let two = write_and_snapshot(&a, &volume, &noise(4 << 20), "portolan-3").await;
    refused(&two).await;
    b.zfs().snapshot(&volume.snapshot("own").unwrap()).await.unwrap();
    let error = try_with(&two).await.unwrap_err();
    assert!(matches!(error, TransferError::Diverged { .. }) && error.to_string().contains("own"), "{error}");
    b.zfs().mount(&volume).await.unwrap();
    assert_eq!(b.read(&volume), b"mine");
    b.zfs().unmount(&volume).await.unwrap();

    // A dataset of that name that has nothing in common with the source's.
    let stranger = setup::real();
    let other = create(&stranger, "pvc-1").await;
    let what = fetching(server.address, "node-a", &two, &stranger);
    let error = fetch(&ca.identity("node-b"), stranger.zfs(), Limits::default(), what, |_| {}).await.unwrap_err();
    assert!(matches!(error, TransferError::Unsettled { .. }), "{error}");
    stranger.zfs().snapshot(&other.snapshot("own").unwrap()).await.unwrap();
    let what = fetching(server.address, "node-a", &two, &stranger);
    let error = fetch(&ca.identity("node-b"), stranger.zfs(), Limits::default(), what, |_| {}).await.unwrap_err();
    assert!(matches!(error, TransferError::Diverged { .. }), "{error}");
    assert!(stranger.zfs().dataset(&volume).await.is_ok());
}

/// While a cluster is updated, agents of two releases meet.
#[tokio::test]
async fn another_version_is_refused_by_name() {
    let (a, ca) = (memory(), Authority::new());
    source(&a).await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let refusal = async |request| ask(&ca.identity("node-b"), server.address, "node-a", request).await["error"].take();
    let later = refusal(r#"{"version":7,"volumes":["pvc-1"],"resume":true}"#).await;
    assert_eq!(later["code"], "invalid");
    let message = later["message"].as_str().unwrap();
    assert!(message.contains("version is \"7\"") && message.contains("allowed is 1 to 3"), "{message}");
    let malformed = refusal("{}").await;
    assert_eq!(malformed["code"], "invalid", "{malformed}");
    assert_eq!(server.asked(), 0);
}

#[tokio::test]
async fn a_new_certificate_counts_from_the_next_connection() {
    let (a, b) = (memory(), memory());
    let one = source(&a).await;
    let (old, new) = (Authority::new(), Authority::new());
    let server = Server::start(&old.identity("node-a"), &a, "node-b").await;
    let what = fetching(server.address, "node-a", &one, &b);
    let try_with =
        async |ca: &Authority| fetch(&ca.identity("node-b"), b.zfs(), Limits::default(), what.clone(), |_| {}).await;
    assert!(try_with(&new).await.is_err());
    server.identity.send_replace(new.identity("node-a").into());
    try_with(&new).await.unwrap();
}

/// A limit is kept from the first frame on, and one that is lifted holds nothing back any more: the rest would take a quarter of an hour.
/// However slow the machine is, it can't be faster than the limit.
#[tokio::test]
async fn a_limit_holds_a_transfer_back_until_it_is_lifted() {
    let (a, b, ca) = (memory(), memory(), Authority::new());
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, &noise(64 << 20), "portolan-1").await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let limit = 256 << 10;
    let (lift, follows) = tokio::sync::watch::channel(Some(limit));
    let mut what = fetching(server.address, "node-a", &one, &b);
    what.pace = Pace::following(follows);
    let told = std::sync::Mutex::new(Vec::new());
    let tell = |now: SoFar| {
        let mut told = told.lock().unwrap();
        told.push((Instant::now(), now.bytes));
        if told.len() == 3 {
            lift.send_replace(None);
        }
    };
    let received = fetch(&ca.identity("node-b"), &b, Limits::default(), what, tell).await.unwrap();
    assert!(received.bytes > 64 << 20, "{}", received.bytes);
    let told = told.into_inner().unwrap();
    let ((first, had), (third, had_then)) = (told[0], told[2]);
    // The third is shown before it is paid for, what it took to connect pays for some of the first, and a tenth of a second's worth may have
    // been saved up.
    let paid = (told[1].1 - had) as f64 / limit as f64 - 0.1;
    assert!(third - first >= Duration::from_secs_f64(paid), "{had} to {had_then} bytes in {:?}", third - first);
}

/// What is told beforehand is about what comes.
#[tokio::test]
async fn what_will_come_is_estimated_where_zfs_can() {
    let (a, b) = (memory().with_capabilities(Capabilities::all()), memory());
    let ca = Authority::new();
    let volume = create(&a, "pvc-1").await;
    let one = write_and_snapshot(&a, &volume, &noise(3 << 20), "portolan-1").await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let estimated = std::sync::Mutex::new(Vec::new());
    let tell = |now: SoFar| estimated.lock().unwrap().push(now.estimate);
    let what = fetching(server.address, "node-a", &one, &b);
    let received = fetch(&ca.identity("node-b"), &b, Limits::default(), what.clone(), tell).await.unwrap();
    assert!(estimated.lock().unwrap().iter().all(|estimate| *estimate == Some(received.bytes)), "{estimated:?}");
    assert!(!estimated.lock().unwrap().is_empty());

    // An estimate that fails or doesn't end is done without.
    for fault in [Fault::Fail(ErrorKind::Other), Fault::Hang] {
        a.inject("send_size", 1, fault);
        let c = memory();
        let none = |now: SoFar| assert_eq!(now.estimate, None);
        let mut what = what.clone();
        what.target = c.pool().child("pvc-1").unwrap();
        fetch(&ca.identity("node-b"), &c, Limits::default(), what, none).await.unwrap();
    }

    // A server whose ZFS says nothing.
    let (mute, d) = (memory(), memory());
    let one = source(&mute).await;
    let server = Server::start(&ca.identity("node-a"), &mute, "node-b").await;
    let what = fetching(server.address, "node-a", &one, &d);
    fetch(&ca.identity("node-b"), &d, Limits::default(), what, |now| assert_eq!(now.estimate, None)).await.unwrap();
}

/// Blocks are neither uncompressed at the source nor compressed again at the target where both can do without; a sealed one's are raw.
#[tokio::test]
async fn blocks_go_as_they_are_compressed_where_both_can() {
    let (able, unable) = (Capabilities::all(), Capabilities { compressed_send: false, ..Capabilities::all() });
    let ca = Authority::new();
    for (at_source, at_target, compressed) in
        [(able, able, true), (able, unable, false), (unable, able, false), (unable, unable, false)]
    {
        let (a, b) = (memory().with_capabilities(at_source), memory().with_capabilities(at_target));
        let one = source(&a).await;
        let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
        let mut what = fetching(server.address, "node-a", &one, &b);
        what.properties = vec![Property::canmount_noauto(), b.mountpoint("pvc-1")];
        fetch(&ca.identity("node-b"), &b, Limits::default(), what.clone(), |_| {}).await.unwrap();
        let sent = format!("send {}{}", one.name, if compressed { " -c" } else { "" });
        assert!(a.calls().contains(&sent), "{sent}: {:?}", a.calls());
        b.mount(&what.target).await.unwrap();
        assert_eq!(b.read(&what.target).unwrap(), b"content");
    }
    let (a, b) = (memory().with_capabilities(able), memory().with_capabilities(able));
    let key = Key::passphrase("correct horse").unwrap();
    let sealed = a.pool().child(SEALED).unwrap();
    a.create_filesystem(&sealed, &[Property::canmount_noauto(), a.mountpoint(SEALED)], Some(&key)).await.unwrap();
    let one = write_and_snapshot(&a, &sealed, b"secret", "portolan-1").await;
    let server = Server::start(&ca.identity("node-a"), &a, "node-b").await;
    let what = fetching(server.address, "node-a", &one, &b);
    fetch(&ca.identity("node-b"), &b, Limits::default(), what, |_| {}).await.unwrap();
    assert!(a.calls().contains(&format!("send {}", one.name)), "{:?}", a.calls());
}

/// A volume with a snapshot.
async fn source(node: &Memory) -> portolan_zfs::Snapshot {
    let volume = create(node, "pvc-1").await;
    write_and_snapshot(node, &volume, b"content", "portolan-1").await
}
