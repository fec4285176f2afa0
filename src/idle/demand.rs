//! Who takes batches from the streams, and when they last did.
//!
//! Owns one board that the streams write and the decision reads. Knows nothing of sessions: a
//! consumer is a process id, or an unknown process (of another host).
//!
//! *Invariant*: writing costs a lock that is never held for more than a look-up, once per batch.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::limits::SESSIONS_MAX;

/// A consumer is active for so long after a batch.
pub const ACTIVE: Duration = Duration::from_secs(1);

/// A process that takes batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Consumer(
    /// Its number here; `None` for a client over TCP, which may be anywhere.
    pub Option<u32>,
);

/// What a consumer did last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Who.
    pub consumer: Consumer,
    /// How long ago it took a batch.
    pub age: Duration,
}

/// Called when somebody takes a batch who had taken none for a while.
type OnWake = Box<dyn Fn() + Send + Sync>;

/// See the module.
pub struct DemandBoard {
    last: Mutex<BTreeMap<Consumer, Instant>>,
    /// When a consumer became active last.
    woke: Mutex<Option<Instant>>,
    on_wake: OnWake,
    /// A consumer is active for so long after a batch.
    active: Duration,
}

impl std::fmt::Debug for DemandBoard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DemandBoard").finish_non_exhaustive()
    }
}

impl DemandBoard {
    /// `on_wake` is called, on the writer's thread, when a consumer becomes active; it must not
    /// wait for anything.
    pub fn new(active: Duration, on_wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            last: Mutex::new(BTreeMap::new()),
            woke: Mutex::new(None),
            on_wake: Box::new(on_wake),
            active,
        }
    }

    /// A batch was taken, or asked for, just now.
    pub fn took(&self, consumer: Consumer) {
        self.took_at(consumer, Instant::now());
    }

    fn took_at(&self, consumer: Consumer, now: Instant) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let before = last.insert(consumer, now);
        if last.len() > SESSIONS_MAX {
            last.retain(|_, at| now.duration_since(*at) <= self.active);
        }
        drop(last);
        if before.is_none_or(|before| now.duration_since(before) > self.active) {
            *self.woke.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
            (self.on_wake)();
        }
    }

    /// How long ago a consumer became active.
    pub fn since_wake(&self) -> Option<Duration> {
        self.woke.lock().unwrap_or_else(PoisonError::into_inner).map(|at| at.elapsed())
    }

    /// Everybody who took a batch within `horizon`; others are forgotten.
    pub fn recent(&self, horizon: Duration) -> Vec<Demand> {
        self.recent_at(horizon, Instant::now())
    }

    fn recent_at(&self, horizon: Duration, now: Instant) -> Vec<Demand> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.retain(|_, at| now.saturating_duration_since(*at) <= horizon);
        let demand = |(&consumer, at): (&Consumer, &Instant)| Demand {
            consumer,
            age: now.saturating_duration_since(*at),
        };
        last.iter().map(demand).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn it_wakes_for_the_first_batch_and_after_a_gap() {
        let n_wakes = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&n_wakes);
        let board = DemandBoard::new(ACTIVE, move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let (one, start) = (Consumer(Some(7)), Instant::now());
        for (millis, wakes) in [(0, 1), (900, 1), (1900, 1), (2901, 2), (2902, 2)] {
            board.took_at(one, start + Duration::from_millis(millis));
            assert_eq!(n_wakes.load(Ordering::Relaxed), wakes, "at {millis} ms");
        }
        board.took_at(Consumer(None), start + Duration::from_millis(2903));
        assert_eq!(n_wakes.load(Ordering::Relaxed), 3, "another consumer");
    }

    #[test]
    fn it_tells_ages_and_forgets_what_is_old() {
        let board = DemandBoard::new(ACTIVE, || {});
        let start = Instant::now();
        board.took_at(Consumer(Some(1)), start);
        board.took_at(Consumer(Some(2)), start + Duration::from_secs(3));
        let found = board.recent_at(Duration::from_secs(5), start + Duration::from_secs(4));
        let ages: Vec<_> = found.iter().map(|one| (one.consumer.0, one.age.as_secs())).collect();
        assert_eq!(ages, [(Some(1), 4), (Some(2), 1)]);
        let found = board.recent_at(Duration::from_secs(2), start + Duration::from_secs(4));
        assert_eq!(found.len(), 1);
        let found = board.recent_at(Duration::from_secs(50), start + Duration::from_secs(4));
        assert_eq!(found.len(), 1, "what was forgotten stays forgotten");
    }

    #[test]
    fn it_is_bounded() {
        let board = DemandBoard::new(ACTIVE, || {});
        let start = Instant::now();
        for pid in 0..u32::try_from(3 * SESSIONS_MAX).unwrap() {
            board.took_at(Consumer(Some(pid)), start + Duration::from_secs(2 * u64::from(pid)));
        }
        assert!(board.last.lock().unwrap().len() <= SESSIONS_MAX + 1);
    }
}
