//! The built-in networks: `spec`'s layers with weights, and their forward pass.
//!
//! Owns initial weights and the forward pass. *Invariants*: initial weights are a function of
//! (architecture, seed), drawn without torch's global generator, which other threads share; every
//! convolution works on interleaved images (`channels_last`), which oneDNN and cuDNN like best.
//!
//! *Source* of the initial weights: K. He et al., "Delving deep into rectifiers", ICCV 2015, normal
//! by fan-out as in torchvision's ResNet; the last layer is uniform in ±1/√n as torch's linear one.

use std::f64::consts::TAU;

use tch::{Device, Kind, TchError, Tensor, no_grad};

use crate::random::{Purpose, SampleRng};

use super::precision::Precision;
use super::spec::{Conv, Layer, Plan};

/// Share of a batch's statistics that goes into the running ones.
const NORM_MOMENTUM: f64 = 0.1;
/// Keeps a norm from dividing by zero.
const NORM_EPSILON: f64 = 1e-5;
/// Weights that share one stream of random numbers.
const DRAW_CHUNK: usize = 1024;

/// A network that can be trained.
pub(super) struct Net {
    layers: Vec<NetLayer>,
    /// `[n_classes, n_features]`.
    head_weight: Tensor,
    /// `[n_classes]`.
    head_bias: Tensor,
    precision: Precision,
    named: Vec<(String, Tensor)>,
}

struct NetLayer {
    kind: Layer,
    convs: Vec<NetConv>,
    norms: Vec<NetNorm>,
}

struct NetConv {
    /// `[n_out, kernel, kernel, n_in]`: interleaved, as the convolution wants it.
    weight: Tensor,
    plan: Conv,
}

struct NetNorm {
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
}

impl Net {
    pub(super) fn new(
        plan: &Plan,
        n_classes: u32,
        seed: u64,
        precision: Precision,
        device: Device,
    ) -> Result<Self, TchError> {
        let mut maker = WeightMaker { seed, device, named: Vec::new() };
        let mut layers = Vec::with_capacity(plan.layers.len());
        for (name, kind) in &plan.layers {
            let (convs, norms) = kind.parts();
            let convs = convs.iter().enumerate().map(|(idx, conv)| {
                let weight = maker.kernel(format!("{name}.conv{idx}.weight"), conv)?;
                Ok(NetConv { weight, plan: *conv })
            });
            let convs = convs.collect::<Result<_, TchError>>()?;
            let norms = norms.iter().enumerate();
            let norms = norms.map(|(idx, &n)| maker.norm(&format!("{name}.norm{idx}"), n));
            layers.push(NetLayer { kind: *kind, convs, norms: norms.collect::<Result<_, _>>()? });
        }
        let (n_features, n_classes) = (plan.n_features, i64::from(n_classes));
        let bound = 1.0 / (n_features as f64).sqrt();
        let head_weight =
            maker.uniform("head.weight".to_owned(), &[n_classes, n_features], bound)?;
        let head_bias = maker.uniform("head.bias".to_owned(), &[n_classes], bound)?;
        Ok(Self { layers, head_weight, head_bias, precision, named: maker.named })
    }

    /// All weights and statistics, by name.
    pub(super) fn named(&self) -> &[(String, Tensor)] {
        &self.named
    }

    pub(super) const fn precision(&self) -> Precision {
        self.precision
    }

    /// `[n, channels, height, width]` f32 → logits `[n, n_classes]` f32.
    pub(super) fn forward(&self, images: &Tensor, train: bool) -> Result<Tensor, TchError> {
        let mut features = images.f_to_kind(self.precision.kind())?;
        for layer in &self.layers {
            features = layer.forward(&features, train)?;
        }
        // In interleaved order, so that the gradient of the mean comes back interleaved.
        let features = features.f_permute([0, 2, 3, 1])?;
        let pooled = features.f_mean_dim([1i64, 2].as_slice(), false, Kind::Float)?;
        pooled.f_linear(&self.head_weight, Some(&self.head_bias))
    }
}

