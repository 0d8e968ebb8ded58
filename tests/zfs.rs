//! portolan-zfs on real pools, and the implementation in memory held to the same behaviour.

pub mod node;
mod reading;

use std::sync::Mutex;
use std::time::{Duration, Instant};

use portolan_zfs::memory::{Fault, Memory};
use portolan_zfs::{
    Capabilities, CommandLine, DatasetName, ErrorKind, Implementation, Key, PoolHealth, Property, ReceiveOptions,
    Runner, Zfs, ZfsError,
};

use node::ZfsFuseNode;
use portolan_tests::contract::{self, Node, create, truncated_stream};

/// A node of the contract on a real pool.
pub struct Real {
    pub node: ZfsFuseNode,
    zfs: CommandLine,
    open: Mutex<Option<std::fs::File>>,
}

impl Real {
    pub fn start() -> Self {
        let node = ZfsFuseNode::start(256);
        let zfs = node.zfs();
        Self { node, zfs, open: Mutex::new(None) }
    }

    fn file(&self, dataset: &DatasetName) -> std::path::PathBuf {
        self.node.files(dataset.short()).join("content")
    }
}

impl Node for Real {
    type Zfs = CommandLine;

    fn zfs(&self) -> &CommandLine {
        &self.zfs
    }

    fn pool(&self) -> DatasetName {
        self.node.pool()
    }

    fn mountpoint(&self, volume: &str) -> Property {
        Property::new("mountpoint", self.node.mountpoint(volume).to_str().unwrap()).unwrap()
    }

    fn write(&self, dataset: &DatasetName, content: &[u8]) {
        std::fs::write(self.file(dataset), content).unwrap();
    }

    fn read(&self, dataset: &DatasetName) -> Vec<u8> {
        std::fs::read(self.file(dataset)).unwrap()
    }

    fn write_device(&self, volume: &DatasetName, _content: &[u8]) {
        panic!("zfs-fuse has no {}", volume.device().display());
    }

    fn read_device(&self, volume: &DatasetName, _length: usize) -> Vec<u8> {
        panic!("zfs-fuse has no {}", volume.device().display());
    }

    fn set_open(&self, dataset: &DatasetName, open: bool) {
        *self.open.lock().unwrap() = open.then(|| std::fs::File::open(self.file(dataset)).unwrap());
    }
}

fn memory() -> Memory {
    Memory::new(&DatasetName::new("tank").unwrap(), 256 << 20)
}

fn kind<T>(result: Result<T, ZfsError>) -> ErrorKind {
    result.err().expect("must fail").kind
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    contract::holds(&memory(), &memory()).await;
}

#[tokio::test]
async fn memory_that_can_do_all_keeps_the_contract() {
    let able = || memory().with_capabilities(Capabilities::all());
    contract::holds(&able(), &able()).await;
}

#[tokio::test]
async fn what_a_killed_snapshot_of_several_left_is_cleaned_up() {
    let node = Real::start();
    let (one, two, bystander) = (create(&node, "one").await, create(&node, "two").await, create(&node, "by").await);
    let count = async |dataset: &DatasetName| node.zfs().snapshots(dataset).await.unwrap().len();
    // What the first command of it leaves, and somebody else's that only looks like it.
    node.node.run(&["zfs", "snapshot", "-r", "-o", "portolan:snapshot-all=group", "tank@group"]);
    node.node.run(&["zfs", "snapshot", "-r", "-o", "portolan:snapshot-all=other", "tank@theirs"]);
    let taken = node.zfs().snapshot_all(&node.pool(), &[one.clone(), two.clone()], "group").await.unwrap();
    assert_eq!(taken.len(), 2);
    node.zfs().snapshot_all(&node.pool(), &[one.clone(), two.clone()], "theirs").await.unwrap();
    assert_eq!((count(&one).await, count(&two).await, count(&bystander).await), (2, 2, 1));
    assert_eq!(node.zfs().snapshots(&bystander).await.unwrap()[0].name.short(), "theirs");
    // The same without taking anything.
    node.node.run(&["zfs", "snapshot", "-r", "-o", "portolan:snapshot-all=late", "tank@late"]);
    for _ in 0..2 {
        node.zfs().clean_up_snapshot_all(&node.pool(), std::slice::from_ref(&one), "late").await.unwrap();
        assert_eq!((count(&one).await, count(&two).await, count(&bystander).await), (3, 2, 1));
    }
}

