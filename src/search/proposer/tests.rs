//! Tests of the proposers.

use std::collections::HashSet;

use super::*;
use crate::search::space::{Dimension, Parent, PolicySpace};

const FITS: [TpeSettings; 4] = {
    let base = TpeSettings::CRATE;
    [
        base,
        TpeSettings { fit: Fit::PerOption, ..base },
        TpeSettings { alike: true, ..base },
        TpeSettings { fit: Fit::PerOption, alike: true, ..base },
    ]
};

fn spaces() -> Vec<Space> {
    let mut spaces: Vec<Space> =
        [PolicySpace::paper(), PolicySpace::sub_policy(), PolicySpace::folded()]
            .iter()
            .map(|space| space.space().clone())
            .collect();
    spaces.push(mixed());
    spaces
}

/// Free continuous dimensions beside a slot, with a range that is not [0, 1].
fn mixed() -> Space {
    let dimension = |name: &str, kind, parent| Dimension { name: name.to_owned(), kind, parent };
    Space::new(vec![
        dimension("tau", Kind::Continuous { lo: -3.0, hi: 40.0 }, None),
        dimension("draws", Kind::Categorical { n_options: 3 }, None),
        dimension("none", Kind::Continuous { lo: 0.0, hi: 1.0 }, None),
        dimension(
            "spread",
            Kind::Continuous { lo: 5.0, hi: 6.0 },
            Some(Parent { dimension: 1, unused_for: vec![0] }),
        ),
    ])
    .unwrap()
}

fn tpe(space: &Space, seed: u64, settings: TpeSettings) -> Tpe {
    Tpe::new(space.clone(), seed, settings).unwrap()
}

/// Options count their index, reals their distance from 0.3 of their range.
fn distance(space: &Space, point: &Point) -> f64 {
    let terms = space.dimensions().iter().zip(&point.0).map(|(dimension, coordinate)| {
        match (dimension.kind, *coordinate) {
            (Kind::Categorical { n_options }, Coordinate::Option(option)) => {
                option as f64 / n_options as f64
            }
            (Kind::Continuous { lo, hi }, Coordinate::Real(real)) => {
                ((real - lo) / (hi - lo) - 0.3).abs()
            }
            _ => 0.0,
        }
    });
    terms.sum()
}

fn searched(space: &Space, proposer: &dyn Proposer, n: u64) -> Vec<(Point, f64)> {
    let mut history = Vec::new();
    for trial in 0..n {
        let point = proposer.propose(&history, trial);
        let loss = distance(space, &point);
        history.push((point, loss));
    }
    history
}

fn mean_of_ten_best(history: &[(Point, f64)]) -> f64 {
    let mut losses: Vec<f64> = history.iter().map(|(_, loss)| *loss).collect();
    losses.sort_by(f64::total_cmp);
    losses[..10].iter().sum::<f64>() / 10.0
}

#[test]
fn every_proposal_lies_in_the_space() {
    for space in spaces() {
        let random = RandomSearch::new(space.clone(), 5);
        for (point, _) in searched(&space, &random, 300) {
            space.check(&point).unwrap();
        }
        for settings in FITS {
            for (point, _) in searched(&space, &tpe(&space, 5, settings), 80) {
                space.check(&point).unwrap();
            }
        }
    }
}

