//! Point operations: 256-entry tables, made from a number or a histogram, and their application.
//!
//! A table is a value, so that several in a row can be joined into one before pixels are touched.
//!
//! *Source*: Pillow, `ImageOps.py` (`autocontrast` with cutoff 0, `equalize`, `invert`,
//! `posterize`, `solarize`).

use super::Image;

/// What each of the 256 values becomes.
pub type Lut = [u8; 256];

/// How often each value occurs, per channel. A gray image uses the first channel only.
#[derive(Clone, Debug)]
pub struct Histogram {
    /// `[channel][value]`.
    pub bins: [[u32; 256]; 3],
}

impl Default for Histogram {
    fn default() -> Self {
        Self { bins: [[0; 256]; 3] }
    }
}

impl Histogram {
    /// Counts the image's values anew.
    pub fn count(&mut self, image: &Image) {
        for bins in &mut self.bins[..image.channels.min(3)] {
            bins.fill(0);
        }
        let [red, green, blue] = &mut self.bins;
        if image.channels == 1 {
            for &value in &image.data {
                red[usize::from(value)] += 1;
            }
            return;
        }
        for &[r, g, b] in image.data.as_chunks::<3>().0 {
            red[usize::from(r)] += 1;
            green[usize::from(g)] += 1;
            blue[usize::from(b)] += 1;
        }
    }
}

/// The table of a function.
#[inline]
pub fn lut(function: impl Fn(u8) -> u8) -> Lut {
    let mut table = [0; 256];
    for (entry, value) in table.iter_mut().zip(0..=u8::MAX) {
        *entry = function(value);
    }
    table
}

/// 255 − value.
#[inline]
pub fn invert_lut() -> Lut {
    lut(|value| 255 - value)
}

/// Values at or above `threshold` are inverted; a fractional threshold is meant as it is.
#[inline]
pub fn solarize_lut(threshold: f64) -> Lut {
    lut(|value| if f64::from(value) < threshold { value } else { 255 - value })
}

/// Keeps the upper `bits` bits, 0 to 8.
pub fn posterize_lut(bits: u32) -> Lut {
    let dropped = 8_u32.saturating_sub(bits);
    lut(|value| u8::try_from(u32::from(value) >> dropped << dropped).unwrap_or(value))
}

/// Stretches the values that occur to 0–255; the identity if only one value occurs.
#[allow(clippy::cast_possible_truncation, reason = "clamped to a byte's range, then cut")]
pub fn autocontrast_lut(bins: &[u32; 256]) -> Lut {
    let lo = bins.iter().position(|&n| n > 0).unwrap_or(255);
    let hi = bins.iter().rposition(|&n| n > 0).unwrap_or(0);
    if hi <= lo {
        return lut(|value| value);
    }
    let scale = 255.0 / (hi - lo) as f64;
    let offset = -(lo as f64) * scale;
    lut(|value| (f64::from(value) * scale + offset).clamp(0.0, 255.0) as u8)
}

/// Flattens the histogram; the identity if there are too few values or too few pixels.
pub fn equalize_lut(bins: &[u32; 256]) -> Lut {
    let total: u64 = bins.iter().map(|&n| u64::from(n)).sum();
    let last = bins.iter().rfind(|&&n| n > 0).map_or(0, |&n| u64::from(n));
    let step = (total - last) / 255;
    // A single value leaves `total == last`, so that step is 0 here too.
    if step == 0 {
        return lut(|value| value);
    }
    let mut below = step / 2;
    std::array::from_fn(|value| {
        let level = below / step;
        below += u64::from(bins[value]);
        u8::try_from(level).unwrap_or(u8::MAX)
    })
}

/// Applies one table to every sample, whatever its channel.
pub fn apply_lut(image: &mut Image, lut: &Lut) {
    for value in &mut image.data {
        *value = lut[usize::from(*value)];
    }
}

/// Applies a table per channel; a gray image uses the first.
pub fn apply_luts(image: &mut Image, luts: &[Lut; 3]) {
    if image.channels == 1 {
        apply_lut(image, &luts[0]);
        return;
    }
    for [r, g, b] in image.data.as_chunks_mut::<3>().0 {
        *r = luts[0][usize::from(*r)];
        *g = luts[1][usize::from(*g)];
        *b = luts[2][usize::from(*b)];
    }
}

/// Applies to each channel the table that `make` derives from the channel's histogram.
pub fn apply_from_histogram(
    image: &mut Image,
    histogram: &mut Histogram,
    make: impl Fn(&[u32; 256]) -> Lut,
) {
    histogram.count(image);
    if image.channels == 1 {
        apply_lut(image, &make(&histogram.bins[0]));
    } else {
        apply_luts(image, &[0, 1, 2].map(|channel| make(&histogram.bins[channel])));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_each_channel_and_forgets_the_last_image() {
        let mut histogram = Histogram::default();
        let image = Image { width: 2, height: 1, channels: 3, data: vec![1, 2, 3, 1, 5, 3] };
        histogram.count(&Image { width: 1, height: 1, channels: 3, data: vec![9, 9, 9] });
        histogram.count(&image);
        assert_eq!(histogram.bins[0][1], 2);
        assert_eq!((histogram.bins[1][2], histogram.bins[1][5]), (1, 1));
        assert_eq!(histogram.bins[2][3], 2);
        assert_eq!(histogram.bins.as_flattened().iter().sum::<u32>(), 6);
    }

    #[test]
    fn posterize_keeps_the_upper_bits() {
        assert_eq!(posterize_lut(8), lut(|v| v));
        assert_eq!(posterize_lut(4), lut(|v| v & 0xF0));
        assert_eq!(posterize_lut(0), lut(|_| 0));
        assert_eq!(posterize_lut(99), lut(|v| v));
    }

    #[test]
    fn a_threshold_of_256_inverts_nothing_and_255_only_white() {
        assert_eq!(solarize_lut(256.0), lut(|v| v));
        assert_eq!(solarize_lut(0.0), invert_lut());
        assert_eq!(solarize_lut(255.0), lut(|v| if v == 255 { 0 } else { v }));
        assert_eq!(solarize_lut(100.5)[100], 100);
        assert_eq!(solarize_lut(100.5)[101], 154);
    }

    #[test]
    fn histogram_tables_are_the_identity_where_there_is_nothing_to_do() {
        let identity = lut(|v| v);
        for bins in [[0; 256], std::array::from_fn(|v| if v == 7 { 500 } else { 0 })] {
            assert_eq!(autocontrast_lut(&bins), identity);
            assert_eq!(equalize_lut(&bins), identity);
        }
        assert_eq!(equalize_lut(&[1; 256]), identity);
    }
}
