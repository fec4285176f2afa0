//! The journal on a real disk: writers killed at any moment, damage, strangers, a full disk.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::journal::{Journal, JournalError, JournalHeader, OpenedJournal};
use crate::limits;
use crate::random::mix64;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Record {
    Trial { number: u64, loss: f64 },
    Padding { number: u64, text: String },
}

/// The record that every writer here appends as the `number`th: some are small, some take many
/// pages, so that a kill can fall into a write.
fn record(number: u64) -> Record {
    if number.is_multiple_of(3) {
        let text =
            format!("\"{number}\"\n").repeat(usize::try_from(mix64(number) % 200_000).unwrap());
        return Record::Padding { number, text };
    }
    Record::Trial { number, loss: mix64(number) as f64 / 3e18 }
}

fn small(number: u64) -> Record {
    Record::Trial { number, loss: number as f64 / 7.0 }
}

fn header() -> JournalHeader {
    let (dataset, config) = ("5f1e".to_owned(), "c0ffee".to_owned());
    JournalHeader { version: 1, dataset, config, seed: 3 }
}

fn open(path: &Path) -> Result<OpenedJournal<Record>, JournalError> {
    Journal::open(path, &header())
}

/// A folder with a journal of `n` small records in it.
fn journal_with(n: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("search.journal");
    let mut journal = open(&path).unwrap().journal;
    for number in 1..=n {
        assert_eq!(journal.append(&small(number)).unwrap(), number);
    }
    (dir, path)
}

#[track_caller]
fn check_error<T: std::fmt::Debug>(result: Result<T, JournalError>, expected: &[&str]) {
    let error = result.unwrap_err().to_string();
    for part in expected {
        assert!(error.contains(part), "'{error}' lacks '{part}'");
    }
}

#[test]
fn what_was_appended_is_there_again() {
    let (dir, path) = journal_with(5);
    let OpenedJournal { mut journal, records, tail } = open(&path).unwrap();
    assert_eq!(records, (1..=5).map(small).collect::<Vec<_>>());
    assert_eq!((tail, journal.n_records(), journal.path()), (None, 5, path.as_path()));
    journal.append(&record(6)).unwrap();
    drop(journal);
    assert_eq!(open(&path).unwrap().records[5], record(6));
    let mut names: Vec<_> =
        fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["search.journal", "search.journal.lock"]);
}

#[test]
fn every_truncation_is_cut_to_whole_lines_and_goes_on() {
    let (_dir, path) = journal_with(3);
    let whole = fs::read(&path).unwrap();
    let ends: Vec<usize> = (1..=whole.len()).filter(|&end| whole[end - 1] == b'\n').collect();
    for len in 0..=whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        if len < ends[0] {
            check_error(open(&path), &["line 1 ", "search.journal", "move it away"]);
            assert_eq!(fs::read(&path).unwrap(), whole[..len], "kept as it is");
            continue;
        }
        let n_whole = ends.iter().filter(|&&end| end <= len).count() as u64;
        let OpenedJournal { mut journal, records, tail } = open(&path).unwrap();
        assert_eq!(records, (1..n_whole).map(small).collect::<Vec<_>>());
        let n_cut = len - ends[usize::try_from(n_whole).unwrap() - 1];
        let reported = tail.map(|tail| (tail.line, tail.bytes));
        assert_eq!(reported, (n_cut > 0).then_some((n_whole + 1, n_cut as u64)), "length {len}");
        journal.append(&small(n_whole)).unwrap();
        drop(journal);
        let again = open(&path).unwrap();
        assert_eq!(again.records, (1..=n_whole).map(small).collect::<Vec<_>>());
        assert_eq!(again.tail, None);
    }
}

/// The scan's own test tries every value; here the file must be kept or cut accordingly.
#[test]
fn every_damaged_byte_is_refused_or_cut() {
    let (_dir, path) = journal_with(3);
    let whole = fs::read(&path).unwrap();
    let last_start = whole[..whole.len() - 1].iter().rposition(|&byte| byte == b'\n').unwrap() + 1;
    for at in 0..whole.len() {
        for value in [whole[at] ^ 1, whole[at] ^ 0x20, b'\n', 0, 0xFF] {
            if value == whole[at] {
                continue;
            }
            let mut damaged = whole.clone();
            damaged[at] = value;
            fs::write(&path, &damaged).unwrap();
            let opened = open(&path);
            if at >= last_start {
                let opened = opened.unwrap();
                assert_eq!(opened.records, [small(1), small(2)]);
                assert_eq!(opened.tail.unwrap().line, 4);
                assert_eq!(fs::read(&path).unwrap(), whole[..last_start]);
            } else {
                let line = whole[..at].split(|&byte| byte == b'\n').count();
                check_error(opened, &[&format!("line {line} of"), "damaged", "restore it"]);
                assert_eq!(fs::read(&path).unwrap(), damaged, "kept as it is");
            }
        }
    }
}

