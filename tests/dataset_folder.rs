//! Folders of class folders: the order of samples, the index on disk, and what is refused.

#![allow(clippy::unwrap_used, reason = "test code, but not all in a #[test]")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fastaa::dataset::{self, Content, Label, Split};
use tempfile::TempDir;

/// Class folders with files whose content is their own path.
struct Folder {
    dir: TempDir,
}

impl Folder {
    fn new(files: &[&str]) -> Self {
        let folder = Self { dir: tempfile::tempdir().unwrap() };
        for file in files {
            folder.write(file, file.as_bytes());
        }
        folder
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn write(&self, file: &str, content: &[u8]) {
        let path = self.root().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn open(&self) -> Result<Arc<dyn Split>, String> {
        dataset::open_split(&self.root(), "train", &self.dir.path().join("cache"))
            .map_err(|error| error.to_string())
    }

    fn refused(&self, expected: &str) {
        let error = self.open().expect_err("it must be refused");
        assert!(error.contains(expected), "{error}");
    }

    /// The index that is kept, and when it was written.
    fn kept(&self) -> (PathBuf, SystemTime) {
        let mut entries = fs::read_dir(self.dir.path().join("cache/index")).unwrap();
        let path = entries.next().unwrap().unwrap().path();
        assert!(entries.next().is_none(), "one index, and no temp file");
        let written = fs::metadata(&path).unwrap().modified().unwrap();
        (path, written)
    }
}

/// Contents and classes of all samples.
fn samples(split: &dyn Split) -> Vec<(String, i64)> {
    let mut buffer = Vec::new();
    (0..split.info().n_samples)
        .map(|sample_idx| {
            let sample = split.sample(sample_idx, &mut buffer).unwrap();
            let Label::Class(class) = sample.label else { panic!("a class") };
            let Content::Encoded(bytes) = sample.content else { panic!("a file") };
            (String::from_utf8_lossy(bytes).into_owned(), class)
        })
        .collect()
}

/// The order of Python's `sorted(os.walk(class))`: by a folder's whole path, then by name.
#[test]
fn samples_come_in_the_order_of_torchvision() {
    let files = [
        "b/z.jpg",
        "a/x/1.png",
        "a/x/q/3.png",
        "a-b/1.jpg",
        "a/x-y/2.JPEG",
        "a/b.webp",
        "a/B.bmp",
        "a/readme.txt",
        "b/.hidden.png",
        "b/y.jpg.txt",
    ];
    let folder = Folder::new(&files);
    let split = folder.open().unwrap();
    let expected = [
        ("a/B.bmp", 0),
        ("a/b.webp", 0),
        ("a/x/1.png", 0),
        ("a/x-y/2.JPEG", 0),
        ("a/x/q/3.png", 0),
        ("a-b/1.jpg", 1),
        ("b/.hidden.png", 2),
        ("b/z.jpg", 2),
    ];
    assert_eq!(samples(&*split), expected.map(|(file, class)| (file.to_owned(), class)));
    assert_eq!(split.info().class_names, ["a", "a-b", "b"]);
    assert!(split.sample_name(2).ends_with("data/a/x/1.png"));
}

#[test]
fn the_index_is_used_again_and_made_anew_when_anything_changes() {
    let folder = Folder::new(&["a/1.jpg", "a/2.jpg", "b/sub/3.jpg"]);
    let first = folder.open().unwrap().info().fingerprint.clone();
    let (path, written) = folder.kept();
    assert_eq!(folder.open().unwrap().info().fingerprint, first);
    assert_eq!(folder.kept(), (path.clone(), written), "nothing has changed: not written again");

    let mut known = vec![first];
    let mut check = |what: &str, change: &dyn Fn()| {
        change();
        let split = folder.open().unwrap();
        let fingerprint = split.info().fingerprint.clone();
        assert!(!known.contains(&fingerprint), "{what}");
        assert_eq!(samples(&*split).len() as u64, split.info().n_samples, "{what}");
        known.push(fingerprint);
    };
    check("other bytes in place, and another size", &|| {
        folder.write("a/1.jpg", b"longer than it was");
    });
    check("another time, the same size", &|| {
        let later = SystemTime::now() + Duration::from_secs(5);
        let file = File::options().write(true).open(folder.root().join("a/2.jpg")).unwrap();
        file.set_modified(later).unwrap();
    });
    check("one more in a class", &|| folder.write("b/4.png", b"four"));
    check("one more in an inner folder", &|| folder.write("b/sub/5.png", b"five"));
    check("one more class", &|| folder.write("c/6.png", b"six"));
    check("a file less", &|| fs::remove_file(folder.root().join("b/sub/3.jpg")).unwrap());
    check("another name", &|| {
        fs::rename(folder.root().join("c/6.png"), folder.root().join("c/7.png")).unwrap();
    });
}

#[test]
fn a_damaged_index_is_made_anew() {
    let folder = Folder::new(&["a/1.jpg", "b/2.jpg"]);
    let expected = samples(&*folder.open().unwrap());
    let (path, _) = folder.kept();
    let whole = fs::read(&path).unwrap();
    for len in (0..whole.len()).step_by(7) {
        fs::write(&path, &whole[..len]).unwrap();
        assert_eq!(samples(&*folder.open().unwrap()), expected);
        let mut changed = whole.clone();
        changed[len] ^= 1;
        fs::write(&path, &changed).unwrap();
        assert_eq!(samples(&*folder.open().unwrap()), expected);
    }
}

#[test]
fn what_cannot_be_a_dataset_is_named() {
    let folder = Folder::new(&["a/1.jpg", "empty/readme.txt"]);
    folder.refused("data/empty: no image file in this class's folder");
    fs::remove_dir_all(folder.root().join("empty")).unwrap();
    folder.open().unwrap();
    fs::create_dir(folder.root().join(".ipynb_checkpoints")).unwrap();
    assert_eq!(folder.open().unwrap().info().class_names, ["a"], "left by a tool");
    folder.write("a/scan.TIFF", b"II*");
    folder.refused("a/scan.TIFF: TIFF files are not read");
}

#[test]
fn splits_are_folders_of_class_folders() {
    let folder = Folder::new(&["train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "test/b/4.jpg"]);
    let splits = dataset::list_splits(&folder.root()).unwrap();
    assert_eq!(splits, ["train", "val", "test"]);
    let val = dataset::open_split(&folder.root(), "val", folder.dir.path()).unwrap();
    assert_eq!(samples(&*val), [("val/a/3.jpg".to_owned(), 0)]);
    // A class may be called as a split is.
    let folder = Folder::new(&["train/1.jpg", "test/2.jpg", "bus/3.jpg"]);
    assert_eq!(dataset::list_splits(&folder.root()).unwrap(), ["train"]);
    assert_eq!(folder.open().unwrap().info().class_names, ["bus", "test", "train"]);
    let other = dataset::open_split(&folder.root(), "dev", folder.dir.path()).unwrap();
    assert_eq!(other.info().n_samples, 3, "whatever it is used as");
}

#[test]
fn a_circle_of_links_ends() {
    let folder = Folder::new(&["a/1.jpg"]);
    std::os::unix::fs::symlink(folder.root().join("a"), folder.root().join("a/again")).unwrap();
    folder.refused("does a link lead in a circle?");
    let linked = Folder::new(&["b/2.jpg"]);
    let target = Path::new(&folder.root()).join("a/1.jpg");
    fs::remove_file(folder.root().join("a/again")).unwrap();
    std::os::unix::fs::symlink(target, linked.root().join("b/link.jpg")).unwrap();
    assert_eq!(linked.open().unwrap().info().n_samples, 2, "links to files are followed");
}
