//! The reference results of `tests/golden/pillow_ops.py`, whose header describes the records, and
//! random images and operations.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use fastaa::augment::{Action, resolve};
use fastaa::image::Image;
use fastaa::policy::{Op, OpsProfile};
use fastaa::random::SampleRng;

/// What the generator calls its kinds of images.
const KINDS: [&str; 4] = ["random", "constant", "two-valued", "narrow"];
/// The generator's order of profiles.
pub const PROFILES: [OpsProfile; 3] =
    [OpsProfile::Fastaa, OpsProfile::Torchvision, OpsProfile::TrivialWide];
/// Fewer cases than this mean that the generator's grid has lost a dimension.
const CASES_MIN: u64 = 56 * 2000;

/// An operation on one of the images, and what must come of it.
pub struct Case {
    pub image: usize,
    pub op: Op,
    pub profile: OpsProfile,
    pub lambda: f64,
    pub negative: bool,
    /// In pixels.
    pub centre: (f64, f64),
    pub expected: Vec<u8>,
}

impl Case {
    pub fn action(&self, image: &Image) -> Action {
        let size = (image.width, image.height);
        resolve(self.op, self.profile, self.lambda, self.negative, size, self.centre)
    }

    /// Says what differs.
    pub fn describe(&self, (input, kind): &(Image, &str), actual: &[u8]) -> String {
        let Self { op, profile, lambda, negative, centre, expected, .. } = self;
        let at = actual.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(0);
        let pixel = at / input.channels;
        format!(
            "{} in profile {}, λ = {lambda}, negative: {negative}, centre {centre:?}, on a {kind} \
             {}×{} {} image: {} bytes differ, first at x = {}, y = {}, channel {}: {}, not {}",
            op.name(),
            profile.name(),
            input.width,
            input.height,
            if input.channels == 1 { "gray" } else { "RGB" },
            actual.iter().zip(expected).filter(|(a, b)| a != b).count(),
            pixel % input.width,
            pixel / input.width,
            at % input.channels,
            actual[at],
            expected[at],
        )
    }
}

/// All cases were compared, and none differs.
pub fn judge(n_cases: u64, announced: u64, differences: &[String]) {
    assert!(
        differences.is_empty(),
        "{} of {n_cases} cases differ; the first:\n{}",
        differences.len(),
        differences[..differences.len().min(20)].join("\n")
    );
    assert_eq!(n_cases, announced);
    assert!(n_cases >= CASES_MIN, "only {n_cases} cases");
}

/// What the generator says next.
pub enum Record {
    Case(Case),
    End { n_cases: u64 },
}

fn python() -> PathBuf {
    if let Some(python) = std::env::var_os("FASTAA_PYTHON") {
        return python.into();
    }
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    if venv.exists() { venv } else { "python3".into() }
}

/// The running generator, as a stream of little-endian values.
pub struct Records {
    child: Child,
    stdout: BufReader<ChildStdout>,
    /// The images so far, and their kinds.
    pub images: Vec<(Image, &'static str)>,
}

impl Records {
    pub fn start() -> Self {
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
        let stdout = BufReader::with_capacity(1 << 20, stdout);
        Self { child, stdout, images: Vec::new() }
    }

    /// The next case, or the end; images on the way are kept.
    pub fn read(&mut self) -> Record {
        loop {
            match self.u8() {
                b'I' => {
                    let (width, height) = (self.index(), self.index());
                    let mut image = Image::black(width, height, usize::from(self.u8()));
                    let kind = KINDS[usize::from(self.u8())];
                    self.bytes(&mut image.data);
                    self.images.push((image, kind));
                }
                b'C' => return Record::Case(self.case()),
                b'E' => return Record::End { n_cases: u64::from_le_bytes(self.array()) },
                other => panic!("unknown record {other:#x} from the reference generator"),
            }
        }
    }

    fn case(&mut self) -> Case {
        let image = self.index();
        let op = Op::ALL[usize::from(self.u8())];
        let profile = PROFILES[usize::from(self.u8())];
        let (lambda, negative) = (self.f64(), self.u8() != 0);
        let centre = (self.f64(), self.f64());
        let mut expected = vec![0; self.images[image].0.data.len()];
        self.bytes(&mut expected);
        Case { image, op, profile, lambda, negative, centre, expected }
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

const SIDES: [u32; 14] = [1, 2, 3, 4, 5, 7, 16, 28, 32, 33, 61, 64, 65, 130];

pub fn below(rng: &mut SampleRng, n: u32) -> usize {
    rng.below(n) as usize
}

pub fn random_image(rng: &mut SampleRng) -> Image {
    let mut side = || SIDES[rng.below(14) as usize] as usize;
    let (width, height) = (side(), side());
    let channels = if rng.coin() { 3 } else { 1 };
    random_image_of(rng, (width, height), channels)
}

/// Of a size: any bytes, few of them, or one.
pub fn random_image_of(
    rng: &mut SampleRng,
    (width, height): (usize, usize),
    channels: usize,
) -> Image {
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

pub fn random_action(rng: &mut SampleRng, size: (usize, usize)) -> Action {
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
