//! `small-cnn`: the fold model for CPUs.
//!
//! Five 3×3 convolutions (16, 40, 40, 80, 80 channels; strides 1, 2, 1, 2, 1), each with batch norm
//! and ReLU, then global average pooling and a linear layer. About 8 million multiply-accumulates
//! for a 28×28 gray image: widths are chosen for a CPU's time, not taken from a paper.

use tch::nn::{self, ConvConfig, ModuleT};
use tch::{Kind, Tensor};

/// (output channels, stride) of each convolution.
const LAYERS: [(i64, i64); 5] = [(16, 1), (40, 2), (40, 1), (80, 2), (80, 1)];

#[derive(Debug)]
struct Block {
    conv: nn::Conv2D,
    norm: nn::BatchNorm,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct SmallCnn {
    blocks: Vec<Block>,
    head: nn::Linear,
}

impl SmallCnn {
    /// Makes the weights below `path`, from torch's global generator.
    pub(crate) fn new(path: &nn::Path<'_>, channels: i64, n_classes: i64) -> Self {
        let mut n_in = channels;
        let blocks = LAYERS
            .iter()
            .enumerate()
            .map(|(idx, &(n_out, stride))| {
                let path = path / format!("block{idx}");
                let config =
                    ConvConfig { stride, padding: 1, bias: false, ..ConvConfig::default() };
                let conv = nn::conv2d(&path / "conv", n_in, n_out, 3, config);
                let norm = nn::batch_norm2d(&path / "norm", n_out, nn::BatchNormConfig::default());
                n_in = n_out;
                Block { conv, norm }
            })
            .collect();
        let head = nn::linear(path / "head", n_in, n_classes, nn::LinearConfig::default());
        Self { blocks, head }
    }
}

impl ModuleT for SmallCnn {
    /// `[n, channels, height, width]` → logits `[n, n_classes]`.
    fn forward_t(&self, images: &Tensor, train: bool) -> Tensor {
        let mut features = images.shallow_clone();
        for block in &self.blocks {
            features = features.apply(&block.conv).apply_t(&block.norm, train).relu();
        }
        features.mean_dim([2i64, 3].as_slice(), false, Kind::Float).apply(&self.head)
    }
}
