//! The journal of a search: an append-only file of records from which a killed search goes on.
//!
//! Owns the file, its lock and its header. Never knows what a record means: any serde type will do.
//! How a line looks, and when a bad one may be cut off, is `journal_scan`'s.
//!
//! *Invariants*
//!
//! * Line 1 is the header; it names the search that the journal belongs to. A journal appears with
//!   its header whole (written to `.tmp-NAME`, flushed, renamed) or not at all.
//! * A record is in the journal once [`Journal::append`] has returned, even if the power fails.
//!   A writer that dies before may leave its last line half-written; opening cuts that off and
//!   says so.
//! * A file that is damaged anywhere else, or belongs to another search, is refused and stays as
//!   it is, byte for byte.
//! * One process writes: `NAME.lock` is held by flock. The lock file stays, since removing it would
//!   let two processes lock two files of one name. Reading alone ([`read_records`]) needs no lock.
//!
//! *Limits*: [`limits::JOURNAL_LINE_BYTES_MAX`], [`limits::JOURNAL_BYTES_MAX`].

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::marker::PhantomData;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::journal_scan::{self, FRAME_BYTES_MAX, Scan};
use crate::limits;

/// Which search a journal belongs to; its first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JournalHeader {
    /// Version of the records' meaning: another one is never read.
    pub version: u32,
    /// Fingerprint of the dataset's train split.
    pub dataset: String,
    /// Digest of every setting that the result depends on.
    pub config: String,
    /// Seed of the search.
    pub seed: u64,
}

/// The part of a header that every version has.
#[derive(Deserialize)]
struct AnyHeader {
    version: u32,
}

/// Why a journal cannot be opened or written. Every message names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The file system refuses.
    #[error(
        "cannot {action} the search journal {path}: {source}; state_dir must be a folder that this \
         user can write, with free space"
    )]
    Io {
        /// `open`, `write to`, …
        action: &'static str,
        /// The journal, or its lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A pipe, a socket or a device.
    #[error("the search journal {path} is not a regular file; move it away")]
    NotAFile {
        /// The journal.
        path: PathBuf,
    },
    /// Another process writes it.
    #[error(
        "another search{pid} writes the journal {path}; stop it, or use a state_dir of its own for \
         each search"
    )]
    Locked {
        /// The journal.
        path: PathBuf,
        /// ` (pid N)`, or empty if it is not known.
        pid: String,
    },
    /// Another version's.
    #[error(
        "the search journal {path} has version {found}, but this program writes version {own}; it \
         was kept as it is: go on with the program that wrote it, or move it away to start afresh"
    )]
    OtherVersion {
        /// The journal.
        path: PathBuf,
        /// The version in the file.
        found: u32,
        /// The version that was asked for.
        own: u32,
    },
    /// Another dataset's, configuration's or seed's.
    #[error(
        "the search journal {path} belongs to another search: its {field} is {found}, this one's \
         is {own}; it was kept as it is: restore that {field} to go on with it, or move it away to \
         start afresh"
    )]
    OtherSearch {
        /// The journal.
        path: PathBuf,
        /// `dataset`, `configuration` or `seed`.
        field: &'static str,
        /// The value in the file.
        found: String,
        /// The value that was asked for.
        own: String,
    },
    /// A line that is not the last one left by a dying writer.
    #[error(
        "line {line} of the search journal {path} is damaged: {what}; it was kept as it is: \
         restore it from a backup, or move it away to start afresh"
    )]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// Counted from 1; the header is line 1.
        line: u64,
        /// What is wrong.
        what: String,
    },
    /// A record that the journal would not give back: not JSON, or a number that is not finite.
    #[error(
        "record {number} for the search journal {path} cannot be read back from JSON: {source}; \
         leave out numbers that are not finite"
    )]
    NotReadable {
        /// The journal.
        path: PathBuf,
        /// Counted from 1.
        number: u64,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A record over the limit.
    #[error(
        "record {number} for the search journal {path} takes {bytes} bytes, over the limit of {} \
         bytes; split it",
        limits::JOURNAL_LINE_BYTES_MAX
    )]
    LineTooLong {
        /// The journal.
        path: PathBuf,
        /// Counted from 1.
        number: u64,
        /// Its line's length.
        bytes: usize,
    },
    /// The file is, or would be, over the limit.
    #[error(
        "the search journal {path} is at its limit of {} bytes; move it away to start afresh",
        limits::JOURNAL_BYTES_MAX
    )]
    Full {
        /// The journal.
        path: PathBuf,
    },
    /// An earlier write failed so that nobody knows what is on the disk.
    #[error(
        "the search journal {path} could not be flushed or cut after a failed write; open it again \
         to see what it holds"
    )]
    Unknown {
        /// The journal.
        path: PathBuf,
    },
}

