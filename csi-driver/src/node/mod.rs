//! `portolan-csi node`.