impl NetLayer {
    fn forward(&self, input: &Tensor, train: bool) -> Result<Tensor, TchError> {
        let (convs, norms) = (&self.convs, &self.norms);
        match self.kind {
            Layer::Conv(_) => convs[0].forward(input),
            Layer::ConvNorm(_) => norms[0].forward(&convs[0].forward(input)?, train)?.f_relu_(),
            Layer::Norm(_) => norms[0].forward(input, train)?.f_relu_(),
            Layer::MaxPool => input.f_max_pool2d([3, 3], [2, 2], [1, 1], [1, 1], false),
            Layer::PreActivation { .. } => {
                let active = norms[0].forward(input, train)?.f_relu_()?;
                let middle = norms[1].forward(&convs[0].forward(&active)?, train)?.f_relu_()?;
                let mut output = convs[1].forward(&middle)?;
                match convs.get(2) {
                    Some(shortcut) => output.f_add_(&shortcut.forward(&active)?),
                    None => output.f_add_(input),
                }
            }
            Layer::Residual { .. } => {
                let middle = norms[0].forward(&convs[0].forward(input)?, train)?.f_relu_()?;
                let mut output = norms[1].forward(&convs[1].forward(&middle)?, train)?;
                let mut output = match convs.get(2) {
                    Some(shortcut) => {
                        output.f_add_(&norms[2].forward(&shortcut.forward(input)?, train)?)?
                    }
                    None => output.f_add_(input)?,
                };
                output.f_relu_()
            }
        }
    }
}

impl NetConv {
    /// In the kind of `input`.
    fn forward(&self, input: &Tensor) -> Result<Tensor, TchError> {
        let weight = self.weight.f_to_kind(input.kind())?.f_permute([0, 3, 1, 2])?;
        let (padding, stride) = (self.plan.kernel / 2, self.plan.stride);
        input.f_conv2d::<Tensor>(&weight, None, [stride; 2], [padding; 2], [1; 2], 1)
    }
}

impl NetNorm {
    /// In the kind of `input`; sums and statistics are f32.
    fn forward(&self, input: &Tensor, train: bool) -> Result<Tensor, TchError> {
        input.f_batch_norm(
            Some(&self.weight),
            Some(&self.bias),
            Some(&self.running_mean),
            Some(&self.running_var),
            train,
            NORM_MOMENTUM,
            NORM_EPSILON,
            true,
        )
    }
}

struct WeightMaker {
    seed: u64,
    device: Device,
    named: Vec<(String, Tensor)>,
}

impl WeightMaker {
    fn add(&mut self, name: String, tensor: Tensor) -> Tensor {
        self.named.push((name, tensor.shallow_clone()));
        tensor
    }

    /// A trained tensor whose values are made from pairs of numbers in [0, 1).
    fn drawn(
        &mut self,
        name: String,
        sizes: &[i64],
        value: impl Fn(f64, f64) -> [f64; 2],
    ) -> Result<Tensor, TchError> {
        let n_values = usize::try_from(sizes.iter().product::<i64>()).expect("not negative");
        let mut values = vec![0.0f32; n_values];
        let tensor_idx = self.named.len() as u64;
        for (chunk_idx, chunk) in values.chunks_mut(DRAW_CHUNK).enumerate() {
            let purpose = Purpose::InitialWeights;
            let mut rng = SampleRng::new(self.seed, tensor_idx, chunk_idx as u64, purpose);
            for pair in chunk.chunks_mut(2) {
                let drawn = value(rng.unit(), rng.unit());
                for (place, value) in pair.iter_mut().zip(drawn) {
                    #[allow(clippy::cast_possible_truncation, reason = "weights are f32")]
                    let value = value as f32;
                    *place = value;
                }
            }
        }
        let tensor = Tensor::from_slice(&values).f_reshape(sizes)?.f_to_device(self.device)?;
        let tensor = tensor.f_set_requires_grad(true)?;
        Ok(self.add(name, tensor))
    }

