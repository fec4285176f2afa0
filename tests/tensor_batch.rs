//! Whole batches by the tensor path against those of the CPU path, byte for byte.

#![cfg(feature = "torch")]
#![allow(clippy::unwrap_used, reason = "test code, but not all in a #[test]")]

mod dataset_support;
mod torch_support;

use fastaa::augment::PreparedPolicy;
use fastaa::dataset::{Content, ImageKind, Label, Sample, Split, SplitInfo};
use fastaa::image::decode::DecodeLimits;
use fastaa::pipeline::recipe::Recipe;
use fastaa::pipeline::render::{CompiledRecipe, RenderScratch, SampleKey};
use fastaa::pipeline::tensor_batch::{TensorBatchError, TensorRecipe};
use fastaa::policy::load_reference;
use serde_json::json;
use tch::{Device, Tensor};

use dataset_support::{Labels, MemorySplit, noise};
use torch_support::test_device;

const N: u64 = 40;
const POLICIES: [&str; 4] = ["none", "autoaugment-cifar10", "trivial-wide", "randaugment(3,9)"];

fn compile(recipe: &serde_json::Value, info: &SplitInfo) -> CompiledRecipe {
    let recipe: Recipe = serde_json::from_value(recipe.clone()).unwrap();
    CompiledRecipe::new(&recipe, info, DecodeLimits::default()).unwrap()
}

fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    let tensor = tensor.contiguous().to_device(Device::Cpu);
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

/// Renders `samples` both ways, with every policy.
fn compare(recipe: &serde_json::Value, info: &SplitInfo, samples: &[Sample<'_>]) {
    let compiled = compile(recipe, info);
    let on_device = TensorRecipe::new(&compiled, test_device()).unwrap();
    let mut scratch = RenderScratch::default();
    for name in POLICIES {
        let policy = PreparedPolicy::new(&load_reference(name).unwrap());
        for epoch in 0..2 {
            let keyed: Vec<_> = (0_u64..)
                .zip(samples)
                .map(|(sample_idx, sample)| (*sample, SampleKey { seed: 9, epoch, sample_idx }))
                .collect();
            let mut expected = Vec::new();
            for (sample, key) in &keyed {
                let mut out = vec![0; compiled.shape().pixel_bytes()];
                compiled.render(sample, &policy, *key, &mut scratch, &mut out).unwrap();
                expected.extend(out);
            }
            let found = on_device.render(&compiled, &keyed, &policy, &mut scratch).unwrap();
            assert!(bytes_of(&found) == expected, "{recipe} {name}");
        }
    }
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
                compare(&recipe, split.info(), &samples);
            }
        }
        let resized = json!({"crop": {"kind": "random-resized", "size": 24}, "hflip": true});
        compare(&resized, split.info(), &samples);
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
        compare(&recipe, &info, &samples);
    }
}

#[test]
fn what_cannot_be_made_is_told() {
    let split = raw([8, 8, 3], false);
    let mixed = compile(&json!({"mix": {"mixup": 0.2}}), split.info());
    let error = TensorRecipe::new(&mixed, Device::Cpu).unwrap_err();
    assert!(matches!(error, TensorBatchError::Mix));
    assert!(error.to_string().contains("leave it out of the recipe"), "{error}");

    let info =
        SplitInfo { images: ImageKind::Encoded { turns_by_exif: false }, ..split.info().clone() };
    let recipe = compile(&json!({"crop": {"kind": "random-resized", "size": 8}}), &info);
    let on_device = TensorRecipe::new(&recipe, test_device()).unwrap();
    let sample = Sample { content: Content::Encoded(b"\xFF\xD8\xFFno"), label: Label::Class(0) };
    let keyed = [(sample, SampleKey { seed: 0, epoch: 0, sample_idx: 0 })];
    let policy = PreparedPolicy::default();
    let error = on_device.render(&recipe, &keyed, &policy, &mut RenderScratch::default());
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with("sample 0 of the batch: damaged or cut off"), "{error}");
}
