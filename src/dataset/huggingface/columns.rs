//! Where the image and class columns lie in a record batch.
//!
//! A record batch lists nodes (length, nulls) and buffers of all fields, depth first; each type has
//! its own number of buffers.
//!
//! *Source*: Arrow Columnar Format, "Buffer Listing for Each Layout" and "RecordBatch message".

use std::ops::Range;

use arrow_ipc as ipc;

/// The numbers of nodes and buffers before a field, or in it.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    nodes: usize,
    buffers: usize,
}

impl Count {
    fn plus(self, other: Self) -> Self {
        Self { nodes: self.nodes + other.nodes, buffers: self.buffers + other.buffers }
    }
}

/// Where a file's columns are listed in its record batches.
#[derive(Debug)]
pub(super) struct Columns {
    /// The image struct's own node and buffers; those of `bytes` come after it.
    image: Count,
    bytes: Count,
    /// Whether `bytes` has 64-bit offsets.
    is_large: bool,
    label: Count,
    total: Count,
}

/// One record batch's columns, in bytes of the file.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) n_rows: u64,
    offsets_at: usize,
    is_large: bool,
    data: Range<usize>,
    /// Bitmaps of the struct and of its bytes, where something is missing.
    validity: [Option<usize>; 2],
    labels_at: usize,
}

impl Columns {
    /// Finds the columns numbered `image` and `label` among the schema's fields.
    ///
    /// # Errors
    /// They have other types than `datasets` gives them, or there is a column of a type whose
    /// buffers are not known.
    pub(super) fn of(
        fields: &[ipc::Field<'_>],
        image: usize,
        label: usize,
    ) -> Result<Self, String> {
        let mut starts = Vec::new();
        let mut total = Count::default();
        for field in fields {
            starts.push(total);
            total = total.plus(count(*field, 0)?);
        }
        let children: Vec<_> = fields[image].children().into_iter().flatten().collect();
        let mut bytes = starts[image].plus(Count { nodes: 1, buffers: 1 });
        let mut found = None;
        if fields[image].type_type() == ipc::Type::Struct_ {
            for child in children {
                if child.name() == Some("bytes") {
                    found = Some(child);
                    break;
                }
                bytes = bytes.plus(count(child, 1)?);
            }
        }
        let is_large = match found.map(|child| child.type_type()) {
            Some(ipc::Type::Binary) => false,
            Some(ipc::Type::LargeBinary) => true,
            _ => return Err("its image column is no struct with binary 'bytes'".to_owned()),
        };
        let is_class = fields[label].dictionary().is_none()
            && fields[label]
                .type_as_int()
                .is_some_and(|int| int.bitWidth() == 64 && int.is_signed());
        if !is_class {
            return Err("its class column is not Int64".to_owned());
        }
        Ok(Self { image: starts[image], bytes, is_large, label: starts[label], total })
    }

    /// Finds the columns of a record batch whose body is `body`.
    ///
    /// # Errors
    /// It is compressed, lacks classes, or lists other buffers than its schema stands for.
    pub(super) fn find_in(
        &self,
        batch: ipc::RecordBatch<'_>,
        body: Range<usize>,
    ) -> Result<Batch, String> {
        if batch.compression().is_some() {
            return Err("it is compressed, so it cannot be mapped; save it without".to_owned());
        }
        let n_rows = u64::try_from(batch.length()).map_err(|_| "a batch of negative length")?;
        let nodes: Vec<_> = batch.nodes().into_iter().flatten().collect();
        let buffers: Vec<_> = batch.buffers().into_iter().flatten().collect();
        if nodes.len() != self.total.nodes || buffers.len() != self.total.buffers {
            return Err("a batch lists other columns than the schema".to_owned());
        }
        let is_of_all = |node: usize| u64::try_from(nodes[node].length()) == Ok(n_rows);
        if ![self.image.nodes, self.bytes.nodes, self.label.nodes].into_iter().all(is_of_all) {
            return Err(format!("a batch's columns do not all have {n_rows} rows"));
        }
        if nodes[self.label.nodes].null_count() != 0 {
            return Err("some samples have no class; filter them out".to_owned());
        }
        let n = usize::try_from(n_rows).map_err(|_| "a batch of impossible length")?;
        let range = |buffer: usize, needed: Option<usize>| {
            let start = usize::try_from(buffers[buffer].offset()).ok();
            let start = start.and_then(|offset| body.start.checked_add(offset));
            let len = usize::try_from(buffers[buffer].length()).ok();
            let found = start.zip(len).and_then(|(start, len)| {
                let end = start.checked_add(len).filter(|end| *end <= body.end)?;
                (needed? <= len).then_some(start..end)
            });
            found.ok_or_else(|| "a batch's columns do not fit into it".to_owned())
        };
        let bitmap = |place: Count| match nodes[place.nodes].null_count() {
            0 => Ok(None),
            _ => range(place.buffers, Some(n.div_ceil(8))).map(|found| Some(found.start)),
        };
        let offset_bytes = if self.is_large { 8 } else { 4 };
        // An empty batch may leave its offsets out.
        let n_offsets = if n == 0 { 0 } else { n + 1 };
        Ok(Batch {
            n_rows,
            offsets_at: range(self.bytes.buffers + 1, n_offsets.checked_mul(offset_bytes))?.start,
            is_large: self.is_large,
            data: range(self.bytes.buffers + 2, Some(0))?,
            validity: [bitmap(self.image)?, bitmap(self.bytes)?],
            labels_at: range(self.label.buffers + 1, n.checked_mul(8))?.start,
        })
    }
}

impl Batch {
    /// The encoded image of a row.
    pub(super) fn image<'a>(&self, file: &'a [u8], row: usize) -> Result<&'a [u8], String> {
        let is_there = |bitmap: Option<usize>| {
            bitmap.is_none_or(|at| file[at + row / 8] & (1 << (row % 8)) != 0)
        };
        if !self.validity.into_iter().all(is_there) {
            return Err("it holds no image, but a path or nothing; embed the images \
                        (`Image(decode=True)` and save the dataset anew)"
                .to_owned());
        }
        let offset = |row: usize| {
            if self.is_large {
                i64::from_le_bytes(array_at(file, self.offsets_at + 8 * row))
            } else {
                i64::from(i32::from_le_bytes(array_at(file, self.offsets_at + 4 * row)))
            }
        };
        let place = |row| usize::try_from(offset(row)).ok()?.checked_add(self.data.start);
        let range = place(row)
            .zip(place(row + 1))
            .filter(|(start, end)| start <= end && *end <= self.data.end);
        let (start, end) = range.ok_or("its offsets make no sense: the file is damaged")?;
        Ok(&file[start..end])
    }

    /// The class of a row.
    pub(super) fn class(&self, file: &[u8], row: usize) -> i64 {
        i64::from_le_bytes(array_at(file, self.labels_at + 8 * row))
    }
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..].first_chunk().expect("the column's range was checked when the file was opened")
}

