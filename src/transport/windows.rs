//! Which members of which group read one window.
//!
//! Owns the map from a group's stream to its memory, which lives as long as any member or job. What
//! lies in the memory, `window` knows.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use tracing::warn;

use super::request::fill_random;
use super::session::Session;
use super::slab::Slab;
use super::window::WindowMemory;
use super::wire::GroupMode;
use crate::limits::SLAB_BYTES_MAX;

/// So many bytes of batches may members be apart and still read the same ones.
const APART_BYTES: usize = 128 << 20;
/// And at most so many batches.
const APART_MAX: usize = 256;
/// Slots of the largest window.
const WINDOW_SLOTS_MAX: u64 = 8192;

/// What members must have in common, so that a batch of one is a batch of the other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct WindowKey {
    dataset: String,
    split: String,
    fingerprint: String,
    recipe_json: String,
    group: String,
    seed: u64,
    batch_size: u32,
    shuffle: bool,
    /// A user's batches are no other user's business.
    uid: Option<u32>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Windows {
    known: HashMap<WindowKey, Weak<WindowMemory>>,
}

impl Windows {
    /// The window of a local session's group; `None` if it is in no broadcast group, or there is
    /// no memory for a window: then every member's batches are made for it alone.
    pub(super) fn window_of(&mut self, session: &Session) -> Option<Arc<WindowMemory>> {
        let request = &session.request;
        let is_member = request.mode == GroupMode::Broadcast && !request.group.is_empty();
        if !is_member || request.replay {
            return None;
        }
        let key = WindowKey {
            dataset: request.dataset.clone(),
            split: request.split.clone(),
            fingerprint: session.stream.spec.split.info().fingerprint.0.clone(),
            recipe_json: session.stream.recipe_json.clone(),
            group: request.group.clone(),
            seed: request.seed,
            batch_size: request.batch_size,
            shuffle: request.shuffle,
            uid: session.peer.uid,
        };
        self.known.retain(|_, memory| memory.strong_count() > 0);
        if let Some(memory) = self.known.get(&key).and_then(Weak::upgrade) {
            return Some(memory);
        }
        let layout = *session.slab.layout();
        let slot_bytes = layout.slot_bytes.max(1);
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let n_apart = small((APART_BYTES / slot_bytes).min(APART_MAX) as u64);
        let n_slots = small((SLAB_BYTES_MAX / slot_bytes as u64).min(WINDOW_SLOTS_MAX));
        let shape = *session.stream.spec.recipe.shape();
        let slab = match Slab::for_readers(layout, shape, n_slots) {
            Ok(slab) => Arc::new(slab),
            Err(error) => {
                let group = &key.group;
                warn!(group, %error, "no memory that a group can share: each member gets its own");
                return None;
            }
        };
        let mut id = [0; 8];
        fill_random(&mut id).ok()?;
        let memory = Arc::new(WindowMemory { id: u64::from_le_bytes(id), slab, n_apart });
        self.known.insert(key, Arc::downgrade(&memory));
        Some(memory)
    }
}
