//! Policy files: the JSON form, and the bare list-of-lists form of the published archive.
//!
//! Owns parsing and writing. Every message names the file (or policy), the sub-policy and the
//! operation, counted from 1. Never decides what a valid policy is ([`Policy::new`] does).
//!
//! The JSON form:
//!
//! ```json
//! {
//!   "name": "mine",
//!   "ops_profile": "fastaa",
//!   "draws": 1,
//!   "sub_policies": [
//!     {"weight": 1.0, "ops": [["ShearX", 0.8, 0.25], ["Rotate", 0.5, [0.1, 0.6]]]}
//!   ],
//!   "provenance": {"any": "thing"}
//! }
//! ```
//!
//! Only `sub_policies` and each `ops` must be there; the name is then the file's, the profile
//! `fastaa`, draws 1, a weight 1. The bare form is `[[["ShearX", 0.8, 0.25], …], …]`, also with
//! `p = ` before it as in the archive's Python source: profile `fastaa`, draws 1, weights 1.
//! Sub-policies that occur twice are kept twice: they are drawn twice as often.
//!
//! *Limits*: [`limits::POLICY_FILE_BYTES_MAX`], and those of [`Policy::new`].

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::error::suggestion;
use super::{Magnitude, Op, OpStep, OpsProfile, Policy, PolicyError, SubPolicy};
use crate::limits;

const POLICY_KEYS: [&str; 5] = ["name", "ops_profile", "draws", "sub_policies", "provenance"];
const SUB_POLICY_KEYS: [&str; 2] = ["weight", "ops"];
const STEP_EXAMPLE: &str =
    "an operation is [name, probability, magnitude], for example [\"Rotate\", 0.5, 0.3]";

/// Reads a policy file in either form.
///
/// # Errors
/// The file cannot be read, is too large, is no regular file, or holds no valid policy.
pub fn load_file(path: &Path) -> Result<Policy, PolicyError> {
    let shown = path.display().to_string();
    let invalid = |problem: String| PolicyError::Invalid { name: shown.clone(), problem };
    let metadata = std::fs::metadata(path).map_err(|error| PolicyError::io(path, error))?;
    if !metadata.is_file() {
        return Err(invalid("not a regular file; give the path of a policy file".to_owned()));
    }
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(limits::POLICY_FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|error| PolicyError::io(path, error))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        invalid(format!("byte {offset} is not UTF-8 text; a policy file is JSON"))
    })?;
    parse_text(&text, &name_from_path(path)).map_err(|error| match error {
        PolicyError::Invalid { problem, .. } => invalid(problem),
        other => other,
    })
}

/// A policy's name for want of a better one: the file's, without its extension.
fn name_from_path(path: &Path) -> String {
    let stem = path.file_stem().map(|stem| stem.to_string_lossy()).unwrap_or_default();
    let mut name: String = stem.chars().filter(|char| !char.is_control()).collect();
    while name.len() > limits::NAME_BYTES_MAX {
        name.pop();
    }
    if name.trim().is_empty() { "unnamed".to_owned() } else { name }
}

/// Reads a policy from text in either form; `default_name` is its name if the text has none.
///
/// # Errors
/// Too long, not JSON, or not a valid policy.
pub fn parse_text(text: &str, default_name: &str) -> Result<Policy, PolicyError> {
    let invalid = |problem| PolicyError::Invalid { name: default_name.to_owned(), problem };
    if text.len() as u64 > limits::POLICY_FILE_BYTES_MAX {
        return Err(invalid(format!(
            "over the limit of {} bytes; a policy of 500 sub-policies has about 55,000",
            limits::POLICY_FILE_BYTES_MAX
        )));
    }
    let text = text.trim_start_matches('\u{feff}').trim();
    if text.is_empty() {
        return Err(invalid("empty; a policy file holds a JSON object or list".to_owned()));
    }
    let value: Value = serde_json::from_str(without_assignment(text)).map_err(|error| {
        invalid(format!("not JSON: {error}; write {{\"sub_policies\": […]}} or a list"))
    })?;
    from_value(&value, default_name)
}

