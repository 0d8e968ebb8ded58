//! The admission webhook: tells annotated pods to ask Portolan's DNS server first, and pods with volumes which node to prefer.
//!
//! It fails open: without it, a pod starts and only lacks the names of its networks, or starts where its volumes are not.

mod mutate;
mod place;
mod placement;
mod registration;
mod server;

pub use registration::keep_registered;
pub use server::{ServerError, Settings, run};
