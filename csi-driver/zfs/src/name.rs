//! Names that ZFS accepts, checked before any command is run (zfsconcepts(7), zfsprops(7)).

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest name of a dataset or snapshot in bytes (`ZFS_MAX_DATASET_NAME_LEN` less its terminator).
const LONGEST: usize = 255;

/// A name or value that ZFS would refuse, or that has no business in a command line.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{what} {given:?} is not valid: allowed is {allowed}")]
pub struct InvalidName {
    /// What was to be named.
    pub what: &'static str,
    /// What was given.
    pub given: String,
    /// What is allowed.
    pub allowed: &'static str,
}

/// The name of a dataset: `pool`, `pool/a`, `pool/a/b`.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct DatasetName(String);

impl DatasetName {
    /// Checks a dataset's name.
    pub fn new(name: impl Into<String>) -> Result<Self, InvalidName> {
        let name = name.into();
        let pool = name.split('/').next().unwrap_or_default();
        let good = name.len() <= LONGEST
            && pool.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.split('/').all(is_component);
        if good {
            return Ok(Self(name));
        }
        Err(InvalidName {
            what: "dataset name",
            given: name,
            allowed: "up to 255 characters: components of A-Z a-z 0-9 - _ . : separated by single slashes, the first beginning with a letter",
        })
    }

    /// The dataset `self/name`; `name` may not contain a slash.
    pub fn child(&self, name: &str) -> Result<Self, InvalidName> {
        if !is_component(name) {
            return Err(InvalidName {
                what: "dataset name component",
                given: name.to_owned(),
                allowed: "A-Z a-z 0-9 - _ . :",
            });
        }
        Self::new(format!("{}/{name}", self.0))
    }

    /// The snapshot `self@name`.
    pub fn snapshot(&self, name: &str) -> Result<SnapshotName, InvalidName> {
        SnapshotName::new(self.clone(), name)
    }

    /// The bookmark `self#name`.
    pub fn bookmark(&self, name: &str) -> Result<BookmarkName, InvalidName> {
        BookmarkName::new(self.clone(), name)
    }

    /// The name in full.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The pool that holds it.
    pub fn pool(&self) -> &str {
        self.0.split('/').next().unwrap_or(&self.0)
    }

    /// The block device of a volume (zvol).
    pub fn device(&self) -> PathBuf {
        Path::new("/dev/zvol").join(&self.0)
    }

    /// Whether it is somewhere below `other`.
    pub fn is_below(&self, other: &DatasetName) -> bool {
        self.0.strip_prefix(&other.0).is_some_and(|rest| rest.starts_with('/'))
    }

    /// The last component.
    pub fn short(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }
}

/// The name of a snapshot: a dataset and a short name.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SnapshotName {
    dataset: DatasetName,
    short: String,
}

impl SnapshotName {
    /// Checks a snapshot's short name (what stands behind the `@`).
    pub fn new(dataset: DatasetName, short: impl Into<String>) -> Result<Self, InvalidName> {
        let short = short.into();
        if is_component(&short) && dataset.0.len() + 1 + short.len() <= LONGEST {
            return Ok(Self { dataset, short });
        }
        Err(InvalidName {
            what: "snapshot name",
            given: short,
            allowed: "A-Z a-z 0-9 - _ . : and with its dataset no more than 255 characters",
        })
    }

    /// The dataset.
    pub fn dataset(&self) -> &DatasetName {
        &self.dataset
    }

    /// The part behind the `@`.
    pub fn short(&self) -> &str {
        &self.short
    }
}

/// The name of a bookmark: a dataset and a short name.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BookmarkName {
    dataset: DatasetName,
    short: String,
}

impl BookmarkName {
    /// Checks a bookmark's short name (what stands behind the `#`).
    pub fn new(dataset: DatasetName, short: impl Into<String>) -> Result<Self, InvalidName> {
        let SnapshotName { dataset, short } =
            SnapshotName::new(dataset, short).map_err(|error| InvalidName { what: "bookmark name", ..error })?;
        Ok(Self { dataset, short })
    }

    /// The dataset.
    pub fn dataset(&self) -> &DatasetName {
        &self.dataset
    }

    /// The part behind the `#`.
    pub fn short(&self) -> &str {
        &self.short
    }
}

/// What ZFS allows in a component, less the space: nothing here needs one.
fn is_component(text: &str) -> bool {
    !text.is_empty()
        && text != "."
        && text != ".."
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':'))
}

impl fmt::Display for DatasetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.dataset, self.short)
    }
}

impl fmt::Display for BookmarkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.dataset, self.short)
    }
}

impl FromStr for BookmarkName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let (dataset, short) = text.split_once('#').ok_or(InvalidName {
            what: "bookmark name",
            given: text.to_owned(),
            allowed: "dataset#name",
        })?;
        Self::new(DatasetName::new(dataset)?, short)
    }
}

impl FromStr for DatasetName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Self::new(text)
    }
}

impl TryFrom<String> for DatasetName {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        Self::new(text)
    }
}

impl From<DatasetName> for String {
    fn from(name: DatasetName) -> String {
        name.0
    }
}

