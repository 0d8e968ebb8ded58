//! Writes every definition's YAML into the directories given as arguments.

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    let directories: Vec<String> = std::env::args().skip(1).collect();
    if directories.is_empty() {
        eprintln!("usage: generate-crds DIRECTORY...");
        return ExitCode::from(2);
    }
    for directory in &directories {
        for (file, crd) in portolan_crds::definitions() {
            let path = Path::new(directory).join(file);
            let written = portolan_crds::to_yaml(&crd)
                .map_err(|e| e.to_string())
                .and_then(|text| std::fs::write(&path, text).map_err(|e| e.to_string()));
            if let Err(e) = written {
                eprintln!("{}: {e}", path.display());
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
