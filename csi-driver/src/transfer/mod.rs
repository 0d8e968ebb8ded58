//! Volumes from one node's agent to another's, as ZFS streams over mutually authenticated TLS 1.3.
//!
//! The target connects to the source and asks for one snapshot of one volume, naming the snapshots it has; the source chooses the newest of
//! those as base and streams the rest. A stream counts only with its trailer, which is written after `zfs send` has ended well and which the
//! target verifies before it lets `zfs recv` see the last bytes: whatever is cut or damaged on the way, ZFS itself rolls back.

mod client;
mod error;
mod identity;
mod pace;
mod protocol;
mod server;
mod wire;

pub use client::{Fetch, Received, SoFar, fetch};
pub use error::TransferError;
pub use identity::{Identity, IdentityError, server_name};
pub use pace::Pace;
pub use protocol::{InvalidRequest, MAX_FRAME, MAX_HEADER, Refusal, RefusalCode, Reply, Request, Trailer};
pub use server::{Authorise, Grant, serve};
pub use wire::Limits;
