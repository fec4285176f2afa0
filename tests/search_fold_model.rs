//! Fold models on a dataset that can be learned: training, resuming, scoring.

#![cfg(feature = "torch")]

use std::fs;
use std::path::Path;
use std::sync::Arc;

use fastaa::augment::PreparedPolicy;
use fastaa::dataset::{Split, open_split};
use fastaa::pipeline::recipe::{Crop, Normalize, Recipe};
use fastaa::policy;
use fastaa::search::batches::BatchMaker;
use fastaa::search::torch::{FoldModel, FoldTraining, Score};

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

    fn batches(&self) -> BatchMaker {
        let recipe = Recipe {
            crop: Crop::Pad { size: 12, pad: 1 },
            normalize: Some(Normalize { mean: vec![0.3], std: vec![0.2] }),
            ..Recipe::default()
        };
        BatchMaker::new(Arc::clone(&self.split), &recipe, 5).expect("fits")
    }
}

fn training() -> FoldTraining {
    FoldTraining { n_epochs: 4, batch_size: 32, peak_lr: 0.05, seed: 3 }
}

fn model() -> FoldModel {
    FoldModel::new(1, u32::try_from(N_CLASSES).expect("small"), training())
}

fn accuracy(scores: &[Score]) -> f64 {
    scores.iter().map(|score| score.accuracy).sum::<f64>() / scores.len() as f64
}

fn prepared(reference: &str) -> PreparedPolicy {
    PreparedPolicy::new(&policy::load_reference(reference).expect("a built-in"))
}

#[test]
fn a_fold_model_learns_and_harm_shows_in_its_scores() {
    let data = Quarters::new(600);
    let (train, held_out): (Vec<u64>, Vec<u64>) = (0..600).partition(|idx| idx / 4 % 5 != 0);
    let mut batches = data.batches();
    let mut model = model();
    let untrained = model.score(&mut batches, &held_out, &prepared("none"), 1).expect("scores");
    assert!(accuracy(&untrained) < 0.6, "{}", accuracy(&untrained));
    model.train(&mut batches, &train, u64::MAX).expect("trains");
    assert_eq!(model.step(), model.n_steps(train.len()));
    let plain = model.score(&mut batches, &held_out, &prepared("none"), 1).expect("scores");
    assert!(accuracy(&plain) > 0.95, "{}", accuracy(&plain));
    // Turning a quarter away is harmful here: the class is the place.
    let wide = prepared("trivial-wide");
    let harmed = model.score(&mut batches, &held_out, &wide, 4).expect("scores");
    assert!(accuracy(&harmed) < accuracy(&plain));
}

#[test]
fn scores_are_a_function_of_policy_and_samples_alone() {
    let data = Quarters::new(200);
    let samples: Vec<u64> = (0..200).collect();
    let mut batches = data.batches();
    let model = model();
    let policy = prepared("randaugment(2,9)");
    let together = model.score(&mut batches, &samples, &policy, 3).expect("scores");
    let again = model.score(&mut batches, &samples, &policy, 3).expect("scores");
    assert_eq!(together, again);
    // A sample's score does not depend on its batch (up to the order of sums in a kernel).
    let alone = model.score(&mut batches, &samples[50..51], &policy, 3).expect("scores");
    assert!((alone[0].loss - together[50].loss).abs() < 1e-5);
}

#[test]
fn a_training_cut_anywhere_goes_on_bit_for_bit() {
    let data = Quarters::new(160);
    let train: Vec<u64> = (0..160).collect();
    let mut batches = data.batches();
    let path = data.dir.path().join("whole.safetensors");
    let mut whole = model();
    whole.train(&mut batches, &train, u64::MAX).expect("trains");
    whole.save(&path).expect("saves");
    let expected = fs::read(&path).expect("reads");

    let checkpoint = data.dir.path().join("cut.safetensors");
    let mut cut = model();
    for until in [1, 4, 5, 11, u64::MAX] {
        cut.train(&mut batches, &train, until).expect("trains");
        cut.save(&checkpoint).expect("saves");
        cut = model();
        cut.load(&checkpoint).expect("loads");
    }
    assert!(fs::read(&checkpoint).expect("reads") == expected, "the weights differ");
}

#[test]
fn a_foreign_or_damaged_checkpoint_is_refused_in_words() {
    let data = Quarters::new(64);
    let path = data.dir.path().join("model.safetensors");
    FoldModel::new(1, 7, training()).save(&path).expect("saves");
    let error = model().load(&path).expect_err("must be refused").to_string();
    assert!(error.contains("belongs to another model") && error.contains("head"), "{error}");
    fs::write(&path, b"not a checkpoint").expect("writes");
    let error = model().load(&path).expect_err("must be refused").to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    let error = model().save(Path::new("/dev/null/x")).expect_err("must be refused").to_string();
    assert!(error.contains("/dev/null/x"), "{error}");
}

#[test]
fn a_loss_that_is_no_number_stops_the_training_with_a_cure() {
    let data = Quarters::new(160);
    let train: Vec<u64> = (0..160).collect();
    let training = FoldTraining { peak_lr: 1e30, ..training() };
    let mut model = FoldModel::new(1, 4, training);
    let error = model.train(&mut data.batches(), &train, u64::MAX).expect_err("diverges");
    let message = error.to_string();
    assert!(message.contains("lower the learning rate"), "{message}");
}
