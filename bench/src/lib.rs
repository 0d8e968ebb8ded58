//! What `make bench` measures, each kind in a program of its own below `src/`, and how all of them count. docs/benchmarks.md says what and how.

pub mod stats;
