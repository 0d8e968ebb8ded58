//! This node's certificate for transfers: asked of the operator by a CertificateSigningRequest, renewed in time. The key never
//! leaves this process.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt};
use portolan_crds::{CA_CONFIG_MAP, NODE_SIGNER};
use rcgen::{CertificateParams, DnType, KeyPair};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use x509_parser::pem::parse_x509_pem;

use crate::transfer::{Identity, IdentityError};

/// The life that is asked for.
const LIFE: Duration = Duration::from_secs(86_400);
/// How long one request may wait to be signed before another is made.
const SIGNED_WITHIN: Duration = Duration::from_secs(300);
/// How often the authority is compared with the one that is trusted.
const CHECK_EVERY: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Key of the authority's certificate in its ConfigMap.
const CA_KEY: &str = "ca.crt";

/// No certificate, and why.
#[derive(Debug, thiserror::Error)]
enum CertificateError {
    #[error("the Kubernetes API: {0}")]
    Api(#[from] kube::Error),
    #[error("ConfigMap {namespace}/{CA_CONFIG_MAP} has no {CA_KEY}: is portolan-operator running?")]
    NoAuthority { namespace: String },
    #[error("CertificateSigningRequest {name} was not signed: {why}")]
    NotSigned { name: String, why: String },
    #[error("making a key or a request: {0}")]
    Make(#[from] rcgen::Error),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the signed certificate can't be read: {0}")]
    Unreadable(String),
}

/// A certificate in use.
struct Current {
    identity: Arc<Identity>,
    authority: String,
    renew_at: Timestamp,
}

/// Keeps `identity` supplied until `shutdown`.
pub(super) async fn keep(
    client: Client,
    node: String,
    identity: watch::Sender<Option<Arc<Identity>>>,
    shutdown: CancellationToken,
) {
    let work = async {
        let mut pause = FIRST_PAUSE;
        loop {
            match obtain(&client, &node).await {
                Ok(current) => {
                    tracing::info!(renew_at = %current.renew_at, "got a certificate");
                    pause = FIRST_PAUSE;
                    identity.send_replace(Some(current.identity.clone()));
                    until_due(&client, &current).await;
                }
                Err(error) => {
                    tracing::warn!(error = error.to_string(), ?pause, "no certificate");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = work => {}
    }
}

/// Returns when two thirds of the certificate's life are over, or the authority is another.
async fn until_due(client: &Client, current: &Current) {
    while Timestamp::now() < current.renew_at {
        tokio::time::sleep(CHECK_EVERY).await;
        if authority(client).await.is_ok_and(|authority| authority != current.authority) {
            tracing::info!("the authority has changed");
            return;
        }
    }
}

async fn authority(client: &Client) -> Result<String, CertificateError> {
    let namespace = portolan_runtime::namespace();
    let found = Api::<ConfigMap>::namespaced(client.clone(), &namespace).get_opt(CA_CONFIG_MAP).await?;
    let authority = found.and_then(|map| map.data.unwrap_or_default().remove(CA_KEY));
    authority.ok_or(CertificateError::NoAuthority { namespace })
}

async fn obtain(client: &Client, node: &str) -> Result<Current, CertificateError> {
    // First: without it there is nobody to sign.
    authority(client).await?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![format!("{node}.node.portolan.dev")])?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("node:{node}"));
    let request = params.serialize_request(&key)?.pem()?;
    let certificate = sign(client, node, request).await?;
    let authority = authority(client).await?;
    let identity = Identity::new(&certificate, key.serialize_pem().as_bytes(), authority.as_bytes())?;
    let renew_at = two_thirds(&certificate)?;
    Ok(Current { identity: Arc::new(identity), authority, renew_at })
}

async fn sign(client: &Client, node: &str, request: String) -> Result<Vec<u8>, CertificateError> {
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    let wanted = CertificateSigningRequest {
        metadata: ObjectMeta {
            generate_name: Some(format!("portolan-{node}-")),
            labels: Some(BTreeMap::from([("app.kubernetes.io/name".to_owned(), "portolan-storage".to_owned())])),
            ..ObjectMeta::default()
        },
        spec: CertificateSigningRequestSpec {
            expiration_seconds: i32::try_from(LIFE.as_secs()).ok(),
            request: ByteString(request.into_bytes()),
            signer_name: NODE_SIGNER.to_owned(),
            usages: Some(["client auth", "server auth", "digital signature"].map(str::to_owned).to_vec()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    };
    let name = requests.create(&PostParams::default(), &wanted).await?.name_any();
    let decided =
        |request: Option<&CertificateSigningRequest>| request.is_none_or(|request| decision(request).is_some());
    let waited = tokio::time::timeout(SIGNED_WITHIN, await_condition(requests, &name, decided)).await;
    let not_signed = |why: &str| CertificateError::NotSigned { name: name.clone(), why: why.to_owned() };
    match waited {
        Err(_) => Err(not_signed("nobody has answered it: is portolan-operator running?")),
        Ok(Err(error)) => Err(not_signed(&error.to_string())),
        Ok(Ok(request)) => match request.as_ref().and_then(decision) {
            Some(Ok(certificate)) => Ok(certificate),
            Some(Err(why)) => Err(not_signed(&why)),
            None => Err(not_signed("it was deleted")),
        },
    }
}

/// The certificate, or why there won't be one; none while nobody has decided.
fn decision(request: &CertificateSigningRequest) -> Option<Result<Vec<u8>, String>> {
    let status = request.status.as_ref()?;
    if let Some(certificate) = &status.certificate {
        return Some(Ok(certificate.0.clone()));
    }
    let refused =
        status.conditions.iter().flatten().find(|condition| matches!(condition.type_.as_str(), "Denied" | "Failed"));
    refused.map(|condition| {
        Err(format!("{}: {}", condition.type_, condition.message.as_deref().unwrap_or("no reason given")))
    })
}

fn two_thirds(certificate: &[u8]) -> Result<Timestamp, CertificateError> {
    let unreadable = |error: &dyn std::fmt::Display| CertificateError::Unreadable(error.to_string());
    let (_, pem) = parse_x509_pem(certificate).map_err(|error| unreadable(&error))?;
    let parsed = pem.parse_x509().map_err(|error| unreadable(&error))?;
    let (from, to) = (parsed.validity().not_before.timestamp(), parsed.validity().not_after.timestamp());
    Timestamp::from_second(from + (to - from) / 3 * 2).map_err(|error| unreadable(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewed_after_two_thirds() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["a.node.portolan.dev".into()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2026, 1, 1);
        params.not_after = rcgen::date_time_ymd(2026, 1, 4);
        let pem = params.self_signed(&key).unwrap().pem();
        assert_eq!(two_thirds(pem.as_bytes()).unwrap(), "2026-01-03T00:00:00Z".parse().unwrap());
        assert!(two_thirds(b"nothing").is_err());
    }
}
