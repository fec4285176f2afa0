//! Shared memory: one sealed memfd per consumer, and one per broadcast group, cut into slots.
//!
//! *Justification of `unsafe`*: pixels must reach another process without a copy, so worker threads
//! write into a shared mapping in place. What makes it sound is the loan: a slot is lent to one job
//! at a time (checked at run time), a job's threads get disjoint parts of it, and the mapping lives
//! as long as any loan. The peer process may scribble over its own slots: the daemon only writes
//! pixels there, never reads them back to decide anything. The memory of a group is sealed against
//! every other process's writing: a member's writes are its own (it maps it privately).

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags};

use crate::gpu::{FinishedLayout, HostSlab};
use crate::pipeline::render::{OutputShape, SlotLayout};
use crate::pipeline::workers::BatchOutput;

/// The memory of one consumer or group.
#[derive(Debug)]
pub(super) struct Slab {
    map: MmapRaw,
    fd: OwnedFd,
    layout: SlotLayout,
    shape: OutputShape,
    /// Per slot: a job is writing to it.
    lent: Box<[AtomicBool]>,
}

/// Ends a loan when the last part of the job is dropped.
struct Loan {
    slab: Arc<Slab>,
    slot: usize,
}

impl Drop for Loan {
    fn drop(&mut self) {
        // Release: the next borrower sees everything this one wrote.
        self.slab.lent[self.slot].store(false, Ordering::Release);
    }
}

impl Slab {
    /// Makes `n_slots` slots of zero bytes. Pages are taken from the system when first written.
    ///
    /// The file is sealed against resizing, so that no peer can make the daemon's writes fault.
    ///
    /// # Errors
    /// The system refuses the memory.
    pub(super) fn new(layout: SlotLayout, shape: OutputShape, n_slots: u32) -> io::Result<Self> {
        Self::sealed(layout, shape, n_slots, SealFlags::empty())
    }

    /// The same for several consumers, none of which can write to it.
    ///
    /// # Errors
    /// The system refuses the memory, or is older than Linux 5.1.
    pub(super) fn for_readers(
        layout: SlotLayout,
        shape: OutputShape,
        n_slots: u32,
    ) -> io::Result<Self> {
        Self::sealed(layout, shape, n_slots, SealFlags::FUTURE_WRITE)
    }

