//! How long the API server is waited for.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::{AsyncBufReadExt, TryStreamExt};
use http::{Request, Response};
use http_body_util::channel::{Channel, Sender};
use kube::client::Body;
use portolan_runtime::{
    client::{patient_until, within},
    leader::{self, LeaderError},
};
use portolan_tests::api::FakeApi;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long an answer may take here.
const PATIENCE: Duration = Duration::from_millis(300);

/// An API server that begins each answer and leaves the rest to whoever has the senders.
fn beginning(senders: &Arc<Mutex<Vec<Sender<Bytes>>>>) -> kube::Client {
    let senders = Arc::clone(senders);
    let service = tower::service_fn(move |_: Request<Body>| {
        let senders = Arc::clone(&senders);
        async move {
            let (mut sender, body) = Channel::<Bytes>::new(8);
            sender.send_data("{".into()).await.unwrap();
            senders.lock().unwrap().push(sender);
            Ok::<_, Infallible>(Response::new(body))
        }
    });
    kube::Client::new(service, "default")
}

/// One that says nothing at all.
fn silent() -> kube::Client {
    let service = tower::service_fn(|_: Request<Body>| std::future::pending::<Result<Response<Body>, Infallible>>());
    kube::Client::new(service, "default")
}

fn request(query: &str) -> Request<Vec<u8>> {
    Request::get(format!("/api/v1/pods{query}")).body(Vec::new()).unwrap()
}

fn impatient(client: kube::Client) -> kube::Client {
    within(client, PATIENCE, CancellationToken::new())
}

#[tokio::test]
async fn an_answer_that_never_comes_or_never_ends_is_a_failure() {
    for client in [silent(), beginning(&Arc::default())] {
        let error = impatient(client).request_text(request("")).await.unwrap_err().to_string();
        assert!(error.contains("no answer within 300ms"), "{error}");
    }
}

#[tokio::test]
async fn a_watch_goes_on_and_its_beginning_is_waited_for_no_longer() {
    let senders = Arc::default();
    let client = impatient(beginning(&senders));
    let mut lines = client.request_stream(request("?watch=true&resourceVersion=0")).await.unwrap().lines();
    tokio::time::sleep(4 * PATIENCE).await;
    let mut sender = senders.lock().unwrap().pop().unwrap();
    sender.send_data("}\n".into()).await.unwrap();
    assert_eq!(lines.try_next().await.unwrap(), Some("{}".to_owned()));
    assert!(impatient(silent()).request_stream(request("?watch=true")).await.is_err());
}

#[tokio::test]
async fn who_is_to_end_waits_no_longer() {
    let shutdown = CancellationToken::new();
    let client = patient_until(silent(), shutdown.clone());
    shutdown.cancel();
    // The first one is waited for a little.
    for _ in 0..2 {
        let error = client.request_text(request("")).await.unwrap_err().to_string();
        assert!(error.contains("before this process ends"), "{error}");
    }
}

/// Whoever leads stops once nobody says any more that he does: by then another one may.
#[tokio::test]
async fn a_leader_that_hears_nothing_of_its_lease_leads_no_longer() {
    let (api, shutdown) = (FakeApi::default(), CancellationToken::new());
    let (client, silence) = (api.client(), api.clone());
    let led = leader::run(client, "portolan-system", "test", "one", shutdown, |leading| async move {
        silence.go_away();
        leading.cancelled().await;
    });
    let ended = timeout(Duration::from_secs(60), led).await.expect("it leads for ever");
    assert!(matches!(ended, Err(LeaderError::Lost { .. })), "{ended:?}");
}
