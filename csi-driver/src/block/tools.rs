//! The host's own programs: `mkfs`, `mount`, `blkid` and their kind, run below the host's root as `zfs` is.

use std::future::Future;
use std::io::ErrorKind;
use std::process::Stdio;
use std::time::Duration;

use portolan_zfs::Runner;

/// A program that failed, with all that is needed to understand it from a log line.
#[derive(Clone, Debug, thiserror::Error)]
#[error("`{command}` failed{}: {}", status.map(|code| format!(" (exit status {code})")).unwrap_or_default(), one_line(said))]
pub struct ToolError {
    /// The command line.
    pub command: String,
    /// The exit status; none if it didn't start, was killed or ran out of time.
    pub status: Option<i32>,
    /// What it printed, or why it didn't run.
    pub said: String,
}

/// What a program printed and how it ended.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// The exit status; none if it was killed.
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs programs.
pub trait Tools: Send + Sync {
    /// Runs a program to its end, whatever its exit status, for `deadline` at most.
    fn run(&self, words: &[&str], deadline: Duration) -> impl Future<Output = Result<Output, ToolError>> + Send;

    /// The same; its exit status must be 0.
    fn succeed(&self, words: &[&str], deadline: Duration) -> impl Future<Output = Result<Output, ToolError>> + Send {
        async move {
            let output = self.run(words, deadline).await?;
            if output.status == Some(0) { Ok(output) } else { Err(output.failure(words)) }
        }
    }
}

impl Output {
    /// This end as a failure. Some programs say on standard output what is wrong.
    pub fn failure(&self, words: &[&str]) -> ToolError {
        let said = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        ToolError { command: words.join(" "), status: self.status, said: said.clone() }
    }
}

/// The host's.
#[derive(Clone, Debug)]
pub struct Host(pub Runner);

impl Tools for Host {
    async fn run(&self, words: &[&str], deadline: Duration) -> Result<Output, ToolError> {
        let failed = |said: String| ToolError { command: words.join(" "), status: None, said };
        let owned: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let mut command = self.0.command(&owned).map_err(|error| failed(error.stderr))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                failed(format!("it is not installed on this node: {} has it", package(words.first().unwrap_or(&""))))
            }
            _ => failed(format!("did not start: {error}")),
        })?;
        // On expiry the future is dropped, which kills the child.
        match tokio::time::timeout(deadline, child.wait_with_output()).await {
            Err(_) => Err(failed(format!("killed after {deadline:?}"))),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Ok(Ok(output)) => Ok(Output {
                status: output.status.code(),
                stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            }),
        }
    }
}

/// The package that brings a program, by the name that most distributions give it.
fn package(program: &str) -> &'static str {
    match program {
        "mkfs.ext4" | "e2fsck" | "resize2fs" => "package e2fsprogs",
        "mkfs.xfs" | "xfs_growfs" => "package xfsprogs",
        _ => "package util-linux",
    }
}

/// The first lines of a message as one.
fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).take(4).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_failure_says_what_was_run_and_what_it_said() {
        let host = Host(Runner::new());
        assert_eq!(host.succeed(&["echo", "hi"], SOON).await.unwrap().stdout, "hi\n");
        let error = host.succeed(&["ls", "/no/such"], SOON).await.unwrap_err();
        assert_eq!(error.status, Some(2));
        assert!(error.to_string().starts_with("`ls /no/such` failed (exit status 2): ls: cannot access"), "{error}");
        let error = host.run(&["sleep", "60"], Duration::from_millis(50)).await.unwrap_err();
        assert!(error.to_string().contains("killed after 50ms"), "{error}");
        let error = Host(Runner::new().with_chroot("/proc")).run(&["mkfs.xfs"], SOON).await.unwrap_err();
        assert!(error.to_string().contains("package xfsprogs"), "{error}");
    }
}
