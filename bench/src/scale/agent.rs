//! The agent as a process of its own, so that what it uses is its own: this program, started once more.

use std::{
    path::PathBuf,
    process::{Child, Command},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use portolan_tests::node::{Node, run_agent};
use tokio_util::sync::CancellationToken;

/// The first argument by which this program is the agent.
const ROLE: &str = "agent";
/// How long the agent may take to hear of everything.
const PATIENCE: Duration = Duration::from_secs(300);

/// An agent that runs, until it is dropped.
pub struct Agent(Child);

impl Agent {
    /// Starts the agent of a node whose API server is at that URL.
    pub fn start(node: &Node, api: &str) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        Ok(Self(command.arg(ROLE).arg(node.root()).arg(api).spawn().context("start the agent")?))
    }

    /// Waits until it has heard of everything.
    pub fn wait_until_ready(&mut self, node: &Node) -> Result<Duration> {
        let begun = Instant::now();
        while !node.socket().exists() || node.status().is_err() {
            if let Some(status) = self.0.try_wait()? {
                bail!("the agent ended: {status}");
            }
            ensure!(begun.elapsed() < PATIENCE, "the agent is not ready after {} s", PATIENCE.as_secs());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(begun.elapsed())
    }

    /// Its resident memory in MiB (proc_pid_status(5)).
    pub fn memory(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS of the agent")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    }

    /// The seconds of processors that it has used (proc_pid_stat(5): the 14th and 15th field, in ticks of a hundredth of a second).
    pub fn processor(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        // After the program's name, which may have spaces and ends at the last bracket, comes the third field.
        let (_, rest) = stat.rsplit_once(')').context("stat of the agent")?;
        let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
        Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Is the agent, if this program was started as such; then it doesn't return but with an error.
pub fn be_agent_if_asked() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, role, root, api] = &arguments[..] else { return Ok(()) };
    ensure!(role == ROLE, "arguments: none, but {ROLE:?} as given by this program itself");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut config = kube::Config::new(api.parse()?);
        config.default_namespace = "default".into();
        let client = kube::Client::try_from(config)?;
        run_agent(PathBuf::from(root), client, CancellationToken::new()).await?;
        bail!("the agent ended")
    })
}