#[tokio::test]
async fn zfs_fuse_keeps_the_contract() {
    let (a, b) = (Real::start(), Real::start());
    contract::holds(&a, &b).await;
}

#[tokio::test]
async fn a_probe_says_which_zfs_it_is() {
    let node = ZfsFuseNode::start(128);
    let probe = node.zfs().probe().await.unwrap();
    assert_eq!((probe.implementation, probe.to_string().as_str()), (Implementation::ZfsFuse, "zfs-fuse 0.7.0"));
    assert!(probe.capabilities.names().is_empty(), "{:?}", probe.capabilities);
    assert_eq!(node.zfs().pool_health(&node.pool()).await.unwrap(), PoolHealth::Online);
    let space = node.zfs().space(&node.pool()).await.unwrap();
    assert!((64 << 20..128 << 20).contains(&space.capacity()), "{space:?}");
}

#[tokio::test]
async fn a_pool_that_is_gone_is_not_empty() {
    let node = ZfsFuseNode::start(128);
    let (zfs, volume) = (node.zfs(), node.pool().child("v").unwrap());
    zfs.create_filesystem(&volume, &[Property::canmount_noauto()], None).await.unwrap();
    node.run(&["zpool", "export", "tank"]);
    for kind in [
        kind(zfs.dataset(&volume).await),
        kind(zfs.children(&node.pool()).await),
        kind(zfs.snapshots(&volume).await),
        kind(zfs.destroy_with_snapshots(&volume).await),
        kind(zfs.create_filesystem(&volume, &[], None).await),
        kind(zfs.pool_health(&volume).await),
    ] {
        assert_eq!(kind, ErrorKind::PoolUnavailable);
    }
    node.signal("KILL");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(kind(zfs.dataset(&volume).await), ErrorKind::PoolUnavailable);
}

#[tokio::test]
async fn mounts_at_once_do_not_hang_the_daemon() {
    let node = ZfsFuseNode::start(128);
    let zfs = CommandLine::new(node.runner().with_deadline(Duration::from_secs(10)));
    let volumes: Vec<DatasetName> = (0..4).map(|n| node.pool().child(&format!("v{n}")).unwrap()).collect();
    for volume in &volumes {
        let at = node.mountpoint(volume.short());
        let properties = [Property::canmount_noauto(), Property::new("mountpoint", at.to_str().unwrap()).unwrap()];
        zfs.create_filesystem(volume, &properties, None).await.unwrap();
    }
    for round in 0..15 {
        let mounted = futures::future::join_all(volumes.iter().map(|volume| zfs.mount(volume))).await;
        assert!(mounted.iter().all(Result::is_ok), "round {round}: {mounted:?}");
        let unmounted = futures::future::join_all(volumes.iter().map(|volume| zfs.unmount(volume))).await;
        assert!(unmounted.iter().all(Result::is_ok), "round {round}: {unmounted:?}");
    }
}

#[tokio::test]
async fn a_daemon_that_hangs_is_a_timeout_and_holds_nobody_up() {
    let node = ZfsFuseNode::start(128);
    let zfs = CommandLine::new(node.runner().with_deadline(Duration::from_millis(300)));
    let volume = node.pool().child("v").unwrap();
    node.signal("STOP");
    let begin = Instant::now();
    let (one, two) = tokio::join!(zfs.dataset(&volume), zfs.children(&volume));
    assert_eq!((kind(one), kind(two)), (ErrorKind::Timeout, ErrorKind::Timeout));
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    node.signal("CONT");
    assert_eq!(kind(node.zfs().dataset(&volume).await), ErrorKind::NotFound);
}

/// A `zfs` that says busy a number of times before it does as told; it keeps count in a file.
fn stubborn(folder: &std::path::Path, times: u32) -> CommandLine {
    let script = folder.join("stubborn");
    let count = folder.join("count");
    let text = format!(
        "[ \"$2\" = get ] && {{ echo no; exit; }}\necho x >> {count}\n[ $(wc -l < {count}) -gt {times} ] && exit\n\
         echo \"cannot $2 '$3': dataset is busy\" >&2; exit 1\n",
        count = count.display()
    );
    std::fs::write(&script, text).unwrap();
    CommandLine::new(Runner::new().with_prefix(["sh", script.to_str().unwrap()]))
}

