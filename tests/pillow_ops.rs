//! Every operation, in every profile, against the installed Pillow and torchvision, byte for byte.
//!
//! The reference results come from `tests/golden/pillow_ops.py`, which this test starts; its
//! header describes the records. Needs the Python environment that `make setup` makes.

mod ops_support;

use fastaa::augment::{Scratch, apply_op};
use fastaa::image::Image;

use ops_support::{Record, Records, judge};

#[test]
fn every_operation_equals_pillow_and_torchvision_byte_for_byte() {
    let mut records = Records::start();
    let (mut actual, mut scratch) = (Image::default(), Scratch::default());
    let (mut n_cases, mut differences) = (0_u64, Vec::new());
    let announced = loop {
        let case = match records.read() {
            Record::Case(case) => case,
            Record::End { n_cases } => break n_cases,
        };
        n_cases += 1;
        let input = &records.images[case.image];
        actual.clone_from(&input.0);
        let (op, profile) = (case.op, case.profile);
        let (lambda, negative, centre) = (case.lambda, case.negative, case.centre);
        apply_op(&mut actual, &mut scratch, op, profile, lambda, negative, centre);
        if actual.data != case.expected {
            differences.push(case.describe(input, &actual.data));
        }
    };
    println!("{n_cases} cases compared on {} images", records.images.len());
    judge(n_cases, announced, &differences);
}
