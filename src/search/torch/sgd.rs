//! SGD with Nesterov momentum, whose state can be saved: tch cannot save its optimisers'.
//!
//! *Source*: I. Sutskever et al., "On the importance of initialization and momentum in deep
//! learning", ICML 2013, in the form of PyTorch's `torch.optim.SGD(nesterov=True)`, which the tests
//! compare with. Weight decay applies to matrices and kernels only, never to norms and biases.

use std::collections::BTreeMap;

use tch::{TchError, Tensor, no_grad};

use super::TorchError;

/// Prefix of the momentum's names in a checkpoint.
const MOMENTUM_PREFIX: &str = "momentum/";

/// How the weights move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SgdOptions {
    /// Share of the last update that is kept.
    pub(crate) momentum: f64,
    /// Pull towards zero, of matrices and kernels.
    pub(crate) weight_decay: f64,
    /// Largest L2 norm of the whole gradient; larger ones are scaled down.
    pub(crate) grad_norm_max: f64,
}

impl Default for SgdOptions {
    /// As the published search trains its fold models.
    fn default() -> Self {
        Self { momentum: 0.9, weight_decay: 2e-4, grad_norm_max: 5.0 }
    }
}

struct Param {
    weight: Tensor,
    momentum: Tensor,
    decays: bool,
}

/// The optimiser of one model.
pub(crate) struct Sgd {
    options: SgdOptions,
    /// By name: the order of updates and of the checkpoint is fixed.
    params: BTreeMap<String, Param>,
}

impl Sgd {
    /// Optimises these named weights, from momentum zero.
    pub(crate) fn new(
        named: impl IntoIterator<Item = (String, Tensor)>,
        options: SgdOptions,
    ) -> Self {
        let trainable = named.into_iter().filter(|(_, weight)| weight.requires_grad());
        let params = trainable
            .map(|(name, weight)| {
                let momentum = weight.zeros_like().detach();
                let decays = weight.dim() > 1;
                (name, Param { weight, momentum, decays })
            })
            .collect();
        Self { options, params }
    }

    /// One step at learning rate `lr`, from gradients computed since [`Self::zero_grad`]. A weight
    /// that had no part in the loss has no gradient, and stays.
    ///
    /// # Errors
    /// libtorch says no.
    pub(crate) fn step(&mut self, lr: f64) -> Result<(), TchError> {
        let SgdOptions { momentum, weight_decay, .. } = self.options;
        no_grad(|| {
            let Some(scale) = self.clip_scale()? else { return Ok(()) };
            for param in self.params.values_mut() {
                let gradient = param.weight.grad();
                if !gradient.defined() {
                    continue;
                }
                let mut gradient = gradient.f_mul(&scale)?;
                if param.decays && weight_decay != 0.0 {
                    gradient = gradient.f_add(&(&param.weight * weight_decay))?;
                }
                let _ = param.momentum.f_mul_scalar_(momentum)?.f_add_(&gradient)?;
                let update = gradient.f_add(&(&param.momentum * momentum))?;
                let _ = param.weight.f_sub_(&(update * lr))?;
            }
            Ok(())
        })
    }

    /// By how much the gradient is scaled down, as a tensor: nothing waits for a GPU here.
    fn clip_scale(&self) -> Result<Option<Tensor>, TchError> {
        let gradients = self.params.values().map(|param| param.weight.grad());
        let norms: Vec<Tensor> =
            gradients.filter(Tensor::defined).map(|gradient| gradient.norm()).collect();
        if norms.is_empty() {
            return Ok(None);
        }
        let norm = Tensor::f_stack(&norms, 0)?.f_norm()?;
        Ok(Some((norm.f_reciprocal()? * self.options.grad_norm_max).f_clamp_max(1.0)?))
    }

    /// Forgets the gradients.
    pub(crate) fn zero_grad(&mut self) {
        for param in self.params.values_mut() {
            param.weight.zero_grad();
        }
    }

