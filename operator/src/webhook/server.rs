//! The webhook's HTTPS server. Its certificate is made in memory, by the authority whose certificate is in the registration.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use axum_server::Handle;
use axum_server::tls_rustls::RustlsConfig;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview};
use kube::{Api, Client};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::mutate::dns_config;
use super::placement;
use crate::authority::{Authority, AuthorityError};
use crate::metrics::{Decision, Metrics};

/// How long a serving certificate is valid.
const LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);
/// When the next one is made.
const RENEW_EVERY: Duration = Duration::from_secs(24 * 3600);
/// How often the cluster's DNS address is looked up while it is unknown.
const LOOK_UP_EVERY: Duration = Duration::from_secs(10);
/// Requests that are being answered may finish for so long.
const DRAIN: Duration = Duration::from_secs(5);

/// What the webhook needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to listen.
    pub address: SocketAddr,
    /// The names it is called by.
    pub names: Vec<String>,
    /// The cluster's DNS server; looked up (Service kube-system/kube-dns) if not given.
    pub cluster_dns: Option<IpAddr>,
    /// The cluster's domain.
    pub cluster_domain: String,
}

/// The webhook can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// It has no certificate.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// Its certificate is unusable, or its address can't be listened at.
    #[error("can't serve the webhook at {address}")]
    Serve {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

struct Shared {
    client: Client,
    cluster_dns: ArcSwapOption<IpAddr>,
    cluster_domain: String,
    metrics: Metrics,
}

/// Serves the webhook until `stop` is cancelled; `listening` is cancelled when it does.
///
/// # Errors
/// When no certificate can be made or the address can't be listened at.
pub async fn run(
    client: Client,
    authority: Arc<Authority>,
    settings: Settings,
    metrics: Metrics,
    listening: CancellationToken,
    stop: CancellationToken,
) -> Result<(), ServerError> {
    let address = settings.address;
    let failed = |source| ServerError::Serve { address, source };
    let issue = || authority.issue_server(settings.names.clone(), LIFETIME, Timestamp::now());
    let pem = issue()?;
    let tls = RustlsConfig::from_pem(pem.certificate.into_bytes(), pem.key.into_bytes()).await.map_err(failed)?;
    let shared = Arc::new(Shared {
        client: client.clone(),
        cluster_dns: ArcSwapOption::from_pointee(settings.cluster_dns),
        cluster_domain: settings.cluster_domain.clone(),
        metrics,
    });
    let router = Router::new()
        .route("/mutate-pods", post(mutate_pods))
        .route("/place-pods", post(place_pods))
        .with_state(Arc::clone(&shared));

    let handle = Handle::new();
    let server =
        axum_server::bind_rustls(address, tls.clone()).handle(handle.clone()).serve(router.into_make_service());
    let attend = async {
        if handle.listening().await.is_some() {
            listening.cancel();
        }
        tokio::join!(look_up(&client, &shared), async {
            loop {
                tokio::time::sleep(RENEW_EVERY).await;
                match issue() {
                    Ok(pem) => _ = tls.reload_from_pem(pem.certificate.into_bytes(), pem.key.into_bytes()).await,
                    Err(error) => tracing::warn!(%error, "the webhook keeps its old certificate"),
                }
            }
        });
    };
    let stopping = async {
        stop.cancelled().await;
        handle.graceful_shutdown(Some(DRAIN));
        std::future::pending::<()>().await;
    };
    tokio::select! {
        result = server => result.map_err(failed),
        () = attend => Ok(()),
        () = stopping => Ok(()),
    }
}

/// Finds the cluster's DNS address if none was given. Until then pods get ours only, which forwards.
async fn look_up(client: &Client, shared: &Shared) {
    let services = Api::<Service>::namespaced(client.clone(), "kube-system");
    while shared.cluster_dns.load().is_none() {
        match services.get("kube-dns").await {
            Ok(service) => {
                let address = service.spec.and_then(|spec| spec.cluster_ip).and_then(|text| text.parse().ok());
                shared.cluster_dns.store(address.map(Arc::new));
            }
            Err(error) => {
                tracing::warn!(%error, "the cluster's DNS address is unknown: set --cluster-dns if there is no Service kube-system/kube-dns")
            }
        }
        tokio::time::sleep(LOOK_UP_EVERY).await;
    }
    std::future::pending().await
}

async fn mutate_pods(
    State(shared): State<Arc<Shared>>,
    Json(review): Json<AdmissionReview<Pod>>,
) -> Json<AdmissionReview<DynamicObject>> {
    let request: AdmissionRequest<Pod> = match review.try_into() {
        Ok(request) => request,
        Err(error) => return Json(AdmissionResponse::invalid(error).into_review()),
    };
    let (decision, response) = answer(&shared, &request);
    shared.metrics.admission(decision);
    Json(response.into_review())
}

async fn place_pods(
    State(shared): State<Arc<Shared>>,
    Json(review): Json<AdmissionReview<Pod>>,
) -> Json<AdmissionReview<DynamicObject>> {
    let request: AdmissionRequest<Pod> = match review.try_into() {
        Ok(request) => request,
        Err(error) => return Json(AdmissionResponse::invalid(error).into_review()),
    };
    let (decision, response) = placement::answer(&shared.client, &request).await;
    shared.metrics.admission(decision);
    Json(response.into_review())
}

fn answer(shared: &Shared, request: &AdmissionRequest<Pod>) -> (Decision, AdmissionResponse) {
    let response = AdmissionResponse::from(request);
    let namespace = request.namespace.as_deref().unwrap_or("default");
    let cluster_dns = shared.cluster_dns.load().as_deref().copied();
    let config =
        request.object.as_ref().and_then(|pod| dns_config(pod, namespace, cluster_dns, &shared.cluster_domain));
    let Some(config) = config else { return (Decision::Unchanged, response) };
    let patch = json!([
        {"op": "add", "path": "/spec/dnsPolicy", "value": "None"},
        {"op": "add", "path": "/spec/dnsConfig", "value": config},
    ]);
    let patched = serde_json::from_value(patch).ok().and_then(|patch| response.clone().with_patch(patch).ok());
    match patched {
        Some(patched) => (Decision::Granted, patched),
        None => (Decision::Failed, response),
    }
}
