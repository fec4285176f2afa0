//! Images per second that libjpeg-turbo decodes whole: the limit of the benchmarks on JPEG files.
//!
//! `decode_all FOLDER THREADS`: every `.jpg` below the folder, from memory, three times over.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use fastaa::image::Image;
use fastaa::image::decode::{DecodeLimits, DecodeOptions, Decoder};

const ROUNDS: usize = 3;

fn files(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "jpg") {
            found.push(path);
        }
    }
    Ok(())
}

#[allow(clippy::print_stdout, reason = "the figure is what the program is for")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(folder), Some(n_threads)) = (arguments.next(), arguments.next()) else {
        return Err("usage: decode_all FOLDER THREADS".into());
    };
    let n_threads: usize = n_threads.parse()?;
    let mut paths = Vec::new();
    files(Path::new(&folder), &mut paths)?;
    let bytes = paths.iter().map(std::fs::read).collect::<Result<Vec<_>, _>>()?;
    let options = DecodeOptions { channels: 3, turn: false, limits: DecodeLimits::default() };
    let next = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..n_threads {
            scope.spawn(|| {
                let (mut decoder, mut image) = (Decoder::default(), Image::default());
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= ROUNDS * bytes.len() {
                        return;
                    }
                    let file = &bytes[at % bytes.len()];
                    let opened = decoder.open(file, options);
                    opened.and_then(|mut file| file.decode(&mut image)).expect("a whole JPEG");
                }
            });
        }
    });
    println!("{:.0}", (ROUNDS * bytes.len()) as f64 / start.elapsed().as_secs_f64());
    Ok(())
}
