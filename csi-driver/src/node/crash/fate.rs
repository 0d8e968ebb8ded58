//! When an agent is killed: just before or just after one of the things by which it changes the world.

use std::collections::VecDeque;
use std::fmt;
use std::io;
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
    effects: Vec<String>,
    since: usize,
    blows: VecDeque<Blow>,
    /// Those who were killed and whose end nobody has seen to.
    victims: VecDeque<&'static str>,
    look: Option<Look>,
    wrong: Vec<String>,
}

impl Fate {
    /// Counts from now on; after each effect `look` looks.
    pub(super) fn begin(&self, blows: &[Blow], look: Look) {
        *self.lock() = State { blows: blows.iter().copied().collect(), look: Some(look), ..State::default() };
    }

    /// The effects since the begin.
    pub(super) fn effects(&self) -> Vec<String> {
        self.lock().effects.clone()
    }

    /// What was seen that must not be, and after which effect.
    pub(super) fn wrong(&self) -> Vec<String> {
        self.lock().wrong.clone()
    }

    /// The next who has been killed.
    pub(super) fn victim(&self) -> Option<&'static str> {
        self.lock().victims.pop_front()
    }

    /// Returns when somebody has been killed.
    pub(super) async fn struck(&self) -> &'static str {
        loop {
            if let Some(victim) = self.victim() {
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
        self.lock().victims.push_back(victim);
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
    /// It dies when the command that it runs has ended.
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
        let due = self.begin(what).await;
        let done = act.await;
        self.end(what, due).await;
        done
    }

    /// The same where nobody can wait for ever: a dead process gets an error, and whatever it makes of that, it can do nothing more.
    pub(super) fn effect_now<T>(&self, what: &str, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let dead = || io::Error::other("this process was killed");
        if self.is_over() {
            return Err(dead());
        }
        let due = self.fate.next(format!("{}: {what}", self.node));
        if due == Some(When::Before) {
            self.kill();
            return Err(dead());
        }
        let done = act();
        self.fate.look(what);
        if due.is_some() {
            self.kill();
            return Err(dead());
        }
        done
    }

    /// Never returns if this process is no more.
    pub(super) async fn live(&self) {
        if self.is_over() {
            std::future::pending().await
        }
    }

    async fn begin(&self, what: &str) -> Option<When> {
        self.live().await;
        let due = self.fate.next(format!("{}: {what}", self.node));
        if due == Some(When::Before) {
            self.kill();
        }
        self.live().await;
        due
    }

    async fn end(&self, what: &str, due: Option<When>) {
        self.fate.look(what);
        if due.is_some() {
            self.kill();
        }
        self.live().await;
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn kill(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.fate.strike(self.node);
    }
}

/// What `zfs recv` does at the end of its input: it goes on without the agent.
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
                BY_ITSELF if self.is_over() => {}
                BY_ITSELF => {
                    if self.fate.next(format!("{}: {what}", self.node)).is_some() {
                        self.kill();
                    }
                }
                _ if changes(operation) => {
                    let due = self.begin(&what).await;
                    self.last.store(due.is_some(), Ordering::SeqCst);
                }
                _ => self.live().await,
            }
        })
    }

    fn after<'a>(&'a self, operation: &'static str, about: &'a str) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async move {
            match operation {
                BY_ITSELF => self.fate.look(operation),
                _ if changes(operation) => {
                    let due = self.last.swap(false, Ordering::SeqCst).then_some(When::After);
                    self.end(&format!("{operation} {about}"), due).await;
                }
                _ => self.live().await,
            }
        })
    }
}
