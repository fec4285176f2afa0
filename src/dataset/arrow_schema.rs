//! The schema of a packed split: its columns and metadata, both ways.
//!
//! | column | type | content |
//! |---|---|---|
//! | `image` | FixedSizeBinary(h·w·c) | raw pixels, `[height, width, channels] u8` |
//! | | Binary | image files (version 2) |
//! | `label` | Int64, or FixedSizeList(Float32, len) | a class, or a vector |
//! | `checksum` | UInt32 | [`super::sample_checksum`] |
//!
//! | metadata | content |
//! |---|---|
//! | `fastaa.version` | `1`: raw pixels; `2`: image files |
//! | `fastaa.shape` | `h,w,c` (version 1) |
//! | `fastaa.turn` | `true` if images are to be turned by their EXIF orientation (version 2) |
//! | `fastaa.n_samples`, `fastaa.n_classes` | counts; 0 classes if labels are vectors |
//! | `fastaa.class_names` | JSON list of strings, may be empty |
//! | `fastaa.fingerprint` | 32 hex digits, over shape, checksums and labels |
//! | `fastaa.split`, `fastaa.source` | where it came from, for people |
//!
//! Reads the schema from the flatbuffer itself, which `arrow-ipc` has verified: conversion to an
//! `arrow_schema::Schema` would accept (and on some inputs has panicked on) types that are refused
//! here anyway.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_ipc as ipc;
use arrow_schema::{DataType, Field, Schema};

use super::digest::FINGERPRINT_CHARS;
use super::{DatasetError, Fingerprint, ImageKind, LabelKind, idx};
use crate::limits;

/// Versions of the layout that are written and read: of raw pixels, and of image files.
const VERSIONS: [&str; 2] = ["1", "2"];

/// What a packed file says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PackedMeta {
    pub(super) images: ImageKind,
    pub(super) n_samples: u64,
    pub(super) label_kind: LabelKind,
    pub(super) class_names: Vec<String>,
    pub(super) fingerprint: Fingerprint,
    pub(super) split: String,
    pub(super) source: String,
}

impl PackedMeta {
    /// Bytes of one image, if all have as many.
    pub(super) fn image_bytes(&self) -> Option<usize> {
        match self.images {
            ImageKind::Raw { height, width, channels } => Some(height * width * channels),
            ImageKind::Encoded { .. } => None,
        }
    }

