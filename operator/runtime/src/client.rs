//! A client of the API server that waits for no answer without a limit: one that takes connections and never answers is as good as away.

use std::io;
use std::time::Duration;

use http::{Request, Response};
use kube::Client;
use kube::client::Body;
use tokio_util::sync::CancellationToken;

/// How long an answer may take: the API server itself ends a request after as long (kube-apiserver, `--request-timeout`).
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take where pods that start or end wait for it.
const NODES_PATIENCE: Duration = Duration::from_secs(15);
/// How long after it was asked to end a process still waits for answers.
const AT_THE_END: Duration = Duration::from_secs(2);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The same client, whose requests fail if they aren't answered wholly within a minute. Whether such a request was carried out isn't known. Of a watch,
/// whose answer has no end, that goes for its beginning.
pub fn patient(client: Client) -> Client {
    within(client, PATIENCE, CancellationToken::new())
}

/// The same with 15 seconds, for a process that pods wait for, and that ends soon after `shutdown`: two seconds later nothing is waited for any more.
pub fn patient_until(client: Client, shutdown: CancellationToken) -> Client {
    let enough = CancellationToken::new();
    let later = enough.clone();
    tokio::spawn(async move {
        shutdown.cancelled().await;
        tokio::time::sleep(AT_THE_END).await;
        later.cancel();
    });
    within(client, NODES_PATIENCE, enough)
}

/// The same client, whose requests fail after `patience`, and once `enough` is cancelled.
pub fn within(client: Client, patience: Duration, enough: CancellationToken) -> Client {
    let namespace = client.default_namespace().to_owned();
    let service = tower::service_fn(move |request: Request<Body>| {
        let (client, enough) = (client.clone(), enough.clone());
        async move {
            tokio::select! {
                answer = tokio::time::timeout(patience, answer(&client, request)) => {
                    answer.unwrap_or_else(|_| Err(too_late(format!("no answer within {patience:?}"))))
                }
                () = enough.cancelled() => Err(too_late("no answer before this process ends".to_owned())),
            }
        }
    });
    Client::new(service, namespace)
}

fn too_late(message: String) -> BoxError {
    io::Error::new(io::ErrorKind::TimedOut, message).into()
}

async fn answer(client: &Client, request: Request<Body>) -> Result<Response<Body>, BoxError> {
    let is_watch = request.uri().query().is_some_and(|query| query.split('&').any(|it| it.starts_with("watch=")));
    let response = client.send(request).await?;
    if is_watch {
        return Ok(response);
    }
    let (parts, body) = response.into_parts();
    Ok(Response::from_parts(parts, Body::from(body.collect_bytes().await?)))
}
