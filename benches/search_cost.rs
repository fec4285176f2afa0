//! What do the two density-matching algorithms cost, and what do they find?
//!
//! `cargo bench --no-default-features --bench search_cost` prints the table. The lab is synthetic
//! (`src/search/algorithm/synthetic.rs`), so that the truth is known, and another one for every
//! seed: there is one operation that the data varies in (free up to strength 0.8), all others cost.
//! K, B and the images are fewer than by default, so that it takes seconds; the passes of a round
//! with the defaults are printed too.
//!
//! Truth is measured on 3,000 images and a model that no search sees: loss gained, images changed
//! and mean distance of the policy found, and its price (b + max(0, loss gained)) / distance, b
//! being 5 points in nats. `structured` minimises prices, so look at the parts too. The share of
//! the weight with the planted operation nobody minimises; at random it would be 13 %.

#![allow(clippy::print_stdout, reason = "printing a table is what it is for")]

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use fastaa::augment::{DrawnOp, PreparedPolicy};
use fastaa::policy::{Op, OpsProfile, Policy, none};
use fastaa::random::{Purpose, SampleRng, mix64};
use fastaa::search::JournalHeader;
use fastaa::search::affinity::AffinityTable;
use fastaa::search::algorithm::objective::{Floor, Measured, nats_per_point};
use fastaa::search::algorithm::paper::{Paper, ProposerKind};
use fastaa::search::algorithm::structured::{Aim, Pairs, Structured};
use fastaa::search::algorithm::{Algorithm, Context};
use fastaa::search::lab::{Change, Evaluation, Lab, LabError, Score, TrainOn, Training};
use fastaa::search::ledger::{JOURNAL_VERSION, Ledger};
use fastaa::search::space::FoldedOp;

#[path = "../src/search/algorithm/synthetic.rs"]
mod synthetic;
use synthetic::{SyntheticLab, share_of};

const SEEDS: Range<u64> = 0..20;
/// The 97.5 % point of t with 19 degrees of freedom.
const T: f64 = 2.093;
const N_FOLDS: usize = 3;
const N_HELD_OUT: usize = 200;
const PAPER: Paper =
    Paper { n_rounds: 1, n_trials: 100, n_best: 10, n_draws: 5, proposer: ProposerKind::Tpe };
const STRUCTURED: Structured = Structured {
    n_pairs: 256,
    pairs: Pairs::Grid,
    budget_points: 5.0,
    aim: Aim::Price,
    has_floor: true,
};
const N_COLUMNS: usize = 7;
const N_ALGORITHMS: usize = 8;
/// The column and the row that the others are compared with.
const PRICE: usize = 1;
const GRID: usize = 2;

fn algorithms() -> [(&'static str, Box<dyn Algorithm + Send>); N_ALGORITHMS] {
    let proposed = |kind| Structured { pairs: Pairs::Proposed(kind), ..STRUCTURED };
    let least = Structured { aim: Aim::LeastLoss, ..STRUCTURED };
    [
        ("fast-autoaugment, TPE", Box::new(PAPER)),
        ("fast-autoaugment, random", Box::new(Paper { proposer: ProposerKind::Random, ..PAPER })),
        ("structured, grid", Box::new(STRUCTURED)),
        ("structured, TPE", Box::new(proposed(ProposerKind::Tpe))),
        ("structured, random", Box::new(proposed(ProposerKind::Random))),
        ("structured, half the pairs", Box::new(Structured { n_pairs: 128, ..STRUCTURED })),
        ("control: least loss above the floor", Box::new(least)),
        ("control: least loss, no floor", Box::new(Structured { has_floor: false, ..least })),
    ]
}

/// A journal in memory where there is such a folder: the table is not about disks.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("there is a folder for temporary files")
}

fn ledger(folder: &tempfile::TempDir) -> Ledger {
    let header = JournalHeader {
        version: JOURNAL_VERSION,
        dataset: "synthetic".to_owned(),
        config: String::new(),
        seed: 0,
    };
    let path = folder.path().join("journal");
    Ledger::open(&path, &header, 1, 0, |_| {}).expect("a new journal can be written").0
}

