//! The report of a search: made from a real journal, read as a browser would read it.
//!
//! The journals are written by real ledgers; their values are plausible, but made up. To look at
//! the page, name a file for it in `FASTAA_REPORT_KEEP`.

#![allow(clippy::unwrap_used, reason = "a helper of a test is a test")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use fastaa::image::Image;
use fastaa::search::ledger::{JOURNAL_VERSION, Ledger, Record};
use fastaa::search::report::{self, ReportError, ReportInput};
use fastaa::search::round::{Cost, FoldRecord, RoundRecord};
use fastaa::search::{JournalError, JournalHeader, read_records};
use serde::Serialize;

#[path = "search_report/journal.rs"]
mod journal;
#[path = "search_report/markup.rs"]
mod markup;

use journal::{affinity, folds, round, samples};

const PAGE_BYTES_MAX: usize = 2_000_000;

fn header() -> JournalHeader {
    let (dataset, config) = ("5f1e77".to_owned(), "c0ffee".to_owned());
    JournalHeader { version: JOURNAL_VERSION, dataset, config, seed: 3 }
}

fn open(path: &Path) -> Ledger {
    Ledger::open(path, &header(), 1, 0, |_| ()).unwrap().0
}

fn put<T: Serialize>(ledger: &Ledger, key: &str, passes: u64, value: &T) {
    let value = serde_json::to_value(value).unwrap();
    ledger.unit::<serde_json::Value>(key, passes, || Ok(value)).unwrap();
}

/// A search of three rounds: one published, one kept, one whose candidate was not tested.
fn write_search(ledger: &Ledger) {
    put(ledger, "folds", 0, &folds());
    for fold in 0..5 {
        let accuracy = 0.8531 + f64::from(fold) / 1000.0;
        let model = FoldRecord { train_loss: 0.321, accuracy, weights: "ab".repeat(32) };
        put(ledger, &format!("fold/{fold}"), 4_000 * 30 * 3, &model);
    }
    put(ledger, "affinity/0/clean", 777, &0.5);
    put(ledger, "affinity/table", 0, &affinity());
    for number in 1..=3 {
        put(ledger, &format!("round-{number}/trial/0"), 1_000, &1.0);
        put(ledger, &format!("train/searched/{number}/0"), 20_000, &1.0);
        put(ledger, &format!("round/{number}"), 0, &round(number));
    }
}

struct Search {
    _dir: tempfile::TempDir,
    path: PathBuf,
    ledger: Ledger,
}

fn search() -> Search {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fashion-mnist.journal");
    let ledger = open(&path);
    Search { _dir: dir, path, ledger }
}

/// A page that holds to what all pages promise.
fn checked(page: String) -> String {
    markup::check(&page);
    let words = markup::without_pictures(&page);
    for forbidden in ["http", "<script", "javascript:", "NaN", "inf ", "url(", "@import", "<link"] {
        assert!(!words.contains(forbidden), "the page has '{forbidden}'");
    }
    assert!(page.len() < PAGE_BYTES_MAX, "{} bytes", page.len());
    page
}

#[track_caller]
fn check_has(page: &str, expected: &[&str]) {
    let text = markup::text(page);
    for part in expected {
        assert!(text.contains(part), "the page's text lacks '{part}'");
    }
}

#[test]
fn a_whole_search_is_on_the_page() {
    let search = search();
    write_search(&search.ledger);
    // The ledger still holds the lock.
    let page = report::from_journal(&search.path, "fashion-mnist", &samples()).unwrap();
    if let Some(path) = std::env::var_os("FASTAA_REPORT_KEEP") {
        fs::write(path, &page).unwrap();
    }
    let page = checked(page);
    check_has(
        &page,
        &[
            "Policy search on fashion-mnist",
            "Round 3 found nothing worth the gate’s trainings",
            "Keeping fashion-mnist@1.",
            "kept: training value below the incumbent's",
            "rounds finished: 3, published: 1",
            // The gate's numbers of both tested rounds.
            "Test 1 of the search, at a one-sided level of 0.0304",
            "+1.231",
            "+0.456 to +2.006",
            "Test 2 of the search, at a one-sided level of 0.0076",
            "-0.345",
            "84.23, 84.33, 84.43, 84.53",
            "not beaten",
            // Training value, trials, affinity, policy, folds, costs.
            "the candidate had 81.00 % and the incumbent 81.50 %",
            "Round 2: 1,000 trials",
            "fold 5 (200)",
            "Rotate at λ = 0.30",
            "has 85.51 %",
            "ShearX",
            "Sharpness",
            "0.00–0.30",
            "85.31 %",
            "5000 s (83.3 min)",
            "1,800,000",
            "Seed 3, configuration c0ffee, dataset fingerprint 5f1e77",
        ],
    );
    assert_eq!(page.matches("data:image/png;base64,").count(), 12);
    for id in ["summary", "gate", "trials", "affinity", "operations", "policy", "pictures"] {
        assert!(page.contains(&format!("<section id=\"{id}\">")), "{id}");
    }
    // Costs: five fold models; the units that only gather cost nothing.
    let input = ReportInput::from_journal(&search.path, "fashion-mnist").unwrap();
    let passes = |part: &str| input.costs[part].passes;
    assert_eq!([passes("folds"), passes("affinity")], [1_800_000, 777]);
    assert_eq!([passes("proposals"), passes("gate")], [3_000, 60_000]);
    assert!(input.notes.is_empty(), "{:?}", input.notes);
}

