//! `make demo`: the scene, told step by step.

use std::process::ExitCode;

use portolan_e2e::{lab::Lab, scene};

fn main() -> ExitCode {
    match Lab::connect().and_then(|lab| scene::play(&lab).map(|()| lab)) {
        Ok(lab) => {
            lab.step("done. `make lab-shell` for a shell with kubectl and helm, `make lab-down` to end the cluster");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("\nFAILED: {e:#}");
            ExitCode::FAILURE
        }
    }
}
