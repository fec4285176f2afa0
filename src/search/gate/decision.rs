//! From right and wrong, by seed and image, to a gain and its bounds. Pure.
//!
//! Owns the statistics of one test. Never trains, and never knows what was tested before.
//!
//! A gain is uncertain for two reasons, and both are counted. Another training seed would give
//! another gain: that shows in the spread of the paired differences over seeds. Other images would
//! give another gain, too, and that does *not* show in the spread over seeds, since every seed is
//! judged on the same images. With d(s, i) = right(candidate) − right(rival) on image i after seed
//! s, this is a model of crossed random effects, d = gain + seed + image + interaction, and
//!
//! > variance = s²(seeds) / S + s²(images) / n
//!
//! where s²(seeds) is the variance over seeds of the mean over images, and s²(images) the variance
//! over images of the mean over seeds. Each of the two contains the interaction's variance divided
//! by S n. It is counted twice: the test is conservative, never liberal, by that much.
//!
//! The bound is gain − √(t²(S − 1) s²(seeds) / S + t²(n − 1) s²(images) / n), each part with its
//! own quantile of Student's t at the level of the test. Its level holds for every ratio of the two
//! variances. *Why*: with weights w that sum to 1, Z normal and each U a χ² divided by its degrees
//! of freedom, P(Z² ≤ Σ w t² U) = E F(Σ w t² U), F being the distribution of χ² with one degree. F
//! is concave, so this is at least Σ w E F(t² U), and each E F(t² U) is 1 − 2 α by the definition
//! of t; half of the rest lies on either side. *Source*: S. K. Banerjee, Sankhyā 22 (1960),
//! 357–358.
//!
//! The usual alternative, one quantile with the degrees of freedom of F. E. Satterthwaite
//! (Biometrics Bulletin 2, 1946, 110–114), is liberal just where a search needs it: integrated
//! numerically, at level 0.001 its true level is up to 9.7 times as high with 3 seeds and 3.3 times
//! with 5; at 0.0001, 50 and 11 times. Its degrees are reported, for people, and decide nothing.
//!
//! To be published, a candidate must be better than *every* rival. Then each rival is tested at the
//! full level, without any correction: an intersection–union test (R. L. Berger, Technometrics 24,
//! 1982, 295–300). If the candidate is not better than some rival, it is published at most when
//! that rival's own test errs.

use statrs::distribution::{ContinuousCDF as _, StudentsT};

use super::verdict::Comparison;

/// One-sided level of the bound that ends a test early. It publishes nothing, so it is spent by
/// nobody.
pub const FUTILITY_LEVEL: f64 = 0.05;
/// A level of 95 % with two sides, for the intervals that people read.
const INTERVAL_LEVEL: f64 = 0.025;
const POINTS: f64 = 100.0;
/// More degrees of freedom count as these, which makes a bound wider by some 0.01 %; statrs loses
/// digits of the quantile as they grow (at a million, 5e-5).
const DEGREES_MAX: f64 = 10_000.0;

/// Quantiles of Student's t for one level, one number of seeds and one of images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantiles {
    /// With S − 1 degrees of freedom.
    pub seeds: f64,
    /// With n − 1 degrees of freedom.
    pub images: f64,
}

impl Quantiles {
    /// Exceeded with probability `alpha`, which is above 0 and at most ½. From 2 seeds and images.
    pub fn new(alpha: f64, n_seeds: u32, n_images: u64) -> Self {
        let degrees = |n: u64| n.saturating_sub(1).max(1) as f64;
        Self {
            seeds: quantile(alpha, degrees(n_seeds.into())),
            images: quantile(alpha, degrees(n_images)),
        }
    }
}

/// What Student's t with `degrees` of freedom, of which at most 10,000 count, exceeds with
/// probability `alpha`.
pub fn quantile(alpha: f64, degrees: f64) -> f64 {
    let student = StudentsT::new(0.0, 1.0, degrees.min(DEGREES_MAX))
        .expect("the degrees of freedom are above 0");
    // The lower tail: 1 − alpha would lose digits.
    -student.inverse_cdf(alpha)
}

/// A gain over one rival and how uncertain it is, in points (0.01) of accuracy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Mean gain.
    pub gain: f64,
    /// Standard error from the seeds; 0 with one seed, which shows no spread.
    pub se_seeds: f64,
    /// Standard error from the images; 0 with one image.
    pub se_images: f64,
    /// Number of pairs of trainings S.
    pub n_seeds: u32,
    /// Number of images n.
    pub n_images: u64,
}

