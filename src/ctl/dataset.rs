//! `fastaa-ctl dataset`: pack, inspect and verify need no daemon; list asks it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use indicatif::HumanBytes;
use serde_json::{Value, json};

use super::bars::{Bars, Rate};
use super::daemon::connect;
use super::recode::{self, Recoding};
use super::status::datasets_table;
use super::{Context, CtlError, output};
use crate::control::{Reply, Request};
use crate::dataset::{
    self, Convert, DatasetError, Division, FingerprintCheck, ImageKind, Label, LabelKind,
    PackOptions, Progress, Split, SplitInfo, VerifyReport,
};
use crate::image::Image;
use crate::image::decode::{DecodeLimits, DecodeOptions, Decoder};

/// Subcommands of `dataset`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum DatasetCommand {
    /// List the datasets that the daemon serves
    List,
    /// Convert a dataset to packed Arrow files, one a split, with checksums
    Pack(PackArgs),
    /// Show what a dataset holds: format, shape, labels, fingerprint
    Inspect(InspectArgs),
    /// Compare every sample with its stored checksum; exit 1 if one is bad
    Verify(VerifyArgs),
}

/// Arguments of `dataset pack`.
#[derive(Debug, clap::Args)]
pub(crate) struct PackArgs {
    /// A folder of class folders of images, of WebDataset shards, of Hugging Face `datasets`, of
    /// IDX (may be .gz) or CIFAR files; or one such file
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// The folder to write SPLIT.arrow files to; made if it is missing
    #[arg(value_name = "DEST")]
    dest: PathBuf,
    /// Pack only this split (may be given several times), or divide the only one: 0.9 makes `train`
    /// of nine tenths of every class, and `val` of the rest [default: all splits]
    #[arg(long = "split", value_name = "NAME|FRACTION")]
    splits: Vec<String>,
    /// Which samples a FRACTION takes
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Shrink images whose longer side is above this, in pixels; they are encoded anew
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=16384))]
    max_side: Option<u32>,
    /// Encode all images anew as JPEG of this quality [default: 90 for those that shrink]
    #[arg(long, value_name = "1-100", value_parser = clap::value_parser!(u8).range(1..=100))]
    quality: Option<u8>,
    /// Store pixels instead of image files: all images must be of one size
    #[arg(long, conflicts_with = "quality")]
    raw: bool,
    /// Threads [default: one for each core]
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Replace files that are there already
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    cache: CacheArgs,
}

/// Arguments of `dataset inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    what: WhatArgs,
}

/// Arguments of `dataset verify`.
#[derive(Debug, clap::Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    what: WhatArgs,
}

#[derive(Debug, clap::Args)]
struct WhatArgs {
    /// A folder, or the file of one split
    path: PathBuf,
    /// Only this split; may be given several times [default: all splits]
    #[arg(long = "split", value_name = "NAME")]
    splits: Vec<String>,
    #[command(flatten)]
    cache: CacheArgs,
}

#[derive(Debug, clap::Args)]
struct CacheArgs {
    /// Where .gz files are unpacked to [default: fastaa in $XDG_CACHE_HOME, else in ~/.cache]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
}

impl CacheArgs {
    fn dir(&self) -> PathBuf {
        let absolute = |name: &str| {
            std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
        };
        let default = || {
            absolute("XDG_CACHE_HOME")
                .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
                .unwrap_or_else(std::env::temp_dir)
                .join("fastaa")
        };
        self.cache_dir.clone().unwrap_or_else(default)
    }
}

impl From<DatasetError> for CtlError {
    fn from(error: DatasetError) -> Self {
        // The message itself ends with what to do.
        Self::failed(error.to_string())
    }
}

pub(crate) fn run(context: &Context, command: DatasetCommand) -> Result<(), CtlError> {
    match command {
        DatasetCommand::List => list(context),
        DatasetCommand::Pack(args) => pack(context, &args),
        DatasetCommand::Inspect(args) => inspect(context, &args.what),
        DatasetCommand::Verify(args) => verify(context, &args.what),
    }
}

