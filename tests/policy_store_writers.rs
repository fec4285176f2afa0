//! The policy store with several processes that write to it.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a helper of a test is a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, Stdio};

use fastaa::policy::{Magnitude, Op, OpStep, OpsProfile, Policy, PolicyStore, SubPolicy};
use rustix::fs::{FlockOperation, flock};
use serde_json::{Map, Value, json};

const DIR: &str = "FASTAA_TEST_WRITER_DIR";
const FIRST_LEVEL: &str = "FASTAA_TEST_WRITER_FIRST";
const N_WRITERS: u32 = 3;
const N_VERSIONS: u32 = 15;

/// A policy that differs from those of other `level`s.
fn policy(level: u32) -> Policy {
    let magnitude = Magnitude::Fixed(f64::from(level) / f64::from(u32::MAX));
    let ops = vec![OpStep { op: Op::Rotate, probability: 0.5, magnitude }];
    let sub_policies = vec![SubPolicy { weight: 1.0, ops }];
    Policy::new(format!("p{level}"), OpsProfile::Fastaa, 1, sub_policies, Map::new()).unwrap()
}

/// The child of the test below.
#[test]
fn child_writer() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let first: u32 = std::env::var(FIRST_LEVEL).unwrap().parse().unwrap();
    for level in first..first + N_VERSIONS {
        // Anew each time: opening cleans up, and must not clean up under another writer.
        let store = PolicyStore::open(&dir).unwrap();
        let published = store.publish("mnist", &policy(level), json!({"level": level})).unwrap();
        let mut out = std::io::stderr().lock();
        writeln!(out, "published {} {level}", published.version.version).unwrap();
    }
}

#[test]
fn processes_that_publish_at_once_lose_and_overwrite_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let writers: Vec<_> = (0..N_WRITERS)
        .map(|writer| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child_writer", "--nocapture"])
                .env(DIR, dir.path())
                .env(FIRST_LEVEL, (1000 * (writer + 1)).to_string())
                .stderr(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    let mut level_of = BTreeMap::new();
    for writer in writers {
        let output = writer.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        for line in said.lines() {
            let Some(numbers) = line.strip_prefix("published ") else { continue };
            let (version, level) = numbers.split_once(' ').unwrap();
            let version: u64 = version.parse().unwrap();
            let level: u32 = level.parse().unwrap();
            assert_eq!(level_of.insert(version, level), None, "version {version} was given twice");
        }
    }
    let n_all = u64::from(N_WRITERS * N_VERSIONS);
    assert!(level_of.keys().copied().eq(1..=n_all), "{level_of:?}");
    let store = PolicyStore::open(dir.path()).unwrap();
    for (version, level) in &level_of {
        let found = store.get("mnist", *version).unwrap();
        assert_eq!(found.policy, policy(*level), "{version}");
        assert_eq!(found.parent, Some(version - 1), "every writer saw the one before");
    }
    let head = store.head("mnist").unwrap();
    let activated: Vec<u64> = head.history.iter().map(|entry| entry.version).collect();
    assert!(activated.iter().copied().eq(1..=n_all), "{activated:?}");
    assert_eq!((head.active, head.latest), (n_all, n_all));
}

#[test]
fn every_write_waits_for_the_lock_and_no_reader_does() {
    let dir = tempfile::tempdir().unwrap();
    let store = PolicyStore::open(dir.path()).unwrap();
    store.publish("mnist", &policy(1), Value::Null).unwrap();
    store.publish("mnist", &policy(2), Value::Null).unwrap();
    let leftover = dir.path().join("mnist/.tmp-000003.json");
    fs::write(&leftover, "half a ver").unwrap();

    let held = File::open(dir.path().join(".lock")).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    let (done, is_done) = std::sync::mpsc::sync_channel(4);
    std::thread::scope(|scope| {
        let write = |name: &'static str, act: fn(&PolicyStore)| {
            let (done, path) = (done.clone(), dir.path().to_owned());
            let store = &store;
            scope.spawn(move || {
                if name == "open" {
                    PolicyStore::open(path).unwrap();
                } else {
                    act(store);
                }
                done.send(name).unwrap();
            });
        };
        write("publish", |store| {
            store.publish("mnist", &policy(3), Value::Null).unwrap();
        });
        write("pin and unpin", |store| {
            store.pin("mnist", 1).unwrap();
            store.unpin("mnist").unwrap();
        });
        write("rollback", |store| {
            store.rollback_from("mnist", 99).unwrap();
        });
        write("open", |_| {});
        // Readers read on.
        assert_eq!(store.active("mnist").unwrap().version, 2);
        assert_eq!(store.list("mnist").unwrap().len(), 3);
        assert_eq!(store.resolve("active", "mnist").unwrap().reference, "mnist@2");
        assert!(leftover.exists(), "nobody cleans up while somebody writes");
        assert!(is_done.try_recv().is_err(), "nobody writes while somebody writes");
        flock(&held, FlockOperation::Unlock).unwrap();
    });
    drop(done);
    let finished: BTreeSet<&str> = is_done.iter().collect();
    assert_eq!(finished.len(), 4, "{finished:?}");
    assert!(!leftover.exists());
    assert_eq!(store.head("mnist").unwrap().latest, 3);
}

#[test]
fn a_rollback_of_a_version_that_is_no_longer_active_does_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = PolicyStore::open(dir.path()).unwrap();
    for level in 1..=3 {
        store.publish("mnist", &policy(level), Value::Null).unwrap();
    }
    let before = store.head("mnist").unwrap();
    assert_eq!(store.rollback_from("mnist", 2).unwrap(), None);
    assert_eq!(store.head("mnist").unwrap(), before);
    assert_eq!(store.rollback_from("mnist", 3).unwrap().unwrap().active, 2);
    store.pin("mnist", 1).unwrap();
    let error = store.rollback_from("mnist", 1).unwrap_err().to_string();
    assert!(error.contains("unpin it first"), "{error}");
}
