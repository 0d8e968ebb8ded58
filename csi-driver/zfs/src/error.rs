//! What can go wrong, classified from what `zfs` and `zpool` print.

use std::fmt;

/// A command that failed, with all that is needed to understand it from a log line.
#[derive(Clone, Debug, thiserror::Error)]
#[error("`{command}` failed: {kind}{}: {}", status.map(|code| format!(" (exit status {code})")).unwrap_or_default(), one_line(stderr))]
pub struct ZfsError {
    /// What kind of failure it is.
    pub kind: ErrorKind,
    /// The command line, without the chroot or the namespace it ran in.
    pub command: String,
    /// The exit status; none if the command didn't start, was killed or ran out of time.
    pub status: Option<i32>,
    /// What it printed on standard error, or why it didn't run.
    pub stderr: String,
}

/// The kinds of failure that callers act on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ErrorKind {
    /// The dataset, snapshot or property isn't there, and the pool is.
    NotFound,
    /// A dataset or snapshot of that name is there.
    AlreadyExists,
    /// Something has it mounted, open or held.
    Busy,
    /// A snapshot of it has clones: these would have to go first.
    HasClones,
    /// The pool is full, or a quota is.
    NoSpace,
    /// The pool isn't imported or its I/O is suspended, or ZFS itself doesn't answer. Says nothing of what the pool holds.
    PoolUnavailable,
    /// The destination of a receive was changed, its newest snapshot isn't the stream's base, or one of them is raw and the other isn't.
    Diverged,
    /// A stream ended early or was damaged; the destination is as it was.
    BrokenStream,
    /// The destination of a receive holds a part of an earlier stream, to be resumed or aborted.
    Unfinished,
    /// Not the key that the dataset was sealed with.
    WrongKey,
    /// The dataset's key isn't loaded.
    KeyNotLoaded,
    /// This ZFS can't do it (see [`Capabilities`](crate::Capabilities)).
    Unsupported,
    /// The command didn't end in time. It was killed; what it did is not known.
    Timeout,
    /// Anything else.
    Other,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorKind::NotFound => "not found",
            ErrorKind::AlreadyExists => "already exists",
            ErrorKind::Busy => "busy",
            ErrorKind::HasClones => "has clones",
            ErrorKind::NoSpace => "no space",
            ErrorKind::PoolUnavailable => "pool unavailable",
            ErrorKind::Diverged => "diverged",
            ErrorKind::BrokenStream => "broken stream",
            ErrorKind::Unfinished => "unfinished",
            ErrorKind::WrongKey => "wrong key",
            ErrorKind::KeyNotLoaded => "key not loaded",
            ErrorKind::Unsupported => "unsupported",
            ErrorKind::Timeout => "timeout",
            ErrorKind::Other => "error",
        })
    }
}

impl ZfsError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self.kind,
            ErrorKind::Busy
                | ErrorKind::NoSpace
                | ErrorKind::PoolUnavailable
                | ErrorKind::BrokenStream
                | ErrorKind::Timeout
        )
    }

    pub(crate) fn new(kind: ErrorKind, command: impl Into<String>, stderr: impl Into<String>) -> Self {
        Self { kind, command: command.into(), status: None, stderr: stderr.into() }
    }

    /// A command that wasn't run: `zfs`, a [`Probe`](crate::Probe) printed, lacks `capability`.
    pub(crate) fn unsupported(command: impl Into<String>, zfs: &impl fmt::Display, capability: &str) -> Self {
        Self::new(ErrorKind::Unsupported, command, format!("{zfs} can't do this: it has no {capability}"))
    }

    pub(crate) fn exited(command: impl Into<String>, status: Option<i32>, stderr: impl Into<String>) -> Self {
        let stderr = stderr.into();
        Self { kind: classify(&stderr), command: command.into(), status, stderr }
    }
}

