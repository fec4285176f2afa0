//! Policy files: both forms are read and written without loss, and every bad one is refused with
//! its place and the cure.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a helper of a test is a test")]

use std::path::{Path, PathBuf};

use fastaa::limits;
use fastaa::policy::{self, Magnitude, Op, OpStep, OpsProfile, Policy, SubPolicy};
use proptest::prelude::*;
use serde_json::{Map, json};

fn check_refused(text: &str, expected: &str) {
    let error = policy::parse_text(text, "bad.json").unwrap_err().to_string();
    assert!(error.starts_with("policy 'bad.json': "), "{error}");
    assert!(error.contains(expected), "'{text}': '{error}' lacks '{expected}'");
}

#[test]
fn the_bare_list_is_imported_as_it_is() {
    for text in [
        r#"[[["Contrast",0.83,0.5],["TranslateX",0.42,0.39]],[["Invert",0,1]],[["Invert",0,1]]]"#,
        "p = [[[\"Contrast\",0.83,0.5],[\"TranslateX\",0.42,0.39]],\n  [[\"Invert\",0,1]],\
         [[\"Invert\",0,1]]]\n",
        "\u{feff} [[[\"Contrast\",8.3e-1,0.5],[\"TranslateX\",0.42,0.39]],[[\"Invert\",0.0,1.0]],\
         [[\"Invert\",0,1]]]",
    ] {
        let policy = policy::parse_text(text, "import").unwrap();
        assert_eq!(policy.name(), "import");
        assert_eq!((policy.ops_profile(), policy.draws()), (OpsProfile::Fastaa, 1));
        let step =
            |op, probability, level| OpStep { op, probability, magnitude: Magnitude::Fixed(level) };
        let invert = SubPolicy { weight: 1.0, ops: vec![step(Op::Invert, 0.0, 1.0)] };
        let first = vec![step(Op::Contrast, 0.83, 0.5), step(Op::TranslateX, 0.42, 0.39)];
        let expected = [SubPolicy { weight: 1.0, ops: first }, invert.clone(), invert];
        assert_eq!(policy.sub_policies(), expected, "duplicates are kept, order is kept");
    }
}

