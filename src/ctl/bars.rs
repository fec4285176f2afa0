//! Progress bars, and how fast something was.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::dataset::Progress;

/// Progress bars on stderr, one split after the other; nothing where stderr is no terminal.
#[derive(Debug, Default)]
pub(super) struct Bars {
    current: Option<(String, ProgressBar, Instant)>,
    times: BTreeMap<String, Duration>,
}

impl Bars {
    pub(super) fn show(&mut self, progress: Progress<'_>) {
        if self.current.as_ref().is_none_or(|(split, ..)| split != progress.split) {
            self.finish_split();
            let bar =
                ProgressBar::with_draw_target(Some(progress.total), ProgressDrawTarget::stderr());
            let style =
                ProgressStyle::with_template("{msg:>8} [{bar:40}] {percent:>3} %, {eta} left");
            if let Ok(style) = style {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_message(progress.split.to_owned());
            self.current = Some((progress.split.to_owned(), bar, Instant::now()));
        }
        if let Some((_, bar, _)) = &self.current {
            bar.set_position(progress.done);
        }
    }

    /// Removes the bar; gives the time since its split's first sample.
    pub(super) fn finish_split(&mut self) -> Duration {
        let Some((split, bar, start)) = self.current.take() else { return Duration::ZERO };
        bar.finish_and_clear();
        let time = start.elapsed();
        self.times.insert(split, time);
        time
    }

    pub(super) fn finish(mut self) -> BTreeMap<String, Duration> {
        self.finish_split();
        self.times
    }
}

/// How much was done in how long.
#[derive(Debug)]
pub(super) struct Rate {
    pub(super) n_samples: u64,
    pub(super) bytes: u64,
    pub(super) time: Duration,
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A clock's tick at least: small sets take no measurable time.
        let seconds = self.time.as_secs_f64().max(1e-6);
        let megabytes = self.bytes as f64 / 1e6;
        write!(
            f,
            "{} samples, {megabytes:.1} MB in {seconds:.2} s ({:.0} samples/s, {:.0} MB/s)",
            self.n_samples,
            self.n_samples as f64 / seconds,
            megabytes / seconds
        )
    }
}
