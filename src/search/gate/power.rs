//! What a test of the gate can see. Pure.
//!
//! Owns power and the smallest detectable gain. Decides nothing.
//!
//! A test publishes if gain > √(t²(S − 1) A + t²(n − 1) B), with A and B the squared standard
//! errors from seeds and images (see `decision`). Given A, the gain is normal with variance σ² = E
//! A + B:
//!
//! > power = E Φ((true gain − √(t²(S − 1) E A χ²(S − 1) / (S − 1) + t²(n − 1) B)) / σ)
//!
//! which is integrated over χ², B being as good as known from that many images. That the
//! interaction is counted twice makes σ a little too large, and the detectable gain with it.

use statrs::function::erf::erfc;

use super::decision::{Estimate, Quantiles};

/// Probability with which a detectable gain is seen.
pub const POWER: f64 = 0.8;
/// Points of the integral over χ.
const N_NODES: u32 = 400;
/// Doublings of a standard error that lead above any detectable gain.
const N_DOUBLINGS: u32 = 200;
/// Halvings of the interval that holds the detectable gain.
const N_HALVINGS: u32 = 60;

/// A test that is planned or done: standard errors in points, as they are on average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Design {
    /// From the seeds.
    pub se_seeds: f64,
    /// From the images.
    pub se_images: f64,
    /// Pairs of trainings, at least 2.
    pub n_seeds: u32,
    /// Images, at least 2.
    pub n_images: u64,
}

impl Design {
    /// What a test of `n_seeds` pairs has, judged by the spread that an estimate found.
    pub fn of(estimate: &Estimate, n_seeds: u32) -> Self {
        let share = f64::from(estimate.n_seeds) / f64::from(n_seeds.max(1));
        let se_seeds = estimate.se_seeds * share.sqrt();
        Self { se_seeds, se_images: estimate.se_images, n_seeds, n_images: estimate.n_images }
    }

    /// Probability that a true gain (points) is seen at level `alpha`; 0 without any spread.
    pub fn power(&self, gain: f64, alpha: f64) -> f64 {
        let quantiles = Quantiles::new(alpha, self.n_seeds, self.n_images);
        self.power_at(gain, &quantiles, &chi_nodes(self.n_seeds))
    }

    /// The smallest gain (points) that is seen with probability [`POWER`] at level `alpha`; 0
    /// without any spread, where nothing can be said.
    pub fn detectable_gain(&self, alpha: f64) -> f64 {
        let sd = self.se_seeds.hypot(self.se_images);
        if sd <= 0.0 || !sd.is_finite() {
            return 0.0;
        }
        let quantiles = Quantiles::new(alpha, self.n_seeds, self.n_images);
        let nodes = chi_nodes(self.n_seeds);
        let (mut low, mut high) = (0.0, sd);
        for _ in 0..N_DOUBLINGS {
            if self.power_at(high, &quantiles, &nodes) >= POWER {
                break;
            }
            (low, high) = (high, 2.0 * high);
        }
        for _ in 0..N_HALVINGS {
            let middle = f64::midpoint(low, high);
            let is_seen = self.power_at(middle, &quantiles, &nodes) >= POWER;
            *(if is_seen { &mut high } else { &mut low }) = middle;
        }
        high
    }

    fn power_at(&self, gain: f64, quantiles: &Quantiles, nodes: &[(f64, f64)]) -> f64 {
        let sd = self.se_seeds.hypot(self.se_images);
        if sd <= 0.0 {
            return 0.0;
        }
        let images = (quantiles.images * self.se_images).powi(2);
        let seen = nodes.iter().map(|&(ratio, weight)| {
            let half = ((quantiles.seeds * self.se_seeds).powi(2) * ratio + images).sqrt();
            weight * 0.5 * erfc((half - gain) / (sd * std::f64::consts::SQRT_2))
        });
        seen.sum()
    }
}

/// Values of χ²(S − 1) / (S − 1) with their probabilities: a grid over χ, whose density, unlike
/// that of χ², is finite everywhere.
fn chi_nodes(n_seeds: u32) -> Vec<(f64, f64)> {
    let degrees = f64::from(n_seeds.saturating_sub(1).max(1));
    let (low, high) = ((degrees.sqrt() - 8.0).max(0.0), degrees.sqrt() + 8.0);
    let step = (high - low) / f64::from(N_NODES);
    let mode = (degrees - 1.0).max(0.0).sqrt();
    let log_density = |chi: f64| (degrees - 1.0) * chi.ln() - 0.5 * chi * chi;
    let top = if mode > 0.0 { log_density(mode) } else { 0.0 };
    let nodes: Vec<(f64, f64)> = (0..N_NODES)
        .map(|idx| low + step * (f64::from(idx) + 0.5))
        .map(|chi| (chi * chi / degrees, (log_density(chi) - top).exp()))
        .collect();
    let total: f64 = nodes.iter().map(|&(_, weight)| weight).sum();
    nodes.into_iter().map(|(ratio, weight)| (ratio, weight / total)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_image_noise_it_is_the_one_sample_t_test() {
        // SciPy 1: nct.sf(t.isf(level, S - 1), S - 1, gain / sd * sqrt(S)), the noncentral t.
        for (n_seeds, sd, gain, level, expected) in [
            (5u32, 0.5, 1.0, 0.05, 0.974_831),
            (10, 0.5, 0.5, 0.05, 0.897_517),
            (3, 0.4, 2.0, 0.025, 0.975_462),
        ] {
            let se_seeds = sd / f64::from(n_seeds).sqrt();
            let design = Design { se_seeds, se_images: 0.0, n_seeds, n_images: 10_000 };
            let found = design.power(gain, level);
            assert!((found - expected).abs() < 1e-4, "{n_seeds}: {found}");
        }
    }

    #[test]
    fn without_seed_noise_it_is_the_z_test() {
        let design = Design { se_seeds: 0.0, se_images: 0.3, n_seeds: 5, n_images: 1_000_000 };
        let gain = design.detectable_gain(0.025);
        assert!((gain - 0.3 * (1.959_964 + 0.841_621)).abs() < 1e-4, "{gain}");
        // The level is what a gain of nothing is seen with.
        assert!((design.power(0.0, 0.025) - 0.025).abs() < 1e-4);
        let nothing = Design { se_images: 0.0, ..design };
        assert!(nothing.detectable_gain(0.025).abs() < 1e-15);
        assert!(nothing.power(1.0, 0.025).abs() < 1e-15);
    }
}
