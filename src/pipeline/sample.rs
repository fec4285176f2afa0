//! One sample of a stream: read, decode (or take from the window), render; and what is done if it
//! cannot be.
//!
//! Owns the choice of a substitute: a function of (seed, epoch, sample) and of which samples can be
//! read, so it is the same at every visit. A substitute is seen through the draws of the place that
//! it fills. Failures that may pass (a file that is gone, a disk that fails) are no property of the
//! sample, and end the batch whatever `on_error` says.

use std::fmt;
use std::sync::Arc;

use crate::augment::PreparedPolicy;
use crate::dataset::{Content, DatasetError};
use crate::image::decode::Decoder;
use crate::random::{Purpose, SampleRng};

use super::load::{LoadError, Source};
use super::recipe::OnError;
use super::render::{CompiledRecipe, RenderScratch, SampleKey, write_label};
use super::shared::{Claim, ImagePlace, Membership, SharedImage};
use super::workers::StreamSpec;

/// Samples that are tried in the place of one that cannot be read.
const SUBSTITUTES_MAX: u32 = 32;

/// Keeps account of samples that cannot be read.
pub trait BadSamples: Send + Sync + fmt::Debug {
    /// A sample could not be read; may come again for the same one, at each visit.
    fn found(&self, sample_idx: u64, name: &str, reason: &str);
}

/// What came of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Made {
    /// Its own pixels and label.
    Own,
    /// Those of another.
    Substituted,
    /// Nothing.
    Skipped,
}

/// What a worker keeps from sample to sample.
#[derive(Debug, Default)]
pub(super) struct SampleScratch {
    render: RenderScratch,
    decoder: Decoder,
    file: Vec<u8>,
}

/// Why a sample cannot be made.
enum Failure {
    /// It is damaged or of the wrong size: it will be so at the next visit.
    Bad(String),
    /// Something else, with the whole message.
    Other(String),
}

impl From<DatasetError> for Failure {
    fn from(error: DatasetError) -> Self {
        match error {
            DatasetError::Io { .. } | DatasetError::Stale { .. } => Self::Other(error.to_string()),
            error => Self::Bad(error.to_string()),
        }
    }
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        Self::Bad(error.to_string())
    }
}

/// Writes the sample of `key` into its place.
///
/// # Errors
/// In words: it cannot be read, and `on_error` gives no way out.
pub(super) fn make_sample(
    spec: &StreamSpec,
    policy: &PreparedPolicy,
    key: SampleKey,
    scratch: &mut SampleScratch,
    pixels: &mut [u8],
    label: &mut [u8],
) -> Result<Made, String> {
    let own = key.sample_idx;
    let named = |reason: &str| format!("{}: {reason}", spec.split.sample_name(own));
    let reason = match render(spec, own, policy, key, scratch, pixels, label) {
        Ok(()) => return Ok(Made::Own),
        Err(Failure::Other(message)) => return Err(message),
        Err(Failure::Bad(reason)) => reason,
    };
    if let Some(bad_samples) = &spec.bad_samples {
        bad_samples.found(own, &spec.split.sample_name(own), &reason);
    }
    match spec.on_error {
        OnError::Fail => {
            let cure =
                "set on_error = \"substitute\" or \"skip\" in the recipe to go on without it";
            return Err(format!("{}; {cure}", named(&reason)));
        }
        OnError::Skip => {
            pixels.fill(0);
            label.fill(0);
            return Ok(Made::Skipped);
        }
        OnError::Substitute => {}
    }
    let mut rng = SampleRng::new(key.seed, key.epoch, own, Purpose::Substitute);
    for _ in 0..SUBSTITUTES_MAX {
        let other = index_below(&mut rng, spec.split.info().n_samples);
        match render(spec, other, policy, key, scratch, pixels, label) {
            Ok(()) => return Ok(Made::Substituted),
            Err(Failure::Other(message)) => return Err(message),
            Err(Failure::Bad(_)) => {}
        }
    }
    Err(format!(
        "{}; nor can any of {SUBSTITUTES_MAX} others drawn in its place be read: check the dataset",
        named(&reason)
    ))
}

/// Uniform in `0..n` (bias below n / 2^64).
fn index_below(rng: &mut SampleRng, n: u64) -> u64 {
    let word = (u64::from(rng.next_u32()) << 32) | u64::from(rng.next_u32());
    u64::try_from((u128::from(word) * u128::from(n)) >> 64).expect("below n")
}

