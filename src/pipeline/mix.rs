//! Mixup and CutMix of two finished samples, in the memory of their batch.
//!
//! Samples 2i and 2i + 1 of a rank's batch make a pair; each becomes the mixture of itself (with
//! weight λ) and the other (1 − λ), and so does its label, which is a vector for that. λ is drawn
//! once per pair, by the key of its first sample. A last sample without a partner, and one beside a
//! skipped sample, stays as it is. So with `mix`, and only then, a sample's bytes depend on who is
//! beside it in the batch.
//!
//! *Source*: Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019, with the box of
//! torchvision's `CutMix`: sides √(1 − λ) of the image's about a uniform centre, cut at the
//! borders; λ is then what the box leaves.

use half::{bf16, f16};

use crate::random::SampleRng;

use super::recipe::{Dtype, Layout, Mix};
use super::render::OutputShape;

/// What is done to a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Drawn {
    Mixup { weight: f32 },
    CutMix { x: (usize, usize), y: (usize, usize), weight: f32 },
}

/// Mixes a pair: pixels and labels of both.
pub(super) fn mix_pair(
    mix: &Mix,
    shape: &OutputShape,
    rng: &mut SampleRng,
    [a, b]: [&mut [u8]; 2],
    [label_a, label_b]: [&mut [u8]; 2],
) {
    let weight = match draw(mix, shape, rng) {
        None => return,
        Some(Drawn::Mixup { weight }) => {
            mix_pixels(shape.dtype, weight, a, b);
            weight
        }
        Some(Drawn::CutMix { x, y, weight }) => {
            swap_box(shape, x, y, a, b);
            weight
        }
    };
    mix_values(label_a, label_b, f32::from_ne_bytes, f32::to_ne_bytes, weight);
}

#[allow(clippy::cast_possible_truncation, reason = "weights are single precision")]
fn draw(mix: &Mix, shape: &OutputShape, rng: &mut SampleRng) -> Option<Drawn> {
    if rng.unit() >= mix.p {
        return None;
    }
    let is_cut = match (mix.mixup > 0.0, mix.cutmix > 0.0) {
        (true, true) => rng.coin(),
        (_, is_cut) => is_cut,
    };
    if !is_cut {
        return Some(Drawn::Mixup { weight: beta(mix.mixup, rng) as f32 });
    }
    let share = (1.0 - beta(mix.cutmix, rng)).sqrt();
    let mut span = |side: usize| {
        let bound = u32::try_from(side).expect("image sides fit u32");
        let centre = rng.below(bound) as usize;
        let half = half_side(share, side);
        (centre.saturating_sub(half), (centre + half).min(side))
    };
    let (x, y) = (span(shape.width), span(shape.height));
    let n_cut = (x.1 - x.0) * (y.1 - y.0);
    let weight = 1.0 - n_cut as f64 / (shape.width * shape.height) as f64;
    Some(Drawn::CutMix { x, y, weight: weight as f32 })
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most half a side")]
fn half_side(share: f64, side: usize) -> usize {
    (0.5 * share * side as f64) as usize
}

/// A draw from Beta(α, α).
///
/// *Source*: M. D. Jöhnk, Metrika 8 (1964): U^(1/α) and V^(1/α), accepted if their sum is at most
/// 1.
fn beta(alpha: f64, rng: &mut SampleRng) -> f64 {
    loop {
        // Never 0: its logarithm is taken.
        let mut log_root = || libm::log(rng.unit() + f64::EPSILON) / alpha;
        let (log_x, log_y) = (log_root(), log_root());
        let (x, y) = (libm::exp(log_x), libm::exp(log_y));
        if x + y > 1.0 {
            continue;
        }
        if x + y > 0.0 {
            return x / (x + y);
        }
        // Both vanished: their ratio is still known by the logarithms.
        return 1.0 / (1.0 + libm::exp(log_y - log_x));
    }
}

fn mix_pixels(dtype: Dtype, weight: f32, a: &mut [u8], b: &mut [u8]) {
    match dtype {
        Dtype::F32 => mix_values(a, b, f32::from_ne_bytes, f32::to_ne_bytes, weight),
        Dtype::F16 => mix_values(
            a,
            b,
            |bytes| f16::from_ne_bytes(bytes).to_f32(),
            |value| f16::from_f32(value).to_ne_bytes(),
            weight,
        ),
        Dtype::Bf16 => mix_values(
            a,
            b,
            |bytes| bf16::from_ne_bytes(bytes).to_f32(),
            |value| bf16::from_f32(value).to_ne_bytes(),
            weight,
        ),
        Dtype::U8 => mix_values(a, b, |[byte]| f32::from(byte), |value| [round(value)], weight),
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two bytes")]
fn round(value: f32) -> u8 {
    value.round_ties_even() as u8
}

/// `a` becomes weight · a + (1 − weight) · b, and `b` the same with the two exchanged.
fn mix_values<const N: usize>(
    a: &mut [u8],
    b: &mut [u8],
    read: impl Fn([u8; N]) -> f32,
    write: impl Fn(f32) -> [u8; N],
    weight: f32,
) {
    let rest = 1.0 - weight;
    let pairs = a.as_chunks_mut::<N>().0.iter_mut().zip(b.as_chunks_mut::<N>().0);
    for (to_a, to_b) in pairs {
        let (own, other) = (read(*to_a), read(*to_b));
        *to_a = write(weight * own + rest * other);
        *to_b = write(weight * other + rest * own);
    }
}

/// Exchanges a box between two images.
fn swap_box(
    shape: &OutputShape,
    (x0, x1): (usize, usize),
    (y0, y1): (usize, usize),
    a: &mut [u8],
    b: &mut [u8],
) {
    let (n_planes, element) = match shape.layout {
        Layout::Nchw => (shape.channels, shape.dtype.bytes()),
        Layout::Nhwc => (1, shape.channels * shape.dtype.bytes()),
    };
    for plane in 0..n_planes {
        for y in y0..y1 {
            let row = (plane * shape.height + y) * shape.width;
            let range = (row + x0) * element..(row + x1) * element;
            a[range.clone()].swap_with_slice(&mut b[range]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    /// Mean ½, variance 1 / (4 (2α + 1)).
    #[test]
    fn beta_has_the_moments_of_its_distribution() {
        for alpha in [0.05, 0.2, 1.0, 2.0, 8.0] {
            let n = 4000_u32;
            let draws: Vec<f64> = (0..u64::from(n))
                .map(|sample| beta(alpha, &mut SampleRng::new(3, 0, sample, Purpose::Mix)))
                .collect();
            let mean = draws.iter().sum::<f64>() / f64::from(n);
            let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / f64::from(n - 1);
            let expected = 1.0 / (4.0 * (2.0 * alpha + 1.0));
            assert!((mean - 0.5).abs() < 0.03, "{alpha}: mean {mean}");
            assert!((variance / expected - 1.0).abs() < 0.1, "{alpha}: variance {variance}");
            assert!(draws.iter().all(|x| (0.0..=1.0).contains(x)));
        }
    }
}
