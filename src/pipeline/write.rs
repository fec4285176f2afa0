//! The last step of a sample: normalise, convert and reorder, straight into the batch's memory.
//!
//! Normalisation is `((x / 255) − mean) / std` in f32, in this order, for each of the 256 bytes: a
//! table per channel, which is the definition. Where the processor multiplies and adds in one step,
//! both divisions are products with a reciprocal in two parts, if that gives the table's entries
//! bit for bit, which is tried for all of them when a recipe is compiled. f16 and bf16 round f32 to
//! nearest even.

use half::{bf16, f16};

use crate::augment::Canvas;
use crate::image::planar::Planes;
use crate::image::point::Lut;
use crate::image::simd::{Level, for_levels, level};

use super::recipe::{Dtype, Layout};

/// How finished images are written.
#[derive(Debug)]
pub(super) struct Writer {
    table: Table,
    layout: Layout,
}

/// What each byte becomes, per channel, in the bytes of this machine.
#[derive(Debug)]
enum Table {
    U8,
    Half(Vec<[[u8; 2]; 256]>),
    F32(Vec<[[u8; 4]; 256]>, Vec<Option<Products>>),
}

/// `x ↦ (x · per_255 − mean) · per_std`, where each reciprocal has a rounded part and the rest.
#[derive(Clone, Copy, Debug)]
struct Products {
    per_255: [f32; 2],
    mean: f32,
    per_std: [f32; 2],
}

impl Products {
    /// `None` if they don't give what the divisions give.
    fn new(mean: f32, std: f32) -> Option<Self> {
        let products =
            Self { per_255: reciprocal(255.0), mean, per_std: reciprocal(f64::from(std)) };
        let is_exact =
            |byte: u8| products.of(byte).to_bits() == normalized(byte, mean, std).to_bits();
        (0..=u8::MAX).all(is_exact).then_some(products)
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "the body must take its caller's instructions")]
    fn of(&self, byte: u8) -> f32 {
        let divided = |x: f32, [rounded, rest]: [f32; 2]| x.mul_add(rounded, x * rest);
        let centred = divided(f32::from(byte), self.per_255) - self.mean;
        divided(centred, self.per_std)
    }
}

/// `1 / value` as a single-precision number and what is missing.
#[allow(clippy::cast_possible_truncation, reason = "rounding to single precision is the point")]
fn reciprocal(value: f64) -> [f32; 2] {
    let whole = 1.0 / value;
    let rounded = whole as f32;
    [rounded, (whole - f64::from(rounded)) as f32]
}

fn normalized(byte: u8, mean: f32, std: f32) -> f32 {
    (f32::from(byte) / 255.0 - mean) / std
}

/// What each byte becomes in a channel of this mean and standard deviation; itself for `u8`.
#[cfg(feature = "torch")]
pub(super) fn values((mean, std): (f32, f32), is_u8: bool) -> [f32; 256] {
    let of = |byte: u8| if is_u8 { f32::from(byte) } else { normalized(byte, mean, std) };
    std::array::from_fn(|byte| of(u8::try_from(byte).expect("an index below 256")))
}

impl Writer {
    /// For images whose channels have these means and standard deviations, in units of 255.
    pub(super) fn new(dtype: Dtype, layout: Layout, norms: &[(f32, f32)]) -> Self {
        let tables = norms.iter().map(|&(mean, std)| {
            std::array::from_fn::<f32, 256, _>(|byte| {
                normalized(u8::try_from(byte).expect("an index below 256"), mean, std)
            })
        });
        let table = match dtype {
            Dtype::U8 => Table::U8,
            Dtype::F32 => {
                let products = norms.iter().map(|&(mean, std)| Products::new(mean, std));
                Table::F32(tables.map(|t| t.map(f32::to_ne_bytes)).collect(), products.collect())
            }
            Dtype::F16 => Table::Half(
                tables.map(|t| t.map(|value| f16::from_f32(value).to_ne_bytes())).collect(),
            ),
            Dtype::Bf16 => Table::Half(
                tables.map(|t| t.map(|value| bf16::from_f32(value).to_ne_bytes())).collect(),
            ),
        };
        Self { table, layout }
    }

    /// Writes the image, with what is pending; `out` is exactly as long as it becomes.
    pub(super) fn write(&self, canvas: &mut Canvas, out: &mut [u8]) {
        match (&self.table, self.layout) {
            (Table::U8, Layout::Nchw) => out.copy_from_slice(&canvas.finished().data),
            (Table::U8, Layout::Nhwc) => {
                let planes = canvas.finished();
                match planes.rgb() {
                    Some(rgb) => interleave(rgb, out.as_chunks_mut().0),
                    None => out.copy_from_slice(&planes.data),
                }
            }
            (Table::F32(_, products), Layout::Nchw)
                if level() > Level::Scalar && products.iter().all(Option::is_some) =>
            {
                let planes = canvas.finished();
                let places = out.chunks_exact_mut(planes.n_pixels() * size_of::<f32>());
                for ((plane, place), products) in planes.planes().zip(places).zip(products) {
                    let products = products.as_ref().expect("asked for above");
                    normalize(plane, products, place.as_chunks_mut().0);
                }
            }
            (Table::F32(tables, _), layout) => look_up(canvas, tables, layout, out),
            (Table::Half(tables), layout) => look_up(canvas, tables, layout, out),
        }
    }
}

