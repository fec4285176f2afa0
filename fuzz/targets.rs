//! What is fuzzed: every parser of foreign bytes below the sockets.
//!
//! A target has a few whole files to begin with, and a function that must not panic on any bytes;
//! errors are fine. Included by the runner (`benches/fuzz.rs`) and by a short test.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, BinaryArray, Int64Array, RecordBatch, StringArray, StructArray};
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{DataType, Field, Fields, Schema};
use fastaa::dataset::{self, Split};
use fastaa::image::decode::{Area, DecodeLimits, DecodeOptions, Decoder};
use fastaa::image::{Image, PADDED};
use fastaa::random::{Purpose, SampleRng};
use image::{ExtendedColorType, ImageEncoder};

/// Small, so that memory that a header asks for is no bottleneck.
const LIMITS: DecodeLimits = DecodeLimits { max_side: 512, max_pixels: 65_536 };

type Run = Box<dyn FnMut(&[u8])>;

/// A parser and files that it reads.
pub(crate) struct Target {
    /// For the command line and the report.
    pub(crate) name: &'static str,
    seeds: Vec<Vec<u8>>,
    run: Run,
}

impl Target {
    /// Runs on `n` inputs, numbered from `first`: each is a seed with a few random changes.
    pub(crate) fn run(&mut self, first: u64, n: u64) {
        for number in first..first + n {
            let mut rng = SampleRng::new(0xF022, 0, number, Purpose::Policy);
            let input = mutated(&self.seeds, &mut rng);
            (self.run)(&input);
        }
    }

    /// Runs on the seeds themselves.
    pub(crate) fn run_seeds(&mut self) {
        for seed in self.seeds.clone() {
            (self.run)(&seed);
        }
    }
}

fn pick(rng: &mut SampleRng, n: usize) -> usize {
    rng.below(u32::try_from(n.max(1)).expect("small")) as usize
}

