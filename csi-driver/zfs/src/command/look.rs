//! Finds out which ZFS there is.

use super::{CommandLine, odd_output};
use crate::error::{ErrorKind, ZfsError};
use crate::probe::{self, Capabilities, Implementation, Probe};

impl CommandLine {
    pub(super) async fn look(&self) -> Result<Probe, ZfsError> {
        let run = async |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            self.runner.run_any(&words).await.map(|output| (words, output))
        };
        let (_, usage) = run(&["zfs"]).await?;
        let (words, version) = run(&["zfs", "version"]).await?;
        if version.status == Some(0) {
            let version = probe::openzfs_version(&version.stdout)
                .ok_or_else(|| odd_output(&["zfs", "version"], &version.stdout))?;
            let implementation = Implementation::OpenZfs;
            return Ok(Probe {
                implementation,
                version,
                capabilities: probe::capabilities(&usage.stderr, implementation),
            });
        }
        let failed = ZfsError::exited(words.join(" "), version.status, version.stderr);
        if failed.kind == ErrorKind::PoolUnavailable {
            return Err(failed);
        }
        let (_, upgrade) = run(&["zpool", "upgrade", "-v"]).await?;
        // zfs-fuse doesn't say its version. 23 is that of the pools of 0.7.0, its last.
        let version = match probe::pool_version(&upgrade.stdout) {
            Some(23) => "0.7.0".to_owned(),
            Some(other) => format!("with pool version {other}"),
            None => return Err(failed),
        };
        let implementation = Implementation::ZfsFuse;
        Ok(Probe { implementation, version, capabilities: probe::capabilities(&usage.stderr, implementation) })
    }

    /// What was found at the first look.
    pub(super) async fn probed(&self) -> Result<&Probe, ZfsError> {
        self.probed.get_or_try_init(|| self.look()).await
    }

    /// Refuses by name, without running `command`, what this ZFS can't do.
    pub(super) async fn need(
        &self,
        capability: &str,
        can: impl Fn(&Capabilities) -> bool,
        command: &str,
    ) -> Result<(), ZfsError> {
        let probe = self.probed().await?;
        match can(&probe.capabilities) {
            true => Ok(()),
            false => Err(ZfsError::unsupported(command, probe, capability)),
        }
    }
}
