//! Streams that go on where they were cut, that start from bookmarks, that are compressed, and how long they will be.

use portolan_zfs::{
    Base, DatasetName, ErrorKind, Implementation, Property, ReceiveOptions, SendOptions, Snapshot, Zfs,
};

use super::{Node, create, drained, kind, noise, receive_with, stream, write_and_snapshot};

fn options(node: &impl Node, target: &DatasetName, resumable: bool) -> ReceiveOptions {
    let properties = vec![Property::canmount_noauto(), node.mountpoint(target.short()), Property::readonly(true)];
    ReceiveOptions { properties, resumable }
}

async fn content(node: &impl Node, dataset: &DatasetName) -> Vec<u8> {
    node.zfs().mount(dataset).await.unwrap();
    let content = node.read(dataset);
    node.zfs().unmount(dataset).await.unwrap();
    content
}

pub(super) async fn resumed(a: &impl Node, b: &impl Node) {
    let (source, target) = (create(a, "resumed").await, b.pool().child("resumed-copy").unwrap());
    let data = noise(4 << 20);
    let one = write_and_snapshot(a, &source, &data, "one").await;
    let full = stream(a, &one, None).await;
    let half = &full[..full.len() / 2];
    let able = options(b, &target, true);
    if !b.zfs().probe().await.unwrap().capabilities.resume {
        assert_eq!(kind(receive_with(b, &target, &full, &able).await), ErrorKind::Unsupported);
        assert_eq!(kind(a.zfs().send_resume("1-a-b-c").await), ErrorKind::Unsupported);
        assert_eq!(kind(a.zfs().rest_of("1-a-b-c").await), ErrorKind::Unsupported);
        assert_eq!(kind(b.zfs().abort_receive(&target).await), ErrorKind::Unsupported);
        assert_eq!(kind(b.zfs().dataset(&target).await), ErrorKind::NotFound);
        return a.zfs().destroy_with_snapshots(&source).await.unwrap();
    }
    let token = async || b.zfs().dataset(&target).await.unwrap().resume_token;
    assert_eq!(kind(a.zfs().send_resume("-v").await), ErrorKind::Other, "no option is a token");
    assert_eq!(kind(a.zfs().rest_of("-v").await), ErrorKind::Other, "no option is a token");
    assert_eq!(kind(a.zfs().rest_of("1-a-b-c").await), ErrorKind::Other, "nor is anything else");

    assert_eq!(kind(receive_with(b, &target, half, &able).await), ErrorKind::BrokenStream);
    let first = token().await.expect("what came is kept");
    assert!(b.zfs().snapshots(&target).await.unwrap().is_empty(), "half a snapshot is none");
    assert_eq!(kind(receive_with(b, &target, &full, &able).await), ErrorKind::AlreadyExists);
    let said = a.zfs().rest_of(&first).await.unwrap();
    assert_eq!((&said.snapshot, said.guid, said.base), (&one.name, one.guid, None));
    assert_eq!((said.raw, said.compressed), (false, false));
    let rest = drained(a.zfs().send_resume(&first).await.unwrap()).await;
    let size = said.bytes.expect("the size of the rest is known") as usize;
    assert!(size > rest.len() / 2 && size < rest.len() * 2, "{size} for {}", rest.len());
    assert!(rest.len() < full.len() * 3 / 4, "{} of {}", rest.len(), full.len());
    assert_eq!(kind(receive_with(b, &target, &rest[..rest.len() / 2], &able).await), ErrorKind::BrokenStream);
    let second = token().await.expect("what came is kept");
    assert_ne!(first, second);
    let rest = drained(a.zfs().send_resume(&second).await.unwrap()).await;
    receive_with(b, &target, &rest, &able).await.unwrap();
    let copy = b.zfs().dataset(&target).await.unwrap();
    assert_eq!((copy.resume_token, copy.mounted), (None, false));
    assert_eq!(b.zfs().snapshots(&target).await.unwrap()[0].guid, one.guid);

    // A delta: what was there stays as it was until all has come.
    let two = write_and_snapshot(a, &source, &noise(5 << 20), "two").await;
    let delta = stream(a, &two, Some(&one)).await;
    let cut = receive_with(b, &target, &delta[..delta.len() / 2], &able).await;
    assert_eq!(kind(cut), ErrorKind::BrokenStream);
    let begun = token().await.expect("what came is kept");
    let said = a.zfs().rest_of(&begun).await.unwrap();
    assert_eq!((said.guid, said.base), (two.guid, Some(one.guid)));
    assert_eq!(kind(receive_with(b, &target, &delta, &able).await), ErrorKind::Unfinished);
    let base = target.snapshot("one").unwrap();
    assert!(b.zfs().destroy_snapshot(&base).await.is_err(), "it stands on this");
    b.zfs().rename_snapshot(&base, "another-name").await.unwrap();
    b.zfs().rename_snapshot(&target.snapshot("another-name").unwrap(), "one").await.unwrap();
    for _ in 0..2 {
        b.zfs().abort_receive(&target).await.unwrap();
    }
    assert_eq!(token().await, None);
    assert_eq!(b.zfs().snapshots(&target).await.unwrap().len(), 1);
    receive_with(b, &target, &delta, &able).await.unwrap();
    assert!(content(b, &target).await == noise(5 << 20));

    let gone = b.pool().child("given-up").unwrap();
    assert_eq!(kind(receive_with(b, &gone, half, &options(b, &gone, true)).await), ErrorKind::BrokenStream);
    for _ in 0..2 {
        b.zfs().abort_receive(&gone).await.unwrap();
        assert_eq!(kind(b.zfs().dataset(&gone).await), ErrorKind::NotFound);
    }
    // Half of something doesn't keep anything from being destroyed, nor is anything left of it.
    assert_eq!(kind(receive_with(b, &gone, half, &options(b, &gone, true)).await), ErrorKind::BrokenStream);
    b.zfs().destroy_with_snapshots(&gone).await.unwrap();
    assert_eq!(kind(b.zfs().dataset(&gone).await), ErrorKind::NotFound);
    let three = write_and_snapshot(a, &source, &noise(6 << 20), "three").await;
    let delta = stream(a, &three, Some(&two)).await;
    let cut = receive_with(b, &target, &delta[..delta.len() / 2], &able).await;
    assert_eq!(kind(cut), ErrorKind::BrokenStream);
    b.zfs().destroy_with_snapshots(&target).await.unwrap();
    assert_eq!(kind(b.zfs().dataset(&target).await), ErrorKind::NotFound);
    a.zfs().destroy_with_snapshots(&source).await.unwrap();
    assert_eq!(kind(a.zfs().rest_of(&first).await), ErrorKind::NotFound, "its snapshot is gone");
    let stale = match a.zfs().send_resume(&first).await {
        Ok(stream) => stream.finish().await,
        Err(error) => Err(error),
    };
    assert_eq!(kind(stale), ErrorKind::NotFound, "its snapshot is gone");
}

