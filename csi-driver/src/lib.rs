//! Portolan's storage: CSI's identity and node services, provisioning, attachment, and the handoff that moves a volume between nodes.
//!
//! One binary, two processes: [`controller`] (unprivileged, sees only the API) and [`node`] (on each node, sees its pool).
//! What they agree on is in a volume's status; [`handoff`] says what each of them does next.

pub mod block;
pub mod controller;
pub mod handoff;
pub mod identity;
pub mod node;
pub mod parameters;
pub mod proto;
pub mod quantity;
pub mod room;
mod socket;
pub mod transfer;
pub mod volume;
mod write;
