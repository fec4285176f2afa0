//! Images that several streams use: made once, augmented by each.
//!
//! Owns a bounded window of two kinds of images. **Loaded** ones are decoded, cropped and resized:
//! they are the same for streams of one split, seed and crop, whatever their policies. **Whole**
//! ones are decoded only, and serve streams whose crops differ. An image is dropped when as many
//! have taken it as there were others to take it, or when newer ones need its place: whoever comes
//! later makes it for himself. A single stream never stores anything. What is in the window never
//! changes a byte of a sample: what a stream would not make of its own whole decode, it does not
//! make of one from here (`load`).

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::image::decode::DecodeOptions;
use crate::image::{Image, PADDED};

/// Images after which it is asked whether anybody took them.
const TRIAL_IMAGES: u32 = 128;

/// Images that streams which gain nothing from the window make for themselves, before it is tried
/// again: their orders differ, or they are too far apart.
const REST_IMAGES: u32 = 2048;

/// Memory of an entry beside the pixels.
const ENTRY_BYTES: usize = 256;

/// Images whose memory is kept for the next ones.
const SPARE_MAX: usize = 16;

/// An image in the window.
#[derive(Debug, Default)]
pub struct SharedImage {
    /// Its pixels.
    pub image: Image,
    /// Whether its decoder could have reduced it, which some crops want instead. Of whole images.
    pub is_reducible: bool,
}

/// Which image of a kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ImagePlace {
    /// Of which sample.
    pub sample_idx: u64,
    /// In which epoch its crop was drawn; 0 of whole images.
    pub epoch: u64,
    /// By which view; 0 of whole images.
    pub view: u64,
}

/// What all images of a kind have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Kind {
    split: usize,
    options: DecodeOptions,
    /// Seed and crop of loaded images; `None`: whole ones.
    loading: Option<(u64, String)>,
}

type Key = (u64, ImagePlace);

/// The window, for all datasets of a daemon.
#[derive(Debug)]
pub struct DecodedWindow {
    bytes_max: usize,
    state: Mutex<State>,
    /// Told when an image that was being made is there, or will not be.
    made: Condvar,
    counters: SharedCounters,
}

/// Counters of the window, since its making.
#[derive(Debug, Default)]
pub struct SharedCounters {
    /// Images that were made for several streams.
    pub decoded: AtomicU64,
    /// Times that another stream took one of them instead of making it itself.
    pub taken: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    members: HashMap<Kind, Arc<Members>>,
    images: HashMap<Key, Entry>,
    /// Oldest first; entries that are gone are skipped by their number.
    order: VecDeque<(Key, u64)>,
    bytes: usize,
    next_number: u64,
    spare: Vec<SharedImage>,
}

#[derive(Debug)]
enum Entry {
    /// Some worker is at it.
    Making,
    Ready {
        image: Arc<SharedImage>,
        n_left: usize,
        number: u64,
    },
}

/// The members of one kind, and whether sharing pays for them.
#[derive(Debug)]
struct Members {
    id: u64,
    n: AtomicUsize,
    /// Images of the trial under way: put into the window, and taken from it.
    n_put: AtomicU32,
    n_taken: AtomicU32,
    /// Images until the next trial.
    n_rest: AtomicU32,
    /// Their one part in the whole images, from which they make theirs.
    whole: Option<Membership>,
}

impl Members {
    /// Whether an image should be made for all. Counts are rough on purpose: threads race here,
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
            self.n_rest.store(REST_IMAGES, Ordering::Relaxed);
        }
        is_useful
    }
}

/// A part in the images of one kind; ends when it is dropped.
#[derive(Debug)]
pub struct Membership {
    window: Arc<DecodedWindow>,
    kind: Kind,
    members: Arc<Members>,
}

/// What is to be done for an image.
#[derive(Debug)]
pub enum Claim<'a> {
    /// Here it is.
    Ready(Arc<SharedImage>),
    /// Make it, for the others, too, who wait for it until then.
    Mine(Making<'a>),
    /// Make it for yourself.
    Alone,
}

