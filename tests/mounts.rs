//! Bind mounts as the storage agent makes them: in its own mount namespace, to be seen in the host's.

use std::path::Path;

use portolan_csi::block::mounts::Mounts;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
use rustix::thread::UnshareFlags;

/// Runs a test in a mount namespace of its own.
fn alone(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: the thread shares its file system attributes with nobody from here on, and ends with the test.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
        mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).unwrap();
        test();
    });
    thread.join().unwrap();
}

#[test]
fn a_peer_sees_the_options_that_were_asked_for() {
    alone(|| {
        let folder = tempfile::tempdir().unwrap();
        let [ours, hosts] = ["ours", "hosts"].map(|name| folder.path().join(name));
        std::fs::create_dir(&ours).unwrap();
        std::fs::create_dir(&hosts).unwrap();
        mount("test", &ours, "tmpfs", MountFlags::empty(), None).unwrap();
        mount_change(&ours, MountPropagationFlags::SHARED).unwrap();
        // As the host's mounts are to the agent's: what is mounted below one is mounted below the other.
        mount_bind(&ours, &hosts).unwrap();
        for name in ["source", "target"] {
            std::fs::create_dir(ours.join(name)).unwrap();
        }
        let mounts = Mounts::new("/");
        let flags = MountFlags::RDONLY | MountFlags::NOEXEC | MountFlags::NOATIME;
        mounts.bind(&ours.join("source"), &ours.join("target"), flags).unwrap();
        for at in [&ours, &hosts] {
            let found = mounts.at(&at.join("target")).unwrap().expect("is mounted");
            assert!(found.readonly, "{}", at.display());
            assert!(std::fs::write(at.join("target/file"), "x").is_err(), "{}", at.display());
            let options = options(&at.join("target"));
            assert!(["ro", "noexec", "noatime"].iter().all(|option| options.contains(option)), "{options}");
        }
        mounts.unmount(&ours.join("target")).unwrap();
        assert_eq!(mounts.at(&hosts.join("target")).unwrap(), None);
        mounts.unmount(&hosts).unwrap();
        mounts.unmount(&ours).unwrap();
    });
}

/// The options of the mount at a path (proc(5), `/proc/thread-self/mountinfo`).
fn options(at: &Path) -> String {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let line = table.lines().rev().find(|line| line.split(' ').nth(4) == at.to_str()).unwrap();
    line.split(' ').nth(5).unwrap().to_owned()
}
