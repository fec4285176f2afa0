//! A fold model: trained on D_M with the recipe's crop and flip only, then frozen and asked how
//! well it does on D_A under a candidate policy (density matching).
//!
//! *Invariant*: training is a function of (split, recipe, samples, options). A training that was
//! killed and goes on from a checkpoint ends with the same weights, bit for bit.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use tch::nn::{ModuleT, VarStore};
use tch::{Device, Kind, Reduction, Tensor, no_grad};

use crate::augment::PreparedPolicy;
use crate::pipeline::order::EpochOrder;
use crate::search::batches::{BatchMaker, HostBatch};

use super::TorchError;
use super::sgd::{Sgd, SgdOptions, learning_rate};
use super::small_cnn::SmallCnn;

/// Name of the step counter in a checkpoint.
const STEP_NAME: &str = "step";
/// Share of the steps that warm up.
const WARMUP_SHARE: f64 = 0.05;

/// How a fold model is trained. Fixed in units of work, so that no result depends on time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FoldTraining {
    /// Passes over D_M.
    pub n_epochs: u64,
    /// Samples per step; what is left over at an epoch's end is dropped.
    pub batch_size: usize,
    /// Highest learning rate.
    pub peak_lr: f64,
    /// Keys initialisation and order.
    pub seed: u64,
}

impl Default for FoldTraining {
    fn default() -> Self {
        Self { n_epochs: 30, batch_size: 128, peak_lr: 0.1, seed: 0 }
    }
}

/// What one image gave under a policy, as the mean over the draws.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Cross-entropy, in nats.
    pub loss: f64,
    /// Share of the draws that were classified right.
    pub accuracy: f64,
}

/// A model and how far its training is.
pub struct FoldModel {
    store: VarStore,
    net: SmallCnn,
    sgd: Sgd,
    training: FoldTraining,
    step: u64,
}