    /// The schema to write.
    ///
    /// # Errors
    /// The image is too large for an Arrow column (limits.rs allows none that is).
    pub(super) fn to_schema(&self, name: &str) -> Result<Schema, DatasetError> {
        let image_type = match self.image_bytes().map(i32::try_from) {
            None => DataType::Binary,
            Some(Ok(image_bytes)) => DataType::FixedSizeBinary(image_bytes),
            Some(Err(_)) => {
                return Err(DatasetError::unsupported(name, "images of more than 2 GiB"));
            }
        };
        let (version, image_key, image_value) = match self.images {
            ImageKind::Raw { height, width, channels } => {
                (VERSIONS[0], "fastaa.shape", format!("{height},{width},{channels}"))
            }
            ImageKind::Encoded { turns_by_exif } => {
                (VERSIONS[1], "fastaa.turn", turns_by_exif.to_string())
            }
        };
        let (label_type, n_classes) = match self.label_kind {
            LabelKind::Class { n_classes } => (DataType::Int64, n_classes),
            LabelKind::Vector { len } => (vector_type(len, name)?, 0),
        };
        let class_names = serde_json::Value::from(self.class_names.clone());
        let metadata: HashMap<String, String> = [
            ("fastaa.version", version.to_owned()),
            (image_key, image_value),
            ("fastaa.fingerprint", self.fingerprint.0.clone()),
            ("fastaa.n_samples", self.n_samples.to_string()),
            ("fastaa.n_classes", n_classes.to_string()),
            ("fastaa.class_names", class_names.to_string()),
            ("fastaa.split", self.split.clone()),
            ("fastaa.source", self.source.clone()),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
        let fields = vec![
            Field::new("image", image_type, false),
            Field::new("label", label_type, false),
            Field::new("checksum", DataType::UInt32, false),
        ];
        Ok(Schema::new_with_metadata(fields, metadata))
    }

    /// Reads and checks the schema of the file that errors call `name`.
    ///
    /// # Errors
    /// Other columns than those of a packed split, metadata missing, wrong or of a newer version.
    pub(super) fn from_schema(schema: ipc::Schema<'_>, name: &str) -> Result<Self, DatasetError> {
        let fail = |what: String| DatasetError::ArrowSchema { path: name.to_owned(), what };
        if schema.endianness() != ipc::Endianness::Little {
            return Err(fail("it is big-endian".to_owned()));
        }
        let columns = Columns::read(schema).map_err(&fail)?;
        let metadata = Metadata::read(schema);
        let meta = metadata.parse(columns.label, columns.image_bytes.is_none()).map_err(&fail)?;
        if let ImageKind::Raw { height, width, channels } = meta.images {
            let shape = [height, width, channels];
            idx::check_shape(shape, name)?;
            let (has, needs) = (columns.image_bytes.unwrap_or(0), height * width * channels);
            if has != needs {
                return Err(fail(format!(
                    "column 'image' has {has} bytes a sample, but shape {shape:?} needs {needs}"
                )));
            }
        }
        Ok(meta)
    }
}

/// The Arrow type of vector labels.
pub(super) fn vector_type(len: u32, name: &str) -> Result<DataType, DatasetError> {
    match i32::try_from(len) {
        Ok(list_len) if (1..=limits::LABEL_VECTOR_LEN_MAX).contains(&len) => {
            Ok(DataType::FixedSizeList(vector_item(), list_len))
        }
        _ => Err(DatasetError::unsupported(
            name,
            format!("label vectors of {len} elements; 1 to {}", limits::LABEL_VECTOR_LEN_MAX),
        )),
    }
}

/// The field of a vector's elements.
pub(super) fn vector_item() -> Arc<Field> {
    Arc::new(Field::new("item", DataType::Float32, false))
}

/// The column types, as far as they vary.
#[derive(Debug)]
struct Columns {
    /// `None`: of any number.
    image_bytes: Option<usize>,
    label: LabelColumn,
}

#[derive(Clone, Copy, Debug)]
enum LabelColumn {
    Class,
    Vector(u32),
}

impl Columns {
    fn read(schema: ipc::Schema<'_>) -> Result<Self, String> {
        let fields: Vec<_> = schema.fields().map(|all| all.iter().collect()).unwrap_or_default();
        let names: Vec<_> = fields.iter().map(|field| field.name().unwrap_or("")).collect();
        if names != ["image", "label", "checksum"] {
            let names = quoted(&names.join(", "));
            return Err(format!("its columns are {names}, not 'image, label, checksum'"));
        }
        if let Some(field) = fields.iter().find(|field| field.dictionary().is_some()) {
            let column = field.name().unwrap_or("");
            return Err(format!("column '{column}' is dictionary-encoded"));
        }
        let [image, label, checksum] = fields[..] else {
            return Err("it has not three columns".to_owned());
        };
        let image_bytes = match image.type_type() {
            ipc::Type::Binary => None,
            _ => Some(
                image
                    .type_as_fixed_size_binary()
                    .and_then(|kind| usize::try_from(kind.byteWidth()).ok())
                    .ok_or("column 'image' is neither FixedSizeBinary nor Binary")?,
            ),
        };
        let label = if is_int(label, 64, true) {
            LabelColumn::Class
        } else {
            let what = "column 'label' is neither Int64 nor FixedSizeList of Float32";
            LabelColumn::Vector(vector_len(label).ok_or(what)?)
        };
        if !is_int(checksum, 32, false) {
            return Err("column 'checksum' is not UInt32".to_owned());
        }
        Ok(Self { image_bytes, label })
    }
}

fn is_int(field: ipc::Field<'_>, bits: i32, signed: bool) -> bool {
    field.type_as_int().is_some_and(|int| int.bitWidth() == bits && int.is_signed() == signed)
}

fn vector_len(field: ipc::Field<'_>) -> Option<u32> {
    let list = field.type_as_fixed_size_list()?;
    let items: Vec<_> = field.children()?.iter().collect();
    let [item] = items[..] else { return None };
    let is_f32 = item.type_as_floating_point()?.precision() == ipc::Precision::SINGLE;
    let len = u32::try_from(list.listSize()).ok()?;
    (is_f32 && (1..=limits::LABEL_VECTOR_LEN_MAX).contains(&len)).then_some(len)
}

/// The schema's metadata as text.
#[derive(Debug)]
struct Metadata<'a>(HashMap<&'a str, &'a str>);

impl<'a> Metadata<'a> {
    fn read(schema: ipc::Schema<'a>) -> Self {
        let pairs = schema.custom_metadata().into_iter().flatten();
        Self(pairs.filter_map(|pair| Some((pair.key()?, pair.value()?))).collect())
    }

    fn get(&self, key: &str) -> Result<&'a str, String> {
        self.0.get(key).copied().ok_or_else(|| format!("metadata '{key}' is missing"))
    }