impl FromStr for SnapshotName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let (dataset, short) = text.split_once('@').ok_or(InvalidName {
            what: "snapshot name",
            given: text.to_owned(),
            allowed: "dataset@name",
        })?;
        Self::new(DatasetName::new(dataset)?, short)
    }
}

/// What identifies a snapshot on every pool that has received it. Printed and serialised in decimal: JSON numbers end at 2^53.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Guid(pub u64);

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Guid {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let invalid = || InvalidName { what: "GUID", given: text.to_owned(), allowed: "a decimal number below 2^64" };
        text.parse().map(Self).map_err(|_| invalid())
    }
}

impl TryFrom<String> for Guid {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<Guid> for String {
    fn from(guid: Guid) -> String {
        guid.to_string()
    }
}

/// A property to set: a native one (`refquota`) or a user property (`portolan:epoch`).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Property {
    name: String,
    value: String,
}

impl Property {
    /// Checks a property's name and value; whether ZFS knows the name and takes the value, ZFS says.
    pub fn new(name: impl Into<String>, value: impl Into<String>) -> Result<Self, InvalidName> {
        let (name, value) = (name.into(), value.into());
        let good = name.len() <= LONGEST
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.' | b':'));
        if !good {
            return Err(InvalidName {
                what: "property name",
                given: name,
                allowed: "a lower-case letter, then a-z 0-9 - _ . :, up to 255 characters",
            });
        }
        if value.len() >= 1024 || value.chars().any(char::is_control) {
            return Err(InvalidName {
                what: "property value",
                given: value,
                allowed: "up to 1023 bytes without control characters",
            });
        }
        Ok(Self { name, value })
    }

    /// `canmount=noauto`: mounted only when somebody asks for it by name.
    pub fn canmount_noauto() -> Self {
        Self { name: "canmount".into(), value: "noauto".into() }
    }

    /// `readonly=on` or `readonly=off`.
    pub fn readonly(on: bool) -> Self {
        Self { name: "readonly".into(), value: if on { "on" } else { "off" }.into() }
    }

    /// `volsize` in bytes: the size of a volume. It may grow; making it smaller cuts off what is at its end.
    pub fn volsize(bytes: u64) -> Self {
        Self { name: "volsize".into(), value: bytes.to_string() }
    }

    /// `refquota` in bytes: what the dataset itself may use, its snapshots not counted.
    pub fn refquota(bytes: u64) -> Self {
        Self { name: "refquota".into(), value: bytes.to_string() }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value.
    pub fn value(&self) -> &str {
        &self.value
    }
}

impl fmt::Display for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_checked() {
        for good in ["tank", "tank/a", "tank/pvc-1.2_3:4/b", "t/-x"] {
            assert!(DatasetName::new(good).is_ok(), "{good}");
        }
        for bad in [
            "", "/", "tank/", "/tank", "tank//a", "tank/..", "tank/.", "-tank", "1tank", "tank/a@b", "tank/a b",
            "tank/ä", "tank/a%b",
        ] {
            assert!(DatasetName::new(bad).is_err(), "{bad}");
        }
        assert!(DatasetName::new("t".repeat(255)).is_ok());
        let error = DatasetName::new("t".repeat(256)).unwrap_err();
        assert!(error.to_string().contains("allowed is up to 255"), "{error}");
        let name = DatasetName::new("tank/a/b").unwrap();
        assert_eq!((name.pool(), name.short()), ("tank", "b"));
        assert_eq!(name.device().to_str(), Some("/dev/zvol/tank/a/b"));
        let below = |other: &str| name.is_below(&DatasetName::new(other).unwrap());
        assert_eq!([below("tank"), below("tank/a"), below("tank/a/b"), below("tan")], [true, true, false, false]);
        assert!(name.child("c/d").is_err());
        assert_eq!("tank/a@s".parse::<SnapshotName>().unwrap().to_string(), "tank/a@s");
        assert_eq!("tank/a#b".parse::<BookmarkName>().unwrap().to_string(), "tank/a#b");
        assert!("tank/a@b".parse::<BookmarkName>().unwrap_err().to_string().contains("dataset#name"));
        assert!("tank/a".parse::<SnapshotName>().is_err());
        assert!("tank/a@b@c".parse::<SnapshotName>().is_err());
    }

    #[test]
    fn guids_survive_json() {
        let guid = Guid(u64::MAX);
        assert_eq!(serde_json::to_string(&guid).unwrap(), "\"18446744073709551615\"");
        assert_eq!(serde_json::from_str::<Guid>("\"18446744073709551615\"").unwrap(), guid);
        assert!(serde_json::from_str::<Guid>("\"-1\"").is_err());
    }

    #[test]
    fn properties_are_checked() {
        assert_eq!(Property::new("portolan:epoch", "1").unwrap().to_string(), "portolan:epoch=1");
        assert!(Property::new("-o", "1").is_err());
        assert!(Property::new("a=b", "1").is_err());
        assert!(Property::new("portolan:x", "a\nb").is_err());
    }

    proptest! {
        #[test]
        fn no_name_is_an_option_or_leaves_its_parent(text in ".{0,40}") {
            if let Ok(name) = DatasetName::new(text.clone()) {
                prop_assert!(!name.as_str().starts_with('-'));
                prop_assert!(name.as_str().split('/').all(|part| part != ".."), "{}", name);
            }
        }
    }
}
