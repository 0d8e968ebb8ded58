//! Events: what a person sees in `kubectl describe`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};

/// The longest note that the API takes, in bytes (events.k8s.io/v1, `Event.note`).
const NOTE_LIMIT: usize = 1024;

/// How long the API server may take to hear of one: work may wait for it so long.
const PATIENCE: Duration = Duration::from_secs(5);

/// For how long the same note is counted up instead of published anew; the recorder's own memory lasts six minutes.
const REMEMBERED: Duration = Duration::from_secs(360);

/// Publishes Events about objects. A failure to publish is logged, never returned: no work depends on it.
#[derive(Clone)]
pub struct Events {
    client: kube::Client,
    reporter: Reporter,
    /// One recorder a note: a recorder takes a second Event of the same object and reason for the first one again, and would
    /// show the first one's note.
    recorders: Arc<Mutex<HashMap<String, (Instant, Recorder)>>>,
}

impl Events {
    /// Events reported by `component`; the instance is `POD_NAME`, or `NODE_NAME` outside of a pod.
    pub fn new(client: kube::Client, component: &'static str) -> Self {
        let instance = std::env::var("POD_NAME").or_else(|_| std::env::var("NODE_NAME")).ok();
        Self { client, reporter: Reporter { controller: component.to_owned(), instance }, recorders: Arc::default() }
    }

    fn recorder(&self, note: &str) -> Recorder {
        let mut recorders = self.recorders.lock().unwrap_or_else(PoisonError::into_inner);
        recorders.retain(|_, (made, _)| made.elapsed() < REMEMBERED);
        let fresh = || (Instant::now(), Recorder::new(self.client.clone(), self.reporter.clone()));
        recorders.entry(note.to_owned()).or_insert_with(fresh).1.clone()
    }

    /// Something happened as it should.
    pub async fn normal(&self, about: &ObjectReference, reason: &str, action: &str, message: &str) {
        self.publish(EventType::Normal, about, reason, action, message).await;
    }

    /// Something needs a look.
    pub async fn warning(&self, about: &ObjectReference, reason: &str, action: &str, message: &str) {
        self.publish(EventType::Warning, about, reason, action, message).await;
    }

    /// The same, without anybody waiting for it.
    pub fn warning_in_passing(
        &self,
        about: &ObjectReference,
        reason: &'static str,
        action: &'static str,
        message: &str,
    ) {
        let (events, about, message) = (self.clone(), about.clone(), message.to_owned());
        tokio::spawn(async move { events.warning(&about, reason, action, &message).await });
    }

    async fn publish(&self, type_: EventType, about: &ObjectReference, reason: &str, action: &str, message: &str) {
        let note = shortened(message);
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note.to_owned()),
            action: action.to_owned(),
            secondary: None,
        };
        let recorder = self.recorder(note);
        let published = tokio::time::timeout(PATIENCE, recorder.publish(&event, about)).await;
        if let Err(error) = published.unwrap_or_else(|late| Err(kube::Error::Service(Box::new(late)))) {
            let object = about.name.as_deref().unwrap_or_default();
            tracing::warn!(object, reason, message, %error, "an Event could not be published");
        }
    }
}

fn shortened(message: &str) -> &str {
    &message[..message.floor_char_boundary(NOTE_LIMIT)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_cut_between_characters() {
        let long = "ü".repeat(NOTE_LIMIT);
        assert_eq!(shortened(&long).len(), NOTE_LIMIT);
        assert_eq!(shortened(&format!("x{long}")).len(), NOTE_LIMIT - 1);
        assert_eq!(shortened("short"), "short");
    }
}
