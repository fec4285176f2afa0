//! The window of a broadcast group: memory that all its members read, and who gets what of it.
//!
//! Owns the shared slots' states; a state machine without sockets or clocks. A batch is made once
//! and read by every member that comes to it while it lies in the window. Whoever comes later gets
//! the same bytes, made anew into slots of its own; nobody waits for anybody.
//!
//! It grows with its members: by as many slots as they can hold all together, so that those who
//! stand still with full hands leave the others as many as before.
//!
//! *Invariants*: a slot with readers keeps its content. A member that is behind takes no slot from
//! those ahead of it while they use the window. Which member asks first changes no byte: a batch's
//! content is a function of its [`BatchKey`].

use std::sync::Arc;

use crate::pipeline::workers::JobTag;

use super::slab::Slab;

/// A slot that was not asked for while so many times its window's slots were, is given up to
/// members behind it: those ahead of it have gone, or began anew.
const STALE_ROUNDS: u64 = 4;

/// What a batch of a stream consists of, whoever asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BatchKey {
    pub(super) epoch: u64,
    pub(super) first_position: u64,
    pub(super) n_samples: u32,
    pub(super) policy_id: [u8; 16],
}

impl BatchKey {
    fn place(&self) -> (u64, u64) {
        (self.epoch, self.first_position)
    }
}

/// Where a member finds its batch. Each but `Own` counts the member as a reader of that slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In this slot of the window.
    Ready(u32),
    /// There, once the job that another member began is done.
    Soon(u32),
    /// There, once the member has begun the job.
    Fill(u32),
    /// In a slot of its own: it is alone, or behind the window.
    Own,
}

/// The shared memory of a window.
#[derive(Debug)]
pub(super) struct WindowMemory {
    /// Tells its jobs from those of sessions.
    pub(super) id: u64,
    /// As many slots as a window may ever have: pages are taken when they are written first.
    pub(super) slab: Arc<Slab>,
    /// How many batches the members may be apart and still share, beside those that they hold.
    pub(super) n_apart: u32,
}

#[derive(Debug, Default)]
struct WindowSlot {
    content: Option<BatchKey>,
    is_filling: bool,
    n_readers: u32,
    /// The window's clock when it was asked for last.
    used: u64,
    /// Readers that wait for the content.
    waiting: Vec<JobTag>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Window {
    pub(super) memory: Arc<WindowMemory>,
    slots: Vec<WindowSlot>,
    /// Slots for members that are apart.
    n_apart: usize,
    /// Slots that the members can hold at once.
    n_held_max: usize,
    n_members: usize,
    /// Counts questions.
    clock: u64,
}

impl Window {
    pub(super) fn new(memory: Arc<WindowMemory>) -> Self {
        let n_apart = memory.n_apart as usize;
        Self { memory, slots: Vec::new(), n_apart, n_held_max: 0, n_members: 0, clock: 0 }
    }

    /// A member with so many slots of its own came.
    pub(super) fn join(&mut self, n_slots: u32) {
        self.n_members += 1;
        self.n_held_max += n_slots as usize;
        let n_slots = self.n_usable().max(self.slots.len());
        self.slots.resize_with(n_slots, WindowSlot::default);
    }

    /// A member has left; it has released what it held.
    pub(super) fn leave(&mut self, session: u64, n_slots: u32) {
        self.n_members -= 1;
        self.n_held_max -= n_slots as usize;
        for slot in &mut self.slots {
            slot.waiting.retain(|tag| tag.session != session);
        }
    }

    /// Slots that new batches may take.
    fn n_usable(&self) -> usize {
        (self.n_apart + self.n_held_max).min(self.memory.slab.n_slots() as usize)
    }

    /// Whether there is anybody to share with.
    pub(super) fn has_company(&self) -> bool {
        self.n_members > 1
    }

    /// Nobody reads it, and no job writes to it.
    pub(super) fn is_over(&self) -> bool {
        self.n_members == 0 && self.slots.iter().all(|slot| !slot.is_filling)
    }

    /// Where the batch `key` is, for the member's slot that `tag` names.
    pub(super) fn want(&mut self, key: BatchKey, tag: JobTag) -> Place {
        self.clock += 1;
        if !self.has_company() {
            return Place::Own;
        }
        let found = self.slots.iter().position(|slot| slot.content == Some(key));
        let Some(idx) = found.or_else(|| self.room_for(key)) else { return Place::Own };
        let slot = &mut self.slots[idx];
        slot.used = self.clock;
        slot.n_readers += 1;
        let number = number(idx);
        if found.is_none() {
            slot.content = Some(key);
            slot.is_filling = true;
            slot.waiting.push(tag);
            Place::Fill(number)
        } else if slot.is_filling {
            slot.waiting.push(tag);
            Place::Soon(number)
        } else {
            Place::Ready(number)
        }
    }

    /// A slot without readers: an empty one, or else the one whose batch is due first, if that is
    /// before `key`; or one that is stale.
    fn room_for(&self, key: BatchKey) -> Option<usize> {
        let stale_after = STALE_ROUNDS * self.slots.len() as u64;
        let unread = self.slots.iter().take(self.n_usable()).enumerate();
        let unread = unread.filter(|(_, slot)| slot.n_readers == 0 && !slot.is_filling);
        let place = |slot: &WindowSlot| slot.content.as_ref().map(BatchKey::place);
        let (first, slot) = unread.clone().min_by_key(|(_, slot)| place(slot))?;
        if place(slot) < Some(key.place()) {
            return Some(first);
        }
        let (oldest, slot) = unread.min_by_key(|(_, slot)| slot.used)?;
        (self.clock - slot.used > stale_after).then_some(oldest)
    }

    /// A job of this window is done, well or not; gives those who wait for it.
    pub(super) fn filled(&mut self, slot: u32, is_good: bool) -> Vec<JobTag> {
        let slot = &mut self.slots[slot as usize];
        assert!(slot.is_filling, "a window's slot was being filled");
        slot.is_filling = false;
        if !is_good {
            slot.content = None;
        }
        std::mem::take(&mut slot.waiting)
    }

    /// A reader has done with a slot.
    pub(super) fn release(&mut self, slot: u32) {
        let slot = &mut self.slots[slot as usize];
        slot.n_readers = slot.n_readers.checked_sub(1).expect("each reader releases once");
    }

    /// Slots whose content is being read.
    #[cfg(test)]
    fn n_read(&self) -> usize {
        self.slots.iter().filter(|slot| slot.n_readers > 0).count()
    }
}

fn number(idx: usize) -> u32 {
    u32::try_from(idx).expect("a window has few slots")
}

#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
