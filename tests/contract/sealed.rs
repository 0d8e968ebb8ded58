//! Encrypted datasets, where there are any.

use portolan_zfs::{DatasetName, ErrorKind, Key, Property, ReceiveOptions, SendOptions, Zfs};

use super::{Node, create, drained, kind, receive_with, write_and_snapshot};

const PASSPHRASE: &str = "correct horse battery staple";

fn keys() -> [Key; 2] {
    [Key::raw(&[0x5a; 32]).unwrap(), Key::passphrase(PASSPHRASE).unwrap()]
}

fn properties(node: &impl Node, volume: &str) -> Vec<Property> {
    vec![Property::canmount_noauto(), node.mountpoint(volume)]
}

pub(super) async fn keys_are_asked_for(node: &impl Node) {
    let (zfs, volume) = (node.zfs(), node.pool().child("sealed").unwrap());
    for key in keys() {
        let properties = properties(node, "sealed");
        if !zfs.probe().await.unwrap().capabilities.encryption {
            let refused = zfs.create_filesystem(&volume, &properties, Some(&key)).await.unwrap_err();
            assert_eq!(refused.kind, ErrorKind::Unsupported);
            assert!(refused.stderr.contains("encryption") && !refused.to_string().contains(PASSPHRASE), "{refused}");
            assert_eq!(kind(zfs.load_key(&node.pool(), &key).await), ErrorKind::Unsupported);
            assert_eq!(kind(zfs.unload_key(&node.pool()).await), ErrorKind::Unsupported);
            continue;
        }
        zfs.create_filesystem(&volume, &properties, Some(&key)).await.unwrap();
        let found = zfs.dataset(&volume).await.unwrap();
        assert_eq!((found.encryption.as_deref(), found.key_available), (Some("aes-256-gcm"), true));
        assert_eq!(found.encryption_root.as_ref(), Some(&volume));
        zfs.mount(&volume).await.unwrap();
        node.write(&volume, b"secret");
        assert_eq!(kind(zfs.unload_key(&volume).await), ErrorKind::Busy);
        zfs.unmount(&volume).await.unwrap();
        for _ in 0..2 {
            zfs.unload_key(&volume).await.unwrap();
        }
        assert!(!zfs.dataset(&volume).await.unwrap().key_available);
        assert_eq!(kind(zfs.mount(&volume).await), ErrorKind::KeyNotLoaded);
        let wrong = zfs.load_key(&volume, &Key::raw(&[1; 32]).unwrap()).await.unwrap_err();
        let wrong_phrase = zfs.load_key(&volume, &Key::passphrase("wrong horse").unwrap()).await.unwrap_err();
        assert_eq!(
            (wrong.kind, wrong_phrase.kind),
            (ErrorKind::WrongKey, ErrorKind::WrongKey),
            "{wrong}, {wrong_phrase}"
        );
        assert!(!wrong_phrase.to_string().contains("wrong horse"), "{wrong_phrase}");
        for _ in 0..2 {
            zfs.load_key(&volume, &key).await.unwrap();
        }
        let other = zfs.load_key(&volume, &Key::raw(&[1; 32]).unwrap()).await.unwrap_err();
        assert_eq!(other.kind, ErrorKind::WrongKey, "a loaded key makes no other one right: {other}");
        assert!(zfs.dataset(&volume).await.unwrap().key_available, "a key that was refused takes nothing away");
        zfs.mount(&volume).await.unwrap();
        assert_eq!(node.read(&volume), b"secret");

        zfs.unmount(&volume).await.unwrap();
        let snapshot = zfs.snapshot(&volume.snapshot("s").unwrap()).await.unwrap();
        let clone = node.pool().child("sealed-clone").unwrap();
        zfs.clone_snapshot(&snapshot.name, &clone, &super::sealed::properties(node, "sealed-clone")).await.unwrap();
        let found = zfs.dataset(&clone).await.unwrap();
        assert_eq!(found.encryption_root.as_ref(), Some(&volume), "a clone is sealed with its origin's key");
        assert_eq!(kind(zfs.load_key(&clone, &key).await), ErrorKind::KeyNotLoaded);
        zfs.destroy_with_snapshots(&clone).await.unwrap();
        zfs.destroy_with_snapshots(&volume).await.unwrap();
    }
    let plain = create(node, "not-sealed").await;
    let found = zfs.dataset(&plain).await.unwrap();
    assert_eq!((found.encryption, found.encryption_root, found.key_available), (None, None, true));
    zfs.destroy_dataset(&plain).await.unwrap();
}

pub(super) async fn raw_streams(a: &impl Node, b: &impl Node) {
    let (zfs, raw) = (a.zfs(), SendOptions { raw: true, ..SendOptions::default() });
    let plain = create(a, "plain").await;
    let snapshot = write_and_snapshot(a, &plain, b"open", "s").await;
    let can = zfs.probe().await.unwrap().capabilities;
    let expected = if can.raw_send { ErrorKind::Other } else { ErrorKind::Unsupported };
    assert_eq!(kind(zfs.send(&snapshot.name, &raw).await), expected, "what is not sealed is never sent raw");
    zfs.destroy_with_snapshots(&plain).await.unwrap();
    if !(can.raw_send && can.encryption) {
        return;
    }

    let [key, _] = keys();
    let (source, target) = (a.pool().child("sealed").unwrap(), b.pool().child("sealed-copy").unwrap());
    zfs.create_filesystem(&source, &properties(a, "sealed"), Some(&key)).await.unwrap();
    let one = write_and_snapshot(a, &source, b"secret one", "one").await;
    assert_eq!(kind(zfs.send(&one.name, &SendOptions::default()).await), ErrorKind::Other, "nor the other way round");
    zfs.unload_key(&source).await.unwrap();
    let send = async |name, options: &SendOptions| drained(zfs.send(name, options).await.unwrap()).await;
    receive_raw(b, &target, &send(&one.name, &raw).await).await;
    let copy = b.zfs().dataset(&target).await.unwrap();
    assert_eq!((copy.encryption.as_deref(), copy.key_available), (Some("aes-256-gcm"), false));
    assert_eq!(b.zfs().snapshots(&target).await.unwrap()[0].guid, one.guid);
    assert_eq!(kind(b.zfs().mount(&target).await), ErrorKind::KeyNotLoaded);
    assert_eq!(kind(b.zfs().load_key(&target, &Key::raw(&[1; 32]).unwrap()).await), ErrorKind::WrongKey);

    zfs.load_key(&source, &key).await.unwrap();
    let two = write_and_snapshot(a, &source, b"secret two", "two").await;
    let since = SendOptions { raw: true, ..SendOptions::since(Some(&one.name)) };
    receive_raw(b, &target, &send(&two.name, &since).await).await;
    b.zfs().load_key(&target, &key).await.unwrap();
    b.zfs().mount(&target).await.unwrap();
    assert_eq!(b.read(&target), b"secret two");
    b.zfs().destroy_with_snapshots(&target).await.unwrap();
    zfs.destroy_with_snapshots(&source).await.unwrap();
}

async fn receive_raw(node: &impl Node, target: &DatasetName, bytes: &[u8]) {
    let mut properties = properties(node, target.short());
    properties.push(Property::readonly(true));
    receive_with(node, target, bytes, &ReceiveOptions::with(&properties)).await.unwrap();
}