#[test]
fn the_page_is_a_function_of_journal_and_samples() {
    let search = search();
    write_search(&search.ledger);
    let page = |samples: &[Image]| report::from_journal(&search.path, "d", samples).unwrap();
    assert_eq!(page(&samples()), page(&samples()));
    assert_ne!(page(&samples()), page(&samples()[1..]));
    let without = checked(page(&[]));
    assert!(!without.contains("id=\"pictures\"") && !without.contains("data:"));
}

#[test]
fn outcomes_are_told_in_honest_words() {
    for (number, class, expected) in [
        (1, "outcome published", "Round 1 published d@1. It was better than none and trivial-wide"),
        (
            2,
            "outcome",
            "Round 2 found nothing that was shown to be better than fashion-mnist@1. Keeping",
        ),
        (3, "outcome", "its candidate was not put to the gate. Keeping fashion-mnist@1."),
    ] {
        let input = ReportInput {
            dataset: "d".to_owned(),
            rounds: vec![round(number)],
            ..ReportInput::default()
        };
        let page = checked(report::html(&input));
        check_has(&page, &[expected]);
        assert!(page.contains(&format!("<p class=\"{class}\">")));
    }
}

#[test]
fn a_search_in_its_first_minutes_has_a_page() {
    let search = search();
    let page = checked(report::from_journal(&search.path, "d", &samples()).unwrap());
    check_has(&page, &["No round has finished yet", "not split yet", "not measured yet"]);
    put(&search.ledger, "folds", 0, &folds());
    put(&search.ledger, "fold/1", 7, &FoldRecord { accuracy: 0.5, ..FoldRecord::default() });
    let page = checked(report::from_journal(&search.path, "d", &samples()).unwrap());
    check_has(&page, &["50.00 %", "not trained yet", "2 units of work"]);
}