/// `p = [...]` as in the archive's Python source: what stands after the equals sign.
fn without_assignment(text: &str) -> &str {
    match text.split_once('=') {
        Some((left, right)) => {
            let left = left.trim();
            let is_name = left.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                && left.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
            if is_name { right.trim_start() } else { text }
        }
        None => text,
    }
}

/// Reads a policy from parsed JSON in either form.
///
/// # Errors
/// Not a valid policy.
pub fn from_value(value: &Value, default_name: &str) -> Result<Policy, PolicyError> {
    let invalid = |problem| PolicyError::Invalid { name: default_name.to_owned(), problem };
    match value {
        Value::Array(list) => {
            let sub_policies = list
                .iter()
                .enumerate()
                .map(|(index, ops)| {
                    let place = format!("sub-policy {}", index + 1);
                    Ok(SubPolicy { weight: 1.0, ops: ops_from_value(ops, &place)? })
                })
                .collect::<Result<_, String>>()
                .map_err(invalid)?;
            Policy::new(default_name, OpsProfile::Fastaa, 1, sub_policies, Map::new())
        }
        Value::Object(object) => from_object(object, default_name),
        other => Err(invalid(format!(
            "found {}, but a policy is an object {{\"sub_policies\": […]}} or a list of lists",
            kind_of(other)
        ))),
    }
}

fn from_object(object: &Map<String, Value>, default_name: &str) -> Result<Policy, PolicyError> {
    let name = match object.get("name") {
        None => default_name,
        Some(Value::String(name)) => name,
        Some(other) => {
            let problem = format!("'name' is {}, but must be a string", kind_of(other));
            return Err(PolicyError::Invalid { name: default_name.to_owned(), problem });
        }
    };
    let invalid = |problem| PolicyError::Invalid { name: name.to_owned(), problem };
    check_keys(object, &POLICY_KEYS, "the policy").map_err(invalid)?;
    Policy::new(
        name,
        profile_from_value(object.get("ops_profile")).map_err(invalid)?,
        draws_from_value(object.get("draws")).map_err(invalid)?,
        sub_policies_from_value(object.get("sub_policies")).map_err(invalid)?,
        provenance_from_value(object.get("provenance")).map_err(invalid)?,
    )
}

fn provenance_from_value(value: Option<&Value>) -> Result<Map<String, Value>, String> {
    match value {
        None => Ok(Map::new()),
        Some(Value::Object(provenance)) => Ok(provenance.clone()),
        Some(other) => Err(format!("'provenance' is {}, but must be an object", kind_of(other))),
    }
}

fn check_keys(object: &Map<String, Value>, known: &[&str], place: &str) -> Result<(), String> {
    match object.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => Err(format!("{place} has an unknown key '{key}'; {}", suggestion(key, known))),
        None => Ok(()),
    }
}

fn profile_from_value(value: Option<&Value>) -> Result<OpsProfile, String> {
    let profiles = [OpsProfile::Fastaa, OpsProfile::Torchvision, OpsProfile::TrivialWide];
    let names = profiles.map(OpsProfile::name);
    match value {
        None => Ok(OpsProfile::default()),
        Some(Value::String(name)) => profiles
            .into_iter()
            .find(|profile| profile.name() == name)
            .ok_or_else(|| format!("unknown ops_profile '{name}'; {}", suggestion(name, &names))),
        Some(other) => Err(format!(
            "'ops_profile' is {}, but must be one of: {}",
            kind_of(other),
            names.join(", ")
        )),
    }
}

