//! The handoff held to what it promises: by random histories, long ones, and by all histories, short ones.

mod disk;
mod exhaustive;
mod node;
mod random;
mod settle;
mod snapshots;
mod world;

pub use world::{Happening, NODES, Weakness, World};
