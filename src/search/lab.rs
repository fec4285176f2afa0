//! What the search can measure, as an interface: algorithms and gate see numbers, never tensors.
//!
//! Owns the questions and the shape of their answers. The feature `torch` answers them with real
//! models (`torch::lab`); tests of the algorithms answer them with made-up ones.
//!
//! *Invariant* that every lab keeps: an answer is a pure function of the question and of what the
//! lab was made from. Thread count, order of questions and restarts change nothing.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::round::FoldRecord;
use crate::augment::PreparedPolicy;
use crate::policy::Policy;

/// What one image gave under a policy, as the mean over the draws.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Cross-entropy, in nats.
    pub loss: f64,
    /// Share of the draws that were classified right.
    pub accuracy: f64,
}

impl Score {
    /// The mean of scores; zero for none.
    pub fn mean(scores: &[Self]) -> Self {
        let n = scores.len().max(1) as f64;
        let sum = |value: fn(&Self) -> f64| scores.iter().map(value).sum::<f64>() / n;
        Self { loss: sum(|score| score.loss), accuracy: sum(|score| score.accuracy) }
    }
}

/// How much a policy changes images, whatever a model makes of it (its diversity).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// Share of the images of which at least one value differs, in [0, 1].
    pub changed: f64,
    /// Mean absolute difference per value, on the scale 0..1 of pixels.
    pub distance: f64,
}

/// What a model is trained on, and on what it is judged. The two never share a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrainOn {
    /// Trained on D_M of a fold, judged on its D_A and on samples that are in no fold: for search.
    Fold(usize),
    /// Trained on all searched samples, judged on D_gate: for the gate alone.
    Searched,
}

/// One training whose worth is measured: clean images, last epoch.
#[derive(Clone, Copy, Debug)]
pub struct Training<'a> {
    /// The data.
    pub on: TrainOn,
    /// The augmentation, after the recipe's crop and flip.
    pub policy: &'a Policy,
    /// Keys initialisation, order and augmentation: equal seeds make a pair.
    pub seed: u64,
}

/// How a trained model does on clean images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// One per image, always in the same order: classified right?
    #[serde(with = "bits")]
    pub right: Vec<bool>,
    /// Mean cross-entropy, in nats.
    pub loss: f64,
}

impl Evaluation {
    /// Share of the images that were classified right.
    pub fn accuracy(&self) -> f64 {
        self.right.iter().filter(|&&right| right).count() as f64 / self.right.len().max(1) as f64
    }
}

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// The loss is no number any more: the question has no good answer, now or later.
    #[error(
        "{what}: the loss became {loss} in step {step}; lower the learning rate, or look for \
         broken images with 'fastaa-ctl dataset verify'"
    )]
    Diverged {
        /// Which model.
        what: String,
        /// NaN or infinite.
        loss: f64,
        /// Of the training, from 0.
        step: u64,
    },
    /// Anything else; the message names place and cure.
    #[error("{0}")]
    Failed(String),
}

/// See the module. Questions come from several threads at once.
pub trait Lab: Sync {
    /// Number of folds K.
    fn n_folds(&self) -> usize;

    /// Samples in D_A of a fold.
    fn n_held_out(&self, fold: usize) -> usize;

    /// Image passes that the training of a fold's model costs.
    fn fold_passes(&self, _fold: usize) -> u64 {
        0
    }

    /// Trains the fold's model on its D_M under the recipe's crop and flip alone, or goes on with
    /// what is left of an earlier attempt.
    ///
    /// # Errors
    /// The training diverges, or a sample cannot be read, or the checkpoint not written.
    fn train_fold(&self, _fold: usize) -> Result<FoldRecord, LabError> {
        Ok(FoldRecord::default())
    }

    /// Whether the model that `record` tells of is still at hand, unchanged.
    fn has_fold(&self, _fold: usize, _record: &FoldRecord) -> bool {
        true
    }

    /// Image passes that a training costs, its evaluation included; a backward pass counts two.
    fn passes(&self, on: TrainOn) -> u64;

    /// Scores the fold's model, which was trained without any policy, on `images` of its D_A under
    /// a policy, as the mean over `n_draws` draws. D_A is in a fixed random order, so that its
    /// beginning is a fair sample. The same images and draws get the same random words under every
    /// policy: candidates are paired.
    ///
    /// # Errors
    /// A sample cannot be read.
    fn score(
        &self,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Result<Vec<Score>, LabError>;

    /// How much a policy changes these images of D_A against the same crop and flip without it.
    ///
    /// # Errors
    /// A sample cannot be read.
    fn change(
        &self,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Result<Change, LabError>;

    /// Trains a model from scratch under a policy and judges it on clean images.
    ///
    /// # Errors
    /// The training diverges, or a sample cannot be read.
    fn train(&self, training: &Training<'_>) -> Result<Evaluation, LabError>;
}

/// Booleans in JSON: their number, a colon, and hexadecimal digits, the first bit lowest.
mod bits {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(
        bits: &[bool],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let digit = |four: &[bool]| {
            let value = four.iter().rev().fold(0, |value, &bit| 2 * value + u32::from(bit));
            char::from_digit(value, 16).expect("four bits")
        };
        let digits: String = bits.chunks(4).map(digit).collect();
        serializer.serialize_str(&format!("{}:{digits}", bits.len()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<bool>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = text.split_once(':').and_then(|(count, digits)| {
            let n_bits: usize = count.parse().ok()?;
            let values: Option<Vec<u32>> = digits.chars().map(|digit| digit.to_digit(16)).collect();
            let values = values?;
            let bits = values.iter().flat_map(|value| (0..4).map(move |bit| value >> bit & 1 == 1));
            (values.len() == n_bits.div_ceil(4)).then(|| bits.take(n_bits).collect())
        });
        parsed.ok_or_else(|| D::Error::custom("not of the form COUNT:HEXADECIMAL"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evaluations_come_back_from_their_json() {
        for n_images in [0, 1, 4, 7, 1000] {
            let right = (0..n_images).map(|idx| idx % 3 == 0 || idx % 7 == 1).collect();
            let evaluation = Evaluation { right, loss: 0.25 };
            let json = serde_json::to_string(&evaluation).unwrap();
            assert!(json.len() < 40 + n_images / 4 + 1);
            assert_eq!(serde_json::from_str::<Evaluation>(&json).unwrap(), evaluation);
        }
        for bad in ["", "3", "3:", "5:f", "1:g", "-1:0"] {
            let json = format!("{{\"right\":\"{bad}\",\"loss\":0.0}}");
            assert!(serde_json::from_str::<Evaluation>(&json).is_err(), "{bad}");
        }
    }
}
