//! `fastaa-ctl augment`: one operation, or one draw of a policy, on an image file.
//!
//! Needs no daemon. Reads PNG, JPEG and PNM, writes PNG.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};

use super::{Context, CtlError, output};
use crate::augment::{Action, DrawnOp, PreparedPolicy, Scratch, apply_action};
use crate::image::Image;
use crate::image::decode::{DecodeLimits, DecodeOptions, Decoder};
use crate::policy::{self, Magnitude, Op, OpStep, OpsProfile, SubPolicy};
use crate::random::{Purpose, SampleRng};

const PROFILES: [OpsProfile; 3] =
    [OpsProfile::Fastaa, OpsProfile::Torchvision, OpsProfile::TrivialWide];

/// Arguments of `augment`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["op", "policy"])))]
pub(crate) struct AugmentArgs {
    /// Image to start from: PNG, JPEG or PNM
    image: PathBuf,
    /// Operation to apply, such as Rotate
    #[arg(long, value_name = "NAME")]
    op: Option<String>,
    /// How strong, from 0 to 1; what it means is up to the profile
    #[arg(
        long,
        value_name = "λ",
        value_parser = parse_magnitude,
        allow_negative_numbers = true,
        conflicts_with = "policy"
    )]
    magnitude: Option<f64>,
    /// Flip the operation's sign
    #[arg(long, conflicts_with = "policy")]
    mirror: bool,
    /// What the magnitude means [default: fastaa]; a policy says it itself
    #[arg(long, value_parser = profile_parser(), conflicts_with = "policy")]
    profile: Option<OpsProfile>,
    /// Policy to draw operations from: a policy file, or a built-in policy's name
    #[arg(long, value_name = "REF")]
    policy: Option<String>,
    /// Seed of the policy's draw, or of the place of --op Cutout
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// PNG file to write
    #[arg(short, long, value_name = "OUT.png")]
    output: PathBuf,
}

