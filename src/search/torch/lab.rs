//! The lab with real models: trains, scores and judges with libtorch.
//!
//! Owns the fold models on disk, copies of them in memory, and the checkpoints of trainings under
//! way. Each question is answered on the caller's thread with one torch thread, so that questions
//! from several threads run side by side and no answer depends on how many there are.
//!
//! ```text
//! DIR/fold-K.safetensors       the finished model of fold K
//! DIR/KEY.partial.safetensors  a training under way; removed when it is done
//! ```

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{FoldModel, FoldTraining, ModelSpec, Processor, TorchError, check_memory};
use crate::augment::PreparedPolicy;
use crate::dataset::Split;
use crate::image::decode::DecodeLimits;
use crate::pipeline::order::EpochOrder;
use crate::pipeline::recipe::Recipe;
use crate::random::mix64;
use crate::search::FoldPlan;
use crate::search::batches::BatchMaker;
use crate::search::lab::{Change, Evaluation, Lab, LabError, Score, TrainOn, Training};
use crate::search::round::FoldRecord;

/// Time between two checkpoints of a training: what a kill can cost. It changes no result.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(10);
/// Steps between two looks at the clock.
const STEPS_PER_LOOK: u64 = 10;
/// Tells the orders of D_A and of the judged samples from epochs of a stream.
const ORDER_TAG: u64 = 0x6c61_6220_6f72_6465;

/// What a lab is made from.
#[derive(Clone, Debug)]
pub struct LabOptions {
    /// The network.
    pub model: ModelSpec,
    /// The streams' recipe; its policy is left out.
    pub recipe: Recipe,
    /// Encoded images beyond them are refused.
    pub limits: DecodeLimits,
    /// Epochs of a fold model's training.
    pub fold_epochs: u32,
    /// Epochs of the trainings that candidates are judged by.
    pub gate_epochs: u32,
    /// Most samples that a training on a fold is judged on.
    pub n_judged_max: u64,
    /// Keys everything random.
    pub seed: u64,
    /// Where the models compute.
    pub processor: Processor,
    /// Trainings that run side by side, for the memory check.
    pub n_threads: usize,
}

/// See the module.
pub struct TorchLab {
    split: Arc<dyn Split>,
    n_classes: u32,
    plan: FoldPlan,
    options: LabOptions,
    dir: PathBuf,
    /// D_A of each fold, in a random order.
    held_out: Vec<Vec<u64>>,
    /// Samples in no fold and not in D_gate, in a random order.
    spare: Vec<u64>,
    /// Idle copies of each fold's finished model.
    idle: Vec<Mutex<Vec<Scorer>>>,
}

struct Scorer {
    model: FoldModel,
    batches: BatchMaker,
}

impl TorchLab {
    /// A lab on the folds of `plan`, whose models lie in `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// The folder cannot be made, the recipe or the model does not fit the dataset, or there is
    /// not enough memory.
    pub fn new(
        split: Arc<dyn Split>,
        n_classes: u32,
        plan: FoldPlan,
        options: LabOptions,
        dir: &Path,
    ) -> Result<Self, TorchError> {
        let failed = |source| TorchError::Io { path: dir.display().to_string(), source };
        fs::create_dir_all(dir).map_err(failed)?;
        let order = |samples: &[u64]| shuffled(samples, options.seed);
        let held_out = plan.folds.iter().map(|fold| order(&fold.held_out)).collect();
        let mut spare = order(&spare(&plan, split.info().n_samples));
        spare.truncate(usize::try_from(options.n_judged_max).unwrap_or(usize::MAX));
        let idle = plan.folds.iter().map(|_| Mutex::default()).collect();
        let dir = dir.to_owned();
        let lab = Self { split, n_classes, plan, options, dir, held_out, spare, idle };
        // What does not fit is refused now, before hours of work.
        let training = lab.fold_training(0);
        let shape = *lab.batches(training.seed)?.shape();
        let LabOptions { model, n_threads, .. } = &lab.options;
        check_memory(model, &shape, n_classes, &training, *n_threads)?;
        lab.model(training)?;
        Ok(lab)
    }

    fn fold_training(&self, fold: usize) -> FoldTraining {
        FoldTraining {
            n_epochs: u64::from(self.options.fold_epochs),
            seed: mix64(self.options.seed ^ mix64(fold as u64 + 1)),
            precision: self.options.processor.precision(),
            device: self.options.processor.device(),
            ..FoldTraining::default()
        }
    }

    fn model(&self, training: FoldTraining) -> Result<FoldModel, TorchError> {
        let shape = *self.batches(training.seed)?.shape();
        FoldModel::new(&self.options.model, &shape, self.n_classes, training)
    }

