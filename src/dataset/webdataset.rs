//! WebDataset: tar archives ("shards") whose files with one stem make a sample.
//!
//! ```text
//! train-000.tar:  n01440764/a.jpg  n01440764/a.cls  b.png  b.json  …
//! ```
//! As the `webdataset` library reads them: a sample is a run of files with the same key, which is
//! the path up to the first dot of its last part. The image is in `jpg`, `jpeg`, `png`, `webp`,
//! `bmp`, `ppm` or `pgm`; the class in `cls` (a number as text), or in `json` under `label`, `cls`,
//! `class` or `class_id`. Other files are passed over, and so are keys that begin with `__`. Shards
//! are mapped and read in the order of their names.
//!
//! *Source*: `webdataset.tariterators` (`base_plus_ext`, `group_by_keys`).

use std::path::{Path, PathBuf};

use super::map::Map;
use super::tar::{Member, Members};
use super::{Content, DatasetError, ImageKind, Label, LabelKind, Sample, Split, SplitInfo, digest};
use crate::limits;

const IMAGE_EXTENSIONS: [&str; 7] = ["jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm"];
const JSON_KEYS: [&str; 4] = ["label", "cls", "class", "class_id"];

/// Bytes of a label's file.
const LABEL_BYTES_MAX: usize = 1 << 20;

/// The shards of a split.
#[derive(Debug)]
pub(super) struct WebSplit {
    shards: Vec<Map>,
    samples: Vec<Place>,
    info: SplitInfo,
}

/// Where a sample lies.
#[derive(Clone, Copy, Debug)]
struct Place {
    shard: u32,
    image_at: usize,
    image_bytes: usize,
    class: i64,
}

/// A sample whose files are being collected.
#[derive(Debug, Default)]
struct Group {
    key: String,
    image: Option<(usize, usize)>,
    class: Option<i64>,
    /// That of its json file, which a cls file goes before.
    class_in_json: Option<i64>,
    /// Why its json file gives no class.
    problem: Option<String>,
}

impl WebSplit {
    /// Maps and indexes the shards, in the order given.
    ///
    /// # Errors
    /// A shard is no tar archive, or cut off; a sample lacks its image or class.
    pub(super) fn open(paths: &[PathBuf]) -> Result<Self, DatasetError> {
        let (mut shards, mut samples, mut mapped_bytes) = (Vec::new(), Vec::new(), 0);
        for path in paths {
            let map = Map::open(path, path.display().to_string())?;
            mapped_bytes += map.bytes().len() as u64;
            let shard = u32::try_from(shards.len()).expect("fewer shards than samples");
            index_shard(&map, shard, &mut samples)?;
            shards.push(map);
        }
        let path = paths.first().map(|path| path.display().to_string()).unwrap_or_default();
        let Some(last_class) = samples.iter().map(|sample: &Place| sample.class).max() else {
            return Err(DatasetError::Empty { path });
        };
        let n_classes = u32::try_from(last_class + 1).ok().filter(|n| *n <= limits::CLASSES_MAX);
        let Some(n_classes) = n_classes else {
            let what =
                format!("class {last_class}; classes may be 0 to {}", limits::CLASSES_MAX - 1);
            return Err(DatasetError::unsupported(&path, what));
        };
        let info = SplitInfo {
            format: "webdataset",
            n_samples: samples.len() as u64,
            images: ImageKind::Encoded { turns_by_exif: false },
            label_kind: LabelKind::Class { n_classes },
            class_names: Vec::new(),
            fingerprint: digest::file_fingerprint(paths)?,
            mapped_bytes,
        };
        Ok(Self { shards, samples, info })
    }

    fn place(&self, sample_idx: u64) -> (&Map, Place) {
        assert!(sample_idx < self.info.n_samples, "sample {sample_idx} is beyond the split");
        let place = self.samples[usize::try_from(sample_idx).expect("below a list's length")];
        (&self.shards[place.shard as usize], place)
    }
}

impl Split for WebSplit {
    fn info(&self) -> &SplitInfo {
        &self.info
    }

