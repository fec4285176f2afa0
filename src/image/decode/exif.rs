//! The EXIF orientation: where it is in a JPEG file, and what it means.
//!
//! *Source*: Exif 2.32, tag 0x0112; the segments of a JPEG file are those of ITU T.81, annex B.

use image::metadata::Orientation;

use super::super::Image;

const START_OF_SCAN: u8 = 0xDA;
const APP1: u8 = 0xE1;
const EXIF_PREFIX: &[u8] = b"Exif\0\0";

/// The orientation that a JPEG file's first EXIF segment names; `None` if there is none, or what
/// is there makes no sense. Only headers before the first scan are looked at.
pub(super) fn of_jpeg(bytes: &[u8]) -> Option<Orientation> {
    let mut found = None;
    walk(bytes, |marker, segment| {
        let exif = if marker == APP1 { segment.strip_prefix(EXIF_PREFIX) } else { None };
        found = exif.map(Orientation::from_exif_chunk);
        exif.is_none()
    });
    found.flatten()
}

/// Where the first scan's header begins; `None` if there is none.
pub(super) fn scan_start(bytes: &[u8]) -> Option<usize> {
    walk(bytes, |_, _| true)
}

/// Shows every segment before the first scan, until `go_on` says no; gives where the scan begins.
fn walk(bytes: &[u8], mut go_on: impl FnMut(u8, &[u8]) -> bool) -> Option<usize> {
    let mut rest = bytes.strip_prefix(&[0xFF, 0xD8])?;
    loop {
        // Any number of fill bytes may stand before a marker.
        while let [0xFF, 0xFF, ..] = rest {
            rest = &rest[1..];
        }
        let [0xFF, marker, tail @ ..] = rest else { return None };
        if matches!(marker, 0x01 | 0xD0..=0xD7) {
            rest = tail;
            continue;
        }
        if *marker == START_OF_SCAN {
            return Some(bytes.len() - rest.len());
        }
        let (len, _) = tail.split_first_chunk::<2>()?;
        let len = usize::from(u16::from_be_bytes(*len));
        let segment = tail.get(2..len)?;
        if !go_on(*marker, segment) {
            return None;
        }
        rest = &tail[len..];
    }
}

/// Whether width and height change places.
pub(super) fn swaps_sides(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
}

/// `src` turned as `orientation` says, as Pillow's `ImageOps.exif_transpose` does.
pub(super) fn turn(src: &Image, orientation: Orientation, dst: &mut Image) {
    let (width, height, channels) = (src.width, src.height, src.channels);
    let (out_width, out_height) =
        if swaps_sides(orientation) { (height, width) } else { (width, height) };
    dst.reset(out_width, out_height, channels);
    let (last_x, last_y) = (width.wrapping_sub(1), height.wrapping_sub(1));
    let places = (0..out_height).flat_map(|y| (0..out_width).map(move |x| (x, y)));
    for ((x, y), pixel) in places.zip(dst.data.chunks_exact_mut(channels)) {
        let (from_x, from_y) = match orientation {
            Orientation::NoTransforms => (x, y),
            Orientation::FlipHorizontal => (last_x - x, y),
            Orientation::Rotate180 => (last_x - x, last_y - y),
            Orientation::FlipVertical => (x, last_y - y),
            Orientation::Rotate90FlipH => (y, x),
            Orientation::Rotate90 => (y, last_y - x),
            Orientation::Rotate270FlipH => (last_x - y, last_y - x),
            Orientation::Rotate270 => (last_x - y, x),
        };
        let at = (from_y * width + from_x) * channels;
        pixel.copy_from_slice(&src.data[at..at + channels]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_that_make_no_sense_have_no_orientation() {
        let tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0";
        let exif = [EXIF_PREFIX, tiff].concat();
        let segment = |marker: u8, content: &[u8]| {
            let len = u16::try_from(content.len() + 2).unwrap().to_be_bytes();
            [&[0xFF, marker], &len[..], content].concat()
        };
        let file = |parts: &[Vec<u8>]| [&[0xFF, 0xD8][..], &parts.concat()].concat();
        let found = file(&[segment(0xE0, b"JFIF\0"), segment(APP1, &exif)]);
        assert_eq!(of_jpeg(&found), Some(Orientation::Rotate90));
        let other_first = file(&[segment(APP1, b"http://ns.adobe.com/"), segment(APP1, &exif)]);
        assert_eq!(of_jpeg(&other_first), Some(Orientation::Rotate90));
        let after_scan = file(&[segment(START_OF_SCAN, b""), segment(APP1, &exif)]);
        assert_eq!(of_jpeg(&after_scan), None);
        for len in 0..found.len() {
            let _ = of_jpeg(&found[..len]);
        }
        assert_eq!(of_jpeg(&file(&[vec![0xFF, APP1, 0, 1]])), None, "shorter than its own length");
        assert_eq!(of_jpeg(b"\x89PNG"), None);
        assert_eq!(scan_start(&after_scan), Some(2));
        assert_eq!(scan_start(&found), None);
    }

    #[test]
    fn every_orientation_moves_every_pixel_once() {
        let src = Image { width: 3, height: 2, channels: 1, data: vec![1, 2, 3, 4, 5, 6] };
        let expected = [
            (1, vec![1, 2, 3, 4, 5, 6]),
            (2, vec![3, 2, 1, 6, 5, 4]),
            (3, vec![6, 5, 4, 3, 2, 1]),
            (4, vec![4, 5, 6, 1, 2, 3]),
            (5, vec![1, 4, 2, 5, 3, 6]),
            (6, vec![4, 1, 5, 2, 6, 3]),
            (7, vec![6, 3, 5, 2, 4, 1]),
            (8, vec![3, 6, 2, 5, 1, 4]),
        ];
        let mut dst = Image::default();
        for (code, data) in expected {
            turn(&src, Orientation::from_exif(code).unwrap(), &mut dst);
            assert_eq!(dst.data, data, "orientation {code}");
        }
    }
}
