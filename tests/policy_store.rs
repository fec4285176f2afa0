//! The policy store: versions, pin, rollback, references, and that a writer killed at any moment
//! leaves the old state or the new one.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a helper of a test is a test")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use fastaa::limits;
use fastaa::policy::{
    self, HistoryKind, Magnitude, Op, OpStep, OpsProfile, Policy, PolicyError, PolicyStore,
    SubPolicy,
};
use serde_json::{Map, Value, json};

/// A policy that differs from those of other `level`s.
fn policy(level: u32) -> Policy {
    let magnitude = Magnitude::Fixed(f64::from(level) / f64::from(u32::MAX));
    let ops = vec![OpStep { op: Op::Rotate, probability: 0.5, magnitude }];
    let sub_policies = vec![SubPolicy { weight: 1.0, ops }];
    Policy::new(format!("p{level}"), OpsProfile::Fastaa, 1, sub_policies, Map::new()).unwrap()
}

fn store_with(n_versions: u32) -> (tempfile::TempDir, PolicyStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = PolicyStore::open(dir.path().join("policies")).unwrap();
    for level in 1..=n_versions {
        assert!(store.publish("mnist", &policy(level), Value::Null).unwrap().is_new);
    }
    (dir, store)
}

fn check_error<T: std::fmt::Debug>(result: Result<T, PolicyError>, expected: &str) {
    let error = result.unwrap_err().to_string();
    assert!(error.contains(expected), "'{error}' lacks '{expected}'");
}

fn active(store: &PolicyStore) -> u64 {
    store.active("mnist").unwrap().version
}

#[test]
fn a_published_version_keeps_everything_and_becomes_active() {
    let (_dir, store) = store_with(0);
    let before = store.active("mnist").unwrap();
    assert_eq!((before.version, &before.policy), (0, &policy::none()));
    let evidence = json!({"gain": 1.5, "seeds": [1, 2]});
    let published = store.publish("mnist", &policy(1), evidence.clone()).unwrap();
    assert!(published.is_new && published.is_active);
    let version = store.get("mnist", 1).unwrap();
    assert_eq!(version, published.version);
    assert_eq!((version.version, version.parent), (1, Some(0)));
    assert_eq!((&version.policy, version.id), (&policy(1), policy(1).id()));
    assert_eq!(version.evidence, evidence);
    let time = version.published_at.unwrap();
    assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
    assert_eq!(active(&store), 1);
    let head = store.head("mnist").unwrap();
    assert_eq!((head.latest, head.pinned, head.previous.as_slice()), (1, None, &[0][..]));
    assert_eq!(head.history[0].kind, HistoryKind::Publish);
    assert_eq!(store.names().unwrap(), ["mnist"]);
    assert_eq!(store.active("cifar").unwrap().version, 0, "other names are not touched");
}

#[test]
fn publishing_the_active_content_again_changes_nothing() {
    let (_dir, store) = store_with(2);
    let head = store.head("mnist").unwrap();
    let renamed = policy(2).with_name("another name").unwrap();
    let again = store.publish("mnist", &renamed, json!("more")).unwrap();
    assert!(!again.is_new && again.is_active);
    assert_eq!(again.version, store.get("mnist", 2).unwrap());
    assert_eq!(store.head("mnist").unwrap(), head);
    assert!(store.publish("mnist", &policy(1), Value::Null).unwrap().is_new, "an older content");
    let none = store.publish("fresh", &policy::none(), Value::Null).unwrap();
    assert!(!none.is_new && none.version.version == 0);
}

#[test]
fn a_pin_holds_and_unpinning_goes_to_the_newest() {
    let (_dir, store) = store_with(3);
    assert_eq!(store.pin("mnist", 1).unwrap().active, 1);
    let published = store.publish("mnist", &policy(4), Value::Null).unwrap();
    assert!(published.is_new && !published.is_active);
    let again = store.publish("mnist", &policy(4), Value::Null).unwrap();
    assert!(!again.is_new && !again.is_active, "idempotent under a pin, too");
    assert_eq!(active(&store), 1);
    check_error(store.rollback("mnist"), "pinned at version 1; unpin it first");
    assert_eq!(store.pin("mnist", 0).unwrap().pinned, Some(0));
    assert_eq!(store.active("mnist").unwrap().policy, policy::none());
    assert_eq!(store.unpin("mnist").unwrap().active, 4);
    check_error(store.unpin("mnist"), "no pinned policy");
    check_error(
        store.pin("mnist", 9),
        "there is no policy mnist@9; the newest version of 'mnist' is 4",
    );
    assert_eq!(active(&store), 4);
}