/// Asks the daemon which datasets it serves.
fn list(context: &Context) -> Result<(), CtlError> {
    let mut client = connect(context)?;
    let datasets = match client.call(&Request::DatasetList)? {
        Reply::Datasets { datasets } => datasets,
        reply => return Err(client.unexpected(&reply).into()),
    };
    if context.json {
        return output::print_json(&datasets);
    }
    output::print(&datasets_table(&datasets))
}

fn pack(context: &Context, args: &PackArgs) -> Result<(), CtlError> {
    let options = pack_options(args)?;
    survive_file_size_limit()?;
    let mut bars = Bars::default();
    let packed =
        dataset::pack(&args.source, &args.dest, &options, &mut |progress| bars.show(progress))?;
    let times = bars.finish();
    for split in &packed {
        let time = times.get(&split.split).copied().unwrap_or_default();
        let rate = Rate { n_samples: split.n_samples, bytes: split.file_bytes, time };
        output::note(&format!("packed {}: {rate}", split.path.display()));
    }
    if !context.json {
        return Ok(());
    }
    let splits: Vec<Value> = packed
        .iter()
        .map(|split| {
            json!({
                "split": split.split,
                "path": split.path.display().to_string(),
                "n_samples": split.n_samples,
                "file_bytes": split.file_bytes,
                "fingerprint": split.fingerprint.0,
            })
        })
        .collect();
    output::print_json(&json!({ "splits": splits }))
}

fn pack_options(args: &PackArgs) -> Result<PackOptions, CtlError> {
    let fraction = |text: &String| text.parse::<f64>().ok();
    let divide = match (args.splits.iter().find_map(fraction), &args.splits[..]) {
        (None, _) => None,
        (Some(fraction), [_]) if fraction > 0.0 && fraction < 1.0 => {
            Some(Division { fraction, seed: args.seed })
        }
        (Some(fraction), _) => {
            return Err(CtlError::Usage {
                message: format!(
                    "--split {fraction}: a fraction is above 0 and below 1, and alone"
                ),
                hint: "give --split 0.9 once, or the names of splits".to_owned(),
            });
        }
    };
    let recoding = Recoding { max_side: args.max_side, quality: args.quality, raw: args.raw };
    let is_asked = recoding.max_side.is_some() || recoding.quality.is_some() || recoding.raw;
    let convert =
        is_asked.then(|| Convert(Arc::new(move |split| recode::recoded(split, recoding))));
    Ok(PackOptions {
        splits: if divide.is_some() { Vec::new() } else { args.splits.clone() },
        force: args.force,
        cache_dir: args.cache.dir(),
        n_threads: args.threads,
        divide,
        convert,
    })
}

/// A write beyond `ulimit -f` sends SIGXFSZ, which kills without a word. With a handler, the write
/// fails instead, and the error names file and cause.
fn survive_file_size_limit() -> Result<(), CtlError> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |cause| CtlError::failed(format!("cannot set a signal handler: {cause}"));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
    let _context = runtime.enter();
    // tokio's handlers stay for the life of the process, when the stream and the runtime are gone.
    let kind = SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw());
    drop(signal(kind).map_err(failed)?);
    Ok(())
}

fn inspect(context: &Context, what: &WhatArgs) -> Result<(), CtlError> {
    survive_file_size_limit()?;
    let mut values = Vec::new();
    let mut texts = Vec::new();
    for split in splits_of(what)? {
        let samples = dataset::open_split(&what.path, &split, &what.cache.dir())?;
        let counts = count_classes(samples.as_ref())?;
        if context.json {
            values.push(split_json(&split, samples.info(), &counts));
        } else {
            texts.push(split_text(&split, samples.info(), &counts));
        }
    }
    if context.json {
        let path = what.path.display().to_string();
        return output::print_json(&json!({ "path": path, "splits": values }));
    }
    output::print(&texts.join("\n"))
}

