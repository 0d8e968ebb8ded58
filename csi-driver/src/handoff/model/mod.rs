//! The handoff held to what it promises: by random histories, long ones, and by all histories, short ones.

mod exhaustive;
mod random;
mod world;

pub use world::{Happening, NODES, Weakness, World};
