//! Nearest-neighbour geometry: affine maps and rotation as Pillow computes them, flip and crop.
//!
//! Pixels that come from outside the source are black. Every kernel writes a whole image; none
//! allocates once its buffers have grown to the image's size.
//!
//! *Source*: Pillow, `src/libImaging/Geometry.c` (`ImagingScaleAffine`, `affine_fixed`,
//! `ImagingTransformAffine`) and `Image.rotate`. The order of the floating-point additions is part
//! of the result, so it is kept even where a product would be shorter.

use std::f64::consts::PI;

use super::{CropRect, Image};

/// Maps output to source: `x_src = m[0]·x + m[1]·y + m[2]`, `y_src = m[3]·x + m[4]·y + m[5]`,
/// in pixels, at pixel centres (x + ½, y + ½).
pub type AffineMatrix = [f64; 6];

/// How the samples of a raw image are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Interleaved: `[height, width, channels]`.
    Hwc,
    /// Planar: `[channels, height, width]`.
    Chw,
}

/// Coordinates at or beyond this don't fit Pillow's 16.16 fixed-point numbers.
const FIXED_POINT_COORD_MAX: f64 = 32_768.0;
/// One, in 16.16 fixed point.
const FIXED_POINT_ONE: f64 = 65_536.0;
/// Fraction bits of the fixed-point coordinates.
const FIXED_POINT_BITS: u32 = 16;

/// The pixels of an image with `C` channels.
fn pixels<const C: usize>(image: &Image) -> &[[u8; C]] {
    image.data.as_chunks().0
}

/// The pixels of an image with `C` channels, to be written.
fn pixels_mut<const C: usize>(image: &mut Image) -> &mut [[u8; C]] {
    image.data.as_chunks_mut().0
}

/// `dst` becomes `src` seen through `matrix`, at the same size; nearest neighbour, black outside.
///
/// `columns` is scratch space. Like Pillow, takes one of three ways that round differently: a
/// table of source columns when the matrix has no cross terms, 16.16 fixed point when all
/// coordinates fit it, else running sums in f64.
pub fn affine(src: &Image, matrix: &AffineMatrix, dst: &mut Image, columns: &mut Vec<i32>) {
    dst.reset(src.width, src.height, src.channels);
    if src.data.is_empty() {
        return;
    }
    match src.channels {
        1 => affine_channels::<1>(src, matrix, dst, columns),
        _ => affine_channels::<3>(src, matrix, dst, columns),
    }
}

fn affine_channels<const C: usize>(
    src: &Image,
    matrix: &AffineMatrix,
    dst: &mut Image,
    columns: &mut Vec<i32>,
) {
    let size = (src.width, src.height);
    affine_pixels(pixels::<C>(src), size, matrix, pixels_mut::<C>(dst), columns);
}

fn affine_pixels<const C: usize>(
    src: &[[u8; C]],
    (width, height): (usize, usize),
    matrix: &AffineMatrix,
    dst: &mut [[u8; C]],
    columns: &mut Vec<i32>,
) {
    if matrix[1] == 0.0 && matrix[3] == 0.0 {
        scale(src, width, height, matrix, dst, columns);
    } else if let Some(map) = FixedMap::new(matrix, width, height) {
        affine_fixed(src, width, height, &map, dst);
    } else {
        affine_float(src, width, height, matrix, dst);
    }
}

/// A non-negative coordinate cut to an integer; -1 for all that are left of or above the image.
#[allow(clippy::cast_possible_truncation, reason = "cutting the fraction off is the point")]
pub(super) fn source_coord(value: f64) -> i32 {
    if value < 0.0 { -1 } else { value as i32 }
}

/// Whether a coordinate lies in `0..size`.
pub(super) fn inside(coord: i32, size: usize) -> bool {
    coord >= 0 && (coord as usize) < size
}

