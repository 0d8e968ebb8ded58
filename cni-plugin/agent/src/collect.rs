//! Collecting what no DEL came for: pods whose namespace is gone, and ports that the journal doesn't know.

use std::{sync::Arc, time::Duration};

use portolan_net::Namespace;
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;

/// How long a port may outlive its pod when nobody says so.
const INTERVAL: Duration = Duration::from_secs(5);

/// Collects until the agent ends. Needs no API server.
pub(crate) async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    loop {
        agent.collect().await;
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

impl Agent {
    async fn collect(&self) {
        for endpoint in self.journal.select(|e| Namespace::is_gone(self.dataplane.root(), &e.netns)) {
            let (pod, network) = (&endpoint.pod, &endpoint.network);
            match self.unplug(&endpoint).await {
                Ok(()) => {
                    tracing::info!(pod, network, netns = %endpoint.netns.display(), "collected: its namespace is gone")
                }
                Err(error) => tracing::warn!(pod, network, %error, "not collected"),
            }
        }
        if let Err(error) = self.collect_ports().await {
            tracing::warn!(%error, "ports that nobody knows not collected");
        }
    }

    async fn collect_ports(&self) -> portolan_net::Result<()> {
        let _right = self.applied.lock().await;
        // Read under the lock: whoever adds a port has it in the journal before.
        let known: Vec<_> = self.journal.select(|_| true).iter().map(|e| e.port()).collect();
        for vni in self.dataplane.networks()? {
            for port in self.dataplane.ports(vni).await? {
                if !known.iter().any(|k| k.vni == vni && k.port == port) {
                    self.dataplane.remove_port(vni, &port, None).await?;
                    tracing::info!(vni, port, "collected: the journal doesn't know it");
                }
            }
        }
        Ok(())
    }
}
