//! What the slabs of one GPU have in common: the share of its memory that batches may take, and
//! whether it still works. It is forgotten with the last thread that works for a slab there.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

use super::{GpuError, Uuid, uuid_text};

/// How long a slab waits for the memory of one that is being freed, such as that of the loader
/// that its client has just closed.
const ROOM_WAIT_MAX: Duration = Duration::from_millis(500);

/// One GPU.
pub(super) struct Card {
    pub(super) uuid: Uuid,
    /// Most memory of all slabs.
    memory_bytes: u64,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Default)]
struct State {
    used_bytes: u64,
    n_slabs: u32,
    /// An error of CUDA, which usually stays until the process ends.
    broken: Option<GpuError>,
    /// Why no more batches are finished there.
    no_finish: Option<String>,
}

impl Card {
    pub(super) fn new(uuid: Uuid, memory_bytes: u64) -> Self {
        Self { uuid, memory_bytes, state: Mutex::default(), freed: Condvar::new() }
    }

    /// A part of the share. `finishes`: batches are to be finished there.
    ///
    /// # Errors
    /// The share is taken, or the GPU has failed.
    pub(super) fn share(self: &Arc<Self>, n_bytes: u64, finishes: bool) -> Result<Share, GpuError> {
        let deadline = Instant::now() + ROOM_WAIT_MAX;
        let mut state = self.state();
        if let Some(broken) = &state.broken {
            return Err(broken.clone());
        }
        if let Some(reason) = state.no_finish.as_ref().filter(|_| finishes) {
            return Err(GpuError::NoFinish(reason.clone()));
        }
        while state.used_bytes + n_bytes > self.memory_bytes {
            let left = deadline.saturating_duration_since(Instant::now());
            // What is too large by itself has nothing to wait for.
            if left.is_zero() || n_bytes > self.memory_bytes {
                let mib = |bytes: u64| bytes.div_ceil(1 << 20);
                return Err(GpuError::Cap {
                    cap_mib: mib(self.memory_bytes),
                    used_mib: mib(state.used_bytes),
                    wanted_mib: mib(n_bytes),
                });
            }
            let waited = self.freed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.used_bytes += n_bytes;
        state.n_slabs += 1;
        Ok(Share { card: Arc::clone(self), n_bytes })
    }

    /// Whether there is no slab.
    pub(super) fn is_empty(&self) -> bool {
        self.state().n_slabs == 0
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One slab's part of the share. Dropping it gives it back.
pub(super) struct Share {
    card: Arc<Card>,
    n_bytes: u64,
}

impl Share {
    /// CUDA has failed: no more slabs there.
    pub(super) fn breaks(&self, error: &GpuError) {
        let mut state = self.card.state();
        if state.broken.is_none() {
            warn!(gpu = uuid_text(self.card.uuid), %error, "no batches are put on this GPU now");
            state.broken = Some(error.clone());
        }
    }

    /// Batches could not be finished there, and are no more.
    pub(super) fn no_finish(&self, problem: &str) {
        self.card.state().no_finish.get_or_insert_with(|| problem.to_owned());
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.card.state();
        state.used_bytes -= self.n_bytes;
        state.n_slabs -= 1;
        drop(state);
        self.card.freed.notify_all();
    }
}
