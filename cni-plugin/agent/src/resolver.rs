//! The DNS servers: one a network, with its sockets in the network's namespace; and another one where pods of it are that ask at the address
//! of the cluster's DNS.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
};

use portolan_dns::{Domain, Metrics, NetworkNames, Upstream, Zone, ZoneHandle};
use portolan_net::Dataplane;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{journal::Journal, snapshot::Snapshot};

/// The DNS port.
const PORT: u16 = 53;

/// This node's DNS servers.
pub struct Resolvers {
    zone: ZoneHandle,
    upstream: Vec<SocketAddr>,
    metrics: Metrics,
    /// By network and address.
    running: BTreeMap<(u32, Ipv4Addr), Running>,
}

struct Running {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Resolvers {
    /// Goes on where an agent has ended: the servers of the journal's networks answer from the snapshot.
    /// Full names are in `domain`; without it there are none.
    pub fn resume(
        dataplane: &Dataplane,
        journal: &Journal,
        snapshot: Snapshot,
        domain: Option<Domain>,
        metrics: Metrics,
    ) -> Self {
        let zone = ZoneHandle::new(Zone::new(snapshot.zones).within(domain));
        let mut resolvers = Self { zone, upstream: snapshot.upstream, metrics, running: BTreeMap::new() };
        resolvers.ensure_all(dataplane, journal);
        resolvers
    }

    /// Sees to it that all servers run that the journal's pods ask, as far as there are their networks.
    pub(crate) fn ensure_all(&mut self, dataplane: &Dataplane, journal: &Journal) {
        for endpoint in journal.select(|_| true) {
            for at in endpoint.resolvers() {
                // After the node has started anew there is no such namespace yet.
                if let Err(error) = self.ensure(dataplane, &endpoint.network, endpoint.vni, at) {
                    tracing::debug!(network = endpoint.network, %error, "no DNS server yet");
                }
            }
        }
    }

    /// Where names go from now on that aren't ours. Servers that asked elsewhere end, and start again with the next pass.
    pub async fn set_upstream(&mut self, upstream: Vec<SocketAddr>) {
        if self.upstream == upstream {
            return;
        }
        self.upstream = upstream;
        let running: Vec<u32> = self.running.keys().map(|(vni, _)| *vni).collect();
        for vni in running {
            self.stop(vni).await;
        }
    }

    /// Where names go that aren't ours.
    pub(crate) fn upstream(&self) -> &[SocketAddr] {
        &self.upstream
    }

    /// What all servers answer from.
    pub fn follow(&self, networks: Vec<NetworkNames>) {
        self.zone.follow(networks);
    }

    /// Sees to it that a network's server runs at an address.
    ///
    /// # Errors
    /// When its sockets can't be opened in the network's namespace.
    pub fn ensure(
        &mut self,
        dataplane: &Dataplane,
        network: &str,
        vni: u32,
        at: Ipv4Addr,
    ) -> Result<(), portolan_net::Error> {
        if self.running.get(&(vni, at)).is_some_and(|r| !r.task.is_finished()) {
            return Ok(());
        }
        let bind = || Ok((UdpSocket::bind((at, PORT))?, TcpListener::bind((at, PORT))?));
        let (udp, tcp) = dataplane.run_in(vni, bind)?;
        let stop = CancellationToken::new();
        let (name, zone) = (network.to_owned(), self.zone.clone());
        let (upstream, stopped) = (Upstream { servers: self.upstream.clone() }, stop.clone().cancelled_owned());
        let metrics = self.metrics.clone();
        let task = tokio::spawn(async move {
            if let Err(error) = portolan_dns::run(udp, tcp, name.clone(), zone, upstream, metrics, stopped).await {
                tracing::error!(network = name, error = %error, "DNS server ended");
            }
        });
        self.running.insert((vni, at), Running { stop, task });
        Ok(())
    }

    /// Ends a network's servers. Their sockets are closed when this returns: they would keep the namespace alive.
    pub async fn stop(&mut self, vni: u32) {
        for (_, Running { stop, task }) in
            self.running.extract_if((vni, Ipv4Addr::UNSPECIFIED)..=(vni, Ipv4Addr::BROADCAST), |_, _| true)
        {
            stop.cancel();
            if let Err(error) = task.await {
                tracing::error!(vni, %error, "DNS server did not end well");
            }
        }
    }
}
