//! Encrypted volumes: the key that the kubelet brings makes the dataset, and opens it where it is mounted. Nothing else needs it.
//!
//! It comes with NodeStageVolume, from the Secret that the PersistentVolume names, and goes when the volume is unmounted. It is in no
//! object, no log, no command line and no error: what is said of it is where it was looked for.

use std::collections::HashMap;

use portolan_crds::PortableVolume;
use portolan_zfs::{Dataset, DatasetName, ErrorKind, InvalidName, Key, Kind, Property, Zfs, ZfsError};
use tonic::Status;

use super::disk::{self, ReadError};
use crate::block::mounts::Mounts;
use crate::handoff;
use crate::volume;

/// The entries of a Secret that a key may be in: one of them must be there, whatever else is.
const PASSPHRASE: &str = "encryption-passphrase";
const KEY: &str = "encryption-key";

/// A key that can't be had, or a dataset that it doesn't open.
#[derive(Debug, thiserror::Error)]
pub(super) enum SealError {
    /// No entry of the Secret is a key, or two are.
    #[error(
        "{secret} has {found}: allowed is one of {PASSPHRASE} (8 to 512 bytes on one line) and {KEY} (64 hexadecimal digits, 32 bytes)"
    )]
    Entries {
        /// The Secret, for people.
        secret: String,
        /// What it has.
        found: &'static str,
    },
    /// An entry that is no key.
    #[error("entry {entry} of {secret} is {given}: allowed is {allowed}")]
    Entry {
        /// The Secret, for people.
        secret: String,
        /// The entry.
        entry: &'static str,
        /// Never the value.
        given: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// The dataset has another key.
    #[error(
        "{secret} has not the key that dataset {root} is sealed with: give it the key that it had when the volume was made, or the one \
         that was set with `zfs change-key` since"
    )]
    Wrong {
        /// The Secret, for people.
        secret: String,
        /// What the key belongs to.
        root: DatasetName,
    },
    /// The dataset is not as the volume's spec says.
    #[error("dataset {dataset} {why}")]
    Dataset {
        /// The dataset.
        dataset: DatasetName,
        /// What is the matter with it.
        why: String,
    },
    /// The dataset can't be looked at.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// ZFS failed.
    #[error(transparent)]
    Zfs(#[from] ZfsError),
    /// A name that ZFS doesn't take.
    #[error(transparent)]
    Name(#[from] InvalidName),
}

impl From<SealError> for Status {
    fn from(error: SealError) -> Self {
        let message = error.to_string();
        match error {
            SealError::Entries { .. } | SealError::Entry { .. } => Status::invalid_argument(message),
            // "Secrets that are not valid for authentication" (CSI, error scheme).
            SealError::Wrong { .. } => Status::unauthenticated(message),
            SealError::Dataset { .. } => Status::failed_precondition(message),
            SealError::Read(_) => Status::unavailable(message),
            SealError::Zfs(error) if error.kind == ErrorKind::Unsupported => Status::failed_precondition(message),
            SealError::Zfs(error) if error.is_retryable() => Status::unavailable(message),
            SealError::Zfs(_) | SealError::Name(_) => Status::internal(message),
        }
    }
}

/// The key among what a CSI call carries; none if the volume isn't encrypted.
pub(super) fn key(volume: &PortableVolume, secrets: &HashMap<String, String>) -> Result<Option<Key>, SealError> {
    if volume.spec.encryption.is_none() {
        return Ok(None);
    }
    let secret = || secret_of(volume);
    let entries = |found| SealError::Entries { secret: secret(), found };
    let bad = |entry, given, allowed| SealError::Entry { secret: secret(), entry, given, allowed };
    // A file that a Secret was made of ends its line.
    let line = |text: &String| text.strip_suffix('\n').map(|text| text.strip_suffix('\r').unwrap_or(text).to_owned());
    let get = |name| secrets.get(name).map(|text| line(text).unwrap_or_else(|| text.clone()));
    match (get(PASSPHRASE), get(KEY)) {
        (Some(_), Some(_)) => Err(entries("both entries")),
        (None, None) => Err(entries("neither entry")),
        (Some(text), None) => match Key::passphrase(text) {
            Ok(key) => Ok(Some(key)),
            Err(error) => Err(bad(PASSPHRASE, error.given, error.allowed)),
        },
        (None, Some(text)) => {
            let allowed = "64 hexadecimal digits";
            let bytes =
                hex(&text).ok_or_else(|| bad(KEY, format!("{} bytes that are something else", text.len()), allowed))?;
            Key::raw(&bytes).map(Some).map_err(|_| bad(KEY, format!("{} hexadecimal digits", text.len()), allowed))
        }
    }
}

fn hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u32> = text.chars().map(|digit| digit.to_digit(16)).collect::<Option<_>>()?;
    let pairs = digits.chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    pairs.map(|pair| u8::try_from(pair[0] * 16 + pair[1]).ok()).collect()
}

/// The Secret, for people.
fn secret_of(volume: &PortableVolume) -> String {
    let named = volume.spec.encryption.as_ref().and_then(|encryption| encryption.secret.as_ref());
    named.map_or_else(|| "what came as secrets".to_owned(), |secret| format!("Secret {secret}"))
}

