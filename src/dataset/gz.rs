//! Unpacks `.gz` IDX files into the cache folder, once.
//!
//! *Invariants*: an entry appears whole or not at all (temp file, fsync, rename), and only after
//! the gzip checksum and the length promised by the IDX header were right. Two processes that want
//! the same entry take turns by a lock file; the second finds it done.
//!
//! | file in the cache | what it is |
//! |---|---|
//! | `SOURCE-SIZE-MTIME.idx` | the entry; SOURCE is a hash of the canonical path |
//! | `SOURCE.tmp` | an entry being made; belongs to whoever holds the lock |
//! | `SOURCE.lock` | the lock |
//!
//! Never unpacks anything but IDX: the header bounds what a hostile file can unpack to.

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use sha2::{Digest as _, Sha256};

use super::idx::{self, Header, Kind};
use super::{DatasetError, digest};

/// Bytes unpacked per turn.
const CHUNK_BYTES: usize = 256 * 1024;

/// Whether the file begins as gzip does, whatever its name.
///
/// # Errors
/// The file cannot be read.
pub(super) fn is_gz(path: &Path) -> Result<bool, DatasetError> {
    Ok(idx::first_bytes(path)?.starts_with(&[0x1f, 0x8b]))
}

/// The unpacked copy of the IDX file at `path`, made now if it is not there yet.
///
/// # Errors
/// The file is damaged, or the cache folder cannot be written.
pub(super) fn unpacked_idx(
    path: &Path,
    kind: Kind,
    cache_dir: &Path,
) -> Result<PathBuf, DatasetError> {
    let fail = |cause| DatasetError::io(path, cause);
    let canonical = fs::canonicalize(path).map_err(fail)?;
    let source_key = digest::fingerprint(Sha256::new_with_prefix(canonical.as_os_str().as_bytes()));
    let file = File::open(path).map_err(fail)?;
    let stamp = Stamp::of(&file).map_err(fail)?;
    let entry = cache_dir.join(format!("{source_key}-{}.idx", stamp.key()));
    if is_whole(&entry, kind) {
        return Ok(entry);
    }
    fs::create_dir_all(cache_dir).map_err(|cause| DatasetError::write(cache_dir, cause))?;
    let lock_path = cache_dir.join(format!("{source_key}.lock"));
    let lock = File::options().write(true).create(true).truncate(false).open(&lock_path);
    let lock = lock.map_err(|cause| DatasetError::write(&lock_path, cause))?;
    lock.lock().map_err(|cause| DatasetError::write(&lock_path, cause))?;
    if is_whole(&entry, kind) {
        return Ok(entry); // Another process made it while this one waited.
    }
    let temp = cache_dir.join(format!("{source_key}.tmp"));
    let made = unpack(path, &file, kind, &temp).and_then(|()| {
        if Stamp::of(&file).map_err(fail)? != stamp {
            let path = path.display().to_string();
            return Err(DatasetError::Changed { path, what: "its size or time".to_owned() });
        }
        fs::rename(&temp, &entry).map_err(|cause| DatasetError::write(&entry, cause))
    });
    if let Err(error) = made {
        let _ = fs::remove_file(&temp);
        return Err(error);
    }
    remove_older(cache_dir, &format!("{source_key}-"), &entry);
    Ok(entry)
}

/// Whether an entry is there, as long as its header says. One that a full or failing disk has cut
/// off is made anew.
fn is_whole(entry: &Path, kind: Kind) -> bool {
    let Ok(first) = idx::first_bytes(entry) else { return false };
    let header = Header::parse(&first, kind, "");
    let len = fs::metadata(entry).map(|meta| meta.len());
    matches!((header, len), (Ok(header), Ok(len)) if header.file_bytes == len)
}

/// Size and modification time: a file that changes gets another entry.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    mtime_s: i64,
    mtime_ns: i64,
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { bytes: meta.len(), mtime_s: meta.mtime(), mtime_ns: meta.mtime_nsec() })
    }

    fn key(&self) -> String {
        format!("{}-{}.{:09}", self.bytes, self.mtime_s, self.mtime_ns)
    }
}

/// Unpacks into `temp` and makes sure that it is on the disk.
fn unpack(path: &Path, file: &File, kind: Kind, temp: &Path) -> Result<(), DatasetError> {
    let name = path.display().to_string();
    let gzip = |source| DatasetError::Gzip { path: name.clone(), source };
    let write = |cause| DatasetError::write(temp, cause);
    let mut unpacker = MultiGzDecoder::new(io::BufReader::with_capacity(CHUNK_BYTES, file));
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut len = read_full(&mut unpacker, &mut chunk).map_err(gzip)?;
    let promised = Header::parse(&chunk[..len], kind, &name)?.file_bytes;

    let mut out = File::create(temp).map_err(write)?;
    let mut total = 0;
    // The read that finds the end is also the one that compares gzip's checksum.
    while len > 0 {
        total += len as u64;
        if total > promised {
            break;
        }
        out.write_all(&chunk[..len]).map_err(write)?;
        len = read_full(&mut unpacker, &mut chunk).map_err(gzip)?;
    }
    if total != promised {
        let more = if total > promised { "more" } else { "fewer" };
        return Err(DatasetError::damaged(
            &name,
            format!("unpacks to {more} bytes than the {promised} that its IDX header stands for"),
        ));
    }
    out.sync_all().map_err(write)
}

