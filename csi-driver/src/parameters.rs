//! A StorageClass's parameters and a claim's wishes: parsed into types, or refused with a message that names the field.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use portolan_crds::{Cipher, Compression, Filesystem, IMPORT_ANNOTATION, Logbias, Sync, VolumeMode, VolumeParameters};
use portolan_zfs::DatasetName;

/// Parameters that other parties put into a StorageClass or a CSI call under this prefix are not ours to judge.
const FOREIGN_PREFIX: &str = "csi.storage.k8s.io/";
const SMALLEST_RECORD: u32 = 512;
const LARGEST_RECORD: u32 = 1 << 20;
/// What mkfs.xfs takes (mkfs.xfs(8)).
const SMALLEST_XFS: i64 = 300 << 20;
const SMALLEST_BLOCK: u32 = 4 << 10;
const LARGEST_BLOCK: u32 = 128 << 10;

/// A wish that can't be granted. The text names the field, what was given and what is allowed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// A parameter Portolan doesn't know.
    #[error(
        "parameter {name:?} (given: {given:?}) is unknown: allowed are compression, recordsize, volblocksize, atime, sync, \
         logbias, bandwidth, encryption and {FS_TYPE}"
    )]
    UnknownParameter {
        /// The parameter.
        name: String,
        /// Its value.
        given: String,
    },
    /// A known parameter with a value that isn't allowed.
    #[error("parameter {name} is {given:?}: allowed is {allowed}")]
    Parameter {
        /// The parameter.
        name: &'static str,
        /// Its value.
        given: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// An access mode that no local disk can offer.
    #[error(
        "access mode {given} is not possible: allowed are ReadWriteOnce, ReadWriteOncePod and ReadOnlyMany, as one node at a \
         time has the volume"
    )]
    AccessMode {
        /// The mode.
        given: String,
    },
    /// A mode that isn't one.
    #[error("volumeMode {given} is not possible: allowed are Filesystem and Block")]
    VolumeMode {
        /// The mode.
        given: String,
    },
    /// A size that is none.
    #[error("spec.resources.requests.storage: {0}")]
    Size(#[from] crate::quantity::QuantityError),
    /// A parameter that can't be changed once the volume is made.
    #[error("parameter {name:?} can't be changed: a VolumeAttributesClass may have {}", CHANGEABLE.join(", "))]
    NotChangeable {
        /// The parameter.
        name: String,
    },
    /// A parameter that is of no use in this volume.
    #[error("parameter {name} is for {of}: this volume is {is}")]
    NotFor {
        /// The parameter.
        name: &'static str,
        /// What it is for.
        of: &'static str,
        /// What the volume is.
        is: &'static str,
    },
    /// An annotation that names no dataset.
    #[error("annotation {IMPORT_ANNOTATION} is {given:?}: allowed is <node>:<dataset>, such as node-1:tank/old")]
    Import {
        /// Its value.
        given: String,
    },
    /// A claim that wants to be two things.
    #[error("spec.dataSource and annotation {IMPORT_ANNOTATION} are both given: allowed is one of them")]
    ImportAndSource,
    /// An encrypted volume whose Secret nobody names.
    #[error(
        "parameter encryption is given and {missing} is not: allowed is both, the second naming the Secret with the key"
    )]
    NoSecret {
        /// The parameter that is missing.
        missing: &'static str,
    },
    /// A Secret's name that can't be one.
    #[error("parameter {name} is {given:?}: {why}")]
    Secret {
        /// The parameter.
        name: &'static str,
        /// Its value.
        given: String,
        /// What is the matter with it, and what is allowed.
        why: String,
    },
    /// A dataset that is there already and is to be encrypted.
    #[error(
        "parameter encryption and annotation {IMPORT_ANNOTATION} are both given: allowed is one of them, as a dataset that is \
         there already can't be encrypted"
    )]
    ImportAndEncryption,
    /// A size that the filesystem is not made for.
    #[error("a size of {given} bytes is too small for xfs: allowed are {SMALLEST_XFS} bytes (300Mi) and more")]
    TooSmall {
        /// Bytes.
        given: i64,
    },
    /// A claim that wants to start from something we can't copy.
    #[error("spec.dataSource {given} {why}")]
    DataSource {
        /// Kind and name of the source.
        given: String,
        /// What is the matter with it.
        why: String,
    },
}

/// The parameter that names the filesystem; Kubernetes passes it on as `fsType` of a PersistentVolume.
pub const FS_TYPE: &str = "csi.storage.k8s.io/fstype";
/// The parameters that can be changed while a volume is in use.
const CHANGEABLE: [&str; 5] = ["compression", "recordsize", "sync", "logbias", "bandwidth"];

