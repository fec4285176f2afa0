//! Which files a tar archive holds, and where: read off the mapped archive, nothing is unpacked.
//!
//! Reads what `tar`, Python's `tarfile` and the `webdataset` writer write: ustar headers, GNU long
//! names (type `L`), pax headers (types `x`, `g`; of their records, `path` and `size`) and sizes in
//! base 256. Folders, links and devices are passed over.
//!
//! *Source*: POSIX.1-2017, `pax`, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
//!
//! *Invariants*: a member's range lies in the archive; a cut off archive is an error.

use std::borrow::Cow;
use std::ops::Range;

const BLOCK_BYTES: usize = 512;

/// Longest name that is read, in bytes: what file systems allow.
const NAME_BYTES_MAX: usize = 4096;

/// A regular file in the archive.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Member<'a> {
    pub(super) name: Cow<'a, str>,
    /// Its content, in bytes of the archive.
    pub(super) range: Range<usize>,
}

/// The members of an archive, in order.
#[derive(Debug)]
pub(super) struct Members<'a> {
    bytes: &'a [u8],
    at: usize,
    is_over: bool,
}

impl<'a> Members<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, is_over: false }
    }

    /// The next member; an error is the last item.
    fn read(&mut self) -> Result<Option<Member<'a>>, String> {
        let (mut long_name, mut long_size) = (None, None);
        loop {
            let Some(header) = self.block(self.at)? else { return Ok(None) };
            check_sum(header).map_err(|what| format!("{what} at byte {}", self.at))?;
            let kind = header[156];
            let own_size = number(&header[124..136])
                .ok_or_else(|| format!("a header without a size at byte {}", self.at))?;
            let is_file = matches!(kind, b'0' | 0 | b'7');
            let size = match long_size {
                Some(size) if is_file => size,
                _ => own_size,
            };
            let start = self.at + BLOCK_BYTES;
            let end = start.checked_add(size).filter(|end| *end <= self.bytes.len());
            let end = end.ok_or_else(|| {
                format!("the member at byte {} should have {size} bytes: it is cut off", self.at)
            })?;
            self.at = end.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(usize::MAX);
            let content = &self.bytes[start..end];
            match kind {
                b'L' => long_name = Some(text(trimmed(content))?),
                b'x' => {
                    let pax = Pax::read(content)?;
                    long_name = pax.path.or(long_name);
                    long_size = pax.size.or(long_size);
                }
                _ if is_file => {
                    let name = match long_name {
                        Some(name) => name,
                        None => header_name(header)?,
                    };
                    return Ok(Some(Member { name, range: start..end }));
                }
                // Global pax headers, links, folders, devices: not of files.
                _ => (long_name, long_size) = (None, None),
            }
        }
    }

    /// The header block at `at`; `None` at the end of the archive: a block of zeros, or no more.
    fn block(&self, at: usize) -> Result<Option<&'a [u8]>, String> {
        if at >= self.bytes.len() {
            return Ok(None);
        }
        let block = self.bytes.get(at..at + BLOCK_BYTES).ok_or("it is cut off in a header")?;
        Ok(block.iter().any(|byte| *byte != 0).then_some(block))
    }
}

impl<'a> Iterator for Members<'a> {
    type Item = Result<Member<'a>, String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let member = self.read();
        self.is_over = !matches!(member, Ok(Some(_)));
        member.transpose()
    }
}

/// What a pax header says of the next member.
#[derive(Debug, Default)]
struct Pax<'a> {
    path: Option<Cow<'a, str>>,
    size: Option<usize>,
}

impl<'a> Pax<'a> {
    /// Records are "length key=value\n", the length in decimal and counting itself.
    fn read(mut content: &'a [u8]) -> Result<Self, String> {
        let damaged = || "a pax header that makes no sense".to_owned();
        let mut pax = Self::default();
        while !content.is_empty() {
            let space =
                content.iter().take(20).position(|byte| *byte == b' ').ok_or_else(damaged)?;
            let len: usize =
                ascii(&content[..space]).and_then(|len| len.parse().ok()).ok_or_else(damaged)?;
            let record = content.get(space + 1..len.wrapping_sub(1)).ok_or_else(damaged)?;
            content = content.get(len..).ok_or_else(damaged)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(damaged)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => pax.path = Some(text(value)?),
                b"size" => {
                    let size = ascii(value).and_then(|size| size.parse().ok());
                    pax.size = Some(size.ok_or_else(damaged)?);
                }
                _ => {}
            }
        }
        Ok(pax)
    }
}

fn ascii(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// Octal text, or base 256 behind a set bit.
fn number(field: &[u8]) -> Option<usize> {
    if field[0] & 0x80 != 0 {
        let first = usize::from(field[0] & 0x7F);
        return field[1..].iter().try_fold(first, |value, byte| {
            value.checked_mul(256)?.checked_add(usize::from(*byte))
        });
    }
    let digits = ascii(trimmed(field))?.trim_matches(' ');
    if digits.is_empty() {
        return Some(0);
    }
    usize::from_str_radix(digits, 8).ok()
}

/// The sum of a header's bytes, its own field taken as spaces; some old programs sum signed bytes.
fn check_sum(header: &[u8]) -> Result<(), String> {
    let stored = number(&header[148..156]);
    let others = header.iter().enumerate().filter(|(at, _)| !(148..156).contains(at));
    let sum: usize =
        others.map(|(_, byte)| usize::from(*byte)).sum::<usize>() + 8 * usize::from(b' ');
    let n_high =
        header.iter().enumerate().filter(|(at, byte)| !(148..156).contains(at) && **byte > 127);
    let signed = sum.checked_sub(256 * n_high.count());
    if stored == Some(sum) || (stored.is_some() && stored == signed) {
        return Ok(());
    }
    Err("no tar header, or a damaged one,".to_owned())
}

/// Up to the first zero.
fn trimmed(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn text(bytes: &[u8]) -> Result<Cow<'_, str>, String> {
    if bytes.len() > NAME_BYTES_MAX {
        return Err(format!("a name of {} bytes", bytes.len()));
    }
    Ok(String::from_utf8_lossy(bytes))
}

/// A ustar header's name: its prefix field comes before.
fn header_name(header: &[u8]) -> Result<Cow<'_, str>, String> {
    let name = text(trimmed(&header[..100]))?;
    let is_ustar = &header[257..263] == b"ustar\0";
    let prefix = trimmed(&header[345..500]);
    if !is_ustar || prefix.is_empty() {
        return Ok(name);
    }
    Ok(Cow::Owned(format!("{}/{name}", String::from_utf8_lossy(prefix))))
}

/// Whether a file begins as a tar archive does.
pub(super) fn is_tar(first_bytes: &[u8]) -> bool {
    first_bytes.get(..BLOCK_BYTES).is_some_and(|header| check_sum(header).is_ok())
}