pub(super) async fn from_bookmarks(a: &impl Node, b: &impl Node) {
    let (zfs, source) = (a.zfs(), create(a, "marked").await);
    let target = b.pool().child("marked-copy").unwrap();
    let one = write_and_snapshot(a, &source, b"first", "one").await;
    let mark = source.bookmark("one").unwrap();
    if !zfs.probe().await.unwrap().capabilities.bookmarks {
        assert_eq!(kind(zfs.bookmark(&one.name, &mark).await), ErrorKind::Unsupported);
        assert_eq!(kind(zfs.bookmarks(&source).await), ErrorKind::Unsupported);
        assert_eq!(kind(zfs.destroy_bookmark(&mark).await), ErrorKind::Unsupported);
        return zfs.destroy_with_snapshots(&source).await.unwrap();
    }
    receive_with(b, &target, &stream(a, &one, None).await, &options(b, &target, false)).await.unwrap();
    zfs.bookmark(&one.name, &mark).await.unwrap();
    zfs.bookmark(&one.name, &mark).await.unwrap();
    let two = write_and_snapshot(a, &source, b"second", "two").await;
    assert_eq!(kind(zfs.bookmark(&two.name, &mark).await), ErrorKind::AlreadyExists);
    zfs.destroy_snapshot(&one.name).await.unwrap();
    let marks = zfs.bookmarks(&source).await.unwrap();
    assert_eq!(marks.iter().map(|found| (&found.name, found.guid)).collect::<Vec<_>>(), [(&mark, one.guid)]);
    assert_eq!(marks[0].created_txg, one.created_txg);
    assert_eq!(zfs.snapshots(&source).await.unwrap().len(), 1, "a bookmark is no snapshot");

    let since = SendOptions { base: Some(Base::Bookmark(mark.clone())), ..SendOptions::default() };
    let delta = drained(zfs.send(&two.name, &since).await.unwrap()).await;
    receive_with(b, &target, &delta, &options(b, &target, false)).await.unwrap();
    assert_eq!(content(b, &target).await, b"second");
    zfs.destroy_bookmark(&mark).await.unwrap();
    assert_eq!(kind(zfs.destroy_bookmark(&mark).await), ErrorKind::NotFound);
    assert!(zfs.bookmarks(&source).await.unwrap().is_empty());
    zfs.bookmark(&two.name, &mark).await.unwrap();
    zfs.destroy_with_snapshots(&source).await.unwrap();
    b.zfs().destroy_with_snapshots(&target).await.unwrap();
}

