//! A source with a good certificate that doesn't keep to the protocol. Written by the protocol's description, not by its code.

use std::net::SocketAddr;
use std::sync::Arc;

use portolan_csi::transfer::{Identity, server_name};
use portolan_zfs::{SnapshotName, Zfs};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::setup::read_all;

/// What it does wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lie {
    /// Nothing.
    None,
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
        let acceptor = TlsAcceptor::from(Arc::clone(&identity.server()));
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
    let reply = br#"{"ok":true,"base":null,"base_snapshot":null,"error":null}"#;
    stream.write_u32(reply.len() as u32).await?;
    stream.write_all(reply).await?;
    for frame in payload.chunks(100_000) {
        stream.write_u32(frame.len() as u32).await?;
        stream.write_all(frame).await?;
    }
    let mut hash = *blake3::hash(payload).as_bytes();
    let mut length = payload.len() as u64;
    match lie {
        Lie::None => {}
        Lie::WrongHash => hash[31] ^= 1,
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
    }
    stream.write_u32(0).await?;
    stream.write_u64(length).await?;
    stream.write_all(&hash).await?;
    stream.shutdown().await
}

/// What a source answers to a request of our making.
pub async fn ask(identity: &Identity, address: SocketAddr, node: &str, request: &str) -> serde_json::Value {
    let socket = TcpStream::connect(address).await.unwrap();
    let connector = TlsConnector::from(identity.client());
    let mut stream = connector.connect(server_name(node).unwrap(), socket).await.unwrap();
    stream.write_u32(request.len() as u32).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    let length = stream.read_u32().await.unwrap();
    let mut reply = vec![0; length as usize];
    stream.read_exact(&mut reply).await.unwrap();
    serde_json::from_slice(&reply).unwrap()
}
