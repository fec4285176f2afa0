//! Carries out what the idle watch decides: the worker is stopped, ended, or goes on.
//!
//! Owns the moments of yielding. Decides nothing, and leaves a user's pause alone.

use std::time::Instant;

use rustix::process::Signal;
use tracing::info;

use super::supervisor::Supervisor;
use super::{Phase, lock};
use crate::daemon::idle_watch::SearchProcess;
use crate::daemon::search_process::Worker;
use crate::idle::decision::{Decision, Verdict};

impl Supervisor {
    /// Whether a worker may compute now.
    pub(super) fn may_run(&self) -> bool {
        !self.is_paused() && !self.is_yielding
    }

    /// Asks the idle watch, and carries out what it says. `fastaa-ctl search run` overrides it, but
    /// for full memory: somebody's job is about to fail.
    pub(super) fn look(&mut self) {
        self.hold();
        let Some(idle) = &mut self.idle else { return };
        let is_on_gpu = {
            let state = lock(&self.state);
            state.progress.as_ref().map(|progress| progress.is_on_gpu)
        };
        let decision = idle.decide(SearchProcess {
            pid: self.worker.as_ref().map(Worker::number),
            is_on_gpu,
            has_run: self.worker.is_some() && !self.is_stopped,
        });
        let is_to_yield = match decision.verdict {
            Verdict::Run => false,
            Verdict::Pause => !self.is_told,
            Verdict::Evict => true,
        };
        if is_to_yield {
            self.yield_device(&decision);
        } else if self.is_yielding {
            self.is_yielding = false;
            if !self.is_paused() {
                self.go_on();
            }
        }
    }

    /// Says again whether the worker is to compute, in case that somebody else has stopped it or
    /// let it go on.
    fn hold(&self) {
        if let Some(worker) = &self.worker {
            worker.signal(if self.is_stopped { Signal::STOP } else { Signal::CONT });
        }
    }

    fn yield_device(&mut self, decision: &Decision) {
        let was_yielding = std::mem::replace(&mut self.is_yielding, true);
        if let Some(worker) = &self.worker {
            let is_first = !self.is_stopped;
            if decision.verdict == Verdict::Evict {
                info!(reason = %decision.reason, "the search's memory is freed");
                if let Some(worker) = self.worker.take() {
                    worker.kill();
                }
                self.is_stopped = false;
                self.restart_at = Some(Instant::now());
                lock(&self.state).pid = None;
            } else if is_first {
                worker.signal(Signal::STOP);
                self.is_stopped = true;
            }
            if is_first && let Some(idle) = &mut self.idle {
                idle.yielded(decision);
            }
        }
        let is_due = self.restart_at.is_some_and(|at| at <= Instant::now());
        let mut state = lock(&self.state);
        // What waits for a user, or for the end of a back-off, says so itself.
        if state.phase != Phase::Paused && (self.worker.is_some() || is_due) {
            if !was_yielding || state.phase != Phase::Yielding {
                state.enter(Phase::Yielding, decision.reason.to_string());
            } else {
                state.reason = decision.reason.to_string();
            }
        }
    }

    /// Lets a worker that was stopped compute again; one that is missing is started by the loop.
    pub(super) fn go_on(&mut self) {
        if let Some(worker) = &self.worker {
            worker.signal(Signal::CONT);
            self.is_stopped = false;
            lock(&self.state).enter_by_progress();
        }
    }
}
