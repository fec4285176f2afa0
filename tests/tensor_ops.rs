//! The tensor path against the CPU path and Pillow, bit for bit, on libtorch's CPU device; on a GPU
//! as well where there is one (`make test-gpu`).

#![cfg(feature = "torch")]

mod ops_support;
mod torch_support;

use std::collections::BTreeMap;

use fastaa::augment::{Scratch, Step, apply_action, cutout_area};
use fastaa::image::draw::fill_box;
use fastaa::image::geometry::{Layout, crop_into, flip_horizontal};
use fastaa::image::hsv::shift_hue;
use fastaa::image::sources::Sources;
use fastaa::image::{CropRect, Image};
use fastaa::random::{Purpose, SampleRng};
use fastaa::tensor::{Finish, augment, gather};
use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

use ops_support::random_image_of;
use ops_support::{Case, Record, Records, below, judge, random_action, random_image};
use torch_support::test_device;

/// Images of one shape that go through the tensor path together.
const BATCH: usize = 48;
const N_BATCHES: u64 = 150;

fn to_i64(value: usize) -> i64 {
    i64::try_from(value).expect("small")
}

/// Images of one shape as one tensor, `[n, channels, height, width]`.
fn batch(images: &[&Image]) -> Tensor {
    let Image { width, height, channels, .. } = *images[0];
    let bytes: Vec<u8> = images.iter().flat_map(|image| &image.data).copied().collect();
    let size = [to_i64(images.len()), to_i64(height), to_i64(width), to_i64(channels)];
    Tensor::from_slice(&bytes)
        .view(size)
        .permute([0, 3, 1, 2])
        .contiguous()
        .to_device(test_device())
}

/// The bytes of each image of a batch, interleaved.
fn unbatch(images: &Tensor) -> Vec<Vec<u8>> {
    assert_eq!(images.kind(), Kind::Uint8);
    let images = images.permute([0, 2, 3, 1]).contiguous().to_device(Device::Cpu);
    let n_bytes = images.get(0).numel();
    let bytes = Vec::<u8>::try_from(images.view([-1])).expect("bytes");
    bytes.chunks_exact(n_bytes).map(<[u8]>::to_vec).collect()
}

/// Each with random words of its own: one stream of them does not last for a batch.
fn random_images(number: u64, size: (usize, usize), channels: usize) -> Vec<Image> {
    let rng = |epoch| SampleRng::new(7, epoch, number, Purpose::Crop);
    (0..BATCH as u64).map(|at| random_image_of(&mut rng(at), size, channels)).collect()
}

fn check(records: &Records, cases: &mut Vec<Case>) -> Vec<String> {
    let images: Vec<_> = cases.iter().map(|case| &records.images[case.image].0).collect();
    let steps: Vec<_> = cases
        .iter()
        .zip(&images)
        .map(|(case, image)| vec![Step::Act(case.action(image))])
        .collect();
    let found = unbatch(&augment(&batch(&images), &steps).expect("augments"));
    let compared = cases.drain(..).zip(found);
    let differing = compared.filter(|(case, found)| case.expected != *found);
    differing.map(|(case, found)| case.describe(&records.images[case.image], &found)).collect()
}

#[test]
fn every_operation_equals_pillow_and_torchvision_byte_for_byte() {
    let mut records = Records::start();
    let (mut n_cases, mut differences) = (0_u64, Vec::new());
    let mut waiting: BTreeMap<(usize, usize, usize), Vec<Case>> = BTreeMap::new();
    let announced = loop {
        let case = match records.read() {
            Record::Case(case) => case,
            Record::End { n_cases } => break n_cases,
        };
        n_cases += 1;
        let Image { width, height, channels, .. } = records.images[case.image].0;
        let cases = waiting.entry((width, height, channels)).or_default();
        cases.push(case);
        if cases.len() == BATCH {
            differences.extend(check(&records, cases));
        }
    };
    for cases in waiting.values_mut().filter(|cases| !cases.is_empty()) {
        differences.extend(check(&records, cases));
    }
    judge(n_cases, announced, &differences);
}

