//! What a proposer may propose, as data: named dimensions, points in them, and their meaning as
//! sub-policies.
//!
//! Owns the spaces of the paper and the folded one. Never draws a random number (`proposer` does)
//! and never evaluates anything.
//!
//! *Invariants*: a space, once made, has at least one dimension, finite ordered bounds, parents
//! that come before their children, and no more of anything than [`crate::limits`] allows. A point
//! that [`Space::check`] accepts turns into sub-policies without an error.

use serde::{Deserialize, Serialize};

use crate::limits;
use crate::policy::{Magnitude, Op, OpStep, OpsProfile, Policy, PolicyError, SubPolicy};

/// Why a space or a point is refused.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum SpaceError {
    /// A dimension breaks an invariant.
    #[error("dimension '{name}': {problem}")]
    Dimension {
        /// Its name.
        name: String,
        /// What is wrong, and the cure.
        problem: String,
    },
    /// Too few or too many dimensions.
    #[error("{n} dimensions, but a search space has 1 to {}", limits::SEARCH_DIMENSIONS_MAX)]
    Count {
        /// How many were given.
        n: usize,
    },
    /// A point with another number of coordinates: it belongs to another space.
    #[error("a point of {found} coordinates in a space of {expected}; was it made for another?")]
    Length {
        /// Dimensions of the space.
        expected: usize,
        /// Coordinates of the point.
        found: usize,
    },
    /// A coordinate that its dimension does not have.
    #[error("coordinate '{name}' is {found}; it must be {expected}")]
    Coordinate {
        /// The dimension's name.
        name: String,
        /// What the point has.
        found: String,
        /// What would be right.
        expected: String,
    },
}

/// One coordinate of a point. In JSON: a whole number, a number with a fraction (`1.0`), `null`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Coordinate {
    /// Index of a categorical dimension's option.
    Option(usize),
    /// Value of a continuous dimension.
    Real(f64),
    /// The dimension means nothing at this point (see [`Parent::unused_for`]).
    Unused,
}

/// A place in a space: one coordinate per dimension, in the space's order. [`Space::check`] tells
/// whether it lies in a given space; points read from a file must pass it first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Point(pub Vec<Coordinate>);

/// The values that a dimension has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// One of `n_options` options that have no order.
    Categorical {
        /// At least 1.
        n_options: usize,
    },
    /// Any number from `lo` to `hi`, both included.
    Continuous {
        /// Finite, below `hi`.
        lo: f64,
        /// Finite.
        hi: f64,
    },
}

/// The categorical dimension that gives a continuous one its meaning: a level means one thing for
/// Rotate and another for Posterize.
#[derive(Clone, Debug, PartialEq)]
pub struct Parent {
    /// Index of a categorical dimension before this one.
    pub dimension: usize,
    /// Options of the parent for which this dimension means nothing and is not searched.
    pub unused_for: Vec<usize>,
}

/// One named dimension.
#[derive(Clone, Debug, PartialEq)]
pub struct Dimension {
    /// For journals and reports, such as `op_0_1`.
    pub name: String,
    /// Its values.
    pub kind: Kind,
    /// Set for continuous dimensions whose meaning depends on a categorical one.
    pub parent: Option<Parent>,
}

/// A categorical dimension with the continuous ones that depend on it, by index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The categorical dimension.
    pub option: usize,
    /// Its children, ascending.
    pub reals: Vec<usize>,
}

/// Named dimensions, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Space {
    dimensions: Vec<Dimension>,
    slots: Vec<Slot>,
    free_reals: Vec<usize>,
}

