//! Damaged and wrong files: each is an error that names the file and the cure, never a panic.

#![allow(clippy::unwrap_used, reason = "test code, but not all in a #[test]")]

mod dataset_support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dataset_support::{
    Labels, MemorySplit, cifar_records, gz, has_extension, idx_images, idx_labels, names_in, noise,
    raw_sample, shape_of, write_idx_folder,
};
use fastaa::dataset::{self, FingerprintCheck, ImageKind, Label, LabelKind, Split, VerifyReport};
use tempfile::TempDir;

fn open(path: &Path) -> Result<Arc<dyn Split>, String> {
    let cache = path.parent().unwrap().join("cache");
    dataset::open_split(path, "train", &cache).map_err(|error| error.to_string())
}

/// Opens what must be refused; the message must name the file and say `expected`.
#[track_caller]
fn refused(path: &Path, named: &str, expected: &str) {
    let error = open(path).expect_err("it must be refused");
    assert!(error.contains(named), "{named:?} is not named: {error}");
    assert!(error.contains(expected), "{expected:?} is not said: {error}");
}

fn verify(path: &Path) -> Result<VerifyReport, String> {
    let cache = path.parent().unwrap().join("cache");
    dataset::verify_split(path, "train", &cache, &mut |_| Ok(()), &mut |_| {})
        .map_err(|error| error.to_string())
}

fn packed(split: &MemorySplit) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train.arrow");
    dataset::write_split(split, "train", "memory", &path, false, &mut |_| {}).unwrap();
    (dir, path)
}

/// Puts other content at a path as a new file: maps of the old one must not change.
fn replace(path: &Path, content: &[u8]) {
    let _ = fs::remove_file(path);
    fs::write(path, content).unwrap();
}

/// Where `needle` begins in `bytes`; it must be there once.
fn find(bytes: &[u8], needle: &[u8]) -> usize {
    let hits: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(needle)).collect();
    assert_eq!(hits.len(), 1, "{hits:?}");
    hits[0]
}

#[test]
fn every_cut_of_an_arrow_file_is_refused() {
    let vectors = Labels::Vectors(vec![vec![0.5, 1.5], vec![2.5, 3.5]]);
    for split in [MemorySplit::small(5), MemorySplit::new([2, 2, 3], true, noise(1, 24), vectors)] {
        let (_dir, path) = packed(&split);
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            replace(&path, &whole[..cut]);
            refused(&path, "train.arrow: not a whole Arrow IPC file", "copy it again, or pack it");
        }
    }
}

#[test]
fn every_flipped_bit_of_an_arrow_file_is_harmless_or_found() {
    let split = MemorySplit::small(4);
    let (_dir, path) = packed(&split);
    let whole = fs::read(&path).unwrap();
    let pixels_at = find(&whole, &split.pixels);
    let pixels = pixels_at..pixels_at + split.pixels.len();
    let (mut n_refused, mut n_found) = (0, 0);
    for bit in 0..8 * whole.len() {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        replace(&path, &bytes);
        match open(&path) {
            Ok(opened) => {
                for sample_idx in 0..opened.info().n_samples {
                    raw_sample(&*opened, sample_idx);
                }
            }
            Err(error) => {
                assert!(error.contains("train.arrow: "), "bit {bit}: {error}");
                n_refused += 1;
            }
        }
        match verify(&path) {
            Ok(report) if pixels.contains(&(bit / 8)) => {
                assert_eq!(report.n_bad, 1, "bit {bit}");
                let sample_idx = ((bit / 8 - pixels.start) / 15) as u64;
                assert_eq!(report.first_bad[0].sample_idx, sample_idx, "bit {bit}");
                n_found += 1;
            }
            Ok(report) if report.is_good() => {
                // Padding, names for people, the schema's copy at the beginning: same samples.
                for sample_idx in 0..4 {
                    let opened = open(&path).unwrap();
                    let a = raw_sample(&*opened, sample_idx);
                    assert_eq!(a, raw_sample(&split, sample_idx), "bit {bit}");
                }
            }
            Ok(_) => n_found += 1,
            Err(error) => assert!(error.contains("train.arrow: "), "bit {bit}: {error}"),
        }
    }
    assert!(n_refused > 1000, "{n_refused}");
    assert!(n_found >= 8 * split.pixels.len(), "{n_found}");
}

