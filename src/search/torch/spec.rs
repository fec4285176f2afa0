//! Which fold model: its name, and its layers as plain data. No tensor is made here.
//!
//! Owns the architectures, so that weights and memory are counted before anything is allocated;
//! `net` makes the same layers real.
//!
//! *Sources*: `wrn-D-W` is the pre-activation wide residual network without dropout of S.
//! Zagoruyko, N. Komodakis, "Wide Residual Networks", BMVC 2016; `resnet18` is that of K. He et
//! al., "Deep Residual Learning", CVPR 2016, as torchvision lays it out. `small-cnn` is made for
//! CPUs: its widths were chosen for images per second, not taken from a paper.

use std::path::PathBuf;
use std::{fmt, fs};

use sha2::{Digest, Sha256};

use crate::pipeline::render::OutputShape;

use super::TorchError;

/// Endings of a TorchScript file.
const SCRIPT_ENDINGS: [&str; 3] = ["pt", "pth", "ts"];
/// `small-cnn`: (output channels, stride) of each 3×3 convolution.
const SMALL_CNN: [(i64, i64); 5] = [(16, 2), (32, 1), (32, 1), (64, 2), (96, 1)];
/// Larger images get ResNet-18's own stem, which shrinks them four times.
const SMALL_IMAGE_SIDE_MAX: usize = 64;
/// Wider and deeper ones than any in use: keeps sizes far from overflow.
const WRN_MAX: u32 = 1000;

/// A fold model's architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSpec {
    /// `small-cnn`: five convolutions, for CPUs.
    SmallCnn,
    /// `wrn-DEPTH-WIDEN`.
    WideResNet {
        /// Number of layers; 6 n + 4.
        depth: u32,
        /// Factor of the widths 16, 32 and 64.
        widen: u32,
    },
    /// `resnet18`.
    ResNet18,
    /// The user's own module. Training begins from the weights in the file, in all folds alike.
    TorchScript(PathBuf),
}

impl ModelSpec {
    /// Reads a model's name, or the path of a TorchScript file (`.pt`, `.pth` or `.ts`).
    ///
    /// # Errors
    /// It is neither.
    pub fn parse(text: &str) -> Result<Self, TorchError> {
        let path = PathBuf::from(text);
        let ending = path.extension().and_then(|ending| ending.to_str());
        if ending.is_some_and(|ending| SCRIPT_ENDINGS.contains(&ending)) {
            return Ok(Self::TorchScript(path));
        }
        match text {
            "small-cnn" => return Ok(Self::SmallCnn),
            "resnet18" => return Ok(Self::ResNet18),
            _ => {}
        }
        let unknown = |problem: &str| TorchError::UnknownModel {
            name: text.to_owned(),
            problem: problem.to_owned(),
        };
        let sizes = text.strip_prefix("wrn-").and_then(|sizes| sizes.split_once('-'));
        let Some((depth, widen)) = sizes else { return Err(unknown("no such model")) };
        let number = |text: &str| text.parse().ok().filter(|value| (1..=WRN_MAX).contains(value));
        match (number(depth), number(widen)) {
            (Some(depth), Some(widen)) if depth >= 10 && depth % 6 == 4 => {
                Ok(Self::WideResNet { depth, widen })
            }
            _ => Err(unknown("the depth of a wrn is 6 n + 4, such as 16, 28 or 40")),
        }
    }

    /// What a result depends on: the name, or the SHA-256 of the file's content.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn identity(&self) -> Result<String, TorchError> {
        let Self::TorchScript(path) = self else { return Ok(self.to_string()) };
        let failed = |source| TorchError::Io { path: path.display().to_string(), source };
        let digest = Sha256::digest(fs::read(path).map_err(failed)?);
        Ok(digest.iter().fold("torchscript:".to_owned(), |text, byte| format!("{text}{byte:02x}")))
    }

    /// The layers for images of `shape`; `None` for a TorchScript module.
    pub(super) fn plan(&self, shape: &OutputShape) -> Option<Plan> {
        let channels = i64::try_from(shape.channels).expect("1 or 3");
        match *self {
            Self::SmallCnn => Some(small_cnn(channels)),
            Self::WideResNet { depth, widen } => Some(wide_res_net(channels, depth, widen)),
            Self::ResNet18 => {
                let is_small = shape.height.max(shape.width) <= SMALL_IMAGE_SIDE_MAX;
                Some(res_net_18(channels, is_small))
            }
            Self::TorchScript(_) => None,
        }
    }
}

