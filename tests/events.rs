//! Events as the API server gets them.

use std::sync::{Arc, Mutex};

use http::{Method, Request, Response};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::client::Body;
use portolan_runtime::events::Events;
use serde_json::Value;

/// What was sent: method, note.
type Sent = Arc<Mutex<Vec<(Method, Option<String>)>>>;

/// A client whose API server takes every Event as it comes.
fn client(sent: Sent) -> kube::Client {
    let service = tower::service_fn(move |request: Request<Body>| {
        let sent = sent.clone();
        async move {
            let method = request.method().clone();
            let bytes = request.into_body().collect_bytes().await?;
            let event: Value = serde_json::from_slice(&bytes).expect("an Event");
            sent.lock().unwrap().push((method, event["note"].as_str().map(str::to_owned)));
            Ok::<_, kube::Error>(Response::new(Body::from(bytes.to_vec())))
        }
    });
    kube::Client::new(service, "default")
}

#[tokio::test]
async fn another_note_is_another_event_and_the_same_note_is_counted() {
    let sent = Sent::default();
    let events = Events::new(client(sent.clone()), "test");
    let claim =
        ObjectReference { name: Some("typo".into()), namespace: Some("n".into()), ..ObjectReference::default() };
    for note in ["compresion is unknown", "compresion is unknown", "recordsize 3 is no power of two"] {
        events.warning(&claim, "ProvisioningFailed", "Provision", note).await;
    }
    let sent = sent.lock().unwrap();
    let made: Vec<_> =
        sent.iter().filter(|(method, _)| method == Method::POST).filter_map(|(_, note)| note.as_deref()).collect();
    assert_eq!(made, ["compresion is unknown", "recordsize 3 is no power of two"]);
    assert_eq!(sent.len(), 3);
}
