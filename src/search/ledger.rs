//! The search's memory: every finished unit of work by key, so that it is never done again.
//!
//! Owns the journal of a search, its costs and its progress. An algorithm is written straight down,
//! as if nothing could interrupt it; whatever it computes, it computes as a *unit*. After a restart
//! the same code runs again, finds the finished units in the journal, and so comes to where it was.
//!
//! *Invariants*: a unit's value is what its journal line gives back, also for the one who computed
//! it. Keys never contain a time, a thread or a count of restarts. Results don't depend on the
//! number of threads: units that run side by side don't see each other.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::SearchError;
use super::gpu_clock;
use super::journal::{Journal, JournalError, JournalHeader, JournalTail};
use super::progress::{Event, Progress, RoundOutcome};

/// Version of the records and keys: another one's journal is refused.
pub const JOURNAL_VERSION: u32 = 1;
/// How often a search that is out of budget looks at the clock.
const BUDGET_INTERVAL: Duration = Duration::from_secs(5);
const SECONDS_PER_DAY: u64 = 86_400;
/// A unit that keeps a GPU for longer is told.
const GPU_UNIT_MAX: Duration = Duration::from_millis(20);

/// A finished unit of work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What was computed, such as `affinity/2/Rotate`.
    pub key: String,
    /// What came out.
    pub value: Value,
    /// CPU time that it took, in seconds.
    pub cpu_seconds: f64,
    /// GPU time that it took, in seconds; the thread waited for it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gpu_seconds: f64,
    /// Image passes that it took.
    pub passes: u64,
    /// When it was done, in seconds since 1970.
    pub finished: u64,
}

impl Record {
    /// What the unit counts in the day's budget: a thread that waits for a GPU may spin.
    fn compute_seconds(&self) -> f64 {
        self.cpu_seconds.max(self.gpu_seconds)
    }
}

/// Journals of searches on processors have no such key.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(seconds: &f64) -> bool {
    *seconds <= 0.0
}

/// See the module. Shared by the search's threads.
pub struct Ledger {
    state: Mutex<State>,
    n_threads: usize,
    /// CPU seconds per day; 0: no limit.
    budget_seconds: u64,
    tell: Box<dyn Fn(&Event) + Send + Sync>,
    has_told_units: AtomicBool,
}

struct State {
    journal: Journal<Record>,
    known: HashMap<String, Record>,
    progress: Progress,
    /// Seconds spent, by day since 1970.
    spent_by_day: HashMap<u64, f64>,
    /// Passes computed by this process since its start, for the rate.
    passes_computed: u64,
    began: Instant,
}

impl Ledger {
    /// Opens the journal of the search that `header` names. `tell` gets every event.
    ///
    /// # Errors
    /// As [`Journal::open`].
    pub fn open(
        path: &Path,
        header: &JournalHeader,
        n_threads: usize,
        budget_seconds: u64,
        tell: impl Fn(&Event) + Send + Sync + 'static,
    ) -> Result<(Self, Option<JournalTail>), JournalError> {
        let opened = Journal::<Record>::open(path, header)?;
        let mut spent_by_day = HashMap::new();
        let mut progress = Progress::default();
        for record in &opened.records {
            *spent_by_day.entry(record.finished / SECONDS_PER_DAY).or_insert(0.0) +=
                record.compute_seconds();
            progress.cpu_seconds += record.cpu_seconds;
            progress.gpu_seconds += record.gpu_seconds;
        }
        let known = opened.records.into_iter().map(|record| (record.key.clone(), record)).collect();
        let state = State {
            journal: opened.journal,
            known,
            progress,
            spent_by_day,
            passes_computed: 0,
            began: Instant::now(),
        };
        let tell = Box::new(tell);
        let ledger = Self {
            state: Mutex::new(state),
            n_threads,
            budget_seconds,
            tell,
            has_told_units: AtomicBool::new(false),
        };
        Ok((ledger, opened.tail))
    }

    /// The value of the unit `key`: from the journal, else computed now and written there.
    /// `passes` is its cost in image passes (forward: 1, training step: 3).
    ///
    /// # Errors
    /// What `compute` says, or the journal cannot be written or has another kind of value.
    pub fn unit<T: Serialize + DeserializeOwned>(
        &self,
        key: &str,
        passes: u64,
        compute: impl FnOnce() -> Result<T, SearchError>,
    ) -> Result<T, SearchError> {
        if let Some(value) = self.known(key) {
            self.count(passes, false);
            return read(key, value);
        }
        self.wait_for_budget();
        let (began, began_gpu) = (thread_seconds(), gpu_clock::thread_seconds());
        let value = serde_json::to_value(compute()?)
            .map_err(|source| SearchError::Value { key: key.to_owned(), source })?;
        let record = Record {
            key: key.to_owned(),
            value: value.clone(),
            cpu_seconds: (thread_seconds() - began).max(0.0),
            gpu_seconds: gpu_clock::thread_seconds() - began_gpu,
            passes,
            finished: unix_seconds(),
        };
        {
            let mut state = self.lock();
            state.journal.append(&record)?;
            let day = record.finished / SECONDS_PER_DAY;
            *state.spent_by_day.entry(day).or_insert(0.0) += record.compute_seconds();
            state.progress.cpu_seconds += record.cpu_seconds;
            state.progress.gpu_seconds += record.gpu_seconds;
            state.known.insert(record.key.clone(), record);
        }
        self.count(passes, true);
        self.tell_long_units();
        read(key, value)
    }

    /// The value of a unit that is finished, else `None`.
    ///
    /// # Errors
    /// The journal has another kind of value.
    pub fn finished<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, SearchError> {
        self.known(key).map(|value| read(key, value)).transpose()
    }

