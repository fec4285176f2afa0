//! Finds what the search's report is made from: its journal, and sample images of the dataset.
//!
//! Owns the choice of the journal: the one that was written last. Makes no page itself.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::dataset::{Content, Pixels, RawImage, Split};
use crate::image::Image;
use crate::image::decode::{DecodeLimits, DecodeOptions, Decoder};
use crate::search::report;

/// Images that are shown in the report.
const N_SAMPLES: u64 = 6;

/// The page on the newest search for a dataset; `split` gives the sample images.
///
/// # Errors
/// In words: no search has run, or its journal cannot be read.
pub(super) fn page(
    state_dir: &Path,
    dataset: &str,
    split: Option<&dyn Split>,
) -> Result<String, String> {
    let journal = newest_journal(state_dir, dataset);
    let samples = split.map(sample_images).unwrap_or_default();
    report::from_journal(&journal, dataset, &samples).map_err(|error| error.to_string())
}

/// The journal that was written last, or where one would be.
pub(super) fn newest_journal(state_dir: &Path, dataset: &str) -> PathBuf {
    let dir = state_dir.join("search").join(dataset);
    let journals = std::fs::read_dir(&dir).into_iter().flatten().filter_map(|entry| {
        let path = entry.ok()?.path().join("journal");
        let written = std::fs::metadata(&path).and_then(|file| file.modified()).ok()?;
        Some((written, path))
    });
    let newest: Option<(SystemTime, PathBuf)> = journals.max();
    newest.map_or_else(|| dir.join("journal"), |(_, path)| path)
}

/// Images from all over the split; those that cannot be read are left out.
fn sample_images(split: &dyn Split) -> Vec<Image> {
    let n_samples = split.info().n_samples;
    let places =
        (0..N_SAMPLES.min(n_samples)).map(|idx| idx * n_samples / N_SAMPLES.min(n_samples));
    let mut buffer = Vec::new();
    let load = |sample_idx| match split.sample(sample_idx, &mut buffer).ok()?.content {
        Content::Raw(raw) => Some(image(raw)),
        Content::Encoded(bytes) => decoded(bytes),
    };
    places.filter_map(load).collect()
}

/// A whole encoded image, as the default recipe shows it.
fn decoded(bytes: &[u8]) -> Option<Image> {
    let options = DecodeOptions { channels: 3, turn: false, limits: DecodeLimits::default() };
    let (mut decoder, mut image) = (Decoder::default(), Image::default());
    decoder.open(bytes, options).and_then(|mut opened| opened.decode(&mut image)).ok()?;
    Some(image)
}

fn image(raw: RawImage<'_>) -> Image {
    let RawImage { width, height, channels, .. } = raw;
    let data = match raw.pixels {
        Pixels::Hwc(bytes) => bytes.to_vec(),
        Pixels::Chw(bytes) => {
            let plane = width * height;
            (0..plane * channels).map(|at| bytes[at % channels * plane + at / channels]).collect()
        }
    };
    Image { width, height, channels, data }
}