    /// What a trainer gets: the whole recipe.
    fn batches(&self, seed: u64) -> Result<BatchMaker, TorchError> {
        let LabOptions { recipe, limits, .. } = &self.options;
        Ok(BatchMaker::new(Arc::clone(&self.split), recipe, *limits, seed)?)
    }

    /// What fold models are trained on and asked about: crop and flip only.
    fn crop_and_flip(&self, seed: u64) -> Result<BatchMaker, TorchError> {
        let recipe = Recipe { cutout: 0, ..self.options.recipe.clone() };
        Ok(BatchMaker::new(Arc::clone(&self.split), &recipe, self.options.limits, seed)?)
    }

    fn clean_batches(&self) -> Result<BatchMaker, TorchError> {
        let LabOptions { recipe, limits, .. } = &self.options;
        Ok(BatchMaker::clean(Arc::clone(&self.split), recipe, *limits)?)
    }

    fn fold_path(&self, fold: usize) -> PathBuf {
        self.dir.join(format!("fold-{fold}.safetensors"))
    }

    /// Trains to the end, from the checkpoint of an earlier attempt if there is a good one.
    fn train_to_end(
        &self,
        key: &str,
        mut batches: BatchMaker,
        training: FoldTraining,
        samples: &[u64],
        policy: &PreparedPolicy,
    ) -> Result<(FoldModel, f64), TorchError> {
        let path = self.dir.join(format!("{key}.partial.safetensors"));
        let mut model = self.model(training)?;
        if path.exists() && model.load(&path).is_err() {
            // Cut short by a full disk, say: the training begins again, with the same result.
            model = self.model(training)?;
        }
        let n_steps = model.n_steps(samples.len());
        let per_epoch = n_steps / training.n_epochs.max(1);
        let (mut looked, mut loss) = (Instant::now(), 0.0);
        let mut last = Vec::new();
        while model.step() < n_steps {
            let until = (model.step() + STEPS_PER_LOOK).min(n_steps);
            loss = model.train(&mut batches, samples, policy, until)?;
            last.push(loss);
            if looked.elapsed() >= CHECKPOINT_INTERVAL && model.step() < n_steps {
                model.save(&path)?;
                looked = Instant::now();
            }
        }
        // Only a report: the mean over about the last epoch of this attempt.
        let n_last =
            usize::try_from(per_epoch / STEPS_PER_LOOK).unwrap_or(1).clamp(1, last.len().max(1));
        let tail = &last[last.len().saturating_sub(n_last)..];
        if !tail.is_empty() {
            loss = tail.iter().sum::<f64>() / tail.len() as f64;
        }
        Ok((model, loss))
    }

    fn remove_partial(&self, key: &str) {
        // A leftover is overwritten by the next training of that key, and harms nobody.
        let _ = fs::remove_file(self.dir.join(format!("{key}.partial.safetensors")));
    }

    /// Works with an idle copy of a fold's model, or with a new one.
    fn with_scorer<T>(
        &self,
        fold: usize,
        work: impl FnOnce(&mut Scorer) -> Result<T, TorchError>,
    ) -> Result<T, TorchError> {
        let idle = || self.idle[fold].lock().unwrap_or_else(PoisonError::into_inner);
        let found = idle().pop();
        let mut scorer = if let Some(scorer) = found {
            scorer
        } else {
            let mut model = self.model(self.fold_training(fold))?;
            model.load(&self.fold_path(fold))?;
            // One key for all folds' candidates: pairs are per image.
            let batches = self.crop_and_flip(mix64(self.options.seed ^ ORDER_TAG))?;
            Scorer { model, batches }
        };
        let result = work(&mut scorer);
        idle().push(scorer);
        result
    }

    fn judged(&self, on: TrainOn) -> Vec<u64> {
        match on {
            TrainOn::Searched => self.plan.gate.clone(),
            TrainOn::Fold(fold) => {
                let mut samples = self.held_out[fold].clone();
                samples.extend(&self.spare);
                samples.truncate(usize::try_from(self.options.n_judged_max).unwrap_or(usize::MAX));
                samples
            }
        }
    }

    fn trained_on(&self, on: TrainOn) -> Vec<u64> {
        match on {
            TrainOn::Fold(fold) => self.plan.folds[fold].train.clone(),
            TrainOn::Searched => {
                let mut all: Vec<u64> =
                    self.plan.folds.iter().flat_map(|fold| fold.held_out.iter().copied()).collect();
                all.sort_unstable();
                all
            }
        }
    }
}

