//! Corners: operations of a grid applied for certain, measured on all folds and remembered.
//!
//! Owns the grid, the parts into which D_A is cut, and the ledger's units of `structured`. Never
//! ranks anything.
//!
//! *Invariant*: a corner is measured once per part; every corner sees the same images and random
//! words, so that differences between them are paired.

use std::collections::HashMap;
use std::ops::Range;

use super::Context;
use super::objective::Measured;
use crate::augment::PreparedPolicy;
use crate::policy::{Magnitude, Op, OpStep, OpsProfile, SubPolicy};
use crate::search::error::SearchError;
use crate::search::lab::Lab;
use crate::search::space::{Direction, FoldedOp};

/// Strengths of an operation in a round's grid.
const N_STRENGTHS: u32 = 5;
/// Strengths are counted in steps of 1 / 40, so that a grid can be shifted.
const STEPS: u32 = 40;
/// By how many steps the grid of a round lies lower than 0.2, 0.4, …, 1: nothing else changes from
/// round to round, since the images and their random words are the lab's. After eight rounds it
/// begins again.
const SHIFTS: [u32; 8] = [0, 4, 2, 6, 1, 5, 3, 7];
/// Parts of D_A: one more for each halving.
pub(super) const N_PARTS: usize = 3;
/// Images over all folds that the first and the first two parts have, where there are enough.
const PART_ENDS: [usize; 2] = [100, 500];
/// The parts end no later than at these fractions (1 / n) of D_A, so that most is left for the end.
const PART_SHARES: [usize; 2] = [8, 4];
/// Images in D_A of a fold below which its parts would say nothing.
const HELD_OUT_MIN: usize = 24;
/// Image passes that a unit has at least, where there are as many: a unit costs a write to disk.
const UNIT_PASSES: usize = 1000;

/// An operation at a strength of a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct GridOp {
    /// Index into [`FoldedOp::ALL`].
    option: usize,
    /// Strength × [`STEPS`], at least 1.
    step: u32,
}

impl GridOp {
    /// The whole grid of a round, ascending.
    pub(super) fn all(round: u32) -> Vec<Self> {
        let options = 0..FoldedOp::ALL.len();
        options.flat_map(|option| Self::of(option, round)).collect()
    }

    /// An option's members of a round's grid, ascending.
    fn of(option: usize, round: u32) -> Vec<Self> {
        if FoldedOp::ALL[option].direction == Direction::NoLevel {
            return vec![Self { option, step: STEPS }];
        }
        let shift = SHIFTS[round.saturating_sub(1) as usize % SHIFTS.len()];
        let steps = (1..=N_STRENGTHS).map(|nth| nth * STEPS / N_STRENGTHS - shift);
        steps.map(|step| Self { option, step }).collect()
    }

    /// The member of a round's grid that is next to a strength in [0, 1], upwards if there is one.
    pub(super) fn near(option: usize, strength: f64, round: u32) -> Self {
        let members = Self::of(option, round);
        let above = members.iter().find(|member| member.strength() >= strength);
        *above.unwrap_or(&members[members.len() - 1])
    }

    fn strength(self) -> f64 {
        f64::from(self.step) / f64::from(STEPS)
    }

    pub(super) fn op(self) -> Op {
        FoldedOp::ALL[self.option].op
    }

    /// As an operation of the profile `fastaa`.
    pub(super) fn with_probability(self, probability: f64) -> OpStep {
        let folded = FoldedOp::ALL[self.option];
        let lambda = folded.lambda(self.strength());
        OpStep { op: folded.op, probability, magnitude: Magnitude::Fixed(lambda) }
    }

    /// Such as `Brightness− 0.4`.
    pub(super) fn in_words(self) -> String {
        let folded = FoldedOp::ALL[self.option];
        let has_two = FoldedOp::ALL.iter().filter(|other| other.op == folded.op).count() == 2;
        let sign = match folded.direction {
            Direction::Upper if has_two => "+",
            Direction::Lower => "−",
            Direction::NoLevel => return folded.op.name().to_owned(),
            _ => "",
        };
        format!("{}{sign} {}", folded.op.name(), self.strength())
    }
}