#[test]
fn random_bytes_and_random_overwrites_never_panic() {
    let (_dir, path) = packed(&MemorySplit::small(6));
    let whole = fs::read(&path).unwrap();
    for seed in 0..3000_u64 {
        let mut bytes = whole.clone();
        let random = noise(seed, 12);
        let at = usize::from(u16::from_le_bytes([random[0], random[1]])) % bytes.len();
        let end = (at + 1 + usize::from(random[2] % 8)).min(bytes.len());
        let patch = [&random[4..], &[0xff; 8], &[0; 8]].concat();
        let from = usize::from(random[3] % 3) * 8;
        bytes[at..end].copy_from_slice(&patch[from..from + end - at]);
        replace(&path, &bytes);
        if let Err(error) = open(&path) {
            assert!(error.contains("train.arrow: "), "seed {seed}: {error}");
        }
        replace(&path, &[b"ARROW1\0\0", &noise(seed, 200)[..], b"ARROW1"].concat());
        refused(&path, "train.arrow", "not a whole Arrow IPC file");
    }
}

#[test]
fn verify_lists_the_first_bad_samples_and_counts_all() {
    let split = MemorySplit::small(40);
    let (_dir, path) = packed(&split);
    let whole = fs::read(&path).unwrap();
    let pixels_at = find(&whole, &split.pixels);
    let mut bytes = whole.clone();
    for sample_idx in (3..33).step_by(2) {
        bytes[pixels_at + 15 * sample_idx] ^= 1;
    }
    replace(&path, &bytes);
    let report = verify(&path).unwrap();
    assert!(!report.is_good());
    assert_eq!((report.n_bad, report.first_bad.len()), (15, 10));
    assert_eq!(report.first_bad[1].sample_idx, 5);
    assert!(report.first_bad[1].reason.contains("is stored"), "{report:?}");
    assert_eq!(report.fingerprint, FingerprintCheck::Matches, "checksums themselves are whole");
}

#[test]
fn labels_out_of_range_are_refused_and_listed() {
    let split = MemorySplit::small(5);
    let (_dir, path) = packed(&split);
    let whole = fs::read(&path).unwrap();
    let column: Vec<u8> =
        [0_i64, 1, 2, 0, 1].iter().flat_map(|class| class.to_le_bytes()).collect();
    let labels_at = find(&whole, &column);
    for label in [3, -1, i64::MIN, i64::MAX] {
        let mut bytes = whole.clone();
        bytes[labels_at + 16..labels_at + 24].copy_from_slice(&label.to_le_bytes());
        replace(&path, &bytes);
        refused(&path, "train.arrow: sample 2", &format!("label {label}, but there are 3 classes"));
        let report = verify(&path).unwrap();
        assert_eq!((report.n_bad, report.first_bad[0].sample_idx), (1, 2));
        assert_eq!(report.first_bad[0].reason, format!("label {label} is not in 0..3"));
        assert_eq!(report.fingerprint, FingerprintCheck::NotCompared);
    }
}

#[test]
fn exchanged_samples_are_found_by_the_fingerprint() {
    // Two packs of the same samples in another order: checksums go with their samples.
    let split = MemorySplit::small(4);
    let mut turned = split.clone();
    turned.pixels.rotate_left(15);
    let Labels::Classes(classes) = &mut turned.labels else { panic!("small splits have classes") };
    classes.rotate_left(1);
    let ((_dir, path), (_other_dir, other)) = (packed(&split), packed(&turned));
    let fingerprint = |path| open(path).unwrap().info().fingerprint.0.clone();
    let (own, others) = (fingerprint(&path), fingerprint(&other));
    assert_ne!(own, others);
    let text = fs::read(&path).unwrap();
    let mut bytes = text.clone();
    for at in 0..text.len() {
        if text[at..].starts_with(own.as_bytes()) {
            bytes[at..at + own.len()].copy_from_slice(others.as_bytes());
        }
    }
    replace(&path, &bytes);
    let report = verify(&path).unwrap();
    assert_eq!(report.n_bad, 0);
    assert!(!report.is_good());
    let computed = dataset::Fingerprint(own);
    assert_eq!(report.fingerprint, FingerprintCheck::Differs { computed });
}

#[test]
fn every_cut_of_idx_files_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_idx_folder(dir.path(), 6, 4, false);
    let (images, labels) =
        (dir.path().join("train-images-idx3-ubyte"), dir.path().join("train-labels-idx1-ubyte"));
    assert_eq!(open(&images).unwrap().info().n_samples, 6);
    assert_eq!(open(dir.path()).unwrap().info().n_samples, 6);
    for damaged in [&images, &labels] {
        let name = damaged.file_name().unwrap().to_str().unwrap();
        let whole = fs::read(damaged).unwrap();
        for cut in 0..whole.len() {
            replace(damaged, &whole[..cut]);
            refused(&images, name, "copy or download the file again");
        }
        replace(damaged, &[&whole[..], &[0]].concat());
        refused(&images, name, "bytes long, but its header stands for");
        replace(damaged, &whole);
    }
}

