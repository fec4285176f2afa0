//! Fold models on a dataset that can be learned: training, resuming, scoring.

#![cfg(feature = "torch")]
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::thread;

use fastaa::augment::PreparedPolicy;
use fastaa::dataset::{Split, open_split};
use fastaa::image::decode::DecodeLimits;
use fastaa::pipeline::recipe::{Crop, Normalize, Recipe};
use fastaa::pipeline::render::OutputShape;
use fastaa::policy;
use fastaa::search::batches::BatchMaker;
use fastaa::search::torch::{FoldModel, FoldTraining, ModelSpec, Precision, Score};

/// Nothing here is encoded.
const LIMITS: DecodeLimits = DecodeLimits { max_side: 1, max_pixels: 1 };
const SIDE: usize = 12;
const N_CLASSES: usize = 4;

/// Noise with one bright quarter, which is the class.
fn write_quarters(dir: &Path, n_samples: usize) {
    let number = |value: usize| u32::try_from(value).expect("small").to_be_bytes();
    let mut images = vec![0, 0, 8, 3];
    for value in [n_samples, SIDE, SIDE] {
        images.extend(number(value));
    }
    let mut labels = vec![0, 0, 8, 1];
    labels.extend(number(n_samples));
    for sample_idx in 0..n_samples {
        let class = sample_idx % N_CLASSES;
        for at in 0..SIDE * SIDE {
            let (row, column) = (at / SIDE, at % SIDE);
            let quarter = 2 * (row / (SIDE / 2)) + column / (SIDE / 2);
            let noise = fastaa::random::mix64((sample_idx * SIDE * SIDE + at) as u64) % 100;
            let bright = if quarter == class { 100 } else { 0 };
            images.push(u8::try_from(noise + bright).expect("small"));
        }
        labels.push(u8::try_from(class).expect("small"));
    }
    fs::write(dir.join("train-images-idx3-ubyte"), images).expect("writes");
    fs::write(dir.join("train-labels-idx1-ubyte"), labels).expect("writes");
}

struct Quarters {
    dir: tempfile::TempDir,
    split: Arc<dyn Split>,
}

impl Quarters {
    fn new(n_samples: usize) -> Self {
        tch::set_num_threads(1);
        let dir = tempfile::tempdir().expect("a folder");
        write_quarters(dir.path(), n_samples);
        let split = open_split(dir.path(), "train", dir.path()).expect("opens");
        Self { dir, split }
    }

    fn recipe() -> Recipe {
        Recipe {
            crop: Crop::Pad { size: 12, pad: 1 },
            normalize: Some(Normalize { mean: vec![0.3], std: vec![0.2] }),
            ..Recipe::default()
        }
    }

    fn batches(&self) -> BatchMaker {
        BatchMaker::new(Arc::clone(&self.split), &Self::recipe(), LIMITS, 5).expect("fits")
    }

    fn clean(&self) -> BatchMaker {
        BatchMaker::clean(Arc::clone(&self.split), &Self::recipe(), LIMITS).expect("fits")
    }

    fn shape(&self) -> OutputShape {
        *self.batches().shape()
    }

    /// Of the fastest precision here.
    fn model(&self) -> FoldModel {
        self.model_of(&ModelSpec::SmallCnn, training())
    }

    fn model_of(&self, spec: &ModelSpec, training: FoldTraining) -> FoldModel {
        FoldModel::new(spec, &self.shape(), 4, training).expect("makes")
    }
}

fn training() -> FoldTraining {
    FoldTraining {
        n_epochs: 4,
        batch_size: 32,
        seed: 3,
        precision: Precision::fastest(tch::Device::Cpu),
        ..FoldTraining::default()
    }
}

fn accuracy(scores: &[Score]) -> f64 {
    Score::mean(scores).accuracy
}

fn prepared(reference: &str) -> PreparedPolicy {
    PreparedPolicy::new(&policy::load_reference(reference).expect("a built-in"))
}

fn none() -> PreparedPolicy {
    PreparedPolicy::default()
}