fn draws_from_value(value: Option<&Value>) -> Result<u32, String> {
    let Some(value) = value else { return Ok(1) };
    value.as_u64().and_then(|draws| u32::try_from(draws).ok()).ok_or_else(|| {
        format!(
            "'draws' is {}, but must be a whole number from 1 to {}",
            shown(value),
            limits::POLICY_DRAWS_MAX
        )
    })
}

fn sub_policies_from_value(value: Option<&Value>) -> Result<Vec<SubPolicy>, String> {
    let list = match value {
        Some(Value::Array(list)) => list,
        Some(other) => {
            return Err(format!("'sub_policies' is {}, but must be a list", kind_of(other)));
        }
        None => return Err("there is no 'sub_policies'; add the list of sub-policies".to_owned()),
    };
    list.iter()
        .enumerate()
        .map(|(index, value)| sub_policy_from_value(value, &format!("sub-policy {}", index + 1)))
        .collect()
}

fn sub_policy_from_value(value: &Value, place: &str) -> Result<SubPolicy, String> {
    let Value::Object(object) = value else {
        return Err(format!(
            "{place} is {}, but must be an object {{\"weight\": 1.0, \"ops\": […]}}",
            kind_of(value)
        ));
    };
    check_keys(object, &SUB_POLICY_KEYS, place)?;
    let weight = match object.get("weight") {
        None => 1.0,
        Some(weight) => number(weight)
            .ok_or_else(|| format!("{place}: weight is {}, not a number above 0", shown(weight)))?,
    };
    match object.get("ops") {
        Some(ops) => Ok(SubPolicy { weight, ops: ops_from_value(ops, place)? }),
        None => Err(format!("{place} has no 'ops'; write \"ops\": [] for the identity")),
    }
}

fn ops_from_value(value: &Value, place: &str) -> Result<Vec<OpStep>, String> {
    let Value::Array(list) = value else {
        return Err(format!(
            "{place}: found {}, but a sub-policy's operations are a list; {STEP_EXAMPLE}",
            kind_of(value)
        ));
    };
    if let [Value::String(name), ..] = list.as_slice() {
        return Err(format!(
            "{place} starts with '{name}', so a level of brackets is missing: a sub-policy is a \
             list of operations, and {STEP_EXAMPLE}"
        ));
    }
    list.iter()
        .enumerate()
        .map(|(index, value)| step_from_value(value, &format!("{place}, op {}", index + 1)))
        .collect()
}

fn step_from_value(value: &Value, place: &str) -> Result<OpStep, String> {
    let Value::Array(list) = value else {
        return Err(format!("{place}: found {}, but {STEP_EXAMPLE}", kind_of(value)));
    };
    let [name, probability, magnitude] = list.as_slice() else {
        return Err(format!("{place} has {} elements, but {STEP_EXAMPLE}", list.len()));
    };
    let Value::String(name) = name else {
        return Err(format!("{place}: found {} as its name, but {STEP_EXAMPLE}", kind_of(name)));
    };
    let op = op_from_name(name).map_err(|problem| format!("{place}: {problem}"))?;
    let wrong = |what: &str, value: &Value, right: &str| {
        format!("{place} ('{name}'): {what} is {}, not {right}", shown(value))
    };
    let probability = number(probability)
        .ok_or_else(|| wrong("probability", probability, "a number from 0 to 1"))?;
    let right = "a number from 0 to 1 or a range [lo, hi] of such numbers";
    let magnitude =
        magnitude_from_value(magnitude).ok_or_else(|| wrong("magnitude", magnitude, right))?;
    Ok(OpStep { op, probability, magnitude })
}

fn op_from_name(name: &str) -> Result<Op, String> {
    if let Some(op) = Op::from_name(name) {
        return Ok(op);
    }
    if name.eq_ignore_ascii_case("identity") {
        return Err(format!("'{name}' is no operation; identity is an empty list of operations"));
    }
    let names = Op::ALL.map(Op::name);
    Err(format!("unknown operation '{name}'; {}", suggestion(name, &names)))
}