    fn number(&self, key: &str, max: u64) -> Result<u64, String> {
        let text = self.get(key)?;
        match text.parse::<u64>() {
            Ok(number) if number <= max => Ok(number),
            _ => Err(format!("metadata '{key}' is {}, not a number up to {max}", quoted(text))),
        }
    }

    fn parse(&self, label: LabelColumn, is_encoded: bool) -> Result<PackedMeta, String> {
        let version = self.get("fastaa.version")?;
        if !VERSIONS.contains(&version) {
            let version = quoted(version);
            let known = VERSIONS.join(" and ");
            return Err(format!(
                "metadata 'fastaa.version' is {version}, but this program reads versions {known}: \
                 pack it again, or use the program that wrote it"
            ));
        }
        if is_encoded != (version == VERSIONS[1]) {
            return Err(format!("column 'image' is not of the type that version {version} has"));
        }
        let images = if is_encoded {
            let turn = self.get("fastaa.turn")?;
            let turns_by_exif = turn.parse().map_err(|_| {
                format!("metadata 'fastaa.turn' is {}, not true or false", quoted(turn))
            })?;
            ImageKind::Encoded { turns_by_exif }
        } else {
            let [height, width, channels] = self.shape()?;
            ImageKind::Raw { height, width, channels }
        };
        let fingerprint = self.get("fastaa.fingerprint")?;
        let is_hex = fingerprint.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if fingerprint.len() != FINGERPRINT_CHARS || !is_hex {
            let found = quoted(fingerprint);
            return Err(format!(
                "metadata 'fastaa.fingerprint' is {found}, not {FINGERPRINT_CHARS} hex digits"
            ));
        }
        let n_samples = self.number("fastaa.n_samples", limits::SAMPLES_MAX)?;
        let n_classes = self.number("fastaa.n_classes", limits::CLASSES_MAX.into())?;
        let n_classes = u32::try_from(n_classes).map_err(|cause| cause.to_string())?;
        let label_kind = match label {
            LabelColumn::Class if n_classes == 0 => {
                return Err("metadata 'fastaa.n_classes' is 0, but labels are classes".to_owned());
            }
            LabelColumn::Class => LabelKind::Class { n_classes },
            LabelColumn::Vector(len) => LabelKind::Vector { len },
        };
        let class_names = self.get("fastaa.class_names")?;
        let class_names: Vec<String> = serde_json::from_str(class_names).map_err(|cause| {
            format!("metadata 'fastaa.class_names' is not a JSON list of strings: {cause}")
        })?;
        check_class_names(label_kind, &class_names)?;
        Ok(PackedMeta {
            images,
            n_samples,
            label_kind,
            class_names,
            fingerprint: Fingerprint(fingerprint.to_owned()),
            split: self.get("fastaa.split")?.to_owned(),
            source: self.get("fastaa.source")?.to_owned(),
        })
    }

    fn shape(&self) -> Result<[usize; 3], String> {
        let text = self.get("fastaa.shape")?;
        let sides: Option<Vec<usize>> = text.split(',').map(|side| side.parse().ok()).collect();
        sides
            .and_then(|sides| sides.try_into().ok())
            .ok_or_else(|| format!("metadata 'fastaa.shape' is {}, not 'h,w,c'", quoted(text)))
    }
}

/// Checks that there is a name for each class, or none at all.
pub(super) fn check_class_names(label_kind: LabelKind, names: &[String]) -> Result<(), String> {
    match label_kind {
        LabelKind::Class { n_classes }
            if !names.is_empty() && names.len() != n_classes as usize =>
        {
            Err(format!("{} class names for {n_classes} classes", names.len()))
        }
        LabelKind::Vector { len } if !names.is_empty() && names.len() != len as usize => {
            Err(format!("{} class names for label vectors of {len} elements", names.len()))
        }
        _ => Ok(()),
    }
}

