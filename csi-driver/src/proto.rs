//! Generated gRPC code: the Container Storage Interface and the kubelet's plugin registration.

#![allow(missing_docs, clippy::all)]

/// Container Storage Interface 1.12.
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// The kubelet's plugin registration, version 1.
pub mod registration {
    tonic::include_proto!("pluginregistration");
}
