//! `fastaa-ctl dataset`, by running the real binary: output, exit codes, and what is left behind.

#![allow(clippy::unwrap_used, reason = "test code, but not all in a #[test]")]

mod dataset_support;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};

use assert_cmd::cargo::cargo_bin;
use dataset_support::{
    cifar_records, fashion_mnist, has_extension, idx_images, idx_labels, names_in, noise, python,
    write_idx_folder,
};
use serde_json::Value;
use tempfile::TempDir;

/// A folder of its own for each test, with an IDX source `src` in it.
fn workplace() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_idx_folder(&dir.path().join("src"), 40, 5, true);
    dir
}

/// Runs `fastaa-ctl dataset …` in `dir`.
fn ctl(dir: &Path, arguments: &[&str]) -> Output {
    command(dir).args(arguments).output().unwrap()
}

fn command(dir: &Path) -> Command {
    in_place(Command::new(cargo_bin("fastaa-ctl")), dir, ["dataset"])
}

fn in_place<S: AsRef<OsStr>>(
    mut command: Command,
    dir: &Path,
    arguments: impl IntoIterator<Item = S>,
) -> Command {
    command.current_dir(dir).env("XDG_CACHE_HOME", dir.join("cache")).args(arguments);
    command
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[track_caller]
fn succeeds(dir: &Path, arguments: &[&str]) -> Output {
    let output = ctl(dir, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    output
}

/// Runs what must fail with exit code 1; stderr must say all of `expected`.
#[track_caller]
fn fails(dir: &Path, arguments: &[&str], expected: &[&str]) {
    failed(&ctl(dir, arguments), expected);
}

#[track_caller]
fn failed(output: &Output, expected: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("error: ") && !text.contains("panicked"), "{text}");
    for part in expected {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn pack_inspect_and_verify_agree() {
    let work = workplace();
    let dir = work.path();
    let packed = succeeds(dir, &["pack", "src", "dest/deep"]);
    let text = stderr(&packed);
    assert!(text.contains("packed dest/deep/train.arrow: 40 samples, "), "{text}");
    assert!(text.contains("packed dest/deep/test.arrow: 20 samples, "), "{text}");
    assert!(text.contains(" samples/s, "), "{text}");
    assert_eq!(text.lines().count(), 2, "one line per split, no bars: {text}");
    assert_eq!(stdout(&packed), "");
    assert_eq!(names_in(&dir.join("dest/deep")), ["test.arrow", "train.arrow"]);
    assert_eq!(names_in(&dir.join("cache")), ["fastaa"], "unpacked where XDG says");

    let source = json(&succeeds(dir, &["inspect", "src", "--json"]));
    let packed = json(&succeeds(dir, &["inspect", "dest/deep", "--json"]));
    for (idx, counts) in [vec![4; 10], vec![3, 3, 2, 2, 2, 2, 2, 2, 2, 0]].iter().enumerate() {
        let (source, packed) = (&source["splits"][idx], &packed["splits"][idx]);
        for key in ["split", "n_samples", "width", "height", "channels"] {
            assert_eq!(source[key], packed[key], "{key}");
        }
        assert_eq!((&source["format"], &packed["format"]), (&"idx".into(), &"arrow".into()));
        assert_eq!(packed["label"]["counts"], Value::from(counts.clone()));
        assert_eq!(packed["label"]["n_classes"], 10, "the test split has no class 9 of its own");
    }
    let text = stdout(&succeeds(dir, &["inspect", "dest/deep", "--split", "test"]));
    for line in
        ["test\n  format       arrow\n", "  samples      20\n", "  labels       10 classes\n"]
    {
        assert!(text.contains(line), "{text}");
    }
    assert!(text.contains("  shape        5 × 5 × 1 (height, width, channels)\n"), "{text}");
    assert!(text.contains("  class 0          3\n"), "{text}");

    let text = stdout(&succeeds(dir, &["verify", "dest/deep"]));
    assert!(text.contains("train: 40 samples, all checksums right\n"), "{text}");
    let text = stdout(&succeeds(dir, &["verify", "src"]));
    assert!(text.contains("structure, labels and image files right (idx datasets"), "{text}");
}

#[test]
fn json_of_pack_names_files_and_fingerprints() {
    let work = workplace();
    let dir = work.path();
    let packed = json(&succeeds(dir, &["--json", "pack", "src", "dest", "--split", "test"]));
    assert_eq!(packed["splits"].as_array().unwrap().len(), 1);
    let split = &packed["splits"][0];
    assert_eq!((&split["split"], &split["path"]), (&"test".into(), &"dest/test.arrow".into()));
    assert_eq!(split["n_samples"], 20);
    let bytes = fs::metadata(dir.join("dest/test.arrow")).unwrap().len();
    assert_eq!(split["file_bytes"], bytes);
    let inspected = json(&succeeds(dir, &["inspect", "dest/test.arrow", "--json"]));
    assert_eq!(inspected["splits"][0]["fingerprint"], split["fingerprint"]);
    // The same content under another name has the same fingerprint; it is of the content.
    fs::rename(dir.join("src"), dir.join("moved")).unwrap();
    let again = json(&succeeds(dir, &["--json", "pack", "moved", "again", "--split", "test"]));
    assert_eq!(again["splits"][0]["fingerprint"], split["fingerprint"]);
}

#[test]
fn cifar_is_packed_with_class_names_as_python_reads_it() {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path();
    fs::create_dir(dir.join("c10")).unwrap();
    fs::create_dir(dir.join("c100")).unwrap();
    let labels: Vec<[u8; 1]> = (0..30).map(|idx| [idx * 7 % 10]).collect();
    let labels: Vec<&[u8]> = labels.iter().map(<[u8; 1]>::as_slice).collect();
    for (n, part) in labels.chunks(7).enumerate() {
        let content = cifar_records(n as u64, part);
        fs::write(dir.join(format!("c10/data_batch_{}.bin", n + 1)), content).unwrap();
    }
    let names: Vec<String> = (0..10).map(|class| format!("kind {class}")).collect();
    fs::write(dir.join("c10/batches.meta.txt"), names.join("\n") + "\n\n").unwrap();
    let fine = cifar_records(9, &[&[1, 50], &[0, 3], &[2, 99]]);
    fs::write(dir.join("c100/test.bin"), fine).unwrap();

    succeeds(dir, &["pack", "c10", "p10"]);
    succeeds(dir, &["pack", "c100/test.bin", "p100"]);
    assert_eq!(names_in(&dir.join("p10")), ["train.arrow"]);
    assert_eq!(names_in(&dir.join("p100")), ["test.arrow"]);
    let text = stdout(&succeeds(dir, &["inspect", "p10"]));
    assert!(text.contains("  class 7          3  kind 7\n"), "{text}");
    let shown = json(&succeeds(dir, &["inspect", "p10/train.arrow", "--json"]));
    assert_eq!(shown["splits"][0]["class_names"], Value::from(names));
    let Some(python) = python() else { return };
    let at = |name: &str| dir.join(name).display().to_string();
    let batches: Vec<String> = (1..=5).map(|n| at(&format!("c10/data_batch_{n}.bin"))).collect();
    let packed = at("p10/train.arrow");
    let mut arguments = vec!["cifar10", &packed];
    arguments.extend(batches.iter().map(String::as_str));
    dataset_support::check_with(&python, &arguments);
    let arguments = ["cifar100", &at("p100/test.arrow"), &at("c100/test.bin")];
    dataset_support::check_with(&python, &arguments);
}

#[test]
fn existing_files_are_replaced_only_by_force() {
    let work = workplace();
    let dir = work.path();
    fs::create_dir(dir.join("dest")).unwrap();
    fs::write(dir.join("dest/test.arrow"), "mine").unwrap();
    fails(
        dir,
        &["pack", "src", "dest"],
        &["dest/test.arrow exists already", "use --force to replace it"],
    );
    assert_eq!(names_in(&dir.join("dest")), ["test.arrow"], "no other split, no temp file");
    assert_eq!(fs::read(dir.join("dest/test.arrow")).unwrap(), b"mine");
    succeeds(dir, &["pack", "src", "dest", "--force"]);
    succeeds(dir, &["verify", "dest"]);
    // A packed folder is a source like any other, even for itself.
    let before = json(&succeeds(dir, &["inspect", "dest", "--json"]));
    succeeds(dir, &["pack", "dest", "dest", "--force"]);
    let after = json(&succeeds(dir, &["inspect", "dest", "--json"]));
    assert_eq!(before["splits"][0]["fingerprint"], after["splits"][0]["fingerprint"]);
}

#[test]
fn sources_that_are_not_there_are_named() {
    let work = workplace();
    let dir = work.path();
    fails(
        dir,
        &["pack", "nowhere", "dest"],
        &["nowhere: no such file or folder; looked for a packed"],
    );
    fs::create_dir(dir.join("empty")).unwrap();
    let looked_for = "looked for train.arrow, train-images-idx3-ubyte[.gz], data_batch_1.bin";
    fails(dir, &["pack", "empty", "dest"], &["empty: no split 'train' here", looked_for]);
    fails(dir, &["inspect", "empty"], &["no dataset is in it", looked_for]);
    fails(dir, &["verify", "src", "--split", "dev"], &["src: no split 'dev'", "has train, test"]);
    fails(dir, &["pack", "src", "dest", "--split", "dev"], &["no split 'dev'", "has train, test"]);
    fails(dir, &["pack", "src", "dest", "--split", "../x"], &["'../x' cannot be the name"]);
    fs::remove_file(dir.join("src/train-labels-idx1-ubyte.gz")).unwrap();
    fails(
        dir,
        &["pack", "src", "dest"],
        &["src/train-images-idx3-ubyte.gz: its labels file is missing", "train-labels-idx1-ubyte"],
    );
    assert!(!dir.join("dest").exists(), "nothing is made for a source that cannot be read");
}

#[test]
fn damaged_samples_are_listed_and_exit_with_1() {
    let work = workplace();
    let dir = work.path();
    succeeds(dir, &["pack", "src", "dest"]);
    let path = dir.join("dest/train.arrow");
    let pixels = noise(10, 40 * 25);
    let mut bytes = fs::read(&path).unwrap();
    let at = (0..bytes.len()).find(|at| bytes[*at..].starts_with(&pixels)).unwrap();
    bytes[at + 25 * 17 + 3] ^= 0x40;
    fs::write(&path, &bytes).unwrap();
    let output = ctl(dir, &["verify", "dest"]);
    failed(&output, &["error: dest: 1 damaged split(s)", "hint: copy the file again"]);
    let text = stdout(&output);
    assert!(text.contains("train: 1 of 40 samples are bad\n  sample 17: checksum "), "{text}");
    assert!(text.contains("test: 20 samples, all checksums right"), "{text}");
    let report = json(&ctl(dir, &["verify", "dest", "--json"]));
    assert_eq!(report["good"], false);
    assert_eq!(report["splits"][0]["n_bad"], 1);
    assert_eq!(report["splits"][0]["first_bad"][0]["sample"], 17);
    assert_eq!(report["splits"][1]["good"], true);
    fails(
        dir,
        &["pack", "dest", "again"],
        &["dest: sample 17 does not match its stored checksum; copy or download the file again"],
    );
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    fails(
        dir,
        &["verify", "dest"],
        &["dest/train.arrow: not a whole Arrow IPC file", "pack it anew"],
    );
    fails(dir, &["inspect", "dest"], &["dest/train.arrow: not a whole Arrow IPC file"]);
}

/// Large enough to run into any of the limits below, in either pass of writing.
fn write_large_source(dir: &Path) {
    let n = 2000_u32;
    fs::create_dir_all(dir.join("large")).unwrap();
    let images = idx_images(&[n, 28, 28], &noise(4, n as usize * 784));
    fs::write(dir.join("large/train-images-idx3-ubyte"), images).unwrap();
    let labels: Vec<u8> = (0..n).map(|idx| u8::try_from(idx % 10).unwrap()).collect();
    fs::write(dir.join("large/train-labels-idx1-ubyte"), idx_labels(&labels)).unwrap();
}

#[test]
fn a_file_size_limit_is_an_error_that_leaves_everything_as_it_was() {
    let work = workplace();
    let dir = work.path();
    write_large_source(dir);
    fs::create_dir(dir.join("dest")).unwrap();
    fs::write(dir.join("dest/train.arrow"), "mine").unwrap();
    for (limit_kib, source, dest) in
        [("0", "large", "dest"), ("64", "large", "dest"), ("1000", "large", "made/for/it")]
    {
        let shell = Command::new("bash");
        let binary = cargo_bin("fastaa-ctl").into_os_string();
        let line =
            format!("ulimit -f {limit_kib} && exec \"$0\" dataset pack {source} {dest} --force");
        let output = in_place(shell, dir, ["-c".into(), line.into(), binary]).output().unwrap();
        let named = format!("cannot write {dest}/train.arrow: File too large");
        failed(&output, &[&named, "raise the limit on file sizes (`ulimit -f`)"]);
    }
    assert_eq!(names_in(&dir.join("dest")), ["train.arrow"]);
    assert_eq!(fs::read(dir.join("dest/train.arrow")).unwrap(), b"mine");
    assert!(!dir.join("made").exists(), "folders that were made are gone again");
    // The same while a .gz is unpacked into the cache.
    let binary = cargo_bin("fastaa-ctl").into_os_string();
    let line = "ulimit -f 0 && exec \"$0\" dataset inspect src".to_owned();
    let output = in_place(Command::new("bash"), dir, ["-c".into(), line.into(), binary]);
    failed(&{ output }.output().unwrap(), &["cannot write ", "cache/fastaa/", "File too large"]);
    let left = names_in(&dir.join("cache/fastaa"));
    assert!(left.iter().all(|name| has_extension(name, "lock")), "{left:?}");
    succeeds(dir, &["pack", "large", "dest", "--force"]);
}

#[test]
fn a_full_disk_is_an_error_that_leaves_everything_as_it_was() {
    let work = workplace();
    let dir = work.path();
    write_large_source(dir);
    fs::create_dir(dir.join("disk")).unwrap();
    // A mount namespace of its own: the mount ends with the shell.
    let mount = "mount -t tmpfs -o size=1m none disk";
    let unshared = |script: &str| {
        let binary = cargo_bin("fastaa-ctl").into_os_string();
        let script = format!("{mount} && {script}");
        let arguments = ["-m", "bash", "-c", &script].map(Into::into);
        in_place(Command::new("unshare"), dir, arguments.into_iter().chain([binary]))
            .output()
            .unwrap()
    };
    let probe = unshared("true");
    if !probe.status.success() {
        eprintln!("SKIPPED: no tmpfs can be mounted here: {}", stderr(&probe));
        return;
    }
    let output = unshared(
        "\"$0\" dataset pack src disk && cp disk/train.arrow before && ls -A disk > names; \
         \"$0\" dataset pack large disk --force; code=$?; \
         cmp disk/train.arrow before && ls -A disk | cmp - names && exit $code",
    );
    failed(
        &output,
        &["cannot write disk/train.arrow: No space left on device", "free some space there"],
    );
    assert_eq!(fs::read_to_string(dir.join("names")).unwrap(), "test.arrow\ntrain.arrow\n");
}

#[test]
fn destinations_that_are_no_folder_are_named() {
    let work = workplace();
    let dir = work.path();
    fs::write(dir.join("file"), "mine").unwrap();
    for dest in ["file", "file/below", "file/far/below"] {
        let named = format!("cannot write {dest}: ");
        fails(dir, &["pack", "src", dest], &[&named, "a part of the path is a file: choose"]);
    }
    assert_eq!(fs::read(dir.join("file")).unwrap(), b"mine");
    fails(
        dir,
        &["inspect", "src", "--cache-dir", "file/cache"],
        &["cannot write file/cache: ", "a part of the path is a file"],
    );
    fails(dir, &["inspect", "file"], &["file: not a dataset file that is known"]);
}

#[test]
fn two_packs_into_one_folder_do_not_mix() {
    let work = workplace();
    let dir = work.path();
    fs::create_dir(dir.join("dest")).unwrap();
    // What a pack holds while it runs, without having to catch one running.
    let lock = File::open(dir.join("dest")).unwrap();
    lock.lock().unwrap();
    fails(
        dir,
        &["pack", "src", "dest"],
        &["dest: another pack is writing here; wait until it ends"],
    );
    drop(lock);
    // Left by a pack that was killed.
    fs::write(dir.join("dest/.train.arrow.tmp"), "half a file").unwrap();
    let start = || command(dir).args(["pack", "src", "dest", "--force"]).output().unwrap();
    let outputs: Vec<Output> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(start)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(outputs.iter().any(|output| output.status.success()));
    for output in outputs.iter().filter(|output| !output.status.success()) {
        failed(output, &["another pack is writing here"]);
    }
    assert_eq!(names_in(&dir.join("dest")), ["test.arrow", "train.arrow"]);
    succeeds(dir, &["verify", "dest"]);
}

#[test]
fn list_without_a_daemon_exits_with_69() {
    let work = workplace();
    let runtime_dir = work.path().join("run").display().to_string();
    let output = ctl(work.path(), &["list", "--runtime-dir", &runtime_dir]);
    assert_eq!(output.status.code(), Some(69), "{}", stderr(&output));
    assert!(stderr(&output).contains("hint: "), "{}", stderr(&output));
}

#[test]
fn wrong_arguments_exit_with_2() {
    let work = workplace();
    for arguments in [&["pack", "src"][..], &["inspect"], &["verify", "src", "--force"], &["turn"]]
    {
        assert_eq!(ctl(work.path(), arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn fashion_mnist_is_packed_and_verified_by_the_command() {
    let Some(source) = fashion_mnist() else { return };
    let work = tempfile::tempdir().unwrap();
    let dir = work.path();
    let source = source.display().to_string();
    succeeds(dir, &["pack", &source, "dest"]);
    let shown = json(&succeeds(dir, &["inspect", "dest", "--json"]));
    let train = &shown["splits"][0];
    assert_eq!(train["label"]["counts"], Value::from(vec![6000; 10]));
    assert_eq!((&train["width"], &train["channels"]), (&28.into(), &1.into()));
    succeeds(dir, &["verify", "dest"]);
}
