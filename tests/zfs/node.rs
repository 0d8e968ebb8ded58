//! A node with a pool: a zfs-fuse daemon in a mount namespace of its own, a pool on a sparse file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use portolan_zfs::{CommandLine, DatasetName, Runner};
use tempfile::TempDir;

/// Moves the daemon into its own view of the three folders it shares with its tools, and becomes it. `setpriv` ends it with this test process.
const START: &str = "mkdir -p /run/zfs /var/lib/zfs /run/lock/zfs && mount --bind \"$0/run\" /run/zfs && mount --bind \"$0/lib\" /var/lib/zfs \
    && mount --bind \"$0/lock\" /run/lock/zfs && exec zfs-fuse -n --no-kstat-mount -m 64";

/// A running daemon with the pool `tank`. Dropping it ends the daemon and removes everything.
pub struct ZfsFuseNode {
    folder: TempDir,
    daemon: Child,
}

impl ZfsFuseNode {
    /// Starts a daemon and makes a pool of `megabytes`.
    pub fn start(megabytes: u64) -> Self {
        let programs = ["/usr/sbin/zfs-fuse", "/sbin/zfs-fuse"];
        assert!(programs.iter().any(|path| Path::new(path).exists()), "zfs-fuse is missing: apt-get install zfs-fuse");
        let folder = TempDir::with_prefix("portolan-zfs-").unwrap();
        for part in ["run", "lib", "lock", "mnt"] {
            fs::create_dir(folder.path().join(part)).unwrap();
        }
        let disk = folder.path().join("disk");
        File::create(&disk).unwrap().set_len(megabytes << 20).unwrap();
        let daemon = spawn(folder.path());
        let mut node = Self { folder, daemon };
        node.wait_for_socket();
        node.run(&["zpool", "create", "-m", "none", "tank", disk.to_str().unwrap()]);
        node
    }

    /// The pool.
    pub fn pool(&self) -> DatasetName {
        DatasetName::new("tank").unwrap()
    }

    /// Where this node's datasets may be mounted, as the node sees it.
    pub fn mountpoint(&self, volume: &str) -> PathBuf {
        self.folder.path().join("mnt").join(volume)
    }

    /// The same folder as we see it: through the daemon's mount namespace.
    pub fn files(&self, volume: &str) -> PathBuf {
        let inside = self.mountpoint(volume);
        Path::new("/proc").join(self.pid().to_string()).join("root").join(inside.strip_prefix("/").unwrap())
    }

    /// Runs commands in the node's namespace.
    pub fn runner(&self) -> Runner {
        Runner::new().with_prefix(["nsenter", "-t", &self.pid().to_string(), "-m", "--"])
    }

    /// The node's ZFS.
    pub fn zfs(&self) -> CommandLine {
        CommandLine::new(self.runner())
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.daemon.id()
    }

    /// Sends the daemon a signal: `STOP`, `CONT`, `KILL`.
    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([format!("-{signal}"), self.pid().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Runs a command in the node, past the interface under test; it must succeed.
    pub fn run(&self, words: &[&str]) -> String {
        let prefix = ["-t", &self.pid().to_string(), "-m", "--"].map(str::to_owned);
        let output = Command::new("nsenter").args(prefix).args(words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn wait_for_socket(&mut self) {
        let socket = self.folder.path().join("run/zfs_socket");
        let begin = Instant::now();
        while !socket.exists() {
            let ended = self.daemon.try_wait().unwrap();
            let log = || fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(ended.is_none(), "zfs-fuse ended: {ended:?}: {}", log());
            assert!(begin.elapsed() < Duration::from_secs(20), "zfs-fuse doesn't answer: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn spawn(folder: &Path) -> Child {
    let log = File::create(folder.join("log")).unwrap();
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private", "sh", "-c", START])
        .arg(folder)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("setpriv and unshare of util-linux are needed")
}

impl Drop for ZfsFuseNode {
    fn drop(&mut self) {
        // A daemon takes up to 5 s to end when asked; nothing on this pool is worth them. Its mounts end with its namespace.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
