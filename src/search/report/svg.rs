//! What all charts share: scales, axes, marks.
//!
//! Owns pixels of charts, never their meaning. *Invariants*: coordinates are finite and inside a
//! sane range, whatever the data; every chart has a title and a role, so that it is read aloud.
//! Colours and fonts are the style sheet's, by class.

use super::markup::{Element, el, number};

/// Farthest that anything is drawn from the origin.
const COORDINATE_MAX: f64 = 1e4;

/// A chart of this size in its own units; it shrinks with the page, down to a readable size.
pub(super) fn chart(width: f64, height: f64, title: &str) -> Element {
    let view_box = format!("0 0 {} {}", xy(width), xy(height));
    el("svg")
        .class("chart")
        .attr("viewBox", view_box)
        .attr("role", "img")
        .attr("aria-label", title)
        .attr("style", format!("max-width:{}px", xy(width)))
        .add(el("title").text(title))
}

/// A chart in a box that scrolls where the chart would be too small to read.
pub(super) fn in_box(chart: Element) -> Element {
    el("div").class("scroll").add(chart)
}

/// A coordinate as text.
pub(super) fn xy(value: f64) -> String {
    let value = if value.is_finite() { value } else { 0.0 };
    let text = number(value.clamp(-COORDINATE_MAX, COORDINATE_MAX), 1);
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// A line of a class.
pub(super) fn line(class: &str, from: (f64, f64), to: (f64, f64)) -> Element {
    let line = el("line").class(class).attr("x1", xy(from.0)).attr("y1", xy(from.1));
    line.attr("x2", xy(to.0)).attr("y2", xy(to.1))
}

/// A rectangle of a class, from its upper left corner.
pub(super) fn rect(class: &str, at: (f64, f64), size: (f64, f64)) -> Element {
    let rect = el("rect").class(class).attr("x", xy(at.0)).attr("y", xy(at.1));
    rect.attr("width", xy(size.0.max(0.0))).attr("height", xy(size.1.max(0.0)))
}

/// A dot of a class.
pub(super) fn dot(class: &str, at: (f64, f64), radius: f64) -> Element {
    el("circle").class(class).attr("cx", xy(at.0)).attr("cy", xy(at.1)).attr("r", xy(radius))
}

/// Text of a class (`start`, `middle` or `end` anchor it); `at` is on its baseline.
pub(super) fn label(class: &str, at: (f64, f64), text: &str) -> Element {
    el("text").class(class).attr("x", xy(at.0)).attr("y", xy(at.1)).text(text)
}

/// From values to coordinates.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    domain: (f64, f64),
    range: (f64, f64),
}

impl Scale {
    /// A scale that shows all finite values and these bounds, widened a little.
    pub(super) fn around(values: impl Iterator<Item = f64>, range: (f64, f64)) -> Self {
        let finite = values.filter(|value| value.is_finite());
        let (lo, hi) =
            finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), v| (lo.min(v), hi.max(v)));
        let (lo, hi) = if lo <= hi { (lo, hi) } else { (0.0, 1.0) };
        // Halves, so that the largest floats don't overflow.
        let middle = lo / 2.0 + hi / 2.0;
        let half = (hi / 2.0 - lo / 2.0).max(middle.abs() * 1e-6).max(1e-9);
        Self { domain: (middle - 1.05 * half, middle + 1.05 * half), range }
    }

    /// A scale of exactly this domain, which is not empty.
    pub(super) fn exact(domain: (f64, f64), range: (f64, f64)) -> Self {
        Self { domain, range }
    }

    /// Where a value is, cut off at the ends.
    pub(super) fn at(&self, value: f64) -> f64 {
        let (lo, hi) = self.domain;
        let share = (value / 2.0 - lo / 2.0) / (hi / 2.0 - lo / 2.0);
        let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
        self.range.0 + share * (self.range.1 - self.range.0)
    }

    /// At most about `n` round values inside, with the decimals that tell them apart.
    pub(super) fn ticks(&self, n: usize) -> (Vec<f64>, usize) {
        let (lo, hi) = self.domain;
        let raw = (hi - lo) / n.max(1) as f64;
        if !(raw.is_finite() && raw > 0.0) {
            return (Vec::new(), 0);
        }
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
        let step = step.into_iter().find(|&step| step >= raw).unwrap_or(10.0 * power);
        let first = (lo / step).ceil();
        let ticks = (0..=n).map(|idx| (first + idx as f64) * step);
        let n_decimals = (0..9).find(|&n| step * 10f64.powi(n) >= 0.999).unwrap_or(9);
        (ticks.filter(|&tick| tick <= hi).collect(), usize::try_from(n_decimals).unwrap_or(0))
    }
}

/// A horizontal axis at the bottom of a plot, with grid lines up to its top.
pub(super) fn x_axis(scale: &Scale, top: f64, bottom: f64, title: &str) -> Element {
    let (ticks, n_decimals) = scale.ticks(6);
    let mut group = el("g");
    for tick in ticks {
        let x = scale.at(tick);
        group = group.add(line("grid", (x, top), (x, bottom))).add(label(
            "tick middle",
            (x, bottom + 14.0),
            &number(tick, n_decimals),
        ));
    }
    let (left, right) = scale.range;
    let middle = f64::midpoint(left, right);
    group.add(line("axis", (left, bottom), (right, bottom))).add(label(
        "axis-title middle",
        (middle, bottom + 30.0),
        title,
    ))
}

/// A vertical axis at the left of a plot, with grid lines to its right end. Its title is above it.
pub(super) fn y_axis(scale: &Scale, left: f64, right: f64, title: &str) -> Element {
    let (ticks, n_decimals) = scale.ticks(5);
    let mut group = el("g");
    for tick in ticks {
        let y = scale.at(tick);
        group = group.add(line("grid", (left, y), (right, y))).add(label(
            "tick end",
            (left - 6.0, y + 4.0),
            &number(tick, n_decimals),
        ));
    }
    let (bottom, top) = scale.range;
    group.add(line("axis", (left, bottom), (left, top))).add(label(
        "axis-title start",
        (0.0, top - 12.0),
        title,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_stay_inside_whatever_the_values_are() {
        for values in [
            vec![],
            vec![0.0],
            vec![3.0; 5],
            vec![f64::NAN, f64::INFINITY, 1.0],
            vec![f64::MIN, f64::MAX],
            vec![-1e-300, 1e-300],
        ] {
            let scale = Scale::around(values.iter().copied(), (10.0, 110.0));
            for &value in values.iter().chain(&[f64::NAN, -1e308, 1e308, 0.0]) {
                assert!((10.0..=110.0).contains(&scale.at(value)), "{values:?}: {value}");
            }
            let (ticks, _) = scale.ticks(6);
            assert!(ticks.len() <= 7, "{values:?}: {ticks:?}");
        }
    }

    #[test]
    fn ticks_are_round_and_told_apart() {
        let scale = Scale::exact((-0.3, 1.1), (0.0, 1.0));
        let (ticks, n_decimals) = scale.ticks(6);
        let text: Vec<String> = ticks.iter().map(|&tick| number(tick, n_decimals)).collect();
        assert_eq!(text, ["0.0", "0.5", "1.0"]);
        let (ticks, n_decimals) = Scale::exact((85.01, 85.09), (0.0, 1.0)).ticks(4);
        let text: Vec<String> = ticks.iter().map(|&tick| number(tick, n_decimals)).collect();
        assert_eq!(text, ["85.02", "85.04", "85.06", "85.08"]);
        assert_eq!((xy(1.25), xy(-0.01), xy(f64::NAN)), ("1.2".into(), "0".into(), "0".into()));
    }
}
