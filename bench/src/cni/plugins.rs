//! The plugins as programs, which are run as a container runtime runs them.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use portolan_tests::node::{Node, Pod, variables};
use serde_json::{Value, json};

/// Where the programs are.
pub struct Plugins {
    reference: PathBuf,
    portolan: PathBuf,
}

impl Plugins {
    /// Those of the environment, and Portolan's beside this program.
    pub fn find() -> Result<Self> {
        let reference = std::env::var_os("CNI_PLUGINS")
            .context("CNI_PLUGINS: the folder of the reference plugins is needed (make bench-cni gives it)")?;
        let plugins =
            Self { reference: reference.into(), portolan: std::env::current_exe()?.with_file_name("portolan-cni") };
        for program in
            [plugins.reference.join("bridge"), plugins.reference.join("host-local"), plugins.portolan.clone()]
        {
            ensure!(program.exists(), "{} is not there (make bench-cni builds it)", program.display());
        }
        Ok(plugins)
    }

    /// `bridge` with `host-local`, as the lab's nodes have them.
    pub fn bridge<'a>(&'a self, node: &'a Node) -> Bridge<'a> {
        let config = json!({
            "cniVersion": "1.0.0", "name": "lab",
            "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
            "ipam": {
                "type": "host-local", "dataDir": node.on_host(Path::new("/run/cni")),
                "ranges": [[{"subnet": "10.244.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}],
            },
        });
        Bridge { plugins: self, node, config: config.to_string() }
    }

    /// Portolan's, which asks the node's agent.
    pub fn portolan<'a>(&'a self, node: &'a Node) -> Portolan<'a> {
        Portolan { plugins: self, node }
    }
}

/// The reference plugins.
pub struct Bridge<'a> {
    plugins: &'a Plugins,
    node: &'a Node,
    config: String,
}

impl Bridge<'_> {
    /// ADD; returns its result, and the milliseconds that it took.
    pub fn add(&self, pod: &Pod) -> Result<(Value, f64)> {
        let (printed, took) = self.run("ADD", pod)?;
        Ok((serde_json::from_slice(&printed)?, took))
    }

    /// DEL; returns the milliseconds that it took.
    pub fn delete(&self, pod: &Pod) -> Result<f64> {
        Ok(self.run("DEL", pod)?.1)
    }

    fn run(&self, command: &str, pod: &Pod) -> Result<(Vec<u8>, f64)> {
        // It knows the node's directories as this process does.
        let pod = Pod { netns: self.node.on_host(&pod.netns), ..pod.clone() };
        let folder = &self.plugins.reference;
        run(self.node, &folder.join("bridge"), folder, (command, &pod), &self.config)
    }
}

/// Portolan's plugin.
pub struct Portolan<'a> {
    plugins: &'a Plugins,
    node: &'a Node,
}

impl Portolan<'_> {
    /// ADD of a pod that has what `previous` says; returns the milliseconds that it took.
    pub fn add(&self, pod: &Pod, previous: &Value) -> Result<f64> {
        self.run("ADD", pod, previous)
    }

    /// DEL; returns the milliseconds that it took.
    pub fn delete(&self, pod: &Pod, previous: &Value) -> Result<f64> {
        self.run("DEL", pod, previous)
    }

    fn run(&self, command: &str, pod: &Pod, previous: &Value) -> Result<f64> {
        let config = self.node.config(previous).to_string();
        Ok(run(self.node, &self.plugins.portolan, &self.plugins.reference, (command, pod), &config)?.1)
    }
}

/// Runs a plugin in the node's own namespace, and nowhere else: `bridge` makes a link there. Returns what it prints, and the milliseconds from its
/// start to its end.
fn run(node: &Node, program: &Path, folder: &Path, asked: (&str, &Pod), config: &str) -> Result<(Vec<u8>, f64)> {
    let (command, pod) = asked;
    let mut process = Command::new(program);
    process.envs(variables(command, Some(pod))).env("CNI_PATH", folder).stdin(Stdio::piped()).stdout(Stdio::piped());
    let (output, took) = node.inside("host", || {
        let begun = Instant::now();
        let mut child = process.spawn()?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(config.as_bytes())?;
        }
        Ok((child.wait_with_output()?, begun.elapsed()))
    });
    let printed = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{} {command} of {}: {printed}", program.display(), pod.name);
    Ok((output.stdout, took.as_secs_f64() * 1000.0))
}
