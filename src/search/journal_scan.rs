//! The journal's lines: how one is written, and what of a file's bytes can be trusted.
//!
//! Owns the framing. Never touches files (`journal` does).
//!
//! ```text
//! {"crc":"0f1e2d3c","n":12,"record":{…}}
//! ```
//!
//! Each line is a JSON object in exactly this form. `n` counts from 0, the header. `crc` is the
//! CRC-32 (IEEE) of all that follows it, from `"n"` to the last brace, as 8 lower-case hex digits;
//! it comes first so that what it covers is one run of bytes, whatever the record holds.
//!
//! *Torn or damaged*: a writer that dies leaves at most one line half-written, the last. So a bad
//! line is taken for a torn one, and may be cut off, only if nothing behind its beginning can have
//! been a line: no later line begins like one, and no good line is stuck to its end (as when the
//! newline between two lines is damaged). Everything else is damage, and the file is not trusted.

use std::ops::Range;

/// Every line begins like this; inside a JSON text it can only be a nested object's beginning.
const LINE_START: &str = "{\"crc\":\"";
/// Follows the CRC's digits.
const CRC_END: &str = "\",";
const CRC_CHARS: usize = 8;
const BODY_START: usize = LINE_START.len() + CRC_CHARS + CRC_END.len();

/// Bytes that [`push_line`] adds to a record's own, at most.
pub(super) const FRAME_BYTES_MAX: usize = 64;

/// What a journal's bytes hold.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Scan {
    /// Where the JSON of each good line's record is: the header's, then the records'.
    pub(super) lines: Vec<Range<usize>>,
    /// Length of the good lines together.
    pub(super) good_bytes: usize,
    /// Why what follows them, if anything does, is no line.
    pub(super) torn: Option<&'static str>,
}

/// A line that cannot be trusted and cannot be cut off.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadLine {
    /// Counted from 1.
    pub(super) line: u64,
    /// What is wrong.
    pub(super) what: &'static str,
}

/// Appends the line numbered `number`, newline included, whose record has this JSON.
pub(super) fn push_line(out: &mut Vec<u8>, number: u64, record_json: &[u8]) {
    let mut body = format!("\"n\":{number},\"record\":").into_bytes();
    body.extend_from_slice(record_json);
    body.push(b'}');
    let crc = crc32fast::hash(&body);
    out.extend_from_slice(format!("{LINE_START}{crc:08x}{CRC_END}").as_bytes());
    out.extend_from_slice(&body);
    out.push(b'\n');
}

/// Checks every line. A torn last line is left out; it is never the header, which is written whole.
pub(super) fn scan(bytes: &[u8]) -> Result<Scan, BadLine> {
    let mut lines = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        let rest = &bytes[start..];
        let number = lines.len() as u64;
        match good_line(rest, number) {
            Ok((record, line_bytes)) => {
                lines.push(start + record.start..start + record.end);
                start += line_bytes;
            }
            Err(what) if number > 0 && is_torn(rest) => {
                return Ok(Scan { lines, good_bytes: start, torn: Some(what) });
            }
            Err(what) => return Err(BadLine { line: number + 1, what }),
        }
    }
    if lines.is_empty() {
        return Err(BadLine { line: 1, what: "it is empty" });
    }
    Ok(Scan { lines, good_bytes: start, torn: None })
}

/// Where the record is in the line that `bytes` begins with, and the line's length with its
/// newline.
fn good_line(bytes: &[u8], number: u64) -> Result<(Range<usize>, usize), &'static str> {
    let Some(len) = bytes.iter().position(|&byte| byte == b'\n') else {
        return Err("it does not end");
    };
    let line = &bytes[..len];
    let body = checked_body(line).ok_or("its checksum does not match")?;
    let (found, record_start) = numbered(body).ok_or("it does not have a line's form")?;
    if found != number {
        return Err("its number does not follow the line before it");
    }
    Ok((BODY_START + record_start..len - 1, len + 1))
}

