//! The limit: ZFS on a node, without Kubernetes and without Portolan.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout},
};

use anyhow::{Context, Result, ensure};
use portolan_e2e::lab::Lab;

/// Below it is all that is made without Portolan.
pub const ROOT: &str = "portolan/bench";
/// Where it is mounted, and what else a run puts on the node.
pub const FOLDER: &str = "/var/lib/portolan-bench";

/// Runs each line that it reads and answers with the exit status, microseconds before and after, and the file of what it printed. The
/// shell's own clock: no program is started to look at it.
const LOOP: &str = r#"out=$(mktemp)
while IFS= read -r line; do
  a=$EPOCHREALTIME; eval "$line" > "$out" 2>&1 < /dev/null; status=$?; b=$EPOCHREALTIME
  echo "$status $(( ${b/./} - ${a/./} )) $(head -c 400 "$out" | tr '\n' ' ')"
done
rm -f "$out""#;

/// One shell on a node that stays, so that a command's time has no other program's start in it than its own.
pub struct Bare {
    shell: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Bare {
    /// The shell on a node, with an empty [`ROOT`].
    ///
    /// # Errors
    /// When the node does not answer.
    pub fn start(lab: &Lab, node: &str) -> Result<Self> {
        let mut shell = lab.start(&["node", node, "env", "LC_ALL=C", "bash", "-c", LOOP])?;
        let commands = shell.stdin.take();
        let answers = BufReader::new(shell.stdout.take().context("its standard output is a pipe")?);
        let mut bare = Self { shell, commands, answers };
        bare.clean_up()?;
        bare.time(&format!("zfs create -o canmount=off -o mountpoint=none {ROOT}"))?;
        Ok(bare)
    }

    /// Runs a command; returns the milliseconds that it took.
    ///
    /// # Errors
    /// When it fails, with what it printed.
    pub fn time(&mut self, command: &str) -> Result<f64> {
        let commands = self.commands.as_mut().context("the shell is there")?;
        writeln!(commands, "{command}")?;
        commands.flush()?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        let mut words = answer.trim_end().splitn(3, ' ');
        let (status, microseconds) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        ensure!(status == "0", "on the node: {command}: exit status {status}: {}", words.next().unwrap_or_default());
        Ok(microseconds.parse::<f64>().with_context(|| format!("on the node: {command}: {answer}"))? / 1000.0)
    }

    /// Takes away what a run has made without Portolan.
    ///
    /// # Errors
    /// When something is still in use.
    pub fn clean_up(&mut self) -> Result<()> {
        // zfs-fuse calls a dataset busy for a moment after it was unmounted.
        self.time(&format!(
            "for i in $(seq 50); do ! zfs list {ROOT} > /dev/null 2>&1 || zfs destroy -R {ROOT} && break; sleep 0.1; done; \
             ! zfs list {ROOT} > /dev/null 2>&1"
        ))?;
        self.time(&format!("rm -rf --one-file-system {FOLDER}")).map(drop)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // The loop ends with its input.
        drop(self.commands.take());
        let _ = self.shell.wait();
    }
}

/// The dataset of this name.
pub fn dataset(name: &str) -> String {
    format!("{ROOT}/{name}")
}

/// The options of `zfs create` and `zfs clone` that Portolan uses for a volume of this size, under names that nobody takes for Portolan's.
pub fn options(name: &str, bytes: u64) -> String {
    format!(
        "-o canmount=noauto -o mountpoint={FOLDER}/{name} -o atime=off -o refquota={bytes} \
         -o bench:volume={name} -o bench:uid=00000000-0000-0000-0000-000000000000"
    )
}
