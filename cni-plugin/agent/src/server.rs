//! The Unix socket that the CNI plugin asks at.

use std::{io, path::Path, sync::Arc, time::Duration};

use portolan_cni::{Answer, Failure, Request};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
};
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;

/// More than any request needs; GC lists every pod of the node.
const REQUEST_LIMIT: u64 = 1 << 20;
/// How long a plugin may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// Listens at a path, in place of whoever did so before.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    // Bound beside and renamed: there is no moment without a socket for a plugin to find.
    let beside = path.with_extension("new");
    match std::fs::remove_file(&beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&beside)?;
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&beside, path)?;
    Ok(listener)
}

/// Answers until the agent ends.
pub(crate) async fn run(agent: Arc<Agent>, listener: UnixListener, shutdown: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let agent = Arc::clone(&agent);
                tokio::spawn(async move {
                    if let Err(error) = serve(&agent, stream).await {
                        tracing::warn!(%error, "a CNI request could not be read or answered");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection of the CNI plugin");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(agent: &Agent, stream: UnixStream) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(REQUEST_LIMIT));
    tokio::time::timeout(PATIENCE, reader.read_line(&mut line)).await??;
    let answer = match parse(&line) {
        Ok(request) => agent.answer(request).await,
        Err(failure) => Answer { error: Some(failure), result: None },
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    writer.write_all(&text).await
}

fn parse(line: &str) -> Result<Request, Failure> {
    let request: Request =
        serde_json::from_str(line).map_err(|e| Failure::new(Failure::DECODE, format!("not a request: {e}"), ""))?;
    // It becomes part of a file's name.
    if request.container.contains('/') || request.container.starts_with('.') {
        let msg = format!("container: {:?} was given; allowed: a name without '/'", request.container);
        return Err(Failure::new(Failure::INVALID_ENVIRONMENT, msg, ""));
    }
    Ok(request)
}
