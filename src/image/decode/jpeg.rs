//! JPEG by libjpeg-turbo. The one place of this module with `unsafe`.
//!
//! *Justification*: the safe wrapper on crates.io (`turbojpeg`) neither decodes a part of an image
//! nor tells a warning from an error, and Pillow, whose results are kept to here, goes on after
//! warnings, but not without an end-of-image marker. So this file calls the C functions of
//! `turbojpeg-sys` itself.
//!
//! *Exactness*: the slow integer inverse DCT and smooth ("fancy") upsampling, as Pillow uses them.
//! A part that is decoded alone equals the same part of the whole image bit for bit: the columns
//! and rows whose upsampling looks beyond the part's edge are decoded with it, and left out of what
//! is used ([`Jpeg::decode_part`]).

use std::ffi::{CStr, c_int};

use turbojpeg_sys as raw;

use super::super::PADDED;
use super::{DecodeError, exif};

/// Most scans of a progressive file: each costs a pass over the whole image, and a small file can
/// hold very many.
const SCANS_MAX: c_int = 500;

/// How the messages of libjpeg-turbo's warnings begin.
///
/// *Source*: `jerror.h`, the messages named `JWRN_…`; errors have none of these beginnings. Without
/// "Premature end of JPEG file", after which Pillow does not go on.
const WARNINGS: [&str; 6] = [
    "Corrupt JPEG data: ",
    "Inconsistent progression sequence ",
    "Invalid SOS parameters for sequential JPEG",
    "Unknown Adobe color transform code ",
    "Warning: ",
    "Application transferred too many scanlines",
];

/// A JPEG file's colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Color {
    Gray,
    /// YCbCr or RGB.
    Rgb,
    /// CMYK or YCCK, inverted as Adobe's programs write it.
    Cmyk,
}

impl Color {
    /// How the library writes these colours: bytes of a pixel, and its name for them.
    fn format(self, is_padded: bool) -> (usize, c_int) {
        match self {
            Self::Gray => (1, raw::TJPF_TJPF_GRAY),
            Self::Rgb if is_padded => (PADDED, raw::TJPF_TJPF_RGBX),
            Self::Rgb => (3, raw::TJPF_TJPF_RGB),
            Self::Cmyk => (4, raw::TJPF_TJPF_CMYK),
        }
    }
}

/// A part of an image, in pixels of the (possibly reduced) image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) x: usize,
    pub(super) y: usize,
    pub(super) width: usize,
    pub(super) height: usize,
}

/// A decompressor for one file. Another file needs a new one: tables stay in it, and would stand in
/// for those that a damaged file lacks; after an error, so do pieces of the file.
#[derive(Debug)]
pub(super) struct Jpeg {
    handle: raw::tjhandle,
}

// SAFETY: a tjhandle has no thread of its own and no thread-local state; libjpeg-turbo allows any
// one thread at a time to use it, which `&mut self` ensures.
#[allow(unsafe_code, reason = "a C handle that may move between threads")]
unsafe impl Send for Jpeg {}

