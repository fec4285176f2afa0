//! How many slabs are being opened at once. A driver that does not return keeps what it was given,
//! and a daemon without file descriptors serves nobody.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::limits::GPU_OPENINGS_MAX;

/// See the module.
#[derive(Default)]
pub(super) struct Openings {
    n: Mutex<usize>,
    ended: Condvar,
}

/// One of them. It ends with its drop.
pub(super) struct Opening(Arc<Openings>);

impl Openings {
    /// Waits for its turn; `None`: in vain.
    pub(super) fn begin(this: &Arc<Self>, at_most: Duration) -> Option<Opening> {
        let n = this.n.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = |n: &mut usize| *n >= GPU_OPENINGS_MAX;
        let waited = this.ended.wait_timeout_while(n, at_most, is_full);
        let (mut n, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            return None;
        }
        *n += 1;
        Some(Opening(Arc::clone(this)))
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        *self.0.n.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.ended.notify_one();
    }
}
