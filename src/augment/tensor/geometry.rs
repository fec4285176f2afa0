//! Pixels that come from elsewhere, and boxes.

use tch::{Device, Kind, TchError, Tensor};

use super::Shape;
use crate::image::draw::PixelBox;
use crate::image::sources::Sources;

/// Fraction bits of [`Sources::Steps`].
const FRACTION_BITS: i64 = 16;

/// Image i of the result, of `size` (columns, rows), takes its pixels from image i of `images` (u8,
/// `[n, channels, height, width]`) as `sources[i]` says; black where they say so. The images of
/// [`Sources::Steps`] have the size of the result.
///
/// # Errors
/// libtorch has no memory left, or another shape was given.
pub fn gather(
    images: &Tensor,
    sources: &[Sources],
    size: (usize, usize),
) -> Result<Tensor, TchError> {
    let from = Shape::of(images)?;
    let to = Shape { width: to_i64(size.0), height: to_i64(size.1), ..from };
    let positions = positions(sources, from, to, images.device())?;
    let is_there = positions.f_ge(0)?.f_unsqueeze(1)?;
    let flat = [from.n, from.channels, to.n_pixels()];
    let index = positions.f_clamp_min(0)?.f_unsqueeze(1)?.f_expand(flat, false)?;
    let images = images.f_contiguous()?.f_view([from.n, from.channels, from.n_pixels()])?;
    let found = images.f_gather(2, &index, false)?.f_mul(&is_there)?;
    found.f_view([to.n, to.channels, to.height, to.width])
}

/// For each image and pixel the position in its source, `[n, height * width]`, i64; -1 is black.
fn positions(
    sources: &[Sources],
    from: Shape,
    to: Shape,
    device: Device,
) -> Result<Tensor, TchError> {
    let n_pixels = usize::try_from(to.n_pixels()).expect("not negative");
    let (mut steps, mut separable, mut each) = (Vec::new(), (Vec::new(), Vec::new()), Vec::new());
    let mut places = [Vec::new(), Vec::new(), Vec::new()];
    for (place, own) in (0_i64..).zip(sources) {
        match own {
            Sources::Steps(own) => {
                places[0].push(place);
                steps.extend_from_slice(own);
            }
            Sources::Separable { columns, rows } => {
                places[1].push(place);
                separable.0.extend_from_slice(columns);
                separable.1.extend_from_slice(rows);
            }
            Sources::Each(own) => {
                places[2].push(place);
                each.extend_from_slice(&own[..n_pixels]);
            }
        }
    }
    let table = |values: &[i32], n_columns: i64| {
        let values = Tensor::f_from_slice(values)?.f_to_device(device)?.f_to_kind(Kind::Int64)?;
        values.f_view([-1, n_columns])
    };
    let mut found = Vec::new();
    if !steps.is_empty() {
        found.push(of_steps(&table(&steps, 6)?, to)?);
    }
    if !separable.0.is_empty() {
        let columns = table(&separable.0, to.width)?.f_unsqueeze(1)?;
        let rows = table(&separable.1, to.height)?.f_unsqueeze(2)?;
        found.push(joined(&columns, &rows, from)?.f_view([-1, to.n_pixels()])?);
    }
    if !each.is_empty() {
        found.push(table(&each, to.n_pixels())?);
    }
    let found = Tensor::f_cat(&found, 0)?;
    // They were sorted by kind: back into the order of the images.
    let mut order = vec![0_i64; sources.len()];
    for (at, place) in (0_i64..).zip(places.iter().flatten()) {
        order[usize::try_from(*place).expect("a place")] = at;
    }
    found.f_index_select(0, &Tensor::f_from_slice(&order)?.f_to_device(device)?)
}

/// `rows * width + columns` where both lie in the source, else -1.
fn joined(columns: &Tensor, rows: &Tensor, from: Shape) -> Result<Tensor, TchError> {
    let within = |at: &Tensor, side: i64| at.f_ge(0)?.f_logical_and(&at.f_lt(side)?);
    let is_there = within(columns, from.width)?.f_logical_and(&within(rows, from.height)?)?;
    rows.f_mul_scalar(from.width)?.f_add(columns)?.f_where_scalarother(&is_there, -1)
}

/// Of `[n, 6]` numbers as in [`Sources::Steps`].
fn of_steps(steps: &Tensor, shape: Shape) -> Result<Tensor, TchError> {
    let counted =
        |n: i64, view: [i64; 3]| Tensor::f_arange(n, (Kind::Int64, steps.device()))?.f_view(view);
    let (column, row) = (counted(shape.width, [1, 1, -1])?, counted(shape.height, [1, -1, 1])?);
    let number = |at: i64| steps.f_narrow(1, at, 1)?.f_unsqueeze(2);
    let coordinate = |first: i64| {
        let by_column = number(first + 2)?.f_mul(&column)?;
        let by_row = number(first + 4)?.f_mul(&row)?;
        let at = number(first)?.f_add(&by_column)?.f_add(&by_row)?;
        at.f_bitwise_right_shift_tensor_scalar(FRACTION_BITS)
    };
    joined(&coordinate(0)?, &coordinate(1)?, shape)?.f_view([-1, shape.n_pixels()])
}

/// Fills a box of each image.
pub(super) fn fill(images: &Tensor, boxes: &[(PixelBox, [u8; 3])]) -> Result<Tensor, TchError> {
    let Shape { n, channels, height, width } = Shape::of(images)?;
    let device = images.device();
    let edges = |edge: fn(&PixelBox) -> i64| {
        let edges: Vec<i64> = boxes.iter().map(|(area, _)| edge(area)).collect();
        Tensor::f_from_slice(&edges)?.f_to_device(device)?.f_view([n, 1])
    };
    let within = |side: i64, first: fn(&PixelBox) -> i64, end: fn(&PixelBox) -> i64| {
        let at = Tensor::f_arange(side, (Kind::Int64, device))?.f_view([1, side])?;
        at.f_ge_tensor(&edges(first)?)?.f_logical_and(&at.f_lt_tensor(&edges(end)?)?)
    };
    let columns = within(width, |area| area.x0, |area| area.x1)?.f_view([n, 1, 1, width])?;
    let rows = within(height, |area| area.y0, |area| area.y1)?.f_view([n, 1, height, 1])?;
    let fills: Vec<u8> = boxes
        .iter()
        .flat_map(|(_, fill)| &fill[..usize::try_from(channels).expect("1 or 3")])
        .copied()
        .collect();
    let fills = Tensor::f_from_slice(&fills)?.f_to_device(device)?.f_view([n, channels, 1, 1])?;
    fills.f_where_self(&columns.f_logical_and(&rows)?, images)
}

fn to_i64(side: usize) -> i64 {
    i64::try_from(side).expect("image sides are at most limits::IMAGE_SIDE_MAX")
}
