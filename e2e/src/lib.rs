//! Portolan seen from outside: a real cluster (the lab), `kubectl`, `helm`, and what a user would look at.
//!
//! The lab must be up (`make lab-up`); `LANE` chooses which one.

pub mod asking;
pub mod bad_input;
pub mod egress;
pub mod encrypted;
pub mod encryption;
pub mod everyone;
pub mod families;
pub mod faults;
pub mod ginkgo;
pub mod hotplug;
pub mod lab;
pub mod limits;
pub mod migration;
mod names;
pub mod network_suite;
pub mod parts;
pub mod pods;
pub mod policies;
pub mod primary;
pub mod resuming;
pub mod rolling;
pub mod sanity;
pub mod scene;
pub mod shared_reading;
pub mod snapshots;
pub mod storage_suite;
pub mod trouble;
pub mod uninstall;
pub mod upgrade;
pub mod zfs_contract;