#[test]
fn sequences_of_operations_equal_those_of_the_plain_kernels() {
    let mut scratch = Scratch::default();
    for number in 0..N_BATCHES {
        let mut rng = SampleRng::new(5, 0, number, Purpose::Policy);
        let first = random_image(&mut rng);
        let size = (first.width, first.height);
        let images = random_images(number, size, first.channels);
        let (mut steps, mut expected) = (Vec::new(), Vec::new());
        for image in &images {
            let mut image = image.clone();
            let mut own = Vec::new();
            for _ in 0..rng.below(6) {
                let action = random_action(&mut rng, size);
                apply_action(&mut image, &mut scratch, &action);
                own.push(Step::Act(action));
            }
            if rng.coin() {
                let shift = u8::try_from(rng.below(256)).expect("a byte");
                shift_hue(&mut image, shift);
                own.push(Step::Hue(shift));
            }
            if rng.coin() {
                let (x, y) = (below(&mut rng, 200), below(&mut rng, 200));
                let (area, fill) = (cutout_area(x, y, below(&mut rng, 99)), [7, 8, 9]);
                fill_box(&mut image, area, fill);
                own.push(Step::Fill(area, fill));
            }
            steps.push(own);
            expected.push(image);
        }
        let given = batch(&images.iter().collect::<Vec<_>>());
        let found = unbatch(&augment(&given, &steps).expect("augments"));
        for ((found, expected), own) in found.iter().zip(&expected).zip(&steps) {
            assert!(*found == expected.data, "batch {number}, {size:?}: {own:?}");
        }
        let untouched = unbatch(&given);
        assert!(untouched.iter().zip(&images).all(|(bytes, image)| *bytes == image.data));
    }
}

#[test]
fn crops_mirrored_or_not_are_those_of_the_plain_kernels() {
    for number in 0..N_BATCHES {
        let mut rng = SampleRng::new(6, 0, number, Purpose::Crop);
        let first = random_image(&mut rng);
        let Image { width, height, channels, .. } = first;
        let mut side = |of: usize| 1 + below(&mut rng, u32::try_from(of + 6).expect("small"));
        let (out_width, out_height) = (side(width), side(height));
        let (mut images, mut sources, mut expected) = (Vec::new(), Vec::new(), Vec::new());
        for image in random_images(number, (width, height), channels) {
            let mut start = |of: usize| {
                let reach = u32::try_from(of + 6).expect("small");
                i64::from(rng.below(2 * reach)) - i64::from(reach)
            };
            let (x, y) = (start(width), start(height));
            let rect = CropRect { x, y, width: out_width, height: out_height };
            let flip = rng.coin();
            let mut cropped = Image::default();
            crop_into(&image.data, Layout::Hwc, width, height, channels, rect, &mut cropped);
            if flip {
                flip_horizontal(&mut cropped);
            }
            sources.push(Sources::of_crop(rect, flip, (width, height)));
            images.push(image);
            expected.push(cropped);
        }
        let given = batch(&images.iter().collect::<Vec<_>>());
        let found = gather(&given, &sources, (out_width, out_height)).expect("gathers");
        let found = unbatch(&found);
        assert!(found.iter().zip(&expected).all(|(found, expected)| *found == expected.data));
    }
}

#[test]
fn values_are_the_definition_in_every_kind_and_layout() {
    let norms = [(0.4914_f32, 0.247_f32), (0.485, 0.229), (0.5, 1e-3)];
    let value = |byte: usize, (mean, std): (f32, f32)| ((byte as f32 / 255.0) - mean) / std;
    let tables = norms.map(|norm| std::array::from_fn(|byte| value(byte, norm)));
    let bytes: Vec<u8> = (0..=255).collect();
    let plane = Tensor::from_slice(&bytes).view([1, 1, 16, 16]);
    let images = Tensor::cat(&[&plane, &plane.flip([3]), &plane.flip([2])], 1);
    let images = Tensor::cat(&[&images, &images.flip([1])], 0).to_device(test_device());
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        for channels_last in [false, true] {
            let finish = Finish::new(&tables, kind, channels_last, test_device()).expect("a table");
            let found = finish.run(&images).expect("finishes");
            assert!(found.is_contiguous() && found.kind() == kind);
            let found = if channels_last { found.permute([0, 3, 1, 2]) } else { found };
            assert_eq!(found.size(), [2, 3, 16, 16]);
            let found = found.to_kind(Kind::Float).contiguous().view([-1]);
            let found = Vec::<f32>::try_from(found.to_device(Device::Cpu)).expect("floats");
            let given = images.contiguous().view([-1]).to_device(Device::Cpu);
            let given = Vec::<u8>::try_from(given).expect("bytes");
            for (at, (found, byte)) in found.iter().zip(given).enumerate() {
                let exact = tables[at / 256 % 3][usize::from(byte)];
                let expected = match kind {
                    Kind::Half => f16::from_f32(exact).to_f32(),
                    Kind::BFloat16 => bf16::from_f32(exact).to_f32(),
                    _ => exact,
                };
                assert_eq!(found.to_bits(), expected.to_bits(), "{kind:?} {channels_last} {at}");
            }
        }
    }
    let whole = [std::array::from_fn(|byte| byte as f32); 3];
    let finish = Finish::new(&whole, Kind::Uint8, false, test_device()).expect("a table");
    assert_eq!(finish.run(&images).expect("finishes"), images);
}
