//! Every operation, in every profile, against the installed Pillow and torchvision, byte for byte.
//!
//! The reference results come from `tests/golden/pillow_ops.py`, which this test starts; its
//! header describes the records. Needs the Python environment that `make setup` makes.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use fastaa::augment::{Scratch, apply_op};
use fastaa::image::Image;
use fastaa::policy::{Op, OpsProfile};

/// What the generator calls its kinds of images.
const KINDS: [&str; 4] = ["random", "constant", "two-valued", "narrow"];
/// The generator's order of profiles.
const PROFILES: [OpsProfile; 3] =
    [OpsProfile::Fastaa, OpsProfile::Torchvision, OpsProfile::TrivialWide];
/// Fewer cases than this mean that the generator's grid has lost a dimension.
const CASES_MIN: u64 = 56 * 2000;

fn python() -> PathBuf {
    if let Some(python) = std::env::var_os("FASTAA_PYTHON") {
        return python.into();
    }
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    if venv.exists() { venv } else { "python3".into() }
}

/// The running generator, as a stream of little-endian values.
struct Records {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Records {
    fn start() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pillow_ops.py");
        let python = python();
        let mut child = Command::new(&python)
            .arg(&script)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("cannot start {}: {error}; run `make setup` first", python.display())
            });
        let stdout = child.stdout.take().expect("stdout is piped");
        Self { child, stdout: BufReader::with_capacity(1 << 20, stdout) }
    }

    fn bytes(&mut self, buffer: &mut [u8]) {
        if let Err(error) = self.stdout.read_exact(buffer) {
            let status = self.child.wait().expect("the generator is a child");
            assert!(
                status.code() != Some(3),
                "Python lacks Pillow, numpy or torchvision (see above); run `make setup` first"
            );
            panic!("the reference generator ended early ({status}): {error}");
        }
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut buffer = [0; N];
        self.bytes(&mut buffer);
        buffer
    }

    fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    fn index(&mut self) -> usize {
        u32::from_le_bytes(self.array()) as usize
    }

    fn f64(&mut self) -> f64 {
        f64::from_le_bytes(self.array())
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The buffers that are kept from case to case.
#[derive(Default)]
struct Buffers {
    expected: Vec<u8>,
    actual: Image,
    scratch: Scratch,
}

/// Reads one case and compares it; the text describes a difference.
fn check_case(
    records: &mut Records,
    images: &[(Image, &str)],
    buffers: &mut Buffers,
) -> Result<(), String> {
    let (input, kind) = &images[records.index()];
    let op = Op::ALL[usize::from(records.u8())];
    let profile = PROFILES[usize::from(records.u8())];
    let lambda = records.f64();
    let negative = records.u8() != 0;
    let centre = (records.f64(), records.f64());
    let Buffers { expected, actual, scratch } = buffers;
    expected.resize(input.data.len(), 0);
    records.bytes(expected);

    actual.clone_from(input);
    apply_op(actual, scratch, op, profile, lambda, negative, centre);
    if actual.data == *expected {
        return Ok(());
    }
    let at = actual.data.iter().zip(&*expected).position(|(a, b)| a != b).unwrap_or(0);
    let pixel = at / input.channels;
    Err(format!(
        "{} in profile {}, λ = {lambda}, negative: {negative}, centre {centre:?}, on a {kind} \
         {}×{} {} image: {} bytes differ, first at x = {}, y = {}, channel {}: {} instead of {}",
        op.name(),
        profile.name(),
        input.width,
        input.height,
        if input.channels == 1 { "gray" } else { "RGB" },
        actual.data.iter().zip(&*expected).filter(|(a, b)| a != b).count(),
        pixel % input.width,
        pixel / input.width,
        at % input.channels,
        actual.data[at],
        expected[at],
    ))
}

#[test]
fn every_operation_equals_pillow_and_torchvision_byte_for_byte() {
    let mut records = Records::start();
    let mut images: Vec<(Image, &str)> = Vec::new();
    let mut buffers = Buffers::default();
    let (mut n_cases, mut differences) = (0_u64, Vec::new());
    let announced = loop {
        match records.u8() {
            b'I' => {
                let (width, height) = (records.index(), records.index());
                let mut image = Image::black(width, height, usize::from(records.u8()));
                let kind = KINDS[usize::from(records.u8())];
                records.bytes(&mut image.data);
                images.push((image, kind));
            }
            b'C' => {
                n_cases += 1;
                if let Err(difference) = check_case(&mut records, &images, &mut buffers) {
                    differences.push(difference);
                }
            }
            b'E' => break u64::from_le_bytes(records.array()),
            other => panic!("unknown record {other:#x} from the reference generator"),
        }
    };
    println!("{n_cases} cases compared on {} images", images.len());
    assert!(
        differences.is_empty(),
        "{} of {n_cases} cases differ; the first:\n{}",
        differences.len(),
        differences[..differences.len().min(20)].join("\n")
    );
    assert_eq!(n_cases, announced);
    assert!(n_cases >= CASES_MIN, "only {n_cases} cases");
}