    fn sample<'a>(
        &'a self,
        sample_idx: u64,
        _buffer: &'a mut Vec<u8>,
    ) -> Result<Sample<'a>, DatasetError> {
        let (shard, Place { image_at, image_bytes, class, .. }) = self.place(sample_idx);
        let image = &shard.bytes()[image_at..image_at + image_bytes];
        Ok(Sample { content: Content::Encoded(image), label: Label::Class(class) })
    }

    fn will_need(&self, sample_idx: u64) {
        if let Ok(sample) = self.sample(sample_idx, &mut Vec::new()) {
            self.place(sample_idx).0.will_need(sample.content.bytes());
        }
    }

    fn label(&self, sample_idx: u64) -> Result<Label<'_>, DatasetError> {
        Ok(Label::Class(self.place(sample_idx).1.class))
    }

    fn sample_name(&self, sample_idx: u64) -> String {
        let (shard, place) = self.place(sample_idx);
        let member = Members::of(shard.bytes())
            .flatten()
            .find(|member| member.range.start == place.image_at);
        let name = member.map_or(std::borrow::Cow::Borrowed(""), |member| member.name);
        format!("{}: {name}", shard.name())
    }
}

fn index_shard(map: &Map, shard: u32, samples: &mut Vec<Place>) -> Result<(), DatasetError> {
    let damaged = |what: String| DatasetError::damaged(map.name(), what);
    let mut group = Group::default();
    for member in Members::of(map.bytes()) {
        let Member { name, range } = member.map_err(damaged)?;
        let Some((key, extension)) = key_and_extension(&name) else { continue };
        if group.key != key {
            finish(&mut group, map, shard, samples)?;
            key.clone_into(&mut group.key);
        }
        let wrong = |what: String| DatasetError::unsupported(map.name(), format!("{name}: {what}"));
        let extension = extension.to_ascii_lowercase();
        if IMAGE_EXTENSIONS.contains(&extension.as_str()) {
            if group.image.is_some() {
                return Err(wrong(
                    "a second image of one sample; give each its own name".to_owned(),
                ));
            }
            if range.len() as u64 > limits::ENCODED_BYTES_MAX {
                return Err(wrong(format!("{} bytes are too many for an image", range.len())));
            }
            group.image = Some((range.start, range.len()));
        } else if extension == "cls" || extension == "json" {
            let content = map.bytes().get(range).unwrap_or_default();
            let class =
                if extension == "cls" { class_of_text(content) } else { class_of_json(content) };
            match class {
                Ok(class) if extension == "cls" => group.class = Some(class),
                Ok(class) => group.class_in_json = Some(class),
                // A json file beside a cls file need not hold the class.
                Err(what) if extension == "json" => group.problem = Some(what),
                Err(what) => return Err(wrong(what)),
            }
        }
    }
    finish(&mut group, map, shard, samples)
}

/// Ends a sample: it must be whole by now.
fn finish(
    group: &mut Group,
    map: &Map,
    shard: u32,
    samples: &mut Vec<Place>,
) -> Result<(), DatasetError> {
    let Group { key, image, class, class_in_json, problem } = std::mem::take(group);
    let class = class.or(class_in_json);
    let lacks = |what: &str| {
        let cure = "put it side by side with the sample's other files";
        DatasetError::unsupported(map.name(), format!("sample '{key}' has no {what}; {cure}"))
    };
    match (image, class) {
        (None, None) => Ok(()), // Other files.
        (None, Some(_)) => Err(lacks("image (.jpg, .jpeg, .png, .webp, .bmp, .ppm, .pgm)")),
        (Some(_), None) => match problem {
            Some(problem) => Err(lacks(&format!("class in its .json file: {problem}"))),
            None => Err(lacks("class: a .cls file, or a .json file with a 'label'")),
        },
        (Some((image_at, image_bytes)), Some(class)) => {
            samples.push(Place { shard, image_at, image_bytes, class });
            Ok(())
        }
    }
}

/// A member's key and extension; `None` for what is not of a sample.
fn key_and_extension(name: &str) -> Option<(&str, &str)> {
    let base_at = name.rfind('/').map_or(0, |slash| slash + 1);
    let base = &name[base_at..];
    let dot = base.find('.').filter(|dot| *dot > 0)?;
    let is_meta = base.starts_with("__") && base[..dot].ends_with("__");
    (!is_meta).then(|| (&name[..base_at + dot], &base[dot + 1..]))
}

