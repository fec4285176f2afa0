//! Which Arrow files of a folder make a split.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::super::DatasetError;
use super::is_arrow_name;

/// Largest of the JSON files that are read, in bytes.
const JSON_BYTES_MAX: u64 = 16 << 20;

/// The files of a split, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::dataset) struct HfFiles {
    pub(in crate::dataset) folder: PathBuf,
    pub(in crate::dataset) paths: Vec<PathBuf>,
}

/// The files of a split in a folder; `None` if the folder is not of `datasets`, or has no such
/// split.
///
/// # Errors
/// The folder is of `datasets`, but what it says of its files makes no sense.
pub(in crate::dataset) fn find_in_folder(
    folder: &Path,
    split: &str,
) -> Result<Option<HfFiles>, DatasetError> {
    if folder.join("dataset_dict.json").is_file() {
        return saved(&folder.join(split));
    }
    if folder.join("state.json").is_file() {
        let own = own_split(folder)?;
        return if own.as_deref() == Some(split) { saved(folder) } else { Ok(None) };
    }
    let cached: Vec<PathBuf> =
        cached(folder).into_iter().filter(|(own, _)| own == split).map(|(_, path)| path).collect();
    Ok((!cached.is_empty()).then(|| HfFiles { folder: folder.to_owned(), paths: cached }))
}

/// The files of a folder that is one split, whatever its name; `None` if it is not.
///
/// # Errors
/// As [`find_in_folder`].
pub(in crate::dataset) fn find_whole(folder: &Path) -> Result<Option<HfFiles>, DatasetError> {
    if let [split] = &splits_in_folder(folder)[..] {
        return find_in_folder(folder, split);
    }
    saved(folder)
}

/// The split that `state.json` names, if it does.
fn own_split(folder: &Path) -> Result<Option<String>, DatasetError> {
    let json = read_json(&folder.join("state.json"))?;
    Ok(json["_split"].as_str().map(str::to_owned))
}

/// The named splits of a folder of `datasets`; none if it is not.
pub(in crate::dataset) fn splits_in_folder(folder: &Path) -> Vec<String> {
    let dict = folder.join("dataset_dict.json");
    if dict.is_file() {
        let splits = read_json(&dict).ok().and_then(|json| {
            let names = json["splits"].as_array()?.iter();
            Some(names.filter_map(|name| name.as_str().map(str::to_owned)).collect())
        });
        return splits.unwrap_or_default();
    }
    if folder.join("state.json").is_file() {
        return own_split(folder).ok().flatten().into_iter().collect();
    }
    let mut splits: Vec<String> = cached(folder).into_iter().map(|(split, _)| split).collect();
    splits.dedup();
    splits
}

/// What `save_to_disk` wrote.
fn saved(folder: &Path) -> Result<Option<HfFiles>, DatasetError> {
    let state = folder.join("state.json");
    if !state.is_file() {
        return Ok(None);
    }
    let json = read_json(&state)?;
    let fail = |what: &str| DatasetError::unsupported(&state.display().to_string(), what);
    if json["_indices_data_files"].as_array().is_some_and(|files| !files.is_empty()) {
        return Err(fail(
            "the dataset is a selection of rows: call `flatten_indices()` before `save_to_disk`",
        ));
    }
    let names = json["_data_files"].as_array().map(Vec::as_slice).unwrap_or_default();
    let paths: Option<Vec<PathBuf>> = names
        .iter()
        .map(|file| {
            let name = file["filename"].as_str()?;
            let is_plain = !name.contains('/') && is_arrow_name(Path::new(name));
            is_plain.then(|| folder.join(name))
        })
        .collect();
    match paths {
        Some(paths) if !paths.is_empty() => Ok(Some(HfFiles { folder: folder.to_owned(), paths })),
        _ => Err(fail("it names no data files; save the dataset anew")),
    }
}

/// Splits and files of a folder in the cache, sorted: `NAME-SPLIT.arrow`, or
/// `NAME-SPLIT-00000-of-00002.arrow`.
fn cached(folder: &Path) -> Vec<(String, PathBuf)> {
    if !folder.join("dataset_info.json").is_file() {
        return Vec::new();
    }
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let of_split = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let stem = name.strip_suffix(".arrow")?;
        // What `map` and `filter` leave beside the dataset.
        if stem.starts_with("cache-") || stem.starts_with("tmp") {
            return None;
        }
        let mut parts: Vec<&str> = stem.split('-').collect();
        if let [.., _, "of", _] = parts[..] {
            parts.truncate(parts.len() - 3);
        }
        let split = (parts.len() > 1).then(|| parts.pop()).flatten()?;
        Some((split.to_owned(), entry.path()))
    });
    let mut found: Vec<_> = of_split.collect();
    found.sort();
    found
}

fn read_json(path: &Path) -> Result<Value, DatasetError> {
    let name = || path.display().to_string();
    let meta = fs::metadata(path).map_err(|cause| DatasetError::io(path, cause))?;
    if meta.len() > JSON_BYTES_MAX {
        return Err(DatasetError::damaged(&name(), format!("{} bytes of JSON", meta.len())));
    }
    let text = fs::read(path).map_err(|cause| DatasetError::io(path, cause))?;
    serde_json::from_slice(&text)
        .map_err(|cause| DatasetError::damaged(&name(), format!("no JSON: {cause}")))
}
