//! Fuzzes the parsers: `cargo bench --no-default-features --bench fuzz -- [TARGET …] [--runs N]`.
//!
//! Prints executions and seconds per target; a panic ends it with the input's number, which
//! `--first N --runs 1` repeats. fuzz/README.md has what was run so far.

#![allow(missing_docs, clippy::print_stdout, reason = "a benchmark talks to people")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

#[path = "../fuzz/targets.rs"]
mod targets;

/// Executions between two looks at the clock.
const BLOCK: usize = 10_000;

fn main() {
    let (mut wanted, mut first, mut runs) = (Vec::new(), 0, 1_000_000);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|n| n.parse().ok()).expect("a number");
        match argument.as_str() {
            "--bench" => {}
            "--runs" => runs = number(),
            "--first" => first = number(),
            name => wanted.push(name.to_owned()),
        }
    }
    // In memory: files are written for every execution.
    let folder = tempfile::tempdir_in("/dev/shm").expect("makes a folder");
    for mut target in targets::all(folder.path()) {
        if !wanted.is_empty() && !wanted.iter().any(|name| name == target.name) {
            continue;
        }
        let began = Instant::now();
        target.run_seeds();
        for start in (first..first + runs).step_by(BLOCK) {
            let n = (BLOCK as u64).min(first + runs - start);
            if catch_unwind(AssertUnwindSafe(|| target.run(start, n))).is_err() {
                let number = (start..start + n)
                    .find(|at| catch_unwind(AssertUnwindSafe(|| target.run(*at, 1))).is_err());
                println!("{}: panics on input {number:?}", target.name);
                std::process::exit(1);
            }
        }
        println!("{:12} {runs:>9} executions {:>6} s", target.name, began.elapsed().as_secs());
    }
}