#[test]
fn a_proposal_is_a_function_of_seed_trial_and_history() {
    for space in spaces() {
        for settings in FITS {
            let proposer = tpe(&space, 1, settings);
            let history = searched(&space, &proposer, 40);
            let proposed = proposer.propose(&history, 40);
            // What was proposed in between, and which instance is asked, changes nothing.
            let _ = proposer.propose(&history, 77);
            assert_eq!(proposer.propose(&history, 40), proposed);
            assert_eq!(tpe(&space, 1, settings).propose(&history, 40), proposed);
            assert_eq!(searched(&space, &tpe(&space, 1, settings), 40), history);
            assert_ne!(tpe(&space, 2, settings).propose(&history, 40), proposed);
            assert_ne!(proposer.propose(&history, 41), proposed);
            assert_ne!(proposer.propose(&history[..20], 40), proposed);
        }
        let random = RandomSearch::new(space.clone(), 1);
        assert_eq!(random.propose(&[], 3), RandomSearch::new(space.clone(), 1).propose(&[], 3));
        assert_ne!(random.propose(&[], 3), random.propose(&[], 4));
        assert_ne!(random.propose(&[], 3), RandomSearch::new(space.clone(), 2).propose(&[], 3));
    }
}

#[test]
fn the_order_of_the_history_does_not_matter() {
    for space in spaces() {
        for settings in FITS {
            let proposer = tpe(&space, 9, settings);
            let mut history = searched(&space, &proposer, 40);
            // Equal losses too: the points then decide.
            for (_, loss) in &mut history {
                *loss = (*loss * 2.0).floor();
            }
            let proposed = proposer.propose(&history, 40);
            history.reverse();
            assert_eq!(proposer.propose(&history, 40), proposed);
            history.rotate_left(13);
            history.swap(0, 21);
            assert_eq!(proposer.propose(&history, 40), proposed);
        }
    }
}

#[test]
fn start_up_is_random_search_and_counts_finite_losses_only() {
    let space = mixed();
    let settings = TpeSettings { n_startup: 12, ..TpeSettings::CRATE };
    let proposer = tpe(&space, 3, settings);
    let random = RandomSearch::new(space.clone(), 3);
    let mut history = searched(&space, &random, 12);
    assert_eq!(searched(&space, &proposer, 12), history);
    assert_ne!(proposer.propose(&history, 12), random.propose(&[], 12));
    history[7].1 = f64::NAN;
    assert_eq!(proposer.propose(&history, 12), random.propose(&[], 12));
}

#[test]
fn losses_that_are_no_numbers_are_all_as_bad_as_can_be() {
    let space = PolicySpace::sub_policy().space().clone();
    for settings in FITS {
        let proposer = tpe(&space, 4, settings);
        let with = |bad: f64| {
            let mut history = searched(&space, &RandomSearch::new(space.clone(), 4), 60);
            for (_, loss) in history.iter_mut().step_by(3) {
                *loss = bad;
            }
            (40..60).map(|trial| proposer.propose(&history, trial)).collect::<Vec<_>>()
        };
        assert_eq!(with(f64::NAN), with(f64::INFINITY));
        assert_eq!(with(f64::NAN), with(f64::NEG_INFINITY));
    }
}

#[test]
fn trials_without_a_loss_are_avoided_even_where_they_are_many() {
    let space = PolicySpace::sub_policy().space().clone();
    for settings in FITS {
        let proposer = tpe(&space, 6, settings);
        let mut history = searched(&space, &RandomSearch::new(space.clone(), 6), 200);
        let mut n_failed = 0;
        for (point, loss) in &mut history {
            let fails = matches!(point.0[0], Coordinate::Option(option) if option >= 3);
            if fails {
                *loss = f64::NAN;
                n_failed += 1;
            }
        }
        assert!(n_failed > 140, "most trials fail here");
        let failing = |trial: &u64| {
            let point = proposer.propose(&history, *trial);
            matches!(point.0[0], Coordinate::Option(option) if option >= 3)
        };
        // At random, 80 of 100 would.
        let n = (1000..1100).filter(failing).count();
        assert!(n < if settings.alike { 75 } else { 50 }, "{n} with {settings:?}");
    }
}

