//! What there is, put so that two runs can be compared: without times, versions and numbers that differ from run to run.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::volume::OPEN_PROPERTY;
use portolan_crds::{PortableSnapshot, PortableVolume};
use portolan_tests::api::FakeApi;
use portolan_zfs::memory::{Contents, Memory};
use serde_json::Value;

/// The nodes' pools.
pub(super) type Pools = BTreeMap<&'static str, Memory>;

/// Fields that say when something was, or how it came there.
const VARYING: [&str; 17] = [
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "lastTransitionTime",
    "startedAt",
    "quiescedAt",
    "finishedAt",
    "downtimeMilliseconds",
    "bytes",
    "preCopyBytes",
    "base",
    "rounds",
    "roundGuid",
    "used",
    "usedBytes",
    "observedGeneration",
];

/// All datasets of a pool but those that hold the others.
pub(super) fn datasets(pool: &Memory) -> Vec<Contents> {
    let mut found = pool.contents().unwrap();
    found.retain(|contents| !matches!(contents.dataset.name.as_str(), "tank" | "tank/portolan"));
    found
}

pub(super) fn draw(api: &FakeApi, pools: &Pools) -> String {
    let mut guids = BTreeMap::new();
    let mut text = String::new();
    for (node, pool) in pools {
        for contents in pool.contents().unwrap() {
            let dataset = &contents.dataset;
            guids.insert(dataset.guid.to_string(), format!("guid of {node}:{}", dataset.name));
            for snapshot in &contents.snapshots {
                let of = format!("guid of {}@{}", dataset.name.short(), attempt_less(snapshot.name.short()));
                guids.insert(snapshot.guid.to_string(), of);
            }
        }
        for contents in datasets(pool) {
            draw_dataset(&mut text, node, &contents);
        }
        // The volumes' parent is nobody's to snapshot.
        for contents in pool.contents().unwrap().iter().filter(|contents| contents.dataset.name.short() == "portolan") {
            writeln!(text, "{node}: {} snapshots of the parent", contents.snapshots.len()).unwrap();
        }
    }
    let volumes = api.all::<PortableVolume>().into_iter().map(|volume| serde_json::to_value(volume).unwrap());
    let snapshots = api.all::<PortableSnapshot>().into_iter().map(|snapshot| serde_json::to_value(snapshot).unwrap());
    for mut object in volumes.chain(snapshots) {
        let deleted = !object["metadata"]["deletionTimestamp"].is_null();
        settle(&mut object, &guids);
        writeln!(text, "deleted {deleted}: {}", serde_json::to_string_pretty(&object).unwrap()).unwrap();
    }
    text
}

fn draw_dataset(text: &mut String, node: &str, contents: &Contents) {
    let dataset = &contents.dataset;
    let mut properties = contents.properties.clone();
    properties.remove("readonly");
    // Stays on where an agent ended between an unmount and this: the next move plays the log, which is empty.
    properties.remove(OPEN_PROPERTY);
    let origin = dataset.origin.as_ref().map(ToString::to_string).unwrap_or_default();
    let data = String::from_utf8_lossy(&contents.data);
    writeln!(
        text,
        "{node}: {} {:?} readonly={} mounted={} origin={origin:?} data={data:?}",
        dataset.name, dataset.kind, dataset.readonly, dataset.mounted
    )
    .unwrap();
    writeln!(text, "    {properties:?}").unwrap();
    for snapshot in &contents.snapshots {
        let short = attempt_less(snapshot.name.short());
        writeln!(text, "    @{short} holds={} deferred={}", snapshot.holds, snapshot.defer_destroy).unwrap();
    }
}

/// A final snapshot's name without the number of its attempt.
fn attempt_less(short: &str) -> String {
    let words: Vec<&str> = short.split('-').collect();
    match words[..] {
        ["portolan", epoch, attempt] if attempt.parse::<u32>().is_ok() => format!("portolan-{epoch}"),
        _ => short.to_owned(),
    }
}

fn settle(value: &mut Value, guids: &BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !VARYING.contains(&name.as_str()));
            fields.values_mut().for_each(|value| settle(value, guids));
        }
        Value::Array(items) => {
            items.iter_mut().for_each(|value| settle(value, guids));
            items.sort_by_key(ToString::to_string);
        }
        Value::String(text) => {
            if let Some(known) = guids.get(text) {
                known.clone_into(text);
            } else if text.len() >= 15 && text.bytes().all(|byte| byte.is_ascii_digit()) {
                "a guid of what is gone".clone_into(text);
            } else {
                *text = attempt_less(text);
            }
        }
        _ => {}
    }
}