impl Jpeg {
    /// # Errors
    /// No memory.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn new() -> Result<Self, DecodeError> {
        let kind = c_int::try_from(raw::TJINIT_TJINIT_DECOMPRESS).expect("a small constant");
        // SAFETY: no precondition; null means failure and is checked.
        let handle = unsafe { raw::tj3Init(kind) };
        if handle.is_null() {
            return Err(DecodeError::damaged("libjpeg-turbo cannot start: no memory"));
        }
        let jpeg = Self { handle };
        jpeg.set(raw::TJPARAM_TJPARAM_SCANLIMIT, SCANS_MAX);
        Ok(jpeg)
    }

    /// Reads the header of a file.
    ///
    /// # Errors
    /// It is no JPEG file, or of a kind that is not read.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn open<'a>(&'a mut self, bytes: &'a [u8]) -> Result<OpenJpeg<'a>, DecodeError> {
        if !has_end(bytes) {
            return Err(DecodeError::damaged("no end-of-image marker: the file is cut off"));
        }
        // SAFETY: the handle is alive (it is destroyed in Drop alone), pointer and length are those
        // of a live slice, which C only reads, and during this call alone.
        let code = unsafe {
            raw::tj3DecompressHeader(self.handle, bytes.as_ptr(), bytes.len() as raw::size_t)
        };
        if code != 0 && !self.is_warning() {
            return Err(DecodeError::damaged(self.message()));
        }
        let size = |param| {
            let side = usize::try_from(self.get(param)).ok().filter(|side| *side > 0);
            side.ok_or_else(|| DecodeError::damaged("a header without a size"))
        };
        let (width, height) =
            (size(raw::TJPARAM_TJPARAM_JPEGWIDTH)?, size(raw::TJPARAM_TJPARAM_JPEGHEIGHT)?);
        if self.get(raw::TJPARAM_TJPARAM_PRECISION) != 8 {
            return Err(DecodeError::damaged("a JPEG of more than 8 bits a channel"));
        }
        let color = match u32::try_from(self.get(raw::TJPARAM_TJPARAM_COLORSPACE)) {
            Ok(raw::TJCS_TJCS_GRAY) => Color::Gray,
            Ok(raw::TJCS_TJCS_RGB | raw::TJCS_TJCS_YCbCr) => Color::Rgb,
            Ok(raw::TJCS_TJCS_CMYK | raw::TJCS_TJCS_YCCK) => Color::Cmyk,
            _ => return Err(DecodeError::damaged("a JPEG of an unknown colour space")),
        };
        let is_lossless = self.get(raw::TJPARAM_TJPARAM_LOSSLESS) != 0;
        let mcu = match self.get(raw::TJPARAM_TJPARAM_SUBSAMP) {
            _ if is_lossless => None,
            raw::TJSAMP_TJSAMP_444 | raw::TJSAMP_TJSAMP_GRAY => Some((8, 8)),
            raw::TJSAMP_TJSAMP_422 => Some((16, 8)),
            raw::TJSAMP_TJSAMP_420 => Some((16, 16)),
            raw::TJSAMP_TJSAMP_440 => Some((8, 16)),
            _ => None,
        };
        Ok(OpenJpeg { jpeg: self, bytes, width, height, color, mcu, is_lossless })
    }

    /// Whether the last call's failure was warnings alone: there is an image all the same. The
    /// library's own answer stays "warning" when an error follows one, but its message is the
    /// error's then.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    fn is_warning(&self) -> bool {
        // SAFETY: a live handle.
        let severity = unsafe { raw::tj3GetErrorCode(self.handle) };
        let message = self.message();
        u32::try_from(severity) == Ok(raw::TJERR_TJERR_WARNING)
            && WARNINGS.iter().any(|warning| message.starts_with(warning))
    }

    /// What the last call complained of.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    fn message(&self) -> String {
        // SAFETY: a live handle; C gives a pointer to a string that it ends with a zero, in memory
        // of the handle, valid until the next call; it is copied at once.
        let text = unsafe { CStr::from_ptr(raw::tj3GetErrorStr(self.handle)) };
        let text = text.to_string_lossy();
        // Some begin with the C function's name.
        let text = text.split_once("(): ").map_or(&*text, |(_, rest)| rest);
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[allow(unsafe_code, reason = "see the module's Justification")]
    fn set(&self, param: raw::TJPARAM, value: c_int) {
        let param = c_int::try_from(param).expect("a small constant");
        // SAFETY: a live handle and plain values.
        let code = unsafe { raw::tj3Set(self.handle, param, value) };
        assert_eq!(code, 0, "libjpeg-turbo knows its own parameters");
    }

    #[allow(unsafe_code, reason = "see the module's Justification")]
    fn get(&self, param: raw::TJPARAM) -> c_int {
        let param = c_int::try_from(param).expect("a small constant");
        // SAFETY: a live handle and a plain value.
        unsafe { raw::tj3Get(self.handle, param) }
    }
}

/// Whether the file has an end-of-image marker: in compressed data no other byte pair looks so, but
/// a thumbnail in the headers may have one of its own.
fn has_end(bytes: &[u8]) -> bool {
    const END: [u8; 2] = [0xFF, 0xD9];

    if bytes.ends_with(&END) {
        return true;
    }
    let scan = exif::scan_start(bytes).and_then(|start| bytes.get(start..));
    scan.is_some_and(|scan| scan.windows(2).any(|pair| pair == END))
}

/// Whether the end-of-image marker is met by who goes from segment to segment: damage can make one
/// of them swallow it.
fn reaches_end(bytes: &[u8]) -> bool {
    const START: u8 = 0xD8;
    const END: u8 = 0xD9;

    let Some(mut at) = exif::scan_start(bytes) else { return false };
    while let Some(&[first, marker]) = bytes.get(at..at + 2) {
        let is_marker = first == 0xFF && !matches!(marker, 0 | 1 | 0xD0..=0xD7 | START | 0xFF);
        at += match bytes.get(at + 2..at + 4) {
            _ if !is_marker => 1,
            _ if marker == END => return true,
            Some(&[high, low]) => 2 + usize::from(u16::from_be_bytes([high, low])),
            _ => return false,
        };
    }
    false
}

/// A file whose header was read.
#[derive(Debug)]
pub(super) struct OpenJpeg<'a> {
    jpeg: &'a mut Jpeg,
    bytes: &'a [u8],
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) color: Color,
    /// Size of the blocks that can be decoded alone, in pixels; `None` where parts are not: unusual
    /// samplings, and lossless files.
    mcu: Option<(usize, usize)>,
    is_lossless: bool,
}

