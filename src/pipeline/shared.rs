//! Decoded images that several streams use: one decode, many augmentations.
//!
//! Owns a bounded window of whole images, by (split, sample, how it was decoded). Streams join for
//! as long as they live; a single one never stores anything. An image is dropped when as many have
//! taken it as there were others to take it, or when newer ones need its place: whoever comes later
//! decodes for himself. What is in the window never changes a byte of a sample: what a stream would
//! not take from its own whole decode, it does not take from here (`load`).

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::image::Image;
use crate::image::decode::DecodeOptions;

/// Images after which it is asked whether anybody took them.
const TRIAL_IMAGES: u32 = 128;

/// Samples for which streams that gain nothing from the window decode for themselves, before it is
/// tried again: their orders differ, or they are too far apart.
const REST_SAMPLES: u32 = 2048;

/// Images whose memory is kept for the next ones.
const SPARE_MAX: usize = 16;

/// A whole image.
#[derive(Debug, Default)]
pub struct SharedImage {
    /// Its pixels.
    pub image: Image,
    /// Whether its decoder could have reduced it, which some crops want instead.
    pub is_reducible: bool,
}

/// Whose images, decoded how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    split: usize,
    options: DecodeOptions,
}

/// The window, for all datasets of a daemon.
#[derive(Debug)]
pub struct DecodedWindow {
    bytes_max: usize,
    state: Mutex<State>,
    counters: SharedCounters,
}

/// Counters of the window, since its making.
#[derive(Debug, Default)]
pub struct SharedCounters {
    /// Whole images that were decoded for several streams.
    pub decoded: AtomicU64,
    /// Times that another stream took one of them instead of decoding for itself.
    pub taken: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Streams by kind.
    members: HashMap<Kind, Arc<Members>>,
    images: HashMap<(Kind, u64), Entry>,
    /// Oldest first; entries that are gone are skipped by their number.
    order: VecDeque<((Kind, u64), u64)>,
    bytes: usize,
    next_number: u64,
    spare: Vec<SharedImage>,
}

#[derive(Debug)]
struct Entry {
    image: Arc<SharedImage>,
    n_left: usize,
    number: u64,
}

/// The streams of one kind, and whether sharing pays for them.
#[derive(Debug, Default)]
struct Members {
    n: AtomicUsize,
    /// Images of the trial under way: put into the window, and taken from it.
    n_put: AtomicU32,
    n_taken: AtomicU32,
    /// Samples until the next trial.
    n_rest: AtomicU32,
}

impl Members {
    /// Whether an image should be decoded for all. Counts are rough on purpose: threads race here,
    /// and what they decide changes costs, never pixels.
    fn should_try(&self) -> bool {
        let n_rest = self.n_rest.load(Ordering::Relaxed);
        if n_rest > 0 {
            self.n_rest.store(n_rest - 1, Ordering::Relaxed);
            return false;
        }
        if self.n_put.load(Ordering::Relaxed) < TRIAL_IMAGES {
            return true;
        }
        let n_put = self.n_put.swap(0, Ordering::Relaxed);
        let is_useful = self.n_taken.swap(0, Ordering::Relaxed) >= n_put / 2;
        if !is_useful {
            self.n_rest.store(REST_SAMPLES, Ordering::Relaxed);
        }
        is_useful
    }
}

/// A stream's part in the window; ends when it is dropped.
#[derive(Debug)]
pub struct Membership {
    window: Arc<DecodedWindow>,
    kind: Kind,
    members: Arc<Members>,
}

impl DecodedWindow {
    /// A window of at most `bytes_max` bytes of pixels; 0: nothing is shared.
    pub fn new(bytes_max: usize) -> Arc<Self> {
        let (state, counters) = (Mutex::default(), SharedCounters::default());
        Arc::new(Self { bytes_max, state, counters })
    }

    /// Joins a stream that reads the split numbered `split`, decoded so.
    pub fn join(self: &Arc<Self>, split: usize, options: DecodeOptions) -> Membership {
        let kind = Kind { split, options };
        let mut state = self.lock();
        let members = Arc::clone(state.members.entry(kind).or_default());
        members.n.fetch_add(1, Ordering::Relaxed);
        Membership { window: Arc::clone(self), kind, members }
    }

