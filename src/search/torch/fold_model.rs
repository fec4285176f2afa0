//! A fold model: trained on D_M with the recipe's crop and flip only, then frozen and asked how
//! well it does on D_A under a candidate policy (density matching). The gate trains the same models
//! under a policy, and judges them on clean images.
//!
//! *Invariant*: training is a function of (split, recipe, samples, policy, options). A training
//! that was killed and goes on from a checkpoint ends with the same weights, bit for bit; one
//! beside others in the same process too.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use tch::{Device, Kind, Reduction, Tensor, no_grad};

use crate::augment::PreparedPolicy;
use crate::pipeline::order::EpochOrder;
use crate::pipeline::render::OutputShape;
use crate::search::batches::{BatchMaker, HostBatch};
use crate::search::lab::Score;

use super::device::unit;
use super::model::{Model, cross_entropy};
use super::precision::Precision;
use super::sgd::{Sgd, SgdOptions, learning_rate};
use super::spec::ModelSpec;
use super::{TorchError, share_threads};

/// Name of the step counter in a checkpoint.
const STEP_NAME: &str = "step";
/// Share of the steps that warm up.
const WARMUP_SHARE: f64 = 0.05;
/// Few samples get smaller batches, so that an epoch has at least so many steps.
const EPOCH_STEPS_MIN: usize = 6;
/// Batch norm has no variance of one image.
const BATCH_SIZE_MIN: usize = 2;
/// The batch that `peak_lr` is meant for.
const LR_BATCH_SIZE: f64 = 128.0;
/// The first steps of a model load kernels and choose algorithms: no measure of a step's time.
const N_COLD_STEPS: u64 = 20;
/// Images that are judged at once.
const JUDGED_AT_ONCE: usize = 128;

/// How a fold model is trained. Fixed in units of work, so that no result depends on time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FoldTraining {
    /// Passes over D_M.
    pub n_epochs: u64,
    /// Samples per step; what is left over at an epoch's end is dropped. Smaller for few samples:
    /// an epoch has at least six steps.
    pub batch_size: usize,
    /// Highest learning rate at 128 samples per step; it goes with the root of that number.
    pub peak_lr: f64,
    /// Keys initialisation and order.
    pub seed: u64,
    /// In which numbers a built-in model computes; a TorchScript module computes in f32.
    pub precision: Precision,
    /// Where it computes.
    pub device: Device,
}

impl Default for FoldTraining {
    fn default() -> Self {
        Self {
            n_epochs: 30,
            batch_size: 128,
            peak_lr: 0.1,
            seed: 0,
            precision: Precision::F32,
            device: Device::Cpu,
        }
    }
}

/// A model and how far its training is. It can go from thread to thread, but is used by one at a
/// time: who wants to ask it from several loads a checkpoint in each.
pub struct FoldModel {
    model: Model,
    sgd: Sgd,
    training: FoldTraining,
    step: u64,
    /// Steps done by this process.
    n_steps_here: u64,
}

/// What a model makes of some images, one value per image.
struct Judged {
    losses: Vec<f32>,
    right: Vec<bool>,
}

