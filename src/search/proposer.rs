//! Who says what the search tries next: multivariate TPE, and random search as its control.
//!
//! Owns everything of the crate `optimizer`. Never evaluates a point, and keeps no state: a
//! proposal is a pure function of (space, settings, seed, trial, finished trials), so that a search
//! that was killed goes on as if it hadn't been, and no proposal can be fitted on a trial that is
//! still running.
//!
//! *Invariants*: proposals lie in the space. The order of the history does not matter (it is sorted
//! by loss, then by point, before anything is fitted). A loss that is not a finite number counts as
//! worse than every finite one and never guides a proposal. A point of another space is left out;
//! whoever reads points from a file refuses them first ([`Space::check`]).
//!
//! *Limits*: the crate's categorical dimensions are modelled one by one, its continuous ones
//! jointly, by Gaussian kernels cut at the bounds. It iterates over a `HashMap` when it draws
//! several categorical dimensions at once, so that equal seeds give different draws; here each
//! question to it has one categorical dimension or only continuous ones, which is the same model
//! and always the same answer.

use std::cmp::Ordering;
use std::collections::HashMap;

use optimizer::distribution::{CategoricalDistribution, Distribution, FloatDistribution};
use optimizer::param::ParamValue;
use optimizer::parameter::ParamId;
use optimizer::sampler::CompletedTrial;
use optimizer::sampler::tpe::MultivariateTpeSampler;

use super::space::{Coordinate, Kind, Point, Slot, Space};
use crate::random::{Purpose, SampleRng};

/// Proposes the next point of a search. Lower losses are better.
pub trait Proposer: Send + Sync {
    /// The point to try as number `trial`, in view of the finished trials (point, loss).
    ///
    /// Equal arguments give equal points, whatever was proposed before and in whatever order the
    /// history comes.
    fn propose(&self, history: &[(Point, f64)], trial: u64) -> Point;
}

/// Why a proposer cannot be made.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum ProposerError {
    /// A setting is out of its range.
    #[error("TPE setting '{name}' is {value}; it must be {expected}")]
    Setting {
        /// Which.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What would be right.
        expected: &'static str,
    },
}

/// The control: every point uniform in the space, whatever the history says.
#[derive(Clone, Debug)]
pub struct RandomSearch {
    space: Space,
    seed: u64,
}

impl RandomSearch {
    /// Random search in a space.
    pub fn new(space: Space, seed: u64) -> Self {
        Self { space, seed }
    }
}

impl Proposer for RandomSearch {
    fn propose(&self, _history: &[(Point, f64)], trial: u64) -> Point {
        random_point(&self.space, self.seed, trial)
    }
}

/// What is told apart when the continuous dimensions are fitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// All continuous dimensions in one density, whatever their parents' options are: the crate's
    /// own behaviour, in which a level of Rotate says something about one of Posterize.
    Joint,
    /// One density per slot, fitted on the trials that had the option chosen for it: a level is
    /// another dimension for each operation, as the tree in TPE's name means it.
    PerOption,
}

/// How TPE models the history.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TpeSettings {
    /// Trials with a finite loss before anything is fitted; until then proposals are those of
    /// [`RandomSearch`] with the same seed. At least 2.
    pub n_startup: usize,
    /// Share of the trials that counts as good, in (0, 1).
    pub good_fraction: f64,
    /// Draws from the good trials' density, of which the one with the largest ratio of good to bad
    /// is taken; continuous dimensions only. At least 1.
    pub n_candidates: usize,
    /// How continuous dimensions are fitted.
    pub fit: Fit,
    /// Whether slots of the same shape share their observations: for spaces whose objective does
    /// not care (much) which slot holds what, such as the sub-policies of a mean objective. Wrong
    /// where two slots only happen to have the same shape.
    pub alike: bool,
}

impl TpeSettings {
    /// The crate's own defaults. In a space of sub-policies they do not reach random search with
    /// twice the evaluations (`benches/proposer.rs`).
    pub const CRATE: Self = Self {
        n_startup: 10,
        good_fraction: 0.25,
        n_candidates: 24,
        fit: Fit::Joint,
        alike: false,
    };