#[test]
fn every_cut_of_gz_files_is_refused_and_leaves_nothing_in_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    write_idx_folder(dir.path(), 6, 4, true);
    let images = dir.path().join("train-images-idx3-ubyte.gz");
    let whole = fs::read(&images).unwrap();
    // Two bytes are enough to know that it is gzip.
    for cut in 2..whole.len() {
        replace(&images, &whole[..cut]);
        refused(&images, "train-images-idx3-ubyte.gz: ", "download");
    }
    assert!(names_in(&dir.path().join("cache")).iter().all(|name| has_extension(name, "lock")));
    replace(&images, &whole);
    let opened = open(&images).unwrap();
    assert_eq!(opened.info().n_samples, 6);
    // A cached entry that was cut off later is made anew.
    let cache = dir.path().join("cache");
    for name in names_in(&cache).iter().filter(|name| has_extension(name, "idx")) {
        replace(&cache.join(name), b"\0\0\x08");
    }
    assert_eq!(open(&images).unwrap().info().fingerprint, opened.info().fingerprint);
    assert_eq!(open(&images).unwrap().label(5).unwrap(), Label::Class(5));
}

#[test]
fn idx_files_that_do_not_fit_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("a-images-idx3-ubyte");
    let labels = dir.path().join("a-labels-idx1-ubyte");
    let pixels = noise(1, 3 * 4);
    fs::write(&images, idx_images(&[3, 2, 2], &pixels)).unwrap();
    refused(&images, "a-images-idx3-ubyte: its labels file is missing", "a-labels-idx1-ubyte.gz");
    fs::write(&labels, idx_labels(&[1, 2])).unwrap();
    refused(&images, "a-labels-idx1-ubyte has 2 labels, but", "has 3 images");
    replace(&labels, &idx_images(&[3, 2, 2], &pixels));
    refused(&images, "a-labels-idx1-ubyte: magic 0x00000803", "IDX labels (0x00000801)");
    replace(&labels, &idx_labels(&[1, 2, 255]));
    assert_eq!(open(&images).unwrap().info().label_kind, LabelKind::Class { n_classes: 256 });
    refused(&labels, "a-labels-idx1-ubyte: an IDX labels file", "give the images file");

    replace(&images, &[0, 0, 0x0d, 3, 0, 0, 0, 1]);
    refused(&images, "a-images-idx3-ubyte: IDX elements of type 0x0d", "convert the file");
    replace(&images, &idx_images(&[0, 2, 2], &[]));
    refused(&images, "a-images-idx3-ubyte: holds no samples", "at least one");
    replace(&images, &gz(b"no idx file at all, but long enough"));
    refused(&images, "a-images-idx3-ubyte: magic 0x6e6f2069", "an archive must be unpacked first");
    replace(&images, &idx_images(&[3, 2, 2, 2], &noise(1, 24)));
    refused(&images, "a-images-idx3-ubyte: images of 2 channels", "only 1 and 3");
    // Four dimensions with three channels are fine under any of the names.
    replace(&images, &idx_images(&[3, 2, 2, 3], &noise(1, 36)));
    let opened = open(&images).unwrap();
    assert_eq!(shape_of(opened.info()), [2, 2, 3]);
    let expected = (noise(1, 36)[24..].to_vec(), false, Label::Class(255));
    assert_eq!(raw_sample(&*opened, 2), expected);
}

