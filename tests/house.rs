//! The house keeps its shape: dependencies point one way, and the YAML is what the types generate.

use std::{collections::BTreeSet, path::PathBuf, process::Command};

/// The tree that cargo runs us for: the one that we were compiled in may be another, since trees share what is compiled.
fn root() -> PathBuf {
    PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs the tests")).join("..")
}

/// The names of all packages that a package is built with, on its own: what other members make of a shared dependency's features
/// doesn't count, nor do test-only dependencies.
fn built_with(package: &str) -> BTreeSet<String> {
    let out = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--locked",
            "--offline",
            "--edges=normal",
            "--prefix=none",
            "--format={p}",
            "--package",
            package,
        ])
        .current_dir(root())
        .output()
        .expect("cargo tree runs");
    assert!(out.status.success(), "cargo tree: {}", String::from_utf8_lossy(&out.stderr));
    let all = String::from_utf8_lossy(&out.stdout);
    all.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

#[test]
fn dependencies_point_from_binaries_to_libraries() {
    let kubernetes = ["kube", "kube-client", "k8s-openapi", "tonic", "portolan-crds", "portolan-runtime"];
    let forbidden: &[(&str, &[&str])] = &[
        ("portolan-zfs", &kubernetes),
        ("portolan-net", &kubernetes),
        ("portolan-dns", &kubernetes),
        (
            "portolan-cni",
            &["kube", "kube-client", "k8s-openapi", "tonic", "tokio", "portolan-crds", "portolan-runtime"],
        ),
        ("portolan-crds", &["kube-client", "tonic", "tokio", "portolan-runtime"]),
        ("portolan-runtime", &["portolan-operator", "portolan-csi", "portolan-agent", "tonic"]),
        (
            "portolan-operator",
            &["portolan-csi", "portolan-agent", "portolan-zfs", "portolan-net", "portolan-dns", "tonic"],
        ),
        ("portolan-csi", &["portolan-operator", "portolan-agent", "portolan-net", "portolan-dns", "portolan-cni"]),
        ("portolan-agent", &["portolan-operator", "portolan-csi", "portolan-zfs", "tonic"]),
        ("kubectl-portable", &["portolan-operator", "portolan-csi", "portolan-agent", "portolan-runtime"]),
    ];
    for (package, banned) in forbidden {
        let all = built_with(package);
        assert!(all.contains(*package), "{package} is not in the workspace");
        for other in *banned {
            assert!(!all.contains(*other), "{package} must not depend on {other}");
        }
    }
}

#[test]
fn generated_yaml_is_what_the_types_say() {
    for directory in ["crds", "charts/portolan/crds"] {
        let directory = root().join(directory);
        let mut expected = BTreeSet::new();
        for (file, crd) in portolan_crds::definitions() {
            let path = directory.join(&file);
            let kept = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let generated = portolan_crds::to_yaml(&crd).expect("serialises");
            assert!(kept == generated, "{}: run `make generate`", path.display());
            expected.insert(file);
        }
        let kept: BTreeSet<String> = std::fs::read_dir(&directory)
            .expect("reads")
            .map(|entry| entry.expect("reads").file_name().to_string_lossy().into_owned())
            .filter(|name| name.ends_with(".yaml"))
            .collect();
        assert_eq!(kept, expected, "{}: nothing but generated definitions", directory.display());
    }
}
