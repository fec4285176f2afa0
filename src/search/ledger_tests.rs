//! The ledger: nothing twice, nothing lost, the same whatever the threads.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::*;
use crate::search::error::SearchError;

fn open(path: &Path, n_threads: usize) -> (Ledger, Arc<Mutex<Vec<Event>>>) {
    let header = JournalHeader {
        version: JOURNAL_VERSION,
        dataset: "d".to_owned(),
        config: "c".to_owned(),
        seed: 0,
    };
    let told: Arc<Mutex<Vec<Event>>> = Arc::default();
    let events = Arc::clone(&told);
    let tell = move |event: &Event| events.lock().unwrap().push(event.clone());
    (Ledger::open(path, &header, n_threads, 0, tell).unwrap().0, told)
}

fn busy() -> f64 {
    let began = thread_seconds();
    let mut value = 0.5f64;
    while thread_seconds() - began < 0.01 {
        value = (value * 1.7).sin().abs();
    }
    value
}

#[test]
fn a_unit_is_computed_once_and_its_value_is_the_journal_s() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let (ledger, told) = open(&path, 1);
    // A third has no short decimal form: what comes back is what the journal gives back.
    let first: f64 = ledger.unit("a", 100, || Ok(busy() / 3.0)).unwrap();
    let again: f64 = ledger.unit("a", 100, || panic!("known")).unwrap();
    assert_eq!(first.to_bits(), again.to_bits());
    let (seconds, passes) = ledger.cost("a");
    assert!(seconds >= 0.01 && passes == 100, "{seconds} s, {passes} passes");
    drop(ledger);
    let (ledger, _) = open(&path, 1);
    let reopened: f64 = ledger.unit("a", 100, || panic!("known")).unwrap();
    assert_eq!(first.to_bits(), reopened.to_bits());
    assert!((ledger.cost("").0 - seconds).abs() < 1e-12);
    assert_eq!(ledger.finished::<f64>("b").unwrap(), None);
    let error = ledger.finished::<String>("a").unwrap_err().to_string();
    assert!(error.contains("'a'") && error.contains("move the journal away"), "{error}");
    let told = told.lock().unwrap();
    let Some(Event::Progress(progress)) = told.last() else { panic!("{told:?}") };
    assert!(progress.round_passes == 200 && progress.seconds_today >= 0.01, "{progress:?}");
}

#[test]
fn a_failed_unit_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let (ledger, _) = open(&dir.path().join("journal"), 1);
    let fail = || Err::<u32, _>(SearchError::Unfit("no".to_owned()));
    assert_eq!(ledger.unit("a", 1, fail).unwrap_err().to_string(), "no");
    let nan = ledger.unit("n", 1, || Ok(f64::NAN)).unwrap_err().to_string();
    assert!(nan.contains("'n'") || nan.contains("not finite"), "{nan}");
    assert_eq!(ledger.unit("a", 1, || Ok(3u32)).unwrap(), 3);
}

#[test]
fn parallel_work_keeps_the_order_of_its_items() {
    let dir = tempfile::tempdir().unwrap();
    for n_threads in [1, 2, 5] {
        let (ledger, _) = open(&dir.path().join(format!("{n_threads}")), n_threads);
        let items: Vec<u64> = (0..40).collect();
        let n_computed = AtomicU64::new(0);
        let work = |&item: &u64| {
            ledger.unit(&format!("u/{item}"), 1, || {
                n_computed.fetch_add(1, Ordering::Relaxed);
                Ok(item * item)
            })
        };
        let squares = ledger.parallel(&items, work).unwrap();
        assert_eq!(squares, items.iter().map(|item| item * item).collect::<Vec<_>>());
        ledger.parallel(&items, work).unwrap();
        assert_eq!(n_computed.load(Ordering::Relaxed), 40);
    }
}

#[test]
fn parallel_work_stops_at_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let (ledger, _) = open(&dir.path().join("journal"), 2);
    let items: Vec<u64> = (0..1000).collect();
    let n_begun = AtomicU64::new(0);
    let error = ledger.parallel(&items, |&item| {
        n_begun.fetch_add(1, Ordering::Relaxed);
        if item == 3 { Err(SearchError::Unfit("three".to_owned())) } else { Ok(item) }
    });
    assert_eq!(error.unwrap_err().to_string(), "three");
    assert!(n_begun.load(Ordering::Relaxed) < 1000);
    let none: Vec<u64> = ledger.parallel(&[], |&item: &u64| Ok(item)).unwrap();
    assert!(none.is_empty());
}
