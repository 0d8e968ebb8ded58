//! Unix sockets for gRPC.
//!
//! The kubelet's registration client (grpc-go given a bare path) sends the socket's path as `:authority`, which h2 refuses as no
//! authority of a URI (hyperium/h2#487). So what a client sends passes through [`relay`], which puts `localhost` in its place.

use std::io;
use std::path::Path;

use futures::{Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;

/// What the client's side of an HTTP/2 connection begins with (RFC 9113, 3.4).
const PREFACE: usize = 24;
/// The head of a frame (RFC 9113, 4.1).
const FRAME_HEAD: usize = 9;
/// The longest frame that is passed on; gRPC's are 16 KiB unless another size was agreed on, and we agree on none.
const LONGEST_FRAME: usize = 1 << 20;
/// Frame type HEADERS, and its flags (RFC 9113, 6.2).
const HEADERS: u8 = 1;
const PADDED: u8 = 0x08;
const PRIORITY: u8 = 0x20;
const END_HEADERS: u8 = 0x04;
/// Index of `:authority` in HPACK's static table (RFC 7541, appendix A).
const AUTHORITY: usize = 1;
const BUFFER: usize = 64 * 1024;

/// Listens at a path, in place of whatever socket an earlier process has left there.
pub(crate) fn listen(here: &Path) -> io::Result<impl Stream<Item = io::Result<DuplexStream>> + use<>> {
    if let Some(parent) = here.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::remove_file(here) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let accepted = UnixListenerStream::new(UnixListener::bind(here)?);
    Ok(accepted.map(|socket| socket.map(relayed)))
}

fn relayed(socket: UnixStream) -> DuplexStream {
    let (ours, served) = tokio::io::duplex(BUFFER);
    tokio::spawn(async move {
        let (mut from_client, mut to_client) = socket.into_split();
        let (mut from_server, mut to_server) = tokio::io::split(ours);
        let requests = async {
            let result = relay(&mut from_client, &mut to_server).await;
            let _ = to_server.shutdown().await;
            result
        };
        let answers = async {
            let result = tokio::io::copy(&mut from_server, &mut to_client).await;
            let _ = to_client.shutdown().await;
            result
        };
        match tokio::join!(requests, answers) {
            // The kubelet dials for each call and is gone with its answer.
            (Err(error), _) | (_, Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => {
                tracing::debug!(%error, "a connection to one of our sockets ended");
            }
            _ => {}
        }
    });
    served
}

/// Passes frames on until the client has no more.
async fn relay(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut preface = [0; PREFACE];
    from.read_exact(&mut preface).await?;
    to.write_all(&preface).await?;
    loop {
        let mut head = [0; FRAME_HEAD];
        match from.read_exact(&mut head).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        };
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        if length > LONGEST_FRAME {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload).await?;
        if head[3] == HEADERS
            && let Some(changed) = with_local_authority(head[4], &payload)
        {
            let length = u32::try_from(changed.len()).map_err(io::Error::other)?.to_be_bytes();
            head[..3].copy_from_slice(&length[1..]);
            payload = changed;
        }
        to.write_all(&head).await?;
        to.write_all(&payload).await?;
    }
}

/// The payload of a HEADERS frame with another `:authority`; none if it is better left alone.
fn with_local_authority(flags: u8, payload: &[u8]) -> Option<Vec<u8>> {
    if flags & END_HEADERS == 0 || flags & PADDED != 0 {
        return None;
    }
    let start = if flags & PRIORITY != 0 { 5 } else { 0 };
    let mut block = Block { bytes: payload, at: start };
    let mut changed = payload.get(..start)?.to_vec();
    while block.at < payload.len() {
        let field = block.at;
        let value = block.field()?;
        match value {
            Some(value) => {
                changed.extend_from_slice(&payload[field..value]);
                changed.push(u8::try_from("localhost".len()).ok()?);
                changed.extend_from_slice(b"localhost");
            }
            None => changed.extend_from_slice(&payload[field..block.at]),
        }
    }
    Some(changed)
}

/// A block of header fields (RFC 7541, 6).
struct Block<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Block<'_> {
    /// Steps over one field. If it is a literal `:authority`, says where its value begins.
    fn field(&mut self) -> Option<Option<usize>> {
        let first = *self.bytes.get(self.at)?;
        let prefix = match first {
            0x80.. => 7,
            0x40.. => 6,
            0x20.. => 5,
            _ => 4,
        };
        let index = self.integer(prefix)?;
        if first >= 0x80 || (0x20..0x40).contains(&first) {
            return Some(None);
        }
        if index == 0 {
            self.text()?;
        }
        let value = self.at;
        self.text()?;
        Some((index == AUTHORITY).then_some(value))
    }

    /// An integer with a prefix of so many bits (RFC 7541, 5.1).
    fn integer(&mut self, prefix: u32) -> Option<usize> {
        let most = (1usize << prefix) - 1;
        let mut value = usize::from(*self.bytes.get(self.at)?) & most;
        self.at += 1;
        if value < most {
            return Some(value);
        }
        for shift in [0, 7, 14] {
            let byte = usize::from(*self.bytes.get(self.at)?);
            self.at += 1;
            value += (byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    /// Steps over a string, Huffman-coded or not (RFC 7541, 5.2).
    fn text(&mut self) -> Option<()> {
        let length = self.integer(7)?;
        self.at = self.at.checked_add(length).filter(|end| *end <= self.bytes.len())?;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `:method: POST` (indexed), `:authority: /a.sock` (literal), `te: trailers` (literal, new name).
    fn block(authority: &[u8]) -> Vec<u8> {
        let mut block = vec![0x83, 0x41];
        block.push(authority.len() as u8);
        block.extend_from_slice(authority);
        block.extend_from_slice(b"\x40\x02te\x08trailers");
        block
    }

    #[test]
    fn the_authority_becomes_localhost() {
        assert_eq!(with_local_authority(END_HEADERS, &block(b"/a.sock")), Some(block(b"localhost")));
        let with_priority = |authority| [&[0, 0, 0, 0, 16][..], &block(authority)].concat();
        assert_eq!(
            with_local_authority(END_HEADERS | PRIORITY, &with_priority(b"/a")),
            Some(with_priority(b"localhost"))
        );
        assert_eq!(with_local_authority(0, &block(b"/a.sock")), None, "goes on in another frame");
        assert_eq!(with_local_authority(END_HEADERS, &block(b"/a.sock")[..6]), None, "cut");
    }

    #[tokio::test]
    async fn frames_pass_in_order() {
        let frame = |kind: u8, payload: &[u8]| {
            let mut frame = vec![0, 0, payload.len() as u8, kind, END_HEADERS, 0, 0, 0, 1];
            frame.extend_from_slice(payload);
            frame
        };
        let sent = [vec![b'P'; PREFACE], frame(4, b""), frame(HEADERS, &block(b"%2Fa")), frame(0, b"data")].concat();
        let wanted =
            [vec![b'P'; PREFACE], frame(4, b""), frame(HEADERS, &block(b"localhost")), frame(0, b"data")].concat();
        let mut received = Vec::new();
        relay(&mut sent.as_slice(), &mut received).await.unwrap();
        assert_eq!(received, wanted);
    }

    proptest! {
        #[test]
        fn no_block_makes_it_panic(flags: u8, bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = with_local_authority(flags, &bytes);
        }
    }
}