    /// The state, as named tensors for a checkpoint.
    pub(crate) fn state(&self) -> impl Iterator<Item = (String, Tensor)> + '_ {
        self.params
            .iter()
            .map(|(name, param)| (format!("{MOMENTUM_PREFIX}{name}"), param.momentum.copy()))
    }

    /// Takes the state back from a checkpoint.
    ///
    /// # Errors
    /// A tensor is missing, or of another shape: the checkpoint is of another model.
    pub(crate) fn load(&mut self, named: &BTreeMap<String, Tensor>) -> Result<(), TorchError> {
        for (name, param) in &mut self.params {
            let key = format!("{MOMENTUM_PREFIX}{name}");
            let saved = named.get(&key).filter(|saved| saved.size() == param.momentum.size());
            let saved = saved.ok_or(TorchError::ForeignCheckpoint { tensor: key })?;
            no_grad(|| param.momentum.copy_(saved));
        }
        Ok(())
    }
}

/// Learning rate of a step: linear warm-up, then half a cosine down to zero.
///
/// *Source*: I. Loshchilov, F. Hutter, "SGDR", ICLR 2017, equation 5, without restarts.
pub(crate) fn learning_rate(step: u64, n_steps: u64, n_warmup: u64, peak: f64) -> f64 {
    if step < n_warmup {
        return peak * (step + 1) as f64 / n_warmup as f64;
    }
    let progress = (step - n_warmup) as f64 / (n_steps - n_warmup).max(1) as f64;
    peak * 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn the_schedule_warms_up_and_falls_to_zero() {
        let rates: Vec<f64> = (0..=10).map(|step| learning_rate(step, 10, 2, 0.4)).collect();
        assert!((rates[0] - 0.2).abs() < 1e-12 && (rates[1] - 0.4).abs() < 1e-12);
        assert!((rates[2] - 0.4).abs() < 1e-12 && (rates[6] - 0.2).abs() < 1e-12);
        assert!(rates[10].abs() < 1e-12);
        assert!(rates[2..].is_sorted_by(|a, b| a > b));
    }

    /// Against libtorch's own SGD over several steps; decay off, because it decays everything.
    #[test]
    fn steps_equal_libtorch_s_nesterov_sgd() {
        use tch::nn::{OptimizerConfig, VarStore};
        let start = Tensor::from_slice(&[0.5f32, -1.0, 2.0, 0.25]).reshape([2, 2]);
        let target = Tensor::from_slice(&[1.0f32, 0.0, -1.0, 3.0]).reshape([2, 2]);
        let loss = |weight: &Tensor| (weight - &target).square().sum(Kind::Float);

        let theirs = VarStore::new(Device::Cpu);
        let their_weight = theirs.root().var_copy("weight", &start);
        let mut their_sgd = tch::nn::sgd(0.9, 0.0, 0.0, true).build(&theirs, 0.05).expect("builds");
        let ours = VarStore::new(Device::Cpu);
        let our_weight = ours.root().var_copy("weight", &start);
        let options = SgdOptions { weight_decay: 0.0, grad_norm_max: 1e9, ..SgdOptions::default() };
        let mut our_sgd = Sgd::new(ours.variables(), options);
        for _ in 0..20 {
            their_sgd.backward_step(&loss(&their_weight));
            our_sgd.zero_grad();
            loss(&our_weight).backward();
            our_sgd.step(0.05).expect("steps");
        }
        let difference = (their_weight - our_weight).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "difference {difference}");
    }

    #[test]
    fn norms_and_biases_do_not_decay() {
        let store = tch::nn::VarStore::new(Device::Cpu);
        let kernel = store.root().ones("kernel", &[2, 2]);
        let scale = store.root().ones("scale", &[2]);
        let mut sgd = Sgd::new(store.variables(), SgdOptions::default());
        // A gradient of zero: only decay can move a weight.
        (kernel.sum(Kind::Float) * 0.0 + scale.sum(Kind::Float) * 0.0).backward();
        sgd.step(1.0).expect("steps");
        assert!(kernel.max().double_value(&[]) < 1.0);
        assert!((scale.max().double_value(&[]) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn large_gradients_are_clipped_to_the_norm() {
        let store = tch::nn::VarStore::new(Device::Cpu);
        let weight = store.root().zeros("weight", &[4]);
        let options = SgdOptions { momentum: 0.0, weight_decay: 0.0, grad_norm_max: 5.0 };
        let mut sgd = Sgd::new(store.variables(), options);
        (weight.sum(Kind::Float) * 100.0).backward();
        sgd.step(1.0).expect("steps");
        // Each of four equal parts of a gradient of norm 5 is 2.5.
        assert!((weight.min().double_value(&[]) + 2.5).abs() < 1e-5);
    }
}
