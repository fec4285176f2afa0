//! Affine maps and turns of planes: where a pixel comes from is found once for all channels.

use super::super::geometry::{
    AffineMatrix, FixedMap, Turn, affine_plane, quarter_turn_plane, turn_of,
};
use super::super::simd::for_levels;
use super::Planes;
use super::read::copy_row;

/// `dst` becomes `src` seen through `matrix`, at the same size; nearest neighbour, black outside.
/// `columns` is scratch space. See [`super::super::geometry::affine`].
pub fn affine(src: &Planes, matrix: &AffineMatrix, dst: &mut Planes, columns: &mut Vec<i32>) {
    let Planes { width, height, channels, .. } = *src;
    dst.reshape(width, height, channels);
    dst.data.fill(0);
    if src.data.is_empty() {
        return;
    }
    let Some(map) = FixedMap::new(matrix, width, height) else {
        for (src, dst) in src.planes().zip(dst.planes_mut()) {
            affine_plane(src, (width, height), matrix, dst, columns);
        }
        return;
    };
    if map.dx_col == FixedMap::ONE && map.dy_col == 0 {
        shift_rows(&src.data, (width, height), &map, &mut dst.data);
        return;
    }
    match (src.rgb(), dst.rgb_mut()) {
        (Some(src), Some(dst)) => gather_rgb(src, (width, height), &map, dst),
        _ => gather_gray(&src.data, (width, height), &map, &mut dst.data),
    }
}

/// `dst` becomes `src` turned counter-clockwise by `degrees` about its centre, at the same size.
/// See [`super::super::geometry::rotate`].
pub fn rotate(src: &Planes, degrees: f64, dst: &mut Planes, columns: &mut Vec<i32>) {
    let Planes { width, height, channels, .. } = *src;
    let turn = turn_of(degrees, width, height);
    if let Turn::By(matrix) = turn {
        affine(src, &matrix, dst, columns);
        return;
    }
    dst.reshape(width, height, channels);
    for (src, dst) in src.planes().zip(dst.planes_mut()) {
        match turn {
            Turn::Quarter { counter_clockwise } => {
                quarter_turn_plane(src, width, counter_clockwise, dst);
            }
            Turn::None | Turn::Half | Turn::By(_) => dst.copy_from_slice(src),
        }
        if turn == Turn::Half {
            dst.reverse();
        }
    }
}

/// The columns of a row whose source lies inside, and the coordinates of the first of them.
struct Run {
    first: usize,
    end: usize,
    x: i64,
    y: i64,
}

/// The part `first..end` of `0..n` where `0 <= start + i * step < limit`.
///
/// `per_step` is about `1 / step`; the ends are put right exactly.
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "a guess, cut to the range")]
fn span(start: i64, step: i64, per_step: f64, limit: i64, n: usize) -> (usize, usize) {
    let is_inside = |i: i64| (0..limit).contains(&(start + i * step));
    let n = i64::try_from(n).expect("image sides fit");
    if is_inside(0) && is_inside(n - 1) {
        return (0, usize::try_from(n).expect("not negative"));
    }
    let (mut first, mut end) = if step == 0 {
        (0, if is_inside(0) { n } else { 0 })
    } else {
        let (a, b) = (-start as f64 * per_step, (limit - start) as f64 * per_step);
        let guess = |at: f64| (at as i64).clamp(0, n);
        (guess(a.min(b)), guess(a.max(b)))
    };
    while first > 0 && is_inside(first - 1) {
        first -= 1;
    }
    while first < end && !is_inside(first) {
        first += 1;
    }
    while end < n && is_inside(end) {
        end += 1;
    }
    while end > first && !is_inside(end - 1) {
        end -= 1;
    }
    (usize::try_from(first).expect("not negative"), usize::try_from(end).expect("not negative"))
}

