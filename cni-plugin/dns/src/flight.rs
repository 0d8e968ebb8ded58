//! Questions that are being asked: whoever has one of them too waits for its answer instead of asking again.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OnceCell;

use crate::sent::Sent;

/// What there is to tell; none when all servers have failed and nothing older can stand in.
type Told = Option<Vec<u8>>;

/// The questions under way by their keys: no more than there are askers.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    under_way: Mutex<HashMap<Vec<u8>, Flight>>,
}

#[derive(Debug, Default)]
struct Flight {
    told: Arc<OnceCell<Told>>,
    /// What the first asker has sent, for whoever comes to wait for the answer.
    sent: Option<Sent>,
    aboard: usize,
}

/// One asker's part in a flight, given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    flights: Arc<Flights>,
    pub(crate) key: Vec<u8>,
    told: Arc<OnceCell<Told>>,
}

impl Flights {
    /// A seat in the flight of this key; who is the first aboard may `send` the question.
    pub(crate) fn board(self: &Arc<Self>, key: Vec<u8>, send: impl FnOnce() -> Option<Sent>) -> Seat {
        let mut under_way = self.lock();
        let flight = under_way.entry(key.clone()).or_default();
        if flight.aboard == 0 {
            flight.sent = send();
        }
        flight.aboard += 1;
        Seat { flights: Arc::clone(self), key, told: Arc::clone(&flight.told) }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Flight>> {
        // Nothing under this lock panics between two changes that belong together.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// What `ask` comes to, or what another asker's `ask` comes to if that is under way; and whether it was this one's.
    /// It gets what has been sent already.
    ///
    /// A failure is shared as an answer is. If the asker whose `ask` runs is dropped, one of the others runs its own.
    pub(crate) async fn told<F: Future<Output = Told>>(&self, ask: impl FnOnce(Option<Sent>) -> F) -> (Told, bool) {
        let mut is_own = false;
        let told = self.told.get_or_init(|| {
            is_own = true;
            ask(self.sent())
        });
        let told = told.await.clone();
        (told, is_own)
    }

    fn sent(&self) -> Option<Sent> {
        self.flight(&mut self.flights.lock())?.sent.take()
    }

    /// This seat's flight, if it has not landed.
    fn flight<'f>(&self, under_way: &'f mut HashMap<Vec<u8>, Flight>) -> Option<&'f mut Flight> {
        under_way.get_mut(&self.key).filter(|flight| Arc::ptr_eq(&flight.told, &self.told))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut under_way = self.flights.lock();
        let Some(flight) = self.flight(&mut under_way) else { return };
        flight.aboard = flight.aboard.saturating_sub(1);
        // Who comes after the answer has a right to a later one.
        if flight.aboard == 0 || self.told.initialized() {
            under_way.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::sync::Notify;
    use tokio::task::yield_now;
    use tokio::time::timeout;

    use super::*;

    fn board(flights: &Arc<Flights>) -> Seat {
        flights.board(b"key".to_vec(), || None)
    }

    /// Lets all other tasks run until they wait.
    async fn settle() {
        for _ in 0..100 {
            yield_now().await;
        }
    }

    #[tokio::test]
    async fn one_asks_for_all_and_a_failure_is_everybodys() {
        for outcome in [Some(b"answer".to_vec()), None] {
            let (flights, asked, landing) = (Arc::new(Flights::default()), Arc::default(), Arc::new(Notify::new()));
            let ask = || {
                let (flights, asked, landing) = (Arc::clone(&flights), Arc::clone(&asked), Arc::clone(&landing));
                let outcome = outcome.clone();
                tokio::spawn(async move {
                    let ask = async {
                        AtomicUsize::fetch_add(&asked, 1, Ordering::Relaxed);
                        landing.notified().await;
                        outcome
                    };
                    board(&flights).told(|_| ask).await
                })
            };
            let askers: Vec<_> = (0..20).map(|_| ask()).collect();
            settle().await;
            landing.notify_one();
            let mut own = 0;
            for asker in askers {
                let (told, is_own) = timeout(Duration::from_secs(5), asker).await.expect("nobody hangs").unwrap();
                assert_eq!(told, outcome);
                own += usize::from(is_own);
            }
            assert_eq!((own, asked.load(Ordering::Relaxed)), (1, 1));
            assert!(flights.lock().is_empty());
        }
    }

    #[tokio::test]
    async fn when_the_asking_one_is_dropped_another_asks() {
        let flights = Arc::new(Flights::default());
        let join = |ask: Option<&'static [u8]>| {
            let flights = Arc::clone(&flights);
            tokio::spawn(async move {
                let ask = async {
                    match ask {
                        Some(answer) => Some(answer.to_vec()),
                        None => pending().await,
                    }
                };
                board(&flights).told(|_| ask).await
            })
        };
        let first = join(None);
        settle().await;
        let (second, third) = (join(Some(b"answer")), join(Some(b"answer")));
        settle().await;
        first.abort();
        let both = async { (second.await.unwrap(), third.await.unwrap()) };
        let (second, third) = timeout(Duration::from_secs(5), both).await.expect("nobody hangs");
        assert_eq!((second.0.as_deref(), third.0.as_deref()), (Some(&b"answer"[..]), Some(&b"answer"[..])));
        assert!(second.1 != third.1, "one of them asked");
        // Those that all go away before an answer leave nothing, either.
        let leaving: Vec<_> = (0..3).map(|_| join(None)).collect();
        settle().await;
        assert_eq!(flights.lock().len(), 1);
        for asker in leaving {
            asker.abort();
            assert!(asker.await.is_err());
        }
        assert!(flights.lock().is_empty());
    }

    #[tokio::test]
    async fn who_comes_after_the_answer_asks_anew() {
        let flights = Arc::new(Flights::default());
        let seat = board(&flights);
        let late = board(&flights);
        assert!(late.told.set(None).is_ok());
        drop(seat);
        let (told, is_own) = board(&flights).told(|_| async { Some(b"new".to_vec()) }).await;
        assert_eq!((told.as_deref(), is_own), (Some(&b"new"[..]), true));
        drop(late);
        assert!(flights.lock().is_empty());
    }
}
