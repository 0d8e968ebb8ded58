//! `make e2e-storage`: all of Kubernetes' external-storage suite, and its result as a table.

use std::process::ExitCode;

use portolan_e2e::{
    lab::Lab,
    scene,
    storage_suite::{self, Scope},
};

fn main() -> ExitCode {
    let run = || {
        let lab = Lab::connect()?;
        scene::install(&lab)?;
        storage_suite::play(&lab, Scope::Everything)
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("\nFAILED: {e:#}");
            ExitCode::FAILURE
        }
    }
}