/// The promise to make an image; without [`Self::put`] it is taken back.
#[derive(Debug)]
pub struct Making<'a> {
    membership: &'a Membership,
    place: ImagePlace,
}

impl DecodedWindow {
    /// A window of at most `bytes_max` bytes of pixels; 0: nothing is shared.
    pub fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes_max,
            state: Mutex::default(),
            made: Condvar::new(),
            counters: SharedCounters::default(),
        })
    }

    /// Joins a stream that reads the split numbered `split`, decoded so, whose crops are drawn by
    /// `seed` and `crop` (all that they depend on, in any words).
    pub fn join(
        self: &Arc<Self>,
        split: usize,
        options: DecodeOptions,
        seed: u64,
        crop: String,
    ) -> Membership {
        let loaded = Kind { split, options, loading: Some((seed, crop)) };
        let whole = Kind { split, options, loading: None };
        let mut state = self.lock();
        let whole =
            (!state.members.contains_key(&loaded)).then(|| self.join_kind(&mut state, whole, None));
        self.join_kind(&mut state, loaded, whole)
    }

    fn join_kind(
        self: &Arc<Self>,
        state: &mut State,
        kind: Kind,
        whole: Option<Membership>,
    ) -> Membership {
        let id = state.next_number;
        state.next_number += 1;
        let members = state.members.entry(kind.clone()).or_insert_with(|| {
            let (n, [n_put, n_taken, n_rest]) = (AtomicUsize::new(0), Default::default());
            Arc::new(Members { id, n, n_put, n_taken, n_rest, whole })
        });
        members.n.fetch_add(1, Ordering::Relaxed);
        Membership { window: Arc::clone(self), kind, members: Arc::clone(members) }
    }

    /// What it was good for.
    pub fn counters(&self) -> &SharedCounters {
        &self.counters
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Membership {
    /// How many members there are, this one included.
    pub fn n_members(&self) -> usize {
        self.members.n.load(Ordering::Relaxed)
    }

    /// The whole images that this kind's are made of. All its members together are one there.
    pub fn whole(&self) -> Option<&Self> {
        self.members.whole.as_ref()
    }

    /// The image, if it is in the window or being made for it, which is waited for.
    pub fn get(&self, place: ImagePlace) -> Option<Arc<SharedImage>> {
        if self.n_members() < 2 {
            return None;
        }
        self.wait_for(self.window.lock(), place).1
    }

    /// What to do for an image of `n_pixels`: it is there, or the others want it as well, or nobody
    /// else does, or there is no room, or the last ones were not taken.
    pub fn claim(&self, place: ImagePlace, n_pixels: usize) -> Claim<'_> {
        if self.n_members() < 2 {
            return Claim::Alone;
        }
        let (mut state, ready) = self.wait_for(self.window.lock(), place);
        if let Some(image) = ready {
            return Claim::Ready(image);
        }
        let pixel_bytes = if self.kind.options.channels == 1 { 1 } else { PADDED };
        let bytes = n_pixels.saturating_mul(pixel_bytes);
        if bytes.saturating_mul(2) > self.window.bytes_max || !self.members.should_try() {
            return Claim::Alone;
        }
        state.images.insert((self.members.id, place), Entry::Making);
        Claim::Mine(Making { membership: self, place })
    }

    /// Takes an image; whoever finds one in the making waits.
    fn wait_for<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        place: ImagePlace,
    ) -> (MutexGuard<'a, State>, Option<Arc<SharedImage>>) {
        let key = (self.members.id, place);
        while let Some(Entry::Making) = state.images.get(&key) {
            state = self.window.made.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let Some(Entry::Ready { image, n_left, .. }) = state.images.get_mut(&key) else {
            return (state, None);
        };
        *n_left -= 1;
        let (image, is_last) = (Arc::clone(image), *n_left == 0);
        if is_last {
            state.forget(key);
        }
        self.members.n_taken.fetch_add(1, Ordering::Relaxed);
        self.window.counters.taken.fetch_add(1, Ordering::Relaxed);
        (state, Some(image))
    }

    /// An image to make: one that is not needed any more, with its memory.
    pub fn spare(&self) -> SharedImage {
        self.window.lock().spare.pop().unwrap_or_default()
    }

    /// Hands an image back that nobody needs; its memory is used again if it is the last to go.
    pub fn give_back(&self, image: Arc<SharedImage>) {
        if let Some(image) = Arc::into_inner(image) {
            self.window.lock().keep(image);
        }
    }
}

