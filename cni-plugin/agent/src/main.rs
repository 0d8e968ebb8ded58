//! `portolan-agent`: the network agent of one node.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use portolan_agent::{Settings, UninstallSettings};

/// Portolan's network agent.
#[derive(Parser)]
#[command(name = "portolan-agent", version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    settings: Option<Settings>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent (also without a subcommand).
    Run(Settings),
    /// Take Portolan out of this node's container runtime.
    Uninstall(UninstallSettings),
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    portolan_runtime::init_logging("portolan-agent");
    let shutdown = portolan_runtime::shutdown();
    let result = match (arguments.command, arguments.settings) {
        (Some(Command::Uninstall(settings)), _) => portolan_agent::uninstall(&settings).map_err(anyhow::Error::from),
        (Some(Command::Run(settings)), _) | (None, Some(settings)) => {
            portolan_agent::run(settings, shutdown).await.map_err(anyhow::Error::from)
        }
        (None, None) => Err(anyhow::anyhow!("--node-name and --host-ip (or NODE_NAME and HOST_IP) are needed")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "ended");
            ExitCode::FAILURE
        }
    }
}
