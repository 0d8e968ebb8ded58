//! A copy that is read while others read theirs, on a real pool: it can't be written, it can be received into afterwards, and it goes whole.

use std::io::ErrorKind;
use std::path::Path;

use portolan_tests::contract::{Node as _, create, noise, receive_with, stream, write_and_snapshot};
use portolan_zfs::{Property, ReceiveOptions, Zfs};

use super::Real;

/// How a node tells each of the ways in which somebody might write.
fn writes(at: &Path) -> Vec<ErrorKind> {
    let tried = [
        std::fs::write(at.join("content"), "mine").err(),
        std::fs::write(at.join("new"), "mine").err(),
        std::fs::remove_file(at.join("content")).err(),
        std::fs::create_dir(at.join("folder")).err(),
    ];
    tried.into_iter().map(|error| error.expect("it is read-only").kind()).collect()
}

#[tokio::test]
async fn a_copy_that_is_read_stays_as_it_was_received() {
    let (a, b) = (Real::start(), Real::start());
    let (source, target) = (create(&a, "shared").await, b.pool().child("shared").unwrap());
    let content = noise(3 << 20);
    let one = write_and_snapshot(&a, &source, &content, "portolan-2").await;
    a.zfs().set_readonly(&source, true).await.unwrap();
    let properties = [Property::canmount_noauto(), b.mountpoint("shared"), Property::readonly(true)];
    let options = ReceiveOptions::with(&properties);
    receive_with(&b, &target, &stream(&a, &one, None).await, &options).await.unwrap();

    // Two who read, one after the other and both at once; the owner reads, too.
    for _ in 0..2 {
        for (node, dataset) in [(&a, &source), (&b, &target)] {
            node.zfs().mount(dataset).await.unwrap();
            assert!(node.read(dataset) == content, "byte for byte");
            assert_eq!(writes(&node.node.files("shared")), [ErrorKind::ReadOnlyFilesystem; 4]);
            // An agent looks at it meanwhile, and does again what it may have done.
            assert!(node.zfs().dataset(dataset).await.unwrap().readonly);
            node.zfs().set_readonly(dataset, true).await.unwrap();
        }
        b.zfs().unmount(&target).await.unwrap();
        assert!(a.read(&source) == content, "nobody was disturbed");
        a.zfs().unmount(&source).await.unwrap();
    }
    // Reading has changed nothing: it is received into as before, and has nothing that the source hasn't.
    let two = a.zfs().snapshot(&source.snapshot("portolan-3").unwrap()).await.unwrap();
    receive_with(&b, &target, &stream(&a, &two, Some(&one)).await, &options).await.unwrap();
    let guids = |taken: Vec<portolan_zfs::Snapshot>| taken.into_iter().map(|taken| taken.guid).collect::<Vec<_>>();
    assert_eq!(guids(b.zfs().snapshots(&target).await.unwrap()), [one.guid, two.guid]);
    b.zfs().mount(&target).await.unwrap();
    assert!(b.read(&target) == content);
    b.zfs().unmount(&target).await.unwrap();

    for (node, dataset) in [(&a, &source), (&b, &target)] {
        node.zfs().destroy_with_snapshots(dataset).await.unwrap();
        assert!(node.zfs().children(&node.pool()).await.unwrap().is_empty());
        let mounts = node.node.run(&["cat", "/proc/self/mounts"]);
        assert!(!mounts.contains("shared"), "{mounts}");
    }
}
