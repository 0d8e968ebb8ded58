//! A dataset that was made by hand becomes a volume's: checked, renamed to its place, and given a volume's properties, the mark last.
//!
//! Its GUID is in the volume's status before it is renamed, so that it is known for what it is if this is cut short after.

use kube::ResourceExt;
use portolan_crds::PortableVolume;
use portolan_zfs::{Dataset, DatasetName, ErrorKind, Kind, Property, Zfs};

use super::disk;
use super::steps::{StepError, Steps};
use crate::block::mounts::Mounts;
use crate::handoff;
use crate::quantity::Human;
use crate::volume::{self, UID_PROPERTY};

/// What is to be done.
struct Order<'a> {
    node: &'a str,
    /// The dataset that holds the volumes' datasets.
    pool: &'a DatasetName,
    /// As it was called by those who made it.
    from: DatasetName,
    /// Its place.
    to: &'a DatasetName,
    volume: &'a PortableVolume,
    /// What it is given, the mark last.
    properties: Vec<Property>,
}

/// Makes the dataset that the spec names this volume's, or goes on with that.
pub(super) async fn run<Z: Zfs>(steps: &mut Steps<'_, Z>) -> Result<(), StepError> {
    let volume = steps.volume.clone();
    let Some(import) = &volume.spec.import else { return Ok(()) };
    let refused = |error: portolan_zfs::InvalidName| StepError::Import {
        dataset: import.dataset.clone(),
        why: format!("is no dataset's name: allowed is {}", error.allowed),
    };
    let (node, to) = (steps.node, steps.dataset.clone());
    let order = Order {
        node: &node.name,
        pool: &node.pool,
        from: DatasetName::new(import.dataset.as_str()).map_err(refused)?,
        to: &to,
        volume: &volume,
        properties: steps.new_properties()?,
    };
    let found = order.examine(node.zfs.as_ref()).await?;
    let guid = found.guid.to_string();
    if volume::status(&volume).import_guid.as_ref() != Some(&guid) {
        steps.write(|status| status.import_guid = Some(guid)).await?;
    }
    order.carry_out(node.zfs.as_ref(), &node.mounts, &found).await?;
    tracing::info!(volume = volume.name_any(), dataset = import.dataset, "imported a dataset");
    Ok(())
}

