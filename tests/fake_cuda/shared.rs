//! Memory that several processes map by name: the played GPU's.

use std::fs::{File, OpenOptions};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// A mapped file, known by name to all processes.
pub(crate) struct Shared {
    pub(crate) name: u64,
    pub(crate) is_owner: bool,
    pub(crate) map: MmapRaw,
}

impl Shared {
    fn path(name: u64) -> PathBuf {
        super::folder().join(format!("memory-{name:016x}"))
    }

    pub(crate) fn make(n_bytes: u64) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = u64::from(std::process::id()) << 32 | count;
        let path = Self::path(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let file = file.expect("a new file");
        file.set_len(n_bytes).expect("room");
        Self { name, is_owner: true, map: Self::map(&file) }
    }

    pub(crate) fn open(name: u64) -> Option<Self> {
        let file = OpenOptions::new().read(true).write(true).open(Self::path(name)).ok()?;
        Some(Self { name, is_owner: false, map: Self::map(&file) })
    }

    fn map(file: &File) -> MmapRaw {
        MmapOptions::new().map_raw(file).expect("is mapped")
    }

    pub(crate) fn counter(&self, at: usize) -> &AtomicU64 {
        unsafe { &*self.map.as_mut_ptr().cast::<AtomicU64>().add(at) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.is_owner {
            let _ = std::fs::remove_file(Self::path(self.name));
        }
    }
}
