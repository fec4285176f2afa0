//! The plan compiler and its planar kernels against the plain ones, bit for bit, with each set of
//! vector instructions that this machine has.

use std::collections::BTreeSet;

use fastaa::augment::{Action, Canvas, Scratch, apply_action, resolve};
use fastaa::image::geometry::{Layout, crop_into, flip_horizontal};
use fastaa::image::planar::Planes;
use fastaa::image::planar::read::RawPixels;
use fastaa::image::simd::{self, Level};
use fastaa::image::{CropRect, Image, PADDED};
use fastaa::policy::{Op, OpsProfile};
use fastaa::random::{Purpose, SampleRng};

const LEVELS: [Level; 3] = [Level::Scalar, Level::Avx2, Level::Avx512];
const PROFILES: [OpsProfile; 3] =
    [OpsProfile::Fastaa, OpsProfile::Torchvision, OpsProfile::TrivialWide];
const SIDES: [u32; 14] = [1, 2, 3, 4, 5, 7, 16, 28, 32, 33, 61, 64, 65, 130];
const N_CASES: u64 = 6000;

/// The levels of this machine.
fn levels() -> Vec<Level> {
    let found: BTreeSet<Level> = LEVELS.map(simd::limit).into();
    found.into_iter().collect()
}

fn below(rng: &mut SampleRng, n: u32) -> usize {
    rng.below(n) as usize
}

fn random_image(rng: &mut SampleRng) -> Image {
    let mut side = || SIDES[rng.below(14) as usize] as usize;
    let (width, height) = (side(), side());
    let channels = if rng.coin() { 3 } else { 1 };
    let mut image = Image::black(width, height, channels);
    let (lo, hi) = match rng.below(4) {
        0 => (17, 17),
        1 => (100, 140),
        2 => (0, 1),
        _ => (0, 255),
    };
    image.data.fill_with(|| u8::try_from(lo + rng.below(hi - lo + 1)).expect("a byte"));
    image
}

fn random_action(rng: &mut SampleRng, size: (usize, usize)) -> Action {
    let any = |rng: &mut SampleRng, span: f64| span * (2.0 * rng.unit() - 1.0);
    match rng.below(12) {
        // What no policy draws, but the kernels can do: exact turns, and maps of all three ways.
        0 => Action::Rotate(90.0 * f64::from(rng.below(8)) - 360.0),
        1 => Action::Affine(std::array::from_fn(|n| any(rng, if n % 3 == 2 { 50.0 } else { 2.0 }))),
        2 => Action::Affine([any(rng, 1e3), 1.0, any(rng, 1e5), 0.5, any(rng, 3.0), any(rng, 9.0)]),
        3 => Action::Affine([any(rng, 2.0), 0.0, any(rng, 9.0), 0.0, any(rng, 2.0), 0.0]),
        _ => {
            let op = Op::ALL[below(rng, 15)];
            let profile = PROFILES[below(rng, 3)];
            let lambda = if rng.below(8) == 0 { 1.0 } else { rng.unit() };
            let centre = (rng.unit() * size.0 as f64, rng.unit() * size.1 as f64);
            resolve(op, profile, lambda, rng.coin(), size, centre)
        }
    }
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