/// The rows of an image, each with its run.
#[inline]
fn runs(map: &FixedMap, (width, height): (usize, usize)) -> impl Iterator<Item = Run> {
    let per_step = |step: i32| 1.0 / f64::from(step);
    let (per_x, per_y) = (per_step(map.dx_col), per_step(map.dy_col));
    let limit = |side: usize| i64::try_from(side << FixedMap::BITS).expect("image sides fit");
    let (x_limit, y_limit) = (limit(width), limit(height));
    let (dx, dy) = (i64::from(map.dx_col), i64::from(map.dy_col));
    let (mut x_row, mut y_row) = (i64::from(map.x), i64::from(map.y));
    (0..height).map(move |_| {
        let (x_first, x_end) = span(x_row, dx, per_x, x_limit, width);
        let (y_first, y_end) = span(y_row, dy, per_y, y_limit, width);
        let first = x_first.max(y_first);
        let end = x_end.min(y_end).max(first);
        let skipped = i64::try_from(first).expect("image sides fit");
        let run = Run { first, end, x: x_row + skipped * dx, y: y_row + skipped * dy };
        x_row += i64::from(map.dx_row);
        y_row += i64::from(map.dy_row);
        run
    })
}

/// Pixels whose sources are found at once.
const BLOCK: usize = 32;

/// Source positions of the pixels from `skipped` on of a run, for a block of them.
#[inline(always)]
#[allow(clippy::inline_always, reason = "the body must take its caller's instructions")]
#[allow(clippy::cast_possible_truncation, reason = "positions in an image that lies in memory")]
fn sources(run: &Run, skipped: usize, map: &FixedMap, width: usize) -> [u32; BLOCK] {
    let (dx, dy) = (map.dx_col.cast_unsigned(), map.dy_col.cast_unsigned());
    let skipped = skipped as u32;
    let (x, y) = (run.x as u32, run.y as u32);
    let mut found = [0; BLOCK];
    for (at, found) in (skipped..).zip(&mut found) {
        let x = x.wrapping_add(at.wrapping_mul(dx)) >> FixedMap::BITS;
        let y = y.wrapping_add(at.wrapping_mul(dy)) >> FixedMap::BITS;
        *found = y * width as u32 + x;
    }
    found
}

for_levels! {
    fn gather_rgb(src: [&[u8]; 3], size: (usize, usize), map: &FixedMap, dst: [&mut [u8]; 3]) {
        let width = size.0;
        let n_pixels = src[0].len();
        let [red, green, blue] = src.map(|plane| &plane[..n_pixels]);
        let [out_red, out_green, out_blue] = dst;
        for (row, run) in runs(map, size).enumerate() {
            let at = row * width + run.first..row * width + run.end;
            let out_red = out_red[at.clone()].chunks_mut(BLOCK);
            let out_green = out_green[at.clone()].chunks_mut(BLOCK);
            let out = out_red.zip(out_green).zip(out_blue[at].chunks_mut(BLOCK));
            for (block, ((out_red, out_green), out_blue)) in out.enumerate() {
                let from = sources(&run, block * BLOCK, map, width);
                let out = out_red.iter_mut().zip(out_green).zip(out_blue);
                for (((r, g), b), from) in out.zip(from) {
                    let from = from as usize;
                    (*r, *g, *b) = (red[from], green[from], blue[from]);
                }
            }
        }
    }
}

for_levels! {
    fn gather_gray(src: &[u8], size: (usize, usize), map: &FixedMap, dst: &mut [u8]) {
        let width = size.0;
        for (row, run) in runs(map, size).enumerate() {
            let out = &mut dst[row * width + run.first..row * width + run.end];
            for (block, out) in out.chunks_mut(BLOCK).enumerate() {
                let from = sources(&run, block * BLOCK, map, width);
                for (out, from) in out.iter_mut().zip(from) {
                    *out = src[from as usize];
                }
            }
        }
    }
}

for_levels! {
    /// Rows of all planes that are only moved sideways, as by a horizontal shear.
    fn shift_rows(src: &[u8], size: (usize, usize), map: &FixedMap, dst: &mut [u8]) {
        let (width, height) = size;
        for (row, run) in runs(map, size).enumerate() {
            let n = run.end - run.first;
            if n == 0 {
                continue;
            }
            let [x, y] = [run.x, run.y].map(|at| {
                usize::try_from(at >> FixedMap::BITS).expect("the run's pixels lie inside")
            });
            let planes = src.chunks_exact(width * height).zip(dst.chunks_exact_mut(width * height));
            for (src, dst) in planes {
                copy_row(&src[y * width + x..][..n], &mut dst[row * width + run.first..][..n]);
            }
        }
    }
}
