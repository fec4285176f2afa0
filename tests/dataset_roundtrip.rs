//! What is packed is what comes out: against the source, against Python, for any shape.

#![allow(clippy::unwrap_used, reason = "test code, but not all in a #[test]")]

mod dataset_support;

use std::path::Path;

use dataset_support::{
    Labels, MemorySplit, check_with, fashion_mnist, noise, python, raw_sample, shape_of,
};
use fastaa::dataset::{
    self, FingerprintCheck, Label, LabelKind, PackOptions, Split, sample_checksum,
};
use proptest::prelude::*;

fn no_progress(_: dataset::Progress<'_>) {}

fn verify(path: &Path, cache: &Path) -> dataset::VerifyReport {
    let check = &mut |_: &[u8]| Ok(());
    dataset::verify_split(path, "train", cache, check, &mut no_progress).unwrap()
}

fn pack_to(split: &MemorySplit, dest: &Path) {
    dataset::write_split(split, "train", "memory", dest, false, &mut no_progress).unwrap();
}

/// The slow, obvious way from planar to interleaved.
fn hwc_of(split: &MemorySplit, idx: usize) -> Vec<u8> {
    let [height, width, channels] = shape_of(&split.info);
    let base = idx * height * width * channels;
    let mut out = Vec::new();
    for y in 0..height {
        for x in 0..width {
            for c in 0..channels {
                let planar_at = (c * height + y) * width + x;
                let at = if split.planar { planar_at } else { (y * width + x) * channels + c };
                out.push(split.pixels[base + at]);
            }
        }
    }
    out
}

/// Compares every sample of the packed file with its source.
fn assert_same(split: &MemorySplit, packed: &dyn Split) {
    let (own, info) = (&split.info, packed.info());
    assert_eq!(info.n_samples, own.n_samples);
    assert_eq!(info.images, own.images);
    assert_eq!(info.label_kind, own.label_kind);
    for sample_idx in 0..own.n_samples {
        let (pixels, is_planar, packed_label) = raw_sample(packed, sample_idx);
        let expected = hwc_of(split, usize::try_from(sample_idx).unwrap());
        assert!(!is_planar && pixels == expected, "pixels of sample {sample_idx}");
        let label = split.label(sample_idx).unwrap();
        assert_eq!(packed_label, label);
        assert_eq!(packed.checksum(sample_idx), Some(sample_checksum(&expected, label)));
    }
}

fn any_split() -> impl Strategy<Value = MemorySplit> {
    let shape = (1..=40_usize, 1..=40_usize, prop_oneof![Just(1_usize), Just(3)]);
    (shape, 1..=9_usize, any::<bool>(), any::<u64>(), 0..=6_usize).prop_map(
        |((height, width, channels), n, planar, seed, vector_len)| {
            let pixels = noise(seed, n * height * width * channels);
            let bytes = noise(!seed, n * vector_len.max(1));
            let labels = if vector_len == 0 {
                Labels::Classes(bytes.iter().map(|byte| i64::from(*byte)).collect())
            } else {
                let values: Vec<f32> = bytes.iter().map(|byte| f32::from(*byte) / 7.0).collect();
                Labels::Vectors(values.chunks(vector_len).map(<[f32]>::to_vec).collect())
            };
            MemorySplit::new([height, width, channels], planar, pixels, labels)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_and_label_kind_survives_packing(split in any_split()) {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("train.arrow");
        pack_to(&split, &dest);
        let packed = dataset::open_split(&dest, "train", dir.path()).unwrap();
        assert_same(&split, packed.as_ref());
        let report =
            verify(&dest, dir.path());
        prop_assert_eq!(report.n_bad, 0);
        prop_assert_eq!(report.fingerprint, FingerprintCheck::Matches);
        prop_assert!(report.has_checksums);
    }
}

#[test]
fn several_record_batches_are_one_split() {
    let n = 50;
    let classes = (0..n).map(|idx| i64::from(idx % 7)).collect();
    let pixels = noise(3, 512 * 512 * 3 * 50);
    let split = MemorySplit::new([512, 512, 3], true, pixels, Labels::Classes(classes));
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("train.arrow");
    pack_to(&split, &dest);
    let reader = arrow_ipc::reader::FileReader::try_new(std::fs::File::open(&dest).unwrap(), None);
    assert!(reader.unwrap().num_batches() > 1);
    assert_same(&split, dataset::open_split(&dest, "train", dir.path()).unwrap().as_ref());
}

#[test]
fn packing_twice_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let read = |name: &str| {
        let dest = dir.path().join(name);
        pack_to(&MemorySplit::small(9), &dest);
        std::fs::read(dest).unwrap()
    };
    assert!(read("a.arrow") == read("b.arrow"));
}

#[test]
fn python_reads_what_was_packed_and_rust_what_python_wrote() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let pixels = noise(5, 7 * 4 * 6 * 3);
    let vectors: Vec<Vec<f32>> = (0..7_u8).map(|n| vec![f32::from(n), 0.5, -1.25]).collect();
    let vector_bytes: Vec<u8> =
        vectors.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    let classes = vec![3, 0, 1, 2, 2, 1, 0];
    let class_bytes: Vec<u8> = classes.iter().flat_map(|class: &i64| class.to_le_bytes()).collect();
    std::fs::write(at("pixels"), &pixels).unwrap();
    for (labels, label_bytes, len) in [
        (Labels::Classes(classes), class_bytes, "0"),
        (Labels::Vectors(vectors), vector_bytes, "3"),
    ] {
        let split = MemorySplit::new([4, 6, 3], false, pixels.clone(), labels);
        let packed = dir.path().join(format!("{len}.arrow"));
        pack_to(&split, &packed);
        std::fs::write(at("labels"), label_bytes).unwrap();
        let packed = packed.display().to_string();
        let raw = ["raw", &packed, "4", "6", "3", len, &at("pixels"), &at("labels")];
        check_with(&python, &raw);
        for how in ["chunks", "nullable"] {
            let rewritten = at(&format!("{how}{len}.arrow"));
            check_with(&python, &["rewrite", how, &packed, &rewritten]);
            let opened = dataset::open_split(Path::new(&rewritten), "train", dir.path()).unwrap();
            assert_same(&split, opened.as_ref());
            let path = Path::new(&rewritten);
            let report =
                dataset::verify_split(path, "train", dir.path(), &mut |_| Ok(()), &mut no_progress)
                    .unwrap();
            assert!(report.is_good(), "{report:?}");
        }
        let refused = [
            ("lz4", "it is compressed, so it cannot be mapped; write it without compression"),
            ("zstd", "it is compressed"),
            ("stream", "does not begin with 'ARROW1' (it looks like an Arrow stream"),
            ("nulls", "it has nulls; fill or drop them before packing"),
            ("extra", "its columns are 'image, label, checksum, weight'"),
        ];
        let class_only = (len == "0").then_some(("dictionary", "'label' is dictionary-encoded"));
        for (how, expected) in refused.into_iter().chain(class_only) {
            let rewritten = at(&format!("{how}{len}.arrow"));
            check_with(&python, &["rewrite", how, &packed, &rewritten]);
            let opened = dataset::open_split(Path::new(&rewritten), "train", dir.path());
            let error = opened.unwrap_err().to_string();
            assert!(error.starts_with(&rewritten) && error.contains(expected), "{how}: {error}");
            assert!(error.contains("fastaa-ctl dataset pack"), "{how}: {error}");
        }
    }
}

#[test]
fn fashion_mnist_is_packed_as_python_reads_it() {
    let Some(source) = fashion_mnist() else { return };
    let dir = tempfile::tempdir().unwrap();
    let options = PackOptions { cache_dir: dir.path().join("cache"), ..PackOptions::default() };
    let packed = dataset::pack(source, dir.path(), &options, &mut no_progress).unwrap();
    let names: Vec<_> =
        packed.iter().map(|split| (split.split.as_str(), split.n_samples)).collect();
    assert_eq!(names, [("train", 60_000), ("test", 10_000)]);
    for (split, prefix) in [("train", "train"), ("test", "t10k")] {
        let arrow = dataset::open_split(dir.path(), split, dir.path()).unwrap();
        let idx = dataset::open_split(source, split, &options.cache_dir).unwrap();
        assert_eq!(arrow.info().label_kind, LabelKind::Class { n_classes: 10 });
        let mut counts = [0; 10];
        for sample_idx in 0..arrow.info().n_samples {
            let sample = raw_sample(&*arrow, sample_idx);
            assert!(sample == raw_sample(&*idx, sample_idx), "sample {sample_idx}");
            let Label::Class(class) = sample.2 else { panic!("labels are classes") };
            counts[usize::try_from(class).unwrap()] += 1;
        }
        assert_eq!(counts, [arrow.info().n_samples / 10; 10], "classes are balanced");
        let Some(python) = python() else { continue };
        let at = |ending: &str| source.join(format!("{prefix}-{ending}")).display().to_string();
        let packed = dir.path().join(format!("{split}.arrow")).display().to_string();
        let (images, labels) = (at("images-idx3-ubyte.gz"), at("labels-idx1-ubyte.gz"));
        let printed = check_with(&python, &["idx", &packed, &images, &labels]);
        assert!(printed.contains(&arrow.info().fingerprint.0), "{printed}");
    }
}
