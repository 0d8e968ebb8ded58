//! Block devices of volumes (zvols), and the filesystems on them. Knows nothing of Kubernetes or CSI.

pub mod device;
pub mod filesystem;
pub mod kernel;
pub mod mounts;
pub mod prepare;
pub mod tools;
