//! Block devices and the filesystems on them: loop devices stand for zvols, which need OpenZFS. Each test runs in a mount namespace of
//! its own.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use portolan_csi::block::device::{Device, DeviceError};
use portolan_csi::block::filesystem::{self, Content, FilesystemError, Kind};
use portolan_csi::block::mounts::Mounts;
use portolan_csi::block::prepare::{FORMATTING, PrepareError, prepare};
use portolan_csi::block::tools::Host;
use portolan_zfs::memory::Memory;
use portolan_zfs::{Capabilities, DatasetName, Property, Runner, Zfs};
use rustix::mount::MountFlags;
use tempfile::TempDir;

const SIZE: u64 = 320 << 20;
const LATER: u64 = 480 << 20;
const SOON: Duration = Duration::from_millis(200);

fn run(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap_or_else(|e| panic!("{}: {e}", words[0]));
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// True in a process that has a mount namespace of its own: the test's second run, started by its first.
fn alone(test: &str) -> bool {
    const MARK: &str = "PORTOLAN_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"]);
    command
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("block::{test}"), "--nocapture"])
        .env(MARK, "1");
    let output = command.output().expect("setpriv and unshare of util-linux are needed");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("1 passed"), "the test did not run: {said}");
    said.lines().filter(|line| line.starts_with("SKIPPED")).for_each(|line| println!("{line}"));
    false
}

/// A loop device on a sparse file. It goes when nobody has it open any more, however this process ends.
struct Loop {
    folder: TempDir,
    path: String,
    _open: File,
}

impl Loop {
    fn new(size: u64) -> Self {
        let folder = TempDir::with_prefix("portolan-block-").unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(size).unwrap();
        Self::on(folder)
    }

    fn on(folder: TempDir) -> Self {
        let path = run(&["losetup", "--find", "--show", folder.path().join("image").to_str().unwrap()]);
        let open = File::open(&path).unwrap();
        run(&["losetup", "--detach", &path]);
        // An earlier user's setting stays with the number.
        run(&["blockdev", "--setrw", &path]);
        Self { folder, path, _open: open }
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn device(&self) -> Device {
        Device::find(&mounts(), Path::new(&self.path)).unwrap().unwrap()
    }

    fn grow(&self, size: u64) {
        File::options().write(true).open(self.image()).unwrap().set_len(size).unwrap();
        run(&["losetup", "--set-capacity", &self.path]);
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let mut device = File::options().write(true).open(&self.path).unwrap();
        device.seek(SeekFrom::Start(at)).unwrap();
        device.write_all(bytes).unwrap();
        device.sync_all().unwrap();
    }
}

fn mounts() -> Mounts {
    Mounts::new("/")
}

fn host() -> Host {
    Host(Runner::new())
}

/// A zvol that the loop device stands for.
async fn zvol() -> (Memory, DatasetName) {
    let zfs = Memory::new(&DatasetName::new("tank").unwrap(), 1 << 40).with_capabilities(Capabilities::all());
    let dataset = DatasetName::new("tank/pvc-1").unwrap();
    zfs.create_volume(&dataset, SIZE, &[], None).await.unwrap();
    (zfs, dataset)
}

/// What fits, in MiB.
fn mebibytes(path: &Path) -> u64 {
    let stat = rustix::fs::statvfs(path).unwrap();
    (stat.f_blocks * stat.f_frsize) >> 20
}

/// Whether we may do what the kernel asks CAP_SYS_RESOURCE for (capabilities(7): number 24).
fn can_resize() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() >> 24 & 1 == 1
}