/// Fills `chunk` as far as the source goes.
fn read_full(source: &mut impl Read, chunk: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < chunk.len() {
        match source.read(&mut chunk[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
    }
    Ok(len)
}

/// Removes the entries of earlier versions of the same source. Maps of them stay valid.
fn remove_older(cache_dir: &Path, prefix: &str, keep: &Path) {
    let Ok(entries) = fs::read_dir(cache_dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_entry = entry.file_name().as_bytes().starts_with(prefix.as_bytes());
        if is_entry && path != keep {
            // If it cannot be removed, it only takes space.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn gz_of(content: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(content).unwrap();
        out.finish().unwrap()
    }

    fn labels(n: u8) -> Vec<u8> {
        [0, 0, 8, 1, 0, 0, 0, n].into_iter().chain((0..n).map(|idx| idx.wrapping_mul(37))).collect()
    }

    #[test]
    fn an_entry_is_made_once_and_replaces_that_of_an_older_file() {
        let dir = tempfile::tempdir().unwrap();
        let (source, cache) = (dir.path().join("labels.gz"), dir.path().join("cache"));
        fs::write(&source, gz_of(&labels(5))).unwrap();
        let first = unpacked_idx(&source, Kind::Labels, &cache).unwrap();
        assert_eq!(fs::read(&first).unwrap(), labels(5));
        let inode = fs::metadata(&first).unwrap().ino();
        assert_eq!(unpacked_idx(&source, Kind::Labels, &cache).unwrap(), first);
        assert_eq!(fs::metadata(&first).unwrap().ino(), inode, "not unpacked again");

        fs::write(&source, gz_of(&labels(9))).unwrap();
        let second = unpacked_idx(&source, Kind::Labels, &cache).unwrap();
        assert_eq!(fs::read(&second).unwrap(), labels(9));
        assert!(!first.exists(), "the older entry is removed");
        let names: Vec<_> = fs::read_dir(&cache).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(names.len(), 2, "an entry and its lock: {names:?}");
    }

    #[test]
    fn every_cut_of_a_gz_is_an_error_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (source, cache) = (dir.path().join("labels.gz"), dir.path().join("cache"));
        let whole = gz_of(&labels(200));
        for cut in 0..whole.len() {
            fs::write(&source, &whole[..cut]).unwrap();
            let error = unpacked_idx(&source, Kind::Labels, &cache).unwrap_err().to_string();
            assert!(error.contains("labels.gz: "), "{cut}: {error}");
            assert!(error.contains("again"), "{cut}: {error}");
        }
        fs::write(&source, gz_of(&labels(200)[..100])).unwrap();
        let error = unpacked_idx(&source, Kind::Labels, &cache).unwrap_err().to_string();
        assert!(error.contains("fewer bytes than the 208"), "{error}");
        let longer = [labels(200), vec![0; 600_000]].concat();
        fs::write(&source, gz_of(&longer)).unwrap();
        let error = unpacked_idx(&source, Kind::Labels, &cache).unwrap_err().to_string();
        assert!(error.contains("more bytes than the 208"), "{error}");
        let left = fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path());
        assert!(left.into_iter().all(|path| path.extension().unwrap() == "lock"));
    }

    #[test]
    fn flipped_bytes_are_found_by_the_checksum() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("labels.gz");
        let whole = gz_of(&labels(200));
        let mut n_found = 0;
        for byte in 0..whole.len() {
            let bit = 8 * byte + byte % 8;
            let mut bytes = whole.clone();
            bytes[byte] ^= 1 << (bit % 8);
            fs::write(&source, &bytes).unwrap();
            let cache = dir.path().join(bit.to_string());
            match unpacked_idx(&source, Kind::Labels, &cache) {
                // The file's name and time, and the bits after the last code, mean nothing.
                Ok(entry) => assert_eq!(fs::read(entry).unwrap(), labels(200), "bit {bit}"),
                Err(error) => {
                    assert!(error.to_string().contains("labels.gz"), "bit {bit}: {error}");
                    n_found += 1;
                }
            }
        }
        assert!(n_found > 200, "{n_found} of {}", whole.len());
    }

    #[test]
    fn threads_at_once_get_one_whole_entry() {
        let dir = tempfile::tempdir().unwrap();
        let (source, cache) = (dir.path().join("labels.gz"), dir.path().join("cache"));
        fs::write(&source, gz_of(&labels(250))).unwrap();
        let inodes: Vec<u64> = thread::scope(|scope| {
            let work = || {
                let entry = unpacked_idx(&source, Kind::Labels, &cache).unwrap();
                assert_eq!(fs::read(&entry).unwrap(), labels(250));
                fs::metadata(&entry).unwrap().ino()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(work)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(inodes.iter().all(|inode| *inode == inodes[0]), "made once: {inodes:?}");
    }
}
