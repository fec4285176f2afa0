//! Does TPE find better policies than random search does with twice the evaluations?
//!
//! `cargo bench --no-default-features --bench proposer` prints the table for
//! [`TpeSettings::POLICIES`]; with `-- --tune` it compares settings, on other seeds.
//!
//! The objective is synthetic, so that its optimum is known, and another one for every seed. Like
//! the loss of held-out images under augmentation it is bilinear in the probabilities, in points of
//! error against no augmentation. An operation costs up to 1–6 points at full strength (U-shaped in
//! λ where λ = ½ is the identity), a third of them gain 0.5–3 points at a strength of their own,
//! and each ordered pair interacts (σ = 0.7 points). Noise: σ = 0.75 points, that of 1,600 images
//! at 90 % accuracy. A policy of five sub-policies is worth their mean.

#![allow(clippy::print_stdout, reason = "printing a table is what it is for")]

use std::time::Instant;

use fastaa::policy::Op;
use fastaa::random::mix64;
use fastaa::search::proposer::{Fit, Proposer, RandomSearch, Tpe, TpeSettings};
use fastaa::search::space::{Coordinate, Point, PolicySpace};

const NOISE_SD: f64 = 0.75;
const N_BEST: usize = 10;
const N_OPS: usize = Op::ALL.len();
const CHECKPOINTS: [usize; 3] = [50, 100, 200];
const TEST_SEEDS: std::ops::Range<u64> = 0..40;
const TUNING_SEEDS: std::ops::Range<u64> = 1000..1020;

