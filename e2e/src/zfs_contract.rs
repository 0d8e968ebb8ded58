//! The contract of `portolan-zfs`, held by the OpenZFS of the lab's nodes.

#![allow(clippy::panic, reason = "the contract's node has no other way to say that the lab fails it")]

use std::{sync::Mutex, time::Duration};

use anyhow::{Context, Result, bail};
use portolan_tests::contract::{self, Node};
use portolan_zfs::{CommandLine, DatasetName, Property, Runner};

use crate::lab::Lab;

/// Below it is all that the contract makes.
const ROOT: &str = "portolan/contract";
/// Where it is mounted.
const MOUNTS: &str = "/var/lib/portolan-contract";
/// An emulated processor takes its time.
const DEADLINE: Duration = Duration::from_secs(300);
/// Devices come after `zfs create` returns, and udev opens them once to look at them.
const WAIT_FOR_DEVICE: &str = "for i in $(seq 300); do [ ! -b \"$0\" ] || break; sleep 0.1; done; udevadm settle";

/// Runs the whole contract on the first two nodes.
///
/// # Errors
/// When the lab fails.
///
/// # Panics
/// Where the contract is broken.
pub fn play(lab: &Lab) -> Result<()> {
    let nodes = lab.nodes()?;
    let [a, b, ..] = &nodes[..] else { bail!("the lab has {} nodes: two are needed", nodes.len()) };
    let (a, b) = (Guest::new(lab, a)?, Guest::new(lab, b)?);
    lab.step(format!("the contract of portolan-zfs, on {} and {}", a.name, b.name));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(contract::holds(&a, &b));
    a.clean_up()?;
    b.clean_up()
}

struct Guest<'a> {
    lab: &'a Lab,
    name: String,
    zfs: CommandLine,
    root: DatasetName,
    /// The process that has a file open.
    holder: Mutex<Option<String>>,
}

impl<'a> Guest<'a> {
    fn new(lab: &'a Lab, name: &str) -> Result<Self> {
        let runner = Runner::new().with_prefix(lab.words_on_node(name)).with_deadline(DEADLINE);
        let root = DatasetName::new(ROOT).context("a dataset's name")?;
        let guest = Self { lab, name: name.to_owned(), zfs: CommandLine::new(runner), root, holder: Mutex::new(None) };
        guest.clean_up()?;
        lab.on_node(name, &format!("zfs create -o canmount=off -o mountpoint=none {ROOT}"))?;
        Ok(guest)
    }

    /// Takes away what this or an earlier run has left.
    fn clean_up(&self) -> Result<()> {
        self.lab.on_node(&self.name, &format!("! zfs list {ROOT} > /dev/null 2>&1 || zfs destroy -R {ROOT}")).map(drop)
    }

    fn pipe(&self, command: &str, path: &str, stdin: &[u8]) -> Vec<u8> {
        let done = self.lab.pipe_on_node(&self.name, command, path, stdin);
        done.unwrap_or_else(|error| panic!("{}: {error:?}", self.name))
    }

    fn file(dataset: &DatasetName) -> String {
        format!("{MOUNTS}/{}/content", dataset.short())
    }

    fn device(dataset: &DatasetName) -> String {
        dataset.device().display().to_string()
    }
}

impl Node for Guest<'_> {
    type Zfs = CommandLine;

    fn zfs(&self) -> &CommandLine {
        &self.zfs
    }

    fn pool(&self) -> DatasetName {
        self.root.clone()
    }

    fn mountpoint(&self, volume: &str) -> Property {
        Property::new("mountpoint", format!("{MOUNTS}/{volume}")).unwrap_or_else(|error| panic!("{error}"))
    }

    fn write(&self, dataset: &DatasetName, content: &[u8]) {
        self.pipe("cat > \"$0\"", &Self::file(dataset), content);
    }

    fn read(&self, dataset: &DatasetName) -> Vec<u8> {
        self.pipe("cat \"$0\"", &Self::file(dataset), b"")
    }

    fn write_device(&self, volume: &DatasetName, content: &[u8]) {
        let command = format!("{WAIT_FOR_DEVICE}; dd of=\"$0\" conv=notrunc,fsync status=none && udevadm settle");
        self.pipe(&command, &Self::device(volume), content);
    }

    fn read_device(&self, volume: &DatasetName, length: usize) -> Vec<u8> {
        self.pipe(&format!("{WAIT_FOR_DEVICE}; head -c {length} \"$0\""), &Self::device(volume), b"")
    }

    fn set_open(&self, dataset: &DatasetName, open: bool) {
        let mut holder = self.holder.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(process) = holder.take() {
            self.pipe("kill \"$0\"; while [ -d \"/proc/$0\" ]; do sleep 0.1; done; udevadm settle", &process, b"");
        }
        if open {
            let command = format!(
                "[ -b \"$0\" ] && file=$0 || file={}; sleep 3600 < \"$file\" > /dev/null 2>&1 & echo $!",
                Self::file(dataset)
            );
            let printed = self.pipe(&command, &Self::device(dataset), b"");
            *holder = Some(String::from_utf8_lossy(&printed).trim().to_owned());
        }
    }
}
