//! NodeGetVolumeStats: how full a volume is, and whether it works.

use std::path::{Path, PathBuf};
use std::time::Duration;

use portolan_zfs::{DatasetName, Zfs};
use rustix::fs::StatVfs;
use rustix::io::Errno;
use tonic::Status;

use super::{block_failed, check_path, device_of, mount_failed};
use crate::block::mounts::Mount;
use crate::node::Node;
use crate::proto::csi::{NodeGetVolumeStatsResponse, VolumeCondition, VolumeUsage, volume_usage::Unit};

/// How long a filesystem may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Answers for the volume at `path`.
pub(super) async fn get<Z: Zfs>(
    node: &Node<Z>,
    dataset: &DatasetName,
    path: &str,
) -> Result<NodeGetVolumeStatsResponse, Status> {
    let absent = || Status::not_found(format!("volume {dataset} is not at {path}"));
    let path = check_path("volume_path", path).map_err(|_| absent())?;
    let mount = node.mounts.at(&path).map_err(mount_failed)?.ok_or_else(absent)?;
    let device = device_of(node, dataset)?;
    let raw = device.as_ref().filter(|device| node.mounts.node_at(&mount) == Some(device.number()));
    let is_its = |mount: &Mount| {
        mount.source == dataset.as_str() || device.as_ref().is_some_and(|device| device.number() == mount.number)
    };
    if raw.is_none() && !is_its(&mount) {
        return Err(absent());
    }
    if let Some(why) = unusable_pool(node).await {
        return Ok(abnormal(why));
    }
    if let Some(device) = raw {
        let size = device.size().await.map_err(|error| block_failed(error.into()))?;
        let total = VolumeUsage { total: signed(size), unit: Unit::Bytes.into(), ..VolumeUsage::default() };
        return Ok(normal(vec![total]));
    }
    Ok(match look(node.mounts.here(&path)).await {
        Ok(stat) => normal(usage(&stat)),
        Err(why) => abnormal(format!("the volume at {} does not work: {why}", path.display())),
    })
}

/// What is the matter with the pool, if anything is. Asked first: in a pool that is suspended everything waits.
async fn unusable_pool<Z: Zfs>(node: &Node<Z>) -> Option<String> {
    match node.zfs.pool_health(&node.pool).await {
        Ok(health) if health.is_usable() => None,
        Ok(health) => Some(format!("pool {} is {health}: see `zpool status -x` on node {}", node.pool, node.name)),
        Err(error) => Some(format!("pool {} does not answer: {error}", node.pool)),
    }
}

/// A mount whose daemon is gone (zfs-fuse) says `ENOTCONN`, one whose device is gone `EIO`.
async fn look(path: PathBuf) -> Result<StatVfs, String> {
    let stat = tokio::task::spawn_blocking(move || statvfs(&path));
    match tokio::time::timeout(ANSWER_WITHIN, stat).await {
        Err(_) => Err(format!("no answer within {ANSWER_WITHIN:?}")),
        Ok(Err(error)) => Err(error.to_string()),
        Ok(Ok(stat)) => stat.map_err(|error| std::io::Error::from(error).to_string()),
    }
}

fn statvfs(path: &Path) -> Result<StatVfs, Errno> {
    rustix::fs::statvfs(path)
}

fn usage(stat: &StatVfs) -> Vec<VolumeUsage> {
    let usage = |unit: Unit, total: u64, free: u64, available: u64, size: u64| VolumeUsage {
        available: signed(available.saturating_mul(size)),
        total: signed(total.saturating_mul(size)),
        used: signed(total.saturating_sub(free).saturating_mul(size)),
        unit: unit.into(),
    };
    vec![
        usage(Unit::Bytes, stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_frsize),
        usage(Unit::Inodes, stat.f_files, stat.f_ffree, stat.f_favail, 1),
    ]
}

fn normal(usage: Vec<VolumeUsage>) -> NodeGetVolumeStatsResponse {
    let condition = VolumeCondition { abnormal: false, message: "the volume works".into() };
    NodeGetVolumeStatsResponse { usage, volume_condition: Some(condition) }
}

fn abnormal(message: String) -> NodeGetVolumeStatsResponse {
    let condition = VolumeCondition { abnormal: true, message };
    NodeGetVolumeStatsResponse { usage: Vec::new(), volume_condition: Some(condition) }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