/// What a class asks for.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Asked {
    /// The dataset's tunables.
    pub parameters: VolumeParameters,
    /// The filesystem.
    pub filesystem: Filesystem,
    /// How the dataset is to be encrypted, if it is.
    pub encryption: Option<Cipher>,
}

/// Parses a StorageClass's parameters, for a volume of this mode.
///
/// # Errors
/// The first parameter that is unknown, has a value that isn't allowed, or is of no use.
pub fn parse(given: &BTreeMap<String, String>, mode: VolumeMode) -> Result<Asked, Refusal> {
    let mut asked = Asked::default();
    for (name, value) in given {
        match name.as_str() {
            FS_TYPE => asked.filesystem = filesystem(value)?,
            "volblocksize" => asked.parameters.block_size = Some(block_size(value)?),
            "atime" => asked.parameters.atime = Some(on_off(value)?),
            "encryption" => asked.encryption = Some(cipher(value)?),
            name if name.starts_with(FOREIGN_PREFIX) => {}
            _ => set(&mut asked.parameters, name, value)?,
        }
    }
    if mode == VolumeMode::Block {
        // Nobody makes a filesystem on it.
        asked.filesystem = Filesystem::Zfs;
    }
    check_use(&asked, mode)?;
    Ok(asked)
}

/// Changes tunables as a VolumeAttributesClass asks.
///
/// # Errors
/// The first parameter that can't be changed, or has a value that isn't allowed.
pub fn change(parameters: &mut VolumeParameters, given: &BTreeMap<String, String>) -> Result<(), Refusal> {
    for (name, value) in given.iter().filter(|(name, _)| !name.starts_with(FOREIGN_PREFIX)) {
        if !CHANGEABLE.contains(&name.as_str()) {
            return Err(Refusal::NotChangeable { name: name.clone() });
        }
        set(parameters, name, value)?;
    }
    Ok(())
}

fn set(parameters: &mut VolumeParameters, name: &str, value: &str) -> Result<(), Refusal> {
    match name {
        "compression" => parameters.compression = Some(compression(value)?),
        "recordsize" => parameters.record_size = Some(record_size(value)?),
        "sync" => parameters.sync = Some(sync(value)?),
        "logbias" => parameters.logbias = Some(logbias(value)?),
        "bandwidth" => parameters.bandwidth = Some(bandwidth(value)?),
        _ => return Err(Refusal::UnknownParameter { name: name.to_owned(), given: value.to_owned() }),
    }
    Ok(())
}

/// Checks that a volume of this mode has use for each tunable.
///
/// # Errors
/// The first that is for the other kind.
pub fn check_use(asked: &Asked, mode: VolumeMode) -> Result<(), Refusal> {
    let zvol = mode == VolumeMode::Block || asked.filesystem != Filesystem::Zfs;
    let refuse = |name, of, is| Err(Refusal::NotFor { name, of, is });
    match &asked.parameters {
        given if zvol && given.record_size.is_some() => refuse("recordsize", "datasets", "a zvol: see volblocksize"),
        given if zvol && given.atime.is_some() => refuse("atime", "datasets", "a zvol: see mountOptions"),
        given if !zvol && given.block_size.is_some() => refuse("volblocksize", "zvols", "a dataset: see recordsize"),
        _ => Ok(()),
    }
}

/// A filesystem by name; none means the dataset's own.
///
/// # Errors
/// When it is unknown.
pub fn filesystem(value: &str) -> Result<Filesystem, Refusal> {
    match value {
        "" | "zfs" => Ok(Filesystem::Zfs),
        "ext4" => Ok(Filesystem::Ext4),
        "xfs" => Ok(Filesystem::Xfs),
        _ => Err(Refusal::Parameter { name: FS_TYPE, given: value.to_owned(), allowed: "zfs, ext4 or xfs" }),
    }
}

fn cipher(value: &str) -> Result<Cipher, Refusal> {
    let all = [Cipher::Aes128Gcm, Cipher::Aes192Gcm, Cipher::Aes256Gcm];
    all.into_iter().find(|cipher| cipher.as_str() == value).ok_or_else(|| Refusal::Parameter {
        name: "encryption",
        given: value.to_owned(),
        allowed: "aes-256-gcm, aes-192-gcm or aes-128-gcm",
    })
}

fn sync(value: &str) -> Result<Sync, Refusal> {
    match value {
        "standard" => Ok(Sync::Standard),
        "always" => Ok(Sync::Always),
        "disabled" => Ok(Sync::Disabled),
        _ => {
            let allowed = "standard, always or disabled";
            Err(Refusal::Parameter { name: "sync", given: value.to_owned(), allowed })
        }
    }
}

fn logbias(value: &str) -> Result<Logbias, Refusal> {
    match value {
        "latency" => Ok(Logbias::Latency),
        "throughput" => Ok(Logbias::Throughput),
        _ => Err(Refusal::Parameter { name: "logbias", given: value.to_owned(), allowed: "latency or throughput" }),
    }
}

