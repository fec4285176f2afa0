//! The report of a search: one HTML file that shows what was measured and why it was decided so.
//!
//! Owns the page. Never measures, decides or writes anything, and needs neither a daemon nor the
//! journal's lock.
//!
//! *Invariants*: the page is a pure function of the journal and the sample images. It is one file:
//! no network, no script, no font or picture of elsewhere. Everything from data is escaped. It is
//! smaller than 2 MB for whatever a search writes: what would make it larger (old rounds, many
//! trials, large pictures) is cut, and the page says so.

mod affinity;
mod cost;
mod data;
mod gate;
mod markup;
mod pictures;
mod policy;
mod summary;
mod svg;
mod trials;

use std::path::{Path, PathBuf};

pub use data::{PARTS, ReportInput};
use markup::{Element, el, note};

use super::journal::JournalError;
use crate::image::Image;

/// Rounds that are shown with charts; the newest ones.
const DETAILED_ROUNDS_MAX: usize = 12;
/// Longest text from data that is shown whole, in characters.
const TEXT_CHARS_MAX: usize = 2_000;
/// Longest name from data that is shown whole, in characters.
const NAME_CHARS_MAX: usize = 60;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// No journal.
    #[error(
        "no search of dataset '{dataset}' has finished a unit of work yet: there is no journal in \
         a folder of {path}; 'fastaa-ctl search status' tells what the daemon's search does, and \
         'fastaa-ctl search run --offline' runs one without a daemon"
    )]
    NoSearch {
        /// The dataset's name.
        dataset: String,
        /// The folder of its journals.
        path: PathBuf,
    },
    /// The journal cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl ReportError {
    fn from_journal(error: JournalError, dataset: &str, path: &Path) -> Self {
        match &error {
            JournalError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                let path = path.parent().unwrap_or(path).to_owned();
                Self::NoSearch { dataset: dataset.to_owned(), path }
            }
            _ => Self::Journal(error),
        }
    }
}

/// The page of the search that `journal` belongs to, also while it runs. `samples` are images of
/// the dataset, decoded and neither cropped nor augmented; the first few are shown.
///
/// # Errors
/// No search has run, or its journal cannot be read.
pub fn from_journal(
    journal: &Path,
    dataset: &str,
    samples: &[Image],
) -> Result<String, ReportError> {
    let mut input = ReportInput::from_journal(journal, dataset)?;
    input.samples = samples.to_vec();
    Ok(html(&input))
}

/// The page.
pub fn html(input: &ReportInput) -> String {
    let title = format!("Policy search on {}", markup::shortened(&input.dataset, NAME_CHARS_MAX));
    let head = el("head")
        .add(el("meta").attr("charset", "utf-8"))
        .add(el("meta").attr("name", "viewport").attr("content", "width=device-width"))
        .add(el("meta").attr("name", "color-scheme").attr("content", "light dark"))
        .add(el("title").text(&title))
        .add(el("style").style_sheet(include_str!("style.css")));
    let sections = [
        Section { id: "summary", title: "Summary", content: summary::section(input) },
        Section { id: "gate", title: "What the gate saw", content: gate::section(input) },
        Section { id: "trials", title: "Trials", content: trials::section(input) },
        Section { id: "affinity", title: "Affinity", content: affinity::section(input) },
        Section { id: "operations", title: "Operations", content: policy::operations(input) },
        Section { id: "policy", title: "The candidate", content: policy::sub_policies(input) },
        Section { id: "pictures", title: "Pictures", content: pictures::section(input) },
        Section { id: "folds", title: "Folds", content: summary::folds(input) },
        Section { id: "costs", title: "Costs", content: cost::section(input) },
    ];
    let sections: Vec<Section> =
        sections.into_iter().filter(|section| !section.content.is_empty()).collect();
    let links = sections
        .iter()
        .map(|section| el("a").attr("href", format!("#{}", section.id)).text(section.title));
    let navigation = el("nav").attr("aria-label", "Sections").add_all(links);
    let body = el("body")
        .add(el("header").add(el("h1").text(&title)).add(navigation))
        .add(el("main").add_all(sections.into_iter().map(Section::element)))
        .add(el("footer").add(identity(input)));
    let html = el("html").attr("lang", "en").add(head).add(body);
    format!("<!DOCTYPE html>\n{}\n", html.into_string())
}

/// A part of the page; without content it is left out.
struct Section {
    id: &'static str,
    title: &'static str,
    content: Vec<Element>,
}

impl Section {
    fn element(self) -> Element {
        let heading = el("h2").text(self.title);
        el("section").attr("id", self.id).add(heading).add_all(self.content)
    }
}

/// Which search this is, in small print.
fn identity(input: &ReportInput) -> Element {
    let version = env!("CARGO_PKG_VERSION");
    let n_units = input.n_units;
    let finished = match input.finished.as_str() {
        "" => String::new(),
        time => format!(", the last one done at {time}"),
    };
    let search = input.header.as_ref().map_or_else(String::new, |header| {
        format!(
            " Seed {}, configuration {}, dataset fingerprint {}.",
            header.seed,
            markup::shortened(&header.config, NAME_CHARS_MAX),
            markup::shortened(&header.dataset, NAME_CHARS_MAX)
        )
    });
    note(format!("fastaa-loaderd {version}. {n_units} units of work{finished}.{search}"))
}
