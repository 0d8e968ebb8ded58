//! One module a subject. Needs root, zfs-fuse and network namespaces; a test that can't run fails and says why.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "all of this crate is tests; a panic is a failure"
)]

mod agent;
mod block;
mod cni;
mod events;
mod house;
mod mounts;
mod net;
mod patience;
mod transfer;
mod verbs;
mod zfs;
