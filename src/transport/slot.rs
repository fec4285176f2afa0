//! A slot of a session: what it is being used for, and what is known of its content.

use std::sync::Arc;

use crate::augment::PreparedPolicy;
use crate::pipeline::workers::JobTag;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotState {
    Free,
    /// A job writes to it.
    Filling,
    /// Filled, not announced yet.
    Ready,
    /// The consumer reads it.
    Leased,
    /// The consumer has released it; its work on the GPU may still read it there.
    Returning,
}

#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) state: SlotState,
    /// Counts the slot's lives; rises when it is filled anew.
    pub(super) generation: u32,
    /// Its batch is in this slot of the group's window.
    pub(super) window: Option<u32>,
    /// Samples that the last job wrote to it.
    pub(super) n_filled: u32,
    /// The job whose result is on its way to the GPU.
    pub(super) uploading: Option<JobTag>,
    /// Epoch and policy of the batch that the GPU is to make of it.
    pub(super) rest: Option<(u64, Arc<PreparedPolicy>)>,
}

impl Slot {
    pub(super) const FREE: Self = Self {
        state: SlotState::Free,
        generation: 0,
        window: None,
        n_filled: 0,
        uploading: None,
        rest: None,
    };
}
