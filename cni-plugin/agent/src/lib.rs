//! The network agent of one node: it plugs pods into ContainerNetworks, tells the other nodes by NetworkNodeSlices, and answers
//! names.
//!
//! What it holds on a node is in three places: the journal on disk (which pods are plugged in), the kernel (ports and
//! forwarding), and the API (blocks, claims, slices). The journal is the truth about local pods; the kernel and the slices are
//! made to follow it, so that the agent may be killed between any two steps.

pub mod annotation;
pub mod collect;
pub mod conflist;
pub mod journal;
pub mod policy;
pub mod resolver;
pub mod snapshot;
pub mod view;

mod addresses;
mod agent;
mod alone;
mod cluster;
mod egress;
mod encryption;
mod entries;
mod error;
mod everyone;
mod filtering;
mod hotplug;
mod keys;
mod known;
mod metrics;
mod missed;
mod names;
mod network;
mod paths;
mod peers;
mod plug;
mod pod;
mod primary;
mod publish;
mod rotation;
mod server;
mod settings;
mod slices;
mod store;
mod sync;
mod turns;
mod underlay;

pub use agent::{AgentError, run, run_with};
pub use settings::{Settings, UninstallSettings, uninstall};