/// Two operations in the order in which they are applied.
pub(super) type Pair = [GridOp; 2];

/// What is applied for certain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Corner {
    /// Nothing.
    Clean,
    /// One operation.
    One(GridOp),
    /// Two, in order.
    Two(Pair),
}

impl Corner {
    /// The four corners of a pair: none, the first, the second, both.
    pub(super) fn of([first, second]: Pair) -> [Self; 4] {
        [Self::Clean, Self::One(first), Self::One(second), Self::Two([first, second])]
    }

    fn policy(self) -> PreparedPolicy {
        let ops = match self {
            Self::Clean => Vec::new(),
            Self::One(op) => vec![op],
            Self::Two(pair) => pair.to_vec(),
        };
        let ops = ops.into_iter().map(|op| op.with_probability(1.0)).collect();
        PreparedPolicy::from_parts(OpsProfile::Fastaa, 1, &[SubPolicy { weight: 1.0, ops }])
    }
}

/// The part of a fold's D_A that a stage of halving sees first; the last part is the rest.
pub(super) fn part(lab: &dyn Lab, fold: usize, part: usize) -> Range<usize> {
    let n_images = lab.n_held_out(fold);
    let end = |part: usize| match (PART_ENDS.get(part), PART_SHARES.get(part)) {
        (Some(end), Some(share)) => end.div_ceil(lab.n_folds()).min(n_images / share),
        _ => n_images,
    };
    (if part == 0 { 0 } else { end(part - 1) })..end(part)
}

/// What is known of corners.
pub(super) struct Corners<'a> {
    context: &'a Context<'a>,
    /// By corner and part: one measurement per fold.
    known: HashMap<(Corner, usize), Vec<Measured>>,
}

impl<'a> Corners<'a> {
    /// Nothing is known yet.
    ///
    /// # Errors
    /// A fold has too few images to be cut into parts.
    pub(super) fn new(context: &'a Context<'a>) -> Result<Self, SearchError> {
        let small = (0..context.lab.n_folds()).find(|&f| context.lab.n_held_out(f) < HELD_OUT_MIN);
        if let Some(fold) = small {
            return Err(SearchError::Unfit(format!(
                "fold {} holds {} images out, but 'structured' needs {HELD_OUT_MIN}; give the \
                 search more samples or fewer folds",
                fold + 1,
                context.lab.n_held_out(fold)
            )));
        }
        Ok(Self { context, known: HashMap::new() })
    }

    /// Measures those corners on a part of every fold that are not known yet. `stage` names the
    /// units in the ledger; equal stages must get equal corners.
    ///
    /// # Errors
    /// A sample cannot be read, or the journal has another search's units.
    pub(super) fn measure(
        &mut self,
        stage: &str,
        corners: &[Corner],
        part: usize,
    ) -> Result<(), SearchError> {
        let mut missing: Vec<Corner> = corners.to_vec();
        missing.retain(|&corner| !self.known.contains_key(&(corner, part)));
        missing.sort_unstable();
        missing.dedup();
        let Context { lab, ledger, .. } = *self.context;
        let jobs = self.jobs(&missing, part);
        ledger.begin_stage(stage, jobs.len() as u64);
        let measured = ledger.parallel(&jobs, |&(fold, chunk, corners)| {
            ledger.part(&format!("fold {}", fold + 1));
            let images = self::part(lab, fold, part);
            let key = self.context.key(&format!("corners/{stage}/{fold}/{chunk}"));
            let passes = (images.len() * corners.len()) as u64;
            let measured: Vec<Measured> = ledger.unit(&key, passes, || {
                let measure =
                    |&corner: &Corner| Measured::of(lab, fold, images.clone(), &corner.policy(), 1);
                corners.iter().map(measure).collect()
            })?;
            ledger.step();
            if measured.len() == corners.len() {
                return Ok(measured);
            }
            let (found, expected) = (measured.len(), corners.len());
            Err(SearchError::Unfit(format!(
                "'{key}' in the search's journal has {found} measurements instead of {expected}; \
                 move the journal away to start afresh"
            )))
        })?;
        // Jobs come fold by fold, so that every corner gets its folds in order.
        for ((_, _, corners), measured) in jobs.iter().zip(measured) {
            for (&corner, measured) in corners.iter().zip(measured) {
                self.known.entry((corner, part)).or_default().push(measured);
            }
        }
        Ok(())
    }

