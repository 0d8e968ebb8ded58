//! When a pool counts as low on space, and which changes of its free space are worth a write.

/// A pool with less than this share of its room free, in percent, is low on space: ZFS gets slow, and a moving volume may not fit.
pub const LOW_PERCENT: i64 = 10;
/// A smaller change than this share of what was written last, in percent, is not written.
const NOTICEABLE_PERCENT: i64 = 1;

/// Whether so few of `capacity` bytes are available that somebody should make room.
pub fn is_low(available: i64, capacity: i64) -> bool {
    available < capacity / 100 * LOW_PERCENT
}

/// Whether a change from `was` to `now` bytes available of `capacity` is worth a write.
pub fn is_noticeable(was: i64, now: i64, capacity: i64) -> bool {
    let crosses = is_low(was, capacity) != is_low(now, capacity) || (was == 0) != (now == 0);
    crosses || was.abs_diff(now) > was.unsigned_abs() / 100 * NOTICEABLE_PERCENT.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_changes_count_only_where_they_matter() {
        let gib = 1 << 30;
        assert!(is_low(9 * gib, 100 * gib) && !is_low(11 * gib, 100 * gib));
        for (was, now, wanted) in [
            (50_000, 50_400, false),
            (50_000, 50_501, true),
            (50_000, 49_400, true),
            (10_010, 9_990, true),
            (0, 1, true),
            (1, 0, true),
            (50_000, 50_000, false),
        ] {
            assert_eq!(is_noticeable(was, now, 100_000), wanted, "{was} {now}");
        }
    }
}