fn scale<const C: usize>(
    src: &[[u8; C]],
    width: usize,
    height: usize,
    matrix: &AffineMatrix,
    dst: &mut [[u8; C]],
    columns: &mut Vec<i32>,
) {
    columns.clear();
    let mut x_src = matrix[2] + matrix[0] * 0.5;
    for _ in 0..width {
        columns.push(source_coord(x_src));
        x_src += matrix[0];
    }
    let Some(first) = columns.iter().position(|&x| inside(x, width)) else { return };
    let end = columns.iter().rposition(|&x| inside(x, width)).map_or(first, |last| last + 1);
    let columns = &columns[first..end];
    let start = columns[0] as usize;
    let is_shift = columns.windows(2).all(|pair| pair[1] == pair[0] + 1);

    let mut y_src = matrix[5] + matrix[4] * 0.5;
    for dst_row in dst.chunks_exact_mut(width) {
        let y = source_coord(y_src);
        y_src += matrix[4];
        if !inside(y, height) {
            continue;
        }
        let src_row = &src[y as usize * width..][..width];
        let dst_row = &mut dst_row[first..end];
        if is_shift {
            dst_row.copy_from_slice(&src_row[start..start + dst_row.len()]);
        } else {
            for (out, &x) in dst_row.iter_mut().zip(columns) {
                *out = src_row[x as usize];
            }
        }
    }
}

fn fits_fixed_point(m: &AffineMatrix, width: usize, height: usize) -> bool {
    let (width, height) = (width as f64, height as f64);
    [(0.0, 0.0), (width, height), (0.0, height), (width, 0.0)].iter().all(|&(x, y)| {
        (x * m[0] + y * m[1] + m[2]).abs() < FIXED_POINT_COORD_MAX
            && (x * m[3] + y * m[4] + m[5]).abs() < FIXED_POINT_COORD_MAX
    })
}

#[allow(clippy::cast_possible_truncation, reason = "the corners were checked to fit")]
fn fixed_point(value: f64) -> i32 {
    (value * FIXED_POINT_ONE + 0.5).floor() as i32
}

/// An affine map in 16.16 fixed-point numbers: the source of the first pixel, and the steps to the
/// next column's and row's.
#[derive(Clone, Copy, Debug)]
pub(super) struct FixedMap {
    pub(super) x: i32,
    pub(super) y: i32,
    pub(super) dx_col: i32,
    pub(super) dy_col: i32,
    pub(super) dx_row: i32,
    pub(super) dy_row: i32,
}

impl FixedMap {
    /// Fraction bits.
    pub(super) const BITS: u32 = FIXED_POINT_BITS;
    /// A step of one pixel.
    pub(super) const ONE: i32 = 1 << FIXED_POINT_BITS;

    /// `None` for the maps that Pillow computes otherwise.
    pub(super) fn new(m: &AffineMatrix, width: usize, height: usize) -> Option<Self> {
        let is_scale = m[1] == 0.0 && m[3] == 0.0;
        (!is_scale && fits_fixed_point(m, width, height)).then(|| Self {
            x: fixed_point(m[2] + m[0] * 0.5 + m[1] * 0.5),
            y: fixed_point(m[5] + m[3] * 0.5 + m[4] * 0.5),
            dx_col: fixed_point(m[0]),
            dy_col: fixed_point(m[3]),
            dx_row: fixed_point(m[1]),
            dy_row: fixed_point(m[4]),
        })
    }
}

/// One plane through a map that is no [`FixedMap`]; `dst` must be black.
pub(super) fn affine_plane(
    src: &[u8],
    (width, height): (usize, usize),
    matrix: &AffineMatrix,
    dst: &mut [u8],
    columns: &mut Vec<i32>,
) {
    let (src, dst) = (src.as_chunks::<1>().0, dst.as_chunks_mut::<1>().0);
    affine_pixels(src, (width, height), matrix, dst, columns);
}

fn affine_fixed<const C: usize>(
    src: &[[u8; C]],
    width: usize,
    height: usize,
    map: &FixedMap,
    dst: &mut [[u8; C]],
) {
    let FixedMap { x: mut x_row, y: mut y_row, dx_col, dy_col, dx_row, dy_row } = *map;
    for dst_row in dst.chunks_exact_mut(width) {
        let (mut x_src, mut y_src) = (x_row, y_row);
        for out in dst_row {
            let (x, y) = (x_src >> FIXED_POINT_BITS, y_src >> FIXED_POINT_BITS);
            // A negative number becomes one that is larger than any image.
            if (x as u32 as usize) < width && (y as u32 as usize) < height {
                *out = src[y as usize * width + x as usize];
            }
            x_src = x_src.wrapping_add(dx_col);
            y_src = y_src.wrapping_add(dy_col);
        }
        x_row = x_row.wrapping_add(dx_row);
        y_row = y_row.wrapping_add(dy_row);
    }
}

