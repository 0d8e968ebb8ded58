//! Watches: what has changed since a version, and then what changes.

use bytes::Bytes;
use http::{Response, Uri};
use http_body_util::channel::Channel;
use serde_json::{Value, json};

use super::{FakeApi, Key, Path, State, path};

/// Events that may wait for whoever watches.
const WAITING: usize = 64;

/// A change of one object. One that was deleted is what it was last, with the version of its deletion.
#[derive(Debug)]
pub(super) struct Change {
    pub key: Key,
    pub version: u64,
    pub before: Option<Value>,
    pub after: Option<Value>,
}

impl Change {
    /// What it is to a watch of those that fit.
    fn event(&self, fits: impl Fn(&Value) -> bool) -> Option<Value> {
        let (before, after) = (self.before.as_ref().filter(|it| fits(it)), self.after.as_ref().filter(|it| fits(it)));
        let (kind, object) = match (before, after) {
            (None, None) => return None,
            (None, Some(after)) => ("ADDED", after),
            (Some(_), Some(after)) => ("MODIFIED", after),
            // It may be there as ever, and no longer fit.
            (Some(before), None) => ("DELETED", self.after.as_ref().unwrap_or(before)),
        };
        Some(json!({ "type": kind, "object": object }))
    }
}

impl State {
    /// The events since a version, one a line, and the version that they lead to.
    fn events(&self, path: &Path, selectors: &[(String, String)], since: u64) -> (Vec<String>, u64) {
        let first = self.changes.partition_point(|change| change.version <= since);
        let of_path = self.changes[first..].iter().filter(|change| path.lists(&change.key));
        let events = of_path.filter_map(|change| change.event(|object| path::fit(selectors, object)));
        (events.map(|event| format!("{event}\n")).collect(), self.version)
    }
}

impl FakeApi {
    /// The answer to a watch, which goes on until nobody reads it.
    pub(super) async fn watch(&self, uri: &Uri) -> Response<Channel<Bytes>> {
        self.wait_while_held(uri.path()).await;
        let path = Path::parse(uri.path()).unwrap();
        let query = uri.query().unwrap_or_default();
        let selectors = path::field_selectors(query);
        let since = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")?.parse().ok());
        let (mut sender, body) = Channel::<Bytes>::new(WAITING);
        let (api, mut news, mut seen) = (self.clone(), self.news.subscribe(), since.unwrap_or(0));
        tokio::spawn(async move {
            loop {
                let (events, version) = match api.lock() {
                    state if state.held.contains(super::EVERYTHING) => (Vec::new(), seen),
                    state => state.events(&path, &selectors, seen),
                };
                seen = version;
                for event in events {
                    if sender.send_data(event.into()).await.is_err() {
                        return;
                    }
                }
                if news.changed().await.is_err() {
                    return;
                }
            }
        });
        Response::builder().header("content-type", "application/json").body(body).unwrap()
    }
}