/// A value for an error message: quoted, control characters escaped, shortened if it is long.
fn quoted(text: &str) -> String {
    let mut chars = text.chars();
    let short: String = chars.by_ref().take(limits::QUOTE_CHARS_MAX).collect();
    let more = if chars.next().is_some() { "…" } else { "" };
    format!("'{}{more}'", short.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_ipc::convert::IpcSchemaEncoder;
    use arrow_ipc::writer::DictionaryTracker;

    fn meta() -> PackedMeta {
        PackedMeta {
            images: ImageKind::Raw { height: 4, width: 5, channels: 3 },
            n_samples: 7,
            label_kind: LabelKind::Class { n_classes: 2 },
            class_names: vec!["a \"b\"".to_owned(), "ç".to_owned()],
            fingerprint: Fingerprint("0123456789abcdef0123456789abcdef".to_owned()),
            split: "train".to_owned(),
            source: "somewhere".to_owned(),
        }
    }

    fn read(schema: &Schema) -> Result<PackedMeta, String> {
        let mut tracker = DictionaryTracker::new(true);
        let encoder = IpcSchemaEncoder::new().with_dictionary_tracker(&mut tracker);
        let encoded = { encoder }.schema_to_fb(schema);
        let schema = ipc::root_as_schema(encoded.finished_data()).unwrap();
        PackedMeta::from_schema(schema, "f.arrow").map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_written_is_read() {
        let vector =
            PackedMeta { label_kind: LabelKind::Vector { len: 2 }, n_samples: 1, ..meta() };
        let images = ImageKind::Raw { height: 1, width: 1, channels: 1 };
        let nameless = PackedMeta { class_names: Vec::new(), images, ..meta() };
        let encoded = [true, false].map(|turns_by_exif| PackedMeta {
            images: ImageKind::Encoded { turns_by_exif },
            ..meta()
        });
        for meta in [meta(), vector, nameless].into_iter().chain(encoded) {
            assert_eq!(read(&meta.to_schema("f").unwrap()), Ok(meta));
        }
    }

    #[test]
    fn wrong_metadata_is_named() {
        let check = |key: &str, value: Option<&str>, expected: &str| {
            let schema = meta().to_schema("f").unwrap();
            let mut metadata: HashMap<String, String> =
                schema.metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
            metadata.remove(key);
            metadata.extend(value.map(|value| (key.to_owned(), value.to_owned())));
            let text = read(&schema.with_metadata(metadata)).unwrap_err();
            assert!(text.starts_with("f.arrow: ") && text.contains(expected), "{text}");
        };
        check("fastaa.version", None, "'fastaa.version' is missing");
        check("fastaa.version", Some("3"), "is '3', but this program reads versions 1 and 2");
        check("fastaa.version", Some("2"), "not of the type that version 2 has");
        check("fastaa.shape", Some("4,5"), "is '4,5', not 'h,w,c'");
        check("fastaa.shape", Some("4,5,1"), "60 bytes a sample, but shape [4, 5, 1] needs 20");
        check("fastaa.shape", Some("0,5,3"), "sides must be 1 to");
        check("fastaa.shape", Some("18446744073709551615,9,9"), "sides must be 1 to");
        check("fastaa.shape", Some("3,4,5"), "5 channels");
        check("fastaa.fingerprint", Some("xyz"), "is 'xyz', not 32 hex digits");
        check("fastaa.n_samples", Some("-1"), "is '-1', not a number");
        check("fastaa.n_classes", Some("99999999"), "not a number up to");
        check("fastaa.n_classes", Some("0"), "is 0, but labels are classes");
        check("fastaa.n_classes", Some("3"), "2 class names for 3 classes");
        check("fastaa.class_names", Some("[1]"), "not a JSON list of strings");
        check("fastaa.split", None, "'fastaa.split' is missing");
        check("fastaa.version", Some(&"é".repeat(500)), "é…'");
    }

    #[test]
    fn wrong_columns_are_named() {
        let check = |change: &dyn Fn(&mut Vec<Field>), expected: &str| {
            let schema = meta().to_schema("f").unwrap();
            let mut fields: Vec<Field> = schema.fields.iter().map(|f| (**f).clone()).collect();
            change(&mut fields);
            let changed = Schema::new(fields).with_metadata(schema.metadata.clone());
            let text = read(&changed).unwrap_err();
            assert!(text.contains("not a packed split") && text.contains(expected), "{text}");
            assert!(text.contains("fastaa-ctl dataset pack"), "{text}");
        };
        check(&|fields| fields.truncate(2), "its columns are 'image, label'");
        check(&|fields| fields.swap(0, 1), "its columns are 'label, image, checksum'");
        let set = |at: usize, kind: DataType| {
            move |fields: &mut Vec<Field>| {
                fields[at] = fields[at].clone().with_data_type(kind.clone());
            }
        };
        check(&set(0, DataType::Utf8), "'image' is neither FixedSizeBinary");
        check(&set(1, DataType::Int32), "'label' is neither");
        check(&set(1, DataType::UInt64), "'label' is neither");
        let doubles = Arc::new(Field::new("item", DataType::Float64, false));
        check(&set(1, DataType::FixedSizeList(doubles, 2)), "'label' is neither");
        check(&set(2, DataType::Int32), "'checksum' is not UInt32");
        let dictionary = DataType::Dictionary(DataType::Int32.into(), DataType::Utf8.into());
        check(&set(1, dictionary), "'label' is dictionary-encoded");
    }
}
