//! Answers CertificateSigningRequests for `portolan.dev/node`.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use portolan_crds::NODE_SIGNER;
use portolan_runtime::events::Events;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::issue::{Authority, AuthorityError};
use super::request::decide;
use crate::metrics::{Decision, Metrics};

/// How long to wait after a failed attempt.
const RETRY: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("can't write the {part} of CertificateSigningRequest {name}")]
    Write { part: &'static str, name: String, source: kube::Error },
    #[error("can't sign for CertificateSigningRequest {name}")]
    Sign { name: String, source: AuthorityError },
}

struct Context {
    api: Api<CertificateSigningRequest>,
    authority: Arc<Authority>,
    service_account: String,
    events: Events,
    metrics: Metrics,
}

/// Approves and signs, or denies, until `stop` is cancelled. Certificates are for `service_account`'s own nodes only.
pub async fn run(
    client: Client,
    authority: Arc<Authority>,
    service_account: String,
    events: Events,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let api = Api::<CertificateSigningRequest>::all(client);
    let ours = watcher::Config::default().fields(&format!("spec.signerName={NODE_SIGNER}"));
    let context = Arc::new(Context { api: api.clone(), authority, service_account, events, metrics });
    Controller::new(api, ours)
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(answer, retry, context)
        .for_each(|result| async {
            if let Err(error) = result {
                tracing::debug!(%error, "a certificate request was not answered yet");
            }
        })
        .await;
}

fn retry(request: Arc<CertificateSigningRequest>, error: &Error, context: Arc<Context>) -> Action {
    tracing::warn!(request = request.name_any(), error = error as &dyn std::error::Error, "will try again");
    context.metrics.certificate(Decision::Failed);
    Action::requeue(RETRY)
}

async fn answer(request: Arc<CertificateSigningRequest>, context: Arc<Context>) -> Result<Action, Error> {
    if request.spec.signer_name != NODE_SIGNER || is_answered(&request) {
        return Ok(Action::await_change());
    }
    let about = request.object_ref(&());
    // Decided again even if a person has approved it: approval says who may, this says what a certificate may say.
    match decide(&request.spec, &context.service_account) {
        Ok(granted) => {
            let name = request.name_any();
            let certificate = context
                .authority
                .issue_node(
                    granted.request,
                    &granted.common_name,
                    &granted.dns_name,
                    granted.lifetime,
                    Timestamp::now(),
                )
                .map_err(|source| Error::Sign { name, source })?;
            if !has(&request, "Approved") {
                let approved =
                    condition("Approved", "NodeVerified", "the requester's pod is on the node that it names");
                context.write(&request, "approval", with(&request, approved)).await?;
            }
            let status = json!({"certificate": ByteString(certificate.into_bytes())});
            context.write(&request, "status", status).await?;
            context.metrics.certificate(Decision::Granted);
        }
        Err(message) => {
            let (part, type_) = if has(&request, "Approved") { ("status", "Failed") } else { ("approval", "Denied") };
            context.write(&request, part, with(&request, condition(type_, "NotGranted", &message))).await?;
            context.events.warning(&about, type_, "Decide", &message).await;
            context.metrics.certificate(Decision::Denied);
        }
    }
    Ok(Action::await_change())
}

impl Context {
    async fn write(&self, request: &CertificateSigningRequest, part: &'static str, status: Value) -> Result<(), Error> {
        let name = request.name_any();
        let patch = Patch::Merge(json!({"status": status}));
        match self.api.patch_subresource(part, &name, &PatchParams::default(), &patch).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(source) => Err(Error::Write { part, name, source }),
        }
    }
}

fn conditions(request: &CertificateSigningRequest) -> &[CertificateSigningRequestCondition] {
    request.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default()
}

fn has(request: &CertificateSigningRequest, type_: &str) -> bool {
    conditions(request).iter().any(|condition| condition.type_ == type_)
}

fn is_answered(request: &CertificateSigningRequest) -> bool {
    let signed = request.status.as_ref().is_some_and(|status| status.certificate.is_some());
    signed || has(request, "Denied") || has(request, "Failed")
}

fn with(request: &CertificateSigningRequest, condition: CertificateSigningRequestCondition) -> Value {
    let mut all = conditions(request).to_vec();
    all.push(condition);
    json!({"conditions": all})
}

fn condition(type_: &str, reason: &str, message: &str) -> CertificateSigningRequestCondition {
    let now = Time(Timestamp::now());
    CertificateSigningRequestCondition {
        last_transition_time: Some(now.clone()),
        last_update_time: Some(now),
        message: Some(message.to_owned()),
        reason: Some(reason.to_owned()),
        status: "True".to_owned(),
        type_: type_.to_owned(),
    }
}
