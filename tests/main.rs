//! One module a subject. Needs root, zfs-fuse and network namespaces; a test that can't run fails and says why.

mod agent;
mod cni;
mod house;
mod net;
mod transfer;
mod zfs;
