//! Operations that look at all channels of a pixel, or at its neighbours.

use tch::{Kind, TchError, Tensor};

use super::{Shape, per_image, to_bytes};

/// Luma of RGB images (u8, `[n, 3, height, width]`) as i32, `[n, 1, height, width]`: ITU-R 601-2 in
/// 16.16 fixed point, as [`luma`](crate::image::enhance::luma); of gray images their values.
pub(super) fn luma(images: &Tensor) -> Result<Tensor, TchError> {
    let wide = images.f_to_kind(Kind::Int)?;
    if Shape::of(images)?.channels == 1 {
        return Ok(wide);
    }
    let weighed = |channel: i64, weight: i64| wide.f_narrow(1, channel, 1)?.f_mul_scalar(weight);
    let sum = weighed(0, 19_595)?.f_add(&weighed(1, 38_470)?)?.f_add(&weighed(2, 7_471)?)?;
    sum.f_add_scalar(0x8000)?.f_bitwise_right_shift_tensor_scalar(16)
}

/// `degenerate + factor * (value - degenerate)` in f32, cut to bytes; each its own kernel.
pub(super) fn blend(
    degenerate: &Tensor,
    values: &Tensor,
    factors: &Tensor,
) -> Result<Tensor, TchError> {
    let degenerate = degenerate.f_to_kind(Kind::Float)?;
    let difference = values.f_to_kind(Kind::Float)?.f_sub(&degenerate)?;
    to_bytes(&degenerate.f_add(&factors.f_mul(&difference)?)?)
}

/// Blends each image with its gray version. Gray images stay as they are.
pub(super) fn color(images: &Tensor, factors: &[f32]) -> Result<Tensor, TchError> {
    if Shape::of(images)?.channels == 1 {
        return Ok(images.shallow_clone());
    }
    blend(&luma(images)?, images, &per_image(factors, images.device())?)
}

/// Blends each image with its 3×3 smoothing; the outermost pixels stay as they are.
///
/// The weighted sum is divided by 13 and rounded in whole numbers: see
/// [`sharpness`](crate::image::filter::sharpness).
pub(super) fn sharpness(images: &Tensor, factors: &[f32]) -> Result<Tensor, TchError> {
    let Shape { height, width, .. } = Shape::of(images)?;
    if width < 3 || height < 3 {
        return Ok(images.shallow_clone());
    }
    let wide = images.f_to_kind(Kind::Int16)?;
    let inner = |images: &Tensor, y: i64, x: i64| {
        images.f_narrow(2, y, height - 2)?.f_narrow(3, x, width - 2)
    };
    let mut sum = inner(&wide, 1, 1)?.f_mul_scalar(4)?;
    for y in 0..3 {
        for x in 0..3 {
            sum = sum.f_add(&inner(&wide, y, x)?)?;
        }
    }
    let smooth = sum.f_mul_scalar(2)?.f_add_scalar(13)?.f_div_scalar_mode(26, "floor")?;
    let values = inner(images, 1, 1)?;
    let made = blend(&smooth, &values, &per_image(factors, images.device())?)?;
    let sharp = images.f_to_dtype(Kind::Uint8, false, true)?;
    inner(&sharp, 1, 1)?.f_copy_(&made)?;
    Ok(sharp)
}
