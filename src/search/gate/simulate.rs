//! Made-up searches: how often a gate with given noise publishes. Pure.
//!
//! Owns the model of the noise. Used by tests and by the gate's bench; decides nothing real.
//!
//! The model has the two variances of `decision` and no interaction, which would only make the
//! gate more careful. Every candidate of a search has seed and image effects of its own; the
//! incumbent's are drawn once, since its trainings and D_gate are used again in every round. So the
//! tests of one search depend on each other as they do in truth. The mean over n images and their
//! sample variance are drawn as such, not image by image: that is exact for normal effects, but for
//! the variance's χ² with n − 1 degrees of freedom, in whose place its normal limit is drawn.

use super::decision::{Estimate, FUTILITY_LEVEL, Quantiles, is_futile};
use crate::random::mix64;

/// How much paired differences of two equally good policies vary.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Noise {
    /// Standard deviation over seeds of the mean over images, in points (0.01).
    pub seed_sd: f64,
    /// Standard deviation over images of the mean over seeds, in units of one image (0..1).
    pub image_sd: f64,
}

/// A search of several tests against one incumbent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Search {
    /// Of every test.
    pub noise: Noise,
    /// Pairs of trainings of a test, at least 2.
    pub n_seeds: u32,
    /// Images of D_gate, at least 2.
    pub n_images: u64,
    /// True gain of every candidate over the incumbent, in points.
    pub gain: f64,
    /// Whether a test ends early once it is futile.
    pub can_end_early: bool,
}

impl Search {
    /// Runs one search until a test publishes, or all tests are done.
    fn publishes(&self, tests: &[Quantiles], futility: &[Quantiles], seed: u64) -> bool {
        let mut incumbent = Normals::new(seed, 0);
        let arm = std::f64::consts::FRAC_1_SQRT_2;
        let image_sd = 100.0 * self.noise.image_sd;
        let se_images = image_sd / (self.n_images as f64).sqrt();
        let rival: Vec<f64> = (0..=self.n_seeds).map(|_| arm * incumbent.next_normal()).collect();
        let is_published = |(idx, quantiles): (usize, &Quantiles)| {
            let mut candidate = Normals::new(seed, 1 + idx as u64);
            let images = arm * candidate.next_normal() - rival[0];
            let spread = (2.0 / (self.n_images - 1) as f64).sqrt() * candidate.next_normal();
            let image_variance = image_sd.powi(2) * (1.0 + spread).max(0.0);
            let mut by_seed = Vec::with_capacity(rival.len());
            for theirs in &rival[1..] {
                let seeds = arm * candidate.next_normal() - theirs;
                by_seed.push(self.gain + se_images * images + self.noise.seed_sd * seeds);
                // Without futility, there are no quantiles.
                if let Some(quantiles) = futility.get(by_seed.len()) {
                    let so_far = Estimate::from_parts(&by_seed, image_variance, self.n_images);
                    if is_futile(&[so_far], quantiles) {
                        return false;
                    }
                }
            }
            let estimate = Estimate::from_parts(&by_seed, image_variance, self.n_images);
            estimate.lower(quantiles) > 0.0
        };
        tests.iter().enumerate().any(is_published)
    }

    /// Share of `n_searches` made-up searches that publish at all, with tests at these levels. A
    /// pure function of its arguments.
    pub fn publishing_rate(&self, levels: &[f64], n_searches: u32, seed: u64) -> f64 {
        let quantiles = |level, n_seeds| Quantiles::new(level, n_seeds, self.n_images);
        let tests: Vec<Quantiles> =
            levels.iter().map(|&level| quantiles(level, self.n_seeds)).collect();
        // By number of seeds; those of 0 and 1 are never below zero, having no spread.
        let n_futility = if self.can_end_early { self.n_seeds } else { 0 };
        let futility: Vec<Quantiles> =
            (0..n_futility).map(|n_seeds| quantiles(FUTILITY_LEVEL, n_seeds)).collect();
        let publishes =
            |&idx: &u32| self.publishes(&tests, &futility, mix64(seed ^ mix64(u64::from(idx))));
        (0..n_searches).filter(publishes).count() as f64 / f64::from(n_searches.max(1))
    }
}

/// Upper end of E. B. Wilson's 95 % interval (two-sided; JASA 22, 1927) of a share of `n`.
pub fn wilson_upper(share: f64, n: u32) -> f64 {
    const Z: f64 = 1.959_964;
    let n = f64::from(n.max(1));
    let centre = share + Z * Z / (2.0 * n);
    let half = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    (centre + half) / (1.0 + Z * Z / n)
}

/// Standard normal numbers, a pure function of two keys and a counter. *Source*: G. E. P. Box and
/// M. E. Muller, Annals of Mathematical Statistics 29 (1958).
#[derive(Clone, Debug)]
pub struct Normals {
    key: u64,
    counter: u64,
}