#[test]
fn rollback_goes_back_step_by_step() {
    let (_dir, store) = store_with(3);
    assert_eq!(store.rollback("mnist").unwrap().active, 2);
    assert_eq!(store.rollback("mnist").unwrap().active, 1);
    let published = store.publish("mnist", &policy(4), Value::Null).unwrap();
    assert_eq!((published.version.version, published.version.parent), (4, Some(1)));
    assert_eq!(active(&store), 4);
    assert_eq!(store.rollback("mnist").unwrap().active, 1);
    assert_eq!(store.rollback("mnist").unwrap().active, 0);
    check_error(store.rollback("mnist"), "no earlier active version to roll back to");
    check_error(store.rollback("untouched"), "no earlier active version");
    let kinds: Vec<_> = store.head("mnist").unwrap().history.iter().map(|e| e.version).collect();
    assert_eq!(kinds, [1, 2, 3, 2, 1, 4, 1, 0]);
}

#[test]
fn references_are_resolved_to_exactly_one_policy() {
    let (dir, store) = store_with(3);
    store.pin("mnist", 2).unwrap();
    let path = dir.path().join("mine.json");
    fs::write(&path, policy::to_text(&policy(7))).unwrap();
    let path = path.to_str().unwrap();
    // A file is kept by its content, which is found again without the file.
    let by_id = format!("id:{}", policy(7).id());
    for (reference, level, version, canonical) in [
        ("active", Some(2), 2, "mnist@2"),
        (" mnist@active ", Some(2), 2, "mnist@2"),
        ("mnist@3", Some(3), 3, "mnist@3"),
        ("mnist@0", None, 0, "none"),
        ("none", None, 0, "none"),
        (path, Some(7), 0, by_id.as_str()),
        (by_id.as_str(), Some(7), 0, by_id.as_str()),
    ] {
        let resolved = store.resolve(reference, "mnist").unwrap();
        let expected = level.map_or_else(policy::none, policy);
        assert_eq!(resolved.policy.id(), expected.id(), "{reference}");
        assert_eq!(resolved.id, expected.id());
        assert_eq!((resolved.version, resolved.reference.as_str()), (version, canonical));
    }
    let resolved = store.resolve("randaugment(2, 9)", "mnist").unwrap();
    assert_eq!((resolved.version, resolved.reference.as_str()), (0, "randaugment(2,9)"));
    assert_eq!(store.resolve("active", "cifar").unwrap().reference, "none");
    assert_eq!(store.resolve("cifar@active", "cifar").unwrap().reference, "none");
    for (reference, expected) in [
        ("mnist@4", "there is no policy mnist@4; the newest version of 'mnist' is 3"),
        ("minst@active", "no policy was ever published for 'minst'; did you mean 'mnist'?"),
        ("minst@2", "no policy was ever published for 'minst'; did you mean 'mnist'?"),
        ("mnist@latest", "'latest' is no version; write mnist@active or mnist@NUMBER"),
        ("mnist@-1", "'-1' is no version"),
        ("@1", "'' is no dataset name"),
        ("a b@1", "'a b' is no dataset name"),
        ("trivial", "did you mean 'trivial-wide'?"),
    ] {
        check_error(store.resolve(reference, "mnist"), expected);
    }
}

#[test]
fn names_cannot_leave_the_folder() {
    let (dir, store) = store_with(0);
    for name in ["", ".", "..", "../x", ".hidden", "a/b", "a\0b", "ä", "a b", &"x".repeat(129)] {
        check_error(store.publish(name, &policy(1), Value::Null), "is no dataset name");
        check_error(store.get(name, 0), "is no dataset name");
        check_error(store.pin(name, 0), "is no dataset name");
        check_error(store.resolve("active", name), "is no dataset name");
    }
    let files: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(files.len(), 1, "only the store's own folder");
    assert!(store.publish("A-Za_z.0-9", &policy(1), Value::Null).unwrap().is_new);
}

