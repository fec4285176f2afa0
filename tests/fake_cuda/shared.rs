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

    /// What another process has made; a file says so, as long as it is open here.
    pub(crate) fn open(name: u64) -> Option<Self> {
        let file = OpenOptions::new().read(true).write(true).open(Self::path(name)).ok()?;
        File::create(Self::opened(name, std::process::id())).expect("a new file");
        Some(Self { name, is_owner: false, map: Self::map(&file) })
    }

    fn map(file: &File) -> MmapRaw {
        MmapOptions::new().map_raw(file).expect("is mapped")
    }

    pub(crate) fn counter(&self, at: usize) -> &AtomicU64 {
        unsafe { &*self.map.as_mut_ptr().cast::<AtomicU64>().add(at) }
    }
}

impl Shared {
    fn opened(name: u64, process: u32) -> PathBuf {
        super::folder().join(format!("opened-{name:016x}-{process}"))
    }

    /// CUDA leaves undefined what comes of using what a process has made that has ended.
    pub(crate) fn is_used(&self) {
        let maker = (self.name >> 32) as u32;
        if !self.is_owner && !is_alive(maker) {
            misused(&format!("event of {maker}, which has ended"));
        }
    }

    /// And of destroying what another process has open.
    fn is_destroyed(&self) {
        let prefix = format!("opened-{:016x}-", self.name);
        let files = std::fs::read_dir(super::folder()).into_iter().flatten().flatten();
        for file in files {
            let name = file.file_name().to_string_lossy().into_owned();
            let process = name.strip_prefix(&prefix).and_then(|number| number.parse().ok());
            if process.is_some_and(is_alive) {
                misused(&format!("{name} is destroyed"));
            }
        }
    }
}

/// Tests look for the file.
fn misused(what: &str) {
    let _ = std::fs::write(super::folder().join("misused"), what);
}

/// A zombie is not.
fn is_alive(process: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/stat"));
    status.is_ok_and(|status| !status.rsplit(')').next().unwrap_or("").starts_with(" Z"))
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.is_owner {
            self.is_destroyed();
            let _ = std::fs::remove_file(Self::path(self.name));
        } else {
            let _ = std::fs::remove_file(Self::opened(self.name, std::process::id()));
        }
    }
}
