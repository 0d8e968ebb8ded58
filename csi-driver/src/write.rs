//! Writing a volume's status: compare-and-set, always.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use portolan_crds::{PortableVolume, PortableVolumeStatus};

use crate::handoff::{Event, Refused, transition};
use crate::volume;

/// An event was not written; the object is as somebody else has left it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    /// It can't happen to the object as it was read.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The API failed or refused.
    #[error("the Kubernetes API: {0}")]
    Api(#[from] kube::Error),
}

/// Writes a changed status over exactly the object that was read; returns what is there now.
pub(crate) async fn status(
    volumes: &Api<PortableVolume>,
    read: &PortableVolume,
    change: impl FnOnce(&mut PortableVolumeStatus),
) -> kube::Result<PortableVolume> {
    let mut next = read.clone();
    let mut status = volume::status(read);
    change(&mut status);
    next.status = Some(status);
    next.metadata.managed_fields = None;
    volumes.replace_status(&read.name_any(), &PostParams::default(), &next).await
}

/// Writes what an event makes of exactly the object that was read; returns what is there now. Nothing is written if it makes nothing of it.
pub(crate) async fn event(
    volumes: &Api<PortableVolume>,
    read: &PortableVolume,
    event: Event,
) -> Result<PortableVolume, WriteError> {
    let next = transition(read, event)?;
    if read.status.as_ref() == Some(&next) {
        return Ok(read.clone());
    }
    Ok(status(volumes, read, |status| *status = next).await?)
}

/// Whether a write failed because somebody else has written since.
pub(crate) fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_conflict())
}

pub(crate) fn now() -> MicroTime {
    MicroTime(jiff::Timestamp::now())
}