fn magnitude_from_value(value: &Value) -> Option<Magnitude> {
    match value {
        Value::Array(list) => match list.as_slice() {
            [lo, hi] => Some(Magnitude::Range(number(lo)?, number(hi)?)),
            _ => None,
        },
        other => number(other).map(Magnitude::Fixed),
    }
}

fn number(value: &Value) -> Option<f64> {
    if value.is_number() { value.as_f64() } else { None }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value short enough for a message, else its kind.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(_) | Value::Object(_) => kind_of(value).to_owned(),
        Value::String(text) if text.chars().count() > 40 => kind_of(value).to_owned(),
        other => other.to_string(),
    }
}

/// The JSON form; [`from_value`] reads it back to an equal policy.
pub fn to_value(policy: &Policy) -> Value {
    let sub_policies: Vec<Value> = policy.sub_policies().iter().map(sub_policy_to_value).collect();
    json!({
        "name": policy.name(),
        "ops_profile": policy.ops_profile().name(),
        "draws": policy.draws(),
        "sub_policies": sub_policies,
        "provenance": policy.provenance(),
    })
}

/// The JSON form as text, one sub-policy per line, with a line feed at its end.
pub fn to_text(policy: &Policy) -> String {
    let lines: Vec<String> = policy
        .sub_policies()
        .iter()
        .map(|sub_policy| {
            let weight = Value::from(sub_policy.weight);
            format!("    {{\"weight\": {weight}, \"ops\": {}}}", ops_to_value(&sub_policy.ops))
        })
        .collect();
    format!(
        "{{\n  \"name\": {},\n  \"ops_profile\": \"{}\",\n  \"draws\": {},\n  \
         \"sub_policies\": [\n{}\n  ],\n  \"provenance\": {}\n}}\n",
        Value::from(policy.name()),
        policy.ops_profile().name(),
        policy.draws(),
        lines.join(",\n"),
        Value::from(policy.provenance().clone()),
    )
}

/// The bare list-of-lists form as text.
///
/// # Errors
/// That form cannot say it: another profile than `fastaa`, draws or weights other than 1, ranges.
pub fn to_list_text(policy: &Policy) -> Result<String, PolicyError> {
    let steps = || policy.sub_policies().iter().flat_map(|sub_policy| &sub_policy.ops);
    let obstacle = if policy.ops_profile() != OpsProfile::Fastaa {
        Some(format!("the profile {}", policy.ops_profile().name()))
    } else if policy.draws() != 1 {
        Some(format!("{} draws", policy.draws()))
    } else if policy.sub_policies().iter().any(|sub_policy| sub_policy.weight.to_bits() != ONE) {
        Some("weights other than 1".to_owned())
    } else if steps().any(|step| matches!(step.magnitude, Magnitude::Range(..))) {
        Some("magnitude ranges".to_owned())
    } else {
        None
    };
    if let Some(obstacle) = obstacle {
        let problem = format!("a list of lists cannot express {obstacle}; export it as JSON");
        return Err(PolicyError::Invalid { name: policy.name().to_owned(), problem });
    }
    let list: Vec<Value> =
        policy.sub_policies().iter().map(|sub_policy| ops_to_value(&sub_policy.ops)).collect();
    Ok(format!("{}\n", Value::from(list)))
}

const ONE: u64 = 1.0_f64.to_bits();

pub(super) fn sub_policy_to_value(sub_policy: &SubPolicy) -> Value {
    json!({"weight": sub_policy.weight, "ops": ops_to_value(&sub_policy.ops)})
}

pub(super) fn ops_to_value(ops: &[OpStep]) -> Value {
    ops.iter()
        .map(|step| {
            let magnitude = match step.magnitude {
                Magnitude::Fixed(level) => Value::from(level),
                Magnitude::Range(lo, hi) => json!([lo, hi]),
            };
            json!([step.op.name(), step.probability, magnitude])
        })
        .collect()
}