pub(super) async fn compressed_and_estimated(a: &impl Node, b: &impl Node) {
    let (zfs, source) = (a.zfs(), create(a, "squeezed").await);
    let target = b.pool().child("squeezed-copy").unwrap();
    let one: Snapshot = write_and_snapshot(a, &source, &noise(1 << 20), "one").await;
    let can = zfs.probe().await.unwrap().capabilities;
    let plain = SendOptions::default();
    let length = drained(zfs.send(&one.name, &plain).await.unwrap()).await.len() as u64;
    let estimate = zfs.send_size(&one.name, &plain).await.unwrap();
    assert_eq!(estimate.is_some(), can.send_size);
    assert!(estimate.is_none_or(|bytes| bytes > length / 2 && bytes < length * 2), "{estimate:?} of {length}");
    let compressed = SendOptions { compressed: true, ..SendOptions::default() };
    if can.compressed_send {
        let bytes = drained(zfs.send(&one.name, &compressed).await.unwrap()).await;
        receive_with(b, &target, &bytes, &options(b, &target, false)).await.unwrap();
        assert!(content(b, &target).await == noise(1 << 20));
        b.zfs().destroy_with_snapshots(&target).await.unwrap();
    } else {
        assert_eq!(kind(zfs.send(&one.name, &compressed).await), ErrorKind::Unsupported);
    }
    zfs.destroy_with_snapshots(&source).await.unwrap();

    // What a pool says that it takes is what can be sent to it, and shorter where blocks are compressed.
    let takes = b.zfs().receives_compressed(&target).await.unwrap();
    assert!(!takes || b.zfs().probe().await.unwrap().capabilities.compressed_send);
    if takes && can.compressed_send {
        let source = create(a, "soft").await;
        zfs.set_property(&source, &Property::new("compression", "on").unwrap()).await.unwrap();
        let text = b"portolan ".repeat(1 << 16);
        let one = write_and_snapshot(a, &source, &text, "one").await;
        let long = drained(zfs.send(&one.name, &plain).await.unwrap()).await.len();
        let bytes = drained(zfs.send(&one.name, &compressed).await.unwrap()).await;
        let is_real = zfs.probe().await.unwrap().implementation == Implementation::OpenZfs;
        assert!(!is_real || bytes.len() < long / 2, "{} of {long}", bytes.len());
        receive_with(b, &target, &bytes, &options(b, &target, false)).await.unwrap();
        assert!(content(b, &target).await == text);
        // A plain delta follows a compressed stream, so that what one end can may change.
        let two = write_and_snapshot(a, &source, &noise(1 << 16), "two").await;
        receive_with(b, &target, &stream(a, &two, Some(&one)).await, &options(b, &target, false)).await.unwrap();
        assert!(content(b, &target).await == noise(1 << 16));
        b.zfs().destroy_with_snapshots(&target).await.unwrap();
        zfs.destroy_with_snapshots(&source).await.unwrap();
    }
}
