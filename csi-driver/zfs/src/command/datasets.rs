//! Filesystems and volumes: listing, making, cloning, destroying.

use super::{CommandLine, odd_output};
use crate::api::Zfs;
use crate::error::{ErrorKind, ZfsError};
use crate::key::Key;
use crate::model::{Dataset, Kind};
use crate::name::{DatasetName, Property, SnapshotName};
use crate::parse;
use crate::probe::Implementation;

impl CommandLine {
    /// A dataset and, with `depth` 1, those directly below it. The GUID is not among zfs-fuse's `all`, so there it is asked for by name.
    pub(super) async fn datasets(&self, name: &DatasetName, depth: &str) -> Result<Vec<Dataset>, ZfsError> {
        let get = |what| ["zfs", "get", "-Hp", "-d", depth, "-o", parse::COLUMNS, what, name.as_str()];
        let (all, guids) = match self.probed().await?.implementation {
            Implementation::ZfsFuse => {
                let (all, guids) = (get("all"), get("guid"));
                let (all, guids) = tokio::try_join!(self.run(name, &all), self.run(name, &guids))?;
                (parse::table(&all), parse::table(&guids))
            }
            _ => (parse::table(&self.run(name, &get("all")).await?), Vec::new()),
        };
        let mut found = Vec::new();
        for (name, mut properties) in all {
            if let Some((_, guid)) = guids.iter().find(|(other, _)| *other == name) {
                properties.extend(guid.clone());
            }
            // Made between the two commands: the next call finds it.
            if !properties.contains_key("guid") {
                continue;
            }
            let kind = properties.get("type").map(|(value, _)| value.as_str());
            // Not ours: a snapshot, or with a blank in its name.
            if !matches!(kind, Some("filesystem" | "volume")) || DatasetName::new(name.as_str()).is_err() {
                continue;
            }
            found.push(parse::dataset(&name, &properties).map_err(|why| odd_output(&get("all"), &why))?);
        }
        Ok(found)
    }

    /// `zfs create`, with a volume's size or none.
    pub(super) async fn create(
        &self,
        name: &DatasetName,
        size: Option<u64>,
        properties: &[Property],
        key: Option<&Key>,
    ) -> Result<(), ZfsError> {
        let mut words: Vec<String> = ["zfs", "create"].map(str::to_owned).into();
        if let Some(size) = size {
            words.extend(["-s".to_owned(), "-V".to_owned(), size.to_string()]);
        }
        let mut set = |property: String| words.extend(["-o".to_owned(), property]);
        if let Some(key) = key {
            if !properties.iter().any(|property| property.name() == "encryption") {
                set("encryption=aes-256-gcm".to_owned());
            }
            set(format!("keyformat={}", key.format()));
            set("keylocation=prompt".to_owned());
        }
        properties.iter().for_each(|property| set(property.to_string()));
        words.push(name.to_string());
        if size.is_some() {
            self.need("zvol", |can| can.zvol, &words.join(" ")).await?;
        }
        let Some(key) = key else {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            return self.run(name, &words).await.map(drop);
        };
        self.need("encryption", |can| can.encryption, &words.join(" ")).await?;
        self.run_with_key(name, &words, key).await
    }

    /// zfs-fuse mounts a clone even if `canmount` is `noauto`, but not if it has no mountpoint; a mountpoint set later doesn't mount it.
    pub(super) async fn clone_to(
        &self,
        snapshot: &SnapshotName,
        target: &DatasetName,
        properties: &[Property],
    ) -> Result<(), ZfsError> {
        let mounts_anyway = self.probed().await?.implementation == Implementation::ZfsFuse;
        let first = match mounts_anyway {
            true => vec!["canmount=noauto".to_owned(), "mountpoint=none".to_owned()],
            false => properties.iter().map(Property::to_string).collect(),
        };
        let mut words = vec!["zfs", "clone"];
        first.iter().for_each(|property| words.extend(["-o", property]));
        let snapshot_name = snapshot.to_string();
        words.extend([&snapshot_name, target.as_str()]);
        self.run(snapshot.dataset(), &words).await?;
        if mounts_anyway {
            for property in properties {
                self.set_property(target, property).await?;
            }
        }
        Ok(())
    }

    /// See [`Zfs::destroy_with_snapshots`].
    pub(super) async fn destroy_all_of(&self, name: &DatasetName) -> Result<(), ZfsError> {
        let found = self.datasets(name, "1").await?;
        let refused = |kind, why| Err(ZfsError::new(kind, format!("zfs destroy {name}"), why));
        if let Some(child) = found.iter().find(|dataset| dataset.name != *name) {
            return refused(ErrorKind::Other, format!("there are datasets below it: {}", child.name));
        }
        let snapshots = self.snapshots(name).await?;
        if let Some(held) = snapshots.iter().find(|snapshot| snapshot.holds > 0) {
            return refused(ErrorKind::Busy, format!("{} is held", held.name));
        }
        // zfs-fuse has no property `clones`.
        let clones = if snapshots.is_empty() { Vec::new() } else { self.clones(name).await? };
        if !clones.is_empty() {
            return refused(ErrorKind::HasClones, format!("there are clones of it: {}", clones.join(", ")));
        }
        if found.iter().any(|dataset| dataset.resume_token.is_some()) {
            self.abort(name).await?;
            // It may have been all that there was.
            if snapshots.is_empty()
                && self.datasets(name, "0").await.is_err_and(|error| error.kind == ErrorKind::NotFound)
            {
                return Ok(());
            }
        }
        if found.iter().any(|dataset| dataset.kind == Kind::Filesystem) {
            self.unmount(name).await?;
        }
        for snapshot in &snapshots {
            self.destroy_snapshot(&snapshot.name).await?;
        }
        self.destroy_dataset(name).await
    }

    /// The datasets of the pool that are clones of a snapshot of `name`, as `CLONE of SNAPSHOT`.
    async fn clones(&self, name: &DatasetName) -> Result<Vec<String>, ZfsError> {
        let listed = self.run(name, &["zfs", "list", "-H", "-o", "name,origin", "-r", name.pool()]).await?;
        let rows = listed.lines().filter_map(|line| line.split_once('\t'));
        let of = |origin: &str| origin.split_once('@').is_some_and(|(dataset, _)| dataset == name.as_str());
        Ok(rows.filter(|(_, origin)| of(origin)).map(|(clone, origin)| format!("{clone} of {origin}")).collect())
    }
}
