//! What one pod may take of a server, so that the others are unharmed by whatever it does.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Queries a second that a pod may send, and how many at once.
const RATE: f64 = 20_000.0;
/// Pods whose rates are known at once: more than a node has.
const SOURCES: usize = 4096;

/// A token bucket for each source.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    buckets: Mutex<HashMap<IpAddr, Bucket>>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn full(at: Instant) -> Self {
        Self { tokens: RATE, at }
    }

    fn filled(self, now: Instant) -> Self {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        Self { tokens: (self.tokens + since * RATE).min(RATE), at: now }
    }
}

impl Rates {
    /// Whether a query from `source` is within its rate.
    pub(crate) fn admit(&self, source: IpAddr, now: Instant) -> bool {
        let mut buckets = lock(&self.buckets);
        if !buckets.contains_key(&source) && buckets.len() >= SOURCES {
            // A full bucket says no more than none.
            buckets.retain(|_, bucket| bucket.filled(now).tokens < RATE);
            if buckets.len() >= SOURCES {
                return false;
            }
        }
        let bucket = buckets.entry(source).or_insert_with(|| Bucket::full(now));
        *bucket = bucket.filled(now);
        let admitted = bucket.tokens >= 1.0;
        if admitted {
            bucket.tokens -= 1.0;
        }
        admitted
    }
}

/// Places of which there are `total`, and at most `each` for one source.
#[derive(Debug)]
pub(crate) struct Places {
    total: usize,
    each: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by: HashMap<IpAddr, usize>,
}

/// A place that is given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    source: IpAddr,
}

impl Places {
    pub(crate) fn new(total: usize, each: usize) -> Arc<Self> {
        Arc::new(Self { total, each, taken: Mutex::default() })
    }

    /// A place for `source`; none if it has its share, or all are taken.
    pub(crate) fn take(self: &Arc<Self>, source: IpAddr) -> Option<Place> {
        let mut taken = lock(&self.taken);
        let own = taken.by.get(&source).copied().unwrap_or_default();
        if taken.all >= self.total || own >= self.each {
            return None;
        }
        taken.all += 1;
        taken.by.insert(source, own + 1);
        Some(Place { places: Arc::clone(self), source })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = lock(&self.places.taken);
        taken.all = taken.all.saturating_sub(1);
        match taken.by.get_mut(&self.source) {
            Some(own) if *own > 1 => *own -= 1,
            _ => drop(taken.by.remove(&self.source)),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks panics between two changes that belong together.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn source(number: u32) -> IpAddr {
        IpAddr::V4(number.into())
    }

    #[test]
    fn a_flood_ends_at_the_rate_and_harms_nobody_else() {
        let (rates, start) = (Rates::default(), Instant::now());
        let admitted = (0..100_000).filter(|_| rates.admit(source(1), start)).count();
        assert_eq!(admitted, 20_000);
        assert!(rates.admit(source(2), start));
        let later = start + Duration::from_millis(100);
        assert_eq!((0..100_000).filter(|_| rates.admit(source(1), later)).count(), 2_000);
    }

    #[test]
    fn sources_without_end_take_no_memory_without_end() {
        let (rates, start) = (Rates::default(), Instant::now());
        assert_eq!((0..10_000).filter(|number| rates.admit(source(*number), start)).count(), SOURCES);
        assert!(rates.admit(source(20_000), start + Duration::from_secs(1)), "those that are silent make room");
        assert_eq!(lock(&rates.buckets).len(), 1);
    }

    #[test]
    fn places_are_shared_and_given_back() {
        let places = Places::new(3, 2);
        let mut own = vec![places.take(source(1)).unwrap(), places.take(source(1)).unwrap()];
        assert!(places.take(source(1)).is_none(), "its share");
        let other = places.take(source(2)).unwrap();
        assert!(places.take(source(3)).is_none(), "all are taken");
        drop(other);
        own.pop();
        assert!(places.take(source(1)).is_some());
        drop(own);
        let taken = lock(&places.taken);
        assert!(taken.all == 0 && taken.by.is_empty(), "{taken:?}");
    }
}