#[tokio::test]
async fn a_call_refused_as_busy_is_made_again_but_not_for_ever() {
    let volume = DatasetName::new("tank/v").unwrap();
    for (times, ends) in [(3, Ok(())), (100, Err(ErrorKind::Busy))] {
        let new = || tempfile::tempdir().unwrap();
        let (destroy, unmount, mount) = (new(), new(), new());
        let kind = |result: Result<(), ZfsError>| result.map_err(|error| error.kind);
        assert_eq!(kind(stubborn(destroy.path(), times).destroy_dataset(&volume).await), ends);
        assert_eq!(kind(stubborn(unmount.path(), times).unmount(&volume).await), ends);
        assert_eq!(kind(stubborn(mount.path(), times).mount(&volume).await), ends);
    }
}

/// A `zfs` that can encrypt, keeps what it is told and what it reads, and says that the key is wrong.
fn eavesdropper(folder: &std::path::Path) -> CommandLine {
    let script = folder.join("eavesdropper");
    let text = format!(
        "[ $# = 1 ] && {{ printf '\\tload-key <filesystem>\\n' >&2; exit 2; }}\n\
         [ \"$2\" = version ] && {{ echo zfs-2.3.2-1; exit; }}\n\
         echo \"$@\" > {0}/words; cat > {0}/input\necho \"Key load error: Incorrect key provided for 'tank/v'.\" >&2; exit 1\n",
        folder.display()
    );
    std::fs::write(&script, text).unwrap();
    CommandLine::new(Runner::new().with_prefix(["sh", script.to_str().unwrap()]))
}

#[tokio::test]
async fn a_key_is_only_ever_on_standard_input() {
    let (folder, volume) = (tempfile::tempdir().unwrap(), DatasetName::new("tank/v").unwrap());
    let zfs = eavesdropper(folder.path());
    let heard = |what: &str| std::fs::read_to_string(folder.path().join(what)).unwrap();
    let key = Key::passphrase("correct horse").unwrap();
    let compression = [Property::new("compression", "lz4").unwrap()];
    let created = zfs.create_filesystem(&volume, &compression, Some(&key)).await.unwrap_err();
    assert_eq!(heard("input"), "correct horse");
    let words = "zfs create -o encryption=aes-256-gcm -o keyformat=passphrase -o keylocation=prompt -o compression=lz4 tank/v\n";
    assert_eq!(heard("words"), words);
    let loaded = zfs.load_key(&volume, &key).await.unwrap_err();
    assert_eq!(
        (heard("input").as_str(), heard("words").as_str()),
        ("correct horse", "zfs load-key -L prompt tank/v\n")
    );
    for error in [created, loaded] {
        assert_eq!(error.kind, ErrorKind::WrongKey);
        assert!(!format!("{error} {error:?} {key:?}").contains("horse"), "{error}");
    }
}

/// A `zpool` that knows the features, or a ZFS before them, which refuses the question.
#[tokio::test]
async fn a_pool_takes_compressed_blocks_if_its_features_are_enabled() {
    let (folder, volume) = (tempfile::tempdir().unwrap(), DatasetName::new("tank/v").unwrap());
    let script = folder.path().join("featured");
    let text = format!(
        "[ $# = 1 ] && {{ printf '\tsend [-DLPbcehnpsVvw] [-i snapshot]\n' >&2; exit 2; }}\n\
         [ \"$2\" = version ] && {{ echo zfs-2.3.2-1; exit; }}\n\
         echo \"$@\" > {0}/words; cat {0}/values\n",
        folder.path().display()
    );
    std::fs::write(&script, text).unwrap();
    let zfs = CommandLine::new(Runner::new().with_prefix(["sh", script.to_str().unwrap()]));
    assert!(!zfs.receives_compressed(&volume).await.unwrap(), "the features are not known");
    for (values, takes) in [("active\nenabled\n", true), ("active\ndisabled\n", false)] {
        std::fs::write(folder.path().join("values"), values).unwrap();
        assert_eq!(zfs.receives_compressed(&volume).await.unwrap(), takes);
    }
    let words = std::fs::read_to_string(folder.path().join("words")).unwrap();
    assert_eq!(words, "zpool get -H -o value feature@lz4_compress,feature@zstd_compress tank\n");
}

