//! The lab must be up, with the images imported.

use portolan_e2e::{
    bad_input, egress, encrypted, encryption, everyone, families, faults, hotplug,
    lab::Lab,
    limits, migration,
    parts::Parts,
    policies, resuming, rolling, sanity, scene, shared_reading, snapshots,
    storage_suite::{self, Scope},
    trouble, uninstall, upgrade, zfs_contract,
};

/// A part of the test by name, and whether it is played here if nobody asks for it.
type Part = (&'static str, bool, fn(&Lab) -> anyhow::Result<()>);

/// One test, because the cluster is one: a test harness would run several side by side. `PARTS="install snapshots"` plays only these.
#[test]
fn a_pod_moves_with_its_disk_its_address_and_its_name() -> anyhow::Result<()> {
    let lab = Lab::connect()?;
    let openzfs = lab.has_zvols();
    let parts: [Part; 24] = [
        ("install", true, scene::install),
        // The same on each pool, and emulated nodes need many minutes.
        ("scene", !openzfs, scene::play),
        ("bad-input", !openzfs, bad_input::play),
        ("families", !openzfs, families::play),
        ("everyone", !openzfs, everyone::play),
        ("hotplug", !openzfs, hotplug::play),
        ("policies", !openzfs, policies::play),
        ("egress", !openzfs, egress::play),
        ("limits", !openzfs, limits::play),
        ("rolling", !openzfs, rolling::play),
        ("upgrade", !openzfs, upgrade::play),
        ("snapshots", !openzfs, snapshots::play),
        ("shared-reading", !openzfs, shared_reading::play),
        ("encryption", true, encryption::play),
        // Only guests have WireGuard; native nodes refuse it.
        ("encrypted", true, encrypted::play),
        ("resuming", openzfs, resuming::play),
        ("migration", !openzfs, migration::play),
        ("faults", !openzfs, faults::play),
        ("trouble", !openzfs, trouble::play),
        ("fault-in-use", !openzfs, faults::play_in_use),
        // With block volumes, too, where there are zvols.
        ("sanity", true, sanity::play),
        ("storage-suite", !openzfs, |lab| storage_suite::play(lab, Scope::Selection)),
        // Of OpenZFS; zfs-fuse is held to it by the tests without a cluster.
        ("zfs-contract", false, zfs_contract::play),
        ("uninstall", true, uninstall::play),
    ];
    let asked = Parts::read(&parts.map(|part| part.0))?;
    for (name, here, play) in parts {
        if asked.has(name, here) {
            play(&lab)?;
        }
    }
    Ok(())
}