/// A half-written last line, which opening a journal cuts off and reading it leaves out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalTail {
    /// Counted from 1; the header is line 1.
    pub line: u64,
    /// Its bytes.
    pub bytes: u64,
    /// Why it is no line.
    pub what: &'static str,
}

/// A journal as [`Journal::open`] found it.
#[derive(Debug)]
pub struct OpenedJournal<R> {
    /// To append to.
    pub journal: Journal<R>,
    /// What was appended before, in order.
    pub records: Vec<R>,
    /// What was cut off, if anything: worth a warning.
    pub tail: Option<JournalTail>,
}

/// A journal as [`read_records`] found it.
#[derive(Debug)]
pub struct JournalRecords<R> {
    /// Which search it belongs to.
    pub header: JournalHeader,
    /// What was appended before, in order.
    pub records: Vec<R>,
    /// The half-written last line that was left out, if any: its writer may just be at it.
    pub tail: Option<JournalTail>,
}

/// Reads a journal of this version, whoever writes it meanwhile: takes no lock, writes nothing.
///
/// # Errors
/// It is not there ([`JournalError::Io`] with `NotFound`), it is another version's, it is damaged
/// elsewhere than in its last line, a record is not an `R`, or the file system refuses.
pub fn read_records<R: DeserializeOwned>(
    path: &Path,
    version: u32,
) -> Result<JournalRecords<R>, JournalError> {
    let mut options = File::options();
    // A pipe must not make this wait for a writer; read_file refuses it.
    options.read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    let file = options.open(path).map_err(|source| io_error("open", path, source))?;
    let (_, bytes) = read_file(path, file)?;
    let scan = scan(path, &bytes)?;
    let header = parse_header(path, &bytes[scan.lines[0].clone()], version)?;
    let records = parse_records(path, &bytes, &scan)?;
    Ok(JournalRecords { header, records, tail: tail(&bytes, &scan) })
}

/// An open journal of records of type `R`; it is locked until this is dropped.
#[derive(Debug)]
pub struct Journal<R> {
    path: PathBuf,
    file: File,
    /// The lock lives as long as the open file.
    _lock: File,
    n_records: u64,
    /// Length of the good lines.
    n_bytes: u64,
    /// Whether the file may hold something else than `n_bytes` good bytes.
    is_unknown: bool,
    record: PhantomData<fn(R) -> R>,
}