impl fmt::Display for ModelSpec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SmallCnn => write!(formatter, "small-cnn"),
            Self::WideResNet { depth, widen } => write!(formatter, "wrn-{depth}-{widen}"),
            Self::ResNet18 => write!(formatter, "resnet18"),
            Self::TorchScript(path) => write!(formatter, "{}", path.display()),
        }
    }
}

/// A square convolution without bias, padded by half its kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Conv {
    pub(super) n_in: i64,
    pub(super) n_out: i64,
    pub(super) kernel: i64,
    pub(super) stride: i64,
}

/// One layer of a network, or one residual block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layer {
    /// Convolution alone.
    Conv(Conv),
    /// Convolution, batch norm, ReLU.
    ConvNorm(Conv),
    /// Batch norm, ReLU.
    Norm(i64),
    /// 3×3 with stride 2.
    MaxPool,
    /// Twice norm, ReLU, 3×3 convolution; added to the input, or to its 1×1 convolution.
    PreActivation { n_in: i64, n_out: i64, stride: i64 },
    /// 3×3 convolution, norm, ReLU, convolution, norm; added, then ReLU.
    Residual { n_in: i64, n_out: i64, stride: i64 },
}

/// A network: its layers, then global average pooling and a linear layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Named for the weights.
    pub(super) layers: Vec<(String, Layer)>,
    /// Channels that the linear layer sees.
    pub(super) n_features: i64,
}

impl Layer {
    /// Its convolutions, and the channels of its norms.
    pub(super) fn parts(self) -> (Vec<Conv>, Vec<i64>) {
        let block = |n_in, n_out, stride| {
            let first = Conv { n_in, n_out, kernel: 3, stride };
            vec![first, Conv { n_in: n_out, n_out, kernel: 3, stride: 1 }]
        };
        let shortcut = |n_in, n_out, stride| {
            (n_in != n_out || stride != 1).then_some(Conv { n_in, n_out, kernel: 1, stride })
        };
        match self {
            Self::Conv(conv) => (vec![conv], vec![]),
            Self::ConvNorm(conv) => (vec![conv], vec![conv.n_out]),
            Self::Norm(n_channels) => (vec![], vec![n_channels]),
            Self::MaxPool => (vec![], vec![]),
            Self::PreActivation { n_in, n_out, stride } => {
                let mut convs = block(n_in, n_out, stride);
                convs.extend(shortcut(n_in, n_out, stride));
                (convs, vec![n_in, n_out])
            }
            Self::Residual { n_in, n_out, stride } => {
                let (mut convs, mut norms) = (block(n_in, n_out, stride), vec![n_out, n_out]);
                if let Some(conv) = shortcut(n_in, n_out, stride) {
                    convs.push(conv);
                    norms.push(n_out);
                }
                (convs, norms)
            }
        }
    }

    fn stride(self) -> i64 {
        match self {
            Self::Conv(conv) | Self::ConvNorm(conv) => conv.stride,
            Self::Norm(_) => 1,
            Self::MaxPool => 2,
            Self::PreActivation { stride, .. } | Self::Residual { stride, .. } => stride,
        }
    }
}

impl Plan {
    /// Number of trained weights.
    pub(super) fn n_weights(&self, n_classes: u32) -> u64 {
        let of_layer = |&(_, layer): &(String, Layer)| {
            let (convs, norms) = layer.parts();
            let of_conv = |conv: &Conv| conv.n_in * conv.n_out * conv.kernel * conv.kernel;
            convs.iter().map(of_conv).sum::<i64>() + 2 * norms.iter().sum::<i64>()
        };
        let layers: i64 = self.layers.iter().map(of_layer).sum();
        (layers + (self.n_features + 1) * i64::from(n_classes)).unsigned_abs()
    }

    /// Values per image that a training step keeps for the backward pass: what enters each
    /// convolution and each norm.
    pub(super) fn n_activations(&self, height: usize, width: usize) -> u64 {
        let (mut height, mut width) = (height as u64, width as u64);
        let mut n_values = 0;
        for &(_, layer) in &self.layers {
            let (convs, norms) = layer.parts();
            let stride = layer.stride().unsigned_abs();
            let entering = height * width;
            (height, width) = (height.div_ceil(stride), width.div_ceil(stride));
            let (n_in, n_out): (i64, i64) =
                (convs.iter().map(|conv| conv.n_in).sum(), norms.iter().sum());
            // A block's second convolution and its norms see the smaller image; the larger one for
            // all of what enters is an upper bound.
            n_values += entering * n_in.unsigned_abs() + height * width * n_out.unsigned_abs();
        }
        n_values + height * width * self.n_features.unsigned_abs()
    }
}