    fn kernel(&mut self, name: String, conv: &Conv) -> Result<Tensor, TchError> {
        let fan_out = conv.n_out * conv.kernel * conv.kernel;
        let deviation = (2.0 / fan_out as f64).sqrt();
        // Box and Muller's pair of normal numbers; 1 − u is above zero.
        let normal = |first: f64, second: f64| {
            let radius = deviation * (-2.0 * (1.0 - first).ln()).sqrt();
            [radius * (TAU * second).cos(), radius * (TAU * second).sin()]
        };
        self.drawn(name, &[conv.n_out, conv.kernel, conv.kernel, conv.n_in], normal)
    }

    fn uniform(&mut self, name: String, sizes: &[i64], bound: f64) -> Result<Tensor, TchError> {
        let spread = |unit: f64| bound * (2.0 * unit - 1.0);
        self.drawn(name, sizes, |first, second| [spread(first), spread(second)])
    }

    fn norm(&mut self, name: &str, n_channels: i64) -> Result<NetNorm, TchError> {
        let options = (Kind::Float, self.device);
        let trained = |tensor: Tensor| tensor.f_set_requires_grad(true);
        let weight = trained(Tensor::f_ones([n_channels], options)?)?;
        let bias = trained(Tensor::f_zeros([n_channels], options)?)?;
        let running_mean = Tensor::f_zeros([n_channels], options)?;
        let running_var = Tensor::f_ones([n_channels], options)?;
        Ok(NetNorm {
            weight: self.add(format!("{name}.weight"), weight),
            bias: self.add(format!("{name}.bias"), bias),
            running_mean: self.add(format!("{name}.running_mean"), running_mean),
            running_var: self.add(format!("{name}.running_var"), running_var),
        })
    }
}

/// Writes `saved` over `tensor`, which keeps its place in the graph.
pub(super) fn overwrite(tensor: &Tensor, saved: &Tensor) -> Result<(), TchError> {
    no_grad(|| tensor.shallow_clone().f_copy_(saved))
}

#[cfg(test)]
mod tests {
    use crate::dataset::LabelKind;
    use crate::pipeline::recipe::{Dtype, Layout};
    use crate::pipeline::render::OutputShape;
    use crate::search::torch::ModelSpec;

    use super::*;

    fn net(name: &str, seed: u64) -> (Plan, Net) {
        let labels = LabelKind::Class { n_classes: 10 };
        let (dtype, layout) = (Dtype::F32, Layout::Nhwc);
        let shape =
            OutputShape { views: 1, height: 32, width: 32, channels: 3, dtype, layout, labels };
        let plan = ModelSpec::parse(name).expect("known").plan(&shape).expect("has layers");
        let net = Net::new(&plan, 10, seed, Precision::F32, Device::Cpu).expect("makes");
        (plan, net)
    }

    #[test]
    fn a_network_has_the_weights_that_its_plan_counts() {
        for name in ["small-cnn", "wrn-16-2", "resnet18"] {
            let (plan, net) = net(name, 0);
            let trained = net.named().iter().filter(|(_, tensor)| tensor.requires_grad());
            let n_weights: usize = trained.map(|(_, tensor)| tensor.numel()).sum();
            assert_eq!(n_weights as u64, plan.n_weights(10), "{name}");
        }
    }

    #[test]
    fn initial_weights_have_he_s_deviation_and_follow_the_seed() {
        let (_, first) = net("wrn-16-2", 1);
        let (_, same) = net("wrn-16-2", 1);
        let (_, other) = net("wrn-16-2", 2);
        let kernel = |net: &Net| {
            let found = net.named().iter().find(|(name, _)| name == "layer6.conv1.weight");
            found.expect("is there").1.shallow_clone()
        };
        // 128 channels of 3×3.
        let expected = (2.0f64 / (128.0 * 9.0)).sqrt();
        assert!((kernel(&first).std(true).double_value(&[]) / expected - 1.0).abs() < 0.01);
        assert!(kernel(&first).mean(Kind::Float).double_value(&[]).abs() < expected / 100.0);
        assert_eq!(kernel(&first), kernel(&same));
        assert_ne!(kernel(&first), kernel(&other));
    }
}