impl Space {
    /// A space of these dimensions.
    ///
    /// # Errors
    /// The first dimension that breaks an invariant of the module.
    pub fn new(dimensions: Vec<Dimension>) -> Result<Self, SpaceError> {
        if dimensions.is_empty() || dimensions.len() > limits::SEARCH_DIMENSIONS_MAX {
            return Err(SpaceError::Count { n: dimensions.len() });
        }
        for (idx, dimension) in dimensions.iter().enumerate() {
            check_dimension(dimension, &dimensions[..idx]).map_err(|problem| {
                SpaceError::Dimension { name: dimension.name.clone(), problem }
            })?;
        }
        let children_of = |parent: Option<usize>| -> Vec<usize> {
            let is_child = |dimension: &Dimension| {
                matches!(dimension.kind, Kind::Continuous { .. })
                    && dimension.parent.as_ref().map(|parent| parent.dimension) == parent
            };
            (0..dimensions.len()).filter(|&idx| is_child(&dimensions[idx])).collect()
        };
        let slots = (0..dimensions.len())
            .filter(|&idx| matches!(dimensions[idx].kind, Kind::Categorical { .. }))
            .map(|option| Slot { option, reals: children_of(Some(option)) })
            .collect();
        let free_reals = children_of(None);
        Ok(Self { dimensions, slots, free_reals })
    }

    /// The dimensions, in the order of a point's coordinates.
    pub fn dimensions(&self) -> &[Dimension] {
        &self.dimensions
    }

    /// Every categorical dimension with its children.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The continuous dimensions that depend on no other, by index.
    pub fn free_reals(&self) -> &[usize] {
        &self.free_reals
    }

    /// Whether dimension `idx` means something where its parent has the option `option`.
    pub fn is_used(&self, idx: usize, option: usize) -> bool {
        let parent = self.dimensions[idx].parent.as_ref();
        parent.is_none_or(|parent| !parent.unused_for.contains(&option))
    }

    /// Checks that a point lies in this space: right length, right kinds, within the bounds, and
    /// [`Coordinate::Unused`] exactly where a dimension means nothing.
    ///
    /// # Errors
    /// The first coordinate that does not fit, by name.
    pub fn check(&self, point: &Point) -> Result<(), SpaceError> {
        if point.0.len() != self.dimensions.len() {
            let (expected, found) = (self.dimensions.len(), point.0.len());
            return Err(SpaceError::Length { expected, found });
        }
        for (idx, (dimension, coordinate)) in self.dimensions.iter().zip(&point.0).enumerate() {
            let option = dimension.parent.as_ref().map(|parent| point.0[parent.dimension]);
            let used = match option {
                Some(Coordinate::Option(option)) => self.is_used(idx, option),
                _ => true,
            };
            let (fits, expected) = match (used, dimension.kind, coordinate) {
                (false, _, _) => {
                    (*coordinate == Coordinate::Unused, "null: it is not used here".to_owned())
                }
                (true, Kind::Categorical { n_options }, _) => (
                    matches!(coordinate, Coordinate::Option(option) if *option < n_options),
                    format!("an option from 0 to {}", n_options - 1),
                ),
                (true, Kind::Continuous { lo, hi }, _) => (
                    matches!(coordinate, Coordinate::Real(real) if (lo..=hi).contains(real)),
                    format!("a number in [{lo:?}, {hi:?}]"),
                ),
            };
            if !fits {
                let (name, found) = (dimension.name.clone(), format!("{coordinate:?}"));
                return Err(SpaceError::Coordinate { name, found, expected });
            }
        }
        Ok(())
    }
}

fn check_dimension(dimension: &Dimension, before: &[Dimension]) -> Result<(), String> {
    if before.iter().any(|other| other.name == dimension.name) {
        return Err("the name is taken; give each dimension its own".to_owned());
    }
    match dimension.kind {
        Kind::Categorical { n_options } if n_options == 0 || n_options > u32::MAX as usize => {
            return Err(format!("{n_options} options; give it 1 to {}", u32::MAX));
        }
        Kind::Categorical { .. } if dimension.parent.is_some() => {
            return Err("only continuous dimensions can depend on another; drop the parent".into());
        }
        Kind::Continuous { lo, hi } if !(lo < hi && (hi - lo).is_finite()) => {
            return Err(format!("the range [{lo}, {hi}] must be finite and run upwards"));
        }
        Kind::Categorical { .. } | Kind::Continuous { .. } => {}
    }
    let Some(parent) = &dimension.parent else { return Ok(()) };
    match before.get(parent.dimension).map(|dimension| dimension.kind) {
        Some(Kind::Categorical { n_options }) => {
            match parent.unused_for.iter().find(|&&option| option >= n_options) {
                Some(option) => Err(format!("unused for option {option}, which its parent lacks")),
                None => Ok(()),
            }
        }
        _ => Err("its parent must be a categorical dimension that comes before it".to_owned()),
    }
}

