//! The house rules that a machine can check: import direction, sizes, headers.

use std::fs;
use std::path::PathBuf;

/// What each module may import with `use crate::…` beside itself. Pixels flow dataset → image →
/// augment → pipeline → transport; nothing imports what is above it.
const ALLOWED_IMPORTS: &[(&str, &[&str])] = &[
    ("limits", &[]),
    ("random", &[]),
    ("gpu", &["limits"]),
    ("dataset", &["limits"]),
    ("image", &["limits"]),
    ("policy", &["limits"]),
    ("augment", &["image", "limits", "policy", "random"]),
    ("tensor", &["augment", "image"]),
    ("pipeline", &["augment", "dataset", "gpu", "image", "limits", "random", "tensor"]),
    ("idle", &["limits"]),
    ("transport", &["augment", "dataset", "gpu", "image", "limits", "pipeline"]),
    (
        "search",
        &["augment", "dataset", "image", "limits", "pipeline", "policy", "random", "tensor"],
    ),
    ("config", &["image", "limits", "pipeline"]),
    ("control", &["limits", "policy"]),
    // Of `search`, ctl has the shapes of the worker's events alone: they are plain data, and
    // fastaa-ctl compiles no other file of it.
    ("ctl", &["augment", "control", "dataset", "image", "limits", "policy", "random", "search"]),
    (
        "daemon",
        &[
            "augment",
            "config",
            "control",
            "dataset",
            "idle",
            "image",
            "limits",
            "pipeline",
            "policy",
            "random",
            "search",
            "transport",
        ],
    ),
];

/// Crates that stay behind named files or folders.
const CONFINED_CRATES: &[(&str, &[&str])] = &[
    ("bincode", &["src/transport/wire.rs"]),
    ("zmq", &["src/transport/server.rs", "src/transport/event_loop.rs", "src/transport/client.rs"]),
    ("nvml_wrapper", &["src/idle/nvml.rs"]),
    ("tch", &["src/search/torch/", "src/augment/tensor/", "src/pipeline/tensor_"]),
    ("cudarc", &["src/gpu/driver.rs"]),
    ("optimizer", &["src/search/proposer.rs"]),
    ("memmap2", &["src/dataset/map.rs", "src/transport/slab.rs", "src/transport/client.rs"]),
    // ctl's packer and its search without a daemon need signal handlers, and no second crate for
    // them.
    (
        "tokio",
        &[
            "src/control/server.rs",
            "src/ctl/dataset.rs",
            "src/ctl/search_offline.rs",
            "src/daemon/serve.rs",
        ],
    ),
];

const FILE_LINES_MAX: usize = 500;
const LINE_COLUMNS_MAX: usize = 100;

/// Longer files, each with its reason; the list may only shrink.
const LONG_FILES: &[(&str, &str)] = &[];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below a folder, as (path relative to the root, text).
fn rust_files(below: &str) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut folders = vec![root().join(below)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("the folder is there") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).expect("below the root");
                let text = fs::read_to_string(&path).expect("is text");
                files.push((name.display().to_string(), text));
            }
        }
    }
    assert!(!files.is_empty(), "no Rust files below {below}");
    files
}

/// The top-level module of a file below `src`.
fn module_of(name: &str) -> &str {
    let inner = name.trim_start_matches("src/");
    inner.split('/').next().unwrap_or(inner).trim_end_matches(".rs")
}

/// Names that follow `crate::` in code (not in comments).
fn crate_paths(text: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for line in text.lines() {
        let code = line.split("//").next().unwrap_or(line);
        for (at, _) in code.match_indices("crate::") {
            let rest = &code[at + "crate::".len()..];
            let names: Vec<&str> = match rest.strip_prefix('{') {
                Some(list) => list.trim_end_matches(['}', ';']).split(',').collect(),
                None => vec![rest],
            };
            for name in names {
                let name = name.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next();
                paths.extend(name.filter(|name| !name.is_empty()).map(str::to_owned));
            }
        }
    }
    paths
}

#[test]
fn imports_go_downward_only() {
    let mut wrong = Vec::new();
    for (name, text) in rust_files("src") {
        let module = module_of(&name);
        if module == "lib" || module == "bin" {
            continue;
        }
        let allowed = ALLOWED_IMPORTS.iter().find(|(known, _)| *known == module);
        let Some((_, allowed)) = allowed else {
            wrong.push(format!("{name}: module '{module}' is not in the table"));
            continue;
        };
        for import in crate_paths(&text) {
            if import != module && !allowed.contains(&import.as_str()) {
                wrong.push(format!("{name}: '{module}' may not import '{import}'"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_has_no_circle() {
    for (idx, (module, imports)) in ALLOWED_IMPORTS.iter().enumerate() {
        for import in *imports {
            let below = ALLOWED_IMPORTS[..idx].iter().any(|(known, _)| known == import);
            assert!(below, "'{module}' imports '{import}', which is not below it");
        }
    }
}

#[test]
fn crates_stay_behind_their_files() {
    let mut wrong = Vec::new();
    for (name, text) in rust_files("src") {
        for (krate, places) in CONFINED_CRATES {
            let uses = text.lines().any(|line| {
                let code = line.split("//").next().unwrap_or(line);
                code.match_indices(&format!("{krate}::")).any(|(at, _)| {
                    !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
                })
            });
            if uses && !places.iter().any(|place| name.starts_with(place)) {
                wrong.push(format!("{name} uses {krate}, which belongs to {places:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_and_lines_stay_short_and_have_headers() {
    let mut wrong = Vec::new();
    for (name, text) in ["src", "tests"].into_iter().flat_map(rust_files) {
        if !text.starts_with("//!") {
            wrong.push(format!("{name}: no //! header"));
        }
        let n_lines = text.lines().count();
        let excepted = LONG_FILES.iter().any(|(known, _)| *known == name);
        if n_lines > FILE_LINES_MAX && !excepted {
            wrong.push(format!("{name}: {n_lines} lines"));
        }
        if n_lines <= FILE_LINES_MAX && excepted {
            wrong.push(format!("{name}: is short now; take it off LONG_FILES"));
        }
        for (idx, line) in text.lines().enumerate() {
            if line.chars().count() > LINE_COLUMNS_MAX {
                wrong.push(format!("{name}:{}: over {LINE_COLUMNS_MAX} columns", idx + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_project_speaks_of_itself_alone() {
    let mut wrong = Vec::new();
    // Put together here, so that this file does not find itself.
    let words = [["/wo", "rk/"].concat(), ["/ro", "ot/"].concat()];
    for (name, text) in ["src", "tests"].into_iter().flat_map(rust_files) {
        for word in &words {
            if text.contains(word.as_str()) {
                wrong.push(format!("{name}: names the path {word}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