#[test]
fn points_of_another_space_are_left_out() {
    let space = PolicySpace::sub_policy().space().clone();
    let proposer = tpe(&space, 8, TpeSettings::POLICIES);
    let mut history = searched(&space, &proposer, 40);
    let proposed = proposer.propose(&history, 40);
    history.push((RandomSearch::new(mixed(), 8).propose(&[], 0), -100.0));
    assert_eq!(proposer.propose(&history, 40), proposed);
    let nothing_known = vec![(Point(Vec::new()), 0.0); 100];
    assert_eq!(proposer.propose(&nothing_known, 0), proposer.propose(&[], 0));
}

#[test]
fn every_option_is_reached() {
    let space = PolicySpace::sub_policy().space().clone();
    let options = |history: &[(Point, f64)], slot: usize| -> HashSet<usize> {
        let option = |point: &Point| match point.0[slot] {
            Coordinate::Option(option) => Some(option),
            _ => None,
        };
        history.iter().filter_map(|(point, _)| option(point)).collect()
    };
    let random = searched(&space, &RandomSearch::new(space.clone(), 0), 200);
    assert_eq!((options(&random, 0).len(), options(&random, 3).len()), (15, 15));
    for settings in FITS {
        // TPE must not shut itself in: of a fitted history, every option stays possible.
        let proposer = tpe(&space, 0, settings);
        let history = searched(&space, &proposer, 60);
        let next: Vec<(Point, f64)> =
            (60..1500).map(|trial| (proposer.propose(&history, trial), 0.0)).collect();
        assert_eq!((options(&next, 0).len(), options(&next, 3).len()), (15, 15));
    }
}

#[test]
fn tpe_beats_random_by_far_on_a_trivial_objective() {
    let (small, folded) = (PolicySpace::sub_policy(), PolicySpace::folded());
    for (space, share) in [(small, 0.65), (folded, 0.65), (PolicySpace::paper(), 0.8)] {
        let space = space.space();
        let (mut with_tpe, mut at_random) = (0.0, 0.0);
        for seed in 100..104 {
            let proposer = tpe(space, seed, TpeSettings::POLICIES);
            with_tpe += mean_of_ten_best(&searched(space, &proposer, 200));
            let control = RandomSearch::new(space.clone(), seed);
            at_random += mean_of_ten_best(&searched(space, &control, 200));
        }
        let n = space.dimensions().len();
        assert!(with_tpe < share * at_random, "{n} dimensions: {with_tpe} vs {at_random}");
    }
}

#[test]
fn continuous_dimensions_alone_converge() {
    let real = |name: &str| Dimension {
        name: name.to_owned(),
        kind: Kind::Continuous { lo: -10.0, hi: 10.0 },
        parent: None,
    };
    let space = Space::new(vec![real("a"), real("b")]).unwrap();
    let (mut with_tpe, mut at_random) = (0.0, 0.0);
    for seed in 100..110 {
        let proposer = tpe(&space, seed, TpeSettings::SCALARS);
        with_tpe += mean_of_ten_best(&searched(&space, &proposer, 100));
        let control = RandomSearch::new(space.clone(), seed);
        at_random += mean_of_ten_best(&searched(&space, &control, 200));
    }
    assert!(with_tpe < 0.5 * at_random, "{with_tpe} vs {at_random} with twice the trials");
}

#[test]
fn impossible_settings_are_refused_by_name() {
    let check = |settings: TpeSettings, expected: &str| {
        let error = Tpe::new(mixed(), 0, settings).unwrap_err().to_string();
        assert!(error.contains(expected), "expected '{expected}' in '{error}'");
    };
    let base = TpeSettings::POLICIES;
    check(TpeSettings { n_startup: 1, ..base }, "'n_startup' is 1");
    check(TpeSettings { good_fraction: 0.0, ..base }, "'good_fraction' is 0");
    check(TpeSettings { good_fraction: 1.0, ..base }, "'good_fraction' is 1");
    check(TpeSettings { good_fraction: f64::NAN, ..base }, "'good_fraction' is NaN");
    check(TpeSettings { n_candidates: 0, ..base }, "'n_candidates' is 0");
}
