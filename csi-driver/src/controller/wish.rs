//! What somebody wants a new volume to be, and the PortableVolume that says so. A claim's wish and a CSI call's are the same from here on.

use kube::api::{ObjectMeta, PostParams};
use kube::{Api, ResourceExt};
use portolan_crds::{
    KeySecret, Placement, PortableVolume, PortableVolumeSpec, StorageNode, VOLUME_FINALIZER, VolumeEncryption,
    VolumeImport, VolumeMode, VolumeSource, condition,
};
use portolan_runtime::conditions;

use super::Hub;
use crate::parameters::{Asked, Import};
use crate::quantity::Human;

/// The unit of a zvol's size: a multiple of every block size.
const ZVOL_UNIT: i64 = 1 << 20;

/// A wish, checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Wish {
    /// As it was asked for, for people.
    pub(super) size: String,
    pub(super) size_bytes: i64,
    pub(super) mode: VolumeMode,
    /// Whether nobody is ever to write it.
    pub(super) read_only: bool,
    pub(super) asked: Asked,
    /// What it begins as.
    pub(super) source: Option<VolumeSource>,
    /// Where its key is, if it is encrypted and that is known.
    pub(super) secret: Option<KeySecret>,
    /// The dataset that it is to be, which is there already.
    pub(super) import: Option<Import>,
    /// The claim, `namespace/name`, and its UID; empty if there is none.
    pub(super) claim: String,
    pub(super) claim_uid: String,
}

impl Wish {
    /// How the volume is to be encrypted.
    pub(super) fn encryption(&self) -> Option<VolumeEncryption> {
        self.asked.encryption.map(|cipher| VolumeEncryption { cipher, secret: self.secret.clone() })
    }

    /// The spec of the volume, on a node.
    pub(super) fn spec(self, node: String) -> PortableVolumeSpec {
        let encryption = self.encryption();
        let mut spec = PortableVolumeSpec {
            encryption,
            size: self.size,
            size_bytes: self.size_bytes,
            claim: self.claim,
            claim_uid: self.claim_uid,
            mode: self.mode,
            read_only: self.read_only,
            filesystem: self.asked.filesystem,
            parameters: self.asked.parameters,
            source: self.source,
            import: self.import.map(|import| VolumeImport { dataset: import.dataset }),
            placement: Placement { node },
        };
        if spec.is_zvol() {
            spec.size_bytes = round_up(spec.size_bytes);
            spec.size = Human(spec.size_bytes).to_string();
        }
        spec
    }
}

/// A zvol's size is a whole number of blocks.
pub(super) fn round_up(bytes: i64) -> i64 {
    bytes.checked_add(ZVOL_UNIT - 1).map_or(bytes, |more| more / ZVOL_UNIT * ZVOL_UNIT)
}

/// Makes the volume's object. Idempotent.
pub(super) async fn create(hub: &Hub, name: &str, spec: PortableVolumeSpec) -> kube::Result<()> {
    let volume = PortableVolume {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            finalizers: Some(vec![VOLUME_FINALIZER.to_owned()]),
            ..ObjectMeta::default()
        },
        spec,
        status: None,
    };
    match hub.volumes.create(&PostParams::default(), &volume).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
        result => result.map(drop),
    }
}

/// What a volume needs of a pool that not every pool can do.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Needs {
    /// It is a zvol.
    pub(super) zvol: bool,
    /// It is encrypted.
    pub(super) encryption: bool,
}

impl Needs {
    pub(crate) fn of(spec: &PortableVolumeSpec) -> Self {
        Self { zvol: spec.is_zvol(), encryption: spec.encryption.is_some() }
    }

    /// What both need.
    pub(crate) fn and(self, other: Self) -> Self {
        Self { zvol: self.zvol || other.zvol, encryption: self.encryption || other.encryption }
    }