impl FoldModel {
    /// An untrained model for images of `shape` (whose dtype and layout do not matter) and labels
    /// below `n_classes`.
    ///
    /// # Errors
    /// A TorchScript file is refused, or libtorch has no such device.
    pub fn new(
        spec: &ModelSpec,
        shape: &OutputShape,
        n_classes: u32,
        training: FoldTraining,
    ) -> Result<Self, TorchError> {
        share_threads();
        let model = Model::new(spec, shape, n_classes, &training)?;
        let sgd = Sgd::new(model.trained()?, SgdOptions::default());
        Ok(Self { model, sgd, training, step: 0, n_steps_here: 0 })
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Steps of the whole training on `n_samples` samples.
    pub fn n_steps(&self, n_samples: usize) -> u64 {
        (n_samples / self.batch_size(n_samples)) as u64 * self.training.n_epochs
    }

    /// What the model computes in.
    pub fn precision(&self) -> Precision {
        self.model.precision()
    }

    fn batch_size(&self, n_samples: usize) -> usize {
        self.training.batch_size.min(n_samples / EPOCH_STEPS_MIN).max(BATCH_SIZE_MIN)
    }

    /// *Source* of the root: A. Krizhevsky, "One weird trick", arXiv 1404.5997, section 5.
    fn peak_lr(&self, batch_size: usize) -> f64 {
        self.training.peak_lr * (batch_size as f64 / LR_BATCH_SIZE).sqrt()
    }

    /// Trains on `samples` under `policy` up to step `until`, at most to the end; gives the mean
    /// loss of the steps done. The draws of crop, flip and policy are keyed by (seed of `batches`,
    /// epoch, sample).
    ///
    /// # Errors
    /// A sample cannot be read, there are fewer than two, or the loss is no number any more.
    pub fn train(
        &mut self,
        batches: &mut BatchMaker,
        samples: &[u64],
        policy: &PreparedPolicy,
        until: u64,
    ) -> Result<f64, TorchError> {
        if samples.len() < BATCH_SIZE_MIN {
            return Err(TorchError::TooFewSamples { n_samples: samples.len() });
        }
        share_threads();
        let batch_size = self.batch_size(samples.len());
        let n_steps = self.n_steps(samples.len());
        let per_epoch = (samples.len() / batch_size) as u64;
        #[allow(clippy::cast_possible_truncation, reason = "a share of a number of steps")]
        let n_warmup = (n_steps as f64 * WARMUP_SHARE).ceil() as u64;
        let peak_lr = self.peak_lr(batch_size);
        let (mut loss_sum, mut n_done) = (0.0, 0_u64);
        while self.step < until.min(n_steps) {
            let (epoch, step_in_epoch) = (self.step / per_epoch, self.step % per_epoch);
            let order = EpochOrder::new(samples.len() as u64, self.training.seed, epoch, true);
            let first = step_in_epoch * batch_size as u64;
            let chosen: Vec<u64> = (first..first + batch_size as u64)
                .map(|position| samples[to_usize(order.sample_at(position))])
                .collect();
            let host = batches.batch(&chosen, epoch, policy)?;
            let lr = learning_rate(self.step, n_steps, n_warmup, peak_lr);
            let (device, is_warm) = (self.training.device, self.n_steps_here >= N_COLD_STEPS);
            loss_sum += unit(device, is_warm, || self.train_step(&host, batches.shape(), lr))?;
            n_done += 1;
            self.n_steps_here += 1;
        }
        Ok(loss_sum / n_done.max(1) as f64)
    }

    fn train_step(
        &mut self,
        host: &HostBatch,
        shape: &OutputShape,
        lr: f64,
    ) -> Result<f64, TorchError> {
        let (images, labels) = self.tensors(host, shape)?;
        self.sgd.zero_grad();
        let logits = self.model.forward(&images, true)?;
        let loss = cross_entropy(&logits, &labels, Reduction::Mean)?;
        loss.f_backward()?;
        self.sgd.step(lr)?;
        // Waits for a GPU, so it comes last: nothing of this step is queued any more.
        let loss = loss.f_double_value(&[])?;
        if !loss.is_finite() {
            return Err(TorchError::NotFinite { loss, step: self.step });
        }
        self.step += 1;
        Ok(loss)
    }

    /// Which of `samples` are classified right, and their mean loss. `batches` is made by
    /// [`BatchMaker::clean`] for images as they are.
    ///
    /// # Errors
    /// A sample cannot be read, or the loss is no number.
    pub fn evaluate(
        &self,
        batches: &mut BatchMaker,
        samples: &[u64],
    ) -> Result<(Vec<bool>, f64), TorchError> {
        share_threads();
        let (mut right, mut loss_sum) = (Vec::with_capacity(samples.len()), 0.0);
        for chunk in samples.chunks(JUDGED_AT_ONCE) {
            let host = batches.batch(chunk, 0, &PreparedPolicy::default())?;
            let judged = self.judge(&host, batches.shape())?;
            right.extend(judged.right);
            loss_sum += judged.losses.into_iter().map(f64::from).sum::<f64>();
        }
        let loss = loss_sum / samples.len().max(1) as f64;
        if !loss.is_finite() {
            return Err(TorchError::NotFinite { loss, step: self.step });
        }
        Ok((right, loss))
    }

    /// Scores each of `samples` under `policy`, as the mean over `n_draws` draws.
    ///
    /// Draw d of a sample is keyed by (seed of `batches`, epoch d, sample): the same for every
    /// policy, so that candidates are compared on the same images with the same random words.
    ///
    /// # Errors
    /// A sample cannot be read.
    pub fn score(
        &self,
        batches: &mut BatchMaker,
        samples: &[u64],
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Result<Vec<Score>, TorchError> {
        share_threads();
        let mut scores = vec![Score::default(); samples.len()];
        for draw in 0..n_draws {
            let places = scores.chunks_mut(JUDGED_AT_ONCE);
            for (chunk, places) in samples.chunks(JUDGED_AT_ONCE).zip(places) {
                let host = batches.batch(chunk, u64::from(draw), policy)?;
                let judged = self.judge(&host, batches.shape())?;
                for ((place, loss), right) in places.iter_mut().zip(judged.losses).zip(judged.right)
                {
                    place.loss += f64::from(loss) / f64::from(n_draws);
                    place.accuracy += f64::from(u8::from(right)) / f64::from(n_draws);
                }
            }
        }
        Ok(scores)
    }

    fn judge(&self, host: &HostBatch, shape: &OutputShape) -> Result<Judged, TorchError> {
        // Less than a training step, whose time is the measure.
        unit(self.training.device, false, || {
            let (images, labels) = self.tensors(host, shape)?;
            no_grad(|| {
                let logits = self.model.forward(&images, false)?;
                let losses = cross_entropy(&logits, &labels, Reduction::None)?;
                let right = logits.f_argmax(1, false)?.f_eq_tensor(&labels)?;
                Ok(Judged { losses: losses.try_into()?, right: right.try_into()? })
            })
        })
    }

    /// SHA-256, in hex, of all weights and statistics: names, shapes and bytes.
    ///
    /// # Errors
    /// libtorch cannot give them.
    pub fn weights_digest(&self) -> Result<String, TorchError> {
        self.model.digest()
    }

    /// Writes weights, statistics, momentum and step, by temp file and rename.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), TorchError> {
        let step = i64::try_from(self.step).expect("steps are counted");
        let mut named = self.model.state()?;
        named.extend(self.sgd.state());
        named.push((STEP_NAME.to_owned(), Tensor::from_slice(&[step])));
        named.sort_by(|a, b| a.0.cmp(&b.0));
        for (_, tensor) in &mut named {
            *tensor = tensor.f_to_device(Device::Cpu)?.f_contiguous()?;
        }
        let temp = path.with_extension("partial");
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move |source| TorchError::Io { path, source }
        };
        Tensor::write_safetensors(&named, &temp)?;
        File::open(&temp).and_then(|file| file.sync_all()).map_err(failed(&temp))?;
        std::fs::rename(&temp, path).map_err(failed(path))
    }

