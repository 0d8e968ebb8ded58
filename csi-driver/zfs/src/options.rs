//! What a stream is made of and how it is received.

use std::fmt;

use crate::name::{BookmarkName, Property, SnapshotName};

/// What the receiver has already.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Base {
    /// An older snapshot of the same dataset.
    Snapshot(SnapshotName),
    /// A bookmark of one, which may be gone.
    Bookmark(BookmarkName),
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshot(name) => name.fmt(f),
            Self::Bookmark(name) => name.fmt(f),
        }
    }
}

/// How a snapshot is sent (zfs-send(8)). Without properties, and never with `-L`: a dataset that was once received with its blocks split
/// must be so ever after.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SendOptions {
    /// Only what came after it; all if there is none.
    pub base: Option<Base>,
    /// As it is on disk, sealed: an encrypted dataset's, whose key need not be loaded. Raw and plain streams of one dataset can't follow
    /// each other, so encrypted datasets are always sent raw and others never: anything else is refused.
    pub raw: bool,
    /// Blocks as they are compressed on disk. What is raw is so anyway.
    pub compressed: bool,
}

impl SendOptions {
    /// What came after `base`, or all.
    pub fn since(base: Option<&SnapshotName>) -> Self {
        Self { base: base.cloned().map(Base::Snapshot), ..Self::default() }
    }

    /// The flags, before the snapshot's name.
    pub(crate) fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        match self {
            Self { raw: true, .. } => words.push("-w".to_owned()),
            Self { compressed: true, .. } => words.push("-c".to_owned()),
            _ => {}
        }
        if let Some(base) = &self.base {
            words.extend(["-i".to_owned(), base.to_string()]);
        }
        words
    }
}

/// How a stream is received (zfs-receive(8)). Never forced, never mounted.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ReceiveOptions {
    /// Set by the receive itself where the userland can (`recv -o`), else right after it.
    pub properties: Vec<Property>,
    /// What came of a stream that was cut is kept, with a token by which it can go on (`recv -s`).
    pub resumable: bool,
}

impl ReceiveOptions {
    /// With these properties, not resumable.
    pub fn with(properties: &[Property]) -> Self {
        Self { properties: properties.to_vec(), resumable: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_never_made_of_large_blocks_by_itself() {
        let base = "tank/v#one".parse().unwrap();
        let words = |raw, compressed| {
            let options = SendOptions { base: Some(Base::Bookmark(Clone::clone(&base))), raw, compressed };
            options.words().join(" ")
        };
        assert_eq!(words(false, false), "-i tank/v#one");
        assert_eq!(words(false, true), "-c -i tank/v#one");
        assert_eq!(words(true, true), "-w -i tank/v#one");
        assert!(SendOptions::default().words().is_empty());
    }
}
