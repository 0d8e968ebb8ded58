//! Runs one command: where, with what environment, and for how long at most.

use std::ffi::{CString, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::error::{ErrorKind, ZfsError};

/// Where `zfs` and `zpool` are looked for: the same on the host and in a container.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin";

/// How commands are run.
#[derive(Clone, Debug)]
pub struct Runner {
    chroot: Option<PathBuf>,
    prefix: Vec<OsString>,
    deadline: Duration,
}

impl Default for Runner {
    fn default() -> Self {
        Self::new()
    }
}

impl Runner {
    /// Runs commands here, for 60 s at most.
    pub fn new() -> Self {
        Self { chroot: None, prefix: Vec::new(), deadline: Duration::from_secs(60) }
    }

    /// Runs them with `root` as root directory: the host's own userland, whatever is in our image.
    pub fn with_chroot(self, root: impl Into<PathBuf>) -> Self {
        Self { chroot: Some(root.into()), ..self }
    }

    /// Puts words before each command, `nsenter -t 42 -m --` for one. Error messages leave them out.
    pub fn with_prefix<S: Into<OsString>>(self, words: impl IntoIterator<Item = S>) -> Self {
        Self { prefix: words.into_iter().map(Into::into).collect(), ..self }
    }

    /// How long a command may take.
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// How long a command may take.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// A command, not yet started: in the runner's root and with a clean environment. It is killed when its `Child` is dropped; how long it
    /// may take is the caller's.
    ///
    /// # Errors
    /// When there are no words, or the root's name can't be passed on.
    pub fn command(&self, words: &[String]) -> Result<Command, ZfsError> {
        let failed = |why: String| ZfsError::new(ErrorKind::Other, words.join(" "), why);
        let mut all = self.prefix.iter().cloned().chain(words.iter().map(OsString::from));
        let mut command = Command::new(all.next().ok_or_else(|| failed("no command".into()))?);
        command.args(all).env_clear().env("LC_ALL", "C").env("PATH", SEARCH_PATH).kill_on_drop(true);
        if let Some(root) = &self.chroot {
            let root = CString::new(root.as_os_str().as_bytes()).map_err(|e| failed(e.to_string()))?;
            let enter = move || {
                rustix::process::chroot(root.as_c_str())?;
                rustix::process::chdir(c"/")?;
                Ok(())
            };
            // SAFETY: between fork and exec `enter` makes two system calls on memory prepared before: no allocation, no lock.
            unsafe { command.pre_exec(enter) };
        }
        Ok(command)
    }

    /// Runs a command to its end and gives what it printed on standard output and error; its exit status must be 0.
    pub(crate) async fn run(&self, words: &[String]) -> Result<Output, ZfsError> {
        let output = self.run_any(words).await?;
        if output.status == Some(0) {
            return Ok(output);
        }
        Err(ZfsError::exited(words.join(" "), output.status, output.stderr))
    }

    /// The same, with something to read on standard input: a key, which must not be seen in a list of processes.
    pub(crate) async fn run_with_input(&self, words: &[String], input: &[u8]) -> Result<Output, ZfsError> {
        let output = self.start(words, Some(input)).await?;
        if output.status == Some(0) {
            return Ok(output);
        }
        Err(ZfsError::exited(words.join(" "), output.status, output.stderr))
    }

    /// Runs a command to its end, whatever the exit status.
    pub(crate) async fn run_any(&self, words: &[String]) -> Result<Output, ZfsError> {
        self.start(words, None).await
    }

    async fn start(&self, words: &[String], input: Option<&[u8]>) -> Result<Output, ZfsError> {
        let mut command = self.command(words)?;
        let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| not_started(words, &e))?;
        if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
            // Far less than a pipe holds. A command that has ended already says by its status why it read nothing.
            let _ = stdin.write_all(input).await;
        }
        // On expiry the future is dropped, which kills the child; nobody waits for it: a process stuck in the kernel ends when it can.
        match tokio::time::timeout(self.deadline, child.wait_with_output()).await {
            Err(_) => Err(timed_out(words, self.deadline)),
            Ok(Err(error)) => Err(ZfsError::new(ErrorKind::Other, words.join(" "), error.to_string())),
            Ok(Ok(output)) => Ok(Output {
                status: output.status.code(),
                stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            }),
        }
    }
}

/// What a command printed and how it ended.
pub(crate) struct Output {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A command that didn't start. Without `zfs` nothing is known of any pool.
pub(crate) fn not_started(words: &[String], error: &std::io::Error) -> ZfsError {
    let kind = if error.kind() == std::io::ErrorKind::NotFound { ErrorKind::PoolUnavailable } else { ErrorKind::Other };
    ZfsError::new(kind, words.join(" "), format!("did not start: {error}"))
}

/// A command that took too long.
pub(crate) fn timed_out(words: &[String], deadline: Duration) -> ZfsError {
    ZfsError::new(ErrorKind::Timeout, words.join(" "), format!("killed after {deadline:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[tokio::test]
    async fn a_hung_command_is_a_timeout() {
        let runner = Runner::new().with_deadline(Duration::from_millis(100));
        let begin = Instant::now();
        let error = runner.run(&words("sleep 60")).await.err().unwrap();
        assert_eq!(error.kind, ErrorKind::Timeout);
        assert!(begin.elapsed() < Duration::from_secs(5));
    }

    #[tokio::test]
    async fn a_missing_program_says_nothing_of_a_pool() {
        let error = Runner::new().run(&words("no-such-program-here")).await.err().unwrap();
        assert_eq!(error.kind, ErrorKind::PoolUnavailable);
    }

    #[tokio::test]
    async fn the_environment_is_clean() {
        let output = Runner::new().run(&words("env")).await.unwrap();
        let mut lines: Vec<_> = output.stdout.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["LC_ALL=C".to_owned(), format!("PATH={SEARCH_PATH}")]);
    }
}
