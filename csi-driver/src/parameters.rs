//! A StorageClass's parameters and a claim's wishes: parsed into types, or refused with a message that names the field.

use std::collections::BTreeMap;

use portolan_crds::{Compression, VolumeParameters};

/// Parameters that other parties put into a StorageClass or a CSI call under this prefix are not ours to judge.
const FOREIGN_PREFIX: &str = "csi.storage.k8s.io/";
const SMALLEST_RECORD: u32 = 512;
const LARGEST_RECORD: u32 = 1 << 20;

/// A wish that can't be granted. The text names the field, what was given and what is allowed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// A parameter Portolan doesn't know.
    #[error(
        "StorageClass parameter {name:?} (given: {given:?}) is unknown: allowed are compression, recordsize, atime"
    )]
    UnknownParameter {
        /// The parameter.
        name: String,
        /// Its value.
        given: String,
    },
    /// A known parameter with a value that isn't allowed.
    #[error("StorageClass parameter {name} is {given:?}: allowed is {allowed}")]
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
        "access mode {given} is not possible: allowed are ReadWriteOnce and ReadWriteOncePod, as one node at a time has the volume"
    )]
    AccessMode {
        /// The mode.
        given: String,
    },
    /// Raw block volumes.
    #[error("volumeMode {given} is not possible: allowed is Filesystem")]
    VolumeMode {
        /// The mode.
        given: String,
    },
    /// A size that is none.
    #[error("spec.resources.requests.storage: {0}")]
    Size(#[from] crate::quantity::QuantityError),
    /// A claim that wants to start from something else.
    #[error("spec.dataSource {given} is not possible: a volume of this class starts empty")]
    DataSource {
        /// Kind and name of the source.
        given: String,
    },
}

/// Parses a StorageClass's parameters.
///
/// # Errors
/// The first parameter that is unknown or has a value that isn't allowed.
pub fn parse(given: &BTreeMap<String, String>) -> Result<VolumeParameters, Refusal> {
    let mut parameters = VolumeParameters::default();
    for (name, value) in given {
        match name.as_str() {
            "compression" => parameters.compression = Some(compression(value)?),
            "recordsize" => parameters.record_size = Some(record_size(value)?),
            "atime" => parameters.atime = Some(on_off(value)?),
            name if name.starts_with(FOREIGN_PREFIX) => {}
            _ => return Err(Refusal::UnknownParameter { name: name.clone(), given: value.clone() }),
        }
    }
    Ok(parameters)
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
    let refusal = || Refusal::Parameter {
        name: "recordsize",
        given: value.to_owned(),
        allowed: "a power of two from 512 to 1M, such as 8192, 16K or 128K",
    };
    let upper = value.to_ascii_uppercase();
    let (number, factor) = match (upper.strip_suffix('K'), upper.strip_suffix('M')) {
        (Some(number), _) => (number, 1 << 10),
        (_, Some(number)) => (number, 1 << 20),
        _ => (upper.as_str(), 1),
    };
    if number.is_empty() || !number.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(refusal());
    }
    number
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .filter(|bytes| bytes.is_power_of_two() && (SMALLEST_RECORD..=LARGEST_RECORD).contains(bytes))
        .ok_or_else(refusal)
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
    match modes.iter().find(|mode| !matches!(mode.as_str(), "ReadWriteOnce" | "ReadWriteOncePod")) {
        Some(mode) => Err(Refusal::AccessMode { given: mode.clone() }),
        None => Ok(()),
    }
}

/// Checks a claim's volume mode; none means Filesystem.
///
/// # Errors
/// When it is another.
pub fn check_volume_mode(mode: Option<&str>) -> Result<(), Refusal> {
    match mode {
        None | Some("Filesystem") => Ok(()),
        Some(mode) => Err(Refusal::VolumeMode { given: mode.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(name: &str, value: &str) -> Result<VolumeParameters, Refusal> {
        parse(&BTreeMap::from([(name.to_owned(), value.to_owned())]))
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
        for (name, value) in [("compression", "fast"), ("atime", "yes"), ("poolname", "tank")] {
            let message = parsed(name, value).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(value) && message.contains("allowed"), "{message}");
        }
    }

    #[test]
    fn modes() {
        assert!(check_access_modes(&["ReadWriteOnce".into(), "ReadWriteOncePod".into()]).is_ok());
        assert!(check_access_modes(&["ReadWriteOnce".into(), "ReadWriteMany".into()]).is_err());
        assert!(check_volume_mode(None).is_ok() && check_volume_mode(Some("Block")).is_err());
    }
}
