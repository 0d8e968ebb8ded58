//! Tests of Portolan that need no cluster: real pools on files, real network namespaces, a fake API server.
//! They are all in one test binary, `main.rs`. Here is what other packages' tests share with them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "all of this crate is tests; a panic is a failure"
)]

#[cfg(feature = "api")]
pub mod api;
pub mod contract;
#[cfg(feature = "node")]
pub mod node;