    /// Goes on from a checkpoint of [`Self::save`].
    ///
    /// # Errors
    /// The file cannot be read, or belongs to another model; the model is then undefined.
    pub fn load(&mut self, path: &Path) -> Result<(), TorchError> {
        let named: BTreeMap<String, Tensor> = Tensor::read_safetensors(path)?.into_iter().collect();
        self.model.load(&named)?;
        self.sgd = Sgd::new(self.model.trained()?, SgdOptions::default());
        self.sgd.load(&named)?;
        let step = named.get(STEP_NAME).filter(|step| step.numel() == 1);
        let step =
            step.ok_or_else(|| TorchError::ForeignCheckpoint { tensor: STEP_NAME.to_owned() })?;
        self.step = u64::try_from(step.f_int64_value(&[0])?).unwrap_or_default();
        Ok(())
    }

    /// Images `[n, channels, height, width]` f32, interleaved in memory, and labels `[n]` i64.
    fn tensors(
        &self,
        batch: &HostBatch,
        shape: &OutputShape,
    ) -> Result<(Tensor, Tensor), TorchError> {
        let side = |side: usize| i64::try_from(side).expect("at most IMAGE_SIDE_MAX");
        let sizes = [-1, side(shape.height), side(shape.width), side(shape.channels)];
        let device = self.training.device;
        let images = Tensor::from_slice(&batch.images).f_to_device(device)?;
        let images = images.f_reshape(sizes)?.f_permute([0, 3, 1, 2])?;
        debug_assert_eq!(images.kind(), Kind::Float, "the batch maker makes f32");
        Ok((images, Tensor::from_slice(&batch.labels).f_to_device(device)?))
    }
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("below the length of a slice")
}
