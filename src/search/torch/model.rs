//! What the fold models have in common: a forward pass, trained weights, a state that is saved.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Reduction, TchError, Tensor};

use crate::pipeline::render::OutputShape;

use super::net::{Net, overwrite};
use super::precision::Precision;
use super::script::Script;
use super::spec::ModelSpec;
use super::{FoldTraining, TorchError};

/// A label that libtorch leaves out; no class has it.
const IGNORED_LABEL: i64 = -100;

/// A network of this crate, or a module of the user's.
pub(super) enum Model {
    /// See `net`.
    Net(Net),
    /// See `script`.
    Script(Script),
}

impl Model {
    pub(super) fn new(
        spec: &ModelSpec,
        shape: &OutputShape,
        n_classes: u32,
        training: &FoldTraining,
    ) -> Result<Self, TorchError> {
        let FoldTraining { device, precision, seed, .. } = *training;
        match (spec, spec.plan(shape)) {
            (ModelSpec::TorchScript(path), _) => {
                Ok(Self::Script(Script::new(path, shape, n_classes, device)?))
            }
            (_, plan) => {
                let plan = plan.expect("only a module has no plan");
                Ok(Self::Net(Net::new(&plan, n_classes, seed, precision, device)?))
            }
        }
    }

    /// `[n, channels, height, width]` f32 → logits `[n, n_classes]` f32.
    pub(super) fn forward(&self, images: &Tensor, train: bool) -> Result<Tensor, TchError> {
        match self {
            Self::Net(net) => net.forward(images, train),
            Self::Script(script) => script.forward(images, train),
        }
    }

    /// What the model computes in: modules run in f32 as they are.
    pub(super) const fn precision(&self) -> Precision {
        match self {
            Self::Net(net) => net.precision(),
            Self::Script(_) => Precision::F32,
        }
    }

    /// The trained tensors, by name.
    pub(super) fn trained(&self) -> Result<Vec<(String, Tensor)>, TchError> {
        match self {
            Self::Net(net) => {
                let trained = net.named().iter().filter(|(_, tensor)| tensor.requires_grad());
                Ok(trained.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect())
            }
            Self::Script(script) => script.trained(),
        }
    }

    /// Weights and statistics, as named tensors for a checkpoint.
    pub(super) fn state(&self) -> Result<Vec<(String, Tensor)>, TorchError> {
        match self {
            Self::Net(net) => {
                let named = net.named().iter();
                Ok(named.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect())
            }
            Self::Script(script) => Ok(vec![script.state()?]),
        }
    }

    /// Takes the state back. The tensors of [`Self::trained`] may be new ones then.
    pub(super) fn load(&self, named: &BTreeMap<String, Tensor>) -> Result<(), TorchError> {
        let net = match self {
            Self::Net(net) => net,
            Self::Script(script) => return script.load(named),
        };
        for (name, tensor) in net.named() {
            let saved = named.get(name).filter(|saved| saved.size() == tensor.size());
            let saved =
                saved.ok_or_else(|| TorchError::ForeignCheckpoint { tensor: name.clone() })?;
            overwrite(tensor, saved)?;
        }
        Ok(())
    }

    /// SHA-256, in hex, of the names, kinds, shapes and bytes of [`Self::state`].
    pub(super) fn digest(&self) -> Result<String, TorchError> {
        let mut state = self.state()?;
        state.sort_by(|a, b| a.0.cmp(&b.0));
        let mut hash = Sha256::new();
        for (name, tensor) in state {
            let tensor = tensor.f_to_device(Device::Cpu)?.f_contiguous()?;
            hash.update(format!("{name}:{:?}:{:?};", tensor.kind(), tensor.size()));
            let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
            tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
            hash.update(&bytes);
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// The mean loss of `logits` `[n, n_classes]` against `labels` `[n]`, or one per image.
pub(super) fn cross_entropy(
    logits: &Tensor,
    labels: &Tensor,
    reduction: Reduction,
) -> Result<Tensor, TchError> {
    debug_assert_eq!(logits.kind(), Kind::Float, "logits are f32 in every precision");
    logits.f_cross_entropy_loss::<Tensor>(labels, None, reduction, IGNORED_LABEL, 0.0)
}
