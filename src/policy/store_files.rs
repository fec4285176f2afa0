//! The store's files: their names, their JSON, and how they are written so that a crash at any
//! point leaves the old file or the new one.
//!
//! Owns bytes on disk. Never decides which version is active (`store` does).
//!
//! A write goes to `.tmp-NAME` beside the target, is flushed to the disk, renamed over the target,
//! and the folder is flushed. A leftover `.tmp-…` is therefore never a version and never read.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::store::PolicyVersion;
use super::store_head::Head;
use super::{Policy, PolicyError, PolicyId, format};
use crate::limits;

const FILE_FORMAT: u32 = 1;
const TEMP_PREFIX: &str = ".tmp-";
pub(super) const HEAD_FILE: &str = "active.json";

/// `NNNNNN.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VersionFile {
    format: u32,
    name: String,
    version: u64,
    parent: u64,
    published_at: String,
    id: String,
    evidence: Value,
    policy: Value,
}

/// `active.json`.
#[derive(Serialize, Deserialize)]
struct HeadFile {
    format: u32,
    name: String,
    #[serde(flatten)]
    head: Head,
}

pub(super) fn version_path(dir: &Path, version: u64) -> PathBuf {
    dir.join(format!("{version:06}.json"))
}

/// Versions that have a file, ascending. Other files are not the store's and are left alone.
pub(super) fn version_numbers(dir: &Path) -> Result<Vec<u64>, PolicyError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(PolicyError::io(dir, error)),
    };
    let mut versions = Vec::new();
    for entry in entries {
        let name = entry.map_err(|error| PolicyError::io(dir, error))?.file_name();
        let digits = name.to_str().and_then(|name| name.strip_suffix(".json"));
        let version = digits.and_then(|digits| {
            digits.parse::<u64>().ok().filter(|version| format!("{version:06}") == digits)
        });
        versions.extend(version.filter(|version| *version > 0));
    }
    versions.sort_unstable();
    Ok(versions)
}

/// Reads and checks one version file: its place, and that its content has the id it claims.
pub(super) fn read_version(
    dir: &Path,
    name: &str,
    version: u64,
) -> Result<PolicyVersion, PolicyError> {
    let path = version_path(dir, version);
    let damaged = |problem: String| PolicyError::Damaged {
        path: path.display().to_string(),
        problem: format!("{problem}; restore it from a backup, or choose another version"),
    };
    let text = read_limited(&path)?;
    let file: VersionFile =
        serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
    check_format(file.format).map_err(damaged)?;
    if file.version != version || file.name != name {
        return Err(damaged(format!("it says it is {}@{}", file.name, file.version)));
    }
    let policy =
        format::from_value(&file.policy, "unnamed").map_err(|error| damaged(error.to_string()))?;
    let id = policy.id();
    if PolicyId::from_hex(&file.id) != Some(id) {
        return Err(damaged(format!("its policy has id {id}, but the file says {}", file.id)));
    }
    Ok(PolicyVersion {
        name: file.name,
        version,
        policy,
        id,
        evidence: file.evidence,
        published_at: Some(file.published_at),
        parent: Some(file.parent),
    })
}

/// Writes a new version file. `published_at` and `parent` are there for every version but 0.
pub(super) fn write_version(dir: &Path, version: &PolicyVersion) -> Result<(), PolicyError> {
    let file = VersionFile {
        format: FILE_FORMAT,
        name: version.name.clone(),
        version: version.version,
        parent: version.parent.unwrap_or(0),
        published_at: version.published_at.clone().unwrap_or_default(),
        id: version.id.to_string(),
        evidence: version.evidence.clone(),
        policy: format::to_value(&version.policy),
    };
    write_json(&version_path(dir, version.version), &file)
}