/// Uniform in (0, 1), a pure function of its key.
fn unit(key: u64, index: u64) -> f64 {
    let bits = mix64(mix64(key).wrapping_add(mix64(index)));
    ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

fn normal(key: u64, index: u64) -> f64 {
    let (u, v) = (unit(key, 2 * index), unit(key, 2 * index + 1));
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

struct Objective {
    seed: u64,
    ops: Vec<OpEffect>,
    interaction: Vec<f64>,
}

#[derive(Clone, Copy)]
struct OpEffect {
    op: Op,
    /// Points lost at full strength.
    cost: f64,
    /// Points gained at the best strength; zero for most.
    gain: f64,
    best_strength: f64,
}

impl OpEffect {
    fn at(self, lambda: f64) -> f64 {
        let strength = match self.op {
            Op::AutoContrast | Op::Invert | Op::Equalize => self.best_strength,
            Op::Solarize | Op::Posterize => 1.0 - lambda,
            Op::Cutout => lambda,
            _ => (2.0 * lambda - 1.0).abs(),
        };
        let off = (strength - self.best_strength) / 0.4;
        self.cost * strength.powi(2) - self.gain * (1.0 - off.powi(2)).max(0.0)
    }
}

impl Objective {
    fn new(seed: u64) -> Self {
        let key = mix64(seed ^ 0x0b1e);
        let effect = |(index, op): (u64, Op)| OpEffect {
            op,
            cost: 1.0 + 5.0 * unit(key, 10 * index),
            gain: if unit(key, 10 * index + 1) < 1.0 / 3.0 {
                0.5 + 2.5 * unit(key, 10 * index + 2)
            } else {
                0.0
            },
            best_strength: 0.2 + 0.5 * unit(key, 10 * index + 3),
        };
        let ops = (0..).zip(Op::ALL).map(effect).collect();
        let pairs = (N_OPS * N_OPS) as u64;
        let interaction = (0..pairs).map(|pair| 0.7 * normal(mix64(key), pair)).collect();
        Self { seed, ops, interaction }
    }

    /// The expected error of a point, in points above that of the identity.
    fn truth(&self, point: &Point) -> f64 {
        let triples: Vec<(usize, f64, f64)> = point
            .0
            .chunks(3)
            .map(|three| match three {
                [Coordinate::Option(op), Coordinate::Real(p), Coordinate::Real(lambda)] => {
                    (*op, *p, self.ops[*op].at(*lambda))
                }
                _ => panic!("not a point of the paper's space: {point:?}"),
            })
            .collect();
        let of_pair = |pair: &[(usize, f64, f64)]| {
            let ((op_a, p_a, a), (op_b, p_b, b)) = (pair[0], pair[1]);
            p_a * a + p_b * b + p_a * p_b * self.interaction[op_a * N_OPS + op_b]
        };
        let total: f64 = triples.chunks(2).map(of_pair).sum();
        total / (triples.len() / 2) as f64
    }

    fn observed(&self, point: &Point, trial: u64) -> f64 {
        self.truth(point) + NOISE_SD * normal(mix64(self.seed ^ 0x0153), trial)
    }

    /// The least true value: bilinear in the probabilities, so at a corner of theirs; a mean over
    /// sub-policies is least where each of them is.
    fn optimum(&self) -> f64 {
        let at_best = |effect: &OpEffect| {
            (0..=1000).map(|step| effect.at(f64::from(step) / 1000.0)).fold(f64::MAX, f64::min)
        };
        let best: Vec<f64> = self.ops.iter().map(at_best).collect();
        let single = best.iter().copied().fold(0.0, f64::min);
        (0..N_OPS * N_OPS)
            .map(|pair| best[pair / N_OPS] + best[pair % N_OPS] + self.interaction[pair])
            .fold(single, f64::min)
    }
}

fn run(objective: &Objective, proposer: &dyn Proposer, n: usize) -> Vec<(Point, f64)> {
    let mut history = Vec::with_capacity(n);
    for trial in 0..n as u64 {
        let point = proposer.propose(&history, trial);
        let loss = objective.observed(&point, trial);
        history.push((point, loss));
    }
    history
}

/// Mean true value of the ten best by observed value, and how many operation sets they have.
fn ten_best(objective: &Objective, history: &[(Point, f64)]) -> (f64, f64) {
    let mut sorted: Vec<&(Point, f64)> = history.iter().collect();
    sorted.sort_by(|a, b| a.1.total_cmp(&b.1));
    let best = &sorted[..N_BEST];
    let ops = |point: &Point| -> Vec<usize> {
        let option = |coordinate: &Coordinate| match coordinate {
            Coordinate::Option(option) => Some(*option),
            _ => None,
        };
        point.0.iter().filter_map(option).collect()
    };
    let mut sets: Vec<Vec<usize>> = best.iter().map(|(point, _)| ops(point)).collect();
    sets.sort_unstable();
    sets.dedup();
    let total: f64 = best.iter().map(|(point, _)| objective.truth(point)).sum();
    (total / N_BEST as f64, sets.len() as f64)
}

/// Mean and half width of the 95 % interval (t distribution).
fn interval(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    // The 97.5 % point of t with 39 and with 19 degrees of freedom.
    let t = if values.len() >= 40 { 2.023 } else { 2.093 };
    (mean, t * (variance / n).sqrt())
}

fn shown((mean, half): (f64, f64)) -> String {
    format!("{mean:+.2} ± {half:.2}")
}

/// Per checkpoint: TPE at n, random search at n, random search at 2n, distinct operation sets.
type Results = Vec<[Vec<f64>; 4]>;

fn measure(space: &PolicySpace, settings: TpeSettings, seeds: std::ops::Range<u64>) -> Results {
    let n_max = CHECKPOINTS[CHECKPOINTS.len() - 1];
    let mut results: Results = vec![Default::default(); CHECKPOINTS.len()];
    for seed in seeds {
        let objective = Objective::new(seed);
        let tpe = Tpe::new(space.space().clone(), seed, settings).expect("good settings");
        let random = RandomSearch::new(space.space().clone(), seed);
        let with_tpe = run(&objective, &tpe, n_max);
        let at_random = run(&objective, &random, 2 * n_max);
        for (n, columns) in CHECKPOINTS.into_iter().zip(&mut results) {
            let (tpe, n_sets) = ten_best(&objective, &with_tpe[..n]);
            let twice = ten_best(&objective, &at_random[..2 * n]).0;
            let once = ten_best(&objective, &at_random[..n]).0;
            for (column, value) in columns.iter_mut().zip([tpe, once, twice, n_sets]) {
                column.push(value);
            }
        }
    }
    results
}

fn spaces() -> [(&'static str, PolicySpace); 2] {
    [
        ("one sub-policy, 6 dimensions", PolicySpace::sub_policy()),
        ("the paper's 30 dimensions", PolicySpace::paper()),
    ]
}

fn differences(columns: &[Vec<f64>; 4]) -> Vec<f64> {
    columns[2].iter().zip(&columns[0]).map(|(random, tpe)| random - tpe).collect()
}

fn table() {
    println!("Mean true value of the ten best by observed value, in points of error against no");
    println!(
        "augmentation (lower is better), with 95 % intervals over {} seeds.",
        TEST_SEEDS.count()
    );
    let optima: Vec<f64> = TEST_SEEDS.map(|seed| Objective::new(seed).optimum()).collect();
    println!("The optimum is {} on average; noise σ = {NOISE_SD}.", shown(interval(&optima)));
    println!("Settings: {:?}\n", TpeSettings::POLICIES);
    for (name, space) in spaces() {
        let started = Instant::now();
        let results = measure(&space, TpeSettings::POLICIES, TEST_SEEDS);
        let mut truths: Vec<f64> = TEST_SEEDS
            .flat_map(|seed| {
                let random = RandomSearch::new(space.space().clone(), seed ^ 0x5eed);
                let objective = Objective::new(seed);
                (0..200).map(move |trial| objective.truth(&random.propose(&[], trial)))
            })
            .collect();
        truths.sort_by(f64::total_cmp);
        let at = |share: usize| truths[truths.len() * share / 1000];
        println!(
            "## {name}\n\nRandom points: median {:+.2}, 1 % below {:+.2}, 1 % above {:+.2}.\n",
            at(500),
            at(10),
            at(990)
        );
        println!(
            "| n | TPE at n | random at n | random at 2n | random at 2n − TPE at n, paired | \
                  TPE at n reaches random at 2n | distinct op sets in TPE's ten |"
        );
        println!("|---|---|---|---|---|---|---|");
        for (n, columns) in CHECKPOINTS.into_iter().zip(&results) {
            let (mean, half) = interval(&differences(columns));
            let verdict = match (mean - half >= 0.0, mean + half >= 0.0) {
                (true, _) => "yes, and is better",
                (false, true) => "not told apart",
                (false, false) => "no",
            };
            let [tpe, once, twice] = [0, 1, 2].map(|idx| shown(interval(&columns[idx])));
            let sets = interval(&columns[3]).0;
            println!(
                "| {n} | {tpe} | {once} | {twice} | {} | {verdict} | {sets:.1} |",
                shown((mean, half))
            );
        }
        println!("\n{:.1} s\n", started.elapsed().as_secs_f64());
    }
}

fn tune() {
    let chosen = TpeSettings::POLICIES;
    let mut all = vec![TpeSettings::CRATE];
    for (fit, alike) in [(Fit::Joint, true), (Fit::PerOption, false), (Fit::PerOption, true)] {
        all.push(TpeSettings { fit, alike, ..chosen });
    }
    for n_candidates in [1, 4, 96] {
        all.push(TpeSettings { n_candidates, ..chosen });
    }
    for (good_fraction, n_startup) in [(0.1, 20), (0.15, 20), (0.35, 20), (0.25, 10), (0.25, 40)] {
        all.push(TpeSettings { good_fraction, n_startup, ..chosen });
    }
    println!("Random search at 2n less TPE at n (above zero: TPE is better), tuning seeds.\n");
    println!("| space | settings | n = 50 | n = 100 | n = 200 |\n|---|---|---|---|---|");
    for (name, space) in spaces() {
        for settings in &all {
            let results = measure(&space, *settings, TUNING_SEEDS);
            let cells: Vec<String> =
                results.iter().map(|columns| shown(interval(&differences(columns)))).collect();
            println!("| {name} | {settings:?} | {} |", cells.join(" | "));
        }
    }
}

fn main() {
    if std::env::args().any(|argument| argument == "--tune") {
        tune();
    } else {
        table();
    }
}
