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
    /// Streams that one source sends at a time.
    pub streams: usize,
    /// Connections that one source has open at a time, whatever their state.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { handshake: Duration::from_secs(10), idle: Duration::from_secs(30), streams: 4, connections: 64 }
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

/// Sets a socket up: no delay for small messages, and a dead peer is noticed while nothing is sent (tcp(7)).
pub(super) fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(socket, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(socket, 3)?;
    Ok(())
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
    async fn silence_is_an_error() {
        let (mut here, _there) = tokio::io::duplex(8);
        let error = within(Duration::from_millis(20), "reading", here.read_u8()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
