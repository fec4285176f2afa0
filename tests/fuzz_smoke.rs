//! A short run of the fuzz targets; `benches/fuzz.rs` does the long one.

#[path = "../fuzz/targets.rs"]
mod targets;

#[test]
fn parsers_never_panic() {
    let folder = tempfile::tempdir().expect("makes a folder");
    for mut target in targets::all(folder.path()) {
        println!("{}", target.name);
        target.run_seeds();
        target.run(1 << 40, 1500);
    }
}