impl Order<'_> {
    fn refuse<T>(&self, why: impl Into<String>) -> Result<T, StepError> {
        Err(StepError::Import { dataset: self.from.to_string(), why: why.into() })
    }

    /// Finds the dataset, at its place already or where it was made, and checks that it can be the volume's. Changes nothing.
    async fn examine(&self, zfs: &impl Zfs) -> Result<Dataset, StepError> {
        if self.from.pool() != self.pool.pool() {
            let why =
                format!("is in another pool: allowed are datasets of pool {}, where volumes are", self.pool.pool());
            return self.refuse(why);
        }
        if self.from == *self.pool || self.pool.is_below(&self.from) {
            return self.refuse(format!("holds the volumes ({}): allowed are datasets beside or below it", self.pool));
        }
        let found = match there(zfs, self.to).await? {
            Some(found) => found,
            None => match there(zfs, &self.from).await? {
                Some(found) => found,
                None => return self.refuse(format!("is not there: node {} has no such dataset", self.node)),
            },
        };
        self.check(&found)?;
        if self.volume.spec.is_shared() {
            // A copy is known to be complete by a snapshot of ours.
            let taken = zfs.snapshots(&found.name).await?;
            if let Some(old) = taken.iter().find(|snapshot| handoff::is_final_name(snapshot.name.short())) {
                return self.refuse(format!(
                    "has snapshot {}, which is called as ours are, and spec.readOnly is true: rename it (`zfs rename`) or destroy it",
                    old.name
                ));
            }
        }
        match zfs.children(&found.name).await?.first() {
            Some(child) => self.refuse(format!("has datasets below it ({}): a volume is one dataset", child.name)),
            None => Ok(found),
        }
    }

    fn check(&self, found: &Dataset) -> Result<(), StepError> {
        let spec = &self.volume.spec;
        let size = u64::try_from(spec.size_bytes).unwrap_or_default();
        let bytes = |amount: u64| Human(i64::try_from(amount).unwrap_or(i64::MAX));
        if let Some(uid) = found.user.get(UID_PROPERTY).filter(|uid| self.volume.uid().as_ref() != Some(uid)) {
            let why = format!(
                "is marked as another volume's (portolan:uid is {uid}): if that volume is gone for good, run on node {}: \
                 `zfs inherit portolan:uid {}`",
                self.node, found.name
            );
            return self.refuse(why);
        }
        if found.encryption.is_some() {
            return self.refuse("is encrypted: allowed are datasets that are not");
        }
        if spec.encryption.is_some() {
            return self.refuse("is not encrypted, and spec.encryption says that it is to be: allowed is none");
        }
        match (found.kind, spec.is_zvol()) {
            (Kind::Filesystem, true) => {
                self.refuse("is a filesystem, and the volume is to be a zvol: see spec.mode and spec.filesystem")
            }
            (Kind::Volume { .. }, false) => {
                self.refuse("is a zvol, and the volume is to be a filesystem of ZFS: see spec.mode and spec.filesystem")
            }
            // Making it smaller would cut off what is at its end.
            (Kind::Volume { size: has }, true) if has > size => self.refuse(format!(
                "has {}, and spec.sizeBytes is {}: allowed is as much or more",
                bytes(has),
                bytes(size)
            )),
            (Kind::Filesystem, false) if found.referenced > size => {
                let has = bytes(found.referenced);
                self.refuse(format!("holds {has}, and spec.sizeBytes is {}: allowed is as much or more", bytes(size)))
            }
            _ => Ok(()),
        }
    }

    /// Renames it if that has not been done, and gives it what it lacks. The caller has its GUID written down.
    async fn carry_out(&self, zfs: &impl Zfs, mounts: &Mounts, found: &Dataset) -> Result<(), StepError> {
        if found.kind == Kind::Filesystem {
            match zfs.unmount(&found.name).await {
                Err(error) if error.kind == ErrorKind::Busy => {
                    let used = format!("is in use on node {}: end what uses it ({})", self.node, error.stderr.trim());
                    return self.refuse(used);
                }
                result => result?,
            }
        }
        let at = disk::mounts(mounts, &found.name)?;
        if !at.is_empty() {
            return Err(StepError::NotQuiet { dataset: found.name.clone(), at });
        }
        if found.name != *self.to {
            zfs.rename(&found.name, self.to).await?;
        }
        // Of a zvol, whose size is none of a new one's properties.
        let size = volume::changeable(self.volume)?.into_iter().filter(|property| property.name() == "volsize");
        for property in size {
            zfs.set_property(self.to, &property).await?;
        }
        zfs.set_readonly(self.to, false).await?;
        if found.kind == Kind::Filesystem {
            // It may not have been mounted since this node failed while it was in use.
            zfs.set_property(self.to, &volume::open_property(true)?).await?;
        }
        for property in &self.properties {
            zfs.set_property(self.to, property).await?;
        }
        Ok(())
    }
}

async fn there(zfs: &impl Zfs, name: &DatasetName) -> Result<Option<Dataset>, StepError> {
    match zfs.dataset(name).await {
        Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
        found => Ok(Some(found?)),
    }
}

#[cfg(test)]
mod tests {
    use portolan_crds::{Placement, PortableVolumeSpec, PortableVolumeStatus, VolumeImport};
    use portolan_zfs::Capabilities;
    use portolan_zfs::memory::{Fault, Memory};

    use super::*;
    use crate::handoff::Action;

    fn name(text: &str) -> DatasetName {
        DatasetName::new(text).unwrap()
    }

    fn wanted(dataset: &str) -> PortableVolume {
        let spec = PortableVolumeSpec {
            size_bytes: 1 << 20,
            placement: Placement { node: "a".into() },
            import: Some(VolumeImport { dataset: dataset.into() }),
            ..PortableVolumeSpec::default()
        };
        let mut volume = PortableVolume::new("db", spec);
        volume.metadata.uid = Some("uid-1".into());
        volume.status = Some(PortableVolumeStatus::default());
        volume
    }

