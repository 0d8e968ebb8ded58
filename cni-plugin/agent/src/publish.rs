//! Tells the API server of this node: its slices, and the blocks that it needs no longer. Whoever sees to the node's pods doesn't wait for the answers.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use portolan_crds::NetworkNodeSliceSpec;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{agent::Agent, slices::Slices};

/// How often everything is looked at without a cause.
const INTERVAL: Duration = Duration::from_secs(60);
/// How soon something that failed is tried again.
const RETRY: Duration = Duration::from_secs(2);

struct Publisher<'a> {
    agent: &'a Agent,
    slices: Slices,
    /// Networks whose blocks may be given back, and when that was last tried.
    leaving: BTreeMap<String, Option<Instant>>,
    started: bool,
}

/// Tells what is to be told, whenever it is said anew, until the agent ends.
pub(crate) async fn run(
    agent: Arc<Agent>,
    mut told: watch::Receiver<Option<Vec<NetworkNodeSliceSpec>>>,
    shutdown: CancellationToken,
) {
    let (slices, leaving) = (Slices::default(), BTreeMap::new());
    let mut publisher = Publisher { agent: &agent, slices, leaving, started: false };
    loop {
        let specs = told.borrow_and_update().clone();
        let wait = match specs {
            Some(specs) => publisher.once(specs).await,
            None => INTERVAL,
        };
        tokio::select! {
            changed = told.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(wait) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

impl Publisher<'_> {
    /// Makes this node's slices these; returns when to do so again without a cause.
    async fn once(&mut self, specs: Vec<NetworkNodeSliceSpec>) -> Duration {
        let cluster = &self.agent.cluster;
        let present: Vec<String> = specs.iter().map(|spec| spec.network.clone()).collect();
        let mut failed = false;
        for spec in specs {
            let network = spec.network.clone();
            if let Err(error) = self.slices.write(cluster, spec).await {
                failed = true;
                tracing::warn!(network, %error, "slice not written");
            }
        }
        if let Err(error) = self.slices.keep_only(cluster, &present).await {
            failed = true;
            tracing::warn!(%error, "slices not removed");
        }
        // Not while the API server is silent: pods that need addresses would wait for it, too.
        if !failed && let Err(error) = self.release_blocks(&present).await {
            failed = true;
            tracing::warn!(error, "blocks not given back");
        }
        if failed { RETRY } else { INTERVAL }
    }

    async fn release_blocks(&mut self, present: &[String]) -> Result<(), String> {
        if !self.started {
            let all = self.agent.addresses.networks_with_blocks().await.map_err(|e| e.to_string())?;
            self.leaving = all.into_iter().map(|network| (network, None)).collect();
            self.started = true;
        }
        // A pod that was gone again before the last pass has blocks left, too.
        for network in self.agent.addresses.networks_in_use().await {
            self.leaving.entry(network).or_insert(None);
        }
        // Those that were here are the next to leave.
        let due = |tried: &Option<Instant>| tried.is_none_or(|at| at.elapsed() >= INTERVAL);
        let left = self.leaving.iter().filter(|(network, tried)| !present.contains(network) && due(tried));
        let left: Vec<String> = left.map(|(network, _)| network.clone()).collect();
        for network in left {
            if self.agent.addresses.release(&network).await.map_err(|e| e.to_string())? {
                self.leaving.remove(&network);
            } else {
                self.leaving.insert(network, Some(Instant::now()));
            }
        }
        self.leaving.extend(present.iter().map(|network| (network.clone(), None)));
        Ok(())
    }
}