/// Where a key is loaded already, `load-key` doesn't look at the one it is given.
#[tokio::test]
async fn a_key_is_checked_where_one_is_loaded() {
    let (folder, volume) = (tempfile::tempdir().unwrap(), DatasetName::new("tank/v").unwrap());
    let script = folder.path().join("loaded");
    let text = "[ $# = 1 ] && { printf '\tload-key <filesystem>\n' >&2; exit 2; }\n\
        [ \"$2\" = version ] && { echo zfs-2.3.2-1; exit; }\n\
        [ \"$3\" = -n ] || { echo \"Key load error: Key already loaded for 'tank/v'.\" >&2; exit 1; }\n\
        [ \"$(cat)\" = 'correct horse' ] || { echo \"Key load error: Incorrect key provided for 'tank/v'.\" >&2; exit 1; }\n";
    std::fs::write(&script, text).unwrap();
    let zfs = CommandLine::new(Runner::new().with_prefix(["sh", script.to_str().unwrap()]));
    zfs.load_key(&volume, &Key::passphrase("correct horse").unwrap()).await.unwrap();
    let wrong = zfs.load_key(&volume, &Key::passphrase("another horse").unwrap()).await;
    assert_eq!(kind(wrong), ErrorKind::WrongKey);
}

#[tokio::test]
async fn commands_are_the_ones_under_the_new_root() {
    let root = tempfile::tempdir().unwrap();
    let put = |from: &str, to: &str| {
        let to = root.path().join(to);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(from, to).unwrap();
    };
    // A `zpool` that says what it was asked, and what it needs to run.
    put("/bin/echo", "usr/sbin/zpool");
    let libraries = std::process::Command::new("ldd").arg("/bin/echo").output().unwrap();
    for word in String::from_utf8_lossy(&libraries.stdout).split_whitespace().filter(|word| word.starts_with('/')) {
        put(word, &word[1..]);
    }
    let zfs = CommandLine::new(Runner::new().with_chroot(root.path()));
    let said = zfs.pool_health(&DatasetName::new("tank/v").unwrap()).await.unwrap();
    assert_eq!(said, PoolHealth::Unknown("list -H -o health tank".into()));
}

/// How many ends of pipes a process has.
fn pipes(process: u32) -> usize {
    let all = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let targets = all.filter_map(|it| std::fs::read_link(it.unwrap().path()).ok());
    targets.filter(|it| it.to_string_lossy().starts_with("pipe:")).count()
}

#[tokio::test]
async fn a_killed_receive_leaves_nothing() {
    let (a, b) = (Real::start(), Real::start());
    let (stream, target) = (truncated_stream(&a).await, b.pool().child("v").unwrap());
    let before = pipes(b.node.pid());
    // The future is dropped, and with it the process: nobody closes the stream in an orderly way.
    let mut receive = b.zfs().receive(&target, &ReceiveOptions::default()).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut receive, &stream).await.unwrap();
    drop(receive);
    let begin = Instant::now();
    while b.node.run(&["ps", "-o", "args=", "-e"]).contains(&format!("zfs recv -u {target}")) {
        assert!(begin.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(50));
    }
    // The daemon has its own end of the stream, and closes it when it has taken back what came. Whoever looks at the dataset at that moment keeps
    // zfs-fuse from it (OpenZFS keeps what has begun to come apart).
    while pipes(b.node.pid()) > before {
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(50));
    }
    let found = b.zfs().dataset(&target).await;
    assert_eq!(kind(found), ErrorKind::NotFound);
}

#[tokio::test]
async fn faults_come_where_they_were_asked_for() {
    let zfs = memory();
    let name = |short: &str| DatasetName::new(format!("tank/{short}")).unwrap();
    zfs.inject("create_filesystem", 2, Fault::Fail(ErrorKind::NoSpace));
    zfs.inject("snapshot", 1, Fault::FailAfter(ErrorKind::Timeout));
    zfs.inject("mount", 1, Fault::Hang);
    zfs.create_filesystem(&name("a"), &[], None).await.unwrap();
    assert_eq!(kind(zfs.create_filesystem(&name("b"), &[], None).await), ErrorKind::NoSpace);
    assert_eq!(kind(zfs.dataset(&name("b")).await), ErrorKind::NotFound);
    zfs.create_filesystem(&name("b"), &[], None).await.unwrap();
    assert_eq!(kind(zfs.snapshot(&name("a").snapshot("s").unwrap()).await), ErrorKind::Timeout);
    assert_eq!(zfs.snapshots(&name("a")).await.unwrap().len(), 1);
    let hung = tokio::time::timeout(Duration::from_millis(50), zfs.mount(&name("a"))).await;
    assert!(hung.is_err());
    zfs.set_imported(false);
    assert_eq!(kind(zfs.dataset(&name("a")).await), ErrorKind::PoolUnavailable);
}
