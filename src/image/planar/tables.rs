//! The tables of [`point`] and [`super::super::enhance`], made at the processor's width: for small
//! images, making a table costs as much as applying it.

use super::super::point::{self, Lut, lut};
use super::super::simd::{byte_of_f64, for_levels};
use super::color;

for_levels! {
    /// As [`point::invert_lut`].
    pub fn invert() -> Lut {
        point::invert_lut()
    }
}

for_levels! {
    /// As [`point::solarize_lut`].
    pub fn solarize(threshold: f64) -> Lut {
        point::solarize_lut(threshold)
    }
}

for_levels! {
    /// As [`point::posterize_lut`].
    pub fn posterize(bits: u32) -> Lut {
        let dropped = 8_u32.saturating_sub(bits);
        let kept = if dropped < 8 { u8::MAX << dropped } else { 0 };
        lut(|value| value & kept)
    }
}

for_levels! {
    /// As [`super::super::enhance::blend_lut`].
    pub fn blend(degenerate: u8, factor: f32) -> Lut {
        lut(|value| color::blend(degenerate, value, factor))
    }
}

for_levels! {
    /// As [`point::autocontrast_lut`] of a channel whose smallest and largest values these are.
    pub fn stretch(low: u8, high: u8) -> Lut {
        if high <= low {
            return lut(|value| value);
        }
        let scale = 255.0 / f64::from(high - low);
        let offset = -f64::from(low) * scale;
        lut(|value| byte_of_f64(f64::from(value) * scale + offset))
    }
}

for_levels! {
    /// As [`point::equalize_lut`].
    ///
    /// Whole numbers are divided in floating point: ½ / step lies between a quotient's ½ more and
    /// the next whole number, far more than the error of numbers this small.
    pub fn equalize(bins: &[u32; 256]) -> Lut {
        let total: u32 = bins.iter().sum();
        let last = bins.iter().rfind(|&&n| n > 0).copied().unwrap_or(0);
        let step = (total - last) / 255;
        if step == 0 {
            return lut(|value| value);
        }
        let mut below = step / 2;
        let mut starts = [0; 256];
        for (start, n) in starts.iter_mut().zip(bins) {
            *start = below;
            below += n;
        }
        let per_step = 1.0 / f64::from(step);
        let mut table = [0; 256];
        for (entry, start) in table.iter_mut().zip(starts) {
            *entry = byte_of_f64((f64::from(start) + 0.5) * per_step);
        }
        table
    }
}