/// The part of a line that its CRC covers, if it matches.
fn checked_body(line: &[u8]) -> Option<&[u8]> {
    let after_start = line.strip_prefix(LINE_START.as_bytes())?;
    let (crc, rest) = after_start.split_at_checked(CRC_CHARS)?;
    let body = rest.strip_prefix(CRC_END.as_bytes())?;
    (format!("{:08x}", crc32fast::hash(body)).as_bytes() == crc).then_some(body)
}

/// A body's number, and where in the body the record begins; the record ends before the last byte.
fn numbered(body: &[u8]) -> Option<(u64, usize)> {
    let rest = body.strip_prefix(b"\"n\":")?;
    let n_digits = rest.iter().position(|byte| !byte.is_ascii_digit())?;
    let number = std::str::from_utf8(&rest[..n_digits]).ok()?.parse().ok()?;
    let record = rest[n_digits..].strip_prefix(b",\"record\":")?;
    record.strip_suffix(b"}")?;
    Some((number, body.len() - record.len()))
}

/// Whether `rest`, which begins with a bad line, can be what a dying writer left of one line.
fn is_torn(rest: &[u8]) -> bool {
    // An intact line in the wrong place was not torn.
    let mut lines = rest.split(|&byte| byte == b'\n');
    let first = lines.next().unwrap_or_default();
    let ends = rest.len() > first.len();
    let is_whole = |line: &[u8]| checked_body(line).and_then(numbered).is_some();
    if ends && is_whole(first) {
        return false;
    }
    let begins_like_a_line = |line: &[u8]| line.starts_with(LINE_START.as_bytes());
    let has_line_inside = || {
        let starts = first.windows(LINE_START.len()).enumerate().skip(1);
        starts
            .filter(|(_, window)| *window == LINE_START.as_bytes())
            .any(|(at, _)| is_whole(&first[at..]))
    };
    !lines.any(begins_like_a_line) && !has_line_inside()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(records: &[&str]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (number, record) in (0..).zip(records) {
            push_line(&mut bytes, number, record.as_bytes());
        }
        bytes
    }

    fn small() -> Vec<u8> {
        // The third holds what looks like a line's beginning, nested and quoted.
        file(&[
            "{\"v\":1}",
            "[1,2]",
            "{\"crc\":{\"crc\":\"00000000\",\"n\":\"{\\\"crc\\\":\\\"\"}}",
            "3",
        ])
    }

    fn records(bytes: &[u8], scan: &Scan) -> Vec<Vec<u8>> {
        scan.lines.iter().map(|range| bytes[range.clone()].to_vec()).collect()
    }

    fn line_ends(bytes: &[u8]) -> Vec<usize> {
        (1..=bytes.len()).filter(|&end| bytes[end - 1] == b'\n').collect()
    }

    #[test]
    fn a_line_is_json_with_the_zlib_crc_of_its_content() {
        // zlib.crc32(b'"n":7,"record":{"x":1.5}}') in Python.
        let mut line = Vec::new();
        push_line(&mut line, 7, b"{\"x\":1.5}");
        let text = String::from_utf8(line).unwrap();
        assert_eq!(
            text,
            format!("{{\"crc\":\"{GOLDEN_CRC}\",\"n\":7,\"record\":{{\"x\":1.5}}}}\n")
        );
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&json["n"], &json["record"]["x"]), (&7.into(), &1.5.into()));
        assert!(text.len() <= 9 + FRAME_BYTES_MAX);
    }

    const GOLDEN_CRC: &str = "d83914c3";

    #[test]
    fn every_truncation_keeps_the_whole_lines_before_it() {
        let bytes = small();
        let all = records(&bytes, &scan(&bytes).unwrap());
        assert_eq!(all.len(), 4);
        let ends = line_ends(&bytes);
        for len in 0..=bytes.len() {
            let n_whole = ends.iter().filter(|&&end| end <= len).count();
            let scanned = scan(&bytes[..len]);
            if n_whole == 0 {
                assert_eq!(scanned.unwrap_err().line, 1, "length {len}");
                continue;
            }
            let scanned = scanned.unwrap();
            assert_eq!(records(&bytes, &scanned), all[..n_whole], "length {len}");
            assert_eq!(scanned.good_bytes, ends[n_whole - 1]);
            assert_eq!(scanned.torn.is_some(), !ends.contains(&len), "length {len}");
        }
    }

    /// Each byte replaced by each other value: in the last line that line goes, elsewhere the file
    /// is refused at the line (or, if a newline became two lines, at the one before).
    #[test]
    fn every_single_damaged_byte_is_found() {
        let bytes = small();
        let all = records(&bytes, &scan(&bytes).unwrap());
        let ends = line_ends(&bytes);
        let last_start = ends[ends.len() - 2];
        for at in 0..bytes.len() {
            for value in (0..=255).filter(|&value| value != bytes[at]) {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                if at >= last_start {
                    let scanned = scan(&damaged).unwrap();
                    assert_eq!(records(&damaged, &scanned), all[..3], "{value} at {at}");
                    assert_eq!(scanned.good_bytes, last_start);
                    assert!(scanned.torn.is_some());
                } else {
                    let line = ends.iter().filter(|&&end| end <= at).count() as u64 + 1;
                    assert_eq!(scan(&damaged).unwrap_err().line, line, "{value} at {at}");
                }
            }
        }
    }

    #[test]
    fn lines_that_are_whole_but_out_of_place_are_damage() {
        let bytes = small();
        let ends = line_ends(&bytes);
        let check = |bytes: Vec<u8>, line: u64| {
            let bad = scan(&bytes).unwrap_err();
            assert_eq!(bad.line, line);
            assert!(bad.what.contains("number"), "{}", bad.what);
        };
        // A line lost in the middle, the last one twice, and the header's lost.
        check([&bytes[..ends[1]], &bytes[ends[2]..]].concat(), 3);
        check([&bytes[..], &bytes[ends[2]..]].concat(), 5);
        check(bytes[ends[0]..].to_vec(), 1);
    }

    #[test]
    fn what_a_crash_of_the_system_leaves_is_torn() {
        let bytes = small();
        for tail in [&[0u8; 4096][..], b"\n", b"{\"crc\":\"", b"{\"crc\":\"00000000\",\"n\":4,\"re"]
        {
            let scanned = scan(&[&bytes[..], tail].concat()).unwrap();
            assert_eq!((scanned.lines.len(), scanned.good_bytes), (4, bytes.len()));
            assert!(scanned.torn.is_some());
        }
        // Two damaged lines are more than one writer can tear.
        let ends = line_ends(&bytes);
        let mut damaged = bytes.clone();
        damaged[ends[1] + 20] ^= 1;
        damaged[ends[2] + 20] ^= 1;
        assert_eq!(scan(&damaged).unwrap_err().line, 3);
    }

    proptest::proptest! {
        /// Pieces of lines in any order: whole lines of both numbers, beginnings, ends, noise.
        #[test]
        fn no_bytes_make_it_panic(pieces in proptest::collection::vec(0usize..9, 0..12)) {
            let lines = file(&["1", "{}"]);
            let first = lines.len() / 2;
            let choices: [&[u8]; 9] = [
                &lines,
                &lines[..first],
                &lines[first..],
                &lines[..20],
                LINE_START.as_bytes(),
                b"{\"crc\":\"00000000\",",
                b"\"n\":99999999999999999999,\"record\":}",
                b"\n",
                b"\0\xff",
            ];
            let bytes: Vec<u8> =
                pieces.iter().flat_map(|&piece| choices[piece]).copied().collect();
            if let Ok(scan) = scan(&bytes) {
                assert!(scan.good_bytes <= bytes.len() && !scan.lines.is_empty());
                assert_eq!(scan.torn.is_some(), scan.good_bytes < bytes.len());
            }
        }
    }
}
