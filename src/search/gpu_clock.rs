//! How long the search kept a GPU busy, as seen from the threads that waited for it.
//!
//! Owns two counters. Knows no GPU: `torch` counts, the ledger reads.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

thread_local! {
    static SECONDS: Cell<f64> = const { Cell::new(0.0) };
}

/// Nanoseconds of the longest unit of this process.
static LONGEST: AtomicU64 = AtomicU64::new(0);

/// Adds a unit of this thread. The first ones of a model, which load kernels, are not `is_warm`.
pub fn count(time: Duration, is_warm: bool) {
    SECONDS.set(SECONDS.get() + time.as_secs_f64());
    if is_warm {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        LONGEST.fetch_max(nanos, Ordering::Relaxed);
    }
}

/// GPU time of this thread, in seconds.
pub fn thread_seconds() -> f64 {
    SECONDS.get()
}

/// The longest unit of this process.
pub fn longest() -> Duration {
    Duration::from_nanos(LONGEST.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_count_for_themselves_and_the_first_units_are_no_measure() {
        count(Duration::from_millis(900), false);
        std::thread::spawn(|| {
            assert!(thread_seconds() <= 0.0);
            count(Duration::from_millis(30), true);
            count(Duration::from_millis(20), true);
            assert!((thread_seconds() - 0.05).abs() < 1e-9);
        })
        .join()
        .expect("no panic");
        assert!((thread_seconds() - 0.9).abs() < 1e-9);
        assert_eq!(longest(), Duration::from_millis(30));
    }
}
