//! The gate's reasons, in one plain sentence with its numbers.
//!
//! Owns the wording. Decides nothing.

use super::decision::{Estimate, FUTILITY_LEVEL, Quantiles};
use super::{Contender, Verdict};

/// "the incumbent x@1" as it is, "none" as "the policy none".
pub(super) fn policy(words: &str) -> String {
    if words.starts_with("the ") { words.to_owned() } else { format!("the policy {words}") }
}

/// After all seeds. The decisive rival has the lowest lower bound.
pub(super) fn decided(verdict: &Verdict, contenders: &[Contender<'_>]) -> String {
    let bounds = verdict.comparisons.iter().map(|comparison| comparison.lower);
    let decisive = lowest(bounds);
    let (comparison, rival) = (&verdict.comparisons[decisive], &contenders[decisive + 1].words);
    let numbers = format!(
        "lower bound {} at level {}, {} seeds, {} images",
        points(comparison.lower),
        level(verdict.alpha),
        verdict.n_seeds,
        thousands(verdict.n_images)
    );
    let gain = points(comparison.gain);
    match (verdict.is_better, comparison.gain > 0.0) {
        (true, _) => format!("published: {gain} points over {rival} ({numbers})"),
        (false, true) => {
            format!("not published: {gain} points over {rival} may be chance ({numbers})")
        }
        (false, false) => format!("not published: {gain} points against {rival} ({numbers})"),
    }
}

/// Ended early. The decisive rival has the lowest upper bound.
pub(super) fn futile(
    verdict: &Verdict,
    contenders: &[Contender<'_>],
    estimates: &[Estimate],
) -> String {
    let quantiles = Quantiles::new(FUTILITY_LEVEL, verdict.n_seeds, verdict.n_images);
    let uppers: Vec<f64> = estimates.iter().map(|estimate| estimate.upper(&quantiles)).collect();
    let decisive = lowest(uppers.iter().copied());
    format!(
        "not published: {} points against {} after {} of {} seeds (upper bound {} at level {}, {} \
         images)",
        points(estimates[decisive].gain),
        contenders[decisive + 1].words,
        verdict.n_seeds,
        verdict.n_seeds_max,
        points(uppers[decisive]),
        level(FUTILITY_LEVEL),
        thousands(verdict.n_images)
    )
}

/// The candidate's training diverged.
pub(super) fn diverged(verdict: &Verdict, why: &str) -> String {
    format!(
        "not published: the candidate's training diverged with seed {} of {} ({why})",
        verdict.n_seeds, verdict.n_seeds_max
    )
}

/// Index of the lowest value; the first of equal ones.
fn lowest(values: impl Iterator<Item = f64>) -> usize {
    values.enumerate().min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(idx, _)| idx)
}

/// With sign and two digits: `+0.84`, `−1.93`.
fn points(value: f64) -> String {
    let sign = if value < 0.0 { '−' } else { '+' };
    format!("{sign}{:.2}", value.abs())
}

/// With two significant digits: 0.025, 0.0083.
#[allow(clippy::cast_possible_truncation, reason = "the logarithm of a level is small")]
fn level(level: f64) -> String {
    if level <= 0.0 {
        return "0".into();
    }
    let n_digits = (-level.log10()).ceil().max(1.0) as usize + 1;
    format!("{level:.n_digits$}").trim_end_matches('0').to_owned()
}

/// 10000 as `10,000`.
fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (idx, digit) in digits.chars().enumerate() {
        if idx > 0 && (digits.len() - idx).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([0.84, -1.934, 0.0, -0.0].map(points), ["+0.84", "−1.93", "+0.00", "+0.00"]);
        let levels = [0.025, 0.05 / 6.0, 0.05 / 420.0, 0.05, 0.0].map(level);
        assert_eq!(levels, ["0.025", "0.0083", "0.00012", "0.05", "0"]);
        let numbers = [0, 999, 1000, 10_000, 1_234_567].map(thousands);
        assert_eq!(numbers, ["0", "999", "1,000", "10,000", "1,234,567"]);
        assert_eq!(policy("none"), "the policy none");
        assert_eq!(policy("the incumbent x@1"), "the incumbent x@1");
    }
}