#[test]
fn another_searchs_journal_is_refused_and_kept() {
    let (_dir, path) = journal_with(2);
    // Even one with a torn line.
    fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"crc").unwrap();
    let before = fs::read(&path).unwrap();
    let check = |header: JournalHeader, expected: &[&str]| {
        check_error(Journal::<Record>::open(&path, &header), expected);
        assert_eq!(fs::read(&path).unwrap(), before);
    };
    let own = header();
    let kept = ["search.journal", "kept as it is", "move it away"];
    check(JournalHeader { version: 2, ..own.clone() }, &["version 1", "version 2", kept[1]]);
    let other = JournalHeader { dataset: "beef".to_owned(), ..own.clone() };
    check(other, &["its dataset is 5f1e, this one's is beef", kept[0], kept[1], kept[2]]);
    let other = JournalHeader { config: "0ff".to_owned(), ..own.clone() };
    check(other, &["its configuration is c0ffee, this one's is 0ff"]);
    check(JournalHeader { seed: 4, ..own.clone() }, &["its seed is 3, this one's is 4"]);
    // A record type of another program.
    check_error(Journal::<u64>::open(&path, &own), &["line 2 ", "none of this program's"]);
    assert_eq!(fs::read(&path).unwrap(), before);
    assert_eq!(open(&path).unwrap().tail.unwrap().bytes, 5);
}

#[test]
fn one_writer_at_a_time() {
    let (_dir, path) = journal_with(1);
    let first = open(&path).unwrap();
    let pid = format!("(pid {})", std::process::id());
    check_error(open(&path), &["another search", &pid, "search.journal", "state_dir"]);
    drop(first);
    open(&path).unwrap();
}

#[test]
fn records_that_would_not_come_back_are_refused_before_they_are_written() {
    let (_dir, path) = journal_with(1);
    let mut journal = open(&path).unwrap().journal;
    let bad = Record::Trial { number: 2, loss: f64::NAN };
    check_error(journal.append(&bad), &["record 2", "read back", "not finite"]);
    let text = "x".repeat(limits::JOURNAL_LINE_BYTES_MAX);
    let bad = Record::Padding { number: 2, text };
    check_error(journal.append(&bad), &["record 2", "over the limit", "split it"]);
    journal.append(&small(2)).unwrap();
    drop(journal);
    assert_eq!(open(&path).unwrap().records, [small(1), small(2)]);
}

#[test]
fn paths_that_cannot_be_journals_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    check_error(open(&file.join("search.journal")), &["cannot lock", "file/", "state_dir"]);
    check_error(open(&dir.path().join("none/search.journal")), &["cannot lock", "state_dir"]);
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    check_error(open(&folder), &["cannot open", "folder", "state_dir"]);
    let long = dir.path().join("long");
    fs::File::create(&long).unwrap().set_len(limits::JOURNAL_BYTES_MAX + 1).unwrap();
    check_error(open(&long), &["long", "at its limit"]);
    check_error(open(&file), &["line 1 ", "it is empty"]);
}

const CHILD_DIR: &str = "FASTAA_TEST_JOURNAL_DIR";
/// The kernel kills the child (SIGXFSZ) when a file of its grows beyond this.
const CHILD_FILE_BYTES: &str = "FASTAA_TEST_JOURNAL_FILE_BYTES";

/// This test program again, to run one test of it under `sh -c SCRIPT`.
fn child(script: &str, test: &str, dir: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(std::env::current_exe().unwrap());
    let name = format!("search::journal_tests::{test}");
    command.args(["--exact", &name, "--nocapture"]).env(CHILD_DIR, dir);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// The child of the tests below: appends, and says so, until it is killed.
#[test]
fn child_writer() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    if let Ok(bytes) = std::env::var(CHILD_FILE_BYTES) {
        let bytes = Some(bytes.parse().unwrap());
        setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: None }).unwrap();
        setrlimit(Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
    }
    let mut journal = open(&Path::new(&dir).join("search.journal")).unwrap().journal;
    loop {
        let number = journal.n_records() + 1;
        journal.append(&record(number)).unwrap();
        writeln!(std::io::stderr().lock(), "appended {number}").unwrap();
    }
}

