//! `make e2e-network`: Portolan as the cluster's only CNI plugin, then a selection of Kubernetes' suite for networks, with its result.

use std::process::ExitCode;

use portolan_e2e::{lab::Lab, network_suite, parts::Parts, primary};

fn main() -> ExitCode {
    let run = || {
        let lab = Lab::connect()?;
        let parts = Parts::read(&["primary", "suite"])?;
        if parts.has("primary", true) {
            primary::play(&lab)?;
        }
        if parts.has("suite", true) {
            network_suite::play(&lab)?;
        }
        anyhow::Ok(())
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("\nFAILED: {e:#}");
            ExitCode::FAILURE
        }
    }
}