fn affine_float<const C: usize>(
    src: &[[u8; C]],
    width: usize,
    height: usize,
    m: &AffineMatrix,
    dst: &mut [[u8; C]],
) {
    let mut x_row = m[2] + m[1] * 0.5 + m[0] * 0.5;
    let mut y_row = m[5] + m[4] * 0.5 + m[3] * 0.5;
    for dst_row in dst.chunks_exact_mut(width) {
        let (mut x_src, mut y_src) = (x_row, y_row);
        for out in dst_row {
            let (x, y) = (source_coord(x_src), source_coord(y_src));
            if inside(x, width) && inside(y, height) {
                *out = src[y as usize * width + x as usize];
            }
            x_src += m[0];
            y_src += m[3];
        }
        x_row += m[1];
        y_row += m[4];
    }
}

/// How Pillow turns an image: some angles move pixels without rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Turn {
    None,
    Half,
    Quarter { counter_clockwise: bool },
    By(AffineMatrix),
}

#[allow(clippy::float_cmp, reason = "Pillow's short cuts are for these exact angles")]
pub(super) fn turn_of(degrees: f64, width: usize, height: usize) -> Turn {
    // Python's `%` gives a result of the divisor's sign.
    let degrees = degrees.rem_euclid(360.0);
    if degrees == 0.0 {
        Turn::None
    } else if degrees == 180.0 {
        Turn::Half
    } else if width == height && (degrees == 90.0 || degrees == 270.0) {
        Turn::Quarter { counter_clockwise: degrees == 90.0 }
    } else {
        Turn::By(rotation_matrix(degrees, width, height))
    }
}

/// `dst` becomes `src` turned counter-clockwise by `degrees` about its centre, at the same size.
///
/// Exact turns by 180°, and by 90° and 270° of a square image, move pixels without rounding.
pub fn rotate(src: &Image, degrees: f64, dst: &mut Image, columns: &mut Vec<i32>) {
    match turn_of(degrees, src.width, src.height) {
        Turn::None => copy(src, dst),
        Turn::Half => {
            copy(src, dst);
            match src.channels {
                1 => dst.data.reverse(),
                _ => pixels_mut::<3>(dst).reverse(),
            }
        }
        Turn::Quarter { counter_clockwise } => match src.channels {
            1 => quarter_turn::<1>(src, counter_clockwise, dst),
            _ => quarter_turn::<3>(src, counter_clockwise, dst),
        },
        Turn::By(matrix) => affine(src, &matrix, dst, columns),
    }
}

fn copy(src: &Image, dst: &mut Image) {
    dst.width = src.width;
    dst.height = src.height;
    dst.channels = src.channels;
    dst.data.clear();
    dst.data.extend_from_slice(&src.data);
}

fn quarter_turn<const C: usize>(src: &Image, counter_clockwise: bool, dst: &mut Image) {
    dst.reset(src.width, src.height, src.channels);
    quarter_turn_pixels(pixels::<C>(src), src.width, counter_clockwise, pixels_mut::<C>(dst));
}

/// A quarter turn of one plane of a square image.
pub(super) fn quarter_turn_plane(src: &[u8], side: usize, counter_clockwise: bool, dst: &mut [u8]) {
    let (src, dst) = (src.as_chunks::<1>().0, dst.as_chunks_mut::<1>().0);
    quarter_turn_pixels(src, side, counter_clockwise, dst);
}

fn quarter_turn_pixels<const C: usize>(
    src: &[[u8; C]],
    side: usize,
    counter_clockwise: bool,
    dst: &mut [[u8; C]],
) {
    if side == 0 {
        return;
    }
    for (y, dst_row) in dst.chunks_exact_mut(side).enumerate() {
        for (x, out) in dst_row.iter_mut().enumerate() {
            *out = if counter_clockwise {
                src[x * side + (side - 1 - y)]
            } else {
                src[(side - 1 - x) * side + y]
            };
        }
    }
}

