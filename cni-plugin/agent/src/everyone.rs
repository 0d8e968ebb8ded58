//! The DNS server for those who are on no network, and for the cluster's DNS: full names at this node's own address.

use std::{
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
};

use portolan_dns::{Domain, Metrics, NetworkNames, Zone, ZoneHandle};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// This node's server for everyone, which begins to listen when it has something to say.
pub struct Everyone {
    at: SocketAddr,
    domain: Domain,
    zone: ZoneHandle,
    metrics: Metrics,
    shutdown: CancellationToken,
    running: Option<JoinHandle<()>>,
}

impl Everyone {
    /// A server that will listen at `at` until `shutdown`.
    pub fn new(at: SocketAddr, domain: Domain, metrics: Metrics, shutdown: CancellationToken) -> Self {
        let zone = ZoneHandle::new(Zone::default().within(Some(domain.clone())));
        Self { at, domain, zone, metrics, shutdown, running: None }
    }

    /// What is answered from now on. Sees to it that the server runs.
    ///
    /// # Errors
    /// When it can't listen at its address; the next call tries again.
    pub fn follow(&mut self, networks: Vec<NetworkNames>) -> io::Result<()> {
        self.zone.follow(networks);
        if self.running.as_ref().is_some_and(|task| !task.is_finished()) {
            return Ok(());
        }
        let (udp, tcp) = (UdpSocket::bind(self.at)?, TcpListener::bind(self.at)?);
        let (zone, metrics, stopped) = (self.zone.clone(), self.metrics.clone(), self.shutdown.clone());
        self.running = Some(tokio::spawn(async move {
            let ended = portolan_dns::run_for_everyone(udp, tcp, zone, metrics, stopped.cancelled_owned()).await;
            if let Err(error) = ended {
                tracing::error!(%error, "the DNS server for everyone ended");
            }
        }));
        tracing::info!(at = %self.at, domain = %self.domain, "full names are answered to everyone");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use portolan_dns::{Host, NetworkZone};

    use super::*;

    fn names(last: u8) -> Vec<NetworkNames> {
        let host = Host {
            namespace: "shop".into(),
            pod: "db".into(),
            addresses: vec![std::net::Ipv4Addr::new(10, 32, 0, last).into()],
            ready: true,
            ..Host::default()
        };
        vec![NetworkZone { name: "backend".into(), hosts: vec![host], ..NetworkZone::default() }.into()]
    }

    /// The last bytes of the answer for db.shop.backend.example.
    async fn ask(at: SocketAddr) -> Vec<u8> {
        let query = b"\x12\x67\x01\0\0\x01\0\0\0\0\0\0\x02db\x04shop\x07backend\x07example\0\0\x01\0\x01";
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(query, at).await.unwrap();
        let mut answer = [0; 512];
        let received = tokio::time::timeout(Duration::from_secs(10), socket.recv(&mut answer)).await;
        let length = received.expect("an answer").unwrap();
        answer[length.saturating_sub(4)..length].to_vec()
    }

    #[tokio::test]
    async fn it_begins_when_it_has_something_to_say_and_tries_again() {
        let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
        let at = taken.local_addr().unwrap();
        let stop = CancellationToken::new();
        let mut server = Everyone::new(at, "example".parse().unwrap(), Metrics::default(), stop.clone());
        assert!(server.follow(names(5)).is_err(), "somebody else has the port");
        drop(taken);
        server.follow(names(5)).unwrap();
        assert_eq!(ask(at).await, [10, 32, 0, 5]);
        server.follow(names(6)).unwrap();
        assert_eq!(ask(at).await, [10, 32, 0, 6], "the same server, the new names");
        stop.cancel();
        server.running.take().unwrap().await.unwrap();
        assert!(UdpSocket::bind(at).is_ok(), "the port is free again");
    }
}
