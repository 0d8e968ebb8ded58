//! `portolan-csi controller` and `portolan-csi node`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use portolan_csi::{controller, node};

/// Portolan's storage driver.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    process: Process,
}

#[derive(Subcommand)]
enum Process {
    /// Provisions volumes, attaches them, and starts their moves. One for the cluster.
    Controller(controller::Options),
    /// Mounts volumes and takes their steps on one node. One on each node.
    Node(node::Options),
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (component, shutdown) = match &arguments.process {
        Process::Controller(_) => ("portolan-csi-controller", portolan_runtime::shutdown()),
        Process::Node(_) => ("portolan-storage", portolan_runtime::shutdown()),
    };
    portolan_runtime::init_logging(component);
    let result = match arguments.process {
        Process::Controller(options) => controller::run(options, shutdown).await,
        Process::Node(options) => node::run(options, shutdown).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "ended");
            ExitCode::FAILURE
        }
    }
}
