//! Where the pixels of a mapped image come from, as numbers: for devices that look them up
//! themselves.
//!
//! What [`geometry`](super::geometry) does to pixels, told in positions; the rounding is the same.

use super::CropRect;
use super::geometry::{AffineMatrix, FixedMap, Turn, inside, source_coord, turn_of};

/// The source positions of all pixels of an image.
#[derive(Clone, Debug, PartialEq)]
pub enum Sources {
    /// In 16.16 fixed point: the first pixel's column and row, what they grow by with a column
    /// (column, row), and with a row. Positions outside the source are black.
    Steps([i32; 6]),
    /// A source column for each column, a source row for each row; -1 is black.
    Separable {
        /// As many as the image has columns.
        columns: Vec<i32>,
        /// As many as the image has rows.
        rows: Vec<i32>,
    },
    /// For each pixel `row * width + column` of the source; -1 is black.
    Each(Vec<i32>),
}

impl Sources {
    /// Of [`geometry::affine`](super::geometry::affine).
    pub fn of_affine(matrix: &AffineMatrix, (width, height): (usize, usize)) -> Self {
        let [m0, m1, m2, m3, m4, m5] = *matrix;
        if m1 == 0.0 && m3 == 0.0 {
            return Self::Separable {
                columns: running(m2 + m0 * 0.5, m0, width),
                rows: running(m5 + m4 * 0.5, m4, height),
            };
        }
        if let Some(map) = FixedMap::new(matrix, width, height) {
            let FixedMap { x, y, dx_col, dy_col, dx_row, dy_row } = map;
            return Self::Steps([x, y, dx_col, dy_col, dx_row, dy_row]);
        }
        let (mut x_row, mut y_row) = (m2 + m1 * 0.5 + m0 * 0.5, m5 + m4 * 0.5 + m3 * 0.5);
        let mut found = Vec::with_capacity(width * height);
        for _ in 0..height {
            let (mut x_src, mut y_src) = (x_row, y_row);
            for _ in 0..width {
                let (x, y) = (source_coord(x_src), source_coord(y_src));
                let is_there = inside(x, width) && inside(y, height);
                found.push(if is_there { y * to_i32(width) + x } else { -1 });
                x_src += m0;
                y_src += m3;
            }
            x_row += m1;
            y_row += m4;
        }
        Self::Each(found)
    }

    /// Of [`geometry::rotate`](super::geometry::rotate).
    pub fn of_rotation(degrees: f64, (width, height): (usize, usize)) -> Self {
        let last = |side: usize| to_i32(side) - 1;
        let (x, y) = (last(width), last(height));
        match turn_of(degrees, width, height) {
            Turn::None => Self::Separable { columns: (0..=x).collect(), rows: (0..=y).collect() },
            Turn::Half => {
                Self::Separable { columns: (0..=x).rev().collect(), rows: (0..=y).rev().collect() }
            }
            Turn::Quarter { counter_clockwise } => {
                let one = FixedMap::ONE;
                let steps = if counter_clockwise {
                    [x * one, 0, 0, one, -one, 0]
                } else {
                    [0, y * one, 0, -one, one, 0]
                };
                Self::Steps(steps)
            }
            Turn::By(matrix) => Self::of_affine(&matrix, (width, height)),
        }
    }

    /// Of [`geometry::crop_into`](super::geometry::crop_into) from an image of `size`, mirrored
    /// left to right if `flip`.
    pub fn of_crop(rect: CropRect, flip: bool, size: (usize, usize)) -> Self {
        let span = |start: i64, len: usize, side: usize| {
            let source = |at: usize| {
                let at = start.checked_add(i64::try_from(at).ok()?)?;
                i32::try_from(at).ok().filter(|at| inside(*at, side))
            };
            (0..len).map(|at| source(at).unwrap_or(-1)).collect::<Vec<_>>()
        };
        let mut columns = span(rect.x, rect.width, size.0);
        if flip {
            columns.reverse();
        }
        Self::Separable { columns, rows: span(rect.y, rect.height, size.1) }
    }
}

/// Source coordinates found by adding up, as Pillow does.
fn running(start: f64, step: f64, side: usize) -> Vec<i32> {
    let mut at = start;
    let mut next = || {
        let coord = source_coord(at);
        at += step;
        if inside(coord, side) { coord } else { -1 }
    };
    (0..side).map(|_| next()).collect()
}

fn to_i32(side: usize) -> i32 {
    i32::try_from(side).expect("image sides are at most limits::IMAGE_SIDE_MAX")
}