fn splits_of(what: &WhatArgs) -> Result<Vec<String>, CtlError> {
    if what.splits.is_empty() {
        return Ok(dataset::list_splits(&what.path)?);
    }
    Ok(what.splits.clone())
}

/// Samples per class; empty if labels are vectors.
fn count_classes(samples: &dyn Split) -> Result<BTreeMap<i64, u64>, CtlError> {
    let mut counts = BTreeMap::new();
    if let LabelKind::Class { .. } = samples.info().label_kind {
        for sample_idx in 0..samples.info().n_samples {
            if let Label::Class(class) = samples.label(sample_idx)? {
                *counts.entry(class).or_default() += 1;
            }
        }
    }
    Ok(counts)
}

fn split_json(split: &str, info: &SplitInfo, counts: &BTreeMap<i64, u64>) -> Value {
    let label = match info.label_kind {
        LabelKind::Class { n_classes } => {
            let all = 0..i64::from(n_classes);
            let counts: Vec<u64> =
                all.map(|class| counts.get(&class).copied().unwrap_or_default()).collect();
            json!({ "kind": "class", "n_classes": n_classes, "counts": counts })
        }
        LabelKind::Vector { len } => json!({ "kind": "vector", "len": len }),
    };
    let [height, width, channels] = match info.images {
        ImageKind::Raw { height, width, channels } => [height, width, channels].map(Some),
        ImageKind::Encoded { .. } => [None; 3],
    };
    json!({
        "split": split,
        "format": info.format,
        "n_samples": info.n_samples,
        "width": width,
        "height": height,
        "channels": channels,
        "label": label,
        "class_names": info.class_names,
        "fingerprint": info.fingerprint.0,
        "mapped_bytes": info.mapped_bytes,
    })
}

fn split_text(split: &str, info: &SplitInfo, counts: &BTreeMap<i64, u64>) -> String {
    let n_samples = info.n_samples;
    let images = match info.images {
        ImageKind::Raw { height, width, channels } => {
            format!("  shape        {height} × {width} × {channels} (height, width, channels)")
        }
        ImageKind::Encoded { .. } => "  images       encoded, of any size".to_owned(),
    };
    let labels = match info.label_kind {
        LabelKind::Class { n_classes } => format!("{n_classes} classes"),
        LabelKind::Vector { len } => format!("vectors of {len} f32"),
    };
    let mut lines = vec![
        split.to_owned(),
        format!("  format       {}", info.format),
        format!("  samples      {n_samples}"),
        images,
        format!("  labels       {labels}"),
        format!("  fingerprint  {}", info.fingerprint),
        format!("  mapped       {} bytes ({})", info.mapped_bytes, HumanBytes(info.mapped_bytes)),
    ];
    let class_width = counts.keys().last().map_or(1, |class| class.to_string().len());
    for (class, count) in counts {
        let name = usize::try_from(*class).ok().and_then(|class| info.class_names.get(class));
        // Names come from files: what is no text must not reach the terminal.
        let name: String = name.map_or_else(String::new, |name| {
            let shown = name.chars().filter(|letter| !letter.is_control());
            format!("  {}", shown.collect::<String>())
        });
        lines.push(format!("  class {class:>class_width$}  {count:>9}{name}"));
    }
    lines.push(String::new());
    lines.join("\n")
}