fn parse_magnitude(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(lambda) if (0.0..=1.0).contains(&lambda) => Ok(lambda),
        Ok(_) => Err("a magnitude lies in 0 to 1".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn profile_parser() -> impl TypedValueParser<Value = OpsProfile> {
    PossibleValuesParser::new(PROFILES.map(OpsProfile::name))
        .map(|name| PROFILES.into_iter().find(|profile| profile.name() == name).unwrap_or_default())
}

pub(crate) fn run(context: &Context, args: AugmentArgs) -> Result<(), CtlError> {
    check_output_name(&args.output)?;
    let prepared = match (&args.op, &args.policy) {
        (Some(name), _) => single_op(name, &args)?,
        (None, Some(reference)) => PreparedPolicy::new(&policy::load_reference(reference)?),
        (None, None) => return Err(usage("nothing to apply", "give --op or --policy")),
    };
    let mut image = load_image(&args.image)?;
    let profile = prepared.ops_profile();
    let mut drawn = Vec::new();
    let mut rng = SampleRng::new(args.seed, 0, 0, Purpose::Policy);
    prepared.draw_into(&mut rng, &mut drawn);
    if args.op.is_some() {
        for op in &mut drawn {
            op.negative = args.mirror;
        }
    }
    let mut scratch = Scratch::default();
    let mut applied = Vec::new();
    for op in drawn {
        let action = op.action(profile, image.width, image.height);
        apply_action(&mut image, &mut scratch, &action);
        applied.push((op, action));
    }
    write_png(&args.output, &image)?;
    report(context, &args, profile, &image, &applied)
}

/// The policy that always applies `--op` at `--magnitude`.
fn single_op(name: &str, args: &AugmentArgs) -> Result<PreparedPolicy, CtlError> {
    let op = Op::from_name(name).ok_or_else(|| unknown_op(name))?;
    let profile = args.profile.unwrap_or_default();
    let lambda = match args.magnitude {
        Some(lambda) => lambda,
        None if op.has_magnitude() => {
            return Err(usage(format!("{name} needs a magnitude"), "add --magnitude 0.5"));
        }
        None => 0.0,
    };
    if args.mirror && !profile.has_random_sign(op) {
        return Err(usage(
            format!("{name} has no sign to mirror in profile {}", profile.name()),
            "leave --mirror out",
        ));
    }
    let step = OpStep { op, probability: 1.0, magnitude: Magnitude::Fixed(lambda) };
    let sub_policy = SubPolicy { weight: 1.0, ops: vec![step] };
    Ok(PreparedPolicy::from_parts(profile, 1, &[sub_policy]))
}

fn usage(message: impl Into<String>, hint: impl Into<String>) -> CtlError {
    CtlError::Usage { message: message.into(), hint: hint.into() }
}

fn failed(message: impl Into<String>, hint: impl Into<String>) -> CtlError {
    CtlError::Failed { message: message.into(), hint: hint.into() }
}

fn unknown_op(name: &str) -> CtlError {
    let likeness = |op: &Op| strsim::jaro_winkler(&op.name().to_lowercase(), &name.to_lowercase());
    let nearest = Op::ALL
        .into_iter()
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
        .map_or("Rotate", Op::name);
    let all = Op::ALL.map(Op::name).join(", ");
    usage(
        format!("there is no operation '{name}'"),
        format!("did you mean {nearest}? The operations are {all}"),
    )
}

fn check_output_name(path: &Path) -> Result<(), CtlError> {
    match path.extension() {
        Some(extension) if !extension.eq_ignore_ascii_case("png") => Err(usage(
            format!("{}: only PNG is written", path.display()),
            "give the output a name that ends in .png",
        )),
        _ => Ok(()),
    }
}

/// Reads an image file: gray stays gray, all else becomes RGB.
pub(crate) fn load_image(path: &Path) -> Result<Image, CtlError> {
    let refuse = |error: &dyn std::fmt::Display| {
        failed(
            format!("cannot read image {}: {error}", path.display()),
            "give a readable JPEG, PNG, WebP, BMP or PNM file",
        )
    };
    let bytes = std::fs::read(path).map_err(|error| refuse(&error))?;
    let mut decoder = Decoder::default();
    let mut options = DecodeOptions { channels: 3, turn: false, limits: DecodeLimits::default() };
    let is_gray = decoder.open(&bytes, options).map_err(|error| refuse(&error))?.is_gray();
    options.channels = if is_gray { 1 } else { 3 };
    let mut image = Image::default();
    let decoded = decoder.open(&bytes, options).and_then(|mut opened| opened.decode(&mut image));
    decoded.map_err(|error| refuse(&error))?;
    Ok(image)
}

/// Writes a PNG file: whole, or not at all.
pub(crate) fn write_png(path: &Path, image: &Image) -> Result<(), CtlError> {
    let refuse = |error: &dyn std::fmt::Display| {
        failed(
            format!("cannot write {}: {error}", path.display()),
            "give --output a path in a directory that you can write to",
        )
    };
    output::replace_file(path, |file| encode_png(file, image)).map_err(|error| refuse(&error))
}

fn encode_png(file: &File, image: &Image) -> io::Result<()> {
    let mut file = BufWriter::new(file);
    let side = |size: usize| u32::try_from(size).map_err(io::Error::other);
    let (width, height) = (side(image.width)?, side(image.height)?);
    let color = if image.channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
    PngEncoder::new(&mut file)
        .write_image(&image.data, width, height, color)
        .map_err(io::Error::other)?;
    file.flush()
}

fn report(
    context: &Context,
    args: &AugmentArgs,
    profile: OpsProfile,
    image: &Image,
    applied: &[(DrawnOp, Action)],
) -> Result<(), CtlError> {
    let mode = if image.channels == 1 { "gray" } else { "RGB" };
    if context.json {
        let applied: Vec<_> = applied
            .iter()
            .map(|(op, action)| {
                serde_json::json!({
                    "op": op.op.name(),
                    "magnitude": op.op.has_magnitude().then_some(op.lambda),
                    "negative": op.negative,
                    "effect": effect(action),
                })
            })
            .collect();
        return output::print_json(&serde_json::json!({
            "image": args.image,
            "output": args.output,
            "width": image.width,
            "height": image.height,
            "mode": mode,
            "policy": args.policy,
            "profile": profile.name(),
            "seed": args.seed,
            "applied": applied,
        }));
    }
    let mut text = String::new();
    for (op, action) in applied {
        let _ = writeln!(text, "{}: {}", op.op.name(), effect(action));
    }
    if applied.is_empty() {
        text.push_str("no operation: the image is unchanged\n");
    }
    let (width, height) = (image.width, image.height);
    let _ = write!(text, "wrote {} ({width}×{height} {mode})", args.output.display());
    output::print(&text)
}

/// What an action does, in words and physical units.
fn effect(action: &Action) -> String {
    match action {
        Action::Identity => "nothing".to_owned(),
        Action::Affine([_, slope_x, shift_x, slope_y, _, shift_y]) => {
            if *slope_x != 0.0 {
                format!("shear rows by {slope_x:.4}")
            } else if *slope_y != 0.0 {
                format!("shear columns by {slope_y:.4}")
            } else {
                // The map is from output to source: content moves the other way.
                format!("move by ({:.2}, {:.2}) pixels", 0.0 - shift_x, 0.0 - shift_y)
            }
        }
        Action::Rotate(degrees) => format!("turn by {degrees:.3}° counter-clockwise"),
        Action::AutoContrast => "stretch the contrast of each channel".to_owned(),
        Action::Invert => "invert".to_owned(),
        Action::Equalize => "equalize the histogram of each channel".to_owned(),
        Action::Solarize(threshold) => format!("invert values from {threshold:.2} up"),
        Action::Posterize(bits) => format!("keep {bits} bits"),
        Action::Contrast(factor) => format!("contrast × {factor:.4}"),
        Action::Color(factor) => format!("colour × {factor:.4}"),
        Action::Brightness(factor) => format!("brightness × {factor:.4}"),
        Action::Sharpness(factor) => format!("sharpness × {factor:.4}"),
        Action::Cutout(area) => {
            format!("fill columns {}..{}, rows {}..{}", area.x0, area.x1, area.y0, area.y1)
        }
    }
}