fn numbered(name: &str, layers: Vec<Layer>) -> Vec<(String, Layer)> {
    let named = |(idx, layer)| (format!("{name}{idx}"), layer);
    layers.into_iter().enumerate().map(named).collect()
}

fn small_cnn(channels: i64) -> Plan {
    let mut n_in = channels;
    let layers = SMALL_CNN.map(|(n_out, stride)| {
        let conv = Conv { n_in, n_out, kernel: 3, stride };
        n_in = n_out;
        Layer::ConvNorm(conv)
    });
    Plan { layers: numbered("block", layers.to_vec()), n_features: n_in }
}

fn wide_res_net(channels: i64, depth: u32, widen: u32) -> Plan {
    let mut n_in = 16;
    let mut layers = vec![Layer::Conv(Conv { n_in: channels, n_out: n_in, kernel: 3, stride: 1 })];
    for (width, first_stride) in [(16, 1), (32, 2), (64, 2)] {
        let n_out = width * i64::from(widen);
        for idx in 0..(depth - 4) / 6 {
            let stride = if idx == 0 { first_stride } else { 1 };
            layers.push(Layer::PreActivation { n_in, n_out, stride });
            n_in = n_out;
        }
    }
    layers.push(Layer::Norm(n_in));
    Plan { layers: numbered("layer", layers), n_features: n_in }
}

fn res_net_18(channels: i64, is_small: bool) -> Plan {
    let (kernel, stride) = if is_small { (3, 1) } else { (7, 2) };
    let stem = Conv { n_in: channels, n_out: 64, kernel, stride };
    let mut layers = vec![Layer::ConvNorm(stem)];
    if !is_small {
        layers.push(Layer::MaxPool);
    }
    let mut n_in = 64;
    for (n_out, first_stride) in [(64, 1), (128, 2), (256, 2), (512, 2)] {
        layers.push(Layer::Residual { n_in, n_out, stride: first_stride });
        layers.push(Layer::Residual { n_in: n_out, n_out, stride: 1 });
        n_in = n_out;
    }
    Plan { layers: numbered("layer", layers), n_features: n_in }
}

#[cfg(test)]
mod tests {
    use crate::dataset::LabelKind;
    use crate::pipeline::recipe::{Dtype, Layout};

    use super::*;

    fn shape(side: usize) -> OutputShape {
        OutputShape {
            views: 1,
            height: side,
            width: side,
            channels: 3,
            dtype: Dtype::F32,
            layout: Layout::Nhwc,
            labels: LabelKind::Class { n_classes: 10 },
        }
    }

    #[test]
    fn names_and_paths_are_read_and_written_back() {
        for name in ["small-cnn", "wrn-40-2", "wrn-28-10", "resnet18", "models/own.pt", "a.ts"] {
            assert_eq!(ModelSpec::parse(name).expect("known").to_string(), name);
        }
        for bad in ["", "small", "wrn", "wrn-40", "wrn-41-2", "wrn-4-2", "wrn-40-0", "wrn-40-2-3"] {
            let error = ModelSpec::parse(bad).expect_err("must be refused").to_string();
            assert!(error.contains("small-cnn, wrn-40-2"), "{error}");
        }
    }

    #[test]
    fn a_module_is_known_by_its_content() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("own.pt");
        let spec = ModelSpec::parse(path.to_str().expect("is text")).expect("a path");
        assert!(spec.identity().expect_err("is not there").to_string().contains("own.pt"));
        fs::write(&path, "abc").expect("writes");
        let identity = spec.identity().expect("reads");
        assert!(identity.starts_with("torchscript:ba7816bf8f01cfea"), "{identity}");
        assert_eq!(ModelSpec::ResNet18.identity().expect("a name"), "resnet18");
    }

    /// WRN's from table 5 and 9 of the paper, ResNet-18's from torchvision.
    #[test]
    fn numbers_of_weights_are_the_published_ones() {
        let n_weights = |name: &str, side, n_classes| {
            let spec = ModelSpec::parse(name).expect("known");
            spec.plan(&shape(side)).expect("has layers").n_weights(n_classes)
        };
        assert_eq!(n_weights("wrn-40-2", 32, 10) / 10_000, 224);
        assert_eq!(n_weights("wrn-28-10", 32, 10) / 100_000, 364);
        assert_eq!(n_weights("wrn-28-10", 32, 10), 36_479_194);
        assert_eq!(n_weights("resnet18", 224, 1000), 11_689_512);
        // The CIFAR stem has 3×3 instead of 7×7 kernels.
        assert_eq!(n_weights("resnet18", 32, 1000), 11_689_512 - 64 * 3 * (49 - 9));
    }
}
