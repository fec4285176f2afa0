//! The plan compiler and its planar kernels against the plain ones, bit for bit, with each set of
//! vector instructions that this machine has.

mod ops_support;

use std::collections::BTreeSet;

use fastaa::augment::{Canvas, Scratch, apply_action};
use fastaa::image::geometry::{Layout, crop_into, flip_horizontal};
use fastaa::image::planar::Planes;
use fastaa::image::planar::read::RawPixels;
use fastaa::image::simd::{self, Level};
use fastaa::image::{CropRect, Image, PADDED};
use fastaa::random::{Purpose, SampleRng};

use ops_support::{below, random_action, random_image};

const LEVELS: [Level; 3] = [Level::Scalar, Level::Avx2, Level::Avx512];
const N_CASES: u64 = 6000;

/// The levels of this machine.
fn levels() -> Vec<Level> {
    let found: BTreeSet<Level> = LEVELS.map(simd::limit).into();
    found.into_iter().collect()
}

fn interleaved(planes: &Planes) -> Image {
    let Planes { width, height, channels, ref data } = *planes;
    let n_pixels = width * height;
    let at = |byte: usize| data[byte % channels * n_pixels + byte / channels];
    let data = (0..n_pixels * channels).map(at).collect();
    Image { width, height, channels, data }
}

/// The same picture with a fourth byte to each pixel, which nobody must look at.
fn padded(image: &Image) -> Image {
    let pixels = image.data.as_chunks::<3>().0.iter();
    let data = pixels.flat_map(|&[r, g, b]| [r, g, b, r ^ g ^ b]).collect();
    Image { channels: PADDED, data, ..*image }
}

#[test]
fn operations_joined_on_a_canvas_equal_them_one_by_one() {
    for level in levels() {
        assert_eq!(simd::limit(level), level);
        let (mut canvas, mut scratch) = (Canvas::default(), Scratch::default());
        for case in 0..N_CASES {
            let mut rng = SampleRng::new(1, 0, case, Purpose::Policy);
            let mut expected = random_image(&mut rng);
            let size = (expected.width, expected.height);
            let whole = CropRect { x: 0, y: 0, width: size.0, height: size.1 };
            RawPixels::from(&expected).read(whole, false, canvas.start());
            let n_actions = rng.below(6);
            let actions: Vec<_> = (0..n_actions).map(|_| random_action(&mut rng, size)).collect();
            for action in &actions {
                apply_action(&mut expected, &mut scratch, action);
                canvas.apply(action);
            }
            let found = interleaved(canvas.finished());
            assert!(found == expected, "{level:?}, case {case}, {size:?}: {actions:?}");
        }
    }
}

#[test]
fn crops_are_read_from_either_order_mirrored_or_not() {
    for level in levels() {
        simd::limit(level);
        let mut planes = Planes::default();
        for case in 0..N_CASES {
            let mut rng = SampleRng::new(2, 0, case, Purpose::Crop);
            let image = random_image(&mut rng);
            let Image { width, height, channels, .. } = image;
            let mut offset = |side: usize| {
                let reach = u32::try_from(side + 6).unwrap();
                (i64::from(rng.below(2 * reach)) - i64::from(reach), 1 + below(&mut rng, reach))
            };
            let ((x, part_width), (y, part_height)) = (offset(width), offset(height));
            let rect = CropRect { x, y, width: part_width, height: part_height };
            let (layout, flip) = (if rng.coin() { Layout::Hwc } else { Layout::Chw }, rng.coin());
            let bytes = &image.data;
            let mut expected = Image::default();
            crop_into(bytes, layout, width, height, channels, rect, &mut expected);
            if flip {
                flip_horizontal(&mut expected);
            }
            let raw = RawPixels { bytes, layout, width, height, channels };
            raw.read(rect, flip, &mut planes);
            assert!(interleaved(&planes) == expected, "{level:?}, case {case}: {rect:?} {flip}");
            if channels == 3 && layout == Layout::Hwc {
                let image = padded(&image);
                RawPixels::from(&image).read(rect, flip, &mut planes);
                assert!(interleaved(&planes) == expected, "{level:?}, case {case}: padded");
            }
        }
    }
}

/// Every byte in every lane, through tables that tell all bytes apart.
#[test]
fn tables_are_looked_up_right_for_every_byte_and_length() {
    let table = std::array::from_fn(|byte| u8::try_from((byte * 167 + 13) % 256).unwrap());
    for level in levels() {
        simd::limit(level);
        for len in (0..200).chain([1023, 1024, 1025]) {
            for start in [0_u8, 1, 77, 200] {
                let bytes: Vec<u8> = (start..=255).chain(0..=255).cycle().take(len).collect();
                let mut found = bytes.clone();
                fastaa::image::planar::lut::apply(&mut found, &table);
                let expected: Vec<u8> = bytes.iter().map(|&b| table[usize::from(b)]).collect();
                assert_eq!(found, expected, "{level:?}, {len} bytes");
            }
        }
    }
}
