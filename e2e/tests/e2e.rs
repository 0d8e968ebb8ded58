//! The lab must be up, with the images imported.

use portolan_e2e::{
    bad_input,
    lab::Lab,
    sanity, scene, snapshots,
    storage_suite::{self, Scope},
    uninstall, zfs_contract,
};

/// One test, because the cluster is one: a test harness would run several side by side.
#[test]
fn a_pod_moves_with_its_disk_its_address_and_its_name() -> anyhow::Result<()> {
    let lab = Lab::connect()?;
    scene::play(&lab)?;
    bad_input::play(&lab)?;
    snapshots::play(&lab)?;
    sanity::play(&lab)?;
    if lab.has_zvols() {
        // zfs-fuse is held to it by the tests without a cluster.
        zfs_contract::play(&lab)?;
    } else {
        // Emulated nodes would take hours.
        storage_suite::play(&lab, Scope::Selection)?;
    }
    uninstall::play(&lab)
}