impl<R: Serialize + DeserializeOwned> Journal<R> {
    /// Opens the journal of the search that `header` names, or makes it; the folder must be there.
    ///
    /// # Errors
    /// Another process has it, it is another search's, it is damaged elsewhere than in its last
    /// line, a record is not an `R`, or the file system refuses.
    pub fn open(path: &Path, header: &JournalHeader) -> Result<OpenedJournal<R>, JournalError> {
        let lock = take_lock(path)?;
        let (file, bytes) = match open_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                create(path, header).map_err(|source| io_error("make", path, source))?;
                read(path)?
            }
            Err(source) => return Err(io_error("open", path, source)),
            Ok(file) => read_file(path, file)?,
        };
        let scan = scan(path, &bytes)?;
        check_header(path, &bytes[scan.lines[0].clone()], header)?;
        let records: Vec<R> = parse_records(path, &bytes, &scan)?;
        // Only now, when nothing can be refused any more.
        let tail =
            cut_tail(&file, &bytes, &scan).map_err(|source| io_error("cut", path, source))?;
        let journal = Self {
            path: path.to_owned(),
            file,
            _lock: lock,
            n_records: records.len() as u64,
            n_bytes: scan.good_bytes as u64,
            is_unknown: false,
            record: PhantomData,
        };
        Ok(OpenedJournal { journal, records, tail })
    }

    /// Appends a record and waits until it is on the disk. Gives the number of records.
    ///
    /// After an error the record is not in the journal, with one exception: if the file could not
    /// be flushed or cut back, it may be, and every later call fails with
    /// [`JournalError::Unknown`] until the journal is opened again.
    ///
    /// # Errors
    /// A record that is too long or could not be read back, a full journal or disk.
    pub fn append(&mut self, record: &R) -> Result<u64, JournalError> {
        if self.is_unknown {
            return Err(JournalError::Unknown { path: self.path.clone() });
        }
        let line = self.line(record)?;
        if let Err(source) = self.file.write_all(&line) {
            // Take back what was written of it, so that the next record begins a line.
            self.is_unknown = self.file.set_len(self.n_bytes).is_err();
            return Err(io_error("write to", &self.path, source));
        }
        if let Err(source) = self.file.sync_data() {
            self.is_unknown = true;
            return Err(io_error("flush", &self.path, source));
        }
        self.n_bytes += line.len() as u64;
        self.n_records += 1;
        Ok(self.n_records)
    }

    /// Records in the journal.
    pub fn n_records(&self) -> u64 {
        self.n_records
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The line of the next record, if it is within the limits and gives the record back.
    fn line(&self, record: &R) -> Result<Vec<u8>, JournalError> {
        let (path, number) = (|| self.path.clone(), self.n_records + 1);
        let not_readable = |source| JournalError::NotReadable { path: path(), number, source };
        let json = serde_json::to_vec(record).map_err(not_readable)?;
        if json.len() + FRAME_BYTES_MAX > limits::JOURNAL_LINE_BYTES_MAX {
            return Err(JournalError::LineTooLong { path: path(), number, bytes: json.len() });
        }
        // JSON has no NaN: a record that holds one would make the journal unreadable.
        serde_json::from_slice::<R>(&json).map_err(not_readable)?;
        let mut line = Vec::with_capacity(json.len() + FRAME_BYTES_MAX);
        journal_scan::push_line(&mut line, number, &json);
        if self.n_bytes + line.len() as u64 > limits::JOURNAL_BYTES_MAX {
            return Err(JournalError::Full { path: path() });
        }
        Ok(line)
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> JournalError {
    JournalError::Io { action, path: path.to_owned(), source }
}

/// `NAME` with something before and after it, in the same folder.
fn sibling(path: &Path, before: &str, after: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{before}{name}{after}"))
}

fn take_lock(path: &Path) -> Result<File, JournalError> {
    let lock_path = sibling(path, "", ".lock");
    let failed = |source| io_error("lock", &lock_path, source);
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let mut lock = options.open(&lock_path).map_err(failed)?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            // Only for the message; a search that is just starting has not written it yet.
            let _ = lock.take(32).read_to_string(&mut pid);
            let pid = pid
                .trim()
                .parse::<u32>()
                .map_or_else(|_| String::new(), |pid| format!(" (pid {pid})"));
            return Err(JournalError::Locked { path: path.to_owned(), pid });
        }
        Err(error) => return Err(failed(error.into())),
    }
    // Only for others' messages: on a full disk the search still reads its journal.
    let _ = lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id()));
    Ok(lock)
}