async fn lives(kind: Kind) {
    let (disk, host, (zfs, dataset)) = (Loop::new(SIZE), host(), zvol().await);
    let (device, at) = (disk.device(), disk.folder.path().join("mnt"));
    fs::create_dir(&at).unwrap();
    assert_eq!(filesystem::look(&host, &device).await.unwrap(), Content::Blank);
    assert!(prepare(&host, &zfs, &dataset, 1, &device, kind).await.unwrap());
    filesystem::mount(&host, &device, kind, &at, &[]).await.unwrap();
    fs::write(at.join("file"), "content").unwrap();
    assert_eq!(mounts().of_device(device.number()).unwrap(), [at.as_path()]);

    // While it is mounted nobody can take it for something else.
    let held = filesystem::look(&host, &device).await.unwrap_err();
    assert!(matches!(held, FilesystemError::Device(DeviceError::Held(_))), "{held}");
    assert!(filesystem::format(&host, &device, kind).await.is_err());

    let before = mebibytes(&at);
    filesystem::grow(&host, &device, kind, &at).await.unwrap();
    assert_eq!(mebibytes(&at), before);
    disk.grow(LATER);
    assert_eq!(device.size().await.unwrap(), LATER);
    match filesystem::grow(&host, &device, kind, &at).await {
        Err(error) if kind == Kind::Ext4 && !can_resize() => {
            assert!(error.to_string().contains("Permission denied"), "{error}");
            println!("SKIPPED: growing ext4 while it is mounted: root has no CAP_SYS_RESOURCE here");
        }
        grown => {
            grown.unwrap();
            assert!(mebibytes(&at) > before + 100, "{before} MiB, then {}", mebibytes(&at));
        }
    }

    mounts().unmount(&at).unwrap();
    assert_eq!(filesystem::look(&host, &device).await.unwrap(), Content::Signed(kind.name().into()));
    assert!(!prepare(&host, &zfs, &dataset, 1, &device, kind).await.unwrap());

    // Its clone has its UUID, and both may be mounted.
    let folder = TempDir::with_prefix("portolan-block-").unwrap();
    fs::copy(disk.image(), folder.path().join("image")).unwrap();
    let (clone, other) = (Loop::on(folder), disk.folder.path().join("clone"));
    fs::create_dir(&other).unwrap();
    filesystem::mount(&host, &device, kind, &at, &["noatime".into()]).await.unwrap();
    filesystem::mount(&host, &clone.device(), kind, &other, &[]).await.unwrap();
    assert_eq!(fs::read_to_string(other.join("file")).unwrap(), "content");
    mounts().unmount(&other).unwrap();
    mounts().unmount(&at).unwrap();
}

#[tokio::test]
async fn ext4_lives_on_a_device() {
    if alone("ext4_lives_on_a_device") {
        lives(Kind::Ext4).await;
    }
}

#[tokio::test]
async fn xfs_lives_on_a_device() {
    if alone("xfs_lives_on_a_device") {
        lives(Kind::Xfs).await;
    }
}

#[tokio::test]
async fn what_holds_anything_is_not_formatted() {
    if !alone("what_holds_anything_is_not_formatted") {
        return;
    }
    let (host, (zfs, dataset)) = (host(), zvol().await);
    // Without any signature, where blkid looks and where it doesn't, at the beginning and at the end.
    for at in [0, 100_000, SIZE - 5000] {
        let disk = Loop::new(SIZE);
        disk.write(at, b"somebody's data");
        let error = prepare(&host, &zfs, &dataset, 1, &disk.device(), Kind::Ext4).await.unwrap_err();
        assert!(matches!(error, PrepareError::Filesystem(FilesystemError::Foreign { .. })), "{error}");
        assert_eq!(fs::read(disk.image()).unwrap().iter().filter(|byte| **byte != 0).count(), 15, "at {at}");
    }
    let disk = Loop::new(SIZE);
    run(&["mkfs.ext4", "-q", &disk.path]);
    let error = prepare(&host, &zfs, &dataset, 1, &disk.device(), Kind::Xfs).await.unwrap_err();
    assert!(error.to_string().contains("holds ext4 and should hold xfs"), "{error}");
}

