//! Snapshots of a database's volume, and clones of them.

use anyhow::Result;
use portolan_bench::stats::{Pairs, Table};
use portolan_e2e::lab::{Lab, text};

use crate::{
    Sizes,
    bare::{Bare, dataset, options},
    load::{BARE, CLAIM, SIZE},
    volumes::{NAMESPACE, Watches, between, claim, delete_samples},
    watch::{Event, Watch},
};

const PATIENCE: u64 = 60;

/// Snapshots and a clone of each, beside those of the bare dataset, which has the same in it.
///
/// # Errors
/// When one isn't taken.
pub fn measure(lab: &Lab, watches: &Watches, bare: &mut Bare, node: &str, sizes: &Sizes) -> Result<Table> {
    let theirs = format!("/apis/snapshot.storage.k8s.io/v1/namespaces/{NAMESPACE}/volumesnapshots");
    let (theirs, ours) =
        (Watch::start(lab, &theirs)?, Watch::start(lab, "/apis/portolan.dev/v1alpha1/portablesnapshots")?);
    let (snapshot, clone) = ("`zfs snapshot`", "`zfs clone`");
    let mut taken = Pairs::new("of that, Portolan's part: PortableSnapshot → taken", snapshot);
    let mut ready = Pairs::new("VolumeSnapshot → readyToUse", snapshot);
    let mut bound = Pairs::new("claim from a VolumeSnapshot → Bound", clone);
    for i in 0..sizes.snapshots {
        let (name, copy) = (format!("snapshot-{i}"), format!("clone-{i}"));
        let limit = bare.time(&format!("zfs snapshot {}@{name}", dataset(BARE)))?;
        lab.apply(&volume_snapshot(&name))?;
        let (begin, uid) = theirs.find(
            &name,
            PATIENCE,
            |event| event.of(&name),
            |event| (event.at, text(&event.object, "/metadata/uid").map(str::to_owned)),
        )?;
        let uid = uid?;
        let of = |event: &Event| text(&event.object, "/metadata/name").is_ok_and(|name| name.contains(&uid));
        let has_guid = |event: &Event| event.object["status"]["guid"].is_string();
        let object = ours.first(&format!("PortableSnapshot of {uid}"), PATIENCE, of)?;
        let done = ours.first(&format!("{uid} is taken"), PATIENCE, |event| of(event) && has_guid(event))?;
        taken.push(between(object, done), limit);
        let is = |event: &Event| event.of(&name) && event.object["status"]["readyToUse"] == true;
        ready.push(between(begin, theirs.first(&format!("{name} is ready"), PATIENCE, is)?), limit);

        let (from, to) = (dataset(BARE), dataset(&copy));
        let limit = bare.time(&format!("zfs clone {} {from}@{name} {to}", options(&copy, SIZE)))?;
        lab.apply(&claim(&copy, SIZE, Some(node), Some(&name)))?;
        bound.push(between(watches.claim(&copy)?.0, watches.bound(&copy)?), limit);
    }
    delete_samples(lab, true)?;
    lab.kubectl(&["-n", NAMESPACE, "delete", "volumesnapshots", "--all", "--timeout=4m"])?;
    Ok(Table::new("Snapshots and clones of a database's volume", "ms", [ready, taken, bound]))
}

fn volume_snapshot(name: &str) -> String {
    format!(
        "apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec: {{source: {{persistentVolumeClaimName: {CLAIM}}}}}
"
    )
}
