//! In which numbers a fold model computes.
//!
//! Masters, statistics, logits and losses are f32 always. With `bf16`, images and the kernels of
//! convolutions are rounded to bf16 for the products, whose sums are f32; gradients flow back to
//! the f32 masters. There is no loss scaling: bf16 has the exponents of f32.
//!
//! Casts are written out instead of torch's autocast: that of tch rounds to f16, and on CUDA only.

use tch::{Device, Kind};

/// See the module. It is part of what a result depends on: results of two precisions differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Everything in f32.
    #[default]
    F32,
    /// Convolutions in bf16.
    Bf16,
}

impl Precision {
    /// The faster one: bf16 on CUDA, and on CPUs that multiply it in hardware (AVX512-BF16, which
    /// every CPU with AMX has too).
    pub fn fastest(device: Device) -> Self {
        let has_bf16 = match device {
            Device::Cuda(_) => true,
            Device::Cpu => cpu_has_bf16(),
            _ => false,
        };
        if has_bf16 { Self::Bf16 } else { Self::F32 }
    }

    /// `bf16` or `f32`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    pub(super) const fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_has_bf16() -> bool {
    std::is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_has_bf16() -> bool {
    false
}
