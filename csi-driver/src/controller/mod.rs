//! `portolan-csi controller`.