for_levels! {
    fn normalize(plane: &[u8], products: &Products, out: &mut [[u8; 4]]) {
        for (&byte, out) in plane.iter().zip(out) {
            *out = products.of(byte).to_ne_bytes();
        }
    }
}

for_levels! {
    fn interleave(planes: [&[u8]; 3], out: &mut [[u8; 3]]) {
        let [red, green, blue] = planes;
        for (((&r, &g), &b), out) in red.iter().zip(green).zip(blue).zip(out) {
            *out = [r, g, b];
        }
    }
}

/// One look-up per byte, in tables that what is pending has been joined to.
fn look_up<const N: usize>(
    canvas: &Canvas,
    tables: &[[[u8; N]; 256]],
    layout: Layout,
    out: &mut [u8],
) {
    let planes: &Planes = canvas.planes();
    let elements = out.as_chunks_mut::<N>().0;
    let n_pixels = planes.n_pixels();
    for ((channel, plane), table) in planes.planes().enumerate().zip(tables) {
        let joined;
        let table = match canvas.pending(channel) {
            None => table,
            Some(pending) => {
                joined = join(pending, table);
                &joined
            }
        };
        match layout {
            Layout::Nchw => {
                let place = &mut elements[channel * n_pixels..][..n_pixels];
                place.iter_mut().zip(plane).for_each(|(out, &b)| *out = table[usize::from(b)]);
            }
            Layout::Nhwc => {
                let place = elements[channel..].iter_mut().step_by(planes.channels);
                place.zip(plane).for_each(|(out, &b)| *out = table[usize::from(b)]);
            }
        }
    }
}

fn join<T: Copy>(first: &Lut, then: &[T; 256]) -> [T; 256] {
    first.map(|byte| then[usize::from(byte)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::augment::Action;
    use crate::image::simd::limit;

    /// Means and deviations of popular datasets, and some that are hard to divide by.
    const NORMS: [(f32, f32); 6] =
        [(0.4914, 0.247), (0.485, 0.229), (0.286, 0.353), (0.0, 1.0), (0.5, 1e-3), (0.1, 3e7)];

    /// Every byte, in 3 channels, in an odd order.
    fn canvas(is_pending: bool) -> (Canvas, Vec<[u8; 3]>) {
        let mut canvas = Canvas::default();
        let planes = canvas.start();
        planes.reshape(37, 9, 3);
        for (at, byte) in planes.data.iter_mut().enumerate() {
            *byte = u8::try_from(at * 7 % 256).expect("a byte");
        }
        if is_pending {
            canvas.apply(&Action::Invert);
            canvas.apply(&Action::Equalize);
            canvas.apply(&Action::Posterize(6));
        }
        let mut finished = canvas.clone();
        let rgb = finished.finished().rgb().expect("three channels");
        let pixels = (0..37 * 9).map(|at| rgb.map(|plane| plane[at])).collect();
        (canvas, pixels)
    }

    fn expected(dtype: Dtype, layout: Layout, norms: &[(f32, f32)], pixels: &[[u8; 3]]) -> Vec<u8> {
        let element = |channel: usize, pixel: &[u8; 3]| {
            let (mean, std) = norms[channel];
            let value = normalized(pixel[channel], mean, std);
            match dtype {
                Dtype::U8 => vec![pixel[channel]],
                Dtype::F32 => value.to_ne_bytes().to_vec(),
                Dtype::F16 => f16::from_f32(value).to_ne_bytes().to_vec(),
                Dtype::Bf16 => bf16::from_f32(value).to_ne_bytes().to_vec(),
            }
        };
        match layout {
            Layout::Nchw => {
                (0..3).flat_map(|c| pixels.iter().flat_map(move |p| element(c, p))).collect()
            }
            Layout::Nhwc => {
                pixels.iter().flat_map(|p| (0..3).flat_map(move |c| element(c, p))).collect()
            }
        }
    }

    #[test]
    fn every_dtype_and_layout_is_the_definition_bit_for_bit_at_every_level() {
        for most in [Level::Scalar, Level::Avx2, Level::Avx512] {
            limit(most);
            for norms in NORMS.windows(3) {
                for dtype in [Dtype::U8, Dtype::F16, Dtype::Bf16, Dtype::F32] {
                    for layout in [Layout::Nchw, Layout::Nhwc] {
                        for is_pending in [false, true] {
                            let (mut canvas, pixels) = canvas(is_pending);
                            let expected = expected(dtype, layout, norms, &pixels);
                            let mut out = vec![9; expected.len()];
                            Writer::new(dtype, layout, norms).write(&mut canvas, &mut out);
                            assert!(out == expected, "{most:?} {norms:?} {dtype:?} {layout:?}");
                        }
                    }
                }
            }
        }
    }

    /// The short way is taken for what people use, and refused where it would be wrong.
    #[test]
    fn products_stand_in_for_divisions_only_where_they_are_exact() {
        for (mean, std) in NORMS {
            assert!(Products::new(mean, std).is_some(), "{mean} {std}");
        }
        for std in [0.0, f32::MIN_POSITIVE / 4.0] {
            assert!(Products::new(0.5, std).is_none(), "{std}");
        }
    }
}
