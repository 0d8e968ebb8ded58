//! An API server in memory, as far as Portolan's processes need one: objects of any kind, compare-and-set, a status of its own, finalizers.
//!
//! After the API concepts (kubernetes.io/docs/reference/using-api/api-concepts) and the conventions for `metadata`: a write that carries a
//! `resourceVersion` or `uid` other than the object's is a conflict; what changes nothing makes no new version; `spec` and `status` are
//! written apart; an object with finalizers stays, marked as deleted, until the last of them is gone. There is no watch.

mod path;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{Method, Request, Response};
use kube::client::Body;
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

pub use path::Path;

/// All the objects. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct FakeApi {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<Key, Value>,
    version: u64,
    uids: u64,
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
            async move { Ok::<_, Infallible>(api.answer(request).await) }
        });
        Client::new(service, "default")
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

    /// Answers one request.
    pub async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let body = body.collect_bytes().await.unwrap_or_default();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let (code, value) = match self.respond(&parts.method, &parts.uri, body) {
            Ok(value) => (200, value),
            Err(Refused(code, reason, message)) => {
                let status = json!({
                    "kind": "Status", "apiVersion": "v1", "status": "Failure",
                    "reason": reason, "message": message, "code": code,
                });
                (code, status)
            }
        };
        let response = Response::builder().status(code).header("content-type", "application/json");
        response.body(Body::from(value.to_string().into_bytes())).unwrap()
    }

    fn respond(&self, method: &Method, uri: &http::Uri, body: Value) -> Answer {
        let bad = |why: &str| Err(Refused(400, "BadRequest", format!("{method} {uri}: {why}")));
        let Some(path) = Path::parse(uri.path()) else { return bad("is no path of an object") };
        let query = uri.query().unwrap_or_default();
        if query.contains("watch=") {
            return bad("there is no watch");
        }
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
    fn find(&self, path: &Path) -> Result<&Value, Refused> {
        let missing = || Refused(404, "NotFound", format!("{} {:?} not found", path.kind, path.name));
        self.objects.get(&path.key()).ok_or_else(missing)
    }

    fn list(&self, path: &Path, query: &str) -> Value {
        let selectors = path::field_selectors(query);
        let fits = |object: &Value| {
            selectors.iter().all(|(pointer, wanted)| object.pointer(pointer).and_then(Value::as_str) == Some(wanted))
        };
        let of = |key: &Key| key.0 == path.kind && (path.namespace.is_empty() || key.1 == path.namespace);
        let found = self.objects.iter().filter(|(key, object)| of(key) && fits(object));
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
        self.objects.insert(path.key(), object.clone());
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