#[test]
fn without_a_journal_there_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.journal");
    let error = report::from_journal(&path, "cifar", &[]).unwrap_err();
    assert!(matches!(error, ReportError::NoSearch { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.starts_with("no search of dataset 'cifar' has finished a unit of work yet"),
        "{text}"
    );
    assert!(text.contains(&dir.path().display().to_string()), "{text}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "reading made a file");
    let error = report::from_journal(dir.path(), "cifar", &[]).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
    // A pipe has no writer here: waiting for one would never end.
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let error = report::from_journal(&path, "cifar", &[]).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
}

#[test]
fn a_half_written_last_line_is_left_out_and_stays() {
    let search = search();
    write_search(&search.ledger);
    let whole = fs::read(&search.path).unwrap();
    let mut file = fs::File::options().append(true).open(&search.path).unwrap();
    file.write_all(b"{\"crc\":\"00112233\",\"n\":99,\"rec").unwrap();
    let page = checked(report::from_journal(&search.path, "d", &[]).unwrap());
    check_has(&page, &["is half-written", "Round 3 found nothing"]);
    let after = fs::read(&search.path).unwrap();
    assert!(after.len() > whole.len() && after.starts_with(&whole), "reading wrote");

    let read = read_records::<Record>(&search.path, JOURNAL_VERSION).unwrap();
    assert_eq!((read.header, read.records.len()), (header(), 17));
    assert_eq!(read.tail.map(|tail| (tail.line, tail.bytes)), Some((19, 29)));
}

#[test]
fn every_truncation_of_a_journal_gives_a_page_or_names_the_file() {
    let search = search();
    write_search(&search.ledger);
    let bytes = fs::read(&search.path).unwrap();
    let copy = search.path.with_file_name("copy.journal");
    let header_bytes = bytes.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    for length in (0..bytes.len()).step_by(bytes.len() / 60).chain([1, header_bytes - 1]) {
        fs::write(&copy, &bytes[..length]).unwrap();
        match report::from_journal(&copy, "d", &[]) {
            Ok(page) => {
                assert!(length >= header_bytes, "{length}");
                checked(page);
            }
            Err(error) => {
                assert!(length < header_bytes, "{length}: {error}");
                assert!(error.to_string().contains("copy.journal"), "{error}");
            }
        }
    }
}

#[test]
fn damage_and_other_versions_are_refused_by_name() {
    let search = search();
    write_search(&search.ledger);
    let error = read_records::<Record>(&search.path, JOURNAL_VERSION + 1).unwrap_err();
    assert!(matches!(error, JournalError::OtherVersion { .. }), "{error:?}");
    let mut bytes = fs::read(&search.path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    fs::write(&search.path, &bytes).unwrap();
    let error = report::from_journal(&search.path, "d", &[]).unwrap_err().to_string();
    assert!(error.contains("fashion-mnist.journal is damaged"), "{error}");
}

#[test]
fn hostile_texts_stay_texts() {
    const HOSTILE: &str = "\"'><script>alert(1)</script><img src=x onerror=y>&amp;\u{0}\u{8}";
    let search = search();
    put(&search.ledger, "folds", 0, &folds());
    put(&search.ledger, "affinity/table", 0, &affinity());
    put(&search.ledger, &format!("round-1/{HOSTILE}"), 1, &1.0);
    let mut hostile = round(2);
    for text in [&mut hostile.summary, &mut hostile.algorithm, &mut hostile.incumbent] {
        HOSTILE.clone_into(text);
    }
    hostile.details = serde_json::json!({ HOSTILE: [HOSTILE] });
    hostile.candidate["name"] = HOSTILE.replace(['\u{0}', '\u{8}'], "").into();
    hostile.costs.insert(HOSTILE.to_owned(), Cost::default());
    for trial in &mut hostile.trials {
        HOSTILE.clone_into(&mut trial.what);
    }
    let verdict = hostile.verdict.as_mut().unwrap();
    HOSTILE.clone_into(&mut verdict.reason);
    for arm in &mut verdict.arms {
        for text in [&mut arm.role, &mut arm.policy, &mut arm.policy_id] {
            HOSTILE.clone_into(text);
        }
    }
    for comparison in &mut verdict.comparisons {
        HOSTILE.clone_into(&mut comparison.rival);
    }
    put(&search.ledger, "round/1", 0, &hostile);
    let page = checked(report::from_journal(&search.path, HOSTILE, &samples()).unwrap());
    assert!(!page.contains("<img src=x") && !page.contains('\u{0}') && !page.contains('\u{8}'));
    check_has(&page, &["\"'><script>alert(1)</script>"]);
}

#[test]
fn values_that_cannot_be_read_are_named_and_left_out() {
    let search = search();
    put(&search.ledger, "folds", 0, &"nothing of the kind");
    put(&search.ledger, "fold/0", 0, &"x");
    put(&search.ledger, "round/1", 0, &RoundRecord { round: 1, ..RoundRecord::default() });
    put(&search.ledger, "round/2", 0, &17);
    let page = checked(report::from_journal(&search.path, "d", &samples()).unwrap());
    check_has(
        &page,
        &[
            "The value of 'folds' in the journal",
            "The value of 'fold/0' in the journal",
            "The value of 'round/2' in the journal",
            "The candidate of round 1 cannot be read",
            "Keeping the policy in use.",
        ],
    );
}

#[test]
fn extreme_numbers_and_sizes_stay_on_the_page() {
    let mut rounds: Vec<RoundRecord> = (1..=1_500).map(|number| round(number % 3 + 1)).collect();
    for (number, round) in (1..).zip(&mut rounds) {
        round.round = number;
    }
    let last = rounds.last_mut().unwrap();
    *last = round(2);
    let many = (0..20_000).map(|number| {
        let mut trial = last.trials[0].clone();
        (trial.trial, trial.fold) = (number, Some(usize::try_from(number % 20).unwrap()));
        trial.loss = match number {
            7 => f64::MAX,
            8 => f64::NAN,
            9 => f64::NEG_INFINITY,
            _ => 1.0 + (number as f64).sin(),
        };
        trial.what = "x".repeat(10_000);
        trial
    });
    last.trials = many.collect();
    last.round = u32::MAX;
    let verdict = last.verdict.as_mut().unwrap();
    verdict.comparisons[0].gain = f64::MAX;
    verdict.comparisons[0].lower = f64::NAN;
    verdict.comparisons[1].interval = (f64::NEG_INFINITY, f64::MAX);
    verdict.arms[0].accuracy.clear();
    verdict.arms[1].accuracy = vec![f64::NAN; 100_000];
    last.paper_cost.cpu_seconds = f64::MAX;
    let mut affinity = affinity();
    for cell in affinity.rows.values_mut().flatten() {
        cell.drop_by_fold = vec![];
    }
    affinity.rows.values_mut().next().unwrap()[0].drop_by_fold = vec![f64::MAX, f64::MAX];
    let mut folds = folds();
    folds.class_counts.split = vec![u64::MAX; 1_000];
    folds.class_counts.held_out = vec![vec![u64::MAX; 3]; 64];
    // Noise does not compress.
    let noise = (0..224 * 224 * 3_u32).map(|idx| (idx.wrapping_mul(2_654_435_761) >> 24) as u8);
    let noise = Image { width: 224, height: 224, channels: 3, data: noise.collect() };
    let broken = Image { width: 9, height: 9, channels: 3, data: vec![0; 5] };
    let input = ReportInput {
        dataset: "d".repeat(5_000),
        rounds,
        affinity: Some(affinity),
        folds: Some(folds),
        samples: vec![broken, noise.clone(), noise.clone(), noise.clone(), noise],
        ..ReportInput::default()
    };
    let page = checked(report::html(&input));
    check_has(
        &page,
        &["The 1488 older rounds", "12 more folds", "one in 4 is drawn", "1,000 classes"],
    );
}