/// Fields in fields: deeper ones are damage.
const DEPTH_MAX: usize = 16;

/// How many nodes and buffers a field lists, with all in it.
fn count(field: ipc::Field<'_>, depth: usize) -> Result<Count, String> {
    use ipc::Type;

    let name = || field.name().unwrap_or("").escape_debug().to_string();
    if depth > DEPTH_MAX {
        return Err(format!("column '{}' is nested too deep", name()));
    }
    if field.dictionary().is_some() {
        return Ok(Count { nodes: 1, buffers: 2 });
    }
    let buffers = match field.type_type() {
        Type::Null => 0,
        Type::Struct_ | Type::FixedSizeList => 1,
        Type::Int
        | Type::FloatingPoint
        | Type::Bool
        | Type::Decimal
        | Type::Date
        | Type::Time
        | Type::Timestamp
        | Type::Interval
        | Type::Duration
        | Type::FixedSizeBinary
        | Type::List
        | Type::LargeList
        | Type::Map => 2,
        Type::Utf8 | Type::Binary | Type::LargeUtf8 | Type::LargeBinary => 3,
        other => return Err(format!("column '{}' has the unknown type {other:?}", name())),
    };
    let own = Count { nodes: 1, buffers };
    let children = field.children().into_iter().flatten();
    children.map(|child| count(child, depth + 1)).try_fold(own, |sum, child| Ok(sum.plus(child?)))
}
