//! What the daemon knows of its search worker: state, progress, outcomes, and when a crashed one is
//! started again.
//!
//! Owns plain data and its rules. Never touches a process (`searcher` does).

use std::collections::VecDeque;
use std::time::Duration;

use crate::control::{SearchProgressReport, SearchReport, SearchRoundReport};
use crate::limits::{SEARCH_EVENT_BYTES_MAX, SEARCH_STATUS_ITEMS_MAX, SEARCH_TEXT_CHARS_MAX};
use crate::search::progress::{Event, Progress, RoundOutcome};

/// What the search is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// This daemon never searches.
    Disabled,
    /// It begins when somebody says so.
    Waiting,
    /// The process runs, and has told nothing yet.
    Starting,
    /// It computes.
    Running,
    /// Others use the device; it goes on when they don't.
    Yielding,
    /// Somebody paused it.
    Paused,
    /// The day's budget is used up.
    OutOfBudget,
    /// The process crashed, and is started again in a while.
    BackingOff,
    /// A new start would fail in the same way.
    Failed,
    /// All rounds are done.
    Finished,
}

impl Phase {
    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::Waiting => "waiting",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Yielding => "yielding",
            Self::Paused => "paused",
            Self::OutOfBudget => "out-of-budget",
            Self::BackingOff => "backing-off",
            Self::Failed => "failed",
            Self::Finished => "finished",
        }
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct SearchState {
    pub(super) phase: Phase,
    /// Why it is in this phase, in words; empty where the phase says it all.
    pub(super) reason: String,
    pub(super) progress: Option<Progress>,
    pub(super) notes: VecDeque<String>,
    pub(super) rounds: VecDeque<RoundOutcome>,
    /// Starts after a crash.
    pub(super) n_restarts: u64,
    pub(super) pid: Option<u32>,
    /// Lines of the worker that were no events.
    pub(super) n_bad_lines: u64,
}

impl SearchState {
    pub(super) fn new(phase: Phase, reason: impl Into<String>) -> Self {
        Self {
            phase,
            reason: reason.into(),
            progress: None,
            notes: VecDeque::new(),
            rounds: VecDeque::new(),
            n_restarts: 0,
            pid: None,
            n_bad_lines: 0,
        }
    }

    pub(super) fn enter(&mut self, phase: Phase, reason: impl Into<String>) {
        self.phase = phase;
        self.reason = reason.into();
    }

    /// What a worker that lives and is not paused does, by its last progress.
    pub(super) fn enter_by_progress(&mut self) {
        match &self.progress {
            Some(progress) if progress.is_out_of_budget => self.enter(
                Phase::OutOfBudget,
                "the day's search.budget_seconds are used up; it goes on tomorrow (UTC)",
            ),
            Some(_) => self.enter(Phase::Running, ""),
            None => self.enter(Phase::Starting, ""),
        }
    }

    /// Lets an event of the worker take effect.
    pub(super) fn take(&mut self, event: Event) {
        match event {
            Event::Progress(progress) => {
                self.progress = Some(progress);
                // What a paused worker wrote before the pause may be read after it.
                if !matches!(self.phase, Phase::Paused | Phase::Yielding) {
                    self.enter_by_progress();
                }
            }
            Event::Note { text } => self.note(text),
            Event::Round(mut outcome) => {
                outcome.summary = cut(outcome.summary);
                // A worker that was started anew tells again what it finds done.
                match self.rounds.iter_mut().find(|known| known.round == outcome.round) {
                    Some(known) => *known = outcome,
                    None => push_bounded(&mut self.rounds, outcome),
                }
            }
            // The exit code decides; the message is kept by the worker's life.
            Event::Failed { .. } | Event::Finished => {}
        }
    }

    pub(super) fn note(&mut self, text: String) {
        push_bounded(&mut self.notes, cut(text));
    }