    fn sealed(
        layout: SlotLayout,
        shape: OutputShape,
        n_slots: u32,
        seals: SealFlags,
    ) -> io::Result<Self> {
        let n_bytes = layout.slot_bytes.checked_mul(n_slots as usize).ok_or_else(|| {
            io::Error::new(io::ErrorKind::OutOfMemory, "the slab's size overflows")
        })?;
        let fd = rustix::fs::memfd_create(
            "fastaa-slab",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        rustix::fs::ftruncate(&fd, n_bytes as u64)?;
        // Before the seals, one of which forbids a further map like this one.
        let map = MmapOptions::new().len(n_bytes).map_raw(&fd)?;
        let seals = seals | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals)?;
        let lent = (0..n_slots).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { map, fd, layout, shape, lent })
    }

    /// Number of slots.
    pub(super) fn n_slots(&self) -> u32 {
        u32::try_from(self.lent.len()).expect("made from a u32")
    }

    /// Where the parts of each slot lie.
    pub(super) fn layout(&self) -> &SlotLayout {
        &self.layout
    }

    /// Lends the first `n_samples` places of `slot` to one job.
    ///
    /// # Panics
    /// If the slot is lent already, or the slot or samples are out of range: pixels would be wrong.
    ///
    /// # Safety
    /// The slices of the result must not be used after its `keep_alive` and all clones are dropped.
    #[allow(unsafe_code, reason = "see the module's justification")]
    pub(super) unsafe fn lend(self: &Arc<Self>, slot: u32, n_samples: usize) -> BatchOutput {
        let slot = slot as usize;
        // Acquire: pairs with the Release of the loan before.
        let was_lent = self.lent[slot].swap(true, Ordering::Acquire);
        assert!(!was_lent, "slot {slot} is lent twice");
        let layout = self.layout;
        let n_pixel_bytes = n_samples * self.shape.pixel_bytes();
        let n_label_bytes = n_samples * self.shape.label_bytes();
        let n_index_bytes = n_samples * size_of::<i64>();
        assert!(
            n_pixel_bytes <= layout.labels_offset
                && layout.labels_offset + n_label_bytes <= layout.indices_offset
                && layout.indices_offset + n_index_bytes <= layout.slot_bytes,
            "{n_samples} samples do not fit slot {slot}"
        );
        assert!((slot + 1) * layout.slot_bytes <= self.map.len(), "slot {slot} is outside the map");
        let part = |offset: usize, n_bytes: usize| {
            let begin = slot * layout.slot_bytes + offset;
            // SAFETY: `begin + n_bytes` is inside the map (both assertions above), the map is
            // readable and writable and at least as aligned as bytes need, and lives until
            // `keep_alive`, which owns the slab, is dropped (the caller's promise). The three parts
            // do not overlap (first assertion), other slots begin elsewhere, and no second loan of
            // this slot exists (`lent`), so no other reference in this process covers the bytes.
            unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(begin), n_bytes) }
        };
        let keep_alive: Arc<dyn Any + Send + Sync> =
            Arc::new(Loan { slab: Arc::clone(self), slot });
        BatchOutput {
            pixels: part(0, n_pixel_bytes),
            labels: part(layout.labels_offset, n_label_bytes),
            indices: part(layout.indices_offset, n_index_bytes),
            keep_alive,
        }
    }

    /// The memory, for a GPU that is to copy slots of it, and to finish them there.
    pub(super) fn for_gpu(self: &Arc<Self>, finished: Option<FinishedLayout>) -> HostSlab {
        HostSlab {
            address: self.map.as_mut_ptr().expose_provenance(),
            slot_bytes: self.layout.slot_bytes,
            n_slots: self.n_slots(),
            keep_alive: Arc::clone(self) as _,
            finished,
        }
    }

    /// The indices of the first `n_samples` samples of a slot that is filled.
    ///
    /// # Panics
    /// If the slot is lent, or has no room for so many.
    #[allow(unsafe_code, reason = "see the module's justification")]
    pub(super) fn indices_of(&self, slot: u32, n_samples: usize) -> Vec<i64> {
        let slot = slot as usize;
        assert!(!self.lent[slot].load(Ordering::Acquire), "slot {slot} is being written");
        let begin = slot * self.layout.slot_bytes + self.layout.indices_offset;
        let n_bytes = n_samples * size_of::<i64>();
        assert!(begin + n_bytes <= self.map.len(), "slot {slot} is outside the map");
        // SAFETY: the range is inside the map (assertion), and no thread of this process writes to
        // it: the slot isn't lent, and only the caller (the one server thread) could lend it. What
        // the consumer may write there meanwhile is bytes, of which any are an index.
        let bytes = unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(begin), n_bytes) };
        bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_ne_bytes(*bytes)).collect()
    }

    /// A copy of a whole slot, for consumers without shared memory.
    ///
    /// # Panics
    /// If the slot is lent: its bytes would be torn.
    #[allow(unsafe_code, reason = "see the module's justification")]
    pub(super) fn copy_of(&self, slot: u32) -> Vec<u8> {
        let slot = slot as usize;
        assert!(!self.lent[slot].load(Ordering::Acquire), "slot {slot} is being written");
        let begin = slot * self.layout.slot_bytes;
        assert!(begin + self.layout.slot_bytes <= self.map.len(), "slot {slot} is outside the map");
        // SAFETY: the range is inside the map (assertion), and nobody writes to it: the slot isn't
        // lent, only the caller (the one server thread) could lend it, and the slabs of consumers
        // without shared memory are known to this process alone.
        let bytes = unsafe {
            std::slice::from_raw_parts(self.map.as_ptr().add(begin), self.layout.slot_bytes)
        };
        bytes.to_vec()
    }
}

impl AsFd for Slab {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
