//! The built-in policies, and reading a policy by reference without a store.
//!
//! Owns the names of the built-ins and what they contain. Never reads the store (`store` does).
//!
//! Operations that ignore their magnitude carry λ = 0 in every built-in.
//!
//! *Source*: torchvision's `AutoAugment` (10 bins, so bin b is λ = b/9), `RandAugment` (31 bins,
//! λ = m/30) and `TrivialAugmentWide` (any of 31 bins) in `transforms/autoaugment.py`.

use std::path::Path;

use serde_json::{Map, Value};

use super::builtin_tables::{self, Table};
use super::error::suggestion;
use super::{Magnitude, Op, OpStep, OpsProfile, Policy, PolicyError, SubPolicy, format};
use crate::limits;

/// Names of the built-in policies as people write them.
pub const BUILTIN_NAMES: [&str; 6] = [
    "none",
    "trivial-wide",
    "randaugment(n,m)",
    "autoaugment-cifar10",
    "autoaugment-imagenet",
    "autoaugment-svhn",
];

/// Largest magnitude of `randaugment(n,m)`: torchvision's default of 31 bins.
const RANDAUGMENT_MAGNITUDE_MAX: u32 = 30;

/// The operations of RandAugment and TrivialAugment besides Identity, in torchvision's order.
const RAND_OPS: [Op; 13] = [
    Op::ShearX,
    Op::ShearY,
    Op::TranslateX,
    Op::TranslateY,
    Op::Rotate,
    Op::Brightness,
    Op::Color,
    Op::Contrast,
    Op::Sharpness,
    Op::Posterize,
    Op::Solarize,
    Op::AutoContrast,
    Op::Equalize,
];

/// No augmentation: one empty sub-policy. Version 0 of every dataset's policy.
pub fn none() -> Policy {
    let identity = SubPolicy { weight: 1.0, ops: Vec::new() };
    build("none", OpsProfile::Fastaa, 1, vec![identity], "no augmentation")
}

/// TrivialAugment-wide: one of 14 operations (Identity among them), at any strength.
pub fn trivial_wide() -> Policy {
    let sub_policies = single_op_sub_policies(Magnitude::Range(0.0, 1.0));
    build("trivial-wide", OpsProfile::TrivialWide, 1, sub_policies, "TrivialAugment, 2103.10158")
}

/// RandAugment: `n_ops` of 14 operations (Identity among them), at strength `magnitude` of 30.
///
/// # Errors
/// `n_ops` is 0 or above [`limits::POLICY_DRAWS_MAX`], or `magnitude` is above 30.
pub fn randaugment(n_ops: u32, magnitude: u32) -> Result<Policy, PolicyError> {
    let name = format!("randaugment({n_ops},{magnitude})");
    let invalid = |problem| PolicyError::Invalid { name: name.clone(), problem };
    if n_ops == 0 || n_ops > limits::POLICY_DRAWS_MAX {
        let max = limits::POLICY_DRAWS_MAX;
        return Err(invalid(format!("n is {n_ops}, but must be from 1 to {max}")));
    }
    if magnitude > RANDAUGMENT_MAGNITUDE_MAX {
        let max = RANDAUGMENT_MAGNITUDE_MAX;
        return Err(invalid(format!("m is {magnitude}, but must be from 0 to {max}")));
    }
    let level = match magnitude {
        // 20/30 and AutoAugment's 6/9 are one number, but torchvision's two tables differ there in
        // the last bit; the number itself means AutoAugment's, and this its neighbour.
        20 => 20.0 / 30.0 + 1e-12,
        _ => f64::from(magnitude) / f64::from(RANDAUGMENT_MAGNITUDE_MAX),
    };
    let sub_policies = single_op_sub_policies(Magnitude::Fixed(level));
    Ok(build(&name, OpsProfile::Torchvision, n_ops, sub_policies, "RandAugment, 1909.13719"))
}

/// Identity, and each of [`RAND_OPS`] at that magnitude, all alike in weight.
fn single_op_sub_policies(magnitude: Magnitude) -> Vec<SubPolicy> {
    let single = |op: Op| {
        let magnitude = if op.has_magnitude() { magnitude } else { Magnitude::Fixed(0.0) };
        SubPolicy { weight: 1.0, ops: vec![OpStep { op, probability: 1.0, magnitude }] }
    };
    let identity = SubPolicy { weight: 1.0, ops: Vec::new() };
    std::iter::once(identity).chain(RAND_OPS.into_iter().map(single)).collect()
}

fn autoaugment(name: &str, table: &Table) -> Policy {
    let sub_policies = table
        .iter()
        .map(|row| {
            let ops = row
                .iter()
                .map(|&(op, probability, bin)| {
                    let magnitude = Magnitude::Fixed(f64::from(bin.unwrap_or(0)) / 9.0);
                    OpStep { op, probability, magnitude }
                })
                .collect();
            SubPolicy { weight: 1.0, ops }
        })
        .collect();
    build(name, OpsProfile::Torchvision, 1, sub_policies, "AutoAugment, 1805.09501")
}

fn build(
    name: &str,
    profile: OpsProfile,
    draws: u32,
    sub_policies: Vec<SubPolicy>,
    source: &str,
) -> Policy {
    let provenance = Map::from_iter([
        ("kind".to_owned(), Value::from("built-in")),
        ("source".to_owned(), Value::from(source)),
    ]);
    Policy::new(name, profile, draws, sub_policies, provenance)
        .expect("the tables above and checked arguments keep every invariant")
}