    /// What it was good for.
    pub fn counters(&self) -> &SharedCounters {
        &self.counters
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Membership {
    /// Streams that read the same images, this one included.
    pub fn n_members(&self) -> usize {
        self.members.n.load(Ordering::Relaxed)
    }

    /// Whether decoding a whole image can pay: somebody else may want it, there is room, and the
    /// last ones were taken.
    pub fn is_worthwhile(&self, n_pixels: usize) -> bool {
        let bytes = n_pixels.saturating_mul(self.kind.options.channels);
        self.n_members() > 1
            && bytes.saturating_mul(2) <= self.window.bytes_max
            && self.members.should_try()
    }

    /// The sample's image, if it is in the window.
    pub fn get(&self, sample_idx: u64) -> Option<Arc<SharedImage>> {
        if self.n_members() < 2 {
            return None;
        }
        let mut state = self.window.lock();
        let entry = state.images.get_mut(&(self.kind, sample_idx))?;
        entry.n_left -= 1;
        let image = Arc::clone(&entry.image);
        if entry.n_left == 0 {
            state.forget((self.kind, sample_idx));
        }
        self.members.n_taken.fetch_add(1, Ordering::Relaxed);
        self.window.counters.taken.fetch_add(1, Ordering::Relaxed);
        Some(image)
    }

    /// An image to decode into: one that is not needed any more, with its memory.
    pub fn spare(&self) -> SharedImage {
        self.window.lock().spare.pop().unwrap_or_default()
    }

    /// Puts a sample's image into the window, for the others.
    pub fn put(&self, sample_idx: u64, image: Arc<SharedImage>) {
        let n_others = self.n_members().saturating_sub(1);
        let mut state = self.window.lock();
        let key = (self.kind, sample_idx);
        if n_others == 0 || state.images.contains_key(&key) {
            return;
        }
        self.members.n_put.fetch_add(1, Ordering::Relaxed);
        self.window.counters.decoded.fetch_add(1, Ordering::Relaxed);
        state.bytes += image.image.data.len();
        let number = state.next_number;
        state.next_number += 1;
        state.images.insert(key, Entry { image, n_left: n_others, number });
        state.order.push_back((key, number));
        while state.bytes > self.window.bytes_max
            && let Some((oldest, number)) = state.order.pop_front()
        {
            if state.images.get(&oldest).is_some_and(|entry| entry.number == number) {
                state.forget(oldest);
            }
        }
    }

    /// Hands an image back that nobody needs; its memory is used again if it is the last to go.
    pub fn give_back(&self, image: Arc<SharedImage>) {
        if let Some(image) = Arc::into_inner(image) {
            let mut state = self.window.lock();
            if state.spare.len() < SPARE_MAX {
                state.spare.push(image);
            }
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let left = self.members.n.fetch_sub(1, Ordering::Relaxed) - 1;
        if left > 1 {
            return;
        }
        let mut state = self.window.lock();
        let keys: Vec<_> = state.images.keys().filter(|key| key.0 == self.kind).copied().collect();
        for key in keys {
            state.forget(key);
        }
        if self.members.n.load(Ordering::Relaxed) == 0 {
            state.members.remove(&self.kind);
        }
        if state.members.is_empty() {
            state.spare.clear();
        }
    }
}

impl State {
    fn forget(&mut self, key: (Kind, u64)) {
        let Some(entry) = self.images.remove(&key) else { return };
        self.bytes -= entry.image.image.data.len();
        if self.images.is_empty() {
            self.order.clear();
        }
        // What readers still hold comes back by `give_back`.
        if let Some(image) = Arc::into_inner(entry.image)
            && self.spare.len() < SPARE_MAX
        {
            self.spare.push(image);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: DecodeOptions = DecodeOptions {
        channels: 3,
        turn: false,
        limits: crate::image::decode::DecodeLimits { max_side: 9, max_pixels: 9 },
    };

    fn image(byte: u8) -> Arc<SharedImage> {
        let image = Image { width: 1, height: 1, channels: 3, data: vec![byte; 3] };
        Arc::new(SharedImage { image, is_reducible: false })
    }

    #[test]
    fn each_other_member_takes_an_image_once() {
        let window = DecodedWindow::new(100);
        let [a, b, c] = [0; 3].map(|_| window.join(0, OPTIONS));
        let stranger = window.join(1, OPTIONS);
        a.put(5, image(1));
        assert!(stranger.get(5).is_none() && b.get(6).is_none());
        assert_eq!(b.get(5).unwrap().image.data, [1; 3]);
        assert_eq!(c.get(5).unwrap().image.data, [1; 3]);
        assert!(c.get(5).is_none(), "all others have had it");
        assert_eq!(window.lock().bytes, 0);
    }

    #[test]
    fn a_single_member_stores_nothing_and_the_last_leaves_nothing() {
        let window = DecodedWindow::new(100);
        let a = window.join(0, OPTIONS);
        a.put(1, image(1));
        assert_eq!(window.lock().images.len(), 0);
        assert!(!a.is_worthwhile(1));
        let b = window.join(0, OPTIONS);
        assert!(a.is_worthwhile(1) && !a.is_worthwhile(17), "more than half of the room");
        b.put(1, image(1));
        drop(a);
        assert_eq!(window.lock().images.len(), 0);
        assert_eq!(window.lock().bytes, 0);
        drop(b);
        assert!(window.lock().members.is_empty());
    }

    #[test]
    fn images_that_nobody_takes_are_soon_decoded_by_each_alone() {
        let window = DecodedWindow::new(1000);
        let (a, b) = (window.join(0, OPTIONS), window.join(0, OPTIONS));
        let put = |from: u64, is_taken: bool| {
            let mut n_put = 0;
            for sample in from..from + 5000 {
                if a.is_worthwhile(1) {
                    a.put(sample, image(1));
                    n_put += 1;
                    assert_eq!(b.get(sample + u64::from(!is_taken)).is_some(), is_taken);
                }
            }
            n_put
        };
        assert_eq!(put(0, true), 5000);
        assert!(put(10_000, false) < 5 * TRIAL_IMAGES);
        // The next trial finds that it pays again.
        assert!(put(20_000, true) > 2000);
    }

    #[test]
    fn the_oldest_give_way_and_the_room_is_kept() {
        let window = DecodedWindow::new(7);
        let (a, b) = (window.join(0, OPTIONS), window.join(0, OPTIONS));
        for sample in 0..3 {
            a.put(sample, image(7));
        }
        assert_eq!(window.lock().bytes, 6);
        assert!(b.get(0).is_none());
        assert!(b.get(1).is_some() && b.get(2).is_some());
        for sample in 0..1000 {
            a.put(sample, image(7));
            assert!(b.get(sample).is_some());
        }
        assert!(window.lock().order.len() < 10, "no trace of what was taken");
    }
}