#[tokio::test]
async fn a_format_that_was_cut_short_is_begun_again_at_its_own_epoch_only() {
    if !alone("a_format_that_was_cut_short_is_begun_again_at_its_own_epoch_only") {
        return;
    }
    let (disk, host, (zfs, dataset)) = (Loop::new(SIZE), host(), zvol().await);
    let device = disk.device();
    disk.write(70_000, b"half a filesystem");
    zfs.set_property(&dataset, &Property::new(FORMATTING, "3").unwrap()).await.unwrap();
    assert!(prepare(&host, &zfs, &dataset, 4, &device, Kind::Ext4).await.is_err());
    assert!(prepare(&host, &zfs, &dataset, 3, &device, Kind::Ext4).await.unwrap());
    // It is done: what is there now stays.
    assert!(!prepare(&host, &zfs, &dataset, 3, &device, Kind::Ext4).await.unwrap());
    assert!(prepare(&host, &zfs, &dataset, 3, &device, Kind::Xfs).await.is_err());
}

#[tokio::test]
async fn a_damaged_filesystem_is_left_to_a_person() {
    if !alone("a_damaged_filesystem_is_left_to_a_person") {
        return;
    }
    let (disk, host, (zfs, dataset)) = (Loop::new(SIZE), host(), zvol().await);
    run(&["mkfs.ext4", "-q", &disk.path]);
    for request in ["clri <2>", "set_super_value state 2"] {
        run(&["debugfs", "-w", "-R", request, &disk.path]);
    }
    let error = prepare(&host, &zfs, &dataset, 1, &disk.device(), Kind::Ext4).await.unwrap_err();
    assert!(matches!(error, PrepareError::Filesystem(FilesystemError::Damaged { .. })), "{error}");
    assert!(error.to_string().contains(&format!("run `e2fsck {}`", disk.path)), "{error}");
}

#[tokio::test]
async fn nobody_can_write_a_device_that_is_read_only_and_not_held() {
    if !alone("nobody_can_write_a_device_that_is_read_only_and_not_held") {
        return;
    }
    let (disk, host) = (Loop::new(SIZE), host());
    let (path, at) = (PathBuf::from(&disk.path), disk.folder.path().join("mnt"));
    fs::create_dir(&at).unwrap();
    let check = || async { Device::check_unwritable(&mounts(), &path, SOON).await };
    assert!(matches!(check().await, Err(DeviceError::StillWritable(_))));
    assert!(Device::wait_writable(&mounts(), &path, SOON).await.is_ok());
    filesystem::format(&host, &disk.device(), Kind::Ext4).await.unwrap();
    run(&["blockdev", "--setro", &disk.path]);
    check().await.unwrap();
    assert!(matches!(Device::wait_writable(&mounts(), &path, SOON).await, Err(DeviceError::StillReadOnly(_))));
    filesystem::mount(&host, &disk.device(), Kind::Ext4, &at, &["ro".into()]).await.unwrap();
    assert!(matches!(check().await, Err(DeviceError::Held(_))));
    mounts().unmount(&at).unwrap();
    let absent = Device::check_unwritable(&mounts(), Path::new("/dev/zvol/no/such"), SOON).await;
    assert!(matches!(absent, Err(DeviceError::Missing(_))));
}

#[tokio::test]
async fn a_raw_device_is_seen_where_its_node_is_mounted() {
    if !alone("a_raw_device_is_seen_where_its_node_is_mounted") {
        return;
    }
    let (disk, other) = (Loop::new(SIZE), Loop::new(SIZE));
    let target = disk.folder.path().join("pods/target");
    for readonly in [false, true] {
        mounts().make_file(&target).unwrap();
        let flags = if readonly { MountFlags::RDONLY } else { MountFlags::empty() };
        mounts().bind(Path::new(&disk.path), &target, flags).unwrap();
        let mount = mounts().at(&target).unwrap().unwrap();
        assert_eq!((mounts().node_at(&mount), mount.readonly), (Some(disk.device().number()), readonly));
        assert_eq!(mounts().of_device(disk.device().number()).unwrap(), [target.as_path()]);
        assert!(mounts().of_device(other.device().number()).unwrap().is_empty());
        mounts().unmount(&target).unwrap();
        mounts().remove_target(&target).unwrap();
        assert!(!target.exists() && mounts().of_device(disk.device().number()).unwrap().is_empty());
    }
}
