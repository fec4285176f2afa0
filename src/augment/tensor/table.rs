//! Tables of 256 entries for each image and channel: made, and looked up.

use tch::{Device, Kind, TchError, Tensor};

use super::{Shape, color, to_bytes};
use crate::augment::Action;
use crate::image::planar::tables;
use crate::image::point::Lut;

const ENTRIES: i64 = 256;

/// A point operation of one image.
#[derive(Clone, Debug)]
pub(super) enum Point {
    /// A table that the magnitude gives.
    Table(Box<Lut>),
    /// Of each channel's extremes.
    AutoContrast,
    /// Of each channel's histogram.
    Equalize,
    /// Of the mean luma.
    Contrast(f32),
}

impl Point {
    pub(super) fn of(action: Action) -> Self {
        match action {
            Action::AutoContrast => Self::AutoContrast,
            Action::Equalize => Self::Equalize,
            Action::Contrast(factor) => Self::Contrast(factor),
            Action::Invert => Self::Table(Box::new(tables::invert())),
            Action::Solarize(threshold) => Self::Table(Box::new(tables::solarize(threshold))),
            Action::Posterize(bits) => Self::Table(Box::new(tables::posterize(bits))),
            Action::Brightness(factor) => Self::Table(Box::new(tables::blend(0, factor))),
            _ => unreachable!("no point operation"),
        }
    }
}

/// Applies a point operation to each image.
pub(super) fn apply_points(images: &Tensor, points: &[Point]) -> Result<Tensor, TchError> {
    let shape = Shape::of(images)?;
    let device = images.device();
    let images = images.f_contiguous()?;
    let mut of_kind: [Vec<i64>; 4] = Default::default();
    let (mut given, mut factors) = (Vec::new(), Vec::new());
    for (place, point) in (0_i64..).zip(points) {
        match point {
            Point::Table(table) => {
                of_kind[0].push(place);
                given.extend_from_slice(table.as_slice());
            }
            Point::AutoContrast => of_kind[1].push(place),
            Point::Equalize => of_kind[2].push(place),
            Point::Contrast(factor) => {
                of_kind[3].push(place);
                factors.push(*factor);
            }
        }
    }
    let size = [shape.n, shape.channels, ENTRIES];
    let mut all = Tensor::f_zeros(size, (Kind::Uint8, device))?;
    for (kind, places) in of_kind.iter().enumerate().filter(|(_, places)| !places.is_empty()) {
        let places = Tensor::f_from_slice(places)?.f_to_device(device)?;
        let own = || images.f_index_select(0, &places);
        let made = match kind {
            0 => Tensor::f_from_slice(&given)?.f_to_device(device)?.f_view([-1, 1, ENTRIES])?,
            1 => stretch(&own()?)?,
            2 => flatten(&own()?)?,
            _ => contrast(&own()?, &factors)?,
        };
        let made = made.f_expand([-1, shape.channels, ENTRIES], false)?;
        all = all.f_index_copy(0, &places, &made)?;
    }
    look_up(&images, &all.f_view([shape.n * shape.channels, ENTRIES])?)
}

/// Each byte of plane p of `images` becomes entry `byte` of row p of `table`, whatever its kind.
fn look_up(images: &Tensor, table: &Tensor) -> Result<Tensor, TchError> {
    let index = numbered(images, Kind::Int)?.f_view([-1])?;
    table.f_contiguous()?.f_view([-1])?.f_index_select(0, &index)?.f_view(images.size().as_slice())
}

/// Each byte, plus 256 times the number of its plane: `[n * channels, height * width]`.
fn numbered(images: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
    let shape = Shape::of(images)?;
    let n_planes = shape.n * shape.channels;
    let first = Tensor::f_arange(n_planes, (kind, images.device()))?.f_mul_scalar(ENTRIES)?;
    let planes = images.f_contiguous()?.f_view([n_planes, shape.n_pixels()])?;
    planes.f_to_kind(kind)?.f_add(&first.f_view([n_planes, 1])?)
}

/// All bytes in order, `[256]`.
fn all_bytes(kind: Kind, device: Device) -> Result<Tensor, TchError> {
    Tensor::f_arange(ENTRIES, (kind, device))
}