    /// For spaces of sub-policies ([`super::space::PolicySpace`]): what `benches/proposer.rs`
    /// found, on seeds that its table doesn't use, to be better than random search with twice the
    /// evaluations. Fitting per option and sharing observations matter, and only together; the
    /// numbers hardly do.
    pub const POLICIES: Self =
        Self { n_startup: 20, fit: Fit::PerOption, alike: true, ..Self::CRATE };

    /// For a few continuous dimensions. With 24 candidates the crate is no better than random
    /// search even on a smooth function of two numbers: its densities have no prior, so that the
    /// ratio of good to bad is largest at the rim of what is known. One candidate, a draw from the
    /// good ones, converges.
    pub const SCALARS: Self = Self { n_startup: 20, n_candidates: 1, ..Self::CRATE };
}

/// Multivariate TPE of the crate `optimizer`, asked once per proposal by a fresh sampler.
///
/// *Source*: J. Bergstra et al., "Algorithms for hyper-parameter optimization", NeurIPS 2011;
/// S. Watanabe, arXiv 2304.11127, for the multivariate form.
#[derive(Clone, Debug)]
pub struct Tpe {
    space: Space,
    seed: u64,
    settings: TpeSettings,
}

/// Observations below which a density says nothing: such coordinates are drawn uniformly.
const OBSERVATIONS_MIN: usize = 8;

impl Tpe {
    /// TPE in a space.
    ///
    /// # Errors
    /// A setting out of its range.
    pub fn new(space: Space, seed: u64, settings: TpeSettings) -> Result<Self, ProposerError> {
        let refuse = |name, value, expected| Err(ProposerError::Setting { name, value, expected });
        let TpeSettings { n_startup, good_fraction, n_candidates, .. } = settings;
        if n_startup < 2 {
            return refuse("n_startup", n_startup as f64, "at least 2");
        }
        if !(good_fraction > 0.0 && good_fraction < 1.0) {
            return refuse("good_fraction", good_fraction, "above 0 and below 1");
        }
        if n_candidates == 0 {
            return refuse("n_candidates", 0.0, "at least 1");
        }
        Ok(Self { space, seed, settings })
    }

