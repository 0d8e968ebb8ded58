//! Two nodes as namespaces with a wire between them, and pods as namespaces on them.

use std::{
    io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use portolan_net::{Dataplane, Namespace};

/// A root directory with namespaces in it, which go with it.
pub struct Node {
    root: tempfile::TempDir,
    /// Its address on the wire.
    pub address: Ipv4Addr,
    pub dataplane: Dataplane,
}

impl Node {
    fn new(address: Ipv4Addr) -> Result<Self> {
        let root = tempfile::tempdir()?;
        std::fs::create_dir_all(root.path().join("run/netns"))?;
        let dataplane = Dataplane::new(root.path()).with_underlay(path("host"));
        let node = Self { root, address, dataplane };
        node.netns("host")?;
        Ok(node)
    }

    /// Two of them, joined by a veth pair `u0`.
    pub fn two() -> Result<[Self; 2]> {
        let nodes = [Self::new(Ipv4Addr::new(192, 0, 2, 1))?, Self::new(Ipv4Addr::new(192, 0, 2, 2))?];
        let other = nodes[1].file("host").display().to_string();
        nodes[0].ip("host", &format!("link add u0 type veth peer name u0 netns {other}"))?;
        for node in &nodes {
            node.ip("host", &format!("address add {}/24 dev u0", node.address))?;
            node.ip("host", "link set u0 up")?;
        }
        Ok(nodes)
    }

    /// The file of a namespace, as this process sees it.
    pub fn file(&self, namespace: &str) -> PathBuf {
        self.root.path().join("run/netns").join(namespace)
    }

    /// Makes a namespace and brings its loopback up.
    pub fn netns(&self, name: &str) -> Result<()> {
        let file = self.file(name);
        std::fs::write(&file, "")?;
        run("unshare", &[&format!("--net={}", file.display()), "ip", "link", "set", "lo", "up"]).map(drop)
    }

    /// Runs `ip` with these words in a namespace.
    pub fn ip(&self, namespace: &str, words: &str) -> Result<()> {
        self.run_in(namespace, &format!("ip {words}"))
    }

    /// Runs these words in a namespace.
    pub fn run_in(&self, namespace: &str, words: &str) -> Result<()> {
        self.ask_in(namespace, words).map(drop)
    }

    /// Runs these words in a namespace; returns what they print.
    pub fn ask_in(&self, namespace: &str, words: &str) -> Result<String> {
        let enter = format!("--net={}", self.file(namespace).display());
        let words: Vec<&str> = [enter.as_str()].into_iter().chain(words.split(' ')).collect();
        run("nsenter", &words)
    }

    /// What has one end in a namespace.
    pub fn end(&self, namespace: &str, address: Ipv4Addr) -> End {
        End { root: self.root.path().to_owned(), namespace: namespace.to_owned(), address }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.root.path().join("run/netns")).into_iter().flatten().flatten() {
            let _ = Command::new("umount").arg("-l").arg(entry.path()).status();
        }
    }
}

/// One end of what is measured: a namespace, and its address there.
#[derive(Clone, Debug)]
pub struct End {
    root: PathBuf,
    namespace: String,
    pub address: Ipv4Addr,
}

impl End {
    /// Runs `work` inside, on a thread of its own.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> Result<T> {
        Ok(Namespace::open(&self.root, &path(&self.namespace))?.run(work)?)
    }

    /// A program to be run inside.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.root.join("run/netns").join(&self.namespace).display())).arg(program);
        command
    }
}

/// A namespace's path, as its node sees it.
pub fn path(namespace: &str) -> PathBuf {
    Path::new("/run/netns").join(namespace)
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| program.to_owned())?;
    ensure!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}
