//! `kubectl portable`: what Portolan has, what is wrong with it, moves of volumes, and explanations of names.

mod bytes;
mod dns;
mod move_;
mod problems;
mod status;

use std::io::{self, Write};

use clap::{Parser, Subcommand, ValueEnum};

/// Shows what Portolan has and what is wrong with it, moves volumes, and explains names.
#[derive(Parser)]
#[command(name = "kubectl-portable", bin_name = "kubectl portable", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Volumes, storage nodes and networks; for each problem, what it is and what to do next.
    Status {
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Moves a claim's volume, or a pod with all its volumes, to a node, and shows how far it is until it ends.
    Move(move_::Options),
    /// Names on networks.
    #[command(subcommand)]
    Dns(dns::Command),
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    /// Tables for people.
    Table,
    /// The objects and the problems, for programs.
    Json,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    // An error only says that a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match arguments.command {
        Command::Status { output } => {
            let everything = status::read().await?;
            let text = match output {
                Output::Table => status::tables(&everything),
                Output::Json => serde_json::to_string_pretty(&status::json(&everything))?,
            };
            print(text.trim_end())?;
        }
        Command::Move(options) => move_::run(options).await?,
        Command::Dns(dns::Command::Lookup(options)) => dns::run(options).await?,
    }
    Ok(())
}

/// Prints; a reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> io::Result<()> {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}
