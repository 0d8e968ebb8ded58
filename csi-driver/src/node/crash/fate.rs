//! When an agent is killed: just before or just after one of the things by which it changes the world.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use portolan_zfs::memory::Witness;
use tokio::sync::Notify;

/// On which side of an effect the agent dies.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum When {
    /// It has not happened.
    Before,
    /// It has, and nobody was told.
    After,
}

/// One kill: at so many effects (1 is the next) since the begin or since the last one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blow {
    pub(super) effect: usize,
    pub(super) when: When,
}

/// Looks at the world, and says what must not be.
type Look = Box<dyn Fn() -> Vec<String> + Send>;

/// What all agents share: the effects so far, and what is still to come.
#[derive(Default)]
pub(super) struct Fate {
    state: Mutex<State>,
    struck: Notify,
}

#[derive(Default)]
struct State {
    begun: bool,
    effects: Vec<String>,
    since: usize,
    blows: VecDeque<Blow>,
    victim: Option<&'static str>,
    look: Option<Look>,
    wrong: Vec<String>,
}

impl Fate {
    /// Counts from now on; after each effect `look` looks.
    pub(super) fn begin(&self, blows: &[Blow], look: Look) {
        *self.lock() = State { begun: true, blows: blows.iter().copied().collect(), look: Some(look), ..State::default() };
    }

    /// The effects since the begin.
    pub(super) fn effects(&self) -> Vec<String> {
        self.lock().effects.clone()
    }

    /// What was seen that must not be, and after which effect.
    pub(super) fn wrong(&self) -> Vec<String> {
        self.lock().wrong.clone()
    }

    /// Returns when an agent has been killed.
    pub(super) async fn struck(&self) -> &'static str {
        loop {
            if let Some(victim) = self.lock().victim.take() {
                return victim;
            }
            self.struck.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Counts an effect; says whether it is one at which to die.
    fn next(&self, effect: String) -> Option<When> {
        let mut state = self.lock();
        if !state.begun {
            return None;
        }
        state.effects.push(effect);
        state.since += 1;
        let due = state.blows.front().filter(|blow| blow.effect == state.since).map(|blow| blow.when);
        if due.is_some() {
            state.blows.pop_front();
            state.since = 0;
        }
        due
    }

    fn strike(&self, victim: &'static str) {
        self.lock().victim = Some(victim);
        self.struck.notify_one();
    }

    fn look(&self, effect: &str) {
        let mut state = self.lock();
        let seen = state.look.as_ref().map(|look| look()).unwrap_or_default();
        state.wrong.extend(seen.into_iter().map(|wrong| format!("after {effect}: {wrong}")));
    }
}

/// One process of a node's agent, from its start to its end.
pub(super) struct Life {
    node: &'static str,
    fate: Arc<Fate>,
    over: AtomicBool,
    /// It dies when what it is doing is done.
    last: AtomicBool,
}

impl fmt::Debug for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.node)
    }
}

impl Life {
    pub(super) fn new(node: &'static str, fate: Arc<Fate>) -> Arc<Self> {
        Arc::new(Self { node, fate, over: AtomicBool::new(false), last: AtomicBool::new(false) })
    }

    /// Does something by which the world is another, unless the agent dies before.
    pub(super) async fn effect<T>(&self, what: &str, act: impl Future<Output = T>) -> T {
        self.begin(what).await;
        let done = act.await;
        self.end(what).await;
        done
    }

    async fn begin(&self, what: &str) {
        self.live().await;
        match self.fate.next(format!("{}: {what}", self.node)) {
            Some(When::Before) => self.die().await,
            Some(When::After) => self.last.store(true, Ordering::SeqCst),
            None => {}
        }
    }

    async fn end(&self, what: &str) {
        self.fate.look(what);
        if self.last.swap(false, Ordering::SeqCst) {
            self.die().await;
        }
    }

    /// Never goes on if this process is no more.
    async fn live(&self) {
        if self.over.load(Ordering::SeqCst) {
            std::future::pending().await
        }
    }

    async fn die(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.fate.strike(self.node);
        self.live().await;
    }
}

/// What `zfs recv` does at the end of its input goes on without the agent.
const BY_ITSELF: &str = "receive_end";

fn changes(operation: &str) -> bool {
    let starts = ["create", "clone", "set_", "destroy", "hold", "release", "mount", "unmount", "rename", "receive"];
    // What is sent changes nothing, but a source that dies there leaves its target with a part.
    matches!(operation, "snapshot" | "snapshot_all" | "send") || starts.iter().any(|start| operation.starts_with(start))
}

impl Witness for Life {
    fn before<'a>(&'a self, operation: &'static str, about: &'a str) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async move {
            let what = format!("{operation} {about}");
            match operation {
                BY_ITSELF if self.over.load(Ordering::SeqCst) => {}
                BY_ITSELF => {
                    if self.fate.next(format!("{}: {what}", self.node)).is_some() {
                        self.over.store(true, Ordering::SeqCst);
                        self.fate.strike(self.node);
                    }
                }
                _ if changes(operation) => self.begin(&what).await,
                _ => self.live().await,
            }
        })
    }

    fn after<'a>(&'a self, operation: &'static str, about: &'a str) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async move {
            match operation {
                BY_ITSELF => self.fate.look(operation),
                _ if changes(operation) => self.end(&format!("{operation} {about}")).await,
                _ => self.live().await,
            }
        })
    }
}
