//! How much of the error rate each test of a search may spend. Pure.
//!
//! Owns the sequence of levels. Never knows what a test found.
//!
//! D_gate is looked at again in every round, so the promise is one about the whole search: the
//! probability that it ever publishes a policy that is not better stays within [`TOTAL`], however
//! many rounds it has (Bonferroni with unequal shares; the tests may depend on each other). Only a
//! test that is done spends. A test that is ended early has spent, too: it might have published.
//! Nothing is given back for what was published or clearly lost; schemes that do so assume
//! independent tests, and these share their images and their rivals' trainings.
//!
//! Test i spends TOTAL / (i (i + 1)), which sums to TOTAL (1 − 1 / (N + 1)) over N tests. Against
//! 6 / (π² i²), it gives the first test a level of 0.025 in place of 0.030, and every later one
//! more: 1.6 times as much in the end. With 5 seeds, 10,000 images and the noise that the gate's
//! bench assumes, the gain that is seen with a probability of 80 % grows from 0.83 to 0.87 points
//! in the first test, and falls from 1.68 to 1.57 in the fifth and from 3.2 to 2.9 in the
//! twentieth. Slower sequences help late tests at the cost of the first, which matters most.

/// Probability that a search ever publishes a policy that is not better, at most.
pub const TOTAL: f64 = 0.05;

/// One-sided level of test number `test` of a search, from 1; 0 for test 0, which is none.
pub fn level(test: u32) -> f64 {
    let test = f64::from(test);
    if test < 1.0 { 0.0 } else { TOTAL / (test * (test + 1.0)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_fall_and_never_sum_to_more_than_the_total() {
        let mut sum = 0.0;
        for test in 1..=100_000 {
            assert!(level(test) > 0.0 && level(test + 1) < level(test));
            sum += level(test);
            assert!((sum - TOTAL * (1.0 - 1.0 / (f64::from(test) + 1.0))).abs() < 1e-12);
        }
        assert!(sum < TOTAL);
        assert!((level(1) - 0.025).abs() < 1e-15);
        assert!(level(0).abs() < 1e-15 && level(u32::MAX) > 0.0);
    }
}
