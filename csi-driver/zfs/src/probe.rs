//! Which ZFS there is and what it can do, from its version and its usage text. Nothing is tried out on a pool.

use std::fmt;

/// The implementations that Portolan knows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Implementation {
    /// The kernel module.
    OpenZfs,
    /// The daemon in userspace.
    ZfsFuse,
    /// The one in memory, for tests.
    Memory,
}

impl fmt::Display for Implementation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OpenZfs => "openzfs",
            Self::ZfsFuse => "zfs-fuse",
            Self::Memory => "memory",
        })
    }
}

/// What was found. Prints as `openzfs 2.3.2`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Probe {
    /// Which ZFS.
    pub implementation: Implementation,
    /// Its version.
    pub version: String,
    /// What it can do.
    pub capabilities: Capabilities,
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.implementation, self.version)
    }
}

/// What a userland can do beyond what Portolan needs.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Capabilities {
    /// `recv -s`, `send -t`.
    pub resume: bool,
    /// `zfs bookmark`.
    pub bookmarks: bool,
    /// `create -V` that works.
    pub zvol: bool,
    /// `send -w`.
    pub raw_send: bool,
    /// `send -c`.
    pub compressed_send: bool,
    /// `create -o encryption=`, `load-key`.
    pub encryption: bool,
    /// Several snapshots by one command, in one transaction.
    pub several_snapshots: bool,
    /// `send -nP`.
    pub send_size: bool,
    /// `recv -o`.
    pub receive_properties: bool,
}

impl Capabilities {
    /// All of it, as OpenZFS has.
    pub fn all() -> Self {
        Self {
            resume: true,
            bookmarks: true,
            zvol: true,
            raw_send: true,
            compressed_send: true,
            encryption: true,
            several_snapshots: true,
            send_size: true,
            receive_properties: true,
        }
    }

    /// The names of what it can do, as StorageNode's status lists them.
    pub fn names(&self) -> Vec<&'static str> {
        [
            (self.resume, "resume"),
            (self.bookmarks, "bookmarks"),
            (self.zvol, "zvol"),
            (self.raw_send, "raw-send"),
            (self.compressed_send, "compressed-send"),
            (self.encryption, "encryption"),
            (self.several_snapshots, "several-snapshots"),
            (self.send_size, "send-size"),
            (self.receive_properties, "receive-properties"),
        ]
        .into_iter()
        .filter_map(|(can, name)| can.then_some(name))
        .collect()
    }
}

/// From the output of `zfs version`, which only OpenZFS has: `zfs-2.1.11-1` and `zfs-kmod-2.1.11-1`, a line each.
/// The kernel's version counts: it decides what a pool can do.
pub(crate) fn openzfs_version(output: &str) -> Option<String> {
    let of = |prefix| {
        output.lines().find_map(|line| {
            line.trim().strip_prefix(prefix).filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
    };
    let version = of("zfs-kmod-").or_else(|| of("zfs-"))?;
    Some(version.split('-').next().unwrap_or(version).to_owned())
}

/// From the output of `zpool upgrade -v`: the version of the pools it makes. Feature flags (OpenZFS) have no number.
pub(crate) fn pool_version(output: &str) -> Option<u32> {
    let text = output.split_once("currently running ZFS pool version ")?.1;
    text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// From the usage text of `zfs`. On zfs-fuse `create -V` is in the text, but aborts.
pub(crate) fn capabilities(usage: &str, implementation: Implementation) -> Capabilities {
    let lines = |command: &str| {
        let command = format!("{command} ");
        usage
            .lines()
            .map(str::trim)
            .filter(move |line| line.starts_with(&command))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    // A flag is a letter of the first bracket: `receive [-vMnsFhu] [-o <property>=<value>] ...`.
    let flag = |command: &str, letter: char| {
        lines(command).iter().any(|line| {
            line.split_once("[-")
                .and_then(|(_, rest)| rest.split([']', ' ']).next())
                .is_some_and(|letters| letters.contains(letter))
        })
    };
    Capabilities {
        resume: flag("receive", 's') && lines("send").iter().any(|line| line.contains("-t ")),
        bookmarks: !lines("bookmark").is_empty(),
        zvol: implementation == Implementation::OpenZfs && lines("create").iter().any(|line| line.contains("-V ")),
        raw_send: flag("send", 'w'),
        compressed_send: flag("send", 'c'),
        encryption: !lines("load-key").is_empty(),
        several_snapshots: lines("snapshot").iter().any(|line| line.ends_with("> ...")),
        send_size: flag("send", 'n') && flag("send", 'P'),
        receive_properties: lines("receive").iter().any(|line| line.contains("[-o ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPENZFS: &str = "usage: zfs command args ...\n\tcreate [-Pnpuv] [-o property=value] ... <filesystem>\n\
        \tcreate [-Pnpsv] [-b blocksize] [-o property=value] ... -V <size> <volume>\n\tbookmark <snapshot|bookmark> <newbookmark>\n\
        \tload-key [-rn] [-L <keylocation>] <-a | filesystem|volume>\n\tsnapshot [-r] [-o property=value] ... <filesystem|volume>@<snap> ...\n\
        \tsend [-DLPbcehnpsVvw] [-i|-I snapshot]\n\tsend [-nVvPe] -t <receive_resume_token>\n\
        \treceive [-vMnsFhu] [-o <property>=<value>] ... [-x <property>] ...\n\t    <filesystem|volume|snapshot>\n";
    const FUSE: &str = "\tcreate [-ps] [-b blocksize] [-o property=value] ... -V <size> <volume>\n\
        \tsnapshot [-r] [-o property=value] ... <filesystem@snapname|volume@snapname>\n\
        \tsend [-RDp] [-[iI] snapshot] <snapshot>\n\treceive [-vnF] <filesystem|volume|snapshot>\n";

    #[test]
    fn capabilities_are_read_from_the_usage_text() {
        let all = [
            "resume",
            "bookmarks",
            "zvol",
            "raw-send",
            "compressed-send",
            "encryption",
            "several-snapshots",
            "send-size",
            "receive-properties",
        ];
        assert_eq!(capabilities(OPENZFS, Implementation::OpenZfs).names(), all);
        assert_eq!(capabilities(FUSE, Implementation::ZfsFuse), Capabilities::default());
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(openzfs_version("zfs-2.3.2-1~bpo12+2\nzfs-kmod-2.3.2-1\n").as_deref(), Some("2.3.2"));
        assert_eq!(openzfs_version("zfs-2.1.11-1\n").as_deref(), Some("2.1.11"));
        assert_eq!(openzfs_version("unrecognized command 'version'"), None);
        assert_eq!(pool_version("This system is currently running ZFS pool version 23.\n\nThe"), Some(23));
    }
}
