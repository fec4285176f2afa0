//! What a slab's thread tells, which must not make it wait.

use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam::channel::{Sender, TrySendError};

use super::GpuNews;

/// News that may wait for room.
pub(super) struct Outbox {
    /// Names the slab in them.
    pub(super) slab: u64,
    news: Sender<GpuNews>,
    wake: Arc<dyn Fn() + Send + Sync>,
    waiting: VecDeque<GpuNews>,
}

impl Outbox {
    pub(super) fn new(slab: u64, news: Sender<GpuNews>, wake: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { slab, news, wake, waiting: VecDeque::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn push(&mut self, news: GpuNews) {
        self.waiting.push_back(news);
        self.flush();
    }

    pub(super) fn flush(&mut self) {
        let mut is_told = false;
        while let Some(news) = self.waiting.pop_front() {
            match self.news.try_send(news) {
                Ok(()) => is_told = true,
                Err(TrySendError::Full(news)) => {
                    self.waiting.push_front(news);
                    break;
                }
                // The daemon is ending.
                Err(TrySendError::Disconnected(_)) => {}
            }
        }
        if is_told {
            (self.wake)();
        }
    }
}
