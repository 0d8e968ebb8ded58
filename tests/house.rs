//! The house keeps its shape: dependencies point one way, and the YAML is what the types generate.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The names of all packages that each workspace member depends on, by itself or through others, without test-only ones.
fn dependency_closure() -> BTreeMap<String, BTreeSet<String>> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--offline"])
        // Without it, crates that only other systems need would have to be here too.
        .arg(format!("--filter-platform={}-unknown-linux-gnu", std::env::consts::ARCH))
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(out.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&out.stderr));
    let metadata: Value = serde_json::from_slice(&out.stdout).expect("cargo metadata prints JSON");

    let name_of: BTreeMap<&str, &str> = metadata["packages"]
        .as_array()
        .expect("packages")
        .iter()
        .map(|p| (p["id"].as_str().expect("id"), p["name"].as_str().expect("name")))
        .collect();
    let mut edges: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in metadata["resolve"]["nodes"].as_array().expect("nodes") {
        let shipped = node["deps"].as_array().expect("deps").iter().filter(|dependency| {
            dependency["dep_kinds"].as_array().expect("dep_kinds").iter().any(|kind| kind["kind"].is_null())
        });
        edges.insert(
            node["id"].as_str().expect("id"),
            shipped.map(|dependency| dependency["pkg"].as_str().expect("pkg")).collect(),
        );
    }
    let members = metadata["workspace_members"].as_array().expect("members");
    members
        .iter()
        .map(|member| {
            let start = member.as_str().expect("id");
            let (mut seen, mut queue) = (BTreeSet::new(), vec![start]);
            while let Some(id) = queue.pop() {
                for next in &edges[id] {
                    if seen.insert(*next) {
                        queue.push(next);
                    }
                }
            }
            (name_of[start].to_string(), seen.into_iter().map(|id| name_of[id].to_string()).collect())
        })
        .collect()
}

#[test]
fn dependencies_point_from_binaries_to_libraries() {
    let closure = dependency_closure();
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
        let all = closure.get(*package).unwrap_or_else(|| panic!("{package} is not in the workspace"));
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
