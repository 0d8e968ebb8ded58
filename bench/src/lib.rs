//! What `make bench` measures, each kind in a program of its own below `src/`, and how all of them count. docs/benchmarks.md says what and how.

pub mod stats;

/// Prints what was measured, also before an error; the exit code is how it ended.
pub fn end(report: &str, result: anyhow::Result<()>) -> std::process::ExitCode {
    println!("\n{report}");
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("\nFAILED: {e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
