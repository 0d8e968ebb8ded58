//! Waiting for a turn. A place is given back when it is dropped, whether it was used, waited for or given up.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::queue::{Class, Queue};

/// So many may transfer at a time; the others wait in the order that [`Class`] says.
#[derive(Clone, Debug)]
pub struct Turns(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// Told of each change.
    changed: watch::Sender<()>,
}

impl Turns {
    /// For so many at a time; at least one.
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Shared { queue: Mutex::new(Queue::new(limit)), changed: watch::Sender::default() }))
    }

    /// A place at the end of the class's queue.
    pub fn enter(&self, class: Class) -> Place {
        let id = self.queue().enter(class);
        self.0.changed.send_replace(());
        Place { turns: self.clone(), id }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place among those who transfer or wait.
#[derive(Debug)]
pub struct Place {
    turns: Turns,
    id: u64,
}

impl Place {
    /// How many go before it; none if it is its turn, which it stays.
    pub fn before(&self) -> Option<usize> {
        self.turns.queue().before(self.id)
    }

    /// Returns when that is no longer `before`.
    pub async fn changed_from(&self, before: Option<usize>) {
        let mut changed = self.turns.0.changed.subscribe();
        // Subscribed before it looks, so that no change is missed.
        while self.before() == before {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Waits for its turn; tells at once and at each change how many go before it.
    pub async fn turn(&self, mut told: impl FnMut(usize)) {
        while let Some(before) = self.before() {
            told(before);
            self.changed_from(Some(before)).await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.turns.queue().leave(self.id);
        self.turns.0.changed.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_waits_is_told_and_who_gives_up_leaves_no_gap() {
        let turns = Turns::new(1);
        let first = turns.enter(Class::Background);
        first.turn(|_| unreachable!("nobody is before it")).await;
        let [second, third] = [Class::Background, Class::Background].map(|class| turns.enter(class));
        let told = Mutex::new(Vec::new());
        let waits = third.turn(|before| told.lock().unwrap().push(before));
        let others = async {
            tokio::task::yield_now().await;
            drop(second);
            tokio::task::yield_now().await;
            assert_eq!(third.before(), Some(0));
            drop(first);
        };
        tokio::join!(waits, others);
        assert_eq!(*told.lock().unwrap(), [1, 0]);
        assert_eq!(third.before(), None);
    }
}
