//! What is found of this node's pool, and the conditions that follow.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use portolan_crds::condition;
use portolan_runtime::conditions;
use portolan_zfs::{DatasetName, ErrorKind, Guid, PoolHealth, Space, Zfs, ZfsError};

use crate::quantity::Human;
use crate::room;

/// A pool that answers.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    pub(super) health: PoolHealth,
    /// What `zpool status` says, unless all is well.
    pub(super) words: Option<String>,
    /// What it is and what room it has: only of a pool that can be used.
    pub(super) guid: Option<Guid>,
    pub(super) space: Option<Space>,
}

/// Looks at the pool of `dataset`. One that doesn't answer `within` so long is a timeout: its commands may hang for ever.
pub(super) async fn look(zfs: &impl Zfs, dataset: &DatasetName, within: Duration) -> Result<Pool, ZfsError> {
    match tokio::time::timeout(within, ask(zfs, dataset)).await {
        Ok(found) => found,
        Err(_) => Err(ZfsError {
            kind: ErrorKind::Timeout,
            command: format!("zpool list {}", dataset.pool()),
            status: None,
            stderr: format!("no answer within {within:?}"),
        }),
    }
}

async fn ask(zfs: &impl Zfs, dataset: &DatasetName) -> Result<Pool, ZfsError> {
    let health = zfs.pool_health(dataset).await?;
    // Words are for people: without them it goes as well.
    let words = if health == PoolHealth::Online { None } else { zfs.pool_status(dataset).await.ok() };
    if !health.is_usable() {
        return Ok(Pool { health, words, guid: None, space: None });
    }
    let (guid, space) = (zfs.pool_guid(dataset).await?, zfs.space(dataset).await?);
    Ok(Pool { health, words, guid: Some(guid), space: Some(space) })
}

/// Sets what is to be said of `pool` on `node`: `Ready`, `PoolHealthy` and `SpaceLow`.
pub(super) fn describe(
    conditions: &mut Vec<Condition>,
    pool: &DatasetName,
    node: &str,
    found: &Result<Pool, ZfsError>,
) {
    let mut set = |type_, (status, reason, message): (&str, &str, String)| {
        conditions::set(conditions, type_, status, reason, &message, None);
    };
    set(condition::READY, ready(pool, node, found));
    set(condition::POOL_HEALTHY, healthy(pool, node, found));
    set(condition::SPACE_LOW, low(pool, found));
}

fn ready(pool: &DatasetName, node: &str, found: &Result<Pool, ZfsError>) -> (&'static str, &'static str, String) {
    match found {
        Ok(Pool { health, .. }) if health.is_usable() => {
            (condition::TRUE, "PoolUsable", format!("pool {pool} is {health}"))
        }
        Ok(Pool { health, .. }) => {
            let message = format!("pool {pool} is {health}: see `zpool status -x` on node {node}");
            (condition::FALSE, "PoolNotUsable", message)
        }
        Err(error) if error.kind == ErrorKind::Timeout => (condition::FALSE, "PoolNotResponding", hangs(pool, node)),
        Err(error) => (condition::FALSE, "PoolMissing", missing(pool, node, error)),
    }
}

fn healthy(pool: &DatasetName, node: &str, found: &Result<Pool, ZfsError>) -> (&'static str, &'static str, String) {
    match found {
        Ok(Pool { health: PoolHealth::Online, .. }) => (condition::TRUE, "Online", format!("pool {pool} is ONLINE")),
        Ok(Pool { health, words, .. }) => {
            let words = words.clone().unwrap_or_else(|| health.to_string());
            let message = format!("pool {}: {words} (`zpool status -x` on node {node})", pool.pool());
            (condition::FALSE, word(health), message)
        }
        Err(error) if error.kind == ErrorKind::Timeout => (condition::FALSE, "NotResponding", hangs(pool, node)),
        Err(error) => (condition::FALSE, "Missing", missing(pool, node, error)),
    }
}

fn low(pool: &DatasetName, found: &Result<Pool, ZfsError>) -> (&'static str, &'static str, String) {
    let Some(space) = found.as_ref().ok().and_then(|found| found.space) else {
        return (condition::UNKNOWN, "PoolNotUsable", format!("the room in {pool} can't be told"));
    };
    let (available, capacity) = (bytes(space.available), bytes(space.capacity()));
    let percent = room::LOW_PERCENT;
    match room::is_low(available, capacity) {
        true => {
            let message = format!(
                "{} of {} are free in {pool}, less than {percent} %: make room, or give the pool more devices",
                Human(available),
                Human(capacity)
            );
            (condition::TRUE, "LittleFree", message)
        }
        false => (condition::FALSE, "Enough", format!("{percent} % or more are free in {pool}")),
    }
}

