//! The lab must be up, with the images imported.

use std::sync::{Mutex, PoisonError};

use portolan_e2e::{bad_input, lab::Lab, scene, uninstall, zfs_contract};

/// The cluster is one, and a test harness runs several tests side by side.
static CLUSTER: Mutex<()> = Mutex::new(());

#[test]
fn a_pod_moves_with_its_disk_its_address_and_its_name() -> anyhow::Result<()> {
    let _alone = CLUSTER.lock().unwrap_or_else(PoisonError::into_inner);
    let lab = Lab::connect()?;
    scene::play(&lab)?;
    bad_input::play(&lab)?;
    uninstall::play(&lab)
}

#[test]
fn openzfs_keeps_the_contract() -> anyhow::Result<()> {
    if std::env::var("LANE").is_ok_and(|lane| lane == "openzfs") {
        let _alone = CLUSTER.lock().unwrap_or_else(PoisonError::into_inner);
        return zfs_contract::play(&Lab::connect()?);
    }
    println!(
        "SKIPPED: only nodes of LANE=openzfs have OpenZFS; zfs-fuse is held to the contract by the tests without a cluster"
    );
    Ok(())
}
