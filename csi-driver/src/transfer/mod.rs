//! Volumes from one node's agent to another's, as ZFS streams over mutually authenticated TLS 1.3.
//!
//! The target connects to the source and asks for one snapshot of one volume, naming the snapshots it has; the source chooses the newest of
//! those as base and streams the rest. A stream counts only with its trailer, which is written after `zfs send` has ended well and which the
//! target verifies before it lets `zfs recv` see the last bytes: whatever is damaged on the way ZFS itself rolls back, and what is cut it rolls back or keeps
//! as a part, which counts for nothing until the rest has come.
//!
//! A node sends and receives so many streams at a time. Who comes when all places are taken waits, first at the target and then at the source;
//! only who has a place at the target takes one at a source, so that no two wait for each other.

mod client;
mod copy;
mod digest;
mod error;
mod identity;
mod pace;
mod protocol;
mod queue;
mod server;
mod turns;
mod wire;

pub use client::{Fetch, Fetching, Next, Offer, Received, SoFar, There, Waits, fetch};
pub use error::TransferError;
pub use identity::{Identity, IdentityError, server_name};
pub use pace::Pace;
pub use protocol::{InvalidRequest, MAX_FRAME, MAX_HEADER, Refusal, RefusalCode, Reply, Request, Trailer};
pub use queue::Class;
pub use server::{Authorise, Grant, serve};
pub use turns::{Place, Turns};
pub use wire::Limits;