impl Normals {
    /// The numbers of (seed, stream).
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { key: mix64(mix64(seed).wrapping_add(mix64(!stream))), counter: 0 }
    }

    /// The next one.
    pub fn next_normal(&mut self) -> f64 {
        let (u, v) = (self.next_unit(), self.next_unit());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// Uniform in (0, 1).
    pub fn next_unit(&mut self) -> f64 {
        self.counter += 1;
        let bits = mix64(self.key.wrapping_add(mix64(self.counter)));
        ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::super::alpha;
    use super::super::power::Design;
    use super::*;

    const N_SEARCHES: u32 = 10_000;
    const N_TESTS: u32 = 20;
    const LOGIT_SEEDS: u32 = 3;

    fn levels() -> Vec<f64> {
        (1..=N_TESTS).map(alpha::level).collect()
    }

    /// Candidates that are exactly as good as the incumbent, in searches of 20 rounds.
    #[test]
    fn a_search_rarely_publishes_what_is_not_better() {
        for n_seeds in [3, 5] {
            for (seed_sd, image_sd) in
                [(1.0, 0.0), (0.0, 0.3), (0.5, 0.3), (1.0, 0.1), (0.2, 0.3), (0.4, 0.2)]
            {
                let noise = Noise { seed_sd, image_sd };
                let (n_images, gain) = (2000, 0.0);
                let search = Search { noise, n_seeds, n_images, gain, can_end_early: false };
                let rate = search.publishing_rate(&levels(), N_SEARCHES, 7);
                let upper = wilson_upper(rate, N_SEARCHES);
                println!("{n_seeds} seeds, {noise:?}: rate {rate:.4}, upper {upper:.4}");
                assert!(upper <= 0.05, "{n_seeds} seeds, {noise:?}: {rate}, upper {upper}");
                let ending = Search { can_end_early: true, ..search };
                assert!(ending.publishing_rate(&levels(), N_SEARCHES, 7) <= rate);
            }
        }
    }

    /// The simulation can tell: without alpha spending, the same searches go wrong often.
    #[test]
    fn tests_that_all_take_the_whole_level_publish_too_much() {
        let noise = Noise { seed_sd: 0.4, image_sd: 0.2 };
        let search =
            Search { noise, n_seeds: 5, n_images: 10_000, gain: 0.0, can_end_early: false };
        let rate = search.publishing_rate(&[alpha::TOTAL; N_TESTS as usize], 2000, 3);
        assert!(rate > 0.2, "{rate}");
    }

    /// The formula of `power` against 20,000 made-up tests; their standard error is 0.3 %.
    #[test]
    fn the_power_is_that_of_made_up_tests() {
        for (seed_sd, image_sd, n_seeds) in
            [(0.4, 0.2, 5), (0.4, 0.2, 3), (1.0, 0.1, 5), (0.1, 0.3, 10), (0.5, 0.0, 3)]
        {
            let (n_images, can_end_early) = (5000, false);
            let design = Design {
                se_seeds: seed_sd / f64::from(n_seeds).sqrt(),
                se_images: 100.0 * image_sd / (n_images as f64).sqrt(),
                n_seeds,
                n_images,
            };
            for level in [0.025, 0.005] {
                let detectable = design.detectable_gain(level);
                for gain in [0.5 * detectable, detectable] {
                    let noise = Noise { seed_sd, image_sd };
                    let search = Search { noise, n_seeds, n_images, gain, can_end_early };
                    let rate = search.publishing_rate(&[level], 20_000, 11);
                    let power = design.power(gain, level);
                    assert!((rate - power).abs() < 0.012, "{search:?}: {rate} {power}");
                }
                assert!((design.power(detectable, level) - 0.8).abs() < 1e-9);
            }
        }
    }

    /// Searches image by image: right and wrong from a logit of difficulty, policy and seed, so
    /// that differences are −1, 0 or 1, and interact. Whole chain but for training.
    #[test]
    fn searches_image_by_image_rarely_publish_what_is_not_better() {
        const N_IMAGES: usize = 200;
        const N_RUNS: u32 = 4000;
        let quantiles: Vec<Quantiles> = levels()
            .into_iter()
            .map(|level| Quantiles::new(level, LOGIT_SEEDS, N_IMAGES as u64))
            .collect();
        for (seed_sd, image_sd) in [(0.5, 0.1), (0.05, 1.5), (0.4, 1.0)] {
            let publishes = |run: u32| {
                let seed = u64::from(run);
                let mut numbers = Normals::new(seed, 0);
                let difficulty: Vec<f64> =
                    (0..N_IMAGES).map(|_| 1.0 + 1.5 * numbers.next_normal()).collect();
                let arm = |policy: u64| right(&difficulty, (seed, policy), seed_sd, image_sd);
                let incumbent = arm(1);
                quantiles.iter().zip(2..).any(|(quantiles, policy)| {
                    Estimate::new(&arm(policy), &incumbent).lower(quantiles) > 0.0
                })
            };
            let n_published = (0..N_RUNS).filter(|&run| publishes(run)).count();
            let rate = n_published as f64 / f64::from(N_RUNS);
            println!("logit, seed {seed_sd}, image {image_sd}: rate {rate:.4}");
            assert!(wilson_upper(rate, N_RUNS) <= 0.05, "{seed_sd} {image_sd}: {rate}");
        }
    }

    /// Right and wrong of a policy, by seed and image.
    fn right(
        difficulty: &[f64],
        (seed, policy): (u64, u64),
        seed_sd: f64,
        image_sd: f64,
    ) -> Vec<Vec<bool>> {
        let mut numbers = Normals::new(seed, policy);
        let odds: Vec<f64> = difficulty
            .iter()
            .map(|logit| (logit + image_sd * numbers.next_normal()).exp())
            .collect();
        let train = |_| {
            let factor = (seed_sd * numbers.next_normal()).exp();
            // Right with probability odds / (1 + odds).
            let is_right = |odds: &f64| {
                let odds = odds * factor;
                numbers.next_unit() * (1.0 + odds) < odds
            };
            odds.iter().map(is_right).collect()
        };
        (0..LOGIT_SEEDS).map(train).collect()
    }
}
