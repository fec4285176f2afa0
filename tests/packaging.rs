//! What an administrator relies on: the unit file, what the binaries link, completions.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Names in the DT_NEEDED entries and the run path of a binary.
fn dynamic_section(binary: &str) -> String {
    let output = Command::new("readelf").args(["-d", binary]).output().expect("readelf runs");
    assert!(output.status.success(), "readelf of {binary}");
    String::from_utf8(output.stdout).expect("is text")
}

#[test]
fn only_the_daemon_links_libtorch_and_it_finds_it_without_any_variable() {
    let ctl = dynamic_section(env!("CARGO_BIN_EXE_fastaa-ctl"));
    let needed = ctl.lines().filter(|line| line.contains("(NEEDED)"));
    assert!(needed.clone().count() > 0);
    assert!(!needed.clone().any(|line| line.contains("libtorch") || line.contains("libc10")));

    let daemon = dynamic_section(env!("CARGO_BIN_EXE_fastaa-loaderd"));
    let links_torch = daemon.lines().any(|l| l.contains("(NEEDED)") && l.contains("libtorch_cpu"));
    assert_eq!(links_torch, cfg!(feature = "torch"));
    let output = Command::new(env!("CARGO_BIN_EXE_fastaa-loaderd"))
        .arg("--version")
        .env_clear()
        .output()
        .expect("starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_unit_passes_systemd_analyze() {
    let analyze = Path::new("/usr/bin/systemd-analyze");
    if !analyze.exists() {
        eprintln!("SKIPPED: no systemd-analyze on this machine");
        return;
    }
    // A copy whose programs are those that were just built.
    let unit = std::fs::read_to_string(root().join("systemd/fastaa-loaderd.service"));
    let unit = unit.expect("reads the unit");
    let installed = "/usr/bin/fastaa-loaderd";
    assert_eq!(unit.matches(installed).count(), 2, "ExecStartPre and ExecStart");
    let dir = tempfile::tempdir().expect("a folder");
    let copy = dir.path().join("fastaa-loaderd.service");
    std::fs::write(&copy, unit.replace(installed, env!("CARGO_BIN_EXE_fastaa-loaderd")))
        .expect("writes");
    let output =
        Command::new(analyze).arg("verify").arg("--man=no").arg(&copy).output().expect("runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    // Other units of the machine may have faults of their own.
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("fastaa")).collect();
    assert!(output.status.success() && ours.is_empty(), "{said}");
}

#[test]
fn every_example_configuration_parses() {
    let folder = root().join("config");
    let mut n_checked = 0;
    for entry in std::fs::read_dir(folder).expect("reads config/") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            fastaa::config::Config::load(&path).unwrap_or_else(|error| panic!("{error}"));
            n_checked += 1;
        }
    }
    assert!(n_checked >= 3);
}

#[test]
fn completions_are_printed_and_a_closed_pipe_is_no_error() {
    for shell in ["bash", "zsh", "fish"] {
        let output = Command::new(env!("CARGO_BIN_EXE_fastaa-ctl"))
            .args(["completions", shell])
            .output()
            .expect("runs");
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stdout).contains("fastaa-ctl"));
    }
    let script = format!("{} completions bash | head -c 1", env!("CARGO_BIN_EXE_fastaa-ctl"));
    let output =
        Command::new("bash").args(["-o", "pipefail", "-c", &script]).output().expect("bash runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
