//! Hints really bring samples into memory: files whose pages were dropped come back without being
//! read.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code, not all in a #[test]")]

use std::fs::{self, File};
use std::io::{IoSliceMut, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use fastaa::dataset::open_split;
use rustix::fs::Advice;
use rustix::io::ReadWriteFlags;

/// Bytes of an image file: several pages.
const FILE_BYTES: usize = 100_000;
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether the bytes at `offset` are in memory: a read that may not wait gives them.
fn is_in_memory(path: &Path, offset: u64) -> bool {
    let file = File::open(path).unwrap();
    let mut byte = [0];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    rustix::io::preadv2(&file, &mut buffers, offset, ReadWriteFlags::NOWAIT) == Ok(1)
}

/// Writes a file through to the disk and drops it from memory; false if it is kept there.
fn write_cold(path: &Path, content: &[u8]) -> bool {
    let mut file = File::create(path).unwrap();
    file.write_all(content).unwrap();
    file.sync_all().unwrap();
    drop_from_memory(path)
}

/// Drops a file that is on disk from memory; false if it is kept there.
fn drop_from_memory(path: &Path) -> bool {
    let file = File::open(path).unwrap();
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    let is_cold = !is_in_memory(path, file.metadata().unwrap().len() / 2);
    if !is_cold {
        eprintln!("SKIPPED: {} stays in memory: is it on a disk?", path.display());
    }
    is_cold
}

#[allow(clippy::disallowed_methods, reason = "the system says nothing when it has read")]
fn wait_for(path: &Path, offset: u64) {
    let started = Instant::now();
    while !is_in_memory(path, offset) {
        assert!(started.elapsed() < PATIENCE, "byte {offset} of {} never came", path.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Something that is a JPEG by its first bytes, which is all that is looked at.
fn content() -> Vec<u8> {
    let mut content = vec![0xFF; FILE_BYTES];
    content[1] = 0xD8;
    content
}

#[test]
fn files_of_a_folder_are_read_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("data");
    fs::create_dir_all(root.join("a")).unwrap();
    let paths = ["1.jpg", "2.jpg"].map(|name| root.join("a").join(name));
    fs::write(&paths[0], content()).unwrap();
    if !write_cold(&paths[1], &content()) {
        return;
    }
    let split = open_split(&root, "train", dir.path()).unwrap();
    // Its first bytes were looked at, and the system read more of it.
    if !drop_from_memory(&paths[1]) {
        return;
    }
    split.will_need(1);
    wait_for(&paths[1], FILE_BYTES as u64 - 1);
    fs::remove_file(&paths[1]).unwrap();
    split.will_need(1);
}

#[test]
fn members_of_a_shard_are_read_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let shard = dir.path().join("train-000000.tar");
    let mut tar = Vec::new();
    for number in 0..40 {
        member(&mut tar, &format!("{number:03}.jpg"), &content());
        member(&mut tar, &format!("{number:03}.cls"), b"0");
    }
    tar.resize(tar.len() + 1024, 0);
    if !write_cold(&shard, &tar) {
        return;
    }
    let split = open_split(dir.path(), "train", dir.path()).unwrap();
    // Opening went through the headers, and the system read what is about them.
    if !drop_from_memory(&shard) {
        return;
    }
    let place = |sample: u64| sample * (tar.len() as u64 / 40) + FILE_BYTES as u64 / 2;
    assert!(!is_in_memory(&shard, place(20)));
    split.will_need(20);
    wait_for(&shard, place(20));
    assert!(!is_in_memory(&shard, place(35)), "the sample alone");
}

fn member(tar: &mut Vec<u8>, name: &str, content: &[u8]) {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    let size = format!("{:011o}", content.len());
    header[124..124 + size.len()].copy_from_slice(size.as_bytes());
    header[156] = b'0';
    header[257..263].copy_from_slice(b"ustar\0");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar.extend(header);
    tar.extend(content);
    tar.resize(tar.len().next_multiple_of(512), 0);
}