/// A condition's reason.
fn word(health: &PoolHealth) -> &'static str {
    match health {
        PoolHealth::Online => "Online",
        PoolHealth::Degraded => "Degraded",
        PoolHealth::Faulted => "Faulted",
        PoolHealth::Offline => "Offline",
        PoolHealth::Removed => "Removed",
        PoolHealth::Unavailable => "Unavailable",
        PoolHealth::Suspended => "Suspended",
        PoolHealth::Unknown(_) => "Unknown",
    }
}

fn hangs(pool: &DatasetName, node: &str) -> String {
    format!(
        "pool {} on node {node} does not answer: its disks may hang; see `zpool status -x` and the kernel's log there",
        pool.pool()
    )
}

fn missing(pool: &DatasetName, node: &str, error: &ZfsError) -> String {
    let make = match pool.as_str().split_once('/') {
        None => format!("`zpool create {pool} <device>`"),
        Some((root, _)) => format!("`zpool create {root} <device>` and `zfs create -p -o canmount=off {pool}`"),
    };
    format!("node {node} has no {pool} that can be used ({error}). To give it one, run there: {make}")
}

/// Bytes as the API has them.
pub(super) fn bytes(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}

/// The conditions that a person should hear of, now that they are so: what got worse, and what got well again.
pub(super) fn news<'a>(was: &[Condition], now: &'a [Condition]) -> Vec<(&'a Condition, bool)> {
    let good = [(condition::POOL_HEALTHY, condition::TRUE), (condition::SPACE_LOW, condition::FALSE)];
    good.iter()
        .filter_map(|(type_, good)| {
            let now = conditions::find(now, type_).filter(|now| now.status != condition::UNKNOWN)?;
            let is_good = now.status == *good;
            let same = match conditions::find(was, type_) {
                Some(was) => (&was.status, &was.reason) == (&now.status, &now.reason),
                None => is_good,
            };
            (!same).then_some((now, is_good))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use portolan_zfs::memory::{Fault, Memory};

    use super::*;

    fn name() -> DatasetName {
        DatasetName::new("tank").unwrap()
    }

    async fn described(zfs: &Memory) -> Vec<Condition> {
        let mut conditions = Vec::new();
        let found = look(zfs, &name(), Duration::from_millis(50)).await;
        describe(&mut conditions, &name(), "a", &found);
        conditions
    }

    fn said(conditions: &[Condition]) -> Vec<String> {
        conditions.iter().map(|c| format!("{} {} {}", c.type_, c.status, c.reason)).collect()
    }

    #[tokio::test]
    async fn conditions_say_how_the_pool_is() {
        let zfs = Memory::new(&name(), 1 << 30);
        let well = described(&zfs).await;
        assert_eq!(said(&well), ["Ready True PoolUsable", "PoolHealthy True Online", "SpaceLow False Enough"]);
        zfs.set_health(PoolHealth::Degraded);
        let worse = described(&zfs).await;
        assert_eq!(said(&worse)[..2], ["Ready True PoolUsable", "PoolHealthy False Degraded"]);
        zfs.set_health(PoolHealth::Suspended);
        let stuck = described(&zfs).await;
        let wanted = ["Ready False PoolNotUsable", "PoolHealthy False Suspended", "SpaceLow Unknown PoolNotUsable"];
        assert_eq!(said(&stuck), wanted);
        zfs.set_imported(false);
        assert_eq!(said(&described(&zfs).await)[..2], ["Ready False PoolMissing", "PoolHealthy False Missing"]);
        // Said once each, and when it is over.
        let told = |was, now| news(was, now).iter().map(|(c, good)| (c.reason.clone(), *good)).collect::<Vec<_>>();
        assert_eq!(told(&[], &well), []);
        assert_eq!(told(&well, &worse), [("Degraded".into(), false)]);
        assert_eq!(told(&worse, &worse), []);
        assert_eq!(told(&worse, &well), [("Online".into(), true)]);
        assert_eq!(told(&[], &stuck), [("Suspended".into(), false)]);
    }

    #[tokio::test]
    async fn a_pool_that_hangs_is_waited_for_no_longer_than_told() {
        for operation in ["pool_health", "space"] {
            let zfs = Memory::new(&name(), 1 << 30);
            zfs.inject(operation, 1, Fault::Hang);
            let hung = tokio::time::timeout(Duration::from_secs(5), described(&zfs)).await.expect("waits for ever");
            assert_eq!(said(&hung)[..2], ["Ready False PoolNotResponding", "PoolHealthy False NotResponding"]);
        }
    }

    #[tokio::test]
    async fn little_free_space_is_said() {
        let zfs = Memory::new(&name(), 100 << 10);
        let dataset = name().child("a").unwrap();
        zfs.create_filesystem(&dataset, &[portolan_zfs::Property::new("mountpoint", "/m").unwrap()], None)
            .await
            .unwrap();
        zfs.write(&dataset, &vec![0; 95 << 10]).unwrap();
        let full = described(&zfs).await;
        assert_eq!(said(&full)[2], "SpaceLow True LittleFree");
        assert!(full[2].message.contains("10 %"), "{}", full[2].message);
    }
}
