//! ZFS by its command line, typed: datasets, snapshots, holds, mounts, `send` and `receive`.
//!
//! Two implementations of [`Zfs`]: [`CommandLine`] runs the host's own `zfs` and `zpool` (OpenZFS 2.1 and later, or zfs-fuse 0.7), and
//! [`memory::Memory`] keeps everything in memory and fails when it is told to. Neither knows of Kubernetes.
//!
//! Nothing here is forced: no `umount -f`, no `recv -F`, no recursive destroy. A copy that holds data nobody else has is never rolled back.

mod api;
mod command;
mod error;
mod key;
pub mod memory;
mod model;
mod name;
mod options;
mod parse;
mod probe;
mod runner;
mod stream;

pub use api::Zfs;
pub use command::CommandLine;
pub use error::{ErrorKind, ZfsError};
pub use key::Key;
pub use model::{Bookmark, Dataset, Kind, PoolHealth, Rest, Snapshot, Space};
pub use name::{BookmarkName, DatasetName, Guid, InvalidName, Property, SnapshotName};
pub use options::{Base, ReceiveOptions, SendOptions};
pub use probe::{Capabilities, Implementation, Probe};
pub use runner::Runner;
pub use stream::{ReceiveProcess, SendStream};
