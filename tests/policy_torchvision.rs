//! The built-in policies against the installed torchvision, and ids against an independent
//! implementation of the documented bytes.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a helper of a test is a test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use fastaa::policy::{self, Magnitude, OpsProfile, Policy};
use serde_json::Value;

fn python() -> PathBuf {
    if let Some(python) = std::env::var_os("FASTAA_PYTHON") {
        return python.into();
    }
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    if local.exists() { local } else { "python3".into() }
}

/// What a Python program prints, as JSON; `None` (with a note) where it cannot import a module.
fn ask_python(program: &str, argument: &str) -> Option<Value> {
    let output = match Command::new(python()).args(["-c", program, argument]).output() {
        Ok(output) => output,
        Err(error) => {
            eprintln!("skipped: {} does not start: {error}", python().display());
            return None;
        }
    };
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("ModuleNotFoundError") {
        eprintln!("skipped: {}", stderr.lines().last().unwrap_or_default());
        return None;
    }
    assert!(output.status.success(), "{stderr}");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

const TABLES: &str = "
import json
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandAugment, TrivialAugmentWide
ra, ta = RandAugment(), TrivialAugmentWide()
def space(s):
    return {name: magnitudes.ndim > 0 for name, (magnitudes, signed) in s.items()}
print(json.dumps({
    'autoaugment': {p.value: AutoAugment(p).policies for p in AutoAugmentPolicy},
    'randaugment': space(ra._augmentation_space(ra.num_magnitude_bins, (32, 32))),
    'randaugment_defaults': [ra.num_ops, ra.magnitude, ra.num_magnitude_bins],
    'trivial': space(ta._augmentation_space(ta.num_magnitude_bins)),
}))
";

#[test]
fn builtin_policies_are_torchvisions() {
    let Some(tables) = ask_python(TABLES, "") else { return };
    for (name, table) in tables["autoaugment"].as_object().unwrap() {
        let policy = policy::load_reference(&format!("autoaugment-{name}")).unwrap();
        assert_eq!((policy.ops_profile(), policy.draws()), (OpsProfile::Torchvision, 1));
        let table = table.as_array().unwrap();
        assert_eq!(policy.sub_policies().len(), table.len());
        for (sub_policy, row) in policy.sub_policies().iter().zip(table) {
            assert_eq!(sub_policy.weight.to_bits(), 1.0_f64.to_bits());
            let steps: Vec<Value> = sub_policy
                .ops
                .iter()
                .map(|step| {
                    let Magnitude::Fixed(level) = step.magnitude else { panic!("{step:?}") };
                    let bin = level * 9.0;
                    assert!((bin - bin.round()).abs() < 1e-12, "{bin} is no bin of torchvision");
                    let bin = step.op.has_magnitude().then_some(bin.round());
                    serde_json::json!([step.op.name(), step.probability, bin])
                })
                .collect();
            assert_eq!(as_floats(Value::from(steps)), as_floats(row.clone()), "{name}");
        }
    }
    assert_eq!(tables["randaugment_defaults"], serde_json::json!([2, 9, 31]));
    let randaugment = policy::load_reference("randaugment(2,9)").unwrap();
    assert_eq!((randaugment.ops_profile(), randaugment.draws()), (OpsProfile::Torchvision, 2));
    check_space(&randaugment, &tables["randaugment"], Magnitude::Fixed(9.0 / 30.0));
    let trivial = policy::load_reference("trivial-wide").unwrap();
    assert_eq!((trivial.ops_profile(), trivial.draws()), (OpsProfile::TrivialWide, 1));
    check_space(&trivial, &tables["trivial"], Magnitude::Range(0.0, 1.0));
}

/// Bins as floats, so that `6` and `6.0` compare equal.
fn as_floats(value: Value) -> Value {
    match value {
        Value::Array(list) => list.into_iter().map(as_floats).collect(),
        Value::Number(number) => Value::from(number.as_f64().unwrap()),
        other => other,
    }
}

/// Each operation of the space once, alone, always applied, at that magnitude if it has one.
fn check_space(policy: &Policy, space: &Value, expected: Magnitude) {
    let found: BTreeMap<&str, bool> = policy
        .sub_policies()
        .iter()
        .map(|sub_policy| {
            assert_eq!(sub_policy.weight.to_bits(), 1.0_f64.to_bits());
            let [step] = sub_policy.ops.as_slice() else { return ("Identity", false) };
            assert_eq!(step.probability.to_bits(), 1.0_f64.to_bits());
            let has_magnitude = step.op.has_magnitude();
            let expected = if has_magnitude { expected } else { Magnitude::Fixed(0.0) };
            assert_eq!(step.magnitude, expected, "{}", step.op.name());
            (step.op.name(), has_magnitude)
        })
        .collect();
    assert_eq!(policy.sub_policies().len(), found.len());
    assert_eq!(serde_json::json!(found), *space);
}

const IDS: &str = "
import hashlib, json, struct, sys
OPS = ('ShearX ShearY TranslateX TranslateY Rotate AutoContrast Invert Equalize Solarize '
       'Posterize Contrast Color Brightness Sharpness Cutout').split()
def policy_id(p):
    out = b'fastaa-policy-1\\0'
    out += bytes([['fastaa', 'torchvision', 'trivial-wide'].index(p['ops_profile'])])
    out += struct.pack('<II', p['draws'], len(p['sub_policies']))
    for s in p['sub_policies']:
        out += struct.pack('<dI', s['weight'], len(s['ops']))
        for name, probability, level in s['ops']:
            out += struct.pack('<Bd', OPS.index(name), probability)
            if isinstance(level, list):
                out += struct.pack('<Bdd', 1, *level)
            else:
                out += struct.pack('<Bd', 0, level)
    return hashlib.sha256(out).hexdigest()[:32]
print(json.dumps(policy_id(json.loads(sys.argv[1]))))
";

#[test]
fn python_computes_the_same_ids_from_the_json_form() {
    for name in ["none", "trivial-wide", "randaugment(3,7)", "autoaugment-cifar10"] {
        let policy = policy::load_reference(name).unwrap();
        let text = policy::to_text(&policy);
        let Some(id) = ask_python(IDS, &text) else { return };
        assert_eq!(id, policy.id().to_string(), "{name}");
    }
}
