//! The target's part of the transfer: fetch a snapshot from the handoff's source, and tell how far it is.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use portolan_zfs::{Property, Zfs};

use super::steps::{StepError, Steps};
use super::write;
use crate::handoff::{Known, Round};
use crate::transfer::{self, Fetch, Limits, Received, Request};
use crate::volume;

/// How often the bytes in the status are brought up to date.
const REPORT_EVERY: Duration = Duration::from_secs(2);
/// How long a fetch waits for this node's certificate before it counts as failed.
const CERTIFICATE_WITHIN: Duration = Duration::from_secs(5);

/// What an attempt has received.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    bytes: u64,
    base: Option<String>,
    took: Duration,
}

impl Progress {
    /// Bytes of ZFS stream, and the snapshot that they started from.
    pub(super) fn total(self) -> (i64, Option<String>) {
        (i64::try_from(self.bytes).unwrap_or(i64::MAX), self.base)
    }

    /// The figures of a round of PreCopy.
    pub(super) fn round(&self) -> Round {
        let milliseconds = i64::try_from(self.took.as_millis()).unwrap_or(i64::MAX);
        Round { bytes: i64::try_from(self.bytes).unwrap_or(i64::MAX), milliseconds }
    }
}

/// Fetches the handoff's final snapshot, and those on the way to it.
pub(super) async fn run<Z: Zfs>(steps: &mut Steps<'_, Z>, snapshot: Known) -> Result<(), StepError> {
    let Some(handoff) = volume::status(&steps.volume).handoff else { return Ok(()) };
    let name = steps.volume.name_any();
    let request = Request::new(name.as_str(), handoff.epoch, snapshot.name.as_str(), snapshot.guid.parse()?);
    let properties = steps.received_properties()?;
    let began = Instant::now();
    let Received { bytes, base, .. } = transfer(steps, &handoff.from, request, properties).await?;
    let base = base.map(|base| base.short().to_owned());
    steps.progress = Some(Progress { bytes, base, took: began.elapsed() });
    tracing::info!(volume = name, snapshot = snapshot.name, bytes, from = handoff.from, "received");
    Ok(())
}

/// Fetches what `request` asks node `from` for into the volume's dataset; tells how far it is as it goes.
pub(super) async fn transfer<Z: Zfs>(
    steps: &mut Steps<'_, Z>,
    from: &str,
    request: Request,
    properties: Vec<Property>,
) -> Result<Received, StepError> {
    let identity = certificate(steps).await?;
    let address = address_of(steps, from).await?;
    let fetch = Fetch { address, node: from.to_owned(), request, target: steps.dataset.clone(), properties };
    let bytes = AtomicU64::new(0);
    let zfs = steps.node.zfs.clone();
    let report = |received| bytes.store(received, Ordering::Relaxed);
    let transfer = transfer::fetch(&identity, zfs.as_ref(), Limits::default(), fetch, report);
    let mut transfer = std::pin::pin!(transfer);
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + REPORT_EVERY, REPORT_EVERY);
    loop {
        tokio::select! {
            fetched = &mut transfer => return Ok(fetched?),
            _ = tick.tick() => tell(steps, bytes.load(Ordering::Relaxed)).await?,
        }
    }
}

async fn certificate<Z: Zfs>(steps: &Steps<'_, Z>) -> Result<std::sync::Arc<transfer::Identity>, StepError> {
    let mut identity = steps.node.identity.clone();
    let ready = tokio::time::timeout(CERTIFICATE_WITHIN, identity.wait_for(Option::is_some)).await;
    let found = ready.ok().and_then(|ready| ready.ok().and_then(|identity| identity.clone()));
    found.ok_or_else(|| StepError::NoCertificate(steps.node.name.clone()))
}

async fn address_of<Z: Zfs>(steps: &Steps<'_, Z>, node: &str) -> Result<SocketAddr, StepError> {
    let found = steps.node.storage_nodes.get_opt(node).await?;
    let address = found.and_then(|found| found.status).and_then(|status| status.transfer_address);
    address.and_then(|address| address.parse().ok()).ok_or_else(|| StepError::NoAddress(node.to_owned()))
}

/// Writes the bytes so far; ends the transfer if the volume is being deleted, or the handoff is another by now. A write that fails is left
/// to the next.
async fn tell<Z: Zfs>(steps: &mut Steps<'_, Z>, bytes: u64) -> Result<(), StepError> {
    let name = steps.volume.name_any();
    let seen = steps.node.seen.get(&ObjectRef::new(&name));
    let Some(seen) = seen.filter(|seen| seen.metadata.deletion_timestamp.is_none()) else {
        return Err(StepError::Deleted);
    };
    let running = volume::status(&steps.volume).handoff.map(|handoff| handoff.epoch);
    let seen = volume::status(&seen);
    let newest = seen.handoff.map(|handoff| handoff.epoch).max(seen.last_handoff.map(|ended| ended.epoch + 1));
    if running.is_some_and(|epoch| newest > Some(epoch)) {
        return Err(StepError::Superseded);
    }
    let written = write::status(&steps.node.volumes, &steps.volume, |status| {
        if let Some(handoff) = &mut status.handoff {
            handoff.bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        }
    });
    match written.await {
        Ok(now) => steps.volume = now,
        Err(error) if write::is_conflict(&error) => {
            if let Ok(now) = steps.node.volumes.get(&name).await {
                steps.volume = now;
            }
        }
        Err(error) => tracing::debug!(volume = name, %error, "could not write the progress"),
    }
    Ok(())
}