/// Renders the sample `sample_idx` with the draws of `key`.
fn render(
    spec: &StreamSpec,
    sample_idx: u64,
    policy: &PreparedPolicy,
    key: SampleKey,
    scratch: &mut SampleScratch,
    pixels: &mut [u8],
    label: &mut [u8],
) -> Result<(), Failure> {
    let SampleScratch { render, decoder, file } = scratch;
    let recipe = &spec.recipe;
    let Some(shared) = &spec.shared else {
        let sample = spec.split.sample(sample_idx, file)?;
        write_label(sample.label, label);
        return Ok(recipe.render(&sample, policy, key, render, pixels)?);
    };
    write_label(spec.split.label(sample_idx)?, label);
    let shape = recipe.shape();
    // A substitute is seen through another sample's draws: nobody else sees it so.
    let is_own = sample_idx == key.sample_idx;
    let (mut fetched, mut file) = (None, Some(file));
    for (view, out) in (0_u64..).zip(pixels.chunks_exact_mut(shape.image_bytes())) {
        let place = ImagePlace { sample_idx, epoch: key.epoch, view };
        let claim = if is_own { shared.claim(place, shape.n_pixels()) } else { Claim::Alone };
        if let Claim::Ready(image) = claim {
            recipe.finish(&image.image, policy, key.of_view(view), render, out);
            shared.give_back(image);
            continue;
        }
        if let Some(file) = file.take() {
            fetched = Some(fetch(spec, shared, sample_idx, key, decoder, file)?);
        }
        let source = fetched.as_ref().expect("fetched for the first view that needs it").source();
        match claim {
            Claim::Mine(making) => {
                let mut image = shared.spare();
                recipe.load(source, key.of_view(view), render, &mut image.image)?;
                let image = Arc::new(image);
                making.put(Arc::clone(&image));
                recipe.finish(&image.image, policy, key.of_view(view), render, out);
                shared.give_back(image);
            }
            _ => recipe.render_view(source, policy, key.of_view(view), render, out)?,
        }
    }
    if let (Some(Fetched::Whole(image)), Some(whole)) = (fetched, shared.whole()) {
        whole.give_back(image);
    }
    Ok(())
}

/// What a sample's views are made of.
enum Fetched<'a> {
    Whole(Arc<SharedImage>),
    File(&'a [u8]),
}

impl Fetched<'_> {
    fn source(&self) -> Source<'_> {
        match self {
            Self::Whole(image) => Source::Shared(image),
            Self::File(bytes) => Source::Encoded(bytes),
        }
    }
}

/// Takes the whole image from the window, or reads the file; decodes all of it where that pays.
fn fetch<'a>(
    spec: &'a StreamSpec,
    shared: &Membership,
    sample_idx: u64,
    key: SampleKey,
    decoder: &mut Decoder,
    file: &'a mut Vec<u8>,
) -> Result<Fetched<'a>, Failure> {
    let recipe = &spec.recipe;
    let place = ImagePlace { sample_idx, ..ImagePlace::default() };
    if let Some(whole) = shared.whole()
        && let Some(image) = whole.get(place)
    {
        if recipe.can_share(&image, key) {
            return Ok(Fetched::Whole(image));
        }
        whole.give_back(image);
    }
    let Content::Encoded(bytes) = spec.split.sample(sample_idx, file)?.content else {
        unreachable!("streams of image files alone share");
    };
    let Some(whole) = shared.whole() else { return Ok(Fetched::File(bytes)) };
    let is_same = |image: &Arc<SharedImage>| recipe.can_share(image, key);
    let image = decode_whole(bytes, whole, place, recipe, key, decoder)?.filter(is_same);
    Ok(image.map_or(Fetched::File(bytes), Fetched::Whole))
}

/// Decodes a whole image for all streams and views that want it; `None` where each is better off
/// alone.
fn decode_whole(
    bytes: &[u8],
    whole: &Membership,
    place: ImagePlace,
    recipe: &CompiledRecipe,
    key: SampleKey,
    decoder: &mut Decoder,
) -> Result<Option<Arc<SharedImage>>, LoadError> {
    let views = recipe.shape().views;
    let n_takers = whole.n_members() * views;
    if n_takers < 2 {
        return Ok(None);
    }
    let mut opened = decoder.open(bytes, recipe.decode_options())?;
    let (width, height) = opened.size();
    let is_reducible = opened.is_reducible();
    if !recipe.should_share((width, height), is_reducible, n_takers - 1, key) {
        return Ok(None);
    }
    let making = match whole.claim(place, width * height) {
        Claim::Ready(image) => return Ok(Some(image)),
        Claim::Mine(making) => Some(making),
        Claim::Alone if views > 1 => None,
        Claim::Alone => return Ok(None),
    };
    let mut image = whole.spare();
    image.is_reducible = is_reducible;
    if opened.decode(&mut image.image).is_err() {
        // The part that is needed may be whole all the same; alone, only that would be asked for.
        return Ok(None);
    }
    let image = Arc::new(image);
    if let Some(making) = making {
        making.put(Arc::clone(&image));
    }
    Ok(Some(image))
}