/// A seed with 1 to 8 changes, mostly few, so that the parser gets beyond the first: bits, bytes,
/// words of extreme values, cuts, copies, splices.
fn mutated(seeds: &[Vec<u8>], rng: &mut SampleRng) -> Vec<u8> {
    let mut bytes = seeds[pick(rng, seeds.len())].clone();
    let n_changes = 1 + rng.next_u32().trailing_zeros().min(7);
    for _ in 0..n_changes {
        if bytes.is_empty() {
            return bytes;
        }
        // Headers are where parsers decide: half of the changes go to the first 256 bytes.
        let reach = if rng.coin() { bytes.len().min(256) } else { bytes.len() };
        let at = pick(rng, reach);
        match rng.below(8) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = u8::try_from(rng.below(256)).expect("a byte"),
            2 | 3 => {
                let extremes = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 0x8000_0000];
                let value: u32 = extremes[pick(rng, extremes.len())];
                let word = if rng.coin() { value.to_le_bytes() } else { value.to_be_bytes() };
                let len = (1 + pick(rng, 4)).min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&word[..len]);
            }
            4 => bytes.truncate(at),
            5 => {
                let end = (at + 1 + pick(rng, 64)).min(bytes.len());
                bytes.drain(at..end);
            }
            6 => {
                let end = (at + 1 + pick(rng, 64)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                let to = pick(rng, bytes.len());
                bytes.splice(to..to, part);
            }
            _ => {
                let other = &seeds[pick(rng, seeds.len())];
                let from = pick(rng, other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
    bytes
}

/// All targets; files that some need lie in `folder`.
pub(crate) fn all(folder: &Path) -> Vec<Target> {
    vec![
        of_file("tar", folder.join("fuzz.tar"), tars()),
        of_file("arrow", folder.join("fuzz.arrow"), packed(folder)),
        of_hf(folder),
        of_idx(folder),
        of_file("cifar", folder.join("data_batch_1.bin"), vec![vec![3; 3073], vec![1; 6146]]),
        of_image("jpeg", jpegs()),
        of_png(encoded(png)),
        of_image("webp", encoded(webp)),
        of_image("bmp-pnm", [encoded(bmp), encoded(pnm)].concat()),
    ]
}

/// Opens the file and reads every sample.
fn read_all(path: &Path) {
    let cache = path.with_extension("cache");
    let Ok(split) = dataset::open_split(path, "train", &cache) else { return };
    let mut buffer = Vec::new();
    for sample_idx in 0..split.info().n_samples.min(64) {
        let _ = split.sample(sample_idx, &mut buffer);
        let _ = split.sample_name(sample_idx);
    }
}

fn of_file(name: &'static str, path: PathBuf, seeds: Vec<Vec<u8>>) -> Target {
    let run = move |bytes: &[u8]| {
        // A new file each time: the rule of the maps is that files are replaced.
        let _ = fs::remove_file(&path);
        fs::write(&path, bytes).expect("writes");
        read_all(&path);
    };
    Target { name, seeds, run: Box::new(run) }
}

/// PNG, with the checksums of its chunks made right after the changes: else few get any further.
fn of_png(seeds: Vec<Vec<u8>>) -> Target {
    let mut target = of_image("png", seeds);
    let mut run = target.run;
    target.run = Box::new(move |bytes| {
        let mut bytes = bytes.to_vec();
        let mut at = 8;
        while let Some(len) = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>()) {
            let len = u32::from_be_bytes(*len) as usize;
            let Some(checked) = bytes.get(at + 4..).and_then(|rest| rest.get(..len + 4)) else {
                break;
            };
            let crc = crc32fast::hash(checked).to_be_bytes();
            let Some(stored) = bytes.get_mut(at + 8 + len..at + 12 + len) else { break };
            stored.copy_from_slice(&crc);
            at += 12 + len;
        }
        run(&bytes);
    });
    target
}

fn of_image(name: &'static str, seeds: Vec<Vec<u8>>) -> Target {
    let (mut decoder, mut image) = (Decoder::default(), Image::default());
    let run = move |bytes: &[u8]| {
        let options =
            DecodeOptions { channels: 3, turn: bytes.len().is_multiple_of(2), limits: LIMITS };
        let Ok(mut opened) = decoder.open(bytes, options) else { return };
        let (width, height) = opened.size();
        let _ = opened.decode(&mut image);
        let area = Area {
            x: width / 3,
            y: height / 3,
            width: width.div_ceil(3),
            height: height.div_ceil(3),
        };
        let reduce = opened.reduction(area, (2, 2));
        if let Ok(placed) = opened.decode_area(area, reduce, &mut image) {
            assert!(placed.x <= area.x / placed.reduce && placed.y <= area.y / placed.reduce);
            // Three channels, or a colour JPEG's four bytes.
            assert!([3, PADDED].contains(&image.channels));
            assert_eq!(image.data.len(), image.width * image.height * image.channels);
        }
    };
    Target { name, seeds, run: Box::new(run) }
}

fn pixels(width: usize, height: usize) -> Vec<u8> {
    (0..width * height * 3).map(|at| u8::try_from(at * 7 % 251).expect("a byte")).collect()
}

fn encoded(encode: impl Fn(&[u8], u32, u32) -> Vec<u8>) -> Vec<Vec<u8>> {
    let sizes = [(1_u32, 1_u32), (16, 9), (33, 40)];
    sizes.iter().map(|&(w, h)| encode(&pixels(w as usize, h as usize), w, h)).collect()
}

fn png(rgb: &[u8], width: u32, height: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let encoder = image::codecs::png::PngEncoder::new(&mut out);
    encoder.write_image(rgb, width, height, ExtendedColorType::Rgb8).expect("encodes");
    out
}

fn webp(rgb: &[u8], width: u32, height: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let encoder = image::codecs::webp::WebPEncoder::new_lossless(&mut out);
    encoder.encode(rgb, width, height, ExtendedColorType::Rgb8).expect("encodes");
    out
}

fn bmp(rgb: &[u8], width: u32, height: u32) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    let mut encoder = image::codecs::bmp::BmpEncoder::new(&mut out);
    encoder.encode(rgb, width, height, ExtendedColorType::Rgb8).expect("encodes");
    out.into_inner()
}

fn pnm(rgb: &[u8], width: u32, height: u32) -> Vec<u8> {
    [format!("P6\n{width} {height}\n255\n").as_bytes(), rgb].concat()
}

fn jpegs() -> Vec<Vec<u8>> {
    let encode = |rgb: &[u8], width: u32, height: u32| {
        let (width, height) = (width as usize, height as usize);
        let image = Image { width, height, channels: 3, data: rgb.to_vec() };
        fastaa::image::encode::jpeg(&image, 80).expect("encodes")
    };
    let mut seeds = encoded(encode);
    // One with an orientation.
    let exif =
        b"\xff\xe1\x00\x22Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    let turned = [&seeds[1][..2], exif, &seeds[1][2..]].concat();
    seeds.push(turned);
    seeds
}