#[test]
fn too_much_evidence_is_refused_and_leaves_nothing() {
    let (_dir, store) = store_with(1);
    let evidence =
        Value::from("x".repeat(usize::try_from(limits::POLICY_VERSION_BYTES_MAX).unwrap()));
    check_error(store.publish("mnist", &policy(2), evidence), "are over the limit of");
    assert_eq!(store.list("mnist").unwrap().len(), 2);
}

#[test]
fn threads_take_turns() {
    let (_dir, store) = store_with(0);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let store = &store;
            scope.spawn(move || {
                for index in 0..10 {
                    let level = 1 + thread * 100 + index;
                    let published = store.publish("mnist", &policy(level), Value::Null).unwrap();
                    assert_eq!(published.version.policy, policy(level));
                    store.active("mnist").unwrap();
                }
            });
        }
    });
    let versions = store.list("mnist").unwrap();
    let ids: BTreeSet<_> = versions.iter().map(|(_, v)| v.as_ref().unwrap().id).collect();
    assert_eq!((versions.len(), ids.len()), (41, 41));
    assert_eq!(active(&store), 40);
}

// --- damage and crashes ---

fn lineage(dir: &tempfile::TempDir) -> std::path::PathBuf {
    dir.path().join("policies/mnist")
}

#[test]
fn a_damaged_version_is_named_and_hides_no_other() {
    let (dir, store) = store_with(3);
    let path = lineage(&dir).join("000002.json");
    let good = fs::read_to_string(&path).unwrap();
    let other = fs::read_to_string(lineage(&dir).join("000001.json")).unwrap();
    let mut cases: Vec<String> =
        (0..good.len()).step_by(37).map(|length| good[..length].to_owned()).collect();
    cases.push(good.replace("Rotate", "ShearX"));
    cases.push(good.replace("\"format\":1", "\"format\":2"));
    cases.push(format!("{good}x"));
    cases.push(other);
    for case in cases {
        fs::write(&path, &case).unwrap();
        check_error(store.get("mnist", 2), "000002.json is damaged: ");
        check_error(store.resolve("mnist@2", "mnist"), "choose another version");
        assert_eq!(active(&store), 3);
        let list = store.list("mnist").unwrap();
        let readable: Vec<u64> =
            list.iter().filter(|(_, v)| v.is_ok()).map(|(number, _)| *number).collect();
        assert_eq!((list.len(), readable.as_slice()), (4, &[0, 1, 3][..]), "{case}");
        check_error(store.pin("mnist", 2), "000002.json is damaged: ");
        check_error(store.rollback("mnist"), "000002.json is damaged: ");
        assert_eq!(active(&store), 3);
    }
    assert_eq!(store.publish("mnist", &policy(4), Value::Null).unwrap().version.version, 4);
}

#[test]
fn a_damaged_active_json_is_named_and_a_missing_one_is_rebuilt() {
    let (dir, store) = store_with(3);
    store.rollback("mnist").unwrap();
    let path = lineage(&dir).join("active.json");
    let good = fs::read_to_string(&path).unwrap();
    let mut cases: Vec<String> =
        (0..good.len()).step_by(11).map(|length| good[..length].to_owned()).collect();
    cases.push(good.replace("\"mnist\"", "\"other\""));
    cases.push(good.replace("\"active\":2", "\"active\":3"));
    for case in cases {
        fs::write(&path, &case).unwrap();
        check_error(store.active("mnist"), "active.json is damaged: ");
        check_error(store.active("mnist"), "remove it: then the newest version becomes active");
        check_error(store.publish("mnist", &policy(4), Value::Null), "active.json is damaged");
        assert_eq!(store.get("mnist", 1).unwrap().policy, policy(1));
        assert_eq!(store.list("mnist").unwrap().len(), 4);
    }
    fs::remove_file(&path).unwrap();
    assert_eq!(active(&store), 3);
    assert_eq!(store.rollback("mnist").unwrap().active, 2);
}