    /// Slots whose observations count for this one.
    fn slots_like<'a>(&'a self, slot: &'a Slot) -> impl Iterator<Item = &'a Slot> {
        let dimensions = self.space.dimensions();
        let shape = move |slot: &'a Slot| {
            let reals = slot.reals.iter().map(move |&real| {
                let unused_for = dimensions[real].parent.as_ref().map(|parent| &parent.unused_for);
                (dimensions[real].kind, unused_for)
            });
            (dimensions[slot.option].kind, reals.collect::<Vec<_>>())
        };
        let wanted = shape(slot);
        self.space
            .slots()
            .iter()
            .filter(move |other| *other == slot || (self.settings.alike && shape(other) == wanted))
    }

    /// An option for each slot, each asked for by itself.
    fn choose_options(&self, finished: &[Finished<'_>], trial: u64, point: &mut Point) {
        for slot in self.space.slots() {
            let kinds = [self.space.dimensions()[slot.option].kind];
            let rows = finished.iter().flat_map(|finished| {
                self.slots_like(slot).map(move |like| finished.row(&[like.option]))
            });
            let block = slot.option as u64;
            let answer = self.ask(&kinds, rows.collect(), trial, block);
            point.0[slot.option] = answer[0];
        }
    }

    /// The continuous coordinates of one slot, fitted where the same option was chosen.
    fn choose_slot_reals(
        &self,
        finished: &[Finished<'_>],
        slot: &Slot,
        trial: u64,
        point: &mut Point,
    ) {
        let chosen = point.0[slot.option];
        let places = self.used_places(slot, chosen);
        let rows = finished.iter().flat_map(|finished| {
            let likes = self.slots_like(slot);
            let same = likes.filter(move |like| finished.point.0[like.option] == chosen);
            same.map(|like| {
                let reals: Vec<usize> = places.iter().map(|&place| like.reals[place]).collect();
                finished.row(&reals)
            })
        });
        let reals: Vec<usize> = places.iter().map(|&place| slot.reals[place]).collect();
        self.answer_reals(&reals, rows.collect(), trial, point);
    }

    /// Which of a slot's children mean something for an option.
    fn used_places(&self, slot: &Slot, chosen: Coordinate) -> Vec<usize> {
        let Coordinate::Option(option) = chosen else { return Vec::new() };
        let is_used = |place: &usize| self.space.is_used(slot.reals[*place], option);
        (0..slot.reals.len()).filter(is_used).collect()
    }

    /// Asks for the continuous dimensions `reals` in one density and writes them into the point.
    fn answer_reals(&self, reals: &[usize], rows: Vec<Row>, trial: u64, point: &mut Point) {
        let Some(&first) = reals.first() else { return };
        let kinds: Vec<Kind> = reals.iter().map(|&idx| self.space.dimensions()[idx].kind).collect();
        let answer = self.ask(&kinds, rows, trial, first as u64);
        for (&idx, coordinate) in reals.iter().zip(answer) {
            point.0[idx] = coordinate;
        }
    }

    /// One question to the crate: a categorical dimension, or continuous ones, fitted on rows that
    /// are sorted by loss. `block` keeps the random numbers of a trial's questions apart.
    fn ask(&self, kinds: &[Kind], rows: Vec<Row>, trial: u64, block: u64) -> Vec<Coordinate> {
        let n_finite = rows.iter().filter(|row| row.loss.is_finite()).count();
        let mut rng = SampleRng::new(self.seed, 1 + block, trial, Purpose::Proposal);
        if n_finite < OBSERVATIONS_MIN {
            return kinds.iter().map(|&kind| random_coordinate(kind, &mut rng)).collect();
        }
        let settings = &self.settings;
        #[allow(clippy::cast_possible_truncation, reason = "a share of a count, rounded up")]
        let n_good = (n_finite as f64 * settings.good_fraction).ceil() as usize;
        let n_good = n_good.clamp(1, n_finite - 1);
        // The crate takes ⌈n × gamma⌉ trials as good: half a trial less is safe from rounding.
        let gamma = (n_good as f64 - 0.5) / rows.len() as f64;
        let seed = u64::from(rng.next_u32()) << 32 | u64::from(rng.next_u32());
        let sampler = MultivariateTpeSampler::builder()
            .gamma(gamma)
            .n_startup_trials(0)
            .n_ei_candidates(settings.n_candidates)
            .seed(seed)
            .build()
            .expect("gamma lies in (0, 1): there are more rows than good ones, and one good one");
        // Made in order: the crate sorts by id.
        let ids: Vec<ParamId> = kinds.iter().map(|_| ParamId::new()).collect();
        let space: HashMap<ParamId, Distribution> =
            ids.iter().copied().zip(kinds.iter().map(|&kind| distribution(kind))).collect();
        let trials: Vec<CompletedTrial> = (0..)
            .zip(rows)
            .map(|(id, row)| {
                let params = ids.iter().copied().zip(row.coordinates.into_iter().filter_map(value));
                CompletedTrial::new(id, params.collect(), space.clone(), HashMap::new(), row.loss)
            })
            .collect();
        let answer = sampler.sample_joint(&space, &trials);
        let coordinate = |(id, &kind): (&ParamId, &Kind)| match (answer.get(id), kind) {
            (Some(&ParamValue::Float(real)), Kind::Continuous { lo, hi }) if !real.is_nan() => {
                Coordinate::Real(real.clamp(lo, hi))
            }
            (Some(&ParamValue::Categorical(option)), Kind::Categorical { n_options })
                if option < n_options =>
            {
                Coordinate::Option(option)
            }
            _ => random_coordinate(kind, &mut rng),
        };
        ids.iter().zip(kinds).map(coordinate).collect()
    }
}

impl Proposer for Tpe {
    fn propose(&self, history: &[(Point, f64)], trial: u64) -> Point {
        let finished = in_order(&self.space, history);
        let n_finite = finished.iter().filter(|finished| finished.loss.is_finite()).count();
        if n_finite < self.settings.n_startup {
            return random_point(&self.space, self.seed, trial);
        }
        let mut point = Point(vec![Coordinate::Unused; self.space.dimensions().len()]);
        self.choose_options(&finished, trial, &mut point);
        let mut together = self.space.free_reals().to_vec();
        for slot in self.space.slots() {
            match self.settings.fit {
                Fit::PerOption => self.choose_slot_reals(&finished, slot, trial, &mut point),
                Fit::Joint => {
                    let places = self.used_places(slot, point.0[slot.option]);
                    together.extend(places.into_iter().map(|place| slot.reals[place]));
                }
            }
        }
        together.sort_unstable();
        let is_real = |row: &Row| row.coordinates.iter().all(|c| matches!(c, Coordinate::Real(_)));
        let rows = finished.iter().map(|finished| finished.row(&together)).filter(is_real);
        self.answer_reals(&together, rows.collect(), trial, &mut point);
        point
    }
}

/// A finished trial with a loss that is finite or +∞.
struct Finished<'a> {
    point: &'a Point,
    loss: f64,
}