fn bandwidth(value: &str) -> Result<i64, Refusal> {
    let allowed = "bytes a second as a quantity above 0, such as 50M";
    let refused = |_| Refusal::Parameter { name: "bandwidth", given: value.to_owned(), allowed };
    crate::quantity::bytes(value).map_err(refused)
}

fn compression(value: &str) -> Result<Compression, Refusal> {
    Ok(match value {
        "off" => Compression::Off,
        "on" => Compression::On,
        "lzjb" => Compression::Lzjb,
        "gzip" => Compression::Gzip,
        "lz4" => Compression::Lz4,
        "zstd" => Compression::Zstd,
        _ => {
            let allowed = "off, on, lzjb, gzip, lz4 or zstd";
            return Err(Refusal::Parameter { name: "compression", given: value.to_owned(), allowed });
        }
    })
}

fn record_size(value: &str) -> Result<u32, Refusal> {
    let allowed = "a power of two from 512 to 1M, such as 8192, 16K or 128K";
    power_of_two(value, SMALLEST_RECORD..=LARGEST_RECORD).ok_or_else(|| Refusal::Parameter {
        name: "recordsize",
        given: value.to_owned(),
        allowed,
    })
}

fn block_size(value: &str) -> Result<u32, Refusal> {
    let allowed = "a power of two from 4K to 128K, such as 8192 or 16K";
    power_of_two(value, SMALLEST_BLOCK..=LARGEST_BLOCK).ok_or_else(|| Refusal::Parameter {
        name: "volblocksize",
        given: value.to_owned(),
        allowed,
    })
}

/// Bytes, `K` or `M`.
fn power_of_two(value: &str, allowed: RangeInclusive<u32>) -> Option<u32> {
    let upper = value.to_ascii_uppercase();
    let (number, factor) = match (upper.strip_suffix('K'), upper.strip_suffix('M')) {
        (Some(number), _) => (number, 1 << 10),
        (_, Some(number)) => (number, 1 << 20),
        _ => (upper.as_str(), 1),
    };
    if number.is_empty() || !number.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let bytes = number.parse::<u32>().ok()?.checked_mul(factor)?;
    (bytes.is_power_of_two() && allowed.contains(&bytes)).then_some(bytes)
}

fn on_off(value: &str) -> Result<bool, Refusal> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(Refusal::Parameter { name: "atime", given: value.to_owned(), allowed: "on or off" }),
    }
}

/// Checks a claim's access modes: all of them must be possible.
///
/// # Errors
/// The first mode that isn't.
pub fn check_access_modes(modes: &[String]) -> Result<(), Refusal> {
    let possible = ["ReadWriteOnce", "ReadWriteOncePod", "ReadOnlyMany"];
    match modes.iter().find(|mode| !possible.contains(&mode.as_str())) {
        Some(mode) => Err(Refusal::AccessMode { given: mode.clone() }),
        None => Ok(()),
    }
}

/// Whether nobody is ever to write the volume of a claim with these access modes.
pub fn only_read(modes: &[String]) -> bool {
    !modes.is_empty() && modes.iter().all(|mode| mode == "ReadOnlyMany")
}

/// A dataset that a claim's volume is to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Import {
    /// The node that has it.
    pub node: String,
    /// Its name in full.
    pub dataset: String,
}

/// Parses a claim's annotation, `<node>:<dataset>`.
///
/// # Errors
/// When it isn't of that form.
pub fn import(given: &str) -> Result<Import, Refusal> {
    let parts = given.split_once(':').filter(|(node, _)| !node.is_empty());
    let named = parts.and_then(|(node, dataset)| Some((node, DatasetName::new(dataset).ok()?)));
    let (node, dataset) = named.ok_or_else(|| Refusal::Import { given: given.to_owned() })?;
    Ok(Import { node: node.to_owned(), dataset: dataset.to_string() })
}

/// Checks that a filesystem can be made in so many bytes.
///
/// # Errors
/// When they are too few.
pub fn check_size(filesystem: Filesystem, bytes: i64) -> Result<(), Refusal> {
    match filesystem {
        Filesystem::Xfs if bytes < SMALLEST_XFS => Err(Refusal::TooSmall { given: bytes }),
        _ => Ok(()),
    }
}