    /// What a pool with these capabilities can't do of it.
    pub(super) fn missing(self, capabilities: &[String]) -> Option<&'static str> {
        let can = |wanted: &[&str]| wanted.iter().all(|wanted| capabilities.iter().any(|can| can == wanted));
        match self {
            Self { zvol: true, .. } if !can(&["zvol"]) => Some("can't have zvols, which this volume is one of"),
            Self { encryption: true, .. } if !can(&["encryption", "raw-send"]) => {
                Some("can't encrypt, and this volume is encrypted")
            }
            _ => None,
        }
    }
}

/// A node that can take a volume.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Candidate {
    pub(super) node: String,
    pub(super) available: i64,
    pub(super) capacity: i64,
    pub(super) capabilities: Vec<String>,
}

/// The nodes whose pools can be used, the one with the most room first.
pub(super) async fn candidates(storage_nodes: &Api<StorageNode>) -> kube::Result<Vec<Candidate>> {
    let all = storage_nodes.list(&Default::default()).await?;
    let mut found: Vec<Candidate> = all.items.iter().filter_map(candidate).collect();
    found.sort_by_key(|candidate| std::cmp::Reverse(candidate.available));
    Ok(found)
}

/// What a node offers, if its pool can be used.
pub(super) fn candidate(node: &StorageNode) -> Option<Candidate> {
    let status = node.status.as_ref()?;
    let ready = conditions::find(&status.conditions, condition::READY)?.status == condition::TRUE;
    ready.then_some(Candidate {
        node: node.name_any(),
        available: status.available_bytes?,
        capacity: status.capacity_bytes?,
        capabilities: status.capabilities.clone(),
    })
}

/// Why a node can't take a volume, if it can't.
pub(super) async fn no_pool(
    storage_nodes: &Api<StorageNode>,
    node: &str,
    needs: Needs,
) -> kube::Result<Option<String>> {
    Ok(why_no_pool(node, storage_nodes.get_opt(node).await?.as_ref(), needs))
}

/// Why a node with this StorageNode can't take a volume, if it can't.
pub(super) fn why_no_pool(node: &str, found: Option<&StorageNode>, needs: Needs) -> Option<String> {
    let Some(found) = found else {
        return Some(format!("node {node} has no StorageNode: the storage agent has not run there"));
    };
    let ready = found.status.as_ref().and_then(|status| conditions::find(&status.conditions, condition::READY));
    match ready {
        Some(ready) if ready.status == condition::TRUE => {
            let status = found.status.clone().unwrap_or_default();
            let which = status.zfs_version.unwrap_or_default();
            needs.missing(&status.capabilities).map(|why| format!("the pool of node {node} ({which}) {why}"))
        }
        Some(ready) => Some(format!("StorageNode {node} is not ready: {}: {}", ready.reason, ready.message)),
        None => Some(format!("StorageNode {node} does not say whether it is ready")),
    }
}

#[cfg(test)]
mod tests {
    use portolan_crds::Filesystem;

    use super::*;

    #[test]
    fn what_a_pool_cannot_do_is_said() {
        let can = |all: &[&str]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
        let (fuse, old) = (can(&[]), can(&["zvol", "encryption"]));
        let openzfs = can(&["zvol", "encryption", "raw-send"]);
        let (plain, sealed) = (Needs::default(), Needs { encryption: true, ..Needs::default() });
        assert_eq!((plain.missing(&fuse), sealed.missing(&openzfs)), (None, None));
        assert!(Needs { zvol: true, ..plain }.missing(&fuse).unwrap().contains("zvol"));
        assert!(sealed.missing(&fuse).unwrap().contains("encrypt"));
        assert!(sealed.missing(&old).is_some(), "it could never move");
    }

    #[test]
    fn a_zvol_has_whole_blocks() {
        let wish = Wish { size: "1500k".into(), size_bytes: 1_500_000, ..Wish::default() };
        assert_eq!(wish.clone().spec("a".into()).size_bytes, 1_500_000);
        let asked = Asked { filesystem: Filesystem::Ext4, ..Asked::default() };
        let spec = Wish { asked, ..wish }.spec("a".into());
        assert_eq!((spec.size_bytes, spec.size.as_str(), spec.placement.node.as_str()), (2 << 20, "2Mi", "a"));
    }
}
