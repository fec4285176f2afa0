//! A turn of the hue, by way of 8-bit HSV: the twin of [`hsv`](crate::image::hsv), with the same
//! single and double precision at the same places.

use tch::{Kind, TchError, Tensor};

use super::Shape;

/// Adds a number (of 256, wrapping) to the hue of each image's pixels. Gray images stay.
pub(super) fn shift_hue(images: &Tensor, shifts: &[u8]) -> Result<Tensor, TchError> {
    let Shape { n, channels, .. } = Shape::of(images)?;
    if channels == 1 {
        return Ok(images.shallow_clone());
    }
    let shifts: Vec<i64> = shifts.iter().copied().map(i64::from).collect();
    let shifts = Tensor::f_from_slice(&shifts)?.f_to_device(images.device())?;
    let [hue, saturation, value] = to_hsv(images)?;
    let hue = hue.f_add(&shifts.f_view([n, 1, 1, 1])?)?.f_remainder(256)?;
    from_hsv(&hue, &saturation, &value)?.f_to_kind(Kind::Uint8)
}

/// Hue, saturation and value as i64, `[n, 1, height, width]`.
fn to_hsv(images: &Tensor) -> Result<[Tensor; 3], TchError> {
    let channel = |at: i64| images.f_narrow(1, at, 1)?.f_to_kind(Kind::Float);
    let (r, g, b) = (channel(0)?, channel(1)?, channel(2)?);
    let max = images.f_amax([1].as_slice(), true)?.f_to_kind(Kind::Float)?;
    let min = images.f_amin([1].as_slice(), true)?.f_to_kind(Kind::Float)?;
    let chroma = max.f_sub(&min)?;
    let is_gray = chroma.f_eq(0)?;
    // Gray pixels have no hue; nothing is divided by zero for them.
    let divisor = chroma.f_clamp_min(1)?;
    let saturation = chroma.f_div(&max.f_clamp_min(1)?)?;
    let part = |of: &Tensor| max.f_sub(of)?.f_div(&divisor);
    let (rc, gc, bc) = (part(&r)?, part(&g)?, part(&b)?);
    let wide = |of: &Tensor| of.f_to_kind(Kind::Double);
    let turned = |base: f64, plus: &Tensor, minus: &Tensor| {
        wide(plus)?.f_add_scalar(base)?.f_sub(&wide(minus)?)?.f_to_kind(Kind::Float)
    };
    let sixths =
        turned(2.0, &rc, &bc)?.f_where_self(&g.f_eq_tensor(&max)?, &turned(4.0, &gc, &rc)?)?;
    let sixths = bc.f_sub(&gc)?.f_where_self(&r.f_eq_tensor(&max)?, &sixths)?;
    let six = Tensor::f_full([1], 6, (Kind::Double, images.device()))?;
    let hue = wide(&sixths)?.f_div(&six)?.f_add_scalar(1)?.f_fmod(1)?.f_to_kind(Kind::Float)?;
    let byte = |of: &Tensor| {
        let cut = wide(of)?.f_mul_scalar(255)?.f_to_kind(Kind::Int64)?;
        cut.f_masked_fill(&is_gray, 0)
    };
    Ok([byte(&hue)?, byte(&saturation)?, max.f_to_kind(Kind::Int64)?])
}

/// From i64, each `[n, 1, height, width]`, to i64, `[n, 3, height, width]`.
fn from_hsv(hue: &Tensor, saturation: &Tensor, value: &Tensor) -> Result<Tensor, TchError> {
    let device = hue.device();
    let wide = |of: &Tensor| of.f_to_kind(Kind::Double);
    let number = |of: f64| Tensor::f_full([1], of, (Kind::Double, device));
    let full = number(255.0)?;
    let sixths = wide(hue)?.f_mul_scalar(6)?.f_div(&full)?;
    let sector = sixths.f_floor()?;
    let rest = sixths.f_sub(&sector)?.f_to_kind(Kind::Float)?;
    let is_gray = saturation.f_eq(0)?;
    let saturation = wide(saturation)?.f_div(&full)?.f_to_kind(Kind::Float)?;
    let one = number(1.0)?;
    let less = |amount: &Tensor| one.f_sub(amount);
    let part = |amount: &Tensor| {
        let exact = wide(value)?.f_mul(&less(amount)?)?;
        // Halves are rounded up.
        let whole = exact.f_floor()?;
        let above = exact.f_sub(&whole)?.f_ge(0.5)?;
        whole.f_add(&above)?.f_to_kind(Kind::Int64)
    };
    let p = part(&wide(&saturation)?)?;
    let q = part(&wide(&saturation.f_mul(&rest)?)?)?;
    let t = part(&wide(&saturation)?.f_mul(&less(&wide(&rest)?)?)?)?;
    let v = value;
    // What red, green and blue are in each sixth of the circle.
    let by_sector = [[v, &t, &p], [&q, v, &p], [&p, v, &t], [&p, &q, v], [&t, &p, v], [v, &p, &q]];
    let sector = sector.f_to_kind(Kind::Int64)?.f_remainder(6)?;
    let channel = |at: usize| {
        let mut found = by_sector[5][at].shallow_clone();
        for (number, own) in (0_i64..).zip(&by_sector[..5]) {
            found = own[at].f_where_self(&sector.f_eq(number)?, &found)?;
        }
        v.f_where_self(&is_gray, &found)
    };
    Tensor::f_cat(&[channel(0)?, channel(1)?, channel(2)?], 1)
}