fn rotation_matrix(degrees: f64, width: usize, height: usize) -> AffineMatrix {
    let (centre_x, centre_y) = (width as f64 / 2.0, height as f64 / 2.0);
    let angle = -(degrees * (PI / 180.0));
    let (cos, sin) = (round_15_decimals(angle.cos()), round_15_decimals(angle.sin()));
    let minus_sin = round_15_decimals(-angle.sin());
    let x_shift = cos * -centre_x + sin * -centre_y + centre_x;
    let y_shift = minus_sin * -centre_x + cos * -centre_y + centre_y;
    [cos, sin, x_shift, minus_sin, cos, y_shift]
}

/// Python's `round(value, 15)` for |value| ≤ 1: the decimal nearest to the exact binary value.
///
/// The product with 10^15 is split into its rounded value and its exact error, so that the choice
/// between two neighbours is never made on a rounded number.
fn round_15_decimals(value: f64) -> f64 {
    const SCALE: f64 = 1e15;
    let product = value * SCALE;
    let error = value.mul_add(SCALE, -product);
    let floor = product.floor();
    let above_half = (product - floor) - 0.5;
    let up = if above_half == 0.0 && error == 0.0 {
        floor % 2.0 != 0.0
    } else if above_half == 0.0 {
        error > 0.0
    } else {
        above_half > 0.0
    };
    (if up { floor + 1.0 } else { floor }) / SCALE
}

/// Mirrors an image left to right, in place.
pub fn flip_horizontal(image: &mut Image) {
    let width = image.width;
    if width == 0 {
        return;
    }
    match image.channels {
        1 => image.data.chunks_exact_mut(width).for_each(<[u8]>::reverse),
        _ => pixels_mut::<3>(image).chunks_exact_mut(width).for_each(<[[u8; 3]]>::reverse),
    }
}

/// `out` becomes the part `rect` of a raw image; black where `rect` reaches outside of it.
///
/// `src` holds `width * height * channels` bytes in the order of `layout`; `out` is interleaved.
///
/// # Panics
/// If `src` is shorter than its shape says.
pub fn crop_into(
    src: &[u8],
    layout: Layout,
    width: usize,
    height: usize,
    channels: usize,
    rect: CropRect,
    out: &mut Image,
) {
    assert!(src.len() >= width * height * channels, "the source is shorter than its shape says");
    out.reset(rect.width, rect.height, channels);
    let Some((src_x, out_x, n_cols)) = overlap(rect.x, rect.width, width) else { return };
    let Some((src_y, out_y, n_rows)) = overlap(rect.y, rect.height, height) else { return };
    for row in 0..n_rows {
        let src_start = (src_y + row) * width + src_x;
        let out_start = ((out_y + row) * rect.width + out_x) * channels;
        let out_row = &mut out.data[out_start..][..n_cols * channels];
        match layout {
            Layout::Hwc => {
                out_row.copy_from_slice(&src[src_start * channels..][..n_cols * channels]);
            }
            Layout::Chw if channels == 3 => {
                let plane = width * height;
                let red = &src[src_start..][..n_cols];
                let green = &src[plane + src_start..][..n_cols];
                let blue = &src[2 * plane + src_start..][..n_cols];
                let rgb = red.iter().zip(green).zip(blue);
                for (pixel, ((&r, &g), &b)) in out_row.as_chunks_mut::<3>().0.iter_mut().zip(rgb) {
                    *pixel = [r, g, b];
                }
            }
            Layout::Chw => out_row.copy_from_slice(&src[src_start..][..n_cols]),
        }
    }
}

/// Where a window `start..start + len` meets `0..size`: first source index, first window index,
/// length; `None` if they don't meet.
pub(super) fn overlap(start: i64, len: usize, size: usize) -> Option<(usize, usize, usize)> {
    let (start, len, size) = (i128::from(start), len as i128, size as i128);
    let (first, end) = (start.max(0), (start + len).min(size));
    if first >= end {
        return None;
    }
    Some((
        usize::try_from(first).ok()?,
        usize::try_from(first - start).ok()?,
        usize::try_from(end - first).ok()?,
    ))
}

#[cfg(test)]
#[path = "geometry_tests.rs"]
mod tests;
