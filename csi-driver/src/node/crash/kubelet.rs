//! What a kubelet asks its node's driver for, again and again until it is done.

use std::sync::Arc;

use portolan_zfs::memory::Memory;
use tonic::{Request, Status};

use crate::node::Node;
use crate::node::csi::Service;
use crate::proto::csi::node_server::Node as _;
use crate::proto::csi::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
use crate::proto::csi::{
    NodePublishVolumeRequest, NodeStageVolumeRequest, NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest,
    VolumeCapability,
};

pub(super) const VOLUME: &str = "db";
const TARGET: &str = "/pods/one";
const STAGING: &str = "/staging/db";

/// One call, about the one volume that has a pod.
#[derive(Clone, Copy, Debug)]
pub(super) enum Call {
    Stage,
    Publish,
    Unpublish,
    Unstage,
}

/// What a pod's start takes.
pub(super) const START: [Call; 2] = [Call::Stage, Call::Publish];
/// What its end takes.
pub(super) const END: [Call; 2] = [Call::Unpublish, Call::Unstage];

/// `reads`: the volume's access mode is that of many nodes.
pub(super) async fn call(node: Arc<Node<Memory>>, call: Call, reads: bool) -> Result<(), Status> {
    let driver = Service(node);
    let (volume_id, target_path, staging_target_path) = (VOLUME.to_owned(), TARGET.to_owned(), STAGING.to_owned());
    let mode = if reads { Mode::MultiNodeReaderOnly } else { Mode::SingleNodeMultiWriter };
    let volume_capability = Some(VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume::default())),
        access_mode: Some(AccessMode { mode: mode.into() }),
    });
    match call {
        Call::Stage => {
            let wanted = NodeStageVolumeRequest {
                volume_id,
                staging_target_path,
                volume_capability,
                // Of no interest to a volume that isn't encrypted.
                secrets: [("encryption-passphrase".to_owned(), "correct horse".to_owned())].into(),
                ..Default::default()
            };
            driver.node_stage_volume(Request::new(wanted)).await.map(drop)
        }
        Call::Publish => {
            let wanted = NodePublishVolumeRequest {
                volume_id,
                staging_target_path,
                target_path,
                volume_capability,
                ..Default::default()
            };
            driver.node_publish_volume(Request::new(wanted)).await.map(drop)
        }
        Call::Unpublish => {
            let wanted = NodeUnpublishVolumeRequest { volume_id, target_path };
            driver.node_unpublish_volume(Request::new(wanted)).await.map(drop)
        }
        Call::Unstage => {
            let wanted = NodeUnstageVolumeRequest { volume_id, staging_target_path };
            driver.node_unstage_volume(Request::new(wanted)).await.map(drop)
        }
    }
}
