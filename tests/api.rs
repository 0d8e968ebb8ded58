//! An API server in memory, as far as Portolan's processes need one: objects of any kind, compare-and-set, a status of its own, finalizers.
//!
//! After the API concepts (kubernetes.io/docs/reference/using-api/api-concepts) and the conventions for `metadata`: a write that carries a
//! `resourceVersion` or `uid` other than the object's is a conflict; what changes nothing makes no new version; `spec` and `status` are
//! written apart; an object with finalizers stays, marked as deleted, until the last of them is gone. A watch forgets nothing and so needs no bookmarks.

mod path;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{Either, channel::Channel};
use kube::client::Body;
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch::Sender;

pub use path::Path;
use watch::Change;

/// What is held back when the server is away.
const EVERYTHING: &str = "*";

/// All the objects. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct FakeApi {
    state: Arc<Mutex<State>>,
    /// Told of each change, and of what isn't held back any more.
    news: Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<Key, Value>,
    version: u64,
    uids: u64,
    /// All that has ever changed.
    changes: Vec<Change>,
    /// The kinds that nothing is answered about.
    held: BTreeSet<String>,
}

/// Group and plural, namespace, name.
type Key = (String, String, String);

/// An answer that is not the one hoped for: code, reason, message.
struct Refused(u16, &'static str, String);

type Answer = Result<Value, Refused>;

impl FakeApi {
    /// A client of this API.
    pub fn client(&self) -> Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer_or_watch(request).await) }
        });
        Client::new(service, "default")
    }

    async fn answer_or_watch(&self, request: Request<Body>) -> Response<Either<Body, Channel<Bytes>>> {
        match request.uri().query().is_some_and(|query| query.contains("watch=")) {
            true => self.watch(request.uri()).await.map(Either::Right),
            false => self.answer(request).await.map(Either::Left),
        }
    }

    /// Answers other processes by HTTP, as long as this is polled.
    ///
    /// # Errors
    /// When nothing can be heard any more.
    #[cfg(feature = "serve")]
    pub async fn serve(&self, listener: tokio::net::TcpListener) -> std::io::Result<()> {
        let api = self.clone();
        let answer = move |request: axum::extract::Request| {
            let api = api.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
                api.answer_or_watch(Request::from_parts(parts, Body::from(body))).await.map(axum::body::Body::new)
            }
        };
        axum::serve(listener, axum::Router::new().fallback(answer)).await
    }

    /// All objects of a kind, as they are now.
    pub fn all<K: Resource<DynamicType = ()> + DeserializeOwned>(&self) -> Vec<K> {
        let kind = format!("{}/{}", K::group(&()), K::plural(&()));
        let state = self.lock();
        let found = state.objects.iter().filter(|((of, _, _), _)| *of == kind);
        found.map(|(_, object)| serde_json::from_value(object.clone()).unwrap()).collect()
    }

    /// Grows with each change of any object.
    pub fn version(&self) -> u64 {
        self.lock().version
    }

    /// Makes an object in a collection (`/api/v1/namespaces/shop/pods`), its status included; returns it as it is then.
    ///
    /// # Panics
    /// When there is one of that name.
    pub fn make(&self, collection: &str, object: Value) -> Value {
        let made = self.ask(&Method::POST, collection, object.clone());
        let path = format!("{collection}/{}", made["metadata"]["name"].as_str().unwrap_or_default());
        match object.get("status") {
            Some(status) => self.ask(&Method::PATCH, &format!("{path}/status"), json!({ "status": status })),
            None => made,
        }
    }

    /// Changes an object by a merge patch.
    ///
    /// # Panics
    /// When there is none.
    pub fn edit(&self, path: &str, patch: Value) -> Value {
        self.ask(&Method::PATCH, path, patch)
    }

    /// Deletes an object.
    ///
    /// # Panics
    /// When there is none.
    pub fn remove(&self, path: &str) {
        self.ask(&Method::DELETE, path, Value::Null);
    }

    fn ask(&self, method: &Method, path: &str, body: Value) -> Value {
        let answer = self.respond(method, &path.parse().unwrap(), body);
        self.news.send_replace(());
        answer.unwrap_or_else(|Refused(code, reason, message)| panic!("{method} {path}: {code} {reason}: {message}"))
    }

    /// From now on nothing is answered about a kind (`networking.k8s.io/networkpolicies`).
    pub fn hold(&self, kind: &str) {
        self.lock().held.insert(kind.to_owned());
    }

    /// From now on nothing is answered at all. Watches that are open bring no news.
    pub fn go_away(&self) {
        self.hold(EVERYTHING);
    }

    /// All that was asked is answered.
    pub fn come_back(&self) {
        self.release(EVERYTHING);
    }

    /// What was asked about it is answered.
    pub fn release(&self, kind: &str) {
        self.lock().held.remove(kind);
        self.news.send_replace(());
    }

    /// Answers one request that is none for a watch.
    pub async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let body = body.collect_bytes().await.unwrap_or_default();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        self.wait_while_held(parts.uri.path()).await;
        let is_apply =
            parts.headers.get("content-type").is_some_and(|it| it.as_bytes().starts_with(b"application/apply"));
        let (code, value) = match self.apply_or(is_apply, &parts.method, &parts.uri, body) {
            Ok(value) => (200, value),
            Err(Refused(code, reason, message)) => {
                let status = json!({
                    "kind": "Status", "apiVersion": "v1", "status": "Failure",
                    "reason": reason, "message": message, "code": code,
                });
                (code, status)
            }
        };
        self.news.send_replace(());
        let response = Response::builder().status(code).header("content-type", "application/json");
        response.body(Body::from(value.to_string().into_bytes())).unwrap()
    }

    async fn wait_while_held(&self, path: &str) {
        let Some(Path { kind, .. }) = Path::parse(path) else { return };
        let mut news = self.news.subscribe();
        while self.lock().holds(&kind) {
            let _ = news.changed().await;
        }
    }

    /// What is applied is made if it isn't there.
    fn apply_or(&self, is_apply: bool, method: &Method, uri: &http::Uri, body: Value) -> Answer {
        let applied = if is_apply { self.without_the_rest(uri, body.clone()) } else { body.clone() };
        match self.respond(method, uri, applied) {
            Err(Refused(404, ..)) if is_apply => {
                let collection = uri.path().rsplit_once('/').map_or("", |(collection, _)| collection);
                self.respond(&Method::POST, &collection.parse().unwrap(), body)
            }
            other => other,
        }
    }

    /// Nobody else applies anything: fields of the spec that are applied no more go (Kubernetes, "Server-Side Apply").
    fn without_the_rest(&self, uri: &http::Uri, mut body: Value) -> Value {
        let state = self.lock();
        let present = Path::parse(uri.path()).and_then(|path| state.find(&path).ok().cloned()).unwrap_or_default();
        if let (Some(present), Some(wanted)) = (present["spec"].as_object(), body["spec"].as_object_mut()) {
            for field in present.keys() {
                wanted.entry(field.as_str()).or_insert(Value::Null);
            }
        }
        body
    }

    fn respond(&self, method: &Method, uri: &http::Uri, body: Value) -> Answer {
        let bad = |why: &str| Err(Refused(400, "BadRequest", format!("{method} {uri}: {why}")));
        let Some(path) = Path::parse(uri.path()) else { return bad("is no path of an object") };
        let query = uri.query().unwrap_or_default();
        let mut state = self.lock();
        match (method.as_str(), path.name.is_empty()) {
            ("GET", true) => Ok(state.list(&path, query)),
            ("GET", false) => state.find(&path).cloned(),
            ("POST", true) => state.create(&path, body),
            ("PUT", false) => state.replace(&path, body),
            ("PATCH", false) => state.patch(&path, &body),
            ("DELETE", false) => state.delete(&path, &body),
            _ => bad("can't be done"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn holds(&self, kind: &str) -> bool {
        self.held.contains(kind) || self.held.contains(EVERYTHING)
    }

    fn find(&self, path: &Path) -> Result<&Value, Refused> {
        let missing = || Refused(404, "NotFound", format!("{} {:?} not found", path.kind, path.name));
        self.objects.get(&path.key()).ok_or_else(missing)
    }

    fn list(&self, path: &Path, query: &str) -> Value {
        let selectors = path::field_selectors(query);
        let found = self.objects.iter().filter(|(key, object)| path.lists(key) && path::fit(&selectors, object));
        let items: Vec<&Value> = found.map(|(_, object)| object).collect();
        json!({
            "kind": "List", "apiVersion": "v1",
            "metadata": { "resourceVersion": self.version.to_string() }, "items": items,
        })
    }

    fn create(&mut self, path: &Path, mut object: Value) -> Answer {
        self.uids += 1;
        let generated = object.pointer("/metadata/generateName").and_then(Value::as_str);
        let name = object.pointer("/metadata/name").and_then(Value::as_str).map(str::to_owned);
        let name = name.or(generated.map(|prefix| format!("{prefix}{}", self.uids))).unwrap_or_default();
        let path = Path { name, ..path.clone() };
        if self.objects.contains_key(&path.key()) {
            return Err(Refused(409, "AlreadyExists", format!("{} {:?} already exists", path.kind, path.name)));
        }
        object["metadata"]["name"] = json!(path.name);
        if !path.namespace.is_empty() {
            object["metadata"]["namespace"] = json!(path.namespace);
        }
        object["metadata"]["uid"] = json!(format!("uid-{}", self.uids));
        object["metadata"]["generation"] = json!(1);
        object["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        if let Some(fields) = object.as_object_mut() {
            fields.remove("status");
        }
        Ok(self.store(&path, object))
    }

    fn replace(&mut self, path: &Path, new: Value) -> Answer {
        let old = self.find(path)?.clone();
        check(path, &old, &new["metadata"])?;
        let mut next = old.clone();
        if path.is_status() {
            next["status"] = new["status"].clone();
        } else {
            next = new;
            next["status"] = old["status"].clone();
            for field in ["uid", "generation", "creationTimestamp", "deletionTimestamp"] {
                next["metadata"][field] = old["metadata"][field].clone();
            }
        }
        Ok(self.change(path, &old, next))
    }

    fn patch(&mut self, path: &Path, patch: &Value) -> Answer {
        let old = self.find(path)?.clone();
        check(path, &old, &patch["metadata"])?;
        let mut next = old.clone();
        match path.is_status() {
            true => merge(&mut next["status"], &patch["status"]),
            false => {
                merge(&mut next, patch);
                next["status"] = old["status"].clone();
            }
        }
        Ok(self.change(path, &old, next))
    }

    fn delete(&mut self, path: &Path, options: &Value) -> Answer {
        let old = self.find(path)?.clone();
        check(path, &old, &options["preconditions"])?;
        let mut next = old.clone();
        if next["metadata"]["deletionTimestamp"].is_null() {
            next["metadata"]["deletionTimestamp"] = json!("2026-01-02T00:00:00Z");
        }
        Ok(self.change(path, &old, next))
    }

    /// Stores what has changed; removes what was deleted and has no finalizer.
    fn change(&mut self, path: &Path, old: &Value, mut next: Value) -> Value {
        next["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
        prune(&mut next);
        let deleted = next["metadata"].get("deletionTimestamp").is_some();
        let kept = next.pointer("/metadata/finalizers").and_then(Value::as_array).is_some_and(|all| !all.is_empty());
        if deleted && !kept {
            self.objects.remove(&path.key());
            self.version += 1;
            next["metadata"]["resourceVersion"] = json!(self.version.to_string());
            self.changes.push(Change {
                key: path.key(),
                version: self.version,
                before: Some(next.clone()),
                after: None,
            });
            return next;
        }
        if next == *old {
            return next;
        }
        if next["spec"] != old["spec"] {
            let generation = old["metadata"]["generation"].as_u64().unwrap_or_default();
            next["metadata"]["generation"] = json!(generation + 1);
        }
        self.store(path, next)
    }

    fn store(&mut self, path: &Path, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        prune(&mut object);
        let before = self.objects.insert(path.key(), object.clone());
        self.changes.push(Change { key: path.key(), version: self.version, before, after: Some(object.clone()) });
        object
    }
}

/// Whether what was read is what is there: its version and UID, as far as they are given.
fn check(path: &Path, there: &Value, read: &Value) -> Result<(), Refused> {
    for field in ["resourceVersion", "uid"] {
        let given = read.get(field).and_then(Value::as_str).filter(|given| !given.is_empty());
        if given.is_some_and(|given| there["metadata"][field] != *given) {
            let message = format!("{} {:?}: the object has been modified ({field})", path.kind, path.name);
            return Err(Refused(409, "Conflict", message));
        }
    }
    Ok(())
}

/// A merge patch (RFC 7386).
fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in fields {
        merge(&mut target[name.as_str()], value);
    }
}

/// Takes away what is null, as the server does not store it.
fn prune(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(prune);
        }
        Value::Array(items) => items.iter_mut().for_each(prune),
        _ => {}
    }
}
