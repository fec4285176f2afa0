//! A made-up lab with a known truth, for the algorithms' tests and for `benches/search_cost.rs`.
//!
//! Owns the truth: what each operation costs at each strength, and what it changes. Draws
//! operations as the real lab does, by [`PreparedPolicy::draw_into`]. Everything that it uses comes
//! from its parent module: the benchmark compiles it again.
//!
//! The 19 operations of the folded space each cost c s² nats at strength s, c between 0.4 and 3 by
//! chance, and change images by d s, d between 0.06 and 0.3. A *planted* operation costs nothing up
//! to strength 0.8: the data varies in it. Images differ in how much they mind, models (folds) in
//! what they mind, pairs of operations interact a little.

use super::{
    AtomicU64, Change, DrawnOp, Evaluation, FoldedOp, Lab, LabError, Measured, Op, OpsProfile,
    Ordering, Policy, PreparedPolicy, Purpose, Range, SampleRng, Score, TrainOn, Training, mix64,
};

/// Strength up to which a planted operation costs nothing.
const PLANTED_REACH: f64 = 0.8;
/// Fold of the images and of the model that tell the truth: one that no search sees.
const TRUTH_FOLD: usize = 1 << 20;
/// Images that tell the truth.
const N_TRUTH: usize = 3000;