impl Estimate {
    /// From right and wrong: by seed, then by image, the same images for all.
    pub fn new<R: AsRef<[bool]>>(candidate: &[R], rival: &[R]) -> Self {
        let n_images = candidate.first().map_or(0, |right| right.as_ref().len());
        let mut by_image = vec![0i32; n_images];
        let pairs = candidate.iter().zip(rival);
        let by_seed: Vec<f64> = pairs
            .map(|(ours, theirs)| {
                let mut total = 0;
                let sides = ours.as_ref().iter().zip(theirs.as_ref());
                for (sum, (&ours, &theirs)) in by_image.iter_mut().zip(sides) {
                    let difference = i32::from(ours) - i32::from(theirs);
                    *sum += difference;
                    total += difference;
                }
                POINTS * f64::from(total) / n_images.max(1) as f64
            })
            .collect();
        let n_seeds = by_seed.len().max(1) as f64;
        let means: Vec<f64> =
            by_image.iter().map(|&sum| POINTS * f64::from(sum) / n_seeds).collect();
        Self::from_parts(&by_seed, variance(&means), n_images as u64)
    }

    /// From the differences by seed (points) and the variance over `n_images` images of the mean
    /// difference over seeds (points squared).
    #[allow(clippy::cast_possible_truncation, reason = "seeds are counted in u32")]
    pub fn from_parts(by_seed: &[f64], image_variance: f64, n_images: u64) -> Self {
        let n_seeds = by_seed.len().max(1) as f64;
        Self {
            gain: by_seed.iter().sum::<f64>() / n_seeds,
            se_seeds: (variance(by_seed) / n_seeds).sqrt(),
            se_images: (image_variance / n_images.max(1) as f64).sqrt(),
            n_seeds: by_seed.len() as u32,
            n_images,
        }
    }

    /// Distance of a bound from the gain, in points. `None` where there is nothing to judge the
    /// noise by: fewer than two seeds or images, or no spread at all.
    pub fn half_width(&self, quantiles: &Quantiles) -> Option<f64> {
        let square =
            (quantiles.seeds * self.se_seeds).powi(2) + (quantiles.images * self.se_images).powi(2);
        (self.n_seeds >= 2 && self.n_images >= 2 && square > 0.0).then(|| square.sqrt())
    }

    /// Lower bound of the gain, in points; without a spread, never above zero.
    pub fn lower(&self, quantiles: &Quantiles) -> f64 {
        self.half_width(quantiles).map_or(self.gain.min(0.0), |half| self.gain - half)
    }

    /// Upper bound of the gain, in points; without a spread, never below zero.
    pub fn upper(&self, quantiles: &Quantiles) -> f64 {
        self.half_width(quantiles).map_or(self.gain.max(0.0), |half| self.gain + half)
    }

    /// Degrees of freedom after Satterthwaite; 0 without a spread. See the module.
    pub fn degrees(&self) -> f64 {
        let (seeds, images) = (self.se_seeds.powi(2), self.se_images.powi(2));
        let part = |square: f64, n: f64| if n >= 2.0 { square.powi(2) / (n - 1.0) } else { 0.0 };
        let below = part(seeds, f64::from(self.n_seeds)) + part(images, self.n_images as f64);
        if below > 0.0 { (seeds + images).powi(2) / below } else { 0.0 }
    }

    /// The comparison with the rival of this role, at level `alpha`.
    pub fn compare(&self, rival: &str, alpha: f64) -> Comparison {
        let for_people = Quantiles::new(INTERVAL_LEVEL, self.n_seeds, self.n_images);
        Comparison {
            rival: rival.to_owned(),
            gain: self.gain,
            lower: self.lower(&Quantiles::new(alpha, self.n_seeds, self.n_images)),
            interval: (self.lower(&for_people), self.upper(&for_people)),
            se_seeds: self.se_seeds,
            se_images: self.se_images,
            degrees: self.degrees(),
        }
    }
}

/// Whether the candidate is better than every rival. False without rivals.
pub fn is_better(comparisons: &[Comparison]) -> bool {
    !comparisons.is_empty() && comparisons.iter().all(|comparison| comparison.lower > 0.0)
}

/// Whether the candidate can hardly win any more: the upper bound of its gain over some rival is
/// below zero, with `quantiles` at [`FUTILITY_LEVEL`]. To end the test then as "kept" never raises
/// the rate of false publications: it only takes away tests that might have published.
pub fn is_futile(estimates: &[Estimate], quantiles: &Quantiles) -> bool {
    estimates.iter().any(|estimate| estimate.upper(quantiles) < 0.0)
}