impl Making<'_> {
    /// Puts the image into the window, for the others.
    pub fn put(self, image: Arc<SharedImage>) {
        let Membership { window, members, .. } = self.membership;
        let n_left = self.membership.n_members().saturating_sub(1);
        let mut state = window.lock();
        if n_left == 0 {
            return;
        }
        members.n_put.fetch_add(1, Ordering::Relaxed);
        window.counters.decoded.fetch_add(1, Ordering::Relaxed);
        state.bytes += room_of(&image);
        let number = state.next_number;
        state.next_number += 1;
        let key = (members.id, self.place);
        state.images.insert(key, Entry::Ready { image, n_left, number });
        state.order.push_back((key, number));
        state.tidy_order();
        while state.bytes > window.bytes_max
            && let Some((oldest, n)) = state.order.pop_front()
        {
            let is_it =
                |entry: &Entry| matches!(entry, Entry::Ready { number, .. } if *number == n);
            if state.images.get(&oldest).is_some_and(is_it) {
                state.forget(oldest);
            }
        }
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        let Membership { window, members, .. } = self.membership;
        let mut state = window.lock();
        let key = (members.id, self.place);
        if matches!(state.images.get(&key), Some(Entry::Making)) {
            state.images.remove(&key);
        }
        drop(state);
        window.made.notify_all();
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut state = self.window.lock();
        let n_left = self.members.n.fetch_sub(1, Ordering::Relaxed) - 1;
        if n_left > 1 {
            return;
        }
        let is_own = |key: &Key, entry: &Entry| {
            key.0 == self.members.id && matches!(entry, Entry::Ready { .. })
        };
        let own = state.images.iter().filter(|(key, entry)| is_own(key, entry));
        let keys: Vec<_> = own.map(|(key, _)| *key).collect();
        for key in keys {
            state.forget(key);
        }
        if n_left == 0 {
            state.members.remove(&self.kind);
        }
        if state.members.is_empty() {
            state.spare.clear();
        }
        // The kind's part in the whole images ends with `self.members`, after the lock.
    }
}

/// Bytes that an image costs in the window: its pixels, and about what it takes to find it.
fn room_of(image: &SharedImage) -> usize {
    image.image.data.len() + ENTRY_BYTES
}

impl State {
    fn forget(&mut self, key: Key) {
        let Some(Entry::Ready { image, .. }) = self.images.remove(&key) else { return };
        self.bytes -= room_of(&image);
        if self.images.is_empty() {
            self.order.clear();
        }
        // What readers still hold comes back by `give_back`.
        if let Some(image) = Arc::into_inner(image) {
            self.keep(image);
        }
    }

    /// Leaves out entries that are gone, when there are more of these than others.
    fn tidy_order(&mut self) {
        let Self { images, order, .. } = self;
        if order.len() > 2 * images.len() + SPARE_MAX {
            order.retain(|(key, n)| {
                matches!(images.get(key), Some(Entry::Ready { number, .. }) if number == n)
            });
        }
    }

    fn keep(&mut self, image: SharedImage) {
        if self.spare.len() < SPARE_MAX {
            self.spare.push(image);
        }
    }
}

#[cfg(test)]
#[path = "shared_tests.rs"]
mod tests;