impl Lab for TorchLab {
    fn n_folds(&self) -> usize {
        self.plan.folds.len()
    }

    fn n_held_out(&self, fold: usize) -> usize {
        self.held_out[fold].len()
    }

    fn fold_passes(&self, fold: usize) -> u64 {
        let n_train = self.plan.folds[fold].train.len() as u64;
        3 * n_train * u64::from(self.options.fold_epochs) + self.held_out[fold].len() as u64
    }

    fn train_fold(&self, fold: usize) -> Result<FoldRecord, LabError> {
        let what = format!("the model of fold {}", fold + 1);
        let train = || {
            let key = format!("fold-{fold}");
            let samples = &self.plan.folds[fold].train;
            let identity = PreparedPolicy::default();
            let training = self.fold_training(fold);
            let batches = self.crop_and_flip(training.seed)?;
            let (model, train_loss) =
                self.train_to_end(&key, batches, training, samples, &identity)?;
            model.save(&self.fold_path(fold))?;
            self.remove_partial(&key);
            let (right, _) = model.evaluate(&mut self.clean_batches()?, &self.held_out[fold])?;
            let accuracy = Evaluation { right, loss: 0.0 }.accuracy();
            Ok(FoldRecord { train_loss, accuracy, weights: model.weights_digest()? })
        };
        train().map_err(|error| lab_error(&what, error))
    }

    fn has_fold(&self, fold: usize, record: &FoldRecord) -> bool {
        let load = || {
            let mut model = self.model(self.fold_training(fold))?;
            model.load(&self.fold_path(fold))?;
            model.weights_digest()
        };
        load().is_ok_and(|weights| weights == record.weights)
    }

    fn passes(&self, on: TrainOn) -> u64 {
        let n_train = self.trained_on(on).len() as u64;
        3 * n_train * u64::from(self.options.gate_epochs) + self.judged(on).len() as u64
    }

    fn score(
        &self,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Result<Vec<Score>, LabError> {
        let samples = &self.held_out[fold][images];
        self.with_scorer(fold, |scorer| {
            scorer.model.score(&mut scorer.batches, samples, policy, n_draws)
        })
        .map_err(|error| lab_error(&format!("scoring fold {}", fold + 1), error))
    }

    fn change(
        &self,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Result<Change, LabError> {
        let samples = &self.held_out[fold][images];
        self.with_scorer(fold, |scorer| Ok(scorer.batches.change(samples, policy, n_draws)?))
            .map_err(|error| lab_error(&format!("comparing images of fold {}", fold + 1), error))
    }

    fn train(&self, training: &Training<'_>) -> Result<Evaluation, LabError> {
        let Training { on, policy, seed } = *training;
        let place = match on {
            TrainOn::Fold(fold) => format!("fold-{fold}"),
            TrainOn::Searched => "searched".to_owned(),
        };
        let key = format!("{place}-{}-{seed:016x}", policy.id());
        let train = || {
            let options = FoldTraining {
                n_epochs: u64::from(self.options.gate_epochs),
                seed,
                ..self.fold_training(0)
            };
            let prepared = PreparedPolicy::new(policy);
            let (batches, samples) = (self.batches(seed)?, self.trained_on(on));
            let (model, _) = self.train_to_end(&key, batches, options, &samples, &prepared)?;
            let (right, loss) = model.evaluate(&mut self.clean_batches()?, &self.judged(on))?;
            self.remove_partial(&key);
            Ok(Evaluation { right, loss })
        };
        train().map_err(|error| {
            lab_error(&format!("a training with policy '{}'", policy.name()), error)
        })
    }
}

fn lab_error(what: &str, error: TorchError) -> LabError {
    let what = what.to_owned();
    match error {
        TorchError::NotFinite { loss, step } => LabError::Diverged { what, loss, step },
        error => LabError::Failed(format!("{what}: {error}")),
    }
}

fn shuffled(samples: &[u64], seed: u64) -> Vec<u64> {
    let order = EpochOrder::new(samples.len() as u64, mix64(seed ^ ORDER_TAG), 0, true);
    let place = |position| usize::try_from(order.sample_at(position)).expect("below a length");
    (0..samples.len() as u64).map(|position| samples[place(position)]).collect()
}

/// Samples in no fold and not in D_gate, ascending.
fn spare(plan: &FoldPlan, n_samples: u64) -> Vec<u64> {
    let mut used: Vec<u64> = plan.gate.clone();
    used.extend(plan.folds.iter().flat_map(|fold| &fold.held_out));
    used.sort_unstable();
    (0..n_samples).filter(|sample| used.binary_search(sample).is_err()).collect()
}