/// The built-in policy of that name, or `None` if no built-in is named so.
///
/// # Errors
/// `randaugment` without two fit numbers in brackets.
pub fn builtin(name: &str) -> Result<Option<Policy>, PolicyError> {
    Ok(Some(match name.trim() {
        "none" => none(),
        "trivial-wide" => trivial_wide(),
        "autoaugment-cifar10" => autoaugment("autoaugment-cifar10", &builtin_tables::CIFAR10),
        "autoaugment-imagenet" => autoaugment("autoaugment-imagenet", &builtin_tables::IMAGENET),
        "autoaugment-svhn" => autoaugment("autoaugment-svhn", &builtin_tables::SVHN),
        other => match other.strip_prefix("randaugment") {
            Some(arguments) => return randaugment_from_text(other, arguments).map(Some),
            None => return Ok(None),
        },
    }))
}

/// `arguments` is `(n,m)`, with spaces where people put them.
fn randaugment_from_text(reference: &str, arguments: &str) -> Result<Policy, PolicyError> {
    let numbers = || {
        let inner = arguments.trim().strip_prefix('(')?.strip_suffix(')')?;
        let (n_ops, magnitude) = inner.split_once(',')?;
        Some((n_ops.trim().parse().ok()?, magnitude.trim().parse().ok()?))
    };
    match numbers() {
        Some((n_ops, magnitude)) => randaugment(n_ops, magnitude),
        None => Err(PolicyError::malformed(format!(
            "policy '{reference}' is not of the form randaugment(n,m) with whole numbers n from \
             1 to {} and m from 0 to {RANDAUGMENT_MAGNITUDE_MAX}; torchvision's default is \
             randaugment(2,9)",
            limits::POLICY_DRAWS_MAX
        ))),
    }
}

/// Whether a reference means a file: it holds a `/`, ends in `.json`, or exists.
pub fn is_path(reference: &str) -> bool {
    looks_like_path(reference) || Path::new(reference).exists()
}

/// Whether a reference can only mean a file.
pub(super) fn looks_like_path(reference: &str) -> bool {
    let extension = Path::new(reference).extension();
    reference.contains('/') || extension.is_some_and(|ext| ext.eq_ignore_ascii_case("json"))
}

/// The policy of a built-in's name or a file's path. A built-in goes before a file of that name:
/// write `./none` for the file.
///
/// # Errors
/// An unknown name, with the nearest known one; a file that holds no valid policy.
pub fn load_reference(reference: &str) -> Result<Policy, PolicyError> {
    let reference = reference.trim();
    if reference.is_empty() {
        return Err(PolicyError::malformed(format!(
            "an empty policy reference; {}",
            suggestion("", &BUILTIN_NAMES)
        )));
    }
    if let Some(policy) = builtin(reference)? {
        return Ok(policy);
    }
    if is_path(reference) {
        return format::load_file(Path::new(reference));
    }
    if reference == "active" || reference.contains('@') {
        return Err(PolicyError::not_found(format!(
            "policy '{reference}' is in a daemon's store, not among the built-ins and files; ask \
             the daemon, or name a built-in or a file"
        )));
    }
    Err(PolicyError::not_found(format!(
        "no policy is named '{reference}', and there is no such file; {}",
        suggestion(reference, &BUILTIN_NAMES)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_randaugment_mean_the_same_policy() {
        let policy = load_reference("randaugment(2,9)").unwrap();
        assert_eq!((policy.name(), policy.draws()), ("randaugment(2,9)", 2));
        assert_eq!(policy.sub_policies().len(), 14);
        for spelling in [" randaugment(2, 9) ", "randaugment ( 2 , 9 )"] {
            assert_eq!(load_reference(spelling).unwrap(), policy);
        }
    }

    #[test]
    fn bad_references_say_what_would_be_right() {
        for (reference, expected) in [
            ("randaugment", "is not of the form randaugment(n,m)"),
            ("randaugment(2)", "is not of the form randaugment(n,m)"),
            ("randaugment(2,9", "is not of the form randaugment(n,m)"),
            ("randaugment(2,-1)", "is not of the form randaugment(n,m)"),
            ("randaugment(0,9)", "n is 0, but must be from 1 to 16"),
            ("randaugment(17,9)", "n is 17, but must be from 1 to 16"),
            ("randaugment(2,31)", "m is 31, but must be from 0 to 30"),
            ("trivialwide", "did you mean 'trivial-wide'?"),
            ("autoaugment-cifar", "did you mean 'autoaugment-cifar10'?"),
            ("xyz", "there are: none, trivial-wide, randaugment(n,m)"),
            ("", "an empty policy reference"),
            ("active", "is in a daemon's store"),
            ("mnist@3", "is in a daemon's store"),
            ("no/such/file.json", "no/such/file.json: No such file"),
            ("nofile.JSON", "nofile.JSON: No such file"),
        ] {
            let error = load_reference(reference).unwrap_err().to_string();
            assert!(error.contains(expected), "'{reference}': '{error}' lacks '{expected}'");
        }
    }

    #[test]
    fn none_is_one_identity_and_every_builtin_has_an_id_of_its_own() {
        assert_eq!(none().sub_policies(), [SubPolicy { weight: 1.0, ops: vec![] }]);
        let names = BUILTIN_NAMES.map(|name| name.replace("(n,m)", "(1,30)"));
        let ids: std::collections::HashSet<_> =
            names.iter().map(|name| load_reference(name).unwrap().id()).collect();
        assert_eq!(ids.len(), BUILTIN_NAMES.len());
    }
}
