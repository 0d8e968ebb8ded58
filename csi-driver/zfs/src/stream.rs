//! The two ends of a replication stream.

use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::process::Stdio;
use std::task::{Context, Poll};

use rustix::pipe::fcntl_setpipe_size;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::process::Child;

use crate::error::{ErrorKind, ZfsError};
use crate::runner::{Runner, not_started, timed_out};

/// How much of a child's standard error is kept.
const STDERR_LIMIT: u64 = 16 * 1024;

/// What a pipe is to hold, in bytes: sixteen times the usual, so that both ends do more at a time. It is what anybody may have (pipe(7),
/// `/proc/sys/fs/pipe-max-size`).
const PIPE: usize = 1024 * 1024;

/// How the process at the end of a stream ended.
pub(crate) type Outcome = Pin<Box<dyn Future<Output = Result<(), ZfsError>> + Send>>;

/// The bytes of a `zfs send`. Dropping it kills the process.
pub struct SendStream {
    reader: Box<dyn AsyncRead + Send + Unpin>,
    outcome: Outcome,
}

impl SendStream {
    pub(crate) fn new(reader: impl AsyncRead + Send + Unpin + 'static, outcome: Outcome) -> Self {
        Self { reader: Box::new(reader), outcome }
    }

    /// Starts a command and reads its standard output.
    pub(crate) fn spawn(runner: &Runner, words: Vec<String>) -> Result<Self, ZfsError> {
        let mut command = runner.command(&words)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| not_started(&words, &e))?;
        let stdout = child.stdout.take().ok_or_else(|| no_pipe(&words))?;
        widen(&stdout);
        Ok(Self::new(stdout, outcome(child, runner.clone(), words)))
    }

    /// To be called at the end of the stream: an error if the process failed, so that what was read is not a whole stream.
    pub async fn finish(self) -> Result<(), ZfsError> {
        let Self { reader, outcome } = self;
        drop(reader);
        outcome.await
    }
}

impl AsyncRead for SendStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buffer)
    }
}

/// The input of a `zfs recv`. Dropping it before [`finish`](Self::finish) truncates the stream, so that ZFS rolls back what it has received.
///
/// Killing the process alone would not: zfs-fuse's daemon reads on by itself. The pipe is therefore closed before the process is killed,
/// and whoever must be able to call a stream off keeps its last bytes back until it is sure of them.
pub struct ReceiveProcess {
    // Declared, and so dropped, before the process.
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    outcome: Outcome,
}

impl ReceiveProcess {
    pub(crate) fn new(writer: impl AsyncWrite + Send + Unpin + 'static, outcome: Outcome) -> Self {
        Self { writer: Box::new(writer), outcome }
    }

    /// Starts a command and writes to its standard input. When it has ended well, `then` follows.
    pub(crate) fn spawn(
        runner: &Runner,
        words: Vec<String>,
        then: impl Future<Output = Result<(), ZfsError>> + Send + 'static,
    ) -> Result<Self, ZfsError> {
        let mut command = runner.command(&words)?;
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| not_started(&words, &e))?;
        let stdin = child.stdin.take().ok_or_else(|| no_pipe(&words))?;
        widen(&stdin);
        let received = outcome(child, runner.clone(), words);
        Ok(Self::new(
            stdin,
            Box::pin(async move {
                received.await?;
                then.await
            }),
        ))
    }

    /// Ends the stream and waits for the process: `Ok` if all was received.
    pub async fn finish(self) -> Result<(), ZfsError> {
        let Self { mut writer, outcome } = self;
        // An error here is the process's to explain: it has closed its end.
        let _ = writer.shutdown().await;
        drop(writer);
        outcome.await
    }

    /// Cuts the stream and waits for the process to roll back: the error it gives, or none if it took what it had for a whole stream.
    pub async fn abort(self) -> Option<ZfsError> {
        self.finish().await.err()
    }
}

impl AsyncWrite for ReceiveProcess {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}

/// Waits for a child, within the runner's deadline from when it is first polled. Standard error is read from the start, so that a child that
/// says much doesn't block.
fn outcome(mut child: Child, runner: Runner, words: Vec<String>) -> Outcome {
    let stderr = child.stderr.take();
    let said = tokio::spawn(async move {
        let mut text = Vec::new();
        if let Some(mut stderr) = stderr {
            let _ = (&mut stderr).take(STDERR_LIMIT).read_to_end(&mut text).await;
            let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    Box::pin(async move {
        let status = match tokio::time::timeout(runner.deadline(), child.wait()).await {
            Err(_) => return Err(timed_out(&words, runner.deadline())),
            Ok(status) => status.map_err(|e| ZfsError::new(ErrorKind::Other, words.join(" "), e.to_string()))?,
        };
        let stderr = said.await.unwrap_or_default();
        if status.success() {
            return Ok(());
        }
        Err(ZfsError::exited(words.join(" "), status.code(), stderr))
    })
}

/// It works as well, but slower, where that is refused.
fn widen(pipe: impl AsFd) {
    let _ = fcntl_setpipe_size(pipe, PIPE);
}

fn no_pipe(words: &[String]) -> ZfsError {
    ZfsError::new(ErrorKind::Other, words.join(" "), "has no pipe")
}
