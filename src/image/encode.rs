//! JPEG files from pixels, by libjpeg-turbo.
//!
//! *Justification* of `unsafe`: as in `decode::jpeg`, whose crate this uses.

use std::ffi::{CStr, c_int, c_void};

use turbojpeg_sys as raw;

use super::Image;

/// Encodes an image of 1 or 3 channels at a quality of 1 to 100, colours at half the resolution
/// (4:2:0), as most programs do.
///
/// # Errors
/// In words, from libjpeg-turbo: no memory.
///
/// # Panics
/// The quality is out of range, or the image has no pixels.
#[allow(unsafe_code, reason = "see the module's Justification")]
pub fn jpeg(image: &Image, quality: u8) -> Result<Vec<u8>, String> {
    assert!((1..=100).contains(&quality), "a quality of 1 to 100");
    let Image { width, height, channels, data } = image;
    assert_eq!(data.len(), width * height * channels, "as many bytes as the shape says");
    let int = |value: usize| c_int::try_from(value).expect("image sides fit C's int");
    let param = |param: raw::TJPARAM| c_int::try_from(param).expect("a small constant");
    let kind = c_int::try_from(raw::TJINIT_TJINIT_COMPRESS).expect("a small constant");
    let (format, sampling) = match channels {
        1 => (raw::TJPF_TJPF_GRAY, raw::TJSAMP_TJSAMP_GRAY),
        _ => (raw::TJPF_TJPF_RGB, raw::TJSAMP_TJSAMP_420),
    };
    // SAFETY: no precondition; null means failure and is checked.
    let handle = unsafe { raw::tj3Init(kind) };
    if handle.is_null() {
        return Err("libjpeg-turbo cannot start: no memory".to_owned());
    }
    let (mut buffer, mut n_bytes) = (std::ptr::null_mut::<u8>(), 0);
    // SAFETY: a live handle and plain values; C reads `height` rows of `width` pixels from `data`,
    // which has exactly these bytes, and allocates `buffer` itself, since it is null.
    let code = unsafe {
        raw::tj3Set(handle, param(raw::TJPARAM_TJPARAM_QUALITY), c_int::from(quality))
            | raw::tj3Set(handle, param(raw::TJPARAM_TJPARAM_SUBSAMP), sampling)
            | raw::tj3Compress8(
                handle,
                data.as_ptr(),
                int(*width),
                int(width * channels),
                int(*height),
                format,
                &raw mut buffer,
                &raw mut n_bytes,
            )
    };
    let result = if code == 0 {
        let n_bytes = usize::try_from(n_bytes).expect("a size in memory");
        // SAFETY: C says that `buffer` holds so many bytes; they are copied before it is freed.
        Ok(unsafe { std::slice::from_raw_parts(buffer, n_bytes) }.to_vec())
    } else {
        // SAFETY: a live handle; the string is the handle's, and copied at once.
        let text = unsafe { CStr::from_ptr(raw::tj3GetErrorStr(handle)) };
        Err(text.to_string_lossy().into_owned())
    };
    // SAFETY: `buffer` is null or was allocated by C; the handle is destroyed once.
    unsafe {
        raw::tj3Free(buffer.cast::<c_void>());
        raw::tj3Destroy(handle);
    }
    result
}
