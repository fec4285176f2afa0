//! `fastaa-ctl top`: the page of `status`, again and again.
//!
//! Owns the terminal's screen while it runs. What it shows is `status`'s.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;

use super::{Context, CtlError, output, status};

/// Clears the screen and puts the cursor at its top (ECMA-48: ED, CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Show the page of 'status' again and again, until Ctrl-C
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Seconds between two pages
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
    interval: f64,
    /// End after so many pages
    #[arg(long, value_name = "N")]
    pages: Option<u64>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a number between 0.1 and 3600".to_owned()),
    }
}

pub(crate) fn run(context: &Context, args: &TopArgs) -> Result<(), CtlError> {
    let mut n_shown = 0;
    loop {
        let page = status::text(context)?;
        // Whoever writes to a file wants pages, not a screen.
        let clear = if std::io::stdout().is_terminal() { CLEAR } else { "" };
        output::print(&format!("{clear}{page}"))?;
        n_shown += 1;
        if args.pages.is_some_and(|n_pages| n_shown >= n_pages) {
            return Ok(());
        }
        #[allow(clippy::disallowed_methods, reason = "a clock is all there is to wait for")]
        std::thread::sleep(Duration::from_secs_f64(args.interval));
    }
}
