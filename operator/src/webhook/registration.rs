//! The webhook's registration: the API server must trust the authority.

use futures::StreamExt;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use kube::api::{Patch, PatchParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use serde_json::{Value, json};

/// Keeps the authority's certificate in the MutatingWebhookConfiguration `name`; tells `registered` whether it is there.
pub async fn keep_registered(client: Client, name: &str, certificate: &str, registered: impl Fn(bool)) {
    let api = Api::<MutatingWebhookConfiguration>::all(client);
    // Watched under its name: the permission to do so names it too.
    let mut states = std::pin::pin!(watcher::watch_object(api.clone(), name).default_backoff());
    while let Some(state) = states.next().await {
        let configuration = match state {
            Ok(Some(configuration)) => configuration,
            Ok(None) => {
                tracing::warn!(
                    name,
                    "the MutatingWebhookConfiguration is missing: pods get no Portolan DNS and no preferred node until it is back"
                );
                registered(false);
                continue;
            }
            Err(error) => {
                tracing::warn!(name, %error, "the MutatingWebhookConfiguration can't be watched");
                continue;
            }
        };
        let operations = corrections(&configuration, certificate);
        let result = match operations.is_empty() {
            true => Ok(()),
            false => patch(&api, name, operations).await,
        };
        registered(result.is_ok());
        if let Err(error) = result {
            // The change that got in between wakes this loop again.
            tracing::warn!(name, %error, "the authority could not be put into the MutatingWebhookConfiguration");
        }
    }
}

async fn patch(api: &Api<MutatingWebhookConfiguration>, name: &str, operations: Vec<Value>) -> Result<(), kube::Error> {
    let patch = serde_json::from_value(Value::Array(operations)).map_err(kube::Error::SerdeError)?;
    api.patch(name, &PatchParams::default(), &Patch::<()>::Json(patch)).await?;
    tracing::info!(name, "put the authority into the MutatingWebhookConfiguration");
    Ok(())
}

/// JSON Patch operations (RFC 6902) that put `certificate` where it isn't.
fn corrections(configuration: &MutatingWebhookConfiguration, certificate: &str) -> Vec<Value> {
    let mut operations = Vec::new();
    for (index, webhook) in configuration.webhooks.iter().flatten().enumerate() {
        let present = webhook.client_config.ca_bundle.as_ref().map(|bundle| bundle.0.as_slice());
        if present != Some(certificate.as_bytes()) {
            let bundle = k8s_openapi::ByteString(certificate.as_bytes().to_vec());
            // Fails rather than changes another webhook if the list has changed meanwhile.
            operations.push(json!({"op": "test", "path": format!("/webhooks/{index}/name"), "value": webhook.name}));
            let path = format!("/webhooks/{index}/clientConfig/caBundle");
            operations.push(json!({"op": "add", "path": path, "value": bundle}));
        }
    }
    operations
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_corrected() {
        let configuration = json!({"webhooks": [
            {"name": "a", "admissionReviewVersions": ["v1"], "sideEffects": "None", "clientConfig": {"caBundle": "Q0E="}},
            {"name": "b", "admissionReviewVersions": ["v1"], "sideEffects": "None", "clientConfig": {}},
        ]});
        let configuration = serde_json::from_value(configuration).unwrap();
        assert_eq!(
            corrections(&configuration, "CA"),
            [
                json!({"op": "test", "path": "/webhooks/1/name", "value": "b"}),
                json!({"op": "add", "path": "/webhooks/1/clientConfig/caBundle", "value": "Q0E="}),
            ]
        );
    }
}
