//! How fast a target takes what comes.
//!
//! The target holds back, not the source: it is the one that writes the handoff's progress and so sees its limit change, and a source that
//! isn't read from is held back by TCP itself.

use std::time::{Duration, Instant};

use tokio::sync::watch;

/// For how long what wasn't used may be saved up.
const BURST: Duration = Duration::from_millis(100);
/// The lowest limit in bytes a second. A source gives up on a target that takes nothing for [`Limits::idle`](super::Limits::idle), and full
/// buffers of sockets are emptied in steps of hundreds of kilobytes.
const LOWEST: u64 = 64 * 1024;

/// The most bytes a second that may come; none is no limit. It may change while they come.
#[derive(Clone, Debug, Default)]
pub struct Pace(Option<watch::Receiver<Option<u64>>>);

impl Pace {
    /// What is sent to this channel is the limit from then on.
    pub fn following(limit: watch::Receiver<Option<u64>>) -> Self {
        Self(Some(limit))
    }

    fn limit(&mut self) -> Option<u64> {
        self.0.as_mut().and_then(|limit| *limit.borrow_and_update())
    }

    /// Returns when the limit may be another; never if nobody can change it.
    async fn changed(&mut self) {
        let changed = match &mut self.0 {
            Some(limit) => limit.changed().await.is_ok(),
            None => false,
        };
        if !changed {
            std::future::pending::<()>().await;
        }
    }
}

/// Holds a transfer to its [`Pace`].
pub(super) struct Brake {
    pace: Pace,
    bucket: Bucket,
}

impl Brake {
    pub(super) fn new(mut pace: Pace) -> Self {
        let bucket = Bucket::new(Instant::now(), pace.limit());
        Self { pace, bucket }
    }

    /// Accounts for bytes that have come, and waits until more may.
    pub(super) async fn took(&mut self, bytes: usize) {
        self.bucket.level -= bytes as f64;
        while let Some(pause) = self.bucket.pause(Instant::now(), self.pace.limit()) {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.pace.changed() => {}
            }
        }
    }
}

/// A token bucket that may be overdrawn.
struct Bucket {
    /// In bytes; what is below zero is to be waited for.
    level: f64,
    /// Bytes a second at which it has filled since `at`.
    limit: Option<u64>,
    at: Instant,
}

impl Bucket {
    fn new(at: Instant, limit: Option<u64>) -> Self {
        Self { level: 0.0, limit: limit.map(|limit| limit.max(LOWEST)), at }
    }

    /// How long to wait at the limit that holds from `now` on; none if more may come at once.
    fn pause(&mut self, now: Instant, limit: Option<u64>) -> Option<Duration> {
        self.level = match self.limit {
            Some(limit) => {
                let filled = self.level + limit as f64 * (now - self.at).as_secs_f64();
                filled.min(limit as f64 * BURST.as_secs_f64())
            }
            None => 0.0,
        };
        self.at = now;
        self.limit = limit.map(|limit| limit.max(LOWEST));
        match self.limit {
            Some(limit) if self.level < 0.0 => Some(Duration::from_secs_f64(-self.level / limit as f64)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEBIBYTE: u64 = 1 << 20;
    const FRAME: u64 = MEBIBYTE / 4;
    /// More than any limit here lets come.
    const ALL: u64 = 1 << 36;

    /// A transfer in made-up time.
    struct Transfer {
        bucket: Bucket,
        now: Instant,
    }

    impl Transfer {
        fn new(limit: Option<u64>) -> Self {
            let now = Instant::now();
            Self { bucket: Bucket::new(now, limit), now }
        }

        /// Takes frames until `seconds` are over or `bytes` have come: how many seconds it took, and how many bytes.
        fn run(&mut self, limit: Option<u64>, seconds: f64, bytes: u64) -> (f64, u64) {
            let (began, mut came) = (self.now, 0);
            let end = began + Duration::from_secs_f64(seconds);
            while came < bytes {
                let free = match self.bucket.pause(self.now, limit) {
                    None => self.now,
                    // A timer may come a little late.
                    Some(pause) => self.now + pause + Duration::from_millis(1),
                };
                if free > end {
                    self.now = end;
                    break;
                }
                if free == self.now {
                    self.bucket.level -= FRAME as f64;
                    came += FRAME;
                }
                self.now = free;
            }
            ((self.now - began).as_secs_f64(), came)
        }
    }

    fn is_about(found: u64, wanted: u64) -> bool {
        found.abs_diff(wanted) <= 2 * FRAME
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        assert_eq!(Transfer::new(None).run(None, 1.0, 1000 * MEBIBYTE), (0.0, 1000 * MEBIBYTE));
    }

    #[test]
    fn a_limit_is_kept_and_used() {
        for limit in [LOWEST, MEBIBYTE, 50 * MEBIBYTE] {
            let (_, came) = Transfer::new(Some(limit)).run(Some(limit), 100.0, ALL);
            assert!(is_about(came, 100 * limit), "{limit} bytes a second: {came} in 100 s");
        }
    }

    #[test]
    fn little_is_saved_up_while_nothing_comes() {
        let mut transfer = Transfer::new(Some(MEBIBYTE));
        transfer.now += Duration::from_secs(60);
        let (_, came) = transfer.run(Some(MEBIBYTE), 10.0, ALL);
        assert!(is_about(came, 10 * MEBIBYTE), "{came}");
    }

    #[test]
    fn a_limit_that_changes_counts_from_then_on() {
        let mut transfer = Transfer::new(Some(LOWEST));
        for (limit, wanted) in [(LOWEST, 16 * LOWEST), (MEBIBYTE, 16 * MEBIBYTE), (LOWEST, 16 * LOWEST)] {
            let (_, came) = transfer.run(Some(limit), 16.0, ALL);
            assert!(is_about(came, wanted), "{limit}: {came}");
        }
        // What is owed is forgiven when there is no limit any more, and isn't asked for later.
        assert_eq!(transfer.run(None, 1.0, 100 * MEBIBYTE), (0.0, 100 * MEBIBYTE));
        let (_, came) = transfer.run(Some(MEBIBYTE), 10.0, ALL);
        assert!(is_about(came, 10 * MEBIBYTE), "{came}");
    }

    #[test]
    fn the_lowest_limit_keeps_a_source_from_giving_up() {
        let (_, came) = Transfer::new(Some(1)).run(Some(1), 100.0, ALL);
        assert!(is_about(came, 100 * LOWEST), "{came}");
    }

    #[tokio::test]
    async fn who_waits_sees_the_limit_lifted() {
        let (sender, limit) = watch::channel(Some(LOWEST));
        let mut brake = Brake::new(Pace::following(limit));
        // It would be days.
        let waits = tokio::time::timeout(Duration::from_secs(60), brake.took(100 << 30));
        let lifted = async { sender.send_replace(None) };
        let (waited, _) = tokio::join!(waits, lifted);
        waited.unwrap();
    }
}