/// Unbiased variance; 0 for fewer than two values.
fn variance(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    if n < 2.0 {
        return 0.0;
    }
    let mean = values.iter().sum::<f64>() / n;
    values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(texts: &[&str]) -> Vec<Vec<bool>> {
        texts.iter().map(|text| text.bytes().map(|byte| byte == b'1').collect()).collect()
    }

    /// SciPy 1: stats.t.isf(alpha, degrees).
    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (alpha, degrees, expected) in [
            (0.05, 1.0, 6.313_752),
            (0.025, 2.0, 4.302_653),
            (0.01, 4.0, 3.746_947),
            (0.001, 4.0, 7.173_182),
            (0.0001, 4.0, 13.033_672),
            (0.025, 9.0, 2.262_157),
            (0.025, 9999.0, 1.960_201),
            (0.5, 4.0, 0.0),
        ] {
            let found = quantile(alpha, degrees);
            assert!((found - expected).abs() < 2e-6 * (1.0 + expected), "{degrees}: {found}");
        }
        for degrees in [1.0, 2.0, 4.0, 9.0, 99.0, 999.0, 9999.0] {
            for exponent in 1..=12 {
                let alpha = 0.3f64.powi(exponent);
                let found = quantile(alpha, degrees);
                let tail = StudentsT::new(0.0, 1.0, degrees).unwrap().sf(found);
                assert!((tail / alpha - 1.0).abs() < 1e-5, "{degrees} {alpha}: {found} {tail}");
            }
        }
    }

    #[test]
    fn both_spreads_are_counted() {
        let candidate = rows(&["1110", "1111"]);
        let rival = rows(&["1100", "1001"]);
        let estimate = Estimate::new(&candidate, &rival);
        // By seed: 1/4, 2/4. By image: 0, 1/2, 1, 0.
        assert!((estimate.gain - 37.5).abs() < 1e-12);
        assert!((estimate.se_seeds - 12.5).abs() < 1e-12);
        let by_image: f64 = [-0.375f64, 0.125, 0.625, -0.375].iter().map(|x| x * x).sum();
        assert!((estimate.se_images - 100.0 * (by_image / 3.0 / 4.0).sqrt()).abs() < 1e-12);
        let (seeds, images) = (estimate.se_seeds.powi(2), estimate.se_images.powi(2));
        let degrees = (seeds + images).powi(2) / (seeds.powi(2) + images.powi(2) / 3.0);
        assert!((estimate.degrees() - degrees).abs() < 1e-12);
        let quantiles = Quantiles::new(0.05, 2, 4);
        let half = (6.313_751_5f64.powi(2) * seeds + 2.353_363_4f64.powi(2) * images).sqrt();
        assert!((estimate.lower(&quantiles) - (37.5 - half)).abs() < 1e-4);
        assert!((estimate.upper(&quantiles) - (37.5 + half)).abs() < 1e-4);
    }

    #[test]
    fn what_does_not_spread_neither_publishes_nor_ends() {
        let all = rows(&["1111", "1111", "1111"]);
        let none = rows(&["0000", "0000", "0000"]);
        for (ours, theirs, gain) in
            [(&all, &all, 0.0), (&all, &none, 100.0), (&none, &all, -100.0), (&none, &none, 0.0)]
        {
            let estimate = Estimate::new(ours, theirs);
            let comparison = estimate.compare("none", 0.025);
            let quantiles = Quantiles::new(FUTILITY_LEVEL, 3, 4);
            let numbers = [comparison.gain, comparison.lower, comparison.degrees];
            assert!(numbers.iter().all(|number| number.is_finite()), "{comparison:?}");
            assert!((comparison.gain - gain).abs() < 1e-12);
            assert!(!is_better(&[comparison]) && !is_futile(&[estimate], &quantiles));
        }
        let one_seed = Estimate::new(&rows(&["1110"]), &rows(&["0000"]));
        assert!(!is_better(&[one_seed.compare("none", 0.5)]));
        let no_seed = Estimate::new::<Vec<bool>>(&[], &[]).compare("none", 0.025);
        assert!(!is_better(&[no_seed]));
        assert!(!is_better(&[]));
    }

    #[test]
    fn every_rival_has_to_be_beaten() {
        let above = Comparison { lower: 0.1, ..Comparison::default() };
        let below = Comparison { lower: 0.0, gain: 3.0, ..Comparison::default() };
        assert!(is_better(&[above.clone(), above.clone()]));
        assert!(!is_better(&[above, below]));
    }
}