#[test]
fn a_fold_model_learns_and_harm_shows_in_its_scores() {
    let data = Quarters::new(600);
    let (train, held_out): (Vec<u64>, Vec<u64>) = (0..600).partition(|idx| idx / 4 % 5 != 0);
    let mut batches = data.batches();
    let mut model = data.model();
    let untrained = model.score(&mut batches, &held_out, &none(), 1).expect("scores");
    assert!(accuracy(&untrained) < 0.6, "{}", accuracy(&untrained));
    model.train(&mut batches, &train, &none(), u64::MAX).expect("trains");
    assert_eq!(model.step(), model.n_steps(train.len()));
    let plain = model.score(&mut batches, &held_out, &none(), 1).expect("scores");
    assert!(accuracy(&plain) > 0.95, "{}", accuracy(&plain));
    // Turning a quarter away is harmful here: the class is the place.
    let wide = prepared("trivial-wide");
    let harmed = model.score(&mut batches, &held_out, &wide, 4).expect("scores");
    assert!(accuracy(&harmed) < accuracy(&plain));

    let (right, loss) = model.evaluate(&mut data.clean(), &held_out).expect("evaluates");
    let n_right = right.iter().filter(|&&right| right).count();
    assert!(right.len() == held_out.len() && n_right * 20 > right.len() * 19, "{n_right}");
    assert!(loss < 0.3, "{loss}");
}

#[test]
fn scores_are_a_function_of_policy_and_samples_alone() {
    let data = Quarters::new(200);
    let samples: Vec<u64> = (0..200).collect();
    let mut batches = data.batches();
    let policy = prepared("randaugment(2,9)");
    // A sample's score does not depend on its batch, up to the order of sums in a kernel.
    for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 0.05)] {
        let model = data.model_of(&ModelSpec::SmallCnn, FoldTraining { precision, ..training() });
        let together = model.score(&mut batches, &samples, &policy, 3).expect("scores");
        let again = model.score(&mut batches, &samples, &policy, 3).expect("scores");
        assert_eq!(together, again);
        let alone = model.score(&mut batches, &samples[50..51], &policy, 3).expect("scores");
        assert!((alone[0].loss - together[50].loss).abs() < tolerance);
    }
}

/// Trains at once, then with many cuts; the checkpoints must be the same.
fn check_resumes(data: &Quarters, spec: &ModelSpec, training: FoldTraining) {
    let train: Vec<u64> = (0..160).collect();
    let mut batches = data.batches();
    let mut whole = data.model_of(spec, training);
    let initial = whole.weights_digest().expect("hashes");
    whole.train(&mut batches, &train, &none(), u64::MAX).expect("trains");
    let expected = whole.weights_digest().expect("hashes");
    assert_ne!(initial, expected);

    let checkpoint = data.dir.path().join("cut.safetensors");
    let mut cut = data.model_of(spec, training);
    for until in [1, 4, 5, 11, u64::MAX] {
        cut.train(&mut batches, &train, &none(), until).expect("trains");
        cut.save(&checkpoint).expect("saves");
        cut = data.model_of(spec, training);
        cut.load(&checkpoint).expect("loads");
    }
    assert_eq!(cut.step(), whole.step());
    assert_eq!(cut.weights_digest().expect("hashes"), expected, "{spec} {training:?}");
    // The momentum too.
    let path = data.dir.path().join("whole.safetensors");
    whole.save(&path).expect("saves");
    let read = |path: &Path| fs::read(path).expect("reads");
    assert!(read(&path) == read(&checkpoint), "the checkpoints differ");
}

#[test]
fn a_training_cut_anywhere_goes_on_bit_for_bit() {
    let data = Quarters::new(160);
    check_resumes(&data, &ModelSpec::SmallCnn, training());
    let single = FoldTraining { precision: Precision::F32, ..training() };
    check_resumes(&data, &ModelSpec::SmallCnn, single);
}