/// As [`tables::stretch`]: `[n, channels, 256]`.
fn stretch(images: &Tensor) -> Result<Tensor, TchError> {
    let Shape { n, channels, .. } = Shape::of(images)?;
    let extreme = |of: Tensor| of.f_to_kind(Kind::Double)?.f_view([n, channels, 1]);
    let low = extreme(images.f_amin([2, 3].as_slice(), false)?)?;
    let high = extreme(images.f_amax([2, 3].as_slice(), false)?)?;
    let is_flat = high.f_sub(&low)?.f_eq(0)?;
    // A channel of one value stays; nothing is divided by zero for it.
    let width = high.f_sub(&low)?.f_clamp_min(1)?;
    let scale = width.f_new_full([n, channels, 1], 255, (Kind::Double, images.device()))?;
    let scale = scale.f_div(&width)?;
    let offset = low.f_neg()?.f_mul(&scale)?;
    let bytes = all_bytes(Kind::Double, images.device())?;
    let made = to_bytes(&bytes.f_mul(&scale)?.f_add(&offset)?)?;
    bytes.f_to_kind(Kind::Uint8)?.f_where_self(&is_flat, &made)
}

/// As [`tables::equalize`], in whole numbers: `[n, channels, 256]`.
fn flatten(images: &Tensor) -> Result<Tensor, TchError> {
    let shape = Shape::of(images)?;
    let device = images.device();
    let n_planes = shape.n * shape.channels;
    let index = numbered(images, Kind::Int64)?.f_view([-1])?;
    let bins =
        index.f_bincount(None::<&Tensor>, n_planes * ENTRIES)?.f_view([n_planes, ENTRIES])?;
    let bytes = all_bytes(Kind::Int64, device)?;
    let last_used = bytes.f_mul(&bins.f_gt(0)?)?.f_amax([1].as_slice(), true)?;
    let last = bins.f_gather(1, &last_used, false)?;
    let step = last.f_neg()?.f_add_scalar(shape.n_pixels())?.f_div_scalar_mode(255, "floor")?;
    let is_kept = step.f_eq(0)?;
    let step = step.f_clamp_min(1)?;
    let before = bins.f_cumsum(1, Kind::Int64)?.f_sub(&bins)?;
    let start = before.f_add(&step.f_div_scalar_mode(2, "floor")?)?;
    let made = start.f_div_tensor_mode(&step, "floor")?.f_clamp_max(255)?;
    let made = bytes.f_where_self(&is_kept, &made)?.f_to_kind(Kind::Uint8)?;
    made.f_view([shape.n, shape.channels, ENTRIES])
}

/// A blend with the mean luma, rounded half up: `[n, 1, 256]`.
fn contrast(images: &Tensor, factors: &[f32]) -> Result<Tensor, TchError> {
    let shape = Shape::of(images)?;
    let device = images.device();
    let sum = color::luma(images)?.f_sum_dim_intlist([1, 2, 3].as_slice(), false, Kind::Int64)?;
    let n_pixels = Tensor::f_full([1], shape.n_pixels() as f64, (Kind::Double, device))?;
    let mean = sum.f_to_kind(Kind::Double)?.f_div(&n_pixels)?.f_add_scalar(0.5)?.f_floor()?;
    let factors = Tensor::f_from_slice(factors)?.f_to_device(device)?.f_view([-1, 1, 1])?;
    let bytes = all_bytes(Kind::Float, device)?;
    color::blend(&mean.f_view([shape.n, 1, 1])?, &bytes, &factors)
}

/// The last step: normalised values of any kind, in either order of axes.
#[derive(Debug)]
pub struct Finish {
    /// `[channels, 256]`.
    table: Tensor,
    channels_last: bool,
}

impl Finish {
    /// `values[c][b]` stands for byte b in channel c; it is rounded to `kind` to nearest, halves to
    /// even, which for bytes (`Kind::Uint8`) must be what they are.
    ///
    /// # Errors
    /// libtorch has no memory left.
    pub fn new(
        values: &[[f32; 256]],
        kind: Kind,
        channels_last: bool,
        device: Device,
    ) -> Result<Self, TchError> {
        let table = Tensor::f_from_slice(values.as_flattened())?.f_view([-1, ENTRIES])?;
        Ok(Self { table: table.f_to_kind(kind)?.f_to_device(device)?, channels_last })
    }

    /// From u8, `[n, channels, height, width]`, to the values: of the same shape, or `[n, height,
    /// width, channels]`, contiguous.
    ///
    /// # Errors
    /// libtorch has no memory left, or images of other channels were given.
    pub fn run(&self, images: &Tensor) -> Result<Tensor, TchError> {
        let shape = Shape::of(images)?;
        let table = self.table.f_unsqueeze(0)?.f_expand([shape.n, -1, -1], false)?;
        let table = table.f_reshape([shape.n * shape.channels, ENTRIES])?;
        let made = look_up(images, &table)?;
        if self.channels_last { made.f_permute([0, 2, 3, 1])?.f_contiguous() } else { Ok(made) }
    }
}