/// What one question sees of a finished trial.
struct Row {
    coordinates: Vec<Coordinate>,
    loss: f64,
}

impl Finished<'_> {
    fn row(&self, dimensions: &[usize]) -> Row {
        let coordinates = dimensions.iter().map(|&idx| self.point.0[idx]).collect();
        Row { coordinates, loss: self.loss }
    }
}

/// The trials of this space, sorted by loss and then by point; losses that are no numbers as +∞.
fn in_order<'a>(space: &Space, history: &'a [(Point, f64)]) -> Vec<Finished<'a>> {
    let mut finished: Vec<Finished<'a>> = history
        .iter()
        .filter(|(point, _)| space.check(point).is_ok())
        .map(|(point, loss)| {
            let loss = if loss.is_finite() { *loss } else { f64::INFINITY };
            Finished { point, loss }
        })
        .collect();
    finished.sort_by(|a, b| {
        let by_loss = a.loss.total_cmp(&b.loss);
        by_loss.then_with(|| {
            let mut pairs = a.point.0.iter().zip(&b.point.0);
            let different =
                pairs.find_map(|(&a, &b)| Some(compared(a, b)).filter(|ordering| ordering.is_ne()));
            different.unwrap_or(Ordering::Equal)
        })
    });
    finished
}

fn compared(a: Coordinate, b: Coordinate) -> Ordering {
    let key = |coordinate| match coordinate {
        Coordinate::Option(option) => (0, option, 0.0),
        Coordinate::Real(real) => (1, 0, real),
        Coordinate::Unused => (2, 0, 0.0),
    };
    let ((kind_a, option_a, real_a), (kind_b, option_b, real_b)) = (key(a), key(b));
    (kind_a, option_a).cmp(&(kind_b, option_b)).then(real_a.total_cmp(&real_b))
}

/// The point that random search proposes for a trial.
fn random_point(space: &Space, seed: u64, trial: u64) -> Point {
    let mut rng = SampleRng::new(seed, 0, trial, Purpose::Proposal);
    let mut point = Point(Vec::with_capacity(space.dimensions().len()));
    for (idx, dimension) in space.dimensions().iter().enumerate() {
        let coordinate = random_coordinate(dimension.kind, &mut rng);
        let option = dimension.parent.as_ref().map(|parent| point.0[parent.dimension]);
        let used = match option {
            Some(Coordinate::Option(option)) => space.is_used(idx, option),
            _ => true,
        };
        point.0.push(if used { coordinate } else { Coordinate::Unused });
    }
    point
}

fn random_coordinate(kind: Kind, rng: &mut SampleRng) -> Coordinate {
    match kind {
        Kind::Categorical { n_options } => {
            let n = u32::try_from(n_options).expect("a space's options fit 32 bits");
            Coordinate::Option(rng.below(n) as usize)
        }
        Kind::Continuous { lo, hi } => {
            Coordinate::Real((lo + rng.unit() * (hi - lo)).clamp(lo, hi))
        }
    }
}

fn distribution(kind: Kind) -> Distribution {
    match kind {
        Kind::Categorical { n_options } => {
            Distribution::Categorical(CategoricalDistribution { n_choices: n_options })
        }
        Kind::Continuous { lo, hi } => Distribution::Float(FloatDistribution {
            low: lo,
            high: hi,
            log_scale: false,
            step: None,
        }),
    }
}

fn value(coordinate: Coordinate) -> Option<ParamValue> {
    match coordinate {
        Coordinate::Option(option) => Some(ParamValue::Categorical(option)),
        Coordinate::Real(real) => Some(ParamValue::Float(real)),
        Coordinate::Unused => None,
    }
}

#[cfg(test)]
mod tests;
