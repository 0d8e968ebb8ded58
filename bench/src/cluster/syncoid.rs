//! What people use without Portolan: syncoid (Debian's package sanoid), by SSH.

use anyhow::{Context, Result, ensure};
use portolan_e2e::lab::Lab;

use crate::{bare::FOLDER, transfer::End};

/// Where the receiver's SSH server listens, on the nodes' own addresses.
const PORT: u16 = 7722;

/// An SSH server on the node that receives, and a key for it on the one that sends.
pub struct Syncoid;

impl Syncoid {
    /// None where the nodes haven't got the programs.
    ///
    /// # Errors
    /// When the server does not start.
    pub fn start(lab: &Lab, from: &mut End<'_>, to: &mut End<'_>) -> Result<Option<Self>> {
        let there = from.bare.time("command -v syncoid").and_then(|_| to.bare.time("command -v /usr/sbin/sshd"));
        if there.is_err() {
            return Ok(None);
        }
        let key = format!("{FOLDER}/key");
        to.bare.time(&format!(
            "mkdir -p /run/sshd {FOLDER} && rm -f {key} {key}.pub && ssh-keygen -q -t ed25519 -N '' -f {key} && \
             /usr/sbin/sshd -f /dev/null -h {key} -p {PORT} -o AuthorizedKeysFile={key}.pub -o StrictModes=no -o UsePAM=no \
             -o PidFile={FOLDER}/sshd.pid -E {FOLDER}/sshd.log"
        ))?;
        let private = lab.on_node(&to.node, &format!("cat {key}"))?;
        let write = "umask 077 && mkdir -p \"${0%/*}\" && cat > \"$0\"";
        lab.pipe_on_node(&from.node, write, &key, private.as_bytes())?;
        Ok(Some(Self))
    }

    /// Milliseconds until all snapshots of a dataset are in one on the other node.
    ///
    /// # Errors
    /// When it fails.
    pub fn send(&self, from: &mut End<'_>, to: &mut End<'_>, dataset: &str, target: &str) -> Result<f64> {
        let address = &to.address;
        let took = from.bare.time(&format!(
            "syncoid --no-sync-snap --no-privilege-elevation --quiet --sshkey {FOLDER}/key --sshport {PORT} \
             --sshoption StrictHostKeyChecking=no --sshoption UserKnownHostsFile=/dev/null --sshoption LogLevel=ERROR \
             {dataset} root@{address}:{target}"
        ))?;
        to.bare.time(&format!("zfs list {target}@one")).context("syncoid has not brought the snapshot")?;
        ensure!(took > 0.0, "syncoid took no time");
        Ok(took)
    }

    /// Ends the server.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn stop(self, to: &mut End<'_>) -> Result<()> {
        to.bare.time(&format!("kill $(cat {FOLDER}/sshd.pid)")).map(drop)
    }
}
