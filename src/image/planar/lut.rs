//! Tables of bytes applied to planes, and what tables are made from: histograms and extremes.
//!
//! With AVX-512 a whole table lies in four registers; with AVX2 it is looked up in sixteen parts.

use super::super::point::Lut;
use super::super::simd::{Level, for_levels, level};

/// Applies a table to bytes, in place.
pub fn apply(bytes: &mut [u8], lut: &Lut) {
    #[cfg(target_arch = "x86_64")]
    match level() {
        Level::Avx512 => {
            let (chunks, rest) = bytes.as_chunks_mut::<64>();
            avx512::apply(chunks, lut);
            return scalar(rest, lut);
        }
        Level::Avx2 => {
            let (chunks, rest) = bytes.as_chunks_mut::<32>();
            avx2::apply(chunks, lut);
            return scalar(rest, lut);
        }
        Level::Scalar => {}
    }
    scalar(bytes, lut);
}

fn scalar(bytes: &mut [u8], lut: &Lut) {
    for byte in bytes {
        *byte = lut[usize::from(*byte)];
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "vector loads and stores; calls what the processor has")]
mod avx512 {
    use std::arch::x86_64::{
        _mm512_loadu_si512, _mm512_mask_blend_epi8, _mm512_movepi8_mask, _mm512_permutex2var_epi8,
        _mm512_storeu_si512,
    };

    use super::Lut;

    pub(super) fn apply(chunks: &mut [[u8; 64]], lut: &Lut) {
        // SAFETY: called at this level alone, which is in use only if the processor has it.
        unsafe { look_up(chunks, lut) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn look_up(chunks: &mut [[u8; 64]], lut: &Lut) {
        let quarters = lut.as_chunks::<64>().0;
        // SAFETY: each pointer is that of 64 bytes; no alignment is asked for.
        let quarter = |n: usize| unsafe { _mm512_loadu_si512(quarters[n].as_ptr().cast()) };
        let [a, b, c, d] = [quarter(0), quarter(1), quarter(2), quarter(3)];
        for chunk in chunks {
            // SAFETY: as above.
            let bytes = unsafe { _mm512_loadu_si512(chunk.as_ptr().cast()) };
            // The lower seven bits choose within half a table, the highest chooses the half.
            let low = _mm512_permutex2var_epi8(a, bytes, b);
            let high = _mm512_permutex2var_epi8(c, bytes, d);
            let found = _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), low, high);
            // SAFETY: as above, and the bytes are ours to write.
            unsafe { _mm512_storeu_si512(chunk.as_mut_ptr().cast(), found) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "vector loads and stores; calls what the processor has")]
mod avx2 {
    use std::arch::x86_64::{
        _mm_loadu_si128, _mm256_adds_epu8, _mm256_broadcastsi128_si256, _mm256_loadu_si256,
        _mm256_or_si256, _mm256_set1_epi8, _mm256_setzero_si256, _mm256_shuffle_epi8,
        _mm256_storeu_si256, _mm256_xor_si256,
    };

    use super::Lut;

    pub(super) fn apply(chunks: &mut [[u8; 32]], lut: &Lut) {
        // SAFETY: called at this level alone, which is in use only if the processor has it.
        unsafe { look_up(chunks, lut) }
    }

    #[target_feature(enable = "avx2")]
    fn look_up(chunks: &mut [[u8; 32]], lut: &Lut) {
        let parts: &[[u8; 16]; 16] = lut.as_chunks().0.try_into().expect("256 bytes");
        // SAFETY: each pointer is that of 16 bytes; no alignment is asked for.
        let part = |part: &[u8; 16]| unsafe { _mm_loadu_si128(part.as_ptr().cast()) };
        let beyond = _mm256_set1_epi8(0x70);
        for chunk in chunks {
            // SAFETY: as above, of 32 bytes.
            let bytes = unsafe { _mm256_loadu_si256(chunk.as_ptr().cast()) };
            let mut found = _mm256_setzero_si256();
            let mut first = 0_i8;
            for table in parts {
                // 0 to 15 where the byte is one of this part's, else 16 or more: after the sum the
                // highest bit is set there, and the look-up gives 0.
                let within = _mm256_xor_si256(bytes, _mm256_set1_epi8(first));
                let index = _mm256_adds_epu8(within, beyond);
                let table = _mm256_broadcastsi128_si256(part(table));
                found = _mm256_or_si256(found, _mm256_shuffle_epi8(table, index));
                first = first.wrapping_add(16);
            }
            // SAFETY: as above, and the bytes are ours to write.
            unsafe { _mm256_storeu_si256(chunk.as_mut_ptr().cast(), found) };
        }
    }
}

/// Tables that are counted in turn, so that equal neighbours don't wait for each other.
const N_COUNTERS: usize = 4;

for_levels! {
    /// How often each value occurs.
    pub fn histogram(plane: &[u8], bins: &mut [u32; 256]) {
        let mut counters = [[0_u32; 256]; N_COUNTERS];
        let (groups, rest) = plane.as_chunks::<N_COUNTERS>();
        for group in groups {
            for (counter, &byte) in counters.iter_mut().zip(group) {
                counter[usize::from(byte)] += 1;
            }
        }
        for &byte in rest {
            counters[0][usize::from(byte)] += 1;
        }
        let [a, b, c, d] = &counters;
        for (value, n) in bins.iter_mut().enumerate() {
            *n = a[value] + b[value] + c[value] + d[value];
        }
    }
}

/// The histogram of what a table makes of values with this histogram.
pub fn push_forward(bins: &mut [u32; 256], lut: &Lut) {
    let before = std::mem::replace(bins, [0; 256]);
    for (n, &becomes) in before.iter().zip(lut) {
        bins[usize::from(becomes)] += n;
    }
}

for_levels! {
    /// The smallest and the largest value; 255 and 0 of no bytes.
    pub fn extremes(plane: &[u8]) -> (u8, u8) {
        let low = plane.iter().fold(u8::MAX, |low, &byte| low.min(byte));
        let high = plane.iter().fold(0, |high: u8, &byte| high.max(byte));
        (low, high)
    }
}
