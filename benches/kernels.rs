//! What each operation costs, per image, at each level of vector instructions: the plan compiler on
//! planes, and the plain interleaved kernels that it is tested against ("plain").
//!
//! `cargo bench --no-default-features --bench kernels`, with a part of a name to choose.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use fastaa::augment::{Action, Canvas, PreparedPolicy, Scratch, apply_action};
use fastaa::image::geometry::Layout;
use fastaa::image::planar::read::RawPixels;
use fastaa::image::simd::{self, Level};
use fastaa::image::{CropRect, Image};
use fastaa::policy::load_reference;
use fastaa::random::{Purpose, SampleRng};

const SIDES: [usize; 2] = [32, 224];

/// Smooth colours with some noise: neither constant nor random.
fn picture(side: usize) -> Image {
    let mut image = Image::black(side, side, 3);
    let mut rng = SampleRng::new(1, 0, 0, Purpose::Crop);
    for (at, byte) in image.data.iter_mut().enumerate() {
        let (x, y) = (at / 3 % side, at / 3 / side);
        let value = 60 + (90 * x / side + 70 * y / side) * (1 + at % 3) / 2;
        *byte = u8::try_from(value.min(235)).expect("a byte") + (rng.below(20) & 15) as u8;
    }
    image
}

fn actions() -> Vec<(&'static str, Vec<Action>)> {
    vec![
        ("nothing", vec![]),
        ("invert", vec![Action::Invert]),
        ("solarize+posterize", vec![Action::Solarize(120.0), Action::Posterize(5)]),
        ("autocontrast", vec![Action::AutoContrast]),
        ("equalize", vec![Action::Equalize]),
        ("invert+equalize", vec![Action::Invert, Action::Equalize]),
        ("contrast", vec![Action::Contrast(0.6)]),
        ("color", vec![Action::Color(1.4)]),
        ("sharpness", vec![Action::Sharpness(1.7)]),
        ("shear", vec![Action::Affine([1.0, 0.2, 0.0, 0.0, 1.0, 0.0])]),
        ("rotate", vec![Action::Rotate(17.0)]),
        ("translate", vec![Action::Affine([1.0, 0.0, 5.3, 0.0, 1.0, 0.0])]),
    ]
}

fn operations(criterion: &mut Criterion) {
    for side in SIDES {
        let image = picture(side);
        let whole = CropRect { x: 0, y: 0, width: side, height: side };
        let mut planar = Canvas::default();
        RawPixels::from(&image).read(whole, false, planar.start());
        let planar = planar.planes().data.clone();
        let raw = RawPixels {
            bytes: &planar,
            layout: Layout::Chw,
            width: side,
            height: side,
            channels: 3,
        };
        let mut group = criterion.benchmark_group(format!("{side}x{side}"));
        group.throughput(Throughput::Elements(1));
        for (name, actions) in actions() {
            let (mut scratch, mut work) = (Scratch::default(), image.clone());
            group.bench_function(BenchmarkId::new(name, "plain"), |bencher| {
                bencher.iter(|| {
                    work.data.copy_from_slice(&image.data);
                    for action in black_box(&actions) {
                        apply_action(&mut work, &mut scratch, action);
                    }
                });
            });
            for level in levels() {
                simd::limit(level);
                let mut canvas = Canvas::default();
                group.bench_function(BenchmarkId::new(name, format!("{level:?}")), |bencher| {
                    bencher.iter(|| {
                        raw.read(whole, false, canvas.start());
                        for action in black_box(&actions) {
                            canvas.apply(action);
                        }
                        black_box(canvas.finished());
                    });
                });
            }
        }
        group.finish();
    }
}

/// Reading an image, from either order, mirrored or not.
fn reading(criterion: &mut Criterion) {
    for side in SIDES {
        let image = picture(side);
        let len = i64::try_from(side).expect("small");
        let crop = CropRect { x: 2 - len / 16, y: 1, width: side, height: side };
        let mut group = criterion.benchmark_group(format!("read {side}x{side}"));
        for (name, layout) in [("nhwc", Layout::Hwc), ("nchw", Layout::Chw)] {
            for (flipped, flip) in [("", false), (" mirrored", true)] {
                for level in levels() {
                    simd::limit(level);
                    let mut canvas = Canvas::default();
                    let bytes = &image.data;
                    let raw = RawPixels { bytes, layout, width: side, height: side, channels: 3 };
                    let id = BenchmarkId::new(format!("{name}{flipped}"), format!("{level:?}"));
                    group.bench_function(id, |bencher| {
                        bencher.iter(|| raw.read(black_box(crop), flip, canvas.start()));
                    });
                }
            }
        }
        group.finish();
    }
}

/// Drawing and applying a whole policy, as the streams do.
fn policies(criterion: &mut Criterion) {
    for side in SIDES {
        let image = picture(side);
        let whole = CropRect { x: 0, y: 0, width: side, height: side };
        let mut group = criterion.benchmark_group(format!("policy {side}x{side}"));
        for name in ["autoaugment-cifar10", "trivial-wide", "randaugment(2,9)"] {
            let policy = load_reference(name).expect("built in");
            let prepared = PreparedPolicy::new(&policy);
            for level in levels() {
                simd::limit(level);
                let (mut canvas, mut sample) = (Canvas::default(), 0);
                let (mut drawn, mut steps) = (Vec::new(), Vec::new());
                group.bench_function(BenchmarkId::new(name, format!("{level:?}")), |bencher| {
                    bencher.iter(|| {
                        sample += 1;
                        let mut rng = SampleRng::new(1, 0, sample % 4096, Purpose::Policy);
                        RawPixels::from(&image).read(whole, false, canvas.start());
                        steps.clear();
                        prepared.steps_into((side, side), &mut rng, &mut drawn, &mut steps);
                        for step in &steps {
                            canvas.run(step);
                        }
                        black_box(canvas.finished());
                    });
                });
            }
        }
        group.finish();
    }
}

fn levels() -> Vec<Level> {
    let mut found: Vec<_> = [Level::Scalar, Level::Avx2, Level::Avx512].map(simd::limit).into();
    found.dedup();
    found
}

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(700))
        .sample_size(20)
        .configure_from_args();
    operations(&mut criterion);
    reading(&mut criterion);
    policies(&mut criterion);
    criterion.final_summary();
}