    /// As the control socket tells it.
    pub(super) fn report(&self, dataset: &str, budget_seconds: u64) -> SearchReport {
        let round = |outcome: &RoundOutcome| SearchRoundReport {
            round: outcome.round,
            version: outcome.version,
            summary: outcome.summary.clone(),
            cpu_seconds: outcome.cpu_seconds,
        };
        SearchReport {
            state: self.phase.name().to_owned(),
            reason: self.reason.clone(),
            dataset: dataset.to_owned(),
            pid: self.pid,
            restarts: self.n_restarts,
            bad_lines: self.n_bad_lines,
            budget_seconds,
            progress: self.progress.clone().map(progress_report),
            rounds: self.rounds.iter().map(round).collect(),
            notes: self.notes.iter().cloned().collect(),
            idle: None,
        }
    }
}

fn cut(text: String) -> String {
    match text.char_indices().nth(SEARCH_TEXT_CHARS_MAX) {
        Some((end, _)) => text[..end].to_owned() + "…",
        None => text,
    }
}

fn push_bounded<T>(list: &mut VecDeque<T>, item: T) {
    if list.len() >= SEARCH_STATUS_ITEMS_MAX {
        list.pop_front();
    }
    list.push_back(item);
}

fn progress_report(progress: Progress) -> SearchProgressReport {
    SearchProgressReport {
        algorithm: progress.algorithm,
        round: progress.round,
        n_rounds: progress.n_rounds,
        stage: progress.stage,
        part: progress.part,
        done: progress.done,
        total: progress.total,
        best: progress.best,
        round_passes: progress.round_passes,
        round_passes_total: progress.round_passes_total,
        eta_seconds: progress.eta_seconds,
        cpu_seconds: progress.cpu_seconds,
        gpu_seconds: progress.gpu_seconds,
        seconds_today: progress.seconds_today,
    }
}

/// Waits between crashes: doubled each time, up to a bound.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    n_crashes: u32,
}

impl Backoff {
    /// Begins with `first`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, n_crashes: 0 }
    }

    /// The wait after one more crash.
    pub(super) fn next(&mut self) -> Duration {
        let factor = 2u32.saturating_pow(self.n_crashes);
        self.n_crashes = self.n_crashes.saturating_add(1);
        self.first.saturating_mul(factor).min(self.longest)
    }

    /// The worker got somewhere: the next crash is a first one.
    pub(super) fn reset(&mut self) {
        self.n_crashes = 0;
    }
}

impl Default for Backoff {
    /// 1 s, 2 s, 4 s, …, 5 minutes.
    fn default() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_secs(300))
    }
}

/// Sees from the search's CPU time whether a worker finished a unit of work: what it finds in the
/// journal is counted once, and a worker that dies again and again over one unit adds nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Advance {
    seconds: Option<f64>,
}

impl Advance {
    /// Whether this progress is beyond all before it. The first one shows nothing.
    pub(super) fn is_seen_in(&mut self, progress: &Progress) -> bool {
        let seconds = progress.cpu_seconds + progress.gpu_seconds;
        let is_beyond = self.seconds.is_some_and(|before| seconds > before);
        if is_beyond || self.seconds.is_none() {
            self.seconds = Some(seconds);
        }
        is_beyond
    }
}

/// Cuts a stream of bytes into lines of bounded length.
#[derive(Debug, Default)]
pub(super) struct Lines {
    partial: Vec<u8>,
    /// The line under way was too long already.
    is_too_long: bool,
}