fn verify(context: &Context, what: &WhatArgs) -> Result<(), CtlError> {
    survive_file_size_limit()?;
    let mut bars = Bars::default();
    let mut values = Vec::new();
    let mut n_bad_splits = 0;
    for split in splits_of(what)? {
        let show = &mut |progress: Progress<'_>| bars.show(progress);
        let cache_dir = what.cache.dir();
        let report = dataset::verify_split(
            &what.path,
            &split,
            &cache_dir,
            &mut |bytes| decode(bytes),
            show,
        )?;
        let time = bars.finish_split();
        let n_samples = report.info.n_samples;
        let rate = Rate { n_samples, bytes: report.info.mapped_bytes, time };
        output::note(&format!("read {split}: {rate}"));
        n_bad_splits += usize::from(!report.is_good());
        if context.json {
            values.push(report_json(&split, &report));
        } else {
            output::print(&report_text(&split, &report))?;
        }
    }
    if context.json {
        let path = what.path.display().to_string();
        output::print_json(&json!({ "path": path, "good": n_bad_splits == 0, "splits": values }))?;
    }
    if n_bad_splits == 0 {
        return Ok(());
    }
    Err(CtlError::Failed {
        message: format!("{}: {n_bad_splits} damaged split(s)", what.path.display()),
        hint: "copy the file again from where it is whole, or pack it anew".to_owned(),
    })
}

/// Decodes an image file whole, with the limits that a daemon has by default.
fn decode(bytes: &[u8]) -> Result<(), String> {
    let options = DecodeOptions { channels: 3, turn: false, limits: DecodeLimits::default() };
    let (mut decoder, mut image) = (Decoder::default(), Image::default());
    let decoded = decoder.open(bytes, options).and_then(|mut opened| opened.decode(&mut image));
    decoded.map_err(|error| error.to_string())
}

fn report_json(split: &str, report: &VerifyReport) -> Value {
    let first_bad: Vec<Value> = report
        .first_bad
        .iter()
        .map(|bad| json!({ "sample": bad.sample_idx, "reason": bad.reason }))
        .collect();
    let (fingerprint, computed) = match &report.fingerprint {
        FingerprintCheck::Matches => ("matches", None),
        FingerprintCheck::Differs { computed } => ("differs", Some(computed.0.as_str())),
        FingerprintCheck::NotCompared => ("not compared", None),
    };
    json!({
        "split": split,
        "good": report.is_good(),
        "n_samples": report.info.n_samples,
        "checksums": report.has_checksums,
        "n_bad": report.n_bad,
        "first_bad": first_bad,
        "fingerprint": fingerprint,
        "fingerprint_stored": report.info.fingerprint.0,
        "fingerprint_computed": computed,
    })
}

fn report_text(split: &str, report: &VerifyReport) -> String {
    let n_samples = report.info.n_samples;
    let mut lines = Vec::new();
    lines.push(match (report.n_bad, report.has_checksums) {
        (0, true) => format!("{split}: {n_samples} samples, all checksums right"),
        (0, false) => format!(
            "{split}: {n_samples} samples, structure, labels and image files right ({} datasets \
             hold no checksums; packed ones do)",
            report.info.format
        ),
        (n_bad, _) => format!("{split}: {n_bad} of {n_samples} samples are bad"),
    });
    for bad in &report.first_bad {
        lines.push(format!("  sample {}: {}", bad.sample_idx, bad.reason));
    }
    let n_more = report.n_bad.saturating_sub(report.first_bad.len() as u64);
    if n_more > 0 {
        lines.push(format!("  and {n_more} more"));
    }
    if let FingerprintCheck::Differs { computed } = &report.fingerprint {
        let stored = &report.info.fingerprint;
        lines.push(format!("  fingerprint: {stored} is stored, but the content gives {computed}"));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_in_class_names_are_not_printed() {
        let info = SplitInfo {
            format: "arrow",
            n_samples: 1,
            images: ImageKind::Raw { width: 1, height: 1, channels: 1 },
            label_kind: LabelKind::Class { n_classes: 1 },
            class_names: vec!["cat\x1b[31m\n".to_owned()],
            fingerprint: crate::dataset::Fingerprint("0".to_owned()),
            mapped_bytes: 1,
        };
        let text = split_text("train", &info, &BTreeMap::from([(0, 1)]));
        assert!(text.contains("  class 0          1  cat[31m\n"), "{text}");
    }

    #[test]
    fn the_cache_folder_that_is_given_is_used() {
        let dir = PathBuf::from("somewhere");
        assert_eq!(CacheArgs { cache_dir: Some(dir.clone()) }.dir(), dir);
    }
}