    /// (fold, number of the chunk, its corners), fold by fold.
    fn jobs<'b>(&self, corners: &'b [Corner], part: usize) -> Vec<(usize, usize, &'b [Corner])> {
        let chunks = |fold| {
            let n_images = self::part(self.context.lab, fold, part).len();
            let per_unit = UNIT_PASSES.div_ceil(n_images.max(1));
            let chunks = corners.chunks(per_unit).enumerate();
            chunks.map(move |(chunk, corners)| (fold, chunk, corners))
        };
        (0..self.context.lab.n_folds()).flat_map(chunks).collect()
    }

    /// A pair's corners by fold, each as the mean over the parts' images.
    ///
    /// All of them must have been measured.
    pub(super) fn by_fold(&self, pair: Pair, parts: Range<usize>) -> Vec<[Measured; 4]> {
        let folds = 0..self.context.lab.n_folds();
        folds
            .map(|fold| {
                Corner::of(pair).map(|corner| {
                    let parts = parts.clone().map(|part| {
                        let n_images = self::part(self.context.lab, fold, part).len();
                        (self.known[&(corner, part)][fold], n_images)
                    });
                    Measured::mean(&parts.collect::<Vec<_>>())
                })
            })
            .collect()
    }

    /// One operation (or nothing), as the mean over folds and the parts' images.
    pub(super) fn pooled(&self, corner: Corner, parts: Range<usize>) -> Measured {
        let folds = 0..self.context.lab.n_folds();
        let measured = parts.flat_map(|part| {
            folds.clone().map(move |fold| {
                let n_images = self::part(self.context.lab, fold, part).len();
                (self.known[&(corner, part)][fold], n_images)
            })
        });
        Measured::mean(&measured.collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_has_a_grid_of_83_of_its_own() {
        let mut seen: Vec<u32> = Vec::new();
        for round in 1..=8 {
            let grid = GridOp::all(round);
            assert_eq!(grid.len(), 83);
            assert!(grid.is_sorted());
            for op in &grid {
                let step = op.with_probability(1.0);
                assert!(matches!(step.magnitude, Magnitude::Fixed(l) if (0.0..=1.0).contains(&l)));
            }
            seen.extend(GridOp::of(0, round).iter().map(|op| op.step));
        }
        seen.sort_unstable();
        assert!(seen.into_iter().eq(1..=40));
        assert_eq!(GridOp::all(9), GridOp::all(1));
    }

    #[test]
    fn strengths_go_to_the_next_one_of_the_grid() {
        for (strength, step) in [(0.0, 8), (0.2, 8), (0.21, 16), (1.0, 40)] {
            assert_eq!(GridOp::near(4, strength, 1).step, step);
        }
        assert_eq!(GridOp::near(4, 1.0, 2).step, 36);
        assert_eq!(GridOp::near(6, 0.1, 2).step, 40);
        let words = |option| GridOp::near(option, 0.3, 1).in_words();
        assert_eq!(words(4), "Rotate 0.4");
        assert_eq!((words(14), words(15)), ("Brightness+ 0.4".into(), "Brightness− 0.4".into()));
        assert_eq!(words(6), "Invert");
    }
}
