//! What every Kubernetes-facing process of Portolan shares: logs, the end of the process, health and metrics, how long the API server
//! is waited for, the leader lease, conditions and Events, addresses of the node, and whose DNS settings admission changes.

pub mod address;
pub mod admission;
pub mod client;
pub mod conditions;
pub mod events;
pub mod http;
pub mod leader;
mod logging;

pub use logging::init_logging;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The namespace to fall back on when neither the environment nor a service account tells it.
const DEFAULT_NAMESPACE: &str = "portolan-system";
/// Where Kubernetes mounts the namespace of a pod's service account.
const SERVICE_ACCOUNT_NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// A token that is cancelled on SIGTERM or SIGINT. Installs rustls' `ring` provider too: call it once, at the start, inside
/// the runtime.
pub fn shutdown() -> CancellationToken {
    // An error only says that a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let token = CancellationToken::new();
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        match signal(kind) {
            Ok(mut stream) => {
                let token = token.clone();
                tokio::spawn(async move {
                    stream.recv().await;
                    tracing::info!("asked to end");
                    token.cancel();
                });
            }
            Err(error) => tracing::warn!(%error, "can't listen for a signal; the process ends without cleaning up"),
        }
    }
    token
}

/// The namespace this process runs in: `POD_NAMESPACE`, or the service account's, or `portolan-system`.
pub fn namespace() -> String {
    std::env::var("POD_NAMESPACE")
        .ok()
        .or_else(|| std::fs::read_to_string(SERVICE_ACCOUNT_NAMESPACE).ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned())
}