/// One row of the table for one seed.
fn measure(seed: u64) -> [[f64; N_COLUMNS]; N_ALGORITHMS] {
    let all = Op::ALL.len() as u64;
    let planted = Op::ALL[usize::try_from(mix64(seed ^ 0x91A7) % all).expect("below 15")];
    let lab = SyntheticLab::new(seed, N_FOLDS, N_HELD_OUT, &[planted]);
    let of_table = folder();
    let affinity = AffinityTable::measure(&lab, &ledger(&of_table)).expect("measures");
    let budget = STRUCTURED.budget_points * nats_per_point(&affinity);
    let floor = Floor::new(&affinity);
    let incumbent = none();
    algorithms().map(|(name, algorithm)| {
        let (folder, before) = (folder(), lab.n_passes());
        let ledger = ledger(&folder);
        let context = Context {
            lab: &lab,
            ledger: &ledger,
            seed,
            round: 1,
            incumbent: &incumbent,
            affinity: &affinity,
            name: "candidate",
        };
        let found = algorithm.propose(&context).expect(name);
        let n_passes = (lab.n_passes() - before) as f64 / 1000.0;
        let (with, without) = lab.truth(&PreparedPolicy::new(&found.policy));
        let gain = with.against(&without).loss_gain;
        [
            n_passes,
            (budget + gain.max(0.0)) / with.change.distance,
            gain,
            100.0 * with.change.changed,
            with.change.distance,
            100.0 * share_of(&found.policy, planted),
            100.0 * f64::from(u8::from(floor.admits(with.change))),
        ]
    })
}

fn shown(values: &[f64], digits: usize) -> String {
    if values.iter().any(|value| !value.is_finite()) {
        return "—".to_owned();
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    format!("{mean:.digits$} ± {:.digits$}", T * (variance / n).sqrt())
}

fn main() {
    let started = Instant::now();
    let (next, n_threads) = (AtomicU64::new(SEEDS.start), std::thread::available_parallelism());
    let work = || {
        let seeds = std::iter::from_fn(|| {
            Some(next.fetch_add(1, Ordering::Relaxed)).filter(|seed| SEEDS.contains(seed))
        });
        seeds.map(|seed| (seed, measure(seed))).collect::<Vec<_>>()
    };
    let mut rows = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..n_threads.map_or(1, usize::from)).map(|_| scope.spawn(work)).collect();
        let joined = threads.into_iter().map(|thread| thread.join().expect("does not panic"));
        joined.flatten().collect::<Vec<_>>()
    });
    rows.sort_by_key(|(seed, _)| *seed);
    println!("Mean ± 95 % interval over {} labs; {N_FOLDS} folds of {N_HELD_OUT}.", rows.len());
    println!("{PAPER:?}\n{STRUCTURED:?}\n");
    println!(
        "| algorithm | 1000 passes | price | price − that of the grid, paired | \
         loss gained, nats | changed, % | distance | \
         weight on the planted operation, % | above the floor, % |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (idx, (name, _)) in algorithms().into_iter().enumerate() {
        let column = |column: usize| -> Vec<f64> {
            rows.iter().map(|(_, results)| results[idx][column]).collect()
        };
        let digits = [1, 2, 3, 0, 3, 0, 0];
        let mut cells: Vec<String> =
            digits.iter().enumerate().map(|(at, &digits)| shown(&column(at), digits)).collect();
        let more: Vec<f64> =
            rows.iter().map(|(_, results)| results[idx][PRICE] - results[GRID][PRICE]).collect();
        cells.insert(PRICE + 1, shown(&more, 2));
        println!("| {name} | {} |", cells.join(" | "));
    }
    let real = SyntheticLab::new(0, 5, 800, &[]);
    let paper = Paper::default().passes(&real);
    let structured = Structured::default().passes(&real);
    println!(
        "\nA round of 5 folds of 800 images, by default: fast-autoaugment {paper} passes, \
         structured at most {structured} ({:.1} times less).",
        paper as f64 / structured as f64
    );
    println!("{:.1} s", started.elapsed().as_secs_f64());
}
