//! A session that is connected: its route, its rate, and what reports tell of it.
//!
//! Owns the rate. Decides nothing.

use std::time::{Duration, Instant};

use super::server::SessionReport;
use super::session::Session;

/// A session and what the server needs to speak to it.
pub(super) struct LiveSession {
    pub(super) session: Session,
    /// Routing id on the socket; for TCP whatever the client's socket chose.
    pub(super) route: Vec<u8>,
    pub(super) is_tcp: bool,
    pub(super) rate: Rate,
}

/// Samples per second over the last whole second or so.
pub(super) struct Rate {
    since: Instant,
    n_samples: u64,
    per_second: f64,
}

impl Rate {
    /// Counts samples of now.
    pub(super) fn add(&mut self, n_samples: u64) {
        self.roll();
        self.n_samples += n_samples;
    }

    fn roll(&mut self) {
        let elapsed = self.since.elapsed();
        if elapsed >= Duration::from_secs(1) {
            self.per_second = self.n_samples as f64 / elapsed.as_secs_f64();
            self.n_samples = 0;
            self.since = Instant::now();
        }
    }
}

impl Default for Rate {
    fn default() -> Self {
        Self { since: Instant::now(), n_samples: 0, per_second: 0.0 }
    }
}

impl LiveSession {
    /// What is known of it.
    pub(super) fn report(&mut self) -> SessionReport {
        self.rate.roll();
        let session = &self.session;
        let (epoch, step, next_offset) = session.position();
        let (n_leased, n_free) = session.slot_counts();
        let (policy, policy_version) = session.policy().unwrap_or(("", 0));
        SessionReport {
            session: session.id,
            dataset: session.request.dataset.clone(),
            split: session.request.split.clone(),
            client: session.peer.client.clone(),
            pid: session.peer.pid,
            uid: session.peer.uid,
            is_tcp: self.is_tcp,
            rank: session.request.rank,
            world_size: session.request.world_size,
            group: session.request.group.clone(),
            batch_size: session.request.batch_size,
            epoch,
            step,
            next_offset,
            batches_sent: session.batches_sent,
            samples_sent: session.samples_sent,
            n_leased,
            n_free,
            n_slots: session.n_slots(),
            policy: policy.to_owned(),
            policy_version,
            images_per_second: self.rate.per_second,
            is_replay: session.request.replay,
            is_broadcast: session.window.is_some(),
            batches_shared: session.batches_shared,
            is_beyond_window: session.is_beyond_window,
        }
    }
}
