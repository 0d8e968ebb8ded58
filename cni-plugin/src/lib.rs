//! The CNI executable (specification 1.1.0), chained after the node's own plugin or in its place, and its protocol to the node's agent.
//!
//! The executable reads what the container runtime gives it, asks the agent over a Unix socket and passes the previous plugin's
//! result on unchanged; where there is no other plugin (`primary`) the result is the agent's. It keeps no state: an agent that is down makes ADD say "try again later" and lets DEL succeed, because
//! the agent compares its ports with the pods' namespaces that are still there, and collects the rest by itself.

mod agent;
mod failure;
mod input;
mod protocol;
mod result;

pub use failure::Failure;
pub use input::{DEFAULT_SOCKET, Environment, SUPPORTED_VERSIONS};
pub use protocol::{Answer, Attachment, Command, PodName, PortMapping, Request, Transport};
pub use result::{Attached, Interface, Ip, Route};

use std::io::{Read, Write};

use serde_json::{json, value::RawValue};

use input::Config;

/// Runs one CNI invocation; returns the process's exit code.
///
/// The result or the error goes to `stdout` as the specification's JSON.
pub fn run(environment: &Environment, stdin: &mut dyn Read, stdout: &mut dyn Write) -> u8 {
    let mut version = input::NEWEST_VERSION.to_owned();
    let (output, code) = match answer(environment, stdin, &mut version) {
        Ok(output) => (output, 0),
        Err(failure) => (Some(failure.to_json(&version).to_string()), 1),
    };
    match output {
        // Nobody is left to tell when even this can't be written.
        Some(text) if writeln!(stdout, "{text}").is_err() => 1,
        _ => code,
    }
}

fn answer(environment: &Environment, stdin: &mut dyn Read, version: &mut String) -> Result<Option<String>, Failure> {
    let command = environment.command()?;
    let config = Config::read(stdin)?;
    if let Some(given) = &config.cni_version {
        version.clone_from(given);
    }
    if command == Command::Version {
        let versions = json!({ "cniVersion": version, "supportedVersions": SUPPORTED_VERSIONS });
        return Ok(Some(versions.to_string()));
    }
    config.check_version(command)?;
    let request = environment.request(command, &config)?;
    let passed_on = match command {
        _ if request.primary => None,
        Command::Add => Some(config.previous_result()?),
        Command::Check => config.previous_result().map(|_| None)?,
        _ => None,
    };
    let attached = ask(&config, &request)?;
    if request.primary && command == Command::Add {
        let attached = attached.ok_or_else(|| {
            let msg = "Portolan's agent did not say what it gave the pod: it is of another release than this plugin";
            Failure::new(Failure::TRY_AGAIN, msg, agent::HINT)
        })?;
        return Ok(Some(attached.to_json(version).to_string()));
    }
    Ok(passed_on.map(|result: Box<RawValue>| result.get().to_owned()))
}

fn ask(config: &Config, request: &Request) -> Result<Option<Attached>, Failure> {
    let socket = match config.socket() {
        // Nothing can have been plugged in by such a configuration.
        Err(_) if request.command == Command::Delete => return Ok(None),
        socket => socket?,
    };
    match (request.command, agent::ask(&socket, request)) {
        (_, Ok(Answer { error: None, result })) => Ok(result),
        (_, Ok(Answer { error: Some(failure), .. })) => Err(failure),
        (Command::Delete | Command::Collect, Err(_)) => Ok(None),
        (Command::Status, Err(e)) => Err(Failure::new(Failure::NOT_AVAILABLE, e.to_string(), agent::HINT)),
        (_, Err(e)) => Err(Failure::new(Failure::TRY_AGAIN, e.to_string(), agent::HINT)),
    }
}
