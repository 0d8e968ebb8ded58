//! The admission webhook: tells annotated pods to ask Portolan's DNS server first.
//!
//! It fails open: without it, a pod starts and only lacks the names of its networks.

mod mutate;
mod registration;
mod server;

pub use registration::keep_registered;
pub use server::{ServerError, Settings, run};
