//! Names on Portolan's networks: a snapshot of who has which name ([`Zone`]) and the servers that answer from it: one for the pods of
//! each network ([`run`]), and one for everyone else ([`run_for_everyone`]).
//!
//! One of the former runs per network and node. What a pod may see follows from the network whose server it asked and from its source
//! address: its own networks and nothing else. All other names are forwarded. This crate knows nothing of Kubernetes.

mod answer;
mod batch;
mod cache;
mod domain;
mod explain;
mod flight;
mod forward;
mod limit;
mod metrics;
mod names;
mod plain;
mod records;
mod reverse;
mod sent;
mod server;
mod udp;
mod wire;
mod zone;

pub use domain::{Domain, DomainError};
pub use explain::Explanation;
pub use forward::Upstream;
pub use metrics::Metrics;
pub use server::{ServeError, run, run_for_everyone};
pub use zone::{Group, Host, Member, NetworkNames, NetworkZone, Port, Zone, ZoneHandle};

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
