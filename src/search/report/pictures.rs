//! The candidate's heaviest sub-policies as pictures: sample images and some draws of each.
//!
//! Owns the grids and their PNG files inside the page. *Invariants*: the draws come from the same
//! random words for every sub-policy, so that pictures can be compared; all pictures together stay
//! below [`BYTES_MAX`].

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder as _};

use super::data::ReportInput;
use super::markup::{Element, el, note, paragraph, percent};
use super::policy::shares;
use crate::augment::{PreparedPolicy, Scratch};
use crate::image::Image;
use crate::policy::{Policy, SubPolicy, ops_text};
use crate::random::{Purpose, SampleRng};

/// Sub-policies that are shown.
const SUB_POLICIES_MAX: usize = 12;
/// Sample images in a grid, one per row.
const SAMPLES_MAX: usize = 4;
/// Draws of each image, beside the image itself.
const N_DRAWS: usize = 4;
/// Longest side of an image in a grid, in pixels; larger ones are reduced.
const SIDE_MAX: usize = 48;
/// Between images, in pixels.
const GAP: usize = 2;
/// All pictures together, in bytes of base64.
const BYTES_MAX: usize = 800_000;
/// Keys the draws; any number would do.
const SEED: u64 = 0;

pub(super) fn section(input: &ReportInput) -> Vec<Element> {
    let Ok(policy) = input.candidate() else { return Vec::new() };
    let samples: Vec<&Image> =
        input.samples.iter().filter(|image| is_sound(image)).take(SAMPLES_MAX).collect();
    if samples.is_empty() {
        return Vec::new();
    }
    let mut figures = Vec::new();
    let mut n_bytes = 0;
    let shares = shares(&policy);
    let with_ops = shares.iter().enumerate().filter(|(_, (_, sub))| !sub.ops.is_empty());
    for (idx, (share, sub_policy)) in with_ops.take(SUB_POLICIES_MAX) {
        let Some(data) = picture(&policy, sub_policy, &samples) else { continue };
        n_bytes += data.len();
        if n_bytes > BYTES_MAX {
            break;
        }
        let text = ops_text(&sub_policy.ops);
        let caption = format!("No. {}, weight {}: {text}", idx + 1, percent(*share));
        let image = el("img")
            .attr("src", format!("data:image/png;base64,{data}"))
            .attr("alt", format!("Sample images under {text}"));
        figures.push(el("figure").add(image).add(el("figcaption").text(caption)));
    }
    if figures.is_empty() {
        return vec![paragraph("The candidate has no sub-policy that changes an image.")];
    }
    let n_shown = figures.len();
    let more =
        format!("The {n_shown} heaviest of {} sub-policies, without identities.", shares.len());
    vec![
        paragraph(format!(
            "Sample images at the left, and {N_DRAWS} draws of each sub-policy beside them. An \
             operation is left out as often as its probability says, so some draws change nothing. \
             The recipe’s crop and flip are not applied.",
        )),
        el("div").class("pictures").add_all(figures),
        note(more),
    ]
}

/// Whether an image's bytes fit its shape.
fn is_sound(image: &Image) -> bool {
    let n_bytes = image
        .width
        .checked_mul(image.height)
        .and_then(|n_pixels| n_pixels.checked_mul(image.channels));
    let has_size = image.width > 0 && image.height > 0;
    has_size && matches!(image.channels, 1 | 3) && n_bytes == Some(image.data.len())
}

/// A grid of the samples and their draws, as PNG in base64.
fn picture(policy: &Policy, sub_policy: &SubPolicy, samples: &[&Image]) -> Option<String> {
    let one = [sub_policy.clone()];
    let prepared = PreparedPolicy::from_parts(policy.ops_profile(), 1, &one);
    let mut scratch = Scratch::default();
    let mut rows = Vec::with_capacity(samples.len());
    for (idx, sample) in (0..).zip(samples) {
        let mut row = vec![reduced(sample)];
        for draw in 0..N_DRAWS as u64 {
            let mut image = (*sample).clone();
            let mut rng = SampleRng::new(SEED, draw, idx, Purpose::Policy);
            prepared.augment(&mut image, &mut scratch, &mut rng);
            row.push(reduced(&image));
        }
        rows.push(row);
    }
    png(&grid(&rows)).map(|bytes| base64(&bytes))
}

