//! The CNI executable `portolan`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let environment = portolan_cni::Environment::from_process();
    ExitCode::from(portolan_cni::run(&environment, &mut std::io::stdin(), &mut std::io::stdout()))
}
