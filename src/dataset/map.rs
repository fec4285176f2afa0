//! Read-only maps of whole files. The one place of this module with `unsafe`.
//!
//! *Justification*: samples are handed out as slices of the file, from any thread, without a copy
//! and without a system call per sample; only a map does that. Labels that are `f32` vectors are
//! viewed in place for the same reason.
//!
//! *Limits*: a map is as long as the file was when it was opened. The daemon and its tools replace
//! files by temp + rename and never truncate them, so the pages of an open map stay. If somebody
//! else truncates the file in place, touching the lost pages raises SIGBUS, as in every program
//! that maps files; content that somebody else rewrites in place is seen as other pixels.

use std::fs::{self, File};
use std::ops::Range;
use std::path::Path;

use memmap2::{Advice, Mmap, MmapOptions};

use super::DatasetError;

#[cfg(target_endian = "big")]
compile_error!("packed files are little-endian and viewed in place");

/// Files above this size are not expected to stay in memory, in bytes.
const RANDOM_FILE_BYTES_MIN: usize = 1 << 30;

/// Samples up to this size gain nothing from the kernel's read-ahead, in bytes: two pages.
const RANDOM_SAMPLE_BYTES_MAX: usize = 8192;

/// A whole file, mapped read-only.
#[derive(Debug)]
pub(super) struct Map {
    bytes: Mmap,
    name: String,
}

impl Map {
    /// Maps the file at `path`; `name` is what error messages call it.
    ///
    /// # Errors
    /// The file is missing, is no regular file, or cannot be mapped.
    pub(super) fn open(path: &Path, name: String) -> Result<Self, DatasetError> {
        let fail = |source| DatasetError::Io { path: name.clone(), source };
        // Looked at before it is opened: opening a pipe would wait for its writer.
        if !fs::metadata(path).map_err(fail)?.is_file() {
            return Err(DatasetError::NotAFile { path: name });
        }
        let file = File::open(path).map_err(fail)?;
        let len = file.metadata().map_err(fail)?.len();
        let len = usize::try_from(len).map_err(|_| {
            DatasetError::unsupported(&name, "larger than this machine's address space")
        })?;
        let bytes = map_file(&file, len).map_err(fail)?;
        Ok(Self { bytes, name })
    }

    /// The whole file.
    #[inline]
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What error messages call the file.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Tells the kernel to read single pages, where small samples of a large file are read in
    /// random order: its read-ahead would fetch 128 KiB for each of them.
    pub(super) fn expect_samples_of(&self, sample_bytes: usize) {
        if self.bytes.len() >= RANDOM_FILE_BYTES_MIN && sample_bytes <= RANDOM_SAMPLE_BYTES_MAX {
            // A hint: a kernel that refuses it reads more than needed, and nothing else.
            let _ = self.bytes.advise(Advice::Random);
        }
    }

    /// Starts reading a part of the map that will be needed soon. Small parts are left to the
    /// system's read-ahead, which fetches their neighbours as well.
    pub(super) fn will_need(&self, part: &[u8]) {
        let Some(start) = part.as_ptr().addr().checked_sub(self.bytes.as_ptr().addr()) else {
            return;
        };
        let is_inside = start.checked_add(part.len()).is_some_and(|end| end <= self.bytes.len());
        if is_inside && part.len() > RANDOM_SAMPLE_BYTES_MAX {
            // A hint, as above.
            let _ = self.bytes.advise_range(Advice::WillNeed, start, part.len());
        }
    }

    /// A part of the file as little-endian `f32`; `None` if it is outside the file, not aligned to
    /// 4 bytes, or not a whole number of elements.
    #[inline]
    pub(super) fn f32s(&self, range: Range<usize>) -> Option<&[f32]> {
        as_f32s(self.bytes.get(range)?)
    }
}

#[allow(unsafe_code, reason = "mapping a file; see the module's Justification")]
fn map_file(file: &File, len: usize) -> std::io::Result<Mmap> {
    // SAFETY: the file must not be truncated, nor its mapped bytes changed, while the map lives.
    // The map is read-only and MAP_SHARED, so this process cannot write through it; every writer
    // of this program writes a new file and renames it, so the mapped inode keeps its length and
    // content. `len` is the file's length, read from this very descriptor, so no page of the map
    // lies beyond its end. Against a stranger who truncates in place there is no defence in a
    // process: it gets SIGBUS, not wrong memory (module header, Limits). Bytes are read as `u8`
    // and `f32` only, for which every bit pattern is valid.
    unsafe { MmapOptions::new().len(len).map(file) }
}

#[allow(unsafe_code, reason = "viewing bytes as f32; see the module's Justification")]
fn as_f32s(bytes: &[u8]) -> Option<&[f32]> {
    // SAFETY: every 4 initialised bytes are a valid `f32`; `align_to` itself returns a middle part
    // that is aligned and within `bytes`, and its lifetime is that of `bytes`.
    let (before, values, after) = unsafe { bytes.align_to::<f32>() };
    (before.is_empty() && after.is_empty()).then_some(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn map_of(content: &[u8]) -> Map {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        Map::open(file.path(), "here".to_owned()).unwrap()
    }

    #[test]
    fn floats_are_viewed_only_where_they_fit() {
        let mut content = vec![0; 4];
        content.extend(1.5_f32.to_le_bytes());
        content.extend((-2.0_f32).to_le_bytes());
        let map = map_of(&content);
        assert_eq!(map.f32s(4..12), Some(&[1.5, -2.0][..]));
        assert_eq!(map.f32s(12..12), Some(&[][..]));
        assert_eq!(map.f32s(2..6), None, "not aligned");
        assert_eq!(map.f32s(4..10), None, "not whole");
        assert_eq!(map.f32s(4..16), None, "outside");
    }

    #[test]
    fn a_map_outlives_the_removal_and_replacement_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"old content").unwrap();
        let map = Map::open(&path, "file".to_owned()).unwrap();
        fs::write(dir.path().join("temp"), b"new").unwrap();
        fs::rename(dir.path().join("temp"), &path).unwrap();
        assert_eq!(map.bytes(), b"old content");
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let check = |path: &Path, expected: &str| {
            let error = Map::open(path, "the file".to_owned()).unwrap_err().to_string();
            assert!(error.starts_with("the file: ") && error.contains(expected), "{error}");
        };
        check(dir.path(), "not a regular file");
        check(&dir.path().join("missing"), "No such file");
        check(Path::new("/dev/zero"), "not a regular file");
        assert!(map_of(b"").bytes().is_empty());
    }
}
