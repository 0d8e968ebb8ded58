//! Turns: who changes the same thing does so one after the other, and others don't wait.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{Mutex as Queue, OwnedMutexGuard};

/// The queues of those who wait for their turn, by what they wait for.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<HashMap<String, Weak<Queue<()>>>>);

impl Turns {
    /// Waits for the turn to change something; it ends when what is returned is dropped.
    pub async fn take(&self, what: &str) -> OwnedMutexGuard<()> {
        self.queue(what).lock_owned().await
    }

    fn queue(&self, what: &str) -> Arc<Queue<()>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, queue| queue.strong_count() > 0);
        if let Some(queue) = all.get(what).and_then(Weak::upgrade) {
            return queue;
        }
        let queue = Arc::default();
        all.insert(what.to_owned(), Arc::downgrade(&queue));
        queue
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn one_after_the_other_and_others_at_once() {
        let turns = Turns::default();
        let first = turns.take("a").await;
        let _other = turns.take("b").await;
        let waits = turns.take("a");
        tokio::pin!(waits);
        assert!(tokio::time::timeout(Duration::from_millis(10), &mut waits).await.is_err());
        drop(first);
        let second = waits.await;
        assert_eq!(turns.0.lock().unwrap().len(), 2);
        drop(second);
        drop(turns.take("c").await);
        assert!(!turns.0.lock().unwrap().contains_key("a"), "nobody waits for it");
    }
}
