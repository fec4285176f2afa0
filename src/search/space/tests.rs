//! Tests of the search spaces.

use super::*;
use Coordinate::{Option as Opt, Real, Unused};

fn real(name: &str, lo: f64, hi: f64) -> Dimension {
    Dimension { name: name.to_owned(), kind: Kind::Continuous { lo, hi }, parent: None }
}

#[test]
fn the_spaces_have_the_dimensions_of_the_paper() {
    let names = |space: &PolicySpace| -> Vec<String> {
        space.space().dimensions().iter().map(|dimension| dimension.name.clone()).collect()
    };
    let paper = PolicySpace::paper();
    assert_eq!(paper.space().dimensions().len(), 30);
    assert_eq!(paper.space().slots().len(), 10);
    assert_eq!(paper.space().slots()[9], Slot { option: 27, reals: vec![28, 29] });
    assert_eq!(names(&paper)[27..], ["op_4_1", "p_4_1", "level_4_1"]);
    let expected = ["op_0_0", "p_0_0", "level_0_0", "op_0_1", "p_0_1", "level_0_1"];
    assert_eq!(names(&PolicySpace::sub_policy()), expected);
    assert_eq!(names(&PolicySpace::folded()), expected);
    assert!(paper.space().free_reals().is_empty());
}

#[test]
fn a_point_becomes_the_policy_that_it_says() {
    let space = PolicySpace::sub_policy();
    let point = Point(vec![Opt(4), Real(0.25), Real(1.0), Opt(6), Real(1.0), Real(0.5)]);
    let policy = space.policy(&point, "found").unwrap();
    assert_eq!(policy.ops_profile(), OpsProfile::Fastaa);
    let ops = &policy.sub_policies()[0].ops;
    let listed: Vec<_> =
        ops.iter().map(|step| (step.op.name(), step.probability, step.magnitude)).collect();
    assert_eq!(
        listed,
        [("Rotate", 0.25, Magnitude::Fixed(1.0)), ("Invert", 1.0, Magnitude::Fixed(0.5))]
    );
    let five = Point(point.0.repeat(5));
    assert_eq!(PolicySpace::paper().policy(&five, "five").unwrap().sub_policies().len(), 5);
    assert!(space.policy(&five, "five").is_err());
    assert!(space.policy(&point, "").is_err());
}

#[test]
fn folding_starts_at_the_identity_and_reaches_both_ends_once() {
    for op in Op::ALL {
        let folded: Vec<FoldedOp> =
            FoldedOp::ALL.into_iter().filter(|folded| folded.op == op).collect();
        let ends: Vec<f64> = folded.iter().map(|folded| folded.lambda(1.0)).collect();
        let starts: Vec<f64> = folded.iter().map(|folded| folded.lambda(0.0)).collect();
        let (start, expected) = match op {
            // Mirrored by the profile: one half of the range is the whole distribution.
            _ if OpsProfile::Fastaa.has_random_sign(op) => (0.5, vec![1.0]),
            Op::Contrast | Op::Color | Op::Brightness | Op::Sharpness => (0.5, vec![1.0, 0.0]),
            // Threshold 256 and 8 bits change nothing; nor does a box of side 0.
            Op::Solarize | Op::Posterize => (1.0, vec![0.0]),
            Op::Cutout => (0.0, vec![1.0]),
            _ => (0.0, vec![0.0]),
        };
        assert_eq!(ends, expected, "{op:?}");
        assert_eq!(starts, vec![start; folded.len()], "{op:?}");
        if start.to_bits() == 0.5_f64.to_bits() {
            let strengths = folded.iter().map(|folded| (2.0 * folded.lambda(0.25) - 1.0).abs());
            assert_eq!(strengths.collect::<Vec<_>>(), vec![0.25; folded.len()], "{op:?}");
        }
    }
}

#[test]
fn levels_are_unused_exactly_where_an_operation_has_none() {
    let space = PolicySpace::folded();
    for (option, folded) in FoldedOp::ALL.into_iter().enumerate() {
        let point =
            |level| Point(vec![Opt(option), Real(1.0), level, Opt(0), Real(0.0), Real(0.5)]);
        let has_level = folded.op.has_magnitude();
        assert_eq!(space.space().check(&point(Real(0.5))).is_ok(), has_level, "{folded:?}");
        assert_eq!(space.space().check(&point(Unused)).is_ok(), !has_level, "{folded:?}");
    }
    let mut point = Point(vec![Opt(5), Real(1.0), Unused, Opt(0), Real(0.0), Real(0.5)]);
    assert_eq!(space.sub_policies(&point).unwrap()[0].ops[0].op, Op::AutoContrast);
    point.0[0] = Opt(19);
    assert!(space.sub_policies(&point).is_err());
}

#[test]
fn points_survive_json_bit_for_bit() {
    let point = Point(vec![Opt(0), Real(1.0), Real(0.1 + 0.2), Opt(14), Real(0.0), Unused]);
    let text = serde_json::to_string(&point).unwrap();
    assert_eq!(text, "[0,1.0,0.30000000000000004,14,0.0,null]");
    assert_eq!(serde_json::from_str::<Point>(&text).unwrap(), point);
}

#[test]
fn points_outside_are_refused_by_name() {
    let space = PolicySpace::sub_policy();
    let check = |idx: usize, coordinate, expected: &str| {
        let mut point = Point(vec![Opt(4), Real(0.25), Real(1.0), Opt(6), Real(1.0), Real(0.5)]);
        point.0[idx] = coordinate;
        let error = space.space().check(&point).unwrap_err().to_string();
        assert!(error.contains(expected), "expected '{expected}' in '{error}'");
    };
    check(0, Opt(15), "'op_0_0' is Option(15); it must be an option from 0 to 14");
    check(0, Real(3.0), "'op_0_0'");
    check(1, Real(1.0001), "'p_0_0' is Real(1.0001); it must be a number in [0.0, 1.0]");
    check(2, Real(f64::NAN), "'level_0_0'");
    check(5, Unused, "'level_0_1'");
}

#[test]
fn bad_spaces_are_refused() {
    let check = |dimensions: Vec<Dimension>, expected: &str| {
        let error = Space::new(dimensions).unwrap_err().to_string();
        assert!(error.contains(expected), "expected '{expected}' in '{error}'");
    };
    let child = |of: usize| Dimension {
        parent: Some(Parent { dimension: of, unused_for: vec![2] }),
        ..real("child", 0.0, 1.0)
    };
    let option =
        |n_options| Dimension { kind: Kind::Categorical { n_options }, ..real("option", 0.0, 1.0) };
    check(vec![], "0 dimensions");
    check(vec![real("a", 0.0, 1.0), real("a", 0.0, 1.0)], "'a': the name is taken");
    check(vec![real("a", 1.0, 1.0)], "run upwards");
    check(vec![real("a", f64::NAN, 1.0)], "run upwards");
    check(vec![real("a", 0.0, f64::INFINITY)], "finite");
    check(vec![option(0)], "0 options");
    check(vec![real("a", 0.0, 1.0), child(0)], "'child': its parent must be");
    check(vec![option(3), child(1)], "'child': its parent must be");
    check(vec![option(2), child(0)], "unused for option 2");
    assert!(Space::new(vec![option(3), child(0)]).is_ok());
}