/// The messages that stand for a kind, looked for in this order: the first found wins.
/// From libzfs of zfs-fuse 0.7 and OpenZFS 2.1 to 2.3, as printed with LC_ALL=C.
const MESSAGES: &[(&str, ErrorKind)] = &[
    ("please make sure that the zfs-fuse daemon is running", ErrorKind::PoolUnavailable),
    ("failed to initialize zfs library", ErrorKind::PoolUnavailable),
    ("modules are not loaded", ErrorKind::PoolUnavailable),
    ("/dev/zfs", ErrorKind::PoolUnavailable),
    ("zfs_version_kernel() failed", ErrorKind::PoolUnavailable),
    ("no such pool", ErrorKind::PoolUnavailable),
    ("i/o is currently suspended", ErrorKind::PoolUnavailable),
    ("pool is unavailable", ErrorKind::PoolUnavailable),
    ("does not\nmatch incremental source", ErrorKind::Diverged),
    ("does not match incremental source", ErrorKind::Diverged),
    ("has been modified", ErrorKind::Diverged),
    ("on top of existing unencrypted dataset", ErrorKind::Diverged),
    ("encryption key does not match", ErrorKind::Diverged),
    ("iv set guid", ErrorKind::Diverged),
    ("requires -l (--large-block), to match previous", ErrorKind::Diverged),
    ("partially-complete state", ErrorKind::Unfinished),
    ("specify -f to overwrite it", ErrorKind::AlreadyExists),
    ("to overwrite it", ErrorKind::AlreadyExists),
    ("already exists", ErrorKind::AlreadyExists),
    ("bookmark exists", ErrorKind::AlreadyExists),
    ("pool or dataset exists", ErrorKind::AlreadyExists),
    ("incorrect key provided", ErrorKind::WrongKey),
    // A passphrase where the key is raw.
    ("key too short", ErrorKind::WrongKey),
    ("key too long", ErrorKind::WrongKey),
    ("encryption feature not enabled", ErrorKind::Unsupported),
    ("encryption key not loaded", ErrorKind::KeyNotLoaded),
    ("key must be loaded", ErrorKind::KeyNotLoaded),
    ("keys must be loaded", ErrorKind::KeyNotLoaded),
    ("dependent clones", ErrorKind::HasClones),
    ("snapshot is cloned", ErrorKind::HasClones),
    ("out of space", ErrorKind::NoSpace),
    ("no space left", ErrorKind::NoSpace),
    ("quota exceeded", ErrorKind::NoSpace),
    ("size is greater than available space", ErrorKind::NoSpace),
    ("is busy", ErrorKind::Busy),
    ("being held", ErrorKind::Busy),
    ("device busy", ErrorKind::Busy),
    ("resource busy", ErrorKind::Busy),
    ("umount failed", ErrorKind::Busy),
    ("invalid backup stream", ErrorKind::BrokenStream),
    ("invalid stream", ErrorKind::BrokenStream),
    ("incomplete stream", ErrorKind::BrokenStream),
    ("failed to read from stream", ErrorKind::BrokenStream),
    ("checksum mismatch", ErrorKind::BrokenStream),
    ("broken pipe", ErrorKind::BrokenStream),
    ("does not exist", ErrorKind::NotFound),
    ("no such", ErrorKind::NotFound),
    ("no longer exist", ErrorKind::NotFound),
    ("no longer the same snapshot", ErrorKind::NotFound),
    ("could not find any snapshots", ErrorKind::NotFound),
];

/// The kind of failure that a message on standard error stands for.
pub(crate) fn classify(stderr: &str) -> ErrorKind {
    let text = stderr.to_ascii_lowercase();
    MESSAGES.iter().find(|(message, _)| text.contains(message)).map_or(ErrorKind::Other, |(_, kind)| *kind)
}