fn class_of_text(content: &[u8]) -> Result<i64, String> {
    let text = content.get(..LABEL_BYTES_MAX.min(content.len())).unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    check_class(text.trim().parse().ok())
        .ok_or_else(|| format!("'{}' is no class number: write 0, 1, …", shortened(text.trim())))
}

fn class_of_json(content: &[u8]) -> Result<i64, String> {
    if content.len() > LABEL_BYTES_MAX {
        return Err(format!("{} bytes are too many for a label", content.len()));
    }
    let json: serde_json::Value =
        serde_json::from_slice(content).map_err(|cause| format!("no JSON: {cause}"))?;
    let value = match &json {
        serde_json::Value::Object(keys) => JSON_KEYS.iter().find_map(|key| keys.get(*key)),
        other => Some(other),
    };
    let class = value.and_then(|value| check_class(value.as_i64()));
    class.ok_or_else(|| format!("no class number under any of {}", JSON_KEYS.join(", ")))
}

fn check_class(class: Option<i64>) -> Option<i64> {
    class.filter(|class| *class >= 0)
}

fn shortened(text: &str) -> String {
    text.chars().take(limits::QUOTE_CHARS_MAX).collect::<String>().escape_debug().to_string()
}

/// The shards in a folder that belong to a split, in the order of their names.
pub(super) fn shards_in_folder(folder: &Path, split: &str) -> Vec<PathBuf> {
    let mut shards: Vec<(String, PathBuf)> = tars_in(folder);
    shards.retain(|(name, _)| split_of(name) == Some(split));
    shards.into_iter().map(|(_, path)| path).collect()
}

/// A folder's shards, if their names tell one split, or none: then they are whatever they are used
/// as. Empty if they are of several splits.
pub(super) fn whole_folder(folder: &Path) -> Vec<PathBuf> {
    let shards = tars_in(folder);
    let is_mixed = shards.windows(2).any(|pair| split_of(&pair[0].0) != split_of(&pair[1].0));
    if is_mixed { Vec::new() } else { shards.into_iter().map(|(_, path)| path).collect() }
}

fn tars_in(folder: &Path) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let named =
        entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())));
    let mut tars: Vec<_> =
        named.filter(|(name, path)| is_tar_name(name) && path.is_file()).collect();
    tars.sort();
    tars
}

pub(super) fn is_tar_name(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| extension.eq_ignore_ascii_case("tar"))
}

/// The split that a shard's name tells.
pub(super) fn split_of(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    let words: Vec<&str> = name.split(|letter: char| !letter.is_ascii_alphabetic()).collect();
    let has = |word: &str| words.contains(&word);
    if has("val") || has("valid") || has("validation") {
        return Some("val");
    }
    if has("test") {
        return Some("test");
    }
    has("train").then_some("train")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cases of `webdataset.tariterators.base_plus_ext`.
    #[test]
    fn keys_end_at_the_first_dot_of_the_last_part() {
        let check = |name, expected| assert_eq!(key_and_extension(name), expected, "{name}");
        check("a.jpg", Some(("a", "jpg")));
        check("a.b.jpg", Some(("a", "b.jpg")));
        check("x.y/a.seg.png", Some(("x.y/a", "seg.png")));
        check("./a.cls", Some(("./a", "cls")));
        check("folder/noext", None);
        check(".hidden", None);
        check("__info__.json", None);
    }

    #[test]
    fn names_of_shards_tell_the_split() {
        assert_eq!(split_of("imagenet-train-000123.tar"), Some("train"));
        assert_eq!(split_of("ImageNet_VAL_0.tar"), Some("val"));
        assert_eq!(split_of("test.tar"), Some("test"));
        assert_eq!(split_of("shard-00.tar"), None);
        assert_eq!(split_of("contest-00.tar"), None);
    }

    #[test]
    fn classes_are_numbers() {
        assert_eq!(class_of_text(b" 17\n"), Ok(17));
        assert_eq!(class_of_json(br#"{"caption": "x", "label": 3}"#), Ok(3));
        assert_eq!(class_of_json(b"5"), Ok(5));
        for wrong in [&b""[..], b"cat", b"-1", b"1.5", b"\xff"] {
            assert!(class_of_text(wrong).unwrap_err().contains("is no class number"));
        }
        assert!(class_of_json(b"{").unwrap_err().contains("no JSON"));
        assert!(class_of_json(br#"{"label": "cat"}"#).unwrap_err().contains("under any of label"));
    }
}