/// Copies a folder tree.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

/// Every state that a publication can stop in, built from the files before and after it.
#[test]
fn each_step_of_a_publication_leaves_the_old_or_the_new_state() {
    for pinned in [None, Some(1)] {
        let (before, store) = store_with(2);
        if let Some(version) = pinned {
            store.pin("mnist", version).unwrap();
        }
        let after = tempfile::tempdir().unwrap();
        copy(before.path(), after.path());
        let after_store = PolicyStore::open(after.path().join("policies")).unwrap();
        after_store.publish("mnist", &policy(3), Value::Null).unwrap();
        let version = fs::read(lineage(&after).join("000003.json")).unwrap();
        let head = fs::read(lineage(&after).join("active.json")).unwrap();
        let old_head = store.head("mnist").unwrap();
        let new_head = after_store.head("mnist").unwrap();

        let check = |files: &[(&str, &[u8])], is_new: bool| {
            let crashed = tempfile::tempdir().unwrap();
            copy(before.path(), crashed.path());
            for (name, bytes) in files {
                fs::write(lineage(&crashed).join(name), bytes).unwrap();
            }
            let store = PolicyStore::open(crashed.path().join("policies")).unwrap();
            let expected = if is_new { &new_head } else { &old_head };
            assert_eq!(&store.head("mnist").unwrap(), expected);
            assert_eq!(store.list("mnist").unwrap().len(), if is_new { 4 } else { 3 });
            let leftovers = fs::read_dir(lineage(&crashed)).unwrap().filter(|entry| {
                entry.as_ref().unwrap().file_name().to_string_lossy().starts_with('.')
            });
            assert_eq!(leftovers.count(), 0, "half-written files are removed");
            let again = store.publish("mnist", &policy(3), Value::Null).unwrap();
            assert_eq!((again.is_new, again.version.version), (!is_new, 3));
        };
        for length in (0..=version.len()).step_by(41).chain([version.len()]) {
            check(&[(".tmp-000003.json", &version[..length])], false);
        }
        check(&[("000003.json", &version)], true);
        for length in (0..=head.len()).step_by(41).chain([head.len()]) {
            check(&[("000003.json", &version), (".tmp-active.json", &head[..length])], true);
        }
        check(&[("000003.json", &version), ("active.json", &head)], true);
    }
}

const WRITER_DIR: &str = "FASTAA_TEST_WRITER_DIR";

/// The child of the test below: publishes, and says so, until it is killed.
#[test]
fn child_writer() {
    let Some(dir) = std::env::var_os(WRITER_DIR) else { return };
    let store = PolicyStore::open(dir).unwrap();
    let first = u32::try_from(store.head("mnist").unwrap().latest).unwrap() + 1;
    for level in first.. {
        let version = store.publish("mnist", &policy(level), Value::Null).unwrap().version.version;
        let mut out = std::io::stderr().lock();
        writeln!(out, "published {version}").unwrap();
    }
}

#[test]
fn a_writer_killed_at_any_moment_loses_nothing_it_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut n_before = 0;
    for round in 0..12 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_writer", "--nocapture"])
            .env(WRITER_DIR, dir.path())
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut acknowledged = 0;
        for _ in 0..=round % 5 {
            let line = lines.next().unwrap().unwrap();
            acknowledged = line.strip_prefix("published ").unwrap().parse().unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines {
            let line = line.unwrap();
            if let Some(version) = line.strip_prefix("published ") {
                acknowledged = version.parse().unwrap();
            }
        }
        let store = PolicyStore::open(dir.path()).unwrap();
        let newest = active(&store);
        assert!(newest >= acknowledged && newest <= acknowledged + 1, "{newest}, {acknowledged}");
        assert!(newest > n_before);
        for (version, found) in store.list("mnist").unwrap().into_iter().skip(1) {
            let expected = policy(u32::try_from(version).unwrap());
            assert_eq!(found.unwrap().policy, expected);
        }
        let head = store.head("mnist").unwrap();
        assert_eq!((head.active, head.history.len() as u64), (newest, newest));
        n_before = newest;
    }
}
