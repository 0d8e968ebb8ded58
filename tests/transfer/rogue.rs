//! A source with a good certificate that doesn't keep to the protocol. Written by the protocol's description, not by its code.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use portolan_csi::transfer::{Identity, server_name};
use portolan_zfs::{SnapshotName, Zfs};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client};
use xxhash_rust::xxh3::xxh3_128;

use super::setup::read_all;

/// What it does wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lie {
    /// Nothing.
    None,
    /// Nothing, but it is of the first release: it speaks version 1, and refuses what that doesn't have.
    FirstVersion,
    /// Nothing, but it speaks version 2.
    SecondVersion,
    /// Another hash than the payload's.
    WrongHash,
    /// Another length than the payload's.
    WrongLength,
    /// The end of the payload, but no trailer.
    NoTrailer,
    /// A frame longer than allowed after a whole payload.
    HugeFrame,
    /// Stops after the payload without closing.
    Silence,
    /// Its kernel forgets the connection after half of the payload.
    Forgets,
}

/// It listens until the runtime ends.
pub struct Rogue {
    pub address: SocketAddr,
}

impl Rogue {
    pub async fn start(identity: &Identity, zfs: &impl Zfs, snapshot: &SnapshotName, lie: Lie) -> Self {
        let payload = read_all(zfs, snapshot).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut config = ServerConfig::clone(&identity.server());
        match lie {
            Lie::FirstVersion => config.alpn_protocols = vec![b"portolan-transfer/1".to_vec()],
            Lie::SecondVersion => config.alpn_protocols = vec![b"portolan-transfer/2".to_vec()],
            _ => {}
        }
        let acceptor = TlsAcceptor::from(Arc::new(config));
        tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            let mut stream = acceptor.accept(socket).await.unwrap();
            // The peer may well go before the end.
            let _ = answer(&mut stream, &payload, lie).await;
        });
        Self { address }
    }
}

async fn answer(stream: &mut TlsStream<TcpStream>, payload: &[u8], lie: Lie) -> std::io::Result<()> {
    let length = stream.read_u32().await?;
    let mut request = vec![0; length as usize];
    stream.read_exact(&mut request).await?;
    if lie == Lie::FirstVersion {
        let request: serde_json::Map<_, _> = serde_json::from_slice(&request)?;
        let known = ["version", "volume", "epoch", "snapshot", "guid", "have", "restore"];
        assert!(request["version"] == 1 && request.keys().all(|key| known.contains(&key.as_str())), "{request:?}");
    }
    let reply = br#"{"ok":true,"base":null,"base_snapshot":null,"error":null}"#;
    stream.write_u32(reply.len() as u32).await?;
    stream.write_all(reply).await?;
    let payload_sent = if lie == Lie::Forgets { &payload[..payload.len() / 2] } else { payload };
    for frame in payload_sent.chunks(100_000) {
        stream.write_u32(frame.len() as u32).await?;
        stream.write_all(frame).await?;
    }
    let mut hash = [0; 32];
    match lie {
        Lie::FirstVersion | Lie::SecondVersion => hash = *blake3::hash(payload).as_bytes(),
        _ => hash[..16].copy_from_slice(&xxh3_128(payload).to_be_bytes()),
    }
    let mut length = payload.len() as u64;
    match lie {
        Lie::None | Lie::FirstVersion | Lie::SecondVersion => {}
        Lie::WrongHash => hash[15] ^= 1,
        Lie::WrongLength => length += 1,
        Lie::NoTrailer => {
            stream.write_u32(0).await?;
            return stream.shutdown().await;
        }
        Lie::HugeFrame => {
            stream.write_u32(u32::MAX).await?;
            return stream.flush().await;
        }
        Lie::Silence => {
            stream.flush().await?;
            return std::future::pending().await;
        }
        Lie::Forgets => {
            stream.flush().await?;
            forget(stream.get_ref().0);
            return Ok(());
        }
    }
    stream.write_u32(0).await?;
    stream.write_u64(length).await?;
    stream.write_all(&hash).await?;
    stream.shutdown().await
}

/// Makes the kernel forget a connection when it is closed, without a word to its peer, as one does that starts anew (`TCP_REPAIR`, tcp(7)).
pub fn forget(socket: &TcpStream) {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).unwrap();
    // SAFETY: the pointer is to a whole int of that length, which lives until the call returns.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, (&raw const on).cast(), length)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// What a source answers to a request of our making.
pub async fn ask(identity: &Identity, address: SocketAddr, node: &str, request: &str) -> serde_json::Value {
    asked(identity, address, node, request).await.0
}

/// The same, with the connection.
pub async fn asked(
    identity: &Identity,
    address: SocketAddr,
    node: &str,
    request: &str,
) -> (serde_json::Value, client::TlsStream<TcpStream>) {
    let socket = TcpStream::connect(address).await.unwrap();
    let connector = TlsConnector::from(identity.client());
    let mut stream = connector.connect(server_name(node).unwrap(), socket).await.unwrap();
    stream.write_u32(request.len() as u32).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    let length = stream.read_u32().await.unwrap();
    let mut reply = vec![0; length as usize];
    stream.read_exact(&mut reply).await.unwrap();
    (serde_json::from_slice(&reply).unwrap(), stream)
}