/// Whether a volume's dataset is to be made here and now: nobody has owned it, it begins empty, and it is wanted and recorded on this node.
pub(super) fn is_new(me: &str, volume: &PortableVolume) -> bool {
    let status = volume::status(volume);
    let spec = &volume.spec;
    spec.encryption.is_some()
        && spec.source.is_none()
        && spec.import.is_none()
        && spec.placement.node == me
        && status.owner.is_none()
        && status.replicas.iter().any(|replica| replica.node == me)
        && volume.metadata.deletion_timestamp.is_none()
}

/// Makes the dataset of a volume that [`is_new`]. One that was made already, by a call that was cut short, stays as it is. The caller then
/// writes who owns the volume, and mounts it only if that was written: until then nothing can be in it.
pub(super) async fn make(
    zfs: &impl Zfs,
    mounts: &Mounts,
    volume: &PortableVolume,
    dataset: &DatasetName,
    mut properties: Vec<Property>,
    key: &Key,
) -> Result<(), SealError> {
    let Some(encryption) = &volume.spec.encryption else { return Ok(()) };
    match disk::read(zfs, mounts, dataset).await? {
        Some(local) if handoff::is_copy(volume, &local) => return Ok(()),
        Some(_) => {
            let why = "is not this volume's: rename it or destroy it if nobody needs it".to_owned();
            return Err(SealError::Dataset { dataset: dataset.clone(), why });
        }
        None => {}
    }
    properties.insert(0, Property::new("encryption", encryption.cipher.as_str())?);
    let size = u64::try_from(volume.spec.size_bytes).unwrap_or_default();
    match volume.spec.is_zvol() {
        true => zfs.create_volume(dataset, size, &properties, Some(key)).await?,
        false => zfs.create_filesystem(dataset, &properties, Some(key)).await?,
    }
    tracing::info!(%dataset, cipher = encryption.cipher.as_str(), "made the dataset of a new volume, encrypted");
    Ok(())
}

/// Loads the key, so that the dataset can be mounted. A key that is loaded already must be the same: a clone's may be, for its origin.
pub(super) async fn open(
    zfs: &impl Zfs,
    pool: &DatasetName,
    volume: &PortableVolume,
    dataset: &DatasetName,
    key: &Key,
) -> Result<(), SealError> {
    let Some(encryption) = &volume.spec.encryption else { return Ok(()) };
    let found = zfs.dataset(dataset).await?;
    let refuse = |why| Err(SealError::Dataset { dataset: dataset.clone(), why });
    let wanted = encryption.cipher.as_str();
    let Some(root) = root_of(pool, &found).filter(|_| found.encryption.as_deref() == Some(wanted)) else {
        let has = found.encryption.as_deref().unwrap_or("no encryption");
        return refuse(format!(
            "has {has} with a key of {}: the volume is to have {wanted} with its own",
            root_name(&found)
        ));
    };
    match zfs.load_key(root, key).await {
        Err(error) if error.kind == ErrorKind::WrongKey => {
            return Err(SealError::Wrong { secret: secret_of(volume), root: root.clone() });
        }
        result => result?,
    }
    // It may have been asked to grow while it was sealed.
    let wanted = u64::try_from(volume.spec.size_bytes).unwrap_or_default();
    match found.kind {
        Kind::Volume { size } if size < wanted => Ok(zfs.set_property(dataset, &Property::volsize(wanted)).await?),
        _ => Ok(()),
    }
}

/// Takes the key away again, after the volume was unmounted. It stays where others use it: a clone's origin, or an origin's clones. Idempotent.
pub(super) async fn close(zfs: &impl Zfs, pool: &DatasetName, dataset: &DatasetName) -> Result<(), SealError> {
    let found = match zfs.dataset(dataset).await {
        // The key is gone with it.
        Err(error) if matches!(error.kind, ErrorKind::NotFound | ErrorKind::PoolUnavailable) => return Ok(()),
        found => found?,
    };
    let Some(root) = root_of(pool, &found).filter(|_| found.key_available) else { return Ok(()) };
    match zfs.unload_key(root).await {
        Err(error) if error.kind == ErrorKind::Busy && is_shared(zfs, pool, &found).await? => {
            tracing::info!(%dataset, %root, "the key stays: another volume has the same and is in use");
            Ok(())
        }
        Err(error) if error.kind == ErrorKind::NotFound => Ok(()),
        result => Ok(result?),
    }
}

/// The dataset that a volume's key belongs to: itself, or its clone's origin. A key from above is its administrator's, not ours.
fn root_of<'a>(pool: &DatasetName, found: &'a Dataset) -> Option<&'a DatasetName> {
    found.encryption_root.as_ref().filter(|root| root.is_below(pool))
}

fn root_name(found: &Dataset) -> String {
    found.encryption_root.as_ref().map_or_else(|| "nobody".to_owned(), ToString::to_string)
}

/// Whether another volume here has the same key.
async fn is_shared(zfs: &impl Zfs, pool: &DatasetName, found: &Dataset) -> Result<bool, SealError> {
    let all = zfs.children(pool).await?;
    Ok(all.iter().any(|other| other.name != found.name && other.encryption_root == found.encryption_root))
}

#[cfg(test)]
mod tests;