    fn known(&self, key: &str) -> Option<Value> {
        self.lock().known.get(key).map(|record| record.value.clone())
    }

    /// CPU seconds and image passes of the finished units whose key begins with `prefix`.
    pub fn cost(&self, prefix: &str) -> (f64, u64) {
        let state = self.lock();
        let records = state.known.values().filter(|record| record.key.starts_with(prefix));
        records.fold((0.0, 0), |(seconds, passes), record| {
            (seconds + record.cpu_seconds, passes + record.passes)
        })
    }

    /// Does `work` for every item, on as many threads as the search may use, and gives the results
    /// in the order of the items.
    ///
    /// # Errors
    /// The error of the first item that failed. Items that were not begun by then never are.
    pub fn parallel<I: Sync, T: Send>(
        &self,
        items: &[I],
        work: impl Fn(&I) -> Result<T, SearchError> + Sync,
    ) -> Result<Vec<T>, SearchError> {
        let (next, has_failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let slots: Vec<Mutex<Option<Result<T, SearchError>>>> =
            items.iter().map(|_| Mutex::new(None)).collect();
        let run = || {
            while !has_failed.load(Ordering::Relaxed) {
                let idx = next.fetch_add(1, Ordering::Relaxed);
                let Some(item) = items.get(idx) else { break };
                let result = work(item);
                has_failed.fetch_or(result.is_err(), Ordering::Relaxed);
                *slots[idx].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.n_threads.min(items.len()) {
                scope.spawn(run);
            }
            run();
        });
        let results = slots
            .into_iter()
            .filter_map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner));
        let done: Vec<T> = results.collect::<Result<_, _>>()?;
        debug_assert_eq!(done.len(), items.len(), "without an error every item was done");
        Ok(done)
    }

    /// Begins a round: its number and its cost in image passes, as far as is known.
    pub fn begin_round(&self, round: u32, passes: u64) {
        self.update(|progress| {
            progress.round = round;
            progress.round_passes = 0;
            progress.round_passes_total = passes;
            progress.best.clear();
        });
    }

    /// Begins a stage of `total` units ([`Self::step`] counts them).
    pub fn begin_stage(&self, stage: &str, total: u64) {
        self.update(|progress| {
            stage.clone_into(&mut progress.stage);
            progress.part.clear();
            (progress.done, progress.total) = (0, total);
        });
    }

    /// Names what is being done now, such as `fold 2`.
    pub fn part(&self, part: &str) {
        self.update(|progress| part.clone_into(&mut progress.part));
    }

    /// Counts a unit of the stage as done.
    pub fn step(&self) {
        self.update(|progress| progress.done += 1);
    }

    /// Tells the best value so far, in words.
    pub fn best(&self, best: String) {
        self.update(|progress| progress.best = best);
    }

    /// Changes the progress and tells it.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        let progress = {
            let mut state = self.lock();
            change(&mut state.progress);
            let today = unix_seconds() / SECONDS_PER_DAY;
            state.progress.seconds_today =
                state.spent_by_day.get(&today).copied().unwrap_or_default();
            state.progress.eta_seconds = eta(&state);
            state.progress.clone()
        };
        (self.tell)(&Event::Progress(progress));
    }

    /// Tells a sentence for the log.
    pub fn note(&self, text: impl Into<String>) {
        (self.tell)(&Event::Note { text: text.into() });
    }

    /// Tells how a round ended.
    pub fn round_ended(&self, outcome: RoundOutcome) {
        (self.tell)(&Event::Round(outcome));
    }

    fn count(&self, passes: u64, is_computed: bool) {
        if is_computed {
            self.lock().passes_computed += passes;
        }
        self.update(|progress| progress.round_passes += passes);
    }

    /// Says once if others would wait longer for the GPU than is promised.
    fn tell_long_units(&self) {
        let longest = gpu_clock::longest();
        if longest <= GPU_UNIT_MAX || self.has_told_units.swap(true, Ordering::Relaxed) {
            return;
        }
        self.note(format!(
            "a training step takes {:.0} ms of the GPU, and is not interrupted: others may wait so \
             long for it, instead of {} ms; a smaller search.model is out of the way sooner",
            1e3 * longest.as_secs_f64(),
            GPU_UNIT_MAX.as_millis()
        ));
    }

    /// Waits until the day's budget allows more. What is computed does not depend on it.
    fn wait_for_budget(&self) {
        if self.budget_seconds == 0 {
            return;
        }
        let is_spent = || {
            let today = unix_seconds() / SECONDS_PER_DAY;
            let spent = self.lock().spent_by_day.get(&today).copied().unwrap_or_default();
            spent >= self.budget_seconds as f64
        };
        while is_spent() {
            if !self.lock().progress.is_out_of_budget {
                self.update(|progress| progress.is_out_of_budget = true);
            }
            #[allow(clippy::disallowed_methods, reason = "the clock is the event")]
            std::thread::sleep(BUDGET_INTERVAL);
        }
        if self.lock().progress.is_out_of_budget {
            self.update(|progress| progress.is_out_of_budget = false);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn eta(state: &State) -> Option<f64> {
    let left = state.progress.round_passes_total.checked_sub(state.progress.round_passes)?;
    let rate = state.passes_computed as f64 / state.began.elapsed().as_secs_f64();
    (state.passes_computed > 0).then(|| left as f64 / rate)
}

fn read<T: DeserializeOwned>(key: &str, value: Value) -> Result<T, SearchError> {
    serde_json::from_value(value)
        .map_err(|source| SearchError::Value { key: key.to_owned(), source })
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// CPU time of this thread. Units compute on their own thread alone (one torch thread).
fn thread_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