/// A claim's volume mode; none means Filesystem.
///
/// # Errors
/// When it is none of the two.
pub fn volume_mode(mode: Option<&str>) -> Result<VolumeMode, Refusal> {
    match mode {
        None | Some("Filesystem") => Ok(VolumeMode::Filesystem),
        Some("Block") => Ok(VolumeMode::Block),
        Some(mode) => Err(Refusal::VolumeMode { given: mode.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(name: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(name.to_owned(), value.to_owned())])
    }

    fn parsed(name: &str, value: &str) -> Result<VolumeParameters, Refusal> {
        parse(&given(name, value), VolumeMode::Filesystem).map(|asked| asked.parameters)
    }

    #[test]
    fn record_sizes() {
        for (text, wanted) in [("512", 512), ("128K", 131_072), ("128k", 131_072), ("1M", 1 << 20), ("8192", 8192)] {
            assert_eq!(parsed("recordsize", text).unwrap().record_size, Some(wanted), "{text}");
        }
        for text in ["", "256", "100K", "2M", "K", "-1", "128KB", "1G", "99999999999", " 8K"] {
            let message = parsed("recordsize", text).unwrap_err().to_string();
            assert!(
                message.contains("recordsize") && message.contains("power of two") && message.contains(text),
                "{message}"
            );
        }
    }

    #[test]
    fn other_parameters() {
        assert_eq!(parsed("compression", "zstd").unwrap().compression, Some(Compression::Zstd));
        assert_eq!(parsed("atime", "off").unwrap().atime, Some(false));
        assert_eq!(parsed("csi.storage.k8s.io/fstype", "ext4"), Ok(VolumeParameters::default()));
        assert_eq!(parsed("sync", "always").unwrap().sync, Some(Sync::Always));
        assert_eq!(parsed("bandwidth", "50M").unwrap().bandwidth, Some(50_000_000));
        let wrong = [
            ("compression", "fast"),
            ("atime", "yes"),
            ("sync", "off"),
            ("logbias", "fast"),
            ("bandwidth", "fast"),
            ("bandwidth", "0"),
            ("bandwidth", "-5M"),
            (FS_TYPE, "btrfs"),
            ("poolname", "tank"),
            ("encryption", "on"),
        ];
        for (name, value) in wrong {
            let message = parsed(name, value).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(value) && message.contains("allowed"), "{message}");
        }
    }

    #[test]
    fn modes() {
        assert!(check_access_modes(&["ReadWriteOnce".into(), "ReadWriteOncePod".into()]).is_ok());
        assert!(check_access_modes(&["ReadWriteOnce".into(), "ReadWriteMany".into()]).is_err());
        assert!(check_access_modes(&["ReadOnlyMany".into()]).is_ok());
        assert_eq!(volume_mode(Some("Block")), Ok(VolumeMode::Block));
        assert!(volume_mode(Some("Character")).unwrap_err().to_string().contains("Character"));
    }

    #[test]
    fn datasets_and_zvols_have_parameters_of_their_own() {
        let zvol =
            BTreeMap::from([(FS_TYPE.to_owned(), "xfs".to_owned()), ("volblocksize".to_owned(), "16K".to_owned())]);
        let asked = parse(&zvol, VolumeMode::Filesystem).unwrap();
        assert_eq!((asked.filesystem, asked.parameters.block_size), (Filesystem::Xfs, Some(16_384)));
        assert!(parsed("volblocksize", "16K").unwrap_err().to_string().contains("recordsize"));
        assert!(parsed("volblocksize", "1M").unwrap_err().to_string().contains("128K"));
        let block = parse(&given("recordsize", "16K"), VolumeMode::Block).unwrap_err();
        assert!(block.to_string().contains("volblocksize"), "{block}");
    }

    #[test]
    fn ciphers() {
        for (value, wanted) in [("aes-256-gcm", Cipher::Aes256Gcm), ("aes-128-gcm", Cipher::Aes128Gcm)] {
            for mode in [VolumeMode::Filesystem, VolumeMode::Block] {
                assert_eq!(parse(&given("encryption", value), mode).unwrap().encryption, Some(wanted));
            }
            assert_eq!(serde_json::to_value(wanted).unwrap(), value, "ZFS and the API spell it alike");
        }
        let refused = parsed("encryption", "aes-256-ccm").unwrap_err().to_string();
        assert!(refused.contains("aes-256-ccm") && refused.contains("aes-256-gcm"), "{refused}");
    }

    #[test]
    fn xfs_needs_room() {
        assert!(check_size(Filesystem::Xfs, 299 << 20).unwrap_err().to_string().contains("300Mi"));
        assert!(check_size(Filesystem::Xfs, 300 << 20).is_ok() && check_size(Filesystem::Zfs, 1).is_ok());
    }

    #[test]
    fn what_is_in_use_can_be_changed_in_part() {
        let mut parameters = parsed("compression", "gzip").unwrap();
        change(&mut parameters, &given("recordsize", "8K")).unwrap();
        assert_eq!((parameters.compression, parameters.record_size), (Some(Compression::Gzip), Some(8192)));
        let refused = change(&mut parameters, &given("atime", "on")).unwrap_err().to_string();
        assert!(refused.contains("atime") && refused.contains("sync"), "{refused}");
        assert!(change(&mut parameters, &given("recordsize", "9K")).is_err());
    }
}