#[test]
fn a_writer_killed_at_any_moment_loses_nothing_it_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("search.journal");
    let acknowledged = |line: String| -> Option<u64> {
        line.strip_prefix("appended ").map(|number| number.parse().unwrap())
    };
    let mut n_records = 0;
    for round in 0..24u64 {
        let mut child = child("exec \"$0\" \"$@\"", "child_writer", dir.path()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut last = n_records;
        // The fourth round of each kind is killed before or while it makes or reads the journal.
        let n_awaited = if round % 4 == 3 { 0 } else { mix64(round) % 7 };
        for _ in 0..n_awaited {
            last = acknowledged(lines.next().unwrap().unwrap()).unwrap();
        }
        // A moment that differs from round to round, without a sleep.
        (0..mix64(round ^ 1) % 3_000_000).for_each(|n| {
            std::hint::black_box(n);
        });
        child.kill().unwrap();
        child.wait().unwrap();
        last = lines.filter_map(|line| acknowledged(line.unwrap())).last().unwrap_or(last);
        let opened = open(&path).unwrap();
        let n_found = opened.records.len() as u64;
        assert!(n_found == last || n_found == last + 1, "{n_found}, acknowledged {last}");
        assert!(last >= n_records + n_awaited);
        for (number, found) in (1..).zip(&opened.records) {
            assert_eq!(*found, record(number));
        }
        n_records = n_found;
    }
    assert!(n_records >= 24, "{n_records}");
}

/// SIGKILL rarely falls between two pages of a write; this signal falls where it is told to.
#[test]
fn a_writer_killed_within_a_write_costs_that_record_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("search.journal");
    drop(open(&path).unwrap());
    let mut n_records = 0;
    for round in 0..8u64 {
        let before = fs::metadata(&path).unwrap().len();
        let limit = before + 1 + mix64(round) % 300_000;
        let mut child = child("exec \"$0\" \"$@\"", "child_writer", dir.path());
        let output = child.env(CHILD_FILE_BYTES, limit.to_string()).output().unwrap();
        assert!(!output.status.success() && output.status.code().is_none(), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        let n_said = said.lines().filter(|line| line.starts_with("appended ")).count() as u64;
        assert_eq!(fs::metadata(&path).unwrap().len(), limit, "torn at the limit");
        let OpenedJournal { journal, records, tail } = open(&path).unwrap();
        n_records += n_said;
        assert_eq!(journal.n_records(), n_records);
        assert_eq!(records, (1..=n_records).map(record).collect::<Vec<_>>());
        let kept = fs::metadata(&path).unwrap().len();
        assert_eq!(tail.unwrap().bytes, limit - kept);
    }
}

/// The child of the test below. Its parent has made the kernel's SIGXFSZ harmless.
#[test]
fn child_on_a_full_disk() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let path = Path::new(&dir).join("search.journal");
    let limit = |bytes| {
        setrlimit(Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
    };
    // No space at all: no journal, and no half of one.
    limit(Some(10));
    check_error(open(&path), &["cannot make", "File too large", "free space"]);
    assert!(!path.exists());
    limit(None);
    let mut journal = open(&path).unwrap().journal;
    journal.append(&small(1)).unwrap();
    // Space for a part of the next line.
    for n_free in [0, 1, 30] {
        let before = fs::read(&path).unwrap();
        limit(Some(before.len() as u64 + n_free));
        check_error(
            journal.append(&small(2)),
            &["cannot write to", "File too large", "free space"],
        );
        assert_eq!(fs::read(&path).unwrap(), before, "the part of a line was taken back");
        assert_eq!(journal.n_records(), 1);
    }
    // Space again: it goes on.
    limit(None);
    assert_eq!(journal.append(&small(2)).unwrap(), 2);
    drop(journal);
    assert_eq!(open(&path).unwrap().records, [small(1), small(2)]);
    writeln!(std::io::stderr().lock(), "survived").unwrap();
}

#[test]
fn a_full_disk_costs_the_record_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let script = "trap '' XFSZ; exec \"$0\" \"$@\"";
    let output = child(script, "child_on_a_full_disk", dir.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("survived"), "{said}");
}
