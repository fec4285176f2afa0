//! What a sample takes from the allocator once buffers have grown: nothing, but for what the
//! resizing crate takes for its coefficients. (libjpeg-turbo's own memory is C's and not counted.)
#![allow(clippy::unwrap_used, reason = "test code, but not all in a #[test]")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use fastaa::augment::PreparedPolicy;
use fastaa::dataset::{
    Content, Fingerprint, ImageKind, Label, LabelKind, Pixels, RawImage, Sample, SplitInfo,
};
use fastaa::image::decode::DecodeLimits;
use fastaa::pipeline::recipe::Recipe;
use fastaa::pipeline::render::{CompiledRecipe, RenderScratch, SampleKey};
use fastaa::policy::load_reference;

/// What `fast_image_resize` takes for the coefficients of one image: a list for each column and row
/// of the result, and some for all of them.
const RESIZING_MAX: usize = 2 * SIDE + 16;
const SIDE: usize = 64;

struct Counting;

static N_TAKEN: AtomicUsize = AtomicUsize::new(0);

#[allow(unsafe_code, reason = "an allocator that counts has to be one")]
// SAFETY: everything is the system allocator's own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        N_TAKEN.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        N_TAKEN.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations per sample after an epoch of warming up, the most of any sample.
fn most_taken(recipe: &str, images: ImageKind, content: Content<'_>) -> usize {
    let recipe: Recipe = serde_json::from_str(recipe).unwrap();
    let info = SplitInfo {
        format: "memory",
        n_samples: 2000,
        images,
        label_kind: LabelKind::Class { n_classes: 10 },
        class_names: Vec::new(),
        fingerprint: Fingerprint("none".to_owned()),
        mapped_bytes: 0,
    };
    let compiled = CompiledRecipe::new(&recipe, &info, DecodeLimits::default()).unwrap();
    let policy = PreparedPolicy::new(&load_reference("autoaugment-cifar10").unwrap());
    let sample = Sample { content, label: Label::Class(0) };
    let mut scratch = RenderScratch::default();
    let mut out = vec![0; compiled.shape().pixel_bytes()];
    let mut most = 0;
    for epoch in 0..2 {
        most = 0;
        for sample_idx in 0..info.n_samples {
            let key = SampleKey { seed: 1, epoch, sample_idx };
            let before = N_TAKEN.load(Ordering::Relaxed);
            compiled.render(&sample, &policy, key, &mut scratch, &mut out).unwrap();
            most = most.max(N_TAKEN.load(Ordering::Relaxed) - before);
        }
    }
    most
}

/// One test: another one's thread would be counted as well.
#[test]
fn a_sample_takes_no_memory() {
    let pixels: Vec<u8> = (0..32 * 32 * 3).map(|at: u32| (at * 167 % 251) as u8).collect();
    for pixels in [Pixels::Hwc(&pixels), Pixels::Chw(&pixels)] {
        let raw = Content::Raw(RawImage { width: 32, height: 32, channels: 3, pixels });
        let kind = ImageKind::Raw { width: 32, height: 32, channels: 3 };
        for dtype in ["u8", "f16", "f32"] {
            let recipe = format!(
                r#"{{"crop": {{"kind": "pad", "size": 32, "pad": 4}}, "hflip": true,
                    "cutout": 16, "dtype": "{dtype}"}}"#
            );
            assert_eq!(most_taken(&recipe, kind, raw), 0, "{dtype}");
        }
    }

    let mut file = Vec::new();
    let picture = image::RgbImage::from_fn(320, 240, |x, y| {
        image::Rgb([x.to_le_bytes()[0], y.to_le_bytes()[0], 99])
    });
    let mut encoder = image::codecs::jpeg::JpegEncoder::new(&mut file);
    encoder.encode_image(&picture).unwrap();
    let jpeg = Content::Encoded(&file);
    let kind = ImageKind::Encoded { turns_by_exif: false };
    let center = r#"{"crop": {"kind": "center", "size": 224}, "hflip": true}"#;
    assert_eq!(most_taken(center, kind, jpeg), 0);
    let resized =
        format!(r#"{{"crop": {{"kind": "random-resized", "size": {SIDE}}}, "hflip": true}}"#);
    let n_taken = most_taken(&resized, kind, jpeg);
    assert!(n_taken <= RESIZING_MAX, "{n_taken} for one sample");
}