#[test]
fn cifar_files_are_read_and_their_damage_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("c10");
    fs::create_dir(&folder).unwrap();
    let first = cifar_records(1, &[&[3], &[9]]);
    let second = cifar_records(2, &[&[0], &[7], &[1]]);
    fs::write(folder.join("data_batch_1.bin"), &first).unwrap();
    fs::write(folder.join("data_batch_2.bin"), &second).unwrap();
    for path in [folder.clone(), folder.join("data_batch_2.bin")] {
        let opened = open(&path).unwrap();
        let labels: Vec<_> = (0..5).map(|idx| opened.label(idx).unwrap()).collect();
        assert_eq!(labels, [3, 9, 0, 7, 1].map(Label::Class));
        let expected = (second[3074..6146].to_vec(), true, Label::Class(7));
        assert_eq!(raw_sample(&*opened, 3), expected);
        assert_eq!(opened.info().format, "cifar10");
    }
    let batch = folder.join("data_batch_2.bin");
    for cut in (0..second.len()).filter(|cut| cut % 3073 != 0).step_by(37) {
        replace(&batch, &second[..cut]);
        refused(&folder, "data_batch_2.bin: ", "not a whole number of cifar10 records");
    }
    replace(&batch, b"");
    refused(&folder, "data_batch_2.bin: holds no samples", "at least one");
    replace(&batch, &cifar_records(2, &[&[4], &[10]]));
    refused(&folder, "data_batch_2.bin: sample 1 has label 10", "list their names");
    fs::write(folder.join("batches.meta.txt"), "a\nb\n\nc\n").unwrap();
    replace(&batch, &second);
    refused(&folder, "data_batch_1.bin: sample 0 has label 3", "there are 3 classes (0 to 2)");
    fs::write(folder.join("batches.meta.txt"), b"\xff\n").unwrap();
    refused(&folder, "batches.meta.txt: ", "it must be UTF-8 text, one class name a line");
    fs::write(folder.join("batches.meta.txt"), b"\n").unwrap();
    refused(&folder, "batches.meta.txt: no class name in it", "UTF-8");
    let names: Vec<String> = (0..11).map(|class| format!("class {class}")).collect();
    fs::write(folder.join("batches.meta.txt"), names.join("\n")).unwrap();
    let opened = open(&folder).unwrap();
    assert_eq!(opened.info().label_kind, LabelKind::Class { n_classes: 11 });
    assert_eq!(opened.info().class_names[10], "class 10");
}

#[test]
fn cifar100_takes_the_fine_label() {
    let dir = tempfile::tempdir().unwrap();
    let records = cifar_records(1, &[&[19, 99], &[0, 4]]);
    fs::write(dir.path().join("train.bin"), &records).unwrap();
    let opened = open(dir.path()).unwrap();
    assert_eq!(opened.info().format, "cifar100");
    assert_eq!(opened.label(0).unwrap(), Label::Class(99));
    replace(&dir.path().join("train.bin"), &cifar_records(1, &[&[100, 4], &[0, 100]]));
    refused(dir.path(), "train.bin: sample 1 has label 100", "fine_label_names.txt");
    replace(&dir.path().join("train.bin"), &records[..3073]);
    refused(dir.path(), "train.bin: 3073 bytes", "cifar100 records of 3074 bytes");
}

#[test]
fn cifar_files_that_begin_like_idx_are_cifar() {
    let dir = tempfile::tempdir().unwrap();
    let mut records = cifar_records(1, &[&[0], &[4]]);
    records[..4].copy_from_slice(&[0, 0, 8, 3]);
    let path = dir.path().join("test_batch.bin");
    fs::write(&path, &records).unwrap();
    assert_eq!(open(&path).unwrap().info().format, "cifar10");
}

#[test]
fn fingerprints_of_unpacked_sources_follow_content_changes() {
    let dir = tempfile::tempdir().unwrap();
    write_idx_folder(dir.path(), 6, 4, false);
    let fingerprint = || open(dir.path()).unwrap().info().fingerprint.0.clone();
    let first = fingerprint();
    assert_eq!(first.len(), 32);
    assert_eq!(first, fingerprint());
    let labels = dir.path().join("train-labels-idx1-ubyte");
    let file = fs::File::options().write(true).open(&labels).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_ne!(first, fingerprint());
}

#[test]
fn sources_that_contradict_themselves_are_not_packed() {
    let dir = tempfile::tempdir().unwrap();
    let check = |change: &dyn Fn(&mut MemorySplit), expected: &str| {
        let mut split = MemorySplit::small(4);
        change(&mut split);
        let dest = dir.path().join("made/train.arrow");
        let error = dataset::write_split(&split, "train", "the source", &dest, false, &mut |_| {});
        let error = error.unwrap_err().to_string();
        assert!(error.contains("the source") && error.contains(expected), "{error}");
        assert!(!dir.path().join("made").exists(), "the folder is gone again");
    };
    check(&|split| split.info.n_samples = 0, "holds no samples");
    let two = ImageKind::Raw { height: 3, width: 5, channels: 2 };
    check(&|split| split.info.images = two, "2 channels");
    check(
        &|split| split.info.label_kind = LabelKind::Class { n_classes: 2 },
        "sample 2 has label 2, but there are 2 classes (0 to 1); correct the source's labels",
    );
    check(
        &|split| split.info.label_kind = LabelKind::Vector { len: 2 },
        "sample 0 has another kind of label",
    );
    check(&|split| split.info.class_names = vec!["a".to_owned()], "1 class names for 3 classes");
    check(&|split| split.labels = Labels::Classes(vec![0, 1, -1, 0]), "sample 2 has label -1");
}