fn tars() -> Vec<Vec<u8>> {
    let header = |name: &str, size: usize, kind: u8| {
        let mut block = vec![0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        block[156] = kind;
        block[257..263].copy_from_slice(b"ustar\0");
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block
    };
    let member = |name: &str, content: &[u8], kind: u8| {
        let mut bytes = header(name, content.len(), kind);
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    };
    let image = encoded(png).remove(0);
    let short = [member("a/b.png", &image, b'0'), member("a/b.cls", b"3", b'0'), vec![0; 1024]];
    let long = [
        member("././@LongLink", b"very/long/name.jpg\0", b'L'),
        member("very", &image, b'0'),
        member("pax", b"26 path=very/long/name.cls\n", b'x'),
        member("very", b"1\n", b'0'),
        member("c.json", br#"{"label": 4}"#, b'0'),
        member("c.webp", &image, b'0'),
    ];
    vec![short.concat(), long.concat()]
}

fn packed(folder: &Path) -> Vec<Vec<u8>> {
    // From a CIFAR file: raw pixels; from a tar: image files.
    let cifar = folder.join("test_batch.bin");
    fs::write(&cifar, vec![1; 3 * 3073]).expect("writes");
    let tar = folder.join("seed.tar");
    fs::write(&tar, &tars()[0]).expect("writes");
    let pack = |source: &Path, split: &str| {
        let split: Arc<dyn Split> = dataset::open_split(source, split, folder).expect("opens");
        let path = folder.join("seed.arrow");
        dataset::write_split(&*split, "train", "seed", &path, true, &mut |_| {}).expect("packs");
        fs::read(path).expect("reads")
    };
    vec![pack(&cifar, "test"), pack(&tar, "train")]
}

fn hf_stream() -> Vec<u8> {
    let image = encoded(png).remove(0);
    let bytes: ArrayRef = Arc::new(BinaryArray::from_vec(vec![&image, &image]));
    let path: ArrayRef = Arc::new(StringArray::from(vec![None, Some("a.png")]));
    let fields = Fields::from(vec![
        Field::new("bytes", DataType::Binary, true),
        Field::new("path", DataType::Utf8, true),
    ]);
    let images: ArrayRef = Arc::new(StructArray::new(fields.clone(), vec![bytes, path], None));
    let features = r#"{"info": {"features": {"image": {"_type": "Image"},
        "label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}"#;
    let metadata: std::collections::HashMap<String, String> =
        [("huggingface".to_owned(), features.to_owned())].into();
    let schema = Arc::new(Schema::new_with_metadata(
        vec![
            Field::new("image", DataType::Struct(fields), true),
            Field::new("label", DataType::Int64, true),
        ],
        metadata,
    ));
    let labels: ArrayRef = Arc::new(Int64Array::from(vec![0, 1]));
    let batch = RecordBatch::try_new(Arc::clone(&schema), vec![images, labels]).expect("fits");
    let mut writer = StreamWriter::try_new(Vec::new(), &schema).expect("writes");
    writer.write(&batch).expect("writes");
    writer.into_inner().expect("writes")
}

fn of_hf(folder: &Path) -> Target {
    let folder = folder.join("hf");
    fs::create_dir_all(&folder).expect("makes a folder");
    let state = r#"{"_data_files": [{"filename": "data.arrow"}], "_split": "train"}"#;
    fs::write(folder.join("state.json"), state).expect("writes");
    let run = move |bytes: &[u8]| {
        let path = folder.join("data.arrow");
        let _ = fs::remove_file(&path);
        fs::write(path, bytes).expect("writes");
        read_all(&folder);
    };
    Target { name: "huggingface", seeds: vec![hf_stream()], run: Box::new(run) }
}

fn of_idx(folder: &Path) -> Target {
    let (images, labels) = (folder.join("x-images-idx3-ubyte"), folder.join("x-labels-idx1-ubyte"));
    let file = |dims: &[u32], n: usize| {
        let kind = u8::try_from(dims.len()).expect("few");
        let mut bytes = vec![0, 0, 8, kind];
        for dim in dims {
            bytes.extend(dim.to_be_bytes());
        }
        bytes.extend(vec![7; n]);
        bytes
    };
    let seeds = vec![file(&[3, 4, 5], 60), file(&[2, 4, 4, 3], 96), file(&[3], 3)];
    let fixed = file(&[3], 3);
    let run = move |bytes: &[u8]| {
        // As images beside good labels, and as labels beside good images.
        let is_labels = bytes.get(3) == Some(&1);
        let (good, bad) = if is_labels { (&images, &labels) } else { (&labels, &images) };
        for (path, content) in [(good, &fixed[..]), (bad, bytes)] {
            let _ = fs::remove_file(path);
            fs::write(path, content).expect("writes");
        }
        read_all(&images);
    };
    Target { name: "idx", seeds, run: Box::new(run) }
}
