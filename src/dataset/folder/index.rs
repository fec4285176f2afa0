//! Which image files a folder has: found once, kept on disk, compared before it is used again.
//!
//! ```text
//! fastaa-index 1
//! C <class>
//! D <class number> <mtime in ns> <folder>        every folder that was looked into
//! F <bytes> <mtime in ns> <name>                 a file of the last folder
//! crc <CRC-32 of all lines before>
//! ```
//! Fields are separated by tabs. An index is used only if every folder and every file still has
//! the size and time that it says; otherwise, or if it is damaged, the folder is read anew.

use std::fmt::Write as _;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::super::{DatasetError, digest};

const FIRST_LINE: &str = "fastaa-index 1";

/// Extensions of image files, in lower case: torchvision's, but for TIFF.
const EXTENSIONS: [&str; 7] = ["jpg", "jpeg", "png", "ppm", "bmp", "pgm", "webp"];

/// Extensions that torchvision reads, and this program does not.
const FOREIGN_EXTENSIONS: [&str; 2] = ["tif", "tiff"];

/// Deeper folders are a circle of links.
const DEPTH_MAX: usize = 32;

/// Threads that ask for files' sizes and times: they wait for the disk, not for a processor.
const N_THREADS: usize = 8;

/// A file's size and modification time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) bytes: u64,
    pub(super) mtime_ns: i128,
}

/// One image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileEntry {
    folder: u32,
    /// Where its name ends in [`Index::names`].
    name_end: usize,
    pub(super) stamp: Stamp,
}

/// One folder, relative to the root.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Folder {
    path: String,
    class: u32,
    mtime_ns: i128,
}

/// All image files, in the order of their sample indices.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) classes: Vec<String>,
    pub(super) files: Vec<FileEntry>,
    folders: Vec<Folder>,
    root_mtime_ns: i128,
    /// All names, one after the other.
    names: String,
}

impl Index {
    /// The index of `root`: from `cache_dir` if it is still true, else made anew and kept there.
    ///
    /// # Errors
    /// The folder cannot be read, or holds no image folder.
    pub(super) fn load_or_scan(root: &Path, cache_dir: &Path) -> Result<Self, DatasetError> {
        let kept_at = kept_at(root, cache_dir)?;
        if let Some(index) = fs::read_to_string(&kept_at).ok().and_then(|text| Self::parse(&text))
            && index.is_true(root)
        {
            return Ok(index);
        }
        let index = Self::scan(root)?;
        // A cache: without it, the next start takes longer, and nothing else.
        if let Some(text) = index.to_text()
            && let Err(cause) = keep(&kept_at, &text)
        {
            let kept_at = kept_at.display();
            tracing::warn!("cannot keep the index of {} at {kept_at}: {cause}", root.display());
        }
        Ok(index)
    }

    /// A file's path, relative to the root.
    pub(super) fn path_of(&self, file_idx: usize) -> PathBuf {
        let (folder, name) = self.parts_of(file_idx);
        Path::new(folder).join(name)
    }

    /// A file's folder, relative to the root, and its name.
    pub(super) fn parts_of(&self, file_idx: usize) -> (&str, &str) {
        let file = self.files[file_idx];
        let start = file_idx.checked_sub(1).map_or(0, |before| self.files[before].name_end);
        (&self.folders[file.folder as usize].path, &self.names[start..file.name_end])
    }

    pub(super) fn class_of(&self, file_idx: usize) -> u32 {
        self.folders[self.files[file_idx].folder as usize].class
    }

    fn push(&mut self, name: &str, stamp: Stamp) {
        self.names.push_str(name);
        let folder = u32::try_from(self.folders.len() - 1).expect("fewer folders than files fit");
        self.files.push(FileEntry { folder, name_end: self.names.len(), stamp });
    }

    fn scan(root: &Path) -> Result<Self, DatasetError> {
        let meta = fs::metadata(root).map_err(|cause| DatasetError::io(root, cause))?;
        let mut index = Self { root_mtime_ns: mtime_ns(&meta), ..Self::default() };
        for class_name in class_folders(root)? {
            let mut folders = Vec::new();
            walk(root, &class_name, 0, &mut folders)?;
            // As os.walk's output is sorted: by the folder's whole path.
            folders.sort_by(|a, b| a.path.cmp(&b.path));
            let n_files: usize = folders.iter().map(|folder| folder.names.len()).sum();
            if n_files == 0 && class_name.starts_with('.') {
                continue; // Left by a tool, such as .ipynb_checkpoints.
            }
            if n_files == 0 {
                let path = root.join(&class_name).display().to_string();
                return Err(DatasetError::EmptyClass { path });
            }
            let class = u32::try_from(index.classes.len()).unwrap_or(u32::MAX);
            index.classes.push(class_name);
            for found in folders {
                let stamps = stamps_of(&root.join(&found.path), &found.names)?;
                let FoundFolder { path, mtime_ns, names } = found;
                index.folders.push(Folder { path, class, mtime_ns });
                for (name, stamp) in names.iter().zip(stamps) {
                    index.push(name, stamp);
                }
            }
        }
        Ok(index)
    }

