//! How often does the gate publish what is not better, and what can it see?
//!
//! `cargo bench --no-default-features --bench gate` prints both tables for noise as in small
//! networks; `-- SEED_SD IMAGE_SD` for noise of your own: the standard deviation over seeds of a
//! paired difference, in points (0.01), and over images of its mean over seeds (0..1). Both are in
//! every verdict: `se_seeds` · √seeds, and `se_images` · √images / 100.
//!
//! "Per search" is the probability that a search of 20 tests, of candidates exactly as good as the
//! incumbent, publishes anything; the promise is 0.05 at most. Power is that of one test, the
//! first and the tenth of a search, against one rival, futility included.

#![allow(clippy::print_stdout, reason = "printing a table is what it is for")]

use fastaa::search::gate::alpha;
use fastaa::search::gate::power::Design;
use fastaa::search::gate::simulate::{Noise, Search, wilson_upper};

const DEFAULT_NOISE: Noise = Noise { seed_sd: 0.4, image_sd: 0.2 };
const N_SEARCHES: u32 = 10_000;
const N_TESTS: u32 = 20;
const GAINS: [f64; 4] = [0.25, 0.5, 1.0, 2.0];
const SEED: u64 = 1;

fn main() {
    // Cargo adds `--bench`.
    let numbers: Result<Vec<f64>, _> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with("--"))
        .map(|arg| arg.parse())
        .collect();
    let noise = match numbers.as_deref() {
        Ok([]) => DEFAULT_NOISE,
        Ok(&[seed_sd, image_sd]) if seed_sd >= 0.0 && image_sd >= 0.0 => {
            Noise { seed_sd, image_sd }
        }
        _ => {
            println!("give two numbers, SEED_SD (points) and IMAGE_SD (0..1), or none");
            std::process::exit(2);
        }
    };
    println!("seed sd {} points, image sd {} per image", noise.seed_sd, noise.image_sd);
    println!("{N_SEARCHES} made-up searches a cell\n");
    println!(
        " images seeds | per search (≤)  | test  level   +0.25   +0.5     +1     +2 | 80 % at"
    );
    for n_images in [1000, 10_000] {
        for n_seeds in [3, 5, 10] {
            print_row(noise, n_images, n_seeds);
        }
    }
}

fn print_row(noise: Noise, n_images: u64, n_seeds: u32) {
    let search = |gain| Search { noise, n_seeds, n_images, gain, can_end_early: true };
    let levels: Vec<f64> = (1..=N_TESTS).map(alpha::level).collect();
    let rate = search(0.0).publishing_rate(&levels, N_SEARCHES, SEED);
    let upper = wilson_upper(rate, N_SEARCHES);
    let design = Design {
        se_seeds: noise.seed_sd / f64::from(n_seeds).sqrt(),
        se_images: 100.0 * noise.image_sd / (n_images as f64).sqrt(),
        n_seeds,
        n_images,
    };
    for (idx, test) in [1, 10].into_iter().enumerate() {
        let level = alpha::level(test);
        let power = |&gain: &f64| {
            format!("{:7.3}", search(gain).publishing_rate(&[level], N_SEARCHES, SEED))
        };
        let powers: String = GAINS.iter().map(power).collect();
        let start = match idx {
            0 => format!("{n_images:7} {n_seeds:5} | {rate:.4} ({upper:.4})"),
            _ => " ".repeat(31),
        };
        let detectable = design.detectable_gain(level);
        println!("{start} | {test:4} {level:.5} {powers} | {detectable:+6.2}");
    }
}