/// Uniform in (0, 1), a pure function of its key.
fn unit(key: u64, index: u64) -> f64 {
    let bits = mix64(mix64(key).wrapping_add(mix64(index)));
    ((bits >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
}

fn normal(key: u64, index: u64) -> f64 {
    let (u, v) = (unit(key, 2 * index), unit(key, 2 * index + 1));
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// See the module.
pub(crate) struct SyntheticLab {
    seed: u64,
    n_folds: usize,
    n_images: usize,
    planted: Vec<Op>,
    n_passes: AtomicU64,
}

impl SyntheticLab {
    /// A lab whose costs and distances follow from the seed alone, but for the planted operations.
    pub(crate) fn new(seed: u64, n_folds: usize, n_images: usize, planted: &[Op]) -> Self {
        let (planted, n_passes) = (planted.to_vec(), AtomicU64::new(0));
        Self { seed, n_folds, n_images, planted, n_passes }
    }

    /// Image passes so far.
    pub(crate) fn n_passes(&self) -> u64 {
        self.n_passes.load(Ordering::Relaxed)
    }

    /// What a policy really does, and what no policy gives, on many images that no search sees.
    pub(crate) fn truth(&self, policy: &PreparedPolicy) -> (Measured, Measured) {
        let of = |policy: &PreparedPolicy| Measured {
            score: Score::mean(&self.scores(TRUTH_FOLD, 0..N_TRUTH, policy, 1)),
            change: self.changes(TRUTH_FOLD, 0..N_TRUTH, policy, 1),
        };
        (of(policy), of(&PreparedPolicy::default()))
    }

    fn cost(&self, fold: usize, option: usize, strength: f64) -> f64 {
        let key = mix64(self.seed ^ 0xC057);
        let full = 0.4 + 2.6 * unit(key, option as u64);
        let of_model = 1.0 + 0.15 * normal(mix64(key ^ fold as u64), option as u64);
        let is_planted = self.planted.contains(&FoldedOp::ALL[option].op);
        let reach = if is_planted { PLANTED_REACH } else { 0.0 };
        let beyond = (strength - reach).max(0.0) / (1.0 - reach);
        full * of_model.max(0.2) * beyond.powi(2)
    }

    fn distance(&self, option: usize, strength: f64) -> f64 {
        let full = 0.06 + 0.24 * unit(mix64(self.seed ^ 0xD157), option as u64);
        (full * strength).min(1.0)
    }

    /// Calls `see` for every image and draw with its operations, as (option, strength).
    fn each_draw(
        &self,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        n_draws: u32,
        mut see: impl FnMut(usize, &[(usize, f64)]),
    ) {
        let (mut drawn, mut effective): (Vec<DrawnOp>, Vec<(usize, f64)>) = Default::default();
        for image in images {
            for draw in 0..n_draws {
                let sample = (fold as u64) << 32 | image as u64;
                let mut rng = SampleRng::new(self.seed, draw.into(), sample, Purpose::Policy);
                policy.draw_into(&mut rng, &mut drawn);
                effective.clear();
                effective.extend(drawn.iter().map(|op| folded(op, policy.ops_profile())));
                see(image, &effective);
            }
        }
    }

    fn scores(
        &self,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Vec<Score> {
        let key = mix64(self.seed ^ mix64(0x1A6E ^ fold as u64));
        let first = images.start;
        let mut scores = vec![Score::default(); images.len()];
        let n = f64::from(n_draws);
        self.each_draw(fold, images, policy, n_draws, |image, ops| {
            let minds = (0.6 * normal(key, 2 * image as u64)).exp();
            let clean = 0.1 * (1.2 * normal(key, 2 * image as u64 + 1)).exp();
            let costs = ops.iter().map(|&(option, strength)| self.cost(fold, option, strength));
            let mut cost: f64 = costs.sum();
            if let [(first, s), (second, t)] = *ops {
                let pair = (first * FoldedOp::ALL.len() + second) as u64;
                cost += 0.3 * unit(mix64(self.seed ^ 0x9A12), pair) * (s * t).powi(2);
            }
            let loss = clean + minds * cost;
            scores[image - first].loss += loss / n;
            scores[image - first].accuracy += f64::from(u8::from(loss < 0.7)) / n;
        });
        scores
    }

    fn changes(
        &self,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Change {
        let n = images.len() as f64 * f64::from(n_draws);
        let mut change = Change::default();
        self.each_draw(fold, images, policy, n_draws, |_, ops| {
            let same = |&(option, strength): &(usize, f64)| 1.0 - self.distance(option, strength);
            let distance = 1.0 - ops.iter().map(same).product::<f64>();
            change.distance += distance / n;
            change.changed += f64::from(u8::from(distance > 1e-3)) / n;
        });
        change
    }
}

/// Option of the folded space and strength in it; above 1 where TrivialAugment's ranges go beyond.
fn folded(drawn: &DrawnOp, profile: OpsProfile) -> (usize, f64) {
    let is_wide = profile == OpsProfile::TrivialWide;
    let signed = 2.0 * drawn.lambda - 1.0;
    let (strength, is_down) = match drawn.op {
        Op::AutoContrast | Op::Invert | Op::Equalize => (1.0, false),
        Op::Solarize | Op::Posterize if is_wide => (drawn.lambda, false),
        Op::Solarize | Op::Posterize => (1.0 - drawn.lambda, false),
        Op::Cutout => (drawn.lambda, false),
        Op::ShearX | Op::ShearY if is_wide => (3.3 * drawn.lambda, false),
        Op::TranslateX | Op::TranslateY if is_wide => (2.5 * drawn.lambda, false),
        Op::Rotate if is_wide => (4.5 * drawn.lambda, false),
        _ if is_wide => (1.1 * drawn.lambda, drawn.negative),
        Op::ShearX | Op::ShearY | Op::TranslateX | Op::TranslateY | Op::Rotate => {
            (signed.abs(), false)
        }
        Op::Contrast | Op::Color | Op::Brightness | Op::Sharpness => (signed.abs(), signed < 0.0),
    };
    let first = FoldedOp::ALL.iter().position(|folded| folded.op == drawn.op);
    (first.expect("every operation is in the folded space") + usize::from(is_down), strength)
}

impl Lab for SyntheticLab {
    fn n_folds(&self) -> usize {
        self.n_folds
    }

    fn n_held_out(&self, _fold: usize) -> usize {
        self.n_images
    }

    fn passes(&self, _on: TrainOn) -> u64 {
        0
    }

    fn score(
        &self,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Result<Vec<Score>, LabError> {
        assert!(fold < self.n_folds && images.end <= self.n_images, "beyond the lab's images");
        let passes = images.len() as u64 * u64::from(n_draws);
        self.n_passes.fetch_add(passes, Ordering::Relaxed);
        Ok(self.scores(fold, images, policy, n_draws))
    }

    fn change(
        &self,
        fold: usize,
        images: Range<usize>,
        policy: &PreparedPolicy,
        n_draws: u32,
    ) -> Result<Change, LabError> {
        Ok(self.changes(fold, images, policy, n_draws))
    }

    fn train(&self, _training: &Training<'_>) -> Result<Evaluation, LabError> {
        Err(LabError::Failed("density matching trains nothing".to_owned()))
    }
}

/// Share of a policy's weight that goes to sub-policies with an operation.
pub(crate) fn share_of(policy: &Policy, op: Op) -> f64 {
    let subs = policy.sub_policies();
    let total: f64 = subs.iter().map(|sub| sub.weight).sum();
    let has = subs.iter().filter(|sub| sub.ops.iter().any(|step| step.op == op));
    has.map(|sub| sub.weight).sum::<f64>() / total
}
