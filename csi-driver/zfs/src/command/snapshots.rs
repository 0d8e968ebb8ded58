//! Snapshots.

use super::{CommandLine, odd_output};
use crate::error::{ErrorKind, ZfsError};
use crate::model::Snapshot;
use crate::name::{DatasetName, InvalidName, SnapshotName};
use crate::parse;

const PROPERTIES: &str = "guid,createtxg,creation,used,userrefs,defer_destroy";

/// Set on all snapshots of a recursive one that was made for some of them; its value is their short name.
const MARK: &str = "portolan:snapshot-all";

impl CommandLine {
    pub(super) async fn snapshots_of(&self, dataset: &DatasetName) -> Result<Vec<Snapshot>, ZfsError> {
        let words = ["zfs", "get", "-Hp", "-d", "1", "-o", parse::COLUMNS, PROPERTIES, dataset.as_str()];
        parse::snapshots(dataset, &self.run(dataset, &words).await?).map_err(|why| odd_output(&words, &why))
    }

    pub(super) async fn take(&self, name: &SnapshotName) -> Result<Snapshot, ZfsError> {
        let full = name.to_string();
        self.run(name.dataset(), &["zfs", "snapshot", &full]).await?;
        let words = ["zfs", "get", "-Hp", "-o", parse::COLUMNS, PROPERTIES, &full];
        let found = parse::snapshots(name.dataset(), &self.run(name.dataset(), &words).await?)
            .map_err(|why| odd_output(&words, &why))?;
        found.into_iter().next().ok_or_else(|| odd_output(&words, "printed nothing"))
    }

    pub(super) async fn rename_taken(&self, name: &SnapshotName, short: &str) -> Result<(), ZfsError> {
        let invalid = |error: InvalidName| ZfsError::new(ErrorKind::Other, "zfs rename", error.to_string());
        let to = name.dataset().snapshot(short).map_err(invalid)?;
        self.run(name.dataset(), &["zfs", "rename", &name.to_string(), &to.to_string()]).await.map(drop)
    }

    /// See [`Zfs::snapshot_all`](crate::Zfs::snapshot_all).
    pub(super) async fn take_all(
        &self,
        parent: &DatasetName,
        datasets: &[DatasetName],
        short: &str,
    ) -> Result<Vec<Snapshot>, ZfsError> {
        let names = checked_names(parent, datasets, short)?;
        let at_once = self.probed().await?.capabilities.several_snapshots;
        if self.taken_together(&names).await?.is_none() {
            if at_once {
                let names: Vec<String> = names.iter().map(SnapshotName::to_string).collect();
                let words: Vec<&str> =
                    ["zfs", "snapshot"].into_iter().chain(names.iter().map(String::as_str)).collect();
                self.run(parent, &words).await?;
            } else {
                let (mark, all) = (format!("{MARK}={short}"), format!("{parent}@{short}"));
                self.run(parent, &["zfs", "snapshot", "-r", "-o", &mark, &all]).await?;
            }
        }
        if !at_once {
            self.destroy_others(parent, &names, short).await?;
        }
        let gone =
            || ZfsError::new(ErrorKind::NotFound, format!("zfs snapshot {parent}@{short}"), "they are gone again");
        self.taken_together(&names).await?.ok_or_else(gone)
    }

    /// See [`Zfs::clean_up_snapshot_all`](crate::Zfs::clean_up_snapshot_all).
    pub(super) async fn clean_up(
        &self,
        parent: &DatasetName,
        datasets: &[DatasetName],
        short: &str,
    ) -> Result<(), ZfsError> {
        if self.probed().await?.capabilities.several_snapshots || datasets.is_empty() {
            return Ok(());
        }
        self.destroy_others(parent, &checked_names(parent, datasets, short)?, short).await
    }

    /// The snapshots of these names, none if none of them is there. Equal transactions are what makes them one moment's.
    async fn taken_together(&self, names: &[SnapshotName]) -> Result<Option<Vec<Snapshot>>, ZfsError> {
        let mut found = Vec::new();
        for name in names {
            found.extend(self.snapshots_of(name.dataset()).await?.into_iter().find(|taken| taken.name == *name));
        }
        let together = found.windows(2).all(|pair| pair[0].created_txg == pair[1].created_txg);
        match found.is_empty() {
            true => Ok(None),
            false if found.len() == names.len() && together => Ok(Some(found)),
            false => {
                let others: Vec<String> = found.iter().map(|taken| taken.name.to_string()).collect();
                let command =
                    format!("zfs snapshot {}", names.iter().map(SnapshotName::to_string).collect::<Vec<_>>().join(" "));
                let why = format!("dataset already exists, not made together with the others: {}", others.join(", "));
                Err(ZfsError::new(ErrorKind::AlreadyExists, command, why))
            }
        }
    }

    /// Destroys those snapshots of a recursive one that were not asked for: by their mark, never by their name alone.
    async fn destroy_others(&self, parent: &DatasetName, wanted: &[SnapshotName], short: &str) -> Result<(), ZfsError> {
        let words = ["zfs", "get", "-Hp", "-r", "-o", parse::COLUMNS, MARK, parent.as_str()];
        for (name, properties) in parse::table(&self.run(parent, &words).await?) {
            let ours = properties.get(MARK).is_some_and(|(value, source)| value == short && source == "local");
            let of_this_call = name.ends_with(&format!("@{short}"));
            if !ours || !of_this_call || wanted.iter().any(|wanted| wanted.to_string() == name) {
                continue;
            }
            match self.run_unless_busy(parent, &["zfs", "destroy", "-d", &name]).await {
                Err(error) if error.kind != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// The names of the snapshots to take, none of them twice.
fn checked_names(parent: &DatasetName, datasets: &[DatasetName], short: &str) -> Result<Vec<SnapshotName>, ZfsError> {
    let refused = |why: String| ZfsError::new(ErrorKind::Other, format!("zfs snapshot {parent}@{short}"), why);
    let mut names: Vec<SnapshotName> = Vec::new();
    for dataset in datasets {
        if !dataset.is_below(parent) {
            return Err(refused(format!("{dataset} is not below {parent}")));
        }
        let name = dataset.snapshot(short).map_err(|error| refused(error.to_string()))?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    match names.is_empty() {
        true => Err(refused("no datasets are named".to_owned())),
        false => Ok(names),
    }
}
