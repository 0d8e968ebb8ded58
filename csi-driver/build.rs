//! Generates the gRPC code of `proto/`, without protoc.

use std::{error::Error, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let folder = Path::new("proto");
    let files = protox::compile([folder.join("csi.proto"), folder.join("registration.proto")], [folder])?;
    // What a service doesn't offer answers UNIMPLEMENTED, as CSI wants it.
    tonic_prost_build::configure().generate_default_stubs(true).compile_fds(files)?;
    Ok(())
}
