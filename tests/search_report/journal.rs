//! Made-up values of a search on Fashion-MNIST, as its units would be.

use std::collections::BTreeMap;

use fastaa::image::Image;
use fastaa::policy::Op;
use fastaa::search::affinity::{AffinityTable, Cell, strengths};
use fastaa::search::algorithm::{TrainingValue, Trial};
use fastaa::search::gate::{Arm, Comparison, Verdict};
use fastaa::search::lab::{Change, Score};
use fastaa::search::round::{Cost, RoundRecord};
use fastaa::search::{FoldOptions, FoldSummary, plan_folds};
use serde_json::{Value, json};

/// Of a real plan.
pub(crate) fn folds() -> FoldSummary {
    let labels: Vec<i64> = (0..6_000).map(|idx| idx % 10).collect();
    let options = FoldOptions { n_folds: 5, reduced: 4_000, gate_images: 1_000, seed: 3 };
    plan_folds(&labels, 10, &options).unwrap().summary()
}

/// Geometric operations cost more with strength; the weakest colours win a little.
pub(crate) fn affinity() -> AffinityTable {
    let row = |op: Op| {
        let slope = [22.0, 20.0, 31.0, 29.0, 38.0, 1.2, 46.0, 3.1, 17.0, 2.4][op as usize % 10];
        let cell = |strength: f64| {
            let drop = slope * strength * strength - 0.4;
            Cell {
                strength,
                drop_by_fold: (-2..=2).map(|fold| drop + 0.2 * f64::from(fold)).collect(),
                loss_gain: drop / 30.0,
                change: Change { changed: 0.98, distance: 0.1 * strength },
            }
        };
        (op, strengths(op).into_iter().map(cell).collect())
    };
    let clean = Score { loss: 0.4321, accuracy: 0.8551 };
    AffinityTable { clean, rows: Op::ALL.into_iter().map(row).collect() }
}

/// Ranged: each operation up to a reach of its own.
fn candidate(number: u32) -> Value {
    let reach = [0.3, 0.3, 0.25, 0.25, 0.3, 1.0, 1.0, 1.0, 0.45, 0.9, 1.0, 0.8, 0.7, 1.0, 0.2];
    let sub_policies: Vec<Value> = Op::ALL
        .iter()
        .zip(reach)
        .filter(|(op, _)| **op != Op::Invert)
        .map(|(op, reach)| {
            let weight = 1.0 + f64::from(*op as u8 % 3);
            json!({"weight": weight, "ops": [[op.name(), 0.9, [0.0, reach]], ["Color", 0.2, 0.4]]})
        })
        .collect();
    json!({
        "name": format!("fashion-mnist-r{number}"),
        "ops_profile": "trivial-wide",
        "draws": 1,
        "sub_policies": sub_policies,
    })
}

fn arm(role: &str, policy: &str, accuracy: f64, n_seeds: u32) -> Arm {
    let accuracy = (0..n_seeds).map(|seed| accuracy + f64::from(seed % 4) / 1000.0).collect();
    Arm {
        role: role.to_owned(),
        policy: policy.to_owned(),
        policy_id: "0123456789abcdef".repeat(2),
        accuracy,
    }
}

fn comparison(rival: &str, gain: f64, half: f64) -> Comparison {
    Comparison {
        rival: rival.to_owned(),
        gain,
        lower: gain - 0.9 * half,
        interval: (gain - half, gain + half),
        se_seeds: half / 2.5,
        se_images: half / 4.0,
        degrees: 9.3,
    }
}

fn verdict(number: u32) -> Verdict {
    let is_better = number == 1;
    let incumbent = if is_better { "none" } else { "fashion-mnist@1" };
    let comparisons = if is_better {
        vec![comparison("incumbent", 1.231, 0.775), comparison("trivial-wide", 2.114, 0.802)]
    } else {
        vec![comparison("incumbent", -0.345, 0.612), comparison("trivial-wide", 1.9, 0.7)]
    };
    Verdict {
        is_better,
        reason: if is_better { "better than every rival." } else { "not better." }.to_owned(),
        test: number,
        alpha: 0.0304 / f64::from(number * number),
        n_images: 1_000,
        n_seeds: 8,
        n_seeds_max: 16,
        detectable_gain: 0.91,
        arms: vec![
            arm("candidate", &format!("fashion-mnist-r{number}"), 0.8423, 8),
            arm("incumbent", incumbent, 0.83, 8),
            arm("trivial-wide", "trivial-wide", 0.819, 8),
        ],
        comparisons,
    }
}

fn trials() -> Vec<Trial> {
    let loss = |fold: u64, trial: u64| {
        let noise = ((trial * 7_919 + fold * 104_729) % 1_000) as f64 / 1_000.0;
        0.45 + 0.01 * fold as f64 + 0.3 * noise * (0.3 + 0.7 / (1.0 + trial as f64 / 40.0))
    };
    let what = "τ = 8.1, draws 1, no operation 0.12".to_owned();
    (0..1_000)
        .map(|idx| (idx % 5, idx / 5))
        .map(|(fold, trial)| Trial {
            fold: usize::try_from(fold).ok(),
            trial,
            loss: loss(fold, trial),
            what: what.clone(),
        })
        .collect()
}

/// Round 1 is published, 2 is kept by the gate, 3 is not put to it.
pub(crate) fn round(number: u32) -> RoundRecord {
    let costs = [("folds", 812.4), ("affinity", 96.1), ("proposals", 231.9), ("gate", 604.0)];
    let costs = costs.iter().skip(if number > 1 { 2 } else { 0 });
    let value = TrainingValue { candidate: 0.81, incumbent: 0.815 };
    RoundRecord {
        round: number,
        algorithm: "ranged".to_owned(),
        candidate: candidate(number),
        incumbent: if number == 1 { "none" } else { "fashion-mnist@1" }.to_owned(),
        training_value: (number == 3).then_some(value),
        trials: trials(),
        details: json!({"budget": 8.1, "dropped": ["Invert"]}),
        verdict: (number < 3).then(|| verdict(number)),
        version: (number == 1).then_some(1),
        summary: match number {
            1 => "published fashion-mnist@1: better than none and than trivial-wide.",
            2 => "kept fashion-mnist@1: the candidate is not better than it.",
            _ => "kept: training value below the incumbent's",
        }
        .to_owned(),
        costs: costs
            .map(|&(part, cpu_seconds)| (part.to_owned(), Cost { cpu_seconds, passes: 10_000 }))
            .collect::<BTreeMap<_, _>>(),
        paper_cost: Cost { cpu_seconds: 5_000.0, passes: 8_000_000 },
    }
}

/// Gray and coloured pictures that show what is done to them.
pub(crate) fn samples() -> Vec<Image> {
    let gray = |phase: usize| {
        let mut image = Image::black(28, 28, 1);
        for (idx, value) in image.data.iter_mut().enumerate() {
            let (x, y) = (idx % 28, idx / 28);
            let is_inside = (5..23).contains(&x) && (3..25).contains(&y) && (x + phase) % 9 > 1;
            *value = if is_inside { u8::try_from(60 + 7 * y).unwrap() } else { 0 };
        }
        image
    };
    let mut colour = Image::black(32, 32, 3);
    for (idx, value) in colour.data.iter_mut().enumerate() {
        let (x, y, channel) = (idx / 3 % 32, idx / 96, idx % 3);
        *value = u8::try_from([8 * x, 8 * y, 4 * (x + y)][channel].min(255)).unwrap();
    }
    vec![gray(0), gray(4), colour]
}
