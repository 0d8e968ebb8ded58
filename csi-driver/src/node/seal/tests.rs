//! In two pools in memory, which refuse without a key what ZFS refuses.

use std::path::Path;

use portolan_crds::{
    Cipher, KeySecret, Placement, PortableVolumeSpec, PortableVolumeStatus, VolumeEncryption, VolumeMode, VolumeSource,
};
use portolan_zfs::memory::{Fault, Memory};
use portolan_zfs::{Capabilities, ReceiveOptions, SendOptions, SnapshotName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

use super::*;
use crate::handoff::{Action, Ask, Asked, Event, Known};
use crate::node::write;

const PHRASE: &str = "correct horse battery staple";

fn pool() -> DatasetName {
    DatasetName::new("tank/portolan").unwrap()
}

fn dataset(volume: &str) -> DatasetName {
    pool().child(volume).unwrap()
}

fn memory() -> Memory {
    Memory::new(&pool(), 1 << 30).with_capabilities(Capabilities::all())
}

fn encrypted(name: &str) -> PortableVolume {
    let secret = KeySecret { namespace: "vault".into(), name: "gold".into() };
    let spec = PortableVolumeSpec {
        size_bytes: 1 << 20,
        placement: Placement { node: "a".into() },
        encryption: Some(VolumeEncryption { cipher: Cipher::Aes256Gcm, secret: Some(secret) }),
        ..PortableVolumeSpec::default()
    };
    let mut volume = PortableVolume::new(name, spec);
    volume.metadata.uid = Some(format!("uid-of-{name}"));
    volume.status = Some(PortableVolumeStatus::default());
    volume
}

fn phrase(text: &str) -> Key {
    Key::passphrase(text).unwrap()
}

fn code(result: Result<(), SealError>) -> (Code, String) {
    let status = Status::from(result.unwrap_err());
    assert!(!status.message().contains("horse"), "a key in an error: {status}");
    (status.code(), status.message().to_owned())
}

async fn make_on(zfs: &Memory, volume: &PortableVolume, key: &Key) -> Result<(), SealError> {
    let name = volume.metadata.name.as_deref().unwrap();
    let properties = volume::new_properties(volume, Path::new("/m")).unwrap();
    make(zfs, &Mounts::new("/"), volume, &dataset(name), properties, key).await
}

#[test]
fn the_key_is_one_entry_of_the_secret() {
    let digits = "0123456789abcdefABCDEF".repeat(3)[..64].to_owned();
    let parsed = |entries: &[(&str, &str)]| {
        let secrets = entries.iter().map(|(entry, value)| ((*entry).to_owned(), (*value).to_owned())).collect();
        key(&encrypted("db"), &secrets).map(|key| format!("{:?}", key.unwrap())).map_err(|error| {
            let status = Status::from(error);
            assert_eq!(status.code(), Code::InvalidArgument);
            status.message().to_owned()
        })
    };
    assert_eq!(parsed(&[(PASSPHRASE, PHRASE)]).unwrap(), "Key(passphrase)");
    assert_eq!(parsed(&[(PASSPHRASE, &format!("{PHRASE}\r\n")), ("user", "x")]).unwrap(), "Key(passphrase)");
    for text in [digits.clone(), format!("{digits}\n")] {
        assert_eq!(parsed(&[(KEY, &text)]).unwrap(), "Key(raw)");
    }
    for (entries, says) in [
        (vec![], "neither"),
        (vec![("passphrase", PHRASE)], "encryption-passphrase"),
        (vec![(PASSPHRASE, PHRASE), (KEY, &digits)], "both"),
        (vec![(PASSPHRASE, "secret!")], "8 to 512"),
        (vec![(PASSPHRASE, "two lines\nof it")], "one line"),
        (vec![(KEY, &digits[..62])], "62 hexadecimal digits"),
        (vec![(KEY, &digits[..63])], "64 hexadecimal digits"),
        (vec![(KEY, PHRASE)], "28 bytes"),
    ] {
        let refused = parsed(&entries).unwrap_err();
        assert!(refused.contains(says) && refused.contains("vault/gold") && refused.contains("allowed"), "{refused}");
        assert!(entries.iter().all(|(_, value)| !refused.contains(value)), "a key in an error: {refused}");
    }
    let mut plain = encrypted("db");
    plain.spec.encryption = None;
    assert!(key(&plain, &HashMap::new()).unwrap().is_none());
}

#[test]
fn only_the_node_where_it_is_wanted_makes_it_and_only_once() {
    let mut new = encrypted("db");
    assert!(!is_new("a", &new), "not recorded yet: a crash would leave a dataset that nobody knows of");
    for node in ["a", "b"] {
        let event = Event::Recorded { node: node.into(), snapshot: None };
        new.status = Some(handoff::transition(&new, event).unwrap());
    }
    assert!(is_new("a", &new) && !is_new("b", &new));
    for change in [
        (|volume| volume.status.as_mut().unwrap().owner = Some("a".into())) as fn(&mut PortableVolume),
        |volume| volume.spec.encryption = None,
        |volume| volume.spec.source = Some(VolumeSource::default()),
        |volume| volume.spec.import = Some(portolan_crds::VolumeImport::default()),
    ] {
        let mut other = new.clone();
        change(&mut other);
        assert!(!is_new("a", &other));
    }
}

#[tokio::test]
async fn a_call_that_is_cut_short_is_gone_on_with() {
    for fault in [None, Some(Fault::Fail(ErrorKind::Timeout)), Some(Fault::FailAfter(ErrorKind::Timeout))] {
        let (zfs, volume, key) = (memory(), encrypted("db"), phrase(PHRASE));
        if let Some(fault) = fault {
            zfs.inject("create_filesystem", 1, fault);
            assert_eq!(code(make_on(&zfs, &volume, &key).await).0, Code::Unavailable);
        }
        make_on(&zfs, &volume, &key).await.unwrap();
        let made = zfs.dataset(&dataset("db")).await.unwrap();
        assert_eq!((made.encryption.as_deref(), made.encryption_root), (Some("aes-256-gcm"), Some(dataset("db"))));
        assert_eq!((made.user[volume::UID_PROPERTY].as_str(), made.mounted), ("uid-of-db", false));
        open(&zfs, &pool(), &volume, &dataset("db"), &key).await.unwrap();
    }
    let (zfs, stranger) = (memory(), dataset("db"));
    zfs.create_filesystem(&stranger, &[], None).await.unwrap();
    let (refused, why) = code(make_on(&zfs, &encrypted("db"), &phrase(PHRASE)).await);
    assert!(refused == Code::FailedPrecondition && why.contains("not this volume's"), "{why}");
    let (fuse, volume) = (Memory::new(&pool(), 1 << 30), encrypted("db"));
    assert_eq!(code(make_on(&fuse, &volume, &phrase(PHRASE)).await).0, Code::FailedPrecondition);
}

#[tokio::test]
async fn what_does_not_fit_is_refused() {
    let (zfs, volume, db) = (memory(), encrypted("db"), dataset("db"));
    make_on(&zfs, &volume, &phrase(PHRASE)).await.unwrap();
    let wrong = phrase("another horse");
    for loaded in [true, false] {
        let (refused, why) = code(open(&zfs, &pool(), &volume, &db, &wrong).await);
        assert_eq!(refused, Code::Unauthenticated, "loaded: {loaded}");
        assert!(why.contains("Secret vault/gold") && why.contains("tank/portolan/db"), "{why}");
        close(&zfs, &pool(), &db).await.unwrap();
    }
    zfs.create_filesystem(&dataset("plain"), &[], None).await.unwrap();
    let (refused, why) = code(open(&zfs, &pool(), &volume, &dataset("plain"), &phrase(PHRASE)).await);
    assert!(refused == Code::FailedPrecondition && why.contains("no encryption"), "{why}");
    let mut other = volume.clone();
    other.spec.encryption = Some(VolumeEncryption { cipher: Cipher::Aes128Gcm, secret: None });
    let (refused, why) = code(open(&zfs, &pool(), &other, &db, &phrase(PHRASE)).await);
    assert!(refused == Code::FailedPrecondition && why.contains("aes-128-gcm"), "{why}");
}

#[tokio::test]
async fn the_key_goes_with_the_last_that_uses_it() {
    let (zfs, volume, db, key) = (memory(), encrypted("db"), dataset("db"), phrase(PHRASE));
    make_on(&zfs, &volume, &key).await.unwrap();
    let snapshot = zfs.snapshot(&db.snapshot("s").unwrap()).await.unwrap().name;
    let (twin, clone) = (encrypted("twin"), dataset("twin"));
    let properties = volume::new_properties(&twin, Path::new("/t")).unwrap();
    close(&zfs, &pool(), &db).await.unwrap();
    zfs.clone_snapshot(&snapshot, &clone, &properties).await.unwrap();
    let available = async || zfs.dataset(&clone).await.unwrap().key_available;
    assert!(!available().await);
    for (volume, dataset) in [(&volume, &db), (&twin, &clone)] {
        open(&zfs, &pool(), volume, dataset, &key).await.unwrap();
        zfs.mount(dataset).await.unwrap();
    }
    let (refused, _) = code(open(&zfs, &pool(), &twin, &clone, &phrase("another horse")).await);
    assert_eq!(refused, Code::Unauthenticated, "its origin's pod has loaded the key: that is no pass for others");
    zfs.unmount(&db).await.unwrap();
    close(&zfs, &pool(), &db).await.unwrap();
    assert!(available().await, "the clone is in use");
    zfs.unmount(&clone).await.unwrap();
    for _ in 0..2 {
        close(&zfs, &pool(), &clone).await.unwrap();
        assert!(!available().await);
    }
    // Nobody else has it, and still it is in use: that is said, and the caller comes again.
    zfs.destroy_with_snapshots(&clone).await.unwrap();
    open(&zfs, &pool(), &volume, &db, &key).await.unwrap();
    zfs.mount(&db).await.unwrap();
    assert_eq!(code(close(&zfs, &pool(), &db).await).0, Code::Unavailable);
    zfs.set_imported(false);
    close(&zfs, &pool(), &db).await.unwrap();
    close(&memory(), &pool(), &db).await.unwrap();
}

#[tokio::test]
async fn a_key_from_above_is_not_ours() {
    let (zfs, key) = (memory(), phrase(PHRASE));
    zfs.create_filesystem(&DatasetName::new("tank/safe").unwrap(), &[], Some(&key)).await.unwrap();
    let safe = DatasetName::new("tank/safe").unwrap();
    assert!(open(&zfs, &pool(), &encrypted("db"), &safe, &key).await.is_err());
    close(&zfs, &pool(), &safe).await.unwrap();
    assert!(zfs.dataset(&safe).await.unwrap().key_available);
}

#[tokio::test]
async fn a_zvol_grows_when_it_is_opened() {
    let (zfs, mut volume, db, key) = (memory(), encrypted("db"), dataset("db"), phrase(PHRASE));
    volume.spec.mode = VolumeMode::Block;
    make_on(&zfs, &volume, &key).await.unwrap();
    close(&zfs, &pool(), &db).await.unwrap();
    volume.spec.size_bytes = 4 << 20;
    open(&zfs, &pool(), &volume, &db, &key).await.unwrap();
    assert_eq!(zfs.dataset(&db).await.unwrap().kind, Kind::Volume { size: 4 << 20 });
}

/// Two nodes, and what their agents do to ZFS. The plans are the agents' own.
struct World {
    nodes: [(&'static str, Memory); 2],
    volume: PortableVolume,
    /// A snapshot that somebody asks for, until it is there.
    asked: Vec<Asked>,
}

impl World {
    fn zfs(&self, node: &str) -> &Memory {
        let (_, zfs) = self.nodes.iter().find(|(name, _)| *name == node).unwrap();
        zfs
    }

    fn status(&mut self) -> &mut PortableVolumeStatus {
        self.volume.status.as_mut().unwrap()
    }

    /// Plans and acts on both nodes until there is nothing more to do. No key is loaded anywhere, before, after and between.
    async fn settle(&mut self) {
        for _ in 0..60 {
            let mut idle = true;
            for node in ["a", "b"] {
                let zfs = self.zfs(node).clone();
                let name = dataset(self.volume.metadata.name.as_deref().unwrap());
                let local = disk::read(&zfs, &Mounts::new("/"), &name).await.unwrap();
                assert!(local.as_ref().is_none_or(|local| local.sealed), "a key is loaded on {node}");
                let actions = handoff::plan(node, &self.volume, local.as_ref(), &self.asked);
                let waits = matches!(actions[..], [] | [Action::AwaitKey | Action::Keep(_)]);
                idle &= waits;
                for action in actions {
                    self.act(node, &zfs, &name, action).await;
                }
            }
            if idle {
                return;
            }
        }
        panic!("it goes on for ever: {:?}", self.volume.status);
    }

    async fn act(&mut self, node: &str, zfs: &Memory, name: &DatasetName, action: Action) {
        let snapshot = |short: &str| name.snapshot(short).unwrap();
        let (volume, me) = (self.volume.clone(), node.to_owned());
        let handoff = volume.status.as_ref().and_then(|status| status.handoff.clone()).unwrap_or_default();
        let epoch = handoff.epoch;
        let event = match action {
            Action::AwaitKey | Action::CheckQuiet | Action::Keep(_) => return,
            Action::RecordReplica => Event::Recorded { node: me, snapshot: None },
            Action::ForgetReplica => Event::Forgotten { node: me },
            Action::RecordSnapshot(known) => Event::Recorded { node: me, snapshot: Some(known) },
            Action::RecordUsed(bytes) => {
                write::used(self.status(), bytes);
                return handoff::ready(self.status());
            }
            Action::Own => Event::Owned { node: me, spec: Box::new(volume.spec.clone()) },
            Action::SetReadonly(on) => return zfs.set_readonly(name, on).await.unwrap(),
            Action::PublishFinal { name: short, .. } => {
                let guid = zfs.snapshot(&snapshot(&short)).await.unwrap().guid.to_string();
                Event::Published { node: me, epoch, snapshot: Known { name: short, guid }, quiesced_at: write::now() }
            }
            Action::Fetch(known) => {
                let mut properties = vec![Property::readonly(true)];
                properties.extend(volume::properties(&self.volume, Path::new("/m")).unwrap());
                return transfer(self.zfs(&handoff.from), zfs, &snapshot(&known.name), properties).await;
            }
            Action::PublishRound { name: short, .. } => {
                let guid = zfs.snapshot(&snapshot(&short)).await.unwrap().guid.to_string();
                zfs.set_property(name, &volume::resting_property(&guid).unwrap()).await.unwrap();
                Event::RoundTaken { node: me, epoch, snapshot: Known { name: short, guid }, at: write::now() }
            }
            Action::RecordRound(guid) => Event::RoundReceived { node: me, epoch, guid, round: None },
            Action::TakeOver(guid) => Event::TookOver { node: me, epoch, guid, bytes: 0, base: None },
            Action::Stamp(epoch) => {
                return zfs.set_property(name, &volume::epoch_property(epoch).unwrap()).await.unwrap();
            }
            Action::Finish => Event::Finished { node: me, epoch, at: write::now() },
            Action::ApplySpec => {
                for property in volume::changeable(&volume).unwrap() {
                    zfs.set_property(name, &property).await.unwrap();
                }
                return handoff::applied(self.status(), &volume.spec);
            }
            Action::Take(asked) => return drop(zfs.snapshot(&snapshot(&asked.short)).await.unwrap()),
            Action::RecordTaken { .. } => return self.asked.clear(),
            Action::DestroySnapshot(known) => return zfs.destroy_snapshot(&snapshot(&known.name)).await.unwrap(),
            Action::Destroy => return zfs.destroy_with_snapshots(name).await.unwrap(),
            other => panic!("{other:?}"),
        };
        self.volume.status = Some(handoff::transition(&volume, event).unwrap());
    }

    /// A pod comes to the owner, reads what was written last, writes, and goes.
    async fn pod(&self, node: &str, key: &Key, finds: &[u8], writes: &[u8]) {
        let (zfs, name) = (self.zfs(node), dataset("db"));
        assert_eq!(zfs.mount(&name).await.unwrap_err().kind, ErrorKind::KeyNotLoaded);
        open(zfs, &pool(), &self.volume, &name, key).await.unwrap();
        zfs.mount(&name).await.unwrap();
        assert_eq!(zfs.read(&name).unwrap(), finds);
        zfs.write(&name, writes).unwrap();
        zfs.unmount(&name).await.unwrap();
        close(zfs, &pool(), &name).await.unwrap();
    }

    /// With rounds before it, and without.
    async fn move_to(&mut self, to: &str) {
        for warm in [true, false] {
            let event = Event::Asked(Ask { to: to.into(), warm, ..Ask::default() }, write::now());
            self.volume.status = Some(handoff::transition(&self.volume, event).unwrap());
            self.settle().await;
        }
        assert_eq!(self.status().owner.as_deref(), Some(to));
    }
}

/// A raw stream, as the agents send it: from the newest snapshot that both have.
async fn transfer(from: &Memory, to: &Memory, snapshot: &SnapshotName, properties: Vec<Property>) {
    let there = to.snapshots(snapshot.dataset()).await.unwrap_or_default();
    let base = there.last().map(|newest| newest.name.clone());
    let options = SendOptions { raw: true, ..SendOptions::since(base.as_ref()) };
    let mut bytes = Vec::new();
    let mut stream = from.send(snapshot, &options).await.unwrap();
    stream.read_to_end(&mut bytes).await.unwrap();
    stream.finish().await.unwrap();
    assert!(!bytes.is_empty());
    let mut receive = to.receive(snapshot.dataset(), &ReceiveOptions::with(&properties)).await.unwrap();
    receive.write_all(&bytes).await.unwrap();
    receive.finish().await.unwrap();
}

#[tokio::test]
async fn nothing_but_making_and_mounting_needs_the_key() {
    let (volume, key) = (encrypted("db"), phrase(PHRASE));
    let mut world = World { nodes: [("a", memory()), ("b", memory())], volume, asked: Vec::new() };
    world.settle().await;
    assert!(is_new("a", &world.volume), "recorded, and nothing made");
    make_on(world.zfs("a"), &world.volume, &key).await.unwrap();
    close(world.zfs("a"), &pool(), &dataset("db")).await.unwrap();
    world.settle().await;
    assert_eq!(world.status().owner.as_deref(), Some("a"));

    world.pod("a", &key, b"", b"one").await;
    world.asked = vec![Asked { object: "daily".into(), short: "daily".into(), ..Asked::default() }];
    world.settle().await;
    world.volume.spec.size_bytes = 2 << 20;
    let mut last = b"one".to_vec();
    for round in 0..20 {
        let (there, words) = (if round % 2 == 0 { "b" } else { "a" }, format!("round {round}").into_bytes());
        world.move_to(there).await;
        world.pod(there, &key, &last, &words).await;
        last = words;
    }
    let (a, b) = (world.zfs("a").clone(), world.zfs("b").clone());
    for zfs in [&a, &b] {
        let copy = zfs.dataset(&dataset("db")).await.unwrap();
        assert_eq!((copy.refquota, copy.user[volume::UID_PROPERTY].as_str()), (Some(2 << 20), "uid-of-db"));
        assert!(!copy.key_available && copy.mountpoint.is_some());
        let opened = zfs.calls().iter().filter(|call| call.starts_with("load_key")).count();
        assert!(opened >= 10, "by the pods, and by nobody else");
    }
    // Elsewhere a volume of a snapshot is a copy, here a clone: both without the key, which opens them.
    let daily = dataset("db").snapshot("daily").unwrap();
    a.clone_snapshot(&daily, &dataset("clone"), &volume::new_properties(&encrypted("clone"), Path::new("/c")).unwrap())
        .await
        .unwrap();
    assert_eq!(
        code(open(&a, &pool(), &encrypted("clone"), &dataset("clone"), &phrase("no such horse")).await).0,
        Code::Unauthenticated
    );
    open(&a, &pool(), &encrypted("clone"), &dataset("clone"), &key).await.unwrap();
    close(&a, &pool(), &dataset("clone")).await.unwrap();
    a.destroy_with_snapshots(&dataset("clone")).await.unwrap();

    let deleted = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH);
    world.volume.metadata.deletion_timestamp = Some(deleted);
    world.asked.clear();
    world.settle().await;
    assert!(world.status().replicas.is_empty());
    for zfs in [a, b] {
        assert_eq!(zfs.dataset(&dataset("db")).await.unwrap_err().kind, ErrorKind::NotFound);
    }
}