    async fn made_by_hand(at: &str) -> Memory {
        let zfs = Memory::new(&name("tank/portolan"), 1 << 30).with_capabilities(Capabilities::all());
        let mountpoint = Property::new("mountpoint", "/srv/old").unwrap();
        zfs.create_filesystem(&name(at), &[mountpoint], None).await.unwrap();
        zfs.mount(&name(at)).await.unwrap();
        zfs.write(&name(at), b"dear").unwrap();
        zfs.snapshot(&name(at).snapshot("daily").unwrap()).await.unwrap();
        zfs
    }

    /// Plans and acts as the agent does, until there is an owner or something fails.
    async fn go_on(zfs: &Memory, volume: &mut PortableVolume) -> Result<bool, StepError> {
        let (pool, to, mounts) = (name("tank/portolan"), name("tank/portolan/db"), Mounts::new("/"));
        let local = disk::read(zfs, &mounts, &to).await?;
        for action in handoff::plan("a", volume, local.as_ref(), &[]) {
            let happens = |event| Some(handoff::transition(volume, event).unwrap());
            match action {
                Action::RecordReplica => {
                    volume.status = happens(handoff::Event::Recorded { node: "a".into(), snapshot: None });
                }
                Action::Import => {
                    let from = name(&volume.spec.import.as_ref().unwrap().dataset);
                    let mut properties = vec![volume::epoch_property(1).unwrap()];
                    properties.extend(volume::properties(volume, std::path::Path::new("/m")).unwrap());
                    let held = volume.clone();
                    let order = Order { node: "a", pool: &pool, from, to: &to, volume: &held, properties };
                    let found = order.examine(zfs).await?;
                    volume.status.as_mut().unwrap().import_guid = Some(found.guid.to_string());
                    order.carry_out(zfs, &mounts, &found).await?;
                }
                Action::Own => {
                    volume.status = happens(handoff::Event::Owned { node: "a".into(), spec: Box::default() });
                    return Ok(true);
                }
                // Sets again what the import has set.
                Action::ApplySpec => {}
                other => panic!("{other:?}"),
            }
        }
        Ok(false)
    }

    async fn check_done(zfs: &Memory) {
        let done = zfs.dataset(&name("tank/portolan/db")).await.unwrap();
        assert_eq!((done.user[UID_PROPERTY].as_str(), done.user["portolan:epoch"].as_str()), ("uid-1", "1"));
        assert_eq!((done.refquota, done.mounted, done.readonly), (Some(1 << 20), false, false));
        assert_eq!(zfs.read(&done.name).unwrap(), b"dear");
        assert_eq!(zfs.snapshots(&done.name).await.unwrap().len(), 1, "what was there before stays");
    }

    #[tokio::test]
    async fn it_goes_on_wherever_it_was_cut_short() {
        for from in ["tank/old", "tank/portolan/db"] {
            for operation in ["unmount", "rename", "set_readonly", "set_property"] {
                for nth in 1..=8 {
                    for fault in [Fault::Fail(ErrorKind::Timeout), Fault::FailAfter(ErrorKind::Timeout)] {
                        let (zfs, mut volume) = (made_by_hand(from).await, wanted(from));
                        zfs.inject(operation, nth, fault);
                        for _ in 0..9 {
                            if go_on(&zfs, &mut volume).await.unwrap_or(false) {
                                break;
                            }
                        }
                        check_done(&zfs).await;
                    }
                }
            }
        }
    }

    #[tokio::test]
    async fn its_log_is_played_before_anything_is_taken_of_it() {
        let (zfs, mut volume) = (made_by_hand("tank/old").await, wanted("tank/old"));
        volume.spec.read_only = true;
        while !go_on(&zfs, &mut volume).await.unwrap() {}
        let local = disk::read(&zfs, &Mounts::new("/"), &name("tank/portolan/db")).await.unwrap().unwrap();
        assert_eq!(
            handoff::plan("a", &volume, Some(&local), &[]),
            [Action::SetReadonly(true), Action::Replay],
            "who read it now would read too little"
        );
        volume.spec.read_only = false;
        let move_it = handoff::Ask { to: "b".into(), ..handoff::Ask::default() };
        let asked = handoff::Event::Asked(move_it, crate::write::now());
        volume.status = Some(handoff::transition(&volume, asked).unwrap());
        let actions = handoff::plan("a", &volume, Some(&local), &[]);
        assert!(actions.contains(&Action::Replay), "{actions:?}");
    }