/// Reads `active.json`, or `None` if there is none.
pub(super) fn read_head(dir: &Path, name: &str) -> Result<Option<Head>, PolicyError> {
    let path = dir.join(HEAD_FILE);
    let damaged = |problem: String| PolicyError::Damaged {
        path: path.display().to_string(),
        problem: format!(
            "{problem}; restore it, or remove it: then the newest version becomes active, and a \
             pin is forgotten"
        ),
    };
    let text = match read_limited(&path) {
        Ok(text) => text,
        Err(PolicyError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let file: HeadFile = serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
    check_format(file.format).map_err(damaged)?;
    if file.name != name {
        return Err(damaged(format!("it belongs to '{}'", file.name)));
    }
    if file.head.active != file.head.pinned.unwrap_or(file.head.unpinned) {
        return Err(damaged("its active version is neither the pinned nor the newest".to_owned()));
    }
    Ok(Some(file.head))
}

pub(super) fn write_head(dir: &Path, name: &str, head: &Head) -> Result<(), PolicyError> {
    let file = HeadFile { format: FILE_FORMAT, name: name.to_owned(), head: head.clone() };
    write_json(&dir.join(HEAD_FILE), &file)
}

/// Keeps a policy by its content; does nothing if it is kept already.
pub(super) fn keep_by_id(dir: &Path, policy: &Policy) -> Result<(), PolicyError> {
    let path = dir.join(format!("{}.json", policy.id()));
    if path.exists() {
        return Ok(());
    }
    create_dir(dir)?;
    write_json(&path, &format::to_value(policy))
}

/// A policy that [`keep_by_id`] kept.
pub(super) fn read_by_id(dir: &Path, id: PolicyId) -> Result<Policy, PolicyError> {
    let path = dir.join(format!("{id}.json"));
    if !path.exists() {
        return Err(PolicyError::not_found(format!(
            "no policy with the content {id} was ever used here; it came as a file: use that file \
             once with this daemon, or publish it"
        )));
    }
    let policy = format::load_file(&path)?;
    if policy.id() != id {
        return Err(PolicyError::Damaged {
            path: path.display().to_string(),
            problem: format!("its content has the id {}; remove it", policy.id()),
        });
    }
    Ok(policy)
}

fn check_format(format: u32) -> Result<(), String> {
    if format == FILE_FORMAT {
        return Ok(());
    }
    Err(format!("its format is {format}, but this program reads format {FILE_FORMAT}"))
}

fn read_limited(path: &Path) -> Result<String, PolicyError> {
    let io_error = |error| PolicyError::io(path, error);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io_error)?;
    let limit = limits::POLICY_VERSION_BYTES_MAX;
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io_error)?;
    let damaged = |problem| PolicyError::Damaged { path: path.display().to_string(), problem };
    if bytes.len() as u64 > limit {
        return Err(damaged(format!("it is over the limit of {limit} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| damaged("it is not UTF-8 text".to_owned()))
}

pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), PolicyError> {
    let bytes =
        serde_json::to_vec(value).map_err(|error| PolicyError::io(path, io::Error::from(error)))?;
    let limit = limits::POLICY_VERSION_BYTES_MAX;
    if bytes.len() as u64 > limit {
        return Err(PolicyError::malformed(format!(
            "{}: {} bytes are over the limit of {limit} bytes; shorten the policy's provenance \
             or its evidence",
            path.display(),
            bytes.len()
        )));
    }
    write_atomic(path, &bytes).map_err(|error| PolicyError::io(path, error))
}

fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let temp = dir.join(format!("{TEMP_PREFIX}{}", name.to_string_lossy()));
    let mut file = File::create(&temp)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&temp, path)?;
    sync_dir(dir)
}

/// Makes a folder, and its entry in the parent, last.
pub(super) fn create_dir(dir: &Path) -> Result<(), PolicyError> {
    if dir.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(dir)
        .and_then(|()| dir.parent().map_or(Ok(()), sync_dir))
        .map_err(|error| PolicyError::io(dir, error))
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    // An empty path is the parent of a relative one: the current folder.
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir)?.sync_all()
}

/// Removes what a writer that died left behind.
pub(super) fn remove_leftovers(dir: &Path) -> Result<(), PolicyError> {
    let entries = fs::read_dir(dir).map_err(|error| PolicyError::io(dir, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| PolicyError::io(dir, error))?;
        if entry.file_name().to_string_lossy().starts_with(TEMP_PREFIX) {
            fs::remove_file(entry.path()).map_err(|error| PolicyError::io(&entry.path(), error))?;
        }
    }
    Ok(())
}