impl FoldModel {
    /// An untrained model for images of `channels` and labels below `n_classes`.
    pub fn new(channels: usize, n_classes: u32, training: FoldTraining) -> Self {
        tch::manual_seed(i64::from_ne_bytes(training.seed.to_ne_bytes()));
        let store = VarStore::new(Device::Cpu);
        let channels = i64::try_from(channels).expect("1 or 3");
        let net = SmallCnn::new(&store.root(), channels, i64::from(n_classes));
        let sgd = Sgd::new(store.variables(), SgdOptions::default());
        Self { store, net, sgd, training, step: 0 }
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Steps of the whole training on `n_samples` samples.
    pub fn n_steps(&self, n_samples: usize) -> u64 {
        (n_samples / self.batch_size(n_samples)) as u64 * self.training.n_epochs
    }

    fn batch_size(&self, n_samples: usize) -> usize {
        self.training.batch_size.clamp(1, n_samples.max(1))
    }

    /// Trains on the samples `train` up to step `until`, at most to the end; gives the mean loss of
    /// the steps done.
    ///
    /// # Errors
    /// A sample cannot be read, or the loss is no number any more.
    pub fn train(
        &mut self,
        batches: &mut BatchMaker,
        train: &[u64],
        until: u64,
    ) -> Result<f64, TorchError> {
        let batch_size = self.batch_size(train.len());
        let n_steps = self.n_steps(train.len());
        let per_epoch = (train.len() / batch_size) as u64;
        #[allow(clippy::cast_possible_truncation, reason = "a share of a number of steps")]
        let n_warmup = (n_steps as f64 * WARMUP_SHARE).ceil() as u64;
        let crop_and_flip = PreparedPolicy::default();
        let (mut loss_sum, mut n_done) = (0.0, 0);
        while self.step < until.min(n_steps) {
            let (epoch, step_in_epoch) = (self.step / per_epoch, self.step % per_epoch);
            let n_samples = train.len() as u64;
            let order = EpochOrder::new(n_samples, self.training.seed, epoch, true);
            let first = step_in_epoch * batch_size as u64;
            let samples: Vec<u64> = (first..first + batch_size as u64)
                .map(|position| train[to_usize(order.sample_at(position))])
                .collect();
            let (images, labels) =
                tensors(&batches.batch(&samples, epoch, &crop_and_flip)?, batches);
            self.sgd.zero_grad();
            let loss = self.net.forward_t(&images, true).cross_entropy_for_logits(&labels);
            let loss_value = loss.double_value(&[]);
            if !loss_value.is_finite() {
                return Err(TorchError::NotFinite { loss: loss_value, step: self.step });
            }
            loss.backward();
            self.sgd.step(learning_rate(self.step, n_steps, n_warmup, self.training.peak_lr));
            self.step += 1;
            loss_sum += loss_value;
            n_done += 1;
        }
        Ok(loss_sum / f64::from(n_done.max(1)))
    }

    /// Scores each of `samples` under `policy`, as the mean over `n_draws` draws.
    ///
    /// Draw d of a sample is keyed by (seed, epoch d, sample): the same for every policy, so that
    /// candidates are compared on the same images with the same random words.
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
        let mut scores = vec![Score { loss: 0.0, accuracy: 0.0 }; samples.len()];
        for draw in 0..n_draws {
            let chunks = samples.chunks(self.training.batch_size);
            let places = scores.chunks_mut(self.training.batch_size);
            for (chunk, places) in chunks.zip(places) {
                let host = batches.batch(chunk, u64::from(draw), policy)?;
                let (images, labels) = tensors(&host, batches);
                let (losses, rights) = no_grad(|| -> Result<_, tch::TchError> {
                    let logits = self.net.forward_t(&images, false);
                    let losses = logits.f_cross_entropy_loss::<Tensor>(
                        &labels,
                        None,
                        Reduction::None,
                        -100,
                        0.0,
                    )?;
                    let rights = logits.argmax(1, false).eq_tensor(&labels).to_kind(Kind::Float);
                    Ok((Vec::<f32>::try_from(losses)?, Vec::<f32>::try_from(rights)?))
                })?;
                for ((place, loss), right) in places.iter_mut().zip(losses).zip(rights) {
                    place.loss += f64::from(loss) / f64::from(n_draws);
                    place.accuracy += f64::from(right) / f64::from(n_draws);
                }
            }
        }
        Ok(scores)
    }

    /// Writes weights, statistics, momentum and step, by temp file and rename.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), TorchError> {
        let step = i64::try_from(self.step).expect("steps are counted");
        let mut named: Vec<(String, Tensor)> = self.store.variables().into_iter().collect();
        named.extend(self.sgd.state());
        named.push((STEP_NAME.to_owned(), Tensor::from_slice(&[step])));
        named.sort_by(|a, b| a.0.cmp(&b.0));
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
        for (name, mut weight) in self.store.variables() {
            let saved = named.get(&name).filter(|saved| saved.size() == weight.size());
            let saved = saved.ok_or(TorchError::ForeignCheckpoint { tensor: name })?;
            no_grad(|| weight.copy_(saved));
        }
        self.sgd.load(&named)?;
        let step = named.get(STEP_NAME).filter(|step| step.numel() == 1);
        let step =
            step.ok_or_else(|| TorchError::ForeignCheckpoint { tensor: STEP_NAME.to_owned() })?;
        self.step = u64::try_from(step.int64_value(&[0])).unwrap_or_default();
        Ok(())
    }
}

/// `[n, channels, height, width]` f32 and `[n]` i64.
fn tensors(batch: &HostBatch, batches: &BatchMaker) -> (Tensor, Tensor) {
    let shape = batches.shape();
    let side = |side: usize| i64::try_from(side).expect("at most IMAGE_SIDE_MAX");
    let sizes = [-1, side(shape.channels), side(shape.height), side(shape.width)];
    (Tensor::from_slice(&batch.images).reshape(sizes), Tensor::from_slice(&batch.labels))
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("below the length of a slice")
}