    /// Whether all folders and files are as the index says.
    fn is_true(&self, root: &Path) -> bool {
        let time_of = |path: &Path| fs::metadata(path).ok().map(|meta| mtime_ns(&meta));
        let are_folders = time_of(root) == Some(self.root_mtime_ns)
            && self
                .folders
                .iter()
                .all(|folder| time_of(&root.join(&folder.path)) == Some(folder.mtime_ns));
        are_folders
            && in_parts(self.files.len(), |part| {
                part.clone().all(|file_idx| {
                    stamp_of(&root.join(self.path_of(file_idx))).ok()
                        == Some(self.files[file_idx].stamp)
                })
            })
            .into_iter()
            .all(|is_true| is_true)
    }

    /// `None` if a name cannot be written in a line.
    fn to_text(&self) -> Option<String> {
        let is_plain = |text: &str| !text.contains(['\n', '\t', '\r']);
        let folders = self.folders.iter().map(|folder| folder.path.as_str());
        if !is_plain(&self.names)
            || !folders.chain(self.classes.iter().map(String::as_str)).all(is_plain)
        {
            return None;
        }
        let mut text = format!("{FIRST_LINE}\nR\t{}\n", self.root_mtime_ns);
        for class in &self.classes {
            let _ = writeln!(text, "C\t{class}");
        }
        let mut file_idx = 0;
        for (folder_idx, folder) in self.folders.iter().enumerate() {
            let Folder { path, class, mtime_ns } = folder;
            let _ = writeln!(text, "D\t{class}\t{mtime_ns}\t{path}");
            while let Some(file) = self.files.get(file_idx)
                && file.folder as usize == folder_idx
            {
                let Stamp { bytes, mtime_ns } = file.stamp;
                let _ = writeln!(text, "F\t{bytes}\t{mtime_ns}\t{}", self.parts_of(file_idx).1);
                file_idx += 1;
            }
        }
        let crc = crc32fast::hash(text.as_bytes());
        let _ = writeln!(text, "crc\t{crc:08x}");
        Some(text)
    }

    /// `None` if it is damaged or of another version.
    fn parse(text: &str) -> Option<Self> {
        let (body, crc) = text.trim_end().rsplit_once("\ncrc\t")?;
        if !body.starts_with(FIRST_LINE)
            || u32::from_str_radix(crc, 16).ok()?
                != crc32fast::hash(&text.as_bytes()[..=body.len()])
        {
            return None;
        }
        let mut index = Self::default();
        for line in body.lines().skip(1) {
            let mut fields = line.split('\t');
            match fields.next()? {
                "R" => index.root_mtime_ns = fields.next()?.parse().ok()?,
                "C" => index.classes.push(fields.next()?.to_owned()),
                "D" => {
                    let class = fields.next()?.parse().ok()?;
                    let mtime_ns = fields.next()?.parse().ok()?;
                    let path = fields.next()?.to_owned();
                    ((class as usize) < index.classes.len()).then_some(())?;
                    index.folders.push(Folder { path, class, mtime_ns });
                }
                "F" => {
                    let bytes = fields.next()?.parse().ok()?;
                    let mtime_ns = fields.next()?.parse().ok()?;
                    (!index.folders.is_empty()).then_some(())?;
                    index.push(fields.next()?, Stamp { bytes, mtime_ns });
                }
                _ => return None,
            }
            fields.next().is_none().then_some(())?;
        }
        Some(index)
    }
}

/// A folder's image files, sorted by name.
#[derive(Debug)]
struct FoundFolder {
    path: String,
    mtime_ns: i128,
    names: Vec<String>,
}

/// The names of a folder's sub-folders, sorted.
fn class_folders(root: &Path) -> Result<Vec<String>, DatasetError> {
    let fail = |cause| DatasetError::io(root, cause);
    let mut names = Vec::new();
    for entry in fs::read_dir(root).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if is_folder(&entry) {
            names.push(text_of(root, &entry)?);
        }
    }
    names.sort();
    Ok(names)
}

/// Whether a folder has sub-folders with image files in them; it looks no further than the first.
pub(in crate::dataset) fn has_class_folders(root: &Path) -> bool {
    let folders = fs::read_dir(root).into_iter().flatten().flatten().filter(is_folder);
    folders.into_iter().any(|folder| has_images(&folder.path(), 0))
}

fn has_images(folder: &Path, depth: usize) -> bool {
    let mut inner = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if is_folder(&entry) {
            inner.push(entry.path());
        } else if entry.file_name().to_str().is_some_and(|name| is_image(name, &EXTENSIONS)) {
            return true;
        }
    }
    depth < DEPTH_MAX && inner.iter().any(|folder| has_images(folder, depth + 1))
}