/// An operation in the folded space: with its direction where the profile `fastaa` mirrors nothing
/// and both directions differ (darker is not brighter).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoldedOp {
    /// The operation.
    pub op: Op,
    /// How strength 0 (identity) to 1 (the far end) becomes λ of the profile `fastaa`.
    pub direction: Direction,
}

/// How a strength becomes λ of the profile `fastaa`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// λ = (1 + strength) / 2: up from the identity in the middle. For the five geometric
    /// operations the lower half is the same distribution (they are mirrored at random).
    Upper,
    /// λ = (1 − strength) / 2: down from the identity in the middle.
    Lower,
    /// λ = strength.
    Rising,
    /// λ = 1 − strength: Solarize and Posterize are weakest at λ = 1.
    Falling,
    /// There is no level; λ is 0 and ignored.
    NoLevel,
}

impl FoldedOp {
    /// The 19 options of the folded space: 15 operations, four of them in two directions.
    pub const ALL: [Self; 19] = {
        use Direction::{Falling, Lower, NoLevel, Rising, Upper};
        [
            Self { op: Op::ShearX, direction: Upper },
            Self { op: Op::ShearY, direction: Upper },
            Self { op: Op::TranslateX, direction: Upper },
            Self { op: Op::TranslateY, direction: Upper },
            Self { op: Op::Rotate, direction: Upper },
            Self { op: Op::AutoContrast, direction: NoLevel },
            Self { op: Op::Invert, direction: NoLevel },
            Self { op: Op::Equalize, direction: NoLevel },
            Self { op: Op::Solarize, direction: Falling },
            Self { op: Op::Posterize, direction: Falling },
            Self { op: Op::Contrast, direction: Upper },
            Self { op: Op::Contrast, direction: Lower },
            Self { op: Op::Color, direction: Upper },
            Self { op: Op::Color, direction: Lower },
            Self { op: Op::Brightness, direction: Upper },
            Self { op: Op::Brightness, direction: Lower },
            Self { op: Op::Sharpness, direction: Upper },
            Self { op: Op::Sharpness, direction: Lower },
            Self { op: Op::Cutout, direction: Rising },
        ]
    };

    /// λ of the profile `fastaa` for a strength in [0, 1].
    pub fn lambda(self, strength: f64) -> f64 {
        match self.direction {
            Direction::Upper => f64::midpoint(1.0, strength),
            Direction::Lower => f64::midpoint(1.0, -strength),
            Direction::Rising => strength,
            Direction::Falling => 1.0 - strength,
            Direction::NoLevel => 0.0,
        }
    }
}

/// How coordinates become operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Levels {
    /// The paper's: 15 operations, λ in [0, 1], searched even where the operation ignores it.
    Signed,
    /// [`FoldedOp::ALL`] and a strength, where there is one.
    Folded,
}

/// A space whose points are sub-policies of the profile `fastaa`: for sub-policy s and place o,
/// the dimensions `op_s_o`, `p_s_o` and `level_s_o`, in this order.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicySpace {
    space: Space,
    n_sub_policies: usize,
    levels: Levels,
}

/// Dimensions per operation: which, how probable, how strong.
const DIMENSIONS_PER_OP: usize = 3;
/// The paper's N_τ.
const OPS_PER_SUB_POLICY: usize = 2;
/// The paper's N_T.
const SUB_POLICIES_PER_POLICY: usize = 5;

impl PolicySpace {
    /// The paper's 30 dimensions: 5 sub-policies × 2 operations × (15-way operation, p, λ).
    ///
    /// *Source*: Fast AutoAugment §3.1, and `search.py` of the published code.
    pub fn paper() -> Self {
        Self::new(SUB_POLICIES_PER_POLICY, Levels::Signed)
    }

    /// One sub-policy of the paper's: 6 dimensions. Under an objective that is a mean over
    /// sub-policies the paper's space separates into five of these.
    pub fn sub_policy() -> Self {
        Self::new(1, Levels::Signed)
    }

