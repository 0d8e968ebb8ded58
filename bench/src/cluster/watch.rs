//! When something happened, as the API server tells it: both ends of a time are events, so no program's start is in it.

use std::{
    io::{BufRead, BufReader},
    process::{Child, ChildStdout},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use portolan_e2e::lab::Lab;
use serde_json::Value;

/// One event, and when it got here.
#[derive(Debug)]
pub struct Event {
    /// When it got here.
    pub at: Instant,
    /// `ADDED`, `MODIFIED`, `DELETED`, `BOOKMARK`.
    pub kind: String,
    /// The object as it was then.
    pub object: Value,
}

impl Event {
    /// Whether it is about the object of this name.
    pub fn of(&self, name: &str) -> bool {
        self.object["metadata"]["name"] == name
    }

    /// Whether the object is about to go, or has gone.
    pub fn ends(&self) -> bool {
        self.kind == "DELETED" || self.object["metadata"]["deletionTimestamp"].is_string()
    }

    /// Whether the object is a pod that is Ready and doesn't end.
    pub fn is_ready(&self) -> bool {
        let conditions = self.object["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
        !self.ends() && conditions.iter().any(|it| it["type"] == "Ready" && it["status"] == "True")
    }

    /// Whether the object's `status.phase` is this one.
    pub fn in_phase(&self, phase: &str) -> bool {
        self.object["status"]["phase"] == phase
    }
}

#[derive(Default)]
struct Log {
    events: Vec<Event>,
    stream: Option<Child>,
    /// Nobody wants to know any more, or nothing can be known any more.
    ended: bool,
}

impl Log {
    fn end(&mut self) {
        self.ended = true;
        if let Some(stream) = &mut self.stream {
            let _ = stream.kill();
        }
    }
}

#[derive(Default)]
struct Shared {
    log: Mutex<Log>,
    grown: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All events of one kind of objects since it was made.
pub struct Watch {
    path: String,
    shared: Arc<Shared>,
}

impl Watch {
    /// Watches the objects at an API path (`/api/v1/persistentvolumes`); returns when the watch has begun.
    ///
    /// # Errors
    /// When the API server does not stream.
    pub fn start(lab: &Lab, path: &str) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let watch = Self { path: path.into(), shared: shared.clone() };
        let (lab, path) = (lab.clone(), path.to_owned());
        std::thread::spawn(move || follow(&lab, &path, &shared));
        // What marks the end of the objects that were there before.
        watch.first("the watch has begun", 30, |event| event.kind == "BOOKMARK")?;
        Ok(watch)
    }

    /// Waits until there has been such an event, and gives the first one to `take`.
    ///
    /// # Errors
    /// When there is none in so many seconds.
    pub fn find<T>(
        &self,
        what: &str,
        seconds: u64,
        is: impl Fn(&Event) -> bool,
        take: impl Fn(&Event) -> T,
    ) -> Result<T> {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        let mut seen = 0;
        let mut log = self.shared.lock();
        loop {
            if let Some(event) = log.events[seen..].iter().find(|event| is(event)) {
                return Ok(take(event));
            }
            seen = log.events.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || log.ended {
                bail!("{}: no event in {seconds} s ({seen} others; ended: {}): {what}", self.path, log.ended);
            }
            log = self.shared.grown.wait_timeout(log, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// When the first such event got here; waits for it.
    ///
    /// # Errors
    /// As [`Watch::find`].
    pub fn first(&self, what: &str, seconds: u64, is: impl Fn(&Event) -> bool) -> Result<Instant> {
        self.find(what, seconds, is, |event| event.at)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.lock().end();
    }
}

/// Reads until nobody wants to know. The API server may end a stream at any time: it goes on after the last event.
fn follow(lab: &Lab, path: &str, shared: &Shared) {
    let mut since = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan".to_owned();
    while let Ok(lines) = open(lab, path, &since, shared) {
        for line in BufReader::new(lines).lines().map_while(Result::ok) {
            let Some(event) = parse(&line) else { continue };
            // The events after the last one are no longer known.
            if event.kind == "ERROR" {
                shared.lock().end();
                break;
            }
            if let Some(version) = event.object["metadata"]["resourceVersion"].as_str() {
                since = format!("resourceVersion={version}");
            }
            shared.lock().events.push(event);
            shared.grown.notify_all();
        }
        let stream = shared.lock().stream.take();
        let _ = stream.map(|mut stream| stream.wait());
        if shared.lock().ended {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    shared.lock().end();
    shared.grown.notify_all();
}

fn open(lab: &Lab, path: &str, since: &str, shared: &Shared) -> Result<ChildStdout> {
    let request = format!("{path}?watch=1&timeoutSeconds=7200&allowWatchBookmarks=true&{since}");
    let mut stream = lab.start(&["run", "kubectl", "get", "--raw", &request])?;
    let lines = stream.stdout.take().context("its standard output is a pipe")?;
    let mut log = shared.lock();
    log.stream = Some(stream);
    if log.ended {
        log.end();
    }
    Ok(lines)
}

fn parse(line: &str) -> Option<Event> {
    let at = Instant::now();
    let Ok(Value::Object(mut event)) = serde_json::from_str(line) else { return None };
    let kind = event.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    Some(Event { at, kind, object: event.remove("object").unwrap_or_default() })
}
