//! How fast a transfer is, and when it will be over.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Over how long the speed is averaged.
const WINDOW: Duration = Duration::from_secs(10);

/// The moving average of what comes: it is told how much has come, again and again.
pub(super) struct Speed(VecDeque<(Instant, u64)>);

impl Speed {
    /// Nothing has come yet.
    pub(super) fn new(now: Instant) -> Self {
        Self(VecDeque::from([(now, 0)]))
    }

    /// So many bytes have come since the beginning. How many came a second during the window that ends now.
    pub(super) fn at(&mut self, now: Instant, bytes: u64) -> u64 {
        self.0.push_back((now, bytes));
        // The newest that is older than the window is where it begins.
        while self.0.len() > 2 && now - self.0[1].0 >= WINDOW {
            self.0.pop_front();
        }
        let (since, before) = self.0[0];
        let nanoseconds = (now - since).as_nanos();
        let came = u128::from(bytes.saturating_sub(before));
        let rate = (came * 1_000_000_000).checked_div(nanoseconds).unwrap_or(0);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

/// In how many seconds what is left will have come; none if nothing comes.
pub(super) fn eta(left: u64, bytes_per_second: u64) -> Option<u64> {
    (bytes_per_second > 0).then(|| left.div_ceil(bytes_per_second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speed_is_that_of_the_last_seconds() {
        let began = Instant::now();
        let mut speed = Speed::new(began);
        let mut at = |seconds: u64, bytes| speed.at(began + Duration::from_secs(seconds), bytes);
        assert_eq!(at(0, 0), 0, "no time has passed");
        assert_eq!(at(2, 200), 100);
        assert_eq!(at(4, 400), 100);
        assert_eq!(at(10, 400), 40);
        assert_eq!(at(14, 400), 0, "it has stood still for as long as the window");
        assert_eq!(at(24, 1400), 100);
        assert_eq!(at(1000, 1400), 0);
    }

    #[test]
    fn a_long_transfer_is_remembered_only_in_part() {
        let began = Instant::now();
        let mut speed = Speed::new(began);
        for second in 1..100_000 {
            assert_eq!(speed.at(began + Duration::from_secs(second), second * 7), 7);
        }
        assert!(speed.0.len() < 20, "{}", speed.0.len());
    }

    #[test]
    fn what_is_left_takes_as_long_as_the_speed_says() {
        assert_eq!(eta(1000, 100), Some(10));
        assert_eq!(eta(1001, 100), Some(11));
        assert_eq!(eta(0, 100), Some(0));
        assert_eq!(eta(1000, 0), None);
    }
}