impl Lines {
    /// Gives every line that `bytes` ends, without its line feed; `None` for a line, or another
    /// piece of one, that is over the limit.
    pub(super) fn feed(&mut self, bytes: &[u8], mut take: impl FnMut(Option<&[u8]>)) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let end = rest.iter().position(|byte| *byte == b'\n');
            let room = SEARCH_EVENT_BYTES_MAX - self.partial.len();
            let n_taken = end.unwrap_or(rest.len()).min(room);
            self.partial.extend_from_slice(&rest[..n_taken]);
            rest = &rest[n_taken..];
            if end == Some(n_taken) {
                rest = &rest[1..];
                if !self.is_too_long {
                    take(Some(&self.partial));
                }
                self.partial.clear();
                self.is_too_long = false;
            } else if !rest.is_empty() {
                take(None);
                self.partial.clear();
                self.is_too_long = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_five_minutes_and_start_anew_after_progress() {
        let mut backoff = Backoff::default();
        let waits: Vec<u64> = (0..12).map(|_| backoff.next().as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        for _ in 0..100 {
            assert_eq!(backoff.next().as_secs(), 300);
        }
        backoff.reset();
        assert_eq!((backoff.next().as_secs(), backoff.next().as_secs()), (1, 2));
    }

    #[test]
    fn only_a_unit_that_is_new_counts_as_progress() {
        let mut advance = Advance::default();
        let mut see =
            |cpu_seconds| advance.is_seen_in(&Progress { cpu_seconds, ..Progress::default() });
        assert!(!see(10.0), "what the journal had");
        assert!(!see(10.0));
        assert!(see(11.0));
        // A new worker, whose last unit had not reached the journal.
        assert!(!see(10.0));
        assert!(!see(11.0), "the same unit again");
        assert!(see(12.0));
    }

    #[test]
    fn lines_come_whole_whatever_the_pieces_and_long_ones_are_counted() {
        let text = b"one\n\ntwo\nthree\nrest";
        for size in 1..=text.len() {
            let (mut lines, mut got) = (Lines::default(), Vec::new());
            for piece in text.chunks(size) {
                lines.feed(piece, |line| got.push(line.map(<[u8]>::to_vec)));
            }
            let expected = ["one", "", "two", "three"].map(|line| Some(line.as_bytes().to_vec()));
            assert_eq!(got, expected, "{size}");
        }
        let longest = vec![b'x'; SEARCH_EVENT_BYTES_MAX];
        let mut got = Vec::new();
        let mut lines = Lines::default();
        let mut feed = |bytes: &[u8]| {
            lines.feed(bytes, |line| got.push(line.map(<[u8]>::len)));
        };
        feed(&longest);
        feed(b"\n");
        feed(&longest);
        feed(b"xx");
        feed(&longest);
        feed(b"\nok\n");
        assert_eq!(got, [Some(longest.len()), None, None, Some(2)]);
    }

    #[test]
    fn events_become_state() {
        let mut state = SearchState::new(Phase::Starting, "");
        let progress = |is_out_of_budget| {
            Event::Progress(Progress {
                stage: "gate".to_owned(),
                is_out_of_budget,
                ..Progress::default()
            })
        };
        state.take(progress(false));
        assert_eq!(state.phase, Phase::Running);
        state.take(progress(true));
        assert_eq!(state.phase, Phase::OutOfBudget);
        assert!(state.reason.contains("budget_seconds"), "{}", state.reason);
        state.take(progress(false));
        assert_eq!((state.phase, state.reason.as_str()), (Phase::Running, ""));
        state.enter(Phase::Paused, "");
        state.take(progress(true));
        assert_eq!(state.phase, Phase::Paused);

        let round = |round, summary: &str| {
            Event::Round(RoundOutcome {
                round,
                summary: summary.to_owned(),
                ..RoundOutcome::default()
            })
        };
        state.take(round(1, "kept"));
        state.take(round(2, "kept"));
        state.take(round(1, "kept: again"));
        for number in 0..2 * SEARCH_STATUS_ITEMS_MAX {
            state.take(Event::Note { text: number.to_string() });
        }
        state.note("é".repeat(SEARCH_TEXT_CHARS_MAX + 1));
        let report = state.report("d", 60);
        let last = report.notes.last().expect("a note");
        assert_eq!(last.chars().count(), SEARCH_TEXT_CHARS_MAX + 1);
        assert!(last.ends_with("é…"));
        let rounds: Vec<_> = report.rounds.iter().map(|round| round.summary.as_str()).collect();
        assert_eq!(rounds, ["kept: again", "kept"]);
        assert_eq!(report.notes.len(), SEARCH_STATUS_ITEMS_MAX);
        assert_eq!((report.state.as_str(), report.budget_seconds), ("paused", 60));
        assert_eq!(report.progress.expect("known").stage, "gate");
    }
}