    #[tokio::test]
    async fn what_cannot_be_a_volume_is_refused_and_left_as_it_is() {
        let refused = async |zfs: &Memory, volume: &PortableVolume| {
            let mut volume = volume.clone();
            go_on(zfs, &mut volume).await.unwrap();
            let error = go_on(zfs, &mut volume).await.unwrap_err();
            assert!(matches!(error, StepError::Import { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains("spec.import.dataset"), "{text}");
            assert!(!zfs.calls().iter().any(|call| call.starts_with("rename") || call.starts_with("set")), "{text}");
            text
        };
        let zfs = made_by_hand("tank/old").await;
        for (given, named) in [
            ("other/old", "pool tank"),
            ("tank/missing", "no such dataset"),
            ("tank", "holds the volumes"),
            ("tank/portolan", "holds the volumes"),
        ] {
            let text = refused(&zfs, &wanted(given)).await;
            assert!(text.contains(named), "{text}");
        }
        let mut small = wanted("tank/old");
        small.spec.size_bytes = 10;
        assert!(refused(&zfs, &small).await.contains("spec.sizeBytes"));
        let mut block = wanted("tank/old");
        block.spec.mode = portolan_crds::VolumeMode::Block;
        assert!(refused(&zfs, &block).await.contains("spec.mode"));
        let mut sealed = wanted("tank/old");
        sealed.spec.encryption =
            Some(portolan_crds::VolumeEncryption { cipher: portolan_crds::Cipher::Aes256Gcm, secret: None });
        assert!(refused(&zfs, &sealed).await.contains("spec.encryption"));
        zfs.set_open(&name("tank/old"), true).unwrap();
        assert!(refused(&zfs, &wanted("tank/old")).await.contains("in use"));
        zfs.set_open(&name("tank/old"), false).unwrap();

        let zvol = name("tank/disk");
        zfs.create_volume(&zvol, 2 << 20, &[], None).await.unwrap();
        let mut shrunk = block.clone();
        shrunk.spec.import = Some(VolumeImport { dataset: "tank/disk".into() });
        assert!(refused(&zfs, &shrunk).await.contains("as much or more"));

        let older = name("tank/old").snapshot("portolan-3").unwrap();
        zfs.snapshot(&older).await.unwrap();
        let mut read_only = wanted("tank/old");
        read_only.spec.read_only = true;
        assert!(refused(&zfs, &read_only).await.contains("tank/old@portolan-3"));

        let marked = Property::new(UID_PROPERTY, "uid-2").unwrap();
        zfs.create_filesystem(&name("tank/portolan/lost"), &[marked], None).await.unwrap();
        assert!(refused(&zfs, &wanted("tank/portolan/lost")).await.contains("zfs inherit portolan:uid"));
        zfs.create_filesystem(&name("tank/old/child"), &[], None).await.unwrap();
        assert!(refused(&zfs, &wanted("tank/old")).await.contains("tank/old/child"));
        assert_eq!(zfs.read(&name("tank/old")).unwrap(), b"dear");
    }

    #[tokio::test]
    async fn a_stranger_at_its_place_is_not_taken_for_it() {
        let zfs = made_by_hand("tank/old").await;
        zfs.create_filesystem(&name("tank/portolan/db"), &[], None).await.unwrap();
        let local = disk::read(&zfs, &Mounts::new("/"), &name("tank/portolan/db")).await.unwrap();
        let actions = handoff::plan("a", &wanted("tank/old"), local.as_ref(), &[]);
        assert!(matches!(actions[..], [Action::Report { reason: "DatasetConflict", .. }]), "{actions:?}");
    }
}