impl OpenJpeg<'_> {
    /// Whether the inverse DCT can give a smaller image.
    pub(super) fn is_reducible(&self) -> bool {
        !self.is_lossless
    }

    /// Decodes at least `wanted`, a part of the image reduced to 1/`reduce` (1, 2, 4 or 8; sides
    /// are rounded up), into `out`: RGB as [`PADDED`] pixels if `is_padded`. Gives the part that it
    /// is, and the bytes of a pixel.
    ///
    /// # Errors
    /// The file is damaged or cut off.
    ///
    /// # Panics
    /// `wanted` is not in the reduced image.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn decode_part(
        &mut self,
        wanted: Part,
        reduce: usize,
        is_padded: bool,
        out: &mut Vec<u8>,
    ) -> Result<(Part, usize), DecodeError> {
        let part = self.decodable(wanted, reduce);
        let (pixel_bytes, pixel_format) = self.color.format(is_padded);
        let handle = self.jpeg.handle;
        let int = |value: usize| c_int::try_from(value).expect("image sides fit C's int");
        let scale = raw::tjscalingfactor { num: 1, denom: int(reduce) };
        let none = raw::tjregion { x: 0, y: 0, w: 0, h: 0 };
        let (w, h) = (int(part.width), int(part.height));
        // Without a region C decodes the whole image, of samplings, too, that it has no name for.
        let region =
            self.mcu.map_or(none, |_| raw::tjregion { x: int(part.x), y: int(part.y), w, h });
        // The last image's region must not be checked against this one's scale.
        // SAFETY: plain values to a live handle; C checks the region against the header that was
        // read last, which is that of `bytes`: self alone can use the handle as long as it lives.
        let is_set = unsafe {
            raw::tj3SetCroppingRegion(handle, none) == 0
                && raw::tj3SetScalingFactor(handle, scale) == 0
                && raw::tj3SetCroppingRegion(handle, region) == 0
        };
        if !is_set {
            return Err(DecodeError::damaged(self.jpeg.message()));
        }
        let pitch = part.width * pixel_bytes;
        out.resize(pitch * part.height, 0);
        // SAFETY: the handle is alive; `bytes` is a live slice that C only reads. C writes
        // `part.height` rows of `part.width` pixels, each `pitch` bytes after the one before:
        // exactly `out`'s length. So the region says, which C has checked; without one the part is
        // the whole image (`decodable`), at the size that the header gave, or that divided by the
        // scale and rounded up, as C does. It parses the same, unchanged bytes as `open` did.
        let code = unsafe {
            raw::tj3Decompress8(
                handle,
                self.bytes.as_ptr(),
                self.bytes.len() as raw::size_t,
                out.as_mut_ptr(),
                int(pitch),
                pixel_format,
            )
        };
        if code == 0 {
            return Ok((part, pixel_bytes));
        }
        if self.jpeg.is_warning() {
            // Pillow goes on, too, unless it needs more data than there is: all scans of a
            // progressive file come before the first row.
            let is_progressive = self.jpeg.get(raw::TJPARAM_TJPARAM_PROGRESSIVE) != 0;
            if !is_progressive || reaches_end(self.bytes) {
                return Ok((part, pixel_bytes));
            }
            return Err(DecodeError::damaged("a segment is longer than the file: it is cut off"));
        }
        Err(DecodeError::damaged(self.jpeg.message()))
    }

    /// The smallest part that can be decoded alone and holds `wanted` exactly: from a whole block
    /// on, and one block more at each inner edge, where upsampling looks at neighbours.
    fn decodable(&self, wanted: Part, reduce: usize) -> Part {
        let span = |start: usize, len: usize, mcu: Option<usize>, side: usize| {
            assert!(start + len <= side, "the part is in the image");
            let Some(block) = mcu.map(|mcu| mcu / reduce) else { return (0, side) };
            let first = (start / block).saturating_sub(1) * block;
            let end = (((start + len).div_ceil(block) + 1) * block).min(side);
            (first, end - first)
        };
        let (width, height) = (self.width.div_ceil(reduce), self.height.div_ceil(reduce));
        let (mcu_width, mcu_height) = self.mcu.unzip();
        let (x, part_width) = span(wanted.x, wanted.width, mcu_width, width);
        let (y, part_height) = span(wanted.y, wanted.height, mcu_height, height);
        Part { x, y, width: part_width, height: part_height }
    }
}

impl Drop for Jpeg {
    #[allow(unsafe_code, reason = "see the module's Justification")]
    fn drop(&mut self) {
        // SAFETY: made by tj3Init, destroyed once.
        unsafe { raw::tj3Destroy(self.handle) };
    }
}
