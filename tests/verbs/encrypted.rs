//! A pod on an encrypted network: it is encrypted, or it doesn't start.

use std::{os::unix::fs::PermissionsExt, path::Path};

use portolan_crds::NetworkNodeSlice;
use portolan_tests::node::Node;
use serde_json::json;

use super::{IPV4, files, interface, journal, names, on_backend};

const NETWORKS: &str = "/apis/portolan.dev/v1alpha1/containernetworks";
const DIRECTORY: &str = "/var/lib/portolan/network";

/// An encrypted network, as the operator leaves it.
fn make_secret(node: &Node, keys: serde_json::Value) {
    let ready = json!({"type": "Ready", "status": "True", "reason": "Ready", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let network = json!({"apiVersion": "portolan.dev/v1alpha1", "kind": "ContainerNetwork", "metadata": {"name": "secret"},
        "spec": {"subnets": ["10.33.0.0/16"], "encryption": "WireGuard"},
        "status": {"vni": 78, "conditions": [ready], "keys": keys}});
    node.api.make(NETWORKS, network);
}

fn has_keys(node: &Node) -> bool {
    files(node, DIRECTORY).contains("keys.json")
}

#[test]
fn a_pod_is_encrypted_or_does_not_start() {
    let node = Node::with_network(IPV4);
    make_secret(&node, json!({"generation": 7, "since": "2026-01-01T00:00:00Z"}));
    let pod = node.pod("pod", json!({"portolan.dev/networks": "secret"}), json!({}));
    match node.add(&pod) {
        Ok(_) => {
            let key = || node.api.all::<NetworkNodeSlice>().into_iter().find_map(|slice| slice.spec.encryption);
            node.wait_for("its key to be told of", || key().is_some());
            let told = key().unwrap();
            assert_eq!((told.keys[0].generation, told.sends), (7, 7));
            let file = node.on_host(&Path::new(DIRECTORY).join("keys.json"));
            assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
            assert!(!std::fs::read_to_string(file).unwrap().contains(&told.keys[0].public_key));
            assert_eq!(interface(&node, &pod).unwrap().mtu, 1390);
            node.delete(&pod).unwrap();
        }
        Err(error) => {
            println!("SKIPPED: {error}");
            names(&error, 102, &["ContainerNetwork secret is encrypted", "this node's kernel has no WireGuard"]);
            assert_eq!(interface(&node, &pod), None);
        }
    }
    node.wait_for("nothing of it to be left", || {
        !files(&node, "/run/netns").iter().any(|name| name.starts_with("portolan-")) && !has_keys(&node)
    });
    assert!(journal(&node).is_empty());
    // Whatever became of that, networks without encryption go on.
    let other = node.pod("other", on_backend(), json!({}));
    node.add(&other).unwrap();
    assert_eq!(interface(&node, &other).unwrap().mtu, 1450);
    assert!(!files(&node, "/run/netns").contains("portolan-encrypted"));
}

/// As an operator leaves it that doesn't know of encryption.
#[test]
fn without_a_generation_of_keys_nothing_starts() {
    let node = Node::with_network(IPV4);
    make_secret(&node, json!(null));
    let pod = node.pod("pod", json!({"portolan.dev/networks": "secret"}), json!({}));
    names(&node.add(&pod).unwrap_err(), 11, &["secret is not ready", "generation of keys"]);
    assert_eq!((interface(&node, &pod), has_keys(&node)), (None, false));
}
