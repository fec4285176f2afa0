//! `fastaa-ctl augment`, through the real binary and real files.

#![allow(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use fastaa::augment::{Scratch, apply_op};
use fastaa::image::Image;
use fastaa::policy::{Op, OpsProfile};
use image::{DynamicImage, GrayImage, RgbImage, RgbaImage};
use tempfile::TempDir;

const WIDTH: u32 = 13;
const HEIGHT: u32 = 9;

/// A directory with `rgb.png`, `gray.png`, `rgba.png`, `rgb.ppm`, `rgb.jpg` and `broken.png`.
struct Folder {
    dir: TempDir,
    rgb: RgbImage,
    gray: GrayImage,
}

impl Folder {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let value =
            |x: u32, y: u32, c: u32| u8::try_from((x * 31 + y * 57 + c * 91) % 256).unwrap();
        let rgb = RgbImage::from_fn(WIDTH, HEIGHT, |x, y| {
            image::Rgb([value(x, y, 0), value(x, y, 1), value(x, y, 2)])
        });
        let gray = GrayImage::from_fn(WIDTH, HEIGHT, |x, y| image::Luma([value(x, y, 0)]));
        let rgba: RgbaImage = DynamicImage::from(rgb.clone()).to_rgba8();
        for name in ["rgb.png", "rgb.ppm", "rgb.jpg"] {
            rgb.save(dir.path().join(name)).unwrap();
        }
        gray.save(dir.path().join("gray.png")).unwrap();
        rgba.save(dir.path().join("rgba.png")).unwrap();
        fs::write(dir.path().join("broken.png"), b"\x89PNG\r\n\x1a\nno image").unwrap();
        Self { dir, rgb, gray }
    }

    /// Runs `augment` with these arguments in the folder.
    fn run(&self, args: &[&str]) -> Outcome {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastaa-ctl"));
        let output = command.current_dir(self.dir.path()).arg("augment").args(args).output();
        let output = output.unwrap();
        Outcome {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

#[derive(Debug)]
struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// The arguments are refused with `code`, stderr has all of `parts`, and no file is made.
fn check_refused(args: &[&str], code: i32, parts: &[&str]) {
    let folder = Folder::new();
    let before = folder.names().len();
    let outcome = folder.run(args);
    assert_eq!(outcome.code, Some(code), "{args:?}: {outcome:?}");
    for part in parts {
        assert!(outcome.stderr.contains(part), "{args:?}: '{part}' is not in {outcome:?}");
    }
    assert_eq!(outcome.stdout, "", "{args:?}");
    assert_eq!(folder.names().len(), before, "{args:?} left a file behind");
}

fn decode(path: &Path) -> DynamicImage {
    image::open(path).unwrap()
}

fn expected(data: &[u8], channels: usize, op: Op, lambda: f64, negative: bool) -> Vec<u8> {
    let (width, height) = (WIDTH as usize, HEIGHT as usize);
    let mut image = Image { width, height, channels, data: data.to_vec() };
    let mut scratch = Scratch::default();
    let profile = OpsProfile::Fastaa;
    apply_op(&mut image, &mut scratch, op, profile, lambda, negative, (0.0, 0.0));
    image.data
}

#[test]
fn an_operation_is_applied_and_gray_stays_gray() {
    let folder = Folder::new();
    for op in Op::ALL.into_iter().filter(|&op| op != Op::Cutout) {
        for mirror in [false, true] {
            if mirror && !OpsProfile::Fastaa.has_random_sign(op) {
                continue;
            }
            let rgb = (folder.rgb.as_raw(), "rgb.png", 3);
            let gray = (folder.gray.as_raw(), "gray.png", 1);
            for (data, input, channels) in [rgb, gray] {
                let mut args = vec![input, "--op", op.name(), "--magnitude", "0.8", "-o", "o.png"];
                args.extend(mirror.then_some("--mirror"));
                let outcome = folder.run(&args);
                assert_eq!(outcome.code, Some(0), "{outcome:?}");
                assert!(outcome.stdout.contains(op.name()) && outcome.stdout.contains("o.png"));
                let written = decode(&folder.path("o.png"));
                assert_eq!(usize::from(written.color().channel_count()), channels);
                let expected = expected(data, channels, op, 0.8, mirror);
                assert_eq!(written.into_bytes(), expected, "{op:?} {input} {mirror}");
            }
        }
    }
}

#[test]
fn pnm_and_jpeg_are_read_and_alpha_is_dropped() {
    let folder = Folder::new();
    let mirrored = expected(folder.rgb.as_raw(), 3, Op::Invert, 0.0, false);
    for input in ["rgb.ppm", "rgba.png"] {
        let outcome = folder.run(&[input, "--op", "Invert", "-o", "out.png"]);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        assert!(outcome.stderr.is_empty(), "{outcome:?}");
        assert_eq!(decode(&folder.path("out.png")).into_bytes(), mirrored, "{input}");
    }
    let jpeg = decode(&folder.path("rgb.jpg")).into_bytes();
    let outcome = folder.run(&["rgb.jpg", "--op", "Invert", "-o", "out.png"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let written = decode(&folder.path("out.png")).into_bytes();
    // Another decoder, with other rounding; tests/python/test_images.py has the exact judge.
    let inverted = expected(&jpeg, 3, Op::Invert, 0.0, false);
    assert_eq!(written.len(), inverted.len());
    assert!(written.iter().zip(&inverted).all(|(a, b)| a.abs_diff(*b) <= 4));
}

#[test]
fn the_profile_changes_what_a_magnitude_means() {
    let folder = Folder::new();
    let effect = |profile: &str| {
        let args = ["rgb.png", "--op", "Rotate", "--magnitude", "1", "--mirror"];
        let args = [&args[..], &["--profile", profile, "-o", "out.png", "--json"]].concat();
        let outcome = folder.run(&args);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let json: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
        assert_eq!(json["profile"], profile);
        assert_eq!(
            (&json["width"], &json["height"], &json["mode"]),
            (&13.into(), &9.into(), &"RGB".into())
        );
        let applied = json["applied"].as_array().unwrap();
        assert_eq!(applied.len(), 1);
        assert_eq!((&applied[0]["op"], &applied[0]["negative"]), (&"Rotate".into(), &true.into()));
        applied[0]["effect"].as_str().unwrap().to_owned()
    };
    assert!(effect("fastaa").contains("-30.000°"));
    assert!(effect("torchvision").contains("-30.000°"));
    assert!(effect("trivial-wide").contains("-135.000°"));
}

#[test]
fn the_seed_places_cutout() {
    let folder = Folder::new();
    let run = |seed: &str| {
        let args = ["rgb.png", "--op", "Cutout", "--magnitude", "1", "--seed", seed];
        let outcome = folder.run(&[&args[..], &["-o", "out.png"]].concat());
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        fs::read(folder.path("out.png")).unwrap()
    };
    assert_eq!(run("7"), run("7"));
    let different = (0..10).map(|seed: u32| run(&seed.to_string())).collect::<Vec<_>>();
    assert!(different.iter().any(|bytes| *bytes != different[0]));
}

#[test]
fn an_existing_output_is_replaced_whole_and_nothing_is_left_beside_it() {
    let folder = Folder::new();
    let before = folder.names().len();
    fs::write(folder.path("rgb.copy.png"), b"old").unwrap();
    // Over its own input, too.
    for name in ["rgb.copy.png", "rgb.png"] {
        let outcome = folder.run(&["rgb.png", "--op", "Posterize", "--magnitude", "1", "-o", name]);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        assert_eq!(decode(&folder.path(name)).into_bytes(), *folder.rgb.as_raw());
    }
    assert_eq!(folder.names().len(), before + 1);
}

#[test]
fn arguments_that_make_no_sense_are_usage_errors() {
    let rotate = ["rgb.png", "--op", "Rotate"];
    let with = |rest: &[&'static str]| [&rotate[..], rest].concat();
    check_refused(&["rgb.png", "-o", "o.png"], 2, &["--op", "--policy"]);
    check_refused(&["--op", "Invert", "-o", "o.png"], 2, &["IMAGE"]);
    check_refused(&with(&["--magnitude", "0.5"]), 2, &["--output"]);
    check_refused(&with(&["-o", "o.png"]), 2, &["Rotate needs a magnitude", "hint: "]);
    for bad in ["1.01", "-0.1", "NaN", "inf", "half"] {
        check_refused(&with(&["--magnitude", bad, "-o", "o.png"]), 2, &["--magnitude", bad]);
    }
    check_refused(
        &with(&["--magnitude", "0.5", "-o", "o.jpg"]),
        2,
        &["o.jpg: only PNG is written", "hint: "],
    );
    check_refused(
        &["rgb.png", "--op", "Posterize", "--magnitude", "1", "--mirror", "-o", "o.png"],
        2,
        &["Posterize has no sign", "fastaa", "hint: "],
    );
    check_refused(
        &with(&["--magnitude", "1", "--profile", "fasta", "-o", "o.png"]),
        2,
        &["fastaa", "torchvision", "trivial-wide"],
    );
    let policy = ["rgb.png", "--policy", "trivial-wide", "-o", "o.png"];
    for extra in
        [&["--op", "Rotate"][..], &["--magnitude", "0.5"], &["--mirror"], &["--profile", "fastaa"]]
    {
        check_refused(&[&policy[..], extra].concat(), 2, &["--policy", extra[0]]);
    }
}

#[test]
fn an_unknown_operation_suggests_the_nearest() {
    for (name, nearest) in [("rotate", "Rotate"), ("TransleteX", "TranslateX"), ("Colour", "Color")]
    {
        check_refused(
            &["rgb.png", "--op", name, "--magnitude", "0.5", "-o", "o.png"],
            2,
            &[&format!("'{name}'"), &format!("hint: did you mean {nearest}?")],
        );
    }
}

#[test]
fn files_that_cannot_be_read_or_written_are_named() {
    for name in ["missing.png", "broken.png", "."] {
        check_refused(
            &[name, "--op", "Invert", "-o", "o.png"],
            1,
            &[&format!("cannot read image {name}: "), "hint: "],
        );
    }
    for out in ["nowhere/o.png", "rgb.png/o.png"] {
        check_refused(
            &["rgb.png", "--op", "Invert", "-o", out],
            1,
            &[&format!("cannot write {out}: "), "hint: "],
        );
    }
}

#[test]
fn output_follows_links_and_replaces_no_special_file() {
    let dir = tempfile::tempdir().expect("a folder");
    let image = dir.path().join("in.pgm");
    std::fs::write(&image, b"P5 2 1 255\n\x10\x20").expect("writes");
    let invert = |output: &std::path::Path| {
        std::process::Command::new(env!("CARGO_BIN_EXE_fastaa-ctl"))
            .args(["augment", "--op", "Invert", "-o"])
            .args([output, &image])
            .output()
            .expect("runs")
    };
    let target = dir.path().join("target.png");
    std::fs::write(&target, b"old").expect("writes");
    let link = dir.path().join("link.png");
    std::os::unix::fs::symlink(&target, &link).expect("links");
    assert!(invert(&link).status.success());
    assert!(std::fs::symlink_metadata(&link).expect("is there").is_symlink());
    assert!(std::fs::read(&target).expect("reads").starts_with(b"\x89PNG"));

    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("binds");
    let output = invert(&socket);
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("is no regular file"), "{stderr}");

    let kind = std::fs::symlink_metadata(&socket).expect("is there").file_type();
    assert!(std::os::unix::fs::FileTypeExt::is_socket(&kind));
}