    /// One sub-policy without mirrored or dead levels: `level_s_o` is a strength from 0 (identity)
    /// to 1 (|2λ − 1| where λ = ½ is the identity), and unused for the three operations that have
    /// none. Its points are distributions of images that [`Self::sub_policy`] also has.
    ///
    /// There are 19 options rather than 15: the profile `fastaa` gives the four enhancers no random
    /// sign, so that folding their two directions into one would merge different operations.
    pub fn folded() -> Self {
        Self::new(1, Levels::Folded)
    }

    fn new(n_sub_policies: usize, levels: Levels) -> Self {
        let n_options = match levels {
            Levels::Signed => Op::ALL.len(),
            Levels::Folded => FoldedOp::ALL.len(),
        };
        let no_level = |option: &usize| FoldedOp::ALL[*option].direction == Direction::NoLevel;
        let unused_for = match levels {
            Levels::Signed => Vec::new(),
            Levels::Folded => (0..n_options).filter(no_level).collect(),
        };
        let mut dimensions = Vec::new();
        for sub_policy in 0..n_sub_policies {
            for place in 0..OPS_PER_SUB_POLICY {
                let op = dimensions.len();
                let named = |what: &str, kind, unused_for: Option<&Vec<usize>>| Dimension {
                    name: format!("{what}_{sub_policy}_{place}"),
                    kind,
                    parent: unused_for
                        .map(|options| Parent { dimension: op, unused_for: options.clone() }),
                };
                let unit = Kind::Continuous { lo: 0.0, hi: 1.0 };
                let three = [
                    named("op", Kind::Categorical { n_options }, None),
                    named("p", unit, Some(&Vec::new())),
                    named("level", unit, Some(&unused_for)),
                ];
                dimensions.extend(three);
            }
        }
        let space = Space::new(dimensions).expect("the table above keeps every invariant");
        Self { space, n_sub_policies, levels }
    }

    /// The dimensions.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// A point's sub-policies, each of weight 1, in the profile `fastaa`.
    ///
    /// # Errors
    /// A point that is not in the space.
    pub fn sub_policies(&self, point: &Point) -> Result<Vec<SubPolicy>, SpaceError> {
        self.space.check(point)?;
        let steps: Vec<OpStep> =
            point.0.chunks(DIMENSIONS_PER_OP).map(|three| self.step(three)).collect();
        debug_assert_eq!(steps.len(), self.n_sub_policies * OPS_PER_SUB_POLICY);
        let sub_policies = steps.chunks(OPS_PER_SUB_POLICY);
        Ok(sub_policies.map(|ops| SubPolicy { weight: 1.0, ops: ops.to_vec() }).collect())
    }

    /// A point as a policy of one draw.
    ///
    /// # Errors
    /// A point that is not in the space, as [`PolicyError::Malformed`]; a name that a policy cannot
    /// have.
    pub fn policy(&self, point: &Point, name: &str) -> Result<Policy, PolicyError> {
        let sub_policies = self
            .sub_policies(point)
            .map_err(|error| PolicyError::Malformed { message: format!("{name}: {error}") })?;
        Policy::new(name, OpsProfile::Fastaa, 1, sub_policies, serde_json::Map::new())
    }

    /// The operation of a checked point's three coordinates.
    fn step(&self, three: &[Coordinate]) -> OpStep {
        let (option, probability) = match three {
            [Coordinate::Option(option), Coordinate::Real(probability), _] => {
                (*option, *probability)
            }
            _ => unreachable!("the point was checked against the space"),
        };
        let level = match three[2] {
            Coordinate::Real(level) => level,
            Coordinate::Option(_) | Coordinate::Unused => 0.0,
        };
        let (op, lambda) = match self.levels {
            Levels::Signed => (Op::ALL[option], level),
            Levels::Folded => {
                let folded = FoldedOp::ALL[option];
                (folded.op, folded.lambda(level))
            }
        };
        OpStep { op, probability, magnitude: Magnitude::Fixed(lambda) }
    }
}

#[cfg(test)]
mod tests;