fn walk(
    root: &Path,
    folder: &str,
    depth: usize,
    found: &mut Vec<FoundFolder>,
) -> Result<(), DatasetError> {
    let path = root.join(folder);
    let fail = |cause| DatasetError::io(&path, cause);
    if depth > DEPTH_MAX {
        let what = format!("folders more than {DEPTH_MAX} deep; does a link lead in a circle?");
        return Err(DatasetError::unsupported(&path.display().to_string(), what));
    }
    let mtime = mtime_ns(&fs::metadata(&path).map_err(fail)?);
    let (mut names, mut inner) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(&path).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if is_folder(&entry) {
            inner.push(text_of(&path, &entry)?);
            continue;
        }
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
            text_of(&path, &entry)?;
            continue;
        };
        if is_image(&name, &EXTENSIONS) {
            names.push(name);
        } else if is_image(&name, &FOREIGN_EXTENSIONS) {
            let what = "TIFF files are not read: convert the dataset's to PNG, or move them out";
            return Err(DatasetError::unsupported(&entry.path().display().to_string(), what));
        }
    }
    names.sort();
    found.push(FoundFolder { path: folder.to_owned(), mtime_ns: mtime, names });
    for name in inner {
        walk(root, &format!("{folder}/{name}"), depth + 1, found)?;
    }
    Ok(())
}

/// A link to a folder is one.
fn is_folder(entry: &fs::DirEntry) -> bool {
    match entry.file_type() {
        Ok(kind) if kind.is_symlink() => fs::metadata(entry.path()).is_ok_and(|meta| meta.is_dir()),
        Ok(kind) => kind.is_dir(),
        Err(_) => false,
    }
}

fn text_of(folder: &Path, entry: &fs::DirEntry) -> Result<String, DatasetError> {
    entry.file_name().into_string().map_err(|name| {
        let path = folder.join(&name).display().to_string();
        DatasetError::unsupported(&path, "its name is not UTF-8 text: rename it")
    })
}

fn is_image(name: &str, extensions: &[&str]) -> bool {
    let extension = name.rsplit_once('.').map(|(_, extension)| extension);
    extension.is_some_and(|own| extensions.iter().any(|known| own.eq_ignore_ascii_case(known)))
}

/// Sizes and times of a folder's files, asked for by several threads.
fn stamps_of(folder: &Path, names: &[String]) -> Result<Vec<Stamp>, DatasetError> {
    let stamp = |name: &String| {
        let path = folder.join(name);
        stamp_of(&path).map_err(|cause| {
            let is_link = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_symlink());
            let what = if is_link { "a link that leads to no readable file" } else { "" };
            let separator = if is_link { ": " } else { "" };
            let what = format!("{what}{separator}{cause}; remove it from the dataset");
            DatasetError::unsupported(&path.display().to_string(), what)
        })
    };
    let parts = in_parts(names.len(), |part| {
        part.map(|name_idx| stamp(&names[name_idx])).collect::<Result<Vec<_>, _>>()
    });
    let parts = parts.into_iter().collect::<Result<Vec<_>, _>>()?;
    Ok(parts.concat())
}

/// Does `work` on parts of `0..n`, each in a thread of its own; gives the results in order.
fn in_parts<T: Send>(n: usize, work: impl Fn(std::ops::Range<usize>) -> T + Sync) -> Vec<T> {
    let per_thread = n.div_ceil(N_THREADS).max(64);
    let parts = (0..n).step_by(per_thread).map(|start| start..(start + per_thread).min(n));
    let parts: Vec<_> = parts.collect();
    if let [part] = &parts[..] {
        return vec![work(part.clone())];
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = parts.into_iter().map(|part| scope.spawn(|| work(part))).collect();
        let results = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
        results
            .map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn stamp_of(path: &Path) -> std::io::Result<Stamp> {
    let meta = fs::metadata(path)?;
    if !meta.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    Ok(Stamp { bytes: meta.size(), mtime_ns: mtime_ns(&meta) })
}

pub(super) fn mtime_ns(meta: &Metadata) -> i128 {
    i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec())
}

/// Where the index of a root is kept.
fn kept_at(root: &Path, cache_dir: &Path) -> Result<PathBuf, DatasetError> {
    use std::os::unix::ffi::OsStrExt as _;
    let canonical = fs::canonicalize(root).map_err(|cause| DatasetError::io(root, cause))?;
    let name = digest::fingerprint(Sha256::new_with_prefix(canonical.as_os_str().as_bytes()));
    Ok(cache_dir.join("index").join(name.0))
}

fn keep(path: &Path, text: &str) -> std::io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new("")))?;
    let temp = path.with_extension(format!("tmp-{}", std::process::id()));
    let written = fs::write(&temp, text).and_then(|()| fs::rename(&temp, path));
    if written.is_err() {
        let _ = fs::remove_file(&temp);
    }
    written
}