#[test]
fn models_trained_at_once_equal_those_trained_one_after_another() {
    let data = Quarters::new(160);
    let train: Vec<u64> = (0..160).collect();
    let run = |seed: u64| {
        let mut model = data.model_of(&ModelSpec::SmallCnn, FoldTraining { seed, ..training() });
        model.train(&mut data.batches(), &train, &none(), u64::MAX).expect("trains");
        model.weights_digest().expect("hashes")
    };
    let one_after_another: Vec<String> = (0..2).map(run).collect();
    assert_ne!(one_after_another[0], one_after_another[1]);
    // Made here, trained there.
    let mut model = data.model_of(&ModelSpec::SmallCnn, FoldTraining { seed: 0, ..training() });
    let elsewhere = thread::scope(|scope| {
        let trained = scope.spawn(|| {
            model.train(&mut data.batches(), &train, &none(), u64::MAX).expect("trains");
            model.weights_digest().expect("hashes")
        });
        trained.join().expect("no panic")
    });
    assert_eq!(elsewhere, one_after_another[0]);
    let start = Barrier::new(2);
    let at_once: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|seed| {
                let (run, start) = (&run, &start);
                scope.spawn(move || {
                    start.wait();
                    run(seed)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert_eq!(at_once, one_after_another);
}

#[test]
fn every_model_learns_a_tiny_problem() {
    let data = Quarters::new(64);
    let train: Vec<u64> = (0..64).collect();
    let training = FoldTraining { n_epochs: 3, batch_size: 16, ..training() };
    for name in ["small-cnn", "wrn-10-1", "resnet18"] {
        let spec = ModelSpec::parse(name).expect("known");
        let mut model = data.model_of(&spec, training);
        let mut batches = data.batches();
        let per_epoch = model.n_steps(train.len()) / training.n_epochs;
        let first = model.train(&mut batches, &train, &none(), per_epoch).expect("trains");
        let last = model.train(&mut batches, &train, &none(), u64::MAX).expect("trains");
        assert!(last < first, "{name}: {first} then {last}");
    }
}

#[test]
fn forty_samples_are_enough_and_one_is_not() {
    let data = Quarters::new(40);
    let train: Vec<u64> = (0..40).collect();
    let mut model =
        data.model_of(&ModelSpec::SmallCnn, FoldTraining { n_epochs: 30, ..training() });
    assert_eq!(model.n_steps(40), 6 * 30);
    model.train(&mut data.batches(), &train, &none(), u64::MAX).expect("trains");
    let (right, _) = model.evaluate(&mut data.clean(), &train).expect("evaluates");
    assert!(right.iter().filter(|&&right| right).count() >= 38, "{right:?}");
    for n_samples in [0, 1] {
        let few = data.model().train(&mut data.batches(), &train[..n_samples], &none(), 1);
        assert!(few.expect_err("must be refused").to_string().contains("at least 2"));
    }
}

#[test]
fn a_training_under_a_policy_is_another_one() {
    let data = Quarters::new(64);
    let train: Vec<u64> = (0..64).collect();
    let run = |policy: &PreparedPolicy| {
        let mut model = data.model();
        model.train(&mut data.batches(), &train, policy, u64::MAX).expect("trains");
        model.weights_digest().expect("hashes")
    };
    assert_eq!(run(&prepared("trivial-wide")), run(&prepared("trivial-wide")));
    assert_ne!(run(&prepared("trivial-wide")), run(&none()));
}

#[test]
fn a_foreign_or_damaged_checkpoint_is_refused_in_words() {
    let data = Quarters::new(64);
    let path = data.dir.path().join("model.safetensors");
    let foreign = FoldModel::new(&ModelSpec::SmallCnn, &data.shape(), 7, training());
    foreign.expect("makes").save(&path).expect("saves");
    let error = data.model().load(&path).expect_err("must be refused").to_string();
    assert!(error.contains("belongs to another model") && error.contains("head"), "{error}");
    fs::write(&path, b"not a checkpoint").expect("writes");
    let error = data.model().load(&path).expect_err("must be refused").to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    let path = Path::new("/dev/null/x");
    let error = data.model().save(path).expect_err("must be refused").to_string();
    assert!(error.contains("/dev/null/x"), "{error}");
}

#[test]
fn a_loss_that_is_no_number_stops_the_training_with_a_cure() {
    let data = Quarters::new(160);
    let train: Vec<u64> = (0..160).collect();
    let mut model =
        data.model_of(&ModelSpec::SmallCnn, FoldTraining { peak_lr: 1e30, ..training() });
    let error = model.train(&mut data.batches(), &train, &none(), u64::MAX).expect_err("diverges");
    let message = error.to_string();
    assert!(message.contains("lower the learning rate"), "{message}");
}

#[test]
fn clean_batches_are_the_images_themselves() {
    let data = Quarters::new(8);
    let samples: Vec<u64> = (0..8).collect();
    let batch = data.clean().batch(&samples, 0, &none()).expect("renders");
    assert_eq!(batch, data.clean().batch(&samples, 9, &none()).expect("renders"));
    for (&sample_idx, image) in samples.iter().zip(batch.images.chunks(SIDE * SIDE)) {
        let mut buffer = Vec::new();
        let sample = data.split.sample(sample_idx, &mut buffer).expect("reads");
        let fastaa::dataset::Pixels::Hwc(bytes) = sample.raw().expect("raw").pixels else {
            panic!("interleaved")
        };
        let expected = bytes.iter().map(|&byte| (f32::from(byte) / 255.0 - 0.3) / 0.2);
        assert!(expected.zip(image).all(|(a, &b)| (a - b).abs() < 1e-6));
    }
    // Larger than the image: padded alike on both sides; smaller: the middle.
    let side_of = |size: u32, pad: u32| {
        let crop = Crop::Pad { size, pad };
        let recipe = Recipe { crop, normalize: None, hflip: true, cutout: 4, ..Quarters::recipe() };
        let mut batches =
            BatchMaker::clean(Arc::clone(&data.split), &recipe, LIMITS).expect("fits");
        (0..2).map(|epoch| batches.batch(&[1], epoch, &none()).expect("renders").images).collect()
    };
    let wide: Vec<Vec<f32>> = side_of(16, 4);
    assert_eq!(wide[0], wide[1]);
    assert!(wide[0][..32].iter().all(|&value| value <= 0.0) && wide[0][2 * 16 + 2] > 0.0);
    let narrow: Vec<Vec<f32>> = side_of(8, 0);
    assert!(narrow[0] == narrow[1] && narrow[0].len() == 64);
}

#[test]
fn change_counts_images_and_distances() {
    let data = Quarters::new(40);
    let samples: Vec<u64> = (0..40).collect();
    let mut batches = data.batches();
    let mut change =
        |reference: &str| batches.change(&samples, &prepared(reference), 3).expect("renders");
    assert_eq!(change("none"), fastaa::search::lab::Change::default());
    let weak = change("randaugment(1,1)");
    let strong = change("randaugment(3,9)");
    assert!(weak.changed < strong.changed && weak.distance < strong.distance);
    assert!(strong.changed > 0.8 && strong.changed <= 1.0 && strong.distance < 1.0, "{strong:?}");
    assert_eq!(change("randaugment(3,9)"), strong);
}

/// The Python that the tests use, if it has torch.
fn python() -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    let python = std::env::var_os("FASTAA_PYTHON").map_or(own, PathBuf::from);
    let found = Command::new(&python).args(["-c", "import torch"]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    eprintln!("SKIPPED: {} has no torch", python.display());
    None
}

const MODULES: &str = r#"
import sys, torch
from torch import nn
def net(channels, n_classes, *more):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        *more, nn.Flatten(), nn.LazyLinear(n_classes))
for name, channels, module in [
    ("good", 1, net(1, 4)), ("seven", 1, net(1, 7)), ("rgb", 3, net(3, 4)),
    ("half", 1, net(1, 4)), ("frozen", 1, net(1, 4)), ("random", 1, net(1, 4, nn.Dropout(0.5)))]:
    module(torch.zeros(2, channels, 12, 12))
    if name == "half": module = module.half()
    if name == "frozen": module.requires_grad_(False)
    torch.jit.script(module).save(f"{sys.argv[1]}/{name}.pt")
torch.save({"weight": torch.zeros(2)}, f"{sys.argv[1]}/weights.pt")
"#;

#[test]
fn a_torchscript_module_is_checked_trained_and_resumed() {
    let Some(python) = python() else { return };
    let data = Quarters::new(160);
    let folder = data.dir.path();
    let made = Command::new(python).args(["-c", MODULES]).arg(folder).output().expect("runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let spec = |name: &str| ModelSpec::TorchScript(folder.join(name));
    for (name, parts) in [
        ("seven.pt", &["seven.pt", "[2, 7]", "[2, 4]"] as &[_]),
        ("rgb.pt", &["rgb.pt", "[2, 1, 12, 12]", "3 channels"]),
        ("half.pt", &["float32"]),
        ("frozen.pt", &["no trainable parameters"]),
        ("random.pt", &["dropout"]),
        ("weights.pt", &["is no TorchScript module"]),
        ("missing.pt", &["missing.pt", "cannot be read"]),
    ] {
        let refused = FoldModel::new(&spec(name), &data.shape(), 4, training()).err();
        let error = refused.expect("must be refused").to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{name}: {error}");
        assert!(error.lines().count() == 1, "{error}");
    }
    check_resumes(&data, &spec("good.pt"), training());
    let train: Vec<u64> = (0..160).collect();
    let mut model = data.model_of(&spec("good.pt"), training());
    assert_eq!(model.precision(), Precision::F32);
    model.train(&mut data.batches(), &train, &none(), u64::MAX).expect("trains");
    let (right, loss) = model.evaluate(&mut data.clean(), &train).expect("evaluates");
    assert!(right.iter().filter(|&&right| right).count() > 144, "{loss}");
}