#[test]
fn the_json_form_fills_in_what_is_not_there() {
    let policy = policy::parse_text(r#"{"sub_policies": [{"ops": []}]}"#, "short").unwrap();
    assert_eq!((policy.name(), policy.draws()), ("short", 1));
    assert_eq!(policy.ops_profile(), OpsProfile::Fastaa);
    assert_eq!(policy.sub_policies(), [SubPolicy { weight: 1.0, ops: vec![] }]);
    let full = json!({
        "name": "full", "ops_profile": "trivial-wide", "draws": 2,
        "sub_policies": [{"weight": 2, "ops": [["Rotate", 0.5, [0.25, 1]]]}],
        "provenance": {"by": "hand", "n": [1, 2.5, null]},
    });
    let policy = policy::parse_text(&full.to_string(), "unused").unwrap();
    assert_eq!((policy.name(), policy.draws()), ("full", 2));
    assert_eq!(policy.ops_profile(), OpsProfile::TrivialWide);
    assert_eq!(policy.provenance()["n"], json!([1, 2.5, null]));
    assert_eq!(policy.sub_policies()[0].ops[0].magnitude, Magnitude::Range(0.25, 1.0));
}

#[test]
fn bad_values_are_refused_with_their_place() {
    let at = "sub-policy 2, op 1";
    for (step, expected) in [
        (r#"["Rotat",0.5,0.5]"#, "unknown operation 'Rotat'; did you mean 'Rotate'?"),
        (r#"["Identity",0.5,0.5]"#, "identity is an empty list of operations"),
        (r#"["Zzz",0.5,0.5]"#, "unknown operation 'Zzz'; there are: ShearX, "),
        (r#"["Rotate",1.5,0.5]"#, "('Rotate'): probability 1.5 is not in [0, 1]"),
        (r#"["Rotate",-0.5,0.5]"#, "('Rotate'): probability -0.5 is not in [0, 1]"),
        (r#"["Rotate","nan",0.5]"#, "probability is \"nan\", not a number from 0 to 1"),
        (r#"["Rotate",null,0.5]"#, "probability is null, not a number"),
        (r#"["Rotate",true,0.5]"#, "probability is true, not a number"),
        (r#"["Rotate",0.5,"0.5"]"#, "magnitude is \"0.5\", not a number from 0 to 1 or a range"),
        (r#"["Rotate",0.5,null]"#, "magnitude is null, not a number"),
        (r#"["Rotate",0.5,2]"#, "('Rotate'): magnitude 2 is not in [0, 1]"),
        (r#"["Rotate",0.5,[0.5]]"#, "magnitude is a list, not a number"),
        (r#"["Rotate",0.5,[0.9,0.1]]"#, "range [0.9, 0.1] runs backwards"),
        (r#"["Rotate",0.5,[0,"x"]]"#, "magnitude is a list, not a number"),
        (r#"["Rotate",0.5]"#, "has 2 elements, but an operation is [name, probability, magn"),
        (r#"["Rotate",0.5,0.5,0.5]"#, "has 4 elements"),
        (r#"[0.5,"Rotate",0.5]"#, "found a number as its name"),
        (r#"{"op":"Rotate"}"#, "found an object, but an operation is"),
    ] {
        check_refused(&format!(r#"[[["Invert",1,0]],[{step}]]"#), at);
        check_refused(&format!(r#"[[["Invert",1,0]],[{step}]]"#), expected);
        let json =
            format!(r#"{{"name":"bad.json","sub_policies":[{{"ops":[]}},{{"ops":[{step}]}}]}}"#);
        check_refused(&json, at);
        check_refused(&json, expected);
    }
}

#[test]
fn bad_shapes_are_refused_with_their_place() {
    for (text, expected) in [
        ("", "empty; a policy file holds"),
        (" \n", "empty; a policy file holds"),
        ("[]", "no sub-policies, but there must be at least one"),
        (r#"{"sub_policies":[]}"#, "no sub-policies, but there must be at least one"),
        ("{}", "there is no 'sub_policies'"),
        ("[[[", "not JSON: EOF while parsing"),
        ("[NaN]", "not JSON: "),
        (r#"[[["Rotate",NaN,0.5]]]"#, "not JSON: "),
        (r#"[[["Rotate",1e999,0.5]]]"#, "not JSON: number out of range"),
        ("42", "found a number, but a policy is"),
        ("\"none\"", "found a string, but a policy is"),
        (r#"["Rotate",0.5,0.5]"#, "sub-policy 1: found a string, but a sub-policy's operations"),
        (r#"[["Rotate",0.5,0.5]]"#, "sub-policy 1 starts with 'Rotate', so a level of brackets"),
        (r#"[[[["Rotate",0.5,0.5]]]]"#, "sub-policy 1, op 1 has 1 elements"),
        (r#"{"sub_polices":[]}"#, "unknown key 'sub_polices'; did you mean 'sub_policies'?"),
        (
            r#"{"sub_policies":[{"ops":[],"wieght":1}]}"#,
            "sub-policy 1 has an unknown key 'wieght'; did you mean 'weight'?",
        ),
        (r#"{"sub_policies":[{"weight":1}]}"#, "sub-policy 1 has no 'ops'"),
        (r#"{"sub_policies":[[]]}"#, "sub-policy 1 is a list, but must be an object"),
        (r#"{"sub_policies":{}}"#, "'sub_policies' is an object, but must be a list"),
        (r#"{"sub_policies":[{"ops":[],"weight":-1}]}"#, "sub-policy 1: weight -1 is not a finite"),
        (r#"{"sub_policies":[{"ops":[],"weight":0}]}"#, "sub-policy 1: weight 0 is not a finite"),
        (r#"{"sub_policies":[{"ops":[],"weight":"1"}]}"#, "weight is \"1\", not a number above 0"),
        (r#"{"draws":0,"sub_policies":[{"ops":[]}]}"#, "draws is 0, but a sample gets 1 to 16"),
        (r#"{"draws":-1,"sub_policies":[{"ops":[]}]}"#, "'draws' is -1, but must be a whole"),
        (r#"{"draws":1.5,"sub_policies":[{"ops":[]}]}"#, "'draws' is 1.5, but must be a whole"),
        (r#"{"draws":5000000000,"sub_policies":[{"ops":[]}]}"#, "'draws' is 5000000000"),
        (
            r#"{"ops_profile":"fasta","sub_policies":[{"ops":[]}]}"#,
            "unknown ops_profile 'fasta'; did you mean 'fastaa'?",
        ),
        (r#"{"ops_profile":1,"sub_policies":[{"ops":[]}]}"#, "'ops_profile' is a number"),
        (r#"{"name":1,"sub_policies":[{"ops":[]}]}"#, "'name' is a number"),
        (r#"{"provenance":"me","sub_policies":[{"ops":[]}]}"#, "'provenance' is a string"),
    ] {
        check_refused(text, expected);
    }
    check_refused(&"[".repeat(100_000), "not JSON: recursion limit exceeded");
    let size = usize::try_from(limits::POLICY_FILE_BYTES_MAX).unwrap();
    check_refused(&" ".repeat(size + 1), "over the limit of 8388608 bytes");
}

#[test]
fn files_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let check = |name: &str, bytes: Option<&[u8]>, expected: &str| {
        let path = dir.path().join(name);
        if let Some(bytes) = bytes {
            std::fs::write(&path, bytes).unwrap();
        }
        let error = policy::load_file(&path).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(error.contains(expected), "'{error}' lacks '{expected}'");
    };
    check("missing.json", None, "No such file");
    check("", None, "not a regular file");
    check("empty.json", Some(b""), "empty; a policy file holds");
    check("latin1.json", Some(b"[[[\"\xe9"), "byte 4 is not UTF-8");
    check("bad.json", Some(br#"{"name":"x","draws":0,"sub_policies":[{"ops":[]}]}"#), "draws is 0");
    let huge = std::fs::File::create(dir.path().join("huge.json")).unwrap();
    huge.set_len(limits::POLICY_FILE_BYTES_MAX * 100).unwrap();
    check("huge.json", None, "over the limit of 8388608 bytes");

    let path = dir.path().join("good one.json");
    std::fs::write(&path, r#"[[["Rotate",0.5,0.5]]]"#).unwrap();
    assert_eq!(policy::load_reference(path.to_str().unwrap()).unwrap().name(), "good one");
}

/// Where the published policies are, or `None` with a note that the test is skipped.
fn published_dir() -> Option<PathBuf> {
    let shared = std::env::var_os("FASTAA_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let dir = shared.join("data/policies");
    if !dir.is_dir() {
        eprintln!("skipped: no published policies in {}", dir.display());
        return None;
    }
    Some(dir)
}

#[test]
fn the_published_policies_are_imported_whole() {
    let Some(dir) = published_dir() else { return };
    for (name, n_sub_policies) in
        [("fa_reduced_cifar10", 493), ("fa_resnet50_rimagenet", 498), ("fa_reduced_svhn", 497)]
    {
        let policy = policy::load_file(&dir.join(format!("{name}.json"))).unwrap();
        assert_eq!((policy.name(), policy.sub_policies().len()), (name, n_sub_policies));
        assert!(policy.sub_policies().iter().all(|sub_policy| sub_policy.ops.len() == 2));
        assert_round_trips(&policy);
        let list = policy::to_list_text(&policy).unwrap();
        assert_eq!(policy::parse_text(&list, name).unwrap(), policy);
        let assigned = policy::parse_text(&format!("p = {list}"), name).unwrap();
        assert_eq!(assigned.id(), policy.id());
    }
}

fn assert_round_trips(policy: &Policy) {
    for text in [policy::to_text(policy), policy::to_value(policy).to_string()] {
        let back = policy::parse_text(&text, "unused").unwrap();
        assert_eq!(&back, policy);
        assert_eq!(back.id(), policy.id());
    }
}

#[test]
fn builtins_round_trip_and_say_when_a_list_cannot_hold_them() {
    for name in ["none", "trivial-wide", "randaugment(2,9)", "autoaugment-svhn"] {
        assert_round_trips(&policy::load_reference(name).unwrap());
    }
    for (policy, expected) in [
        (policy::trivial_wide(), "cannot express the profile trivial-wide"),
        (one_step("draws", 2, 1.0, Magnitude::Fixed(0.5)), "cannot express 2 draws"),
        (one_step("weights", 1, 2.0, Magnitude::Fixed(0.5)), "weights other than 1"),
        (one_step("ranges", 1, 1.0, Magnitude::Range(0.5, 0.5)), "magnitude ranges"),
    ] {
        let error = policy::to_list_text(&policy).unwrap_err().to_string();
        assert!(error.contains(expected), "'{error}' lacks '{expected}'");
    }
}

fn one_step(name: &str, draws: u32, weight: f64, magnitude: Magnitude) -> Policy {
    let ops = vec![OpStep { op: Op::Rotate, probability: 0.5, magnitude }];
    let sub_policies = vec![SubPolicy { weight, ops }];
    Policy::new(name, OpsProfile::Fastaa, draws, sub_policies, Map::new()).unwrap()
}

fn any_policy() -> impl Strategy<Value = Policy> {
    let unit = || 0.0..=1.0_f64;
    let magnitude = prop_oneof![
        unit().prop_map(Magnitude::Fixed),
        (unit(), unit()).prop_map(|(a, b)| Magnitude::Range(a.min(b), a.max(b))),
    ];
    let step = (0..15_usize, unit(), magnitude).prop_map(|(op, probability, magnitude)| OpStep {
        op: Op::ALL[op],
        probability,
        magnitude,
    });
    let weight = prop_oneof![Just(1.0), 1e-300..1e300_f64];
    let sub_policy = (weight, prop::collection::vec(step, 0..4))
        .prop_map(|(weight, ops)| SubPolicy { weight, ops });
    let profile = prop_oneof![
        Just(OpsProfile::Fastaa),
        Just(OpsProfile::Torchvision),
        Just(OpsProfile::TrivialWide)
    ];
    let sub_policies = prop::collection::vec(sub_policy, 1..6);
    ("[ -~äλ\"]{1,30}[a-z]", profile, 1..=16_u32, sub_policies, any::<i64>()).prop_map(
        |(name, profile, draws, sub_policies, seed)| {
            let provenance = Map::from_iter([("seed".to_owned(), json!(seed))]);
            Policy::new(name, profile, draws, sub_policies, provenance).unwrap()
        },
    )
}

proptest! {
    #[test]
    fn any_policy_round_trips_bit_for_bit(policy in any_policy()) {
        assert_round_trips(&policy);
        if let Ok(list) = policy::to_list_text(&policy) {
            prop_assert_eq!(policy::parse_text(&list, "x").unwrap().id(), policy.id());
        }
    }

    #[test]
    fn any_text_is_a_policy_or_an_error(text in "[\\[\\]{}\",:0-9.a-zA-Z= -]{0,60}") {
        let _ = policy::parse_text(&text, "fuzz");
    }
}
