//! One question to the agent.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{Answer, Request};

/// How long the agent may take. The kubelet itself gives a container runtime two minutes.
const PATIENCE: Duration = Duration::from_secs(90);

/// Where a person should look when the agent doesn't answer.
pub(crate) const HINT: &str = "is this node's pod of DaemonSet portolan-network running? kubectl get pods -A -o wide -l app.kubernetes.io/name=portolan-network";

/// The agent could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("Portolan's agent can't be reached at {socket}: {source}")]
    Unreachable { socket: PathBuf, source: io::Error },
    #[error("Portolan's agent at {socket} gave no answer: {source}")]
    Silent { socket: PathBuf, source: io::Error },
}

pub(crate) fn ask(socket: &Path, request: &Request) -> Result<Answer, AgentError> {
    let stream =
        UnixStream::connect(socket).map_err(|source| AgentError::Unreachable { socket: socket.to_owned(), source })?;
    exchange(stream, request).map_err(|source| AgentError::Silent { socket: socket.to_owned(), source })
}

fn exchange(mut stream: UnixStream, request: &Request) -> io::Result<Answer> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    if BufReader::new(stream).read_line(&mut answer)? == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection"));
    }
    Ok(serde_json::from_str(&answer)?)
}