/// The first lines of a message as one: usage texts are cut.
fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).take(4).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_classified() {
        for (stderr, kind) in [
            ("cannot create 'tank/v1': dataset already exists", ErrorKind::AlreadyExists),
            ("cannot create 'nopool/v1': no such pool 'nopool'", ErrorKind::PoolUnavailable),
            ("cannot open 'tank/nope': dataset does not exist", ErrorKind::NotFound),
            (
                "connect: No such file or directory\nPlease make sure that the zfs-fuse daemon is running.",
                ErrorKind::PoolUnavailable,
            ),
            (
                "The ZFS modules are not loaded.\nTry running '/sbin/modprobe zfs' as root to load them.",
                ErrorKind::PoolUnavailable,
            ),
            ("cannot destroy 'tank/v1@a': dataset is busy", ErrorKind::Busy),
            ("umount: /mnt: target is busy.\ncannot unmount '/mnt': umount failed", ErrorKind::Busy),
            ("cannot unmount '/tank/a': pool or dataset is busy", ErrorKind::Busy),
            (
                "cannot destroy snapshot tank/a@m: it's being held. Run 'zfs holds -r tank/a@m' to see holders.",
                ErrorKind::Busy,
            ),
            ("cannot create 'tank/rr': out of space", ErrorKind::NoSpace),
            (
                "cannot receive new filesystem stream: destination 'tank/v' exists\nmust specify -F to overwrite it",
                ErrorKind::AlreadyExists,
            ),
            (
                "cannot receive incremental stream: most recent snapshot of tank/v does not\nmatch incremental source\nwarning: cannot send 'tank/v@s2': Broken pipe",
                ErrorKind::Diverged,
            ),
            (
                "cannot receive incremental stream: destination tank/v has been modified\nsince most recent snapshot",
                ErrorKind::Diverged,
            ),
            ("cannot receive new filesystem stream: invalid backup stream", ErrorKind::BrokenStream),
            ("cannot receive: failed to read from stream", ErrorKind::BrokenStream),
            ("cannot receive incremental stream: destination 'tank/w' does not exist", ErrorKind::NotFound),
            ("WARNING: could not send tank/v2@nope: does not exist", ErrorKind::NotFound),
            (
                "cannot destroy 'tank/a@s': snapshot has dependent clones\nuse '-R' to destroy the following datasets:\ntank/c",
                ErrorKind::HasClones,
            ),
            (
                "cannot destroy 'tank/a': filesystem has dependent clones\nuse '-R' to destroy the following datasets:\ntank/c",
                ErrorKind::HasClones,
            ),
            (
                "cannot destroy 'tank/a': filesystem has children\nuse '-r' to destroy the following datasets:\ntank/a@s",
                ErrorKind::Other,
            ),
            ("cannot destroy 'tank/v': dataset is busy", ErrorKind::Busy),
            ("Key load error: Incorrect key provided for 'tank/e'.", ErrorKind::WrongKey),
            ("Key load error: Raw key too long (expected 32).", ErrorKind::WrongKey),
            ("Key load error: Encryption feature not enabled.", ErrorKind::Unsupported),
            ("Key unload error: 'tank/e' is busy.", ErrorKind::Busy),
            ("cannot mount 'tank/e': encryption key not loaded", ErrorKind::KeyNotLoaded),
            ("warning: cannot send 'tank/e@s': source key must be loaded", ErrorKind::KeyNotLoaded),
            ("warning: cannot send 'tank/e@s': dataset key must be loaded", ErrorKind::KeyNotLoaded),
            (
                "cannot receive new filesystem stream: destination tank/v contains partially-complete state from \"zfs receive -s\".",
                ErrorKind::Unfinished,
            ),
            (
                "cannot receive new filesystem stream: checksum mismatch or incomplete stream.\nPartially received snapshot is saved.",
                ErrorKind::BrokenStream,
            ),
            (
                "cannot receive incremental stream: cannot perform raw receive on top of existing unencrypted dataset",
                ErrorKind::Diverged,
            ),
            (
                "cannot receive incremental stream: IV set guid mismatch. See the 'zfs receive' man page section\ndiscussing the limitations of raw encrypted send streams.",
                ErrorKind::Diverged,
            ),
            ("cannot receive incremental stream: encryption key does not match existing key", ErrorKind::Diverged),
            ("cannot receive incremental stream: inherited key must be loaded", ErrorKind::KeyNotLoaded),
            (
                "cannot receive incremental stream: incremental send stream requires -L (--large-block), to match previous receive.",
                ErrorKind::Diverged,
            ),
            ("Key load error: Keys must be loaded for encryption root of 'tank/c' (tank/e).", ErrorKind::KeyNotLoaded),
            ("cannot create bookmark 'tank/v#one': bookmark exists", ErrorKind::AlreadyExists),
            ("bookmark 'tank/v#one' does not exist.", ErrorKind::NotFound),
            ("cannot resume send: 'tank/v@s' used in the initial send no longer exists", ErrorKind::NotFound),
            ("cannot create 'tank/e': encryption failure", ErrorKind::Other),
            ("internal error: out of memory", ErrorKind::Other),
        ] {
            assert_eq!(classify(stderr), kind, "{stderr}");
        }
    }

    #[test]
    fn an_error_names_command_status_and_message() {
        let error = ZfsError::exited("zfs destroy tank/a", Some(1), "cannot destroy 'tank/a': dataset is busy\n");
        assert_eq!(
            error.to_string(),
            "`zfs destroy tank/a` failed: busy (exit status 1): cannot destroy 'tank/a': dataset is busy"
        );
        assert!(error.is_retryable());
    }
}
