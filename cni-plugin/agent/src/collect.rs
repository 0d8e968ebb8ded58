//! Unplugging, and collecting what no DEL came for: pods whose namespace is gone, and ports that the journal doesn't know.

use std::{sync::Arc, time::Duration};

use portolan_net::{Dataplane, Namespace};
use tokio_util::sync::CancellationToken;

use crate::{
    agent::Agent,
    journal::{Endpoint, Journal, JournalError},
};

/// How long a port may outlive its pod when nobody says so.
const INTERVAL: Duration = Duration::from_secs(5);

/// A pod could not be unplugged.
#[derive(Debug, thiserror::Error)]
pub enum UnplugError {
    /// Its port could not be removed; the journal still has it.
    #[error(transparent)]
    Net(#[from] portolan_net::Error),
    /// Its entry could not be removed.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Removes a port and then its entry in the journal: killed in between, this is done again.
///
/// # Errors
/// When either can't be removed.
pub async fn unplug(dataplane: &Dataplane, journal: &Journal, endpoint: &Endpoint) -> Result<(), UnplugError> {
    let port = endpoint.port();
    dataplane.remove_port(port.vni, &port.port, &port.addresses).await?;
    Ok(journal.remove(&endpoint.id())?)
}

/// Unplugs the pods whose network namespace is gone, and removes the ports that the journal doesn't know. Returns whether
/// there was anything to do.
///
/// # Errors
/// The first thing that can't be removed; the next round tries again.
pub async fn collect(dataplane: &Dataplane, journal: &Journal) -> Result<bool, UnplugError> {
    let mut found = false;
    for endpoint in journal.select(|e| Namespace::is_gone(dataplane.root(), &e.netns)) {
        unplug(dataplane, journal, &endpoint).await?;
        found = true;
        let (pod, network, netns) = (endpoint.pod, endpoint.network, endpoint.netns.display());
        tracing::info!(pod, network, %netns, "collected: its namespace is gone");
    }
    let known: Vec<_> = journal.select(|_| true).iter().map(Endpoint::port).collect();
    for vni in dataplane.networks()? {
        for port in dataplane.ports(vni).await? {
            if !known.iter().any(|k| k.vni == vni && k.port == port) {
                dataplane.remove_port(vni, &port, &[]).await?;
                found = true;
                tracing::info!(vni, port, "collected: the journal doesn't know it");
            }
        }
    }
    Ok(found)
}

/// Collects until the agent ends. Needs no API server.
pub(crate) async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    loop {
        {
            // Whoever adds a port has the right to read this, and the port in the journal before.
            let _right = agent.applied.write().await;
            match collect(&agent.dataplane, &agent.journal).await {
                Ok(false) => {}
                Ok(true) => agent.changed.notify_one(),
                Err(error) => tracing::warn!(%error, "not all that is left over could be collected"),
            }
            if let Err(error) = agent.primary.collect(&agent.dataplane).await {
                tracing::warn!(%error, "not all that is left over of the pod network could be collected");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
    }
}
