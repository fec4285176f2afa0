//! Batches in two halves, loaded by the processors and finished by the tensor path, against those
//! that the processors make alone, byte for byte.

#![cfg(feature = "torch")]
#![allow(clippy::unwrap_used, reason = "test code, but not all in a #[test]")]

mod dataset_support;
mod torch_support;

use fastaa::augment::PreparedPolicy;
use fastaa::dataset::{Content, ImageKind, Label, Sample, Split, SplitInfo};
use fastaa::gpu::{FinishPlace, Where};
use fastaa::image::decode::DecodeLimits;
use fastaa::pipeline::on_device::{FinishOnDevice, loading_half};
use fastaa::pipeline::recipe::Recipe;
use fastaa::pipeline::render::{CompiledRecipe, RenderScratch, SampleKey};
use fastaa::pipeline::tensor_finish::TensorFinish;
use fastaa::policy::load_reference;
use serde_json::json;
use tch::{Device, Tensor};

use dataset_support::{Labels, MemorySplit, noise};
use torch_support::test_device;

const N: u64 = 40;
const POLICIES: [&str; 4] = ["none", "autoaugment-cifar10", "trivial-wide", "randaugment(3,9)"];

const SEED: u64 = 9;

/// Whose memory that of the test's device is.
fn place() -> Where {
    match test_device() {
        Device::Cuda(ordinal) => Where::Gpu(ordinal),
        _ => Where::Host,
    }
}

fn to_device(bytes: &[u8]) -> Tensor {
    Tensor::from_slice(bytes).to_device(test_device())
}

fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    Vec::try_from(tensor.to_device(Device::Cpu)).unwrap()
}

/// All samples of an epoch, as the processors make them.
fn rendered(
    recipe: &CompiledRecipe,
    samples: &[Sample<'_>],
    policy: &PreparedPolicy,
    epoch: u64,
) -> Vec<u8> {
    let n_bytes = recipe.shape().pixel_bytes();
    let (mut bytes, mut scratch) = (vec![0; samples.len() * n_bytes], RenderScratch::default());
    for ((sample_idx, sample), out) in (0_u64..).zip(samples).zip(bytes.chunks_exact_mut(n_bytes)) {
        let key = SampleKey { seed: SEED, epoch, sample_idx };
        recipe.render(sample, policy, key, &mut scratch, out).unwrap();
    }
    bytes
}

/// Makes `samples` both ways, with every policy; skips one of them on the device, as
/// `on_error = "skip"` does with damaged ones. Gives how often there were two halves.
fn compare(recipe: &serde_json::Value, info: &SplitInfo, samples: &[Sample<'_>]) -> usize {
    const SKIPPED: usize = 3;
    let mut n_compared = 0;
    for name in POLICIES {
        let recipe =
            Recipe { policy: name.to_owned(), ..serde_json::from_value(recipe.clone()).unwrap() };
        let compile = |recipe| CompiledRecipe::new(recipe, info, DecodeLimits::default()).unwrap();
        let Some(half) = loading_half(&recipe) else { continue };
        let (whole, half) = (compile(&recipe), compile(&half));
        let n_skipped_bytes = whole.shape().pixel_bytes();
        let finish = TensorFinish::new(compile(&recipe), SEED);
        assert_eq!(finish.shape(), whole.shape());
        let policy = PreparedPolicy::new(&load_reference(name).unwrap());
        let mut marks: Vec<i64> = (0..).take(samples.len()).collect();
        marks[SKIPPED] = -1 - marks[SKIPPED];
        for epoch in 0..2 {
            let expected = rendered(&whole, samples, &policy, epoch);
            let loaded = rendered(&half, samples, &PreparedPolicy::default(), epoch);
            let source = to_device(&loaded);
            let target = to_device(&vec![0xA5; expected.len()]);
            let (source_at, target_at) =
                (source.data_ptr().expose_provenance(), target.data_ptr().expose_provenance());
            let place = FinishPlace { at: place(), source: source_at, target: target_at };
            finish.finish(&policy, epoch, &marks, place).unwrap();
            let found = bytes_of(&target);
            let (skipped, after) = (SKIPPED * n_skipped_bytes, (SKIPPED + 1) * n_skipped_bytes);
            assert!(found[..skipped] == expected[..skipped], "{recipe:?}");
            assert!(found[after..] == expected[after..], "{recipe:?}");
            assert!(bytes_of(&source) == loaded, "the slot is only read: {recipe:?}");
            n_compared += 1;
        }
    }
    n_compared
}

fn raw(shape: [usize; 3], planar: bool) -> MemorySplit {
    let n = usize::try_from(N).unwrap();
    let pixels = noise(3, n * shape.iter().product::<usize>());
    MemorySplit::new(shape, planar, pixels, Labels::Classes(vec![0; n]))
}

#[test]
fn raw_images_in_every_order_dtype_and_layout() {
    for (shape, planar) in [([32, 32, 3], false), ([32, 32, 3], true), ([28, 20, 1], false)] {
        let split = raw(shape, planar);
        let mut buffers = vec![Vec::new(); usize::try_from(N).unwrap()];
        let samples: Vec<_> = (0..N)
            .zip(&mut buffers)
            .map(|(sample_idx, buffer)| split.sample(sample_idx, buffer).unwrap())
            .collect();
        let norm = vec![0.4; shape[2]];
        for dtype in ["u8", "f16", "bf16", "f32"] {
            for layout in ["nchw", "nhwc"] {
                let recipe = json!({
                    "crop": {"kind": "pad", "size": shape[1], "pad": 4}, "hflip": true,
                    "cutout": 8, "dtype": dtype, "layout": layout,
                    "normalize": {"mean": norm, "std": norm},
                });
                assert_eq!(compare(&recipe, split.info(), &samples), 2 * POLICIES.len());
            }
        }
        let resized = json!({"crop": {"kind": "random-resized", "size": 24}, "hflip": true});
        assert_eq!(compare(&resized, split.info(), &samples), 2 * POLICIES.len());
    }
}

#[test]
fn files_with_jitter_erasing_and_views() {
    let mut files = Vec::new();
    for at in 0..u32::try_from(N).unwrap() {
        let picture = image::RgbImage::from_fn(90 + at, 70 + 2 * at, |x, y| {
            let byte = |value: u32| value.to_le_bytes()[0];
            image::Rgb([byte(x * 3 + at), byte(y * 2), byte(x * y / 16)])
        });
        let mut file = Vec::new();
        image::codecs::jpeg::JpegEncoder::new(&mut file).encode_image(&picture).unwrap();
        files.push(file);
    }
    let samples: Vec<_> = files
        .iter()
        .map(|file| Sample { content: Content::Encoded(file), label: Label::Class(0) })
        .collect();
    let info = SplitInfo {
        images: ImageKind::Encoded { turns_by_exif: false },
        ..raw([1, 1, 3], false).info().clone()
    };
    for recipe in [
        json!({"crop": {"kind": "random-resized", "size": 48}, "hflip": true, "dtype": "u8"}),
        json!({"crop": {"kind": "center", "size": 40, "resize": 50}, "views": 2, "hflip": true}),
        json!({
            "crop": {"kind": "random-resized", "size": 48}, "layout": "nhwc", "dtype": "f16",
            "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.3},
            "erase": {"p": 0.5}, "views": 3,
        }),
        json!({"crop": {"kind": "random-resized", "size": 32}, "channels": 1, "cutout": 6}),
    ] {
        assert!(compare(&recipe, &info, &samples) >= 2 * (POLICIES.len() - 1));
    }
}
