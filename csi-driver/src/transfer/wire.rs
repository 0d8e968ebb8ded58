//! Reading and writing with limits: of size, and of time without progress.

use std::future::Future;
use std::io;
use std::time::Duration;

use rustix::net::sockopt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::protocol::{MAX_FRAME, MAX_HEADER, Trailer};

/// How long and how many.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For the connection and the TLS handshake.
    pub handshake: Duration,
    /// Without a byte in either direction.
    pub idle: Duration,
    /// After which a peer that doesn't answer on TCP's level is taken to be gone, whatever this end does meanwhile. It counts also for a peer
    /// that answers but takes nothing, so that it should not be shorter than `idle`.
    pub silent: Duration,
    /// Streams that one source sends at a time; at least one.
    pub streams: usize,
    /// Connections that one source has open at a time, whatever their state: those that wait for their turn, too.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            idle: Duration::from_secs(30),
            silent: Duration::from_secs(30),
            streams: 4,
            connections: 1024,
        }
    }
}

/// Gives up on an operation that takes longer than `limit`.
pub(super) async fn within<T>(
    limit: Duration,
    what: &'static str,
    operation: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    match tokio::time::timeout(limit, operation).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no progress for {limit:?} while {what}"))),
    }
}

/// Keep-alive probes that go unanswered before a connection counts as broken, where nothing else says so before.
const PROBES: u32 = 4;

/// Sets a socket up: no delay for small messages, and the connection breaks when the peer has left something unanswered for `silent`: a probe
/// while nothing is sent (keep-alive), data while something is (`TCP_USER_TIMEOUT`, which holds for both and for what is still unsent
/// when the socket has been closed). Without it the kernel repeats data for a quarter of an hour (tcp(7), `tcp_retries2`).
pub(super) fn prepare(socket: &TcpStream, silent: Duration) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let probe = probe(silent);
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, silent.saturating_sub(probe * PROBES).max(Duration::from_secs(1)))?;
    sockopt::set_tcp_keepintvl(socket, probe)?;
    sockopt::set_tcp_keepcnt(socket, PROBES)?;
    sockopt::set_tcp_user_timeout(socket, u32::try_from(silent.as_millis()).unwrap_or(u32::MAX))?;
    Ok(())
}

/// Between two probes. The kernel counts whole seconds.
fn probe(silent: Duration) -> Duration {
    Duration::from_secs((silent.as_secs() / 6).max(1))
}

/// Writes a header: length and JSON.
pub(super) async fn write_header(to: &mut (impl AsyncWrite + Unpin), header: &impl Serialize) -> io::Result<()> {
    let bytes = serde_json::to_vec(header)?;
    let length = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= MAX_HEADER).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a header of {} bytes: allowed are {MAX_HEADER}", bytes.len()),
        )
    })?;
    to.write_all(&length.to_be_bytes()).await?;
    to.write_all(&bytes).await?;
    to.flush().await
}

/// Reads a header.
pub(super) async fn read_header<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin)) -> io::Result<T> {
    let bytes = read_header_bytes(from).await?;
    serde_json::from_slice(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Reads a header as it is.
pub(super) async fn read_header_bytes(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let length = from.read_u32().await? as usize;
    if length > MAX_HEADER {
        let message = format!("a header of {length} bytes: allowed are {MAX_HEADER}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// Reads a frame into `buffer`; `false` at the end of the payload.
pub(super) async fn read_frame(from: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> io::Result<bool> {
    let length = from.read_u32().await? as usize;
    if length > MAX_FRAME {
        let message = format!("a frame of {length} bytes: allowed are {MAX_FRAME}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    buffer.resize(length, 0);
    from.read_exact(buffer).await?;
    Ok(length > 0)
}

/// Reads the trailer.
pub(super) async fn read_trailer(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Trailer> {
    let mut bytes = [0; Trailer::LENGTH];
    from.read_exact(&mut bytes).await?;
    Ok(Trailer::from_bytes(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::Request;

    #[tokio::test]
    async fn lengths_are_limited() {
        let huge = u32::MAX.to_be_bytes();
        assert_eq!(read_header::<Request>(&mut &huge[..]).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(read_frame(&mut &huge[..], &mut Vec::new()).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_socket_gives_up_on_a_silent_peer_when_it_is_told_to() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        for (silent, idle, between) in [(30, 10, 5), (24, 8, 4), (3, 1, 1), (1, 1, 1)] {
            let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            prepare(&socket, Duration::from_secs(silent)).unwrap();
            assert_eq!(sockopt::tcp_user_timeout(&socket).unwrap(), u32::try_from(silent).unwrap() * 1000);
            assert!(sockopt::socket_keepalive(&socket).unwrap());
            let found = (sockopt::tcp_keepidle(&socket).unwrap(), sockopt::tcp_keepintvl(&socket).unwrap());
            assert_eq!(found, (Duration::from_secs(idle), Duration::from_secs(between)), "{silent} s");
        }
    }

    #[tokio::test]
    async fn silence_is_an_error() {
        let (mut here, _there) = tokio::io::duplex(8);
        let error = within(Duration::from_millis(20), "reading", here.read_u8()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