fn open_file(path: &Path) -> io::Result<File> {
    File::options().read(true).append(true).open(path)
}

fn read(path: &Path) -> Result<(File, Vec<u8>), JournalError> {
    read_file(path, open_file(path).map_err(|source| io_error("open", path, source))?)
}

fn read_file(path: &Path, mut file: File) -> Result<(File, Vec<u8>), JournalError> {
    let failed = |source| io_error("read", path, source);
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(JournalError::NotAFile { path: path.to_owned() });
    }
    if metadata.len() > limits::JOURNAL_BYTES_MAX {
        return Err(JournalError::Full { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    (&mut file).take(limits::JOURNAL_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok((file, bytes))
}

/// Makes a journal that holds its header alone. A leftover of an earlier attempt is overwritten.
fn create(path: &Path, header: &JournalHeader) -> io::Result<()> {
    let mut line = Vec::new();
    journal_scan::push_line(&mut line, 0, &serde_json::to_vec(header)?);
    let temp = sibling(path, ".tmp-", "");
    let mut file = File::create(&temp)?;
    file.write_all(&line)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&temp, path)?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    File::open(dir.unwrap_or(Path::new(".")))?.sync_all()
}

/// What of the file can be trusted; at least its header.
fn scan(path: &Path, bytes: &[u8]) -> Result<Scan, JournalError> {
    journal_scan::scan(bytes).map_err(|bad| JournalError::Damaged {
        path: path.to_owned(),
        line: bad.line,
        what: bad.what.into(),
    })
}

fn parse_records<R: DeserializeOwned>(
    path: &Path,
    bytes: &[u8],
    scan: &Scan,
) -> Result<Vec<R>, JournalError> {
    let parse = |(line, range): (u64, &Range<usize>)| {
        serde_json::from_slice(&bytes[range.clone()]).map_err(|error| {
            let what = format!("its record is none of this program's ({error})");
            JournalError::Damaged { path: path.to_owned(), line, what }
        })
    };
    (2..).zip(&scan.lines[1..]).map(parse).collect()
}

fn parse_header(path: &Path, json: &[u8], own: u32) -> Result<JournalHeader, JournalError> {
    let path = path.to_owned();
    let malformed = |error: serde_json::Error| {
        let what = format!("its header is none of this program's ({error})");
        JournalError::Damaged { path: path.clone(), line: 1, what }
    };
    // The version first: another one's header may have other fields.
    let AnyHeader { version: found } = serde_json::from_slice(json).map_err(malformed)?;
    if found != own {
        return Err(JournalError::OtherVersion { path, found, own });
    }
    serde_json::from_slice(json).map_err(malformed)
}

fn check_header(path: &Path, json: &[u8], own: &JournalHeader) -> Result<(), JournalError> {
    let found = parse_header(path, json, own.version)?;
    let path = path.to_owned();
    let fields = [
        ("dataset", found.dataset, own.dataset.clone()),
        ("seed", found.seed.to_string(), own.seed.to_string()),
        ("configuration", found.config, own.config.clone()),
    ];
    match fields.into_iter().find(|(_, found, own)| found != own) {
        Some((field, found, own)) => Err(JournalError::OtherSearch { path, field, found, own }),
        None => Ok(()),
    }
}

/// Cuts off what follows the good lines.
fn cut_tail(file: &File, bytes: &[u8], scan: &Scan) -> io::Result<Option<JournalTail>> {
    let tail = tail(bytes, scan);
    if tail.is_some() {
        file.set_len(scan.good_bytes as u64)?;
        file.sync_all()?;
    }
    Ok(tail)
}

/// What follows the good lines, if anything does.
fn tail(bytes: &[u8], scan: &Scan) -> Option<JournalTail> {
    let (line, n_bytes) = (scan.lines.len() as u64 + 1, bytes.len() - scan.good_bytes);
    scan.torn.map(|what| JournalTail { line, bytes: n_bytes as u64, what })
}