/// An image whose longer side is at most [`SIDE_MAX`], as means over squares of pixels.
fn reduced(image: &Image) -> Image {
    let factor = image.width.max(image.height).div_ceil(SIDE_MAX);
    if factor <= 1 {
        return image.clone();
    }
    let (width, height) = (image.width.div_ceil(factor), image.height.div_ceil(factor));
    let mut small = Image::black(width, height, image.channels);
    for (idx, value) in small.data.iter_mut().enumerate() {
        let (pixel, channel) = (idx / image.channels, idx % image.channels);
        let (x0, y0) = (pixel % width * factor, pixel / width * factor);
        let (x1, y1) = ((x0 + factor).min(image.width), (y0 + factor).min(image.height));
        let mut sum = 0;
        for y in y0..y1 {
            for x in x0..x1 {
                sum += usize::from(image.data[(y * image.width + x) * image.channels + channel]);
            }
        }
        let n_pixels = (x1 - x0) * (y1 - y0);
        *value = u8::try_from((sum + n_pixels / 2) / n_pixels).expect("a mean of bytes is a byte");
    }
    small
}

/// Images side by side on middle gray, in cells of one size; in colour if one of them is.
fn grid(rows: &[Vec<Image>]) -> Image {
    let images = || rows.iter().flatten();
    let side = |size: fn(&Image) -> usize| images().map(size).max().unwrap_or(1) + GAP;
    let (cell_width, cell_height) = (side(|image| image.width), side(|image| image.height));
    let n_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let channels = images().map(|image| image.channels).max().unwrap_or(1);
    let (width, height) = (n_columns * cell_width - GAP, rows.len() * cell_height - GAP);
    let mut out = Image::black(width, height, channels);
    out.data.fill(128);
    for (row, images) in rows.iter().enumerate() {
        for (column, image) in images.iter().enumerate() {
            let (left, top) = (column * cell_width, row * cell_height);
            for (idx, pixel) in image.data.chunks_exact(image.channels).enumerate() {
                let (x, y) = (left + idx % image.width, top + idx / image.width);
                let at = (y * width + x) * channels;
                for channel in 0..channels {
                    out.data[at + channel] = pixel[channel.min(image.channels - 1)];
                }
            }
        }
    }
    out
}

fn png(image: &Image) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let colour = if image.channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
    let (width, height) = (u32::try_from(image.width).ok()?, u32::try_from(image.height).ok()?);
    PngEncoder::new_with_quality(&mut bytes, CompressionType::Best, FilterType::Adaptive)
        .write_image(&image.data, width, height, colour)
        .ok()?;
    Some(bytes)
}

/// RFC 4648, section 4, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |idx: usize| usize::from(chunk.get(idx).copied().unwrap_or_default());
        let word = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let value = word >> (18 - 6 * digit) & 63;
            text.push(if digit <= chunk.len() { char::from(DIGITS[value]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        let expected = ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"];
        for (n, text) in expected.iter().enumerate() {
            assert_eq!(base64(&b"foobar"[..n]), *text);
        }
        assert_eq!(base64(&[0xFB, 0xFF, 0xFE]), "+//+");
    }

    #[test]
    fn large_images_are_reduced_to_means() {
        let mut image = Image::black(97, 50, 3);
        image.data.fill(10);
        image.data[0] = 100;
        let small = reduced(&image);
        // Three pixels a side: 97 / 48 rounded up.
        assert_eq!((small.width, small.height), (33, 17));
        assert_eq!(small.data[0], (8 * 10 + 100) / 9);
        assert!(small.data[1..].iter().all(|&value| value == 10));
    }

    #[test]
    fn a_grid_of_gray_and_colour_is_colour() {
        let gray = Image { width: 2, height: 1, channels: 1, data: vec![7, 9] };
        let rgb = Image { width: 1, height: 2, channels: 3, data: vec![1, 2, 3, 4, 5, 6] };
        let grid = grid(&[vec![gray, rgb]]);
        assert_eq!((grid.width, grid.height, grid.channels), (6, 2, 3));
        assert_eq!(grid.data[..6], [7, 7, 7, 9, 9, 9]);
        assert_eq!(grid.data[12..15], [1, 2, 3]);
        assert_eq!(grid.data[15..18], [128; 3]);
    }
}
