//! One operation per volume at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// A lock per volume, made when it is first asked for.
#[derive(Debug, Default)]
pub struct Locks(Mutex<HashMap<String, Arc<AsyncMutex<()>>>>);

impl Locks {
    /// Waits for the volume.
    pub async fn lock(&self, volume: &str) -> OwnedMutexGuard<()> {
        self.of(volume).lock_owned().await
    }

    /// Takes the volume if nobody has it.
    pub fn try_lock(&self, volume: &str) -> Option<OwnedMutexGuard<()>> {
        self.of(volume).try_lock_owned().ok()
    }

    fn of(&self, volume: &str) -> Arc<AsyncMutex<()>> {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody holds or waits for a lock that only the map has.
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        locks.entry(volume.to_owned()).or_default().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_at_a_time() {
        let locks = Locks::default();
        let held = locks.lock("a").await;
        assert!(locks.try_lock("a").is_none());
        assert!(locks.try_lock("b").is_some());
        drop(held);
        assert!(locks.try_lock("a").is_some());
    }
}
