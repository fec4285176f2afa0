//! Which vector instructions the kernels use, and how a kernel is compiled for each.
//!
//! Owns the choice, made once per process from what the processor has. A kernel is written once, in
//! plain Rust, and compiled three times by `for_levels`: Rust's arithmetic does not depend on the
//! instructions that carry it out, so all three give the same bytes; the tests compare them.

use std::sync::atomic::{AtomicU8, Ordering};

/// A set of instructions. Later ones have all of the earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// What every processor of the architecture has.
    Scalar = 1,
    /// x86-64 with AVX2 and FMA: 32 bytes at a time (Intel since 2013, AMD since 2015).
    Avx2 = 2,
    /// With AVX-512 up to VBMI: 64 bytes at a time, and tables of 128 bytes in registers (Intel
    /// since 2019, AMD since 2022).
    Avx512 = 3,
}

/// 0: not yet known.
static LEVEL: AtomicU8 = AtomicU8::new(0);

/// The level that kernels use.
#[inline]
pub fn level() -> Level {
    match LEVEL.load(Ordering::Relaxed) {
        3 => Level::Avx512,
        2 => Level::Avx2,
        1 => Level::Scalar,
        _ => limit(Level::Avx512),
    }
}

/// Keeps kernels from using more than `most`, in the whole process: for tests and benchmarks. Gives
/// the level that they use from now on.
pub fn limit(most: Level) -> Level {
    let level = detect().min(most);
    LEVEL.store(level as u8, Ordering::Relaxed);
    level
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let has_avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vbmi");
    match (has_avx2, has_avx512) {
        (true, true) => Level::Avx512,
        (true, false) => Level::Avx2,
        _ => Level::Scalar,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Scalar
}

/// A number cut to a whole one and clipped to a byte, as `value as u8` does; in a form that
/// compilers turn into vector instructions.
#[inline(always)]
#[allow(unsafe_code, reason = "the plain cast's checks keep it from being vectorised")]
#[allow(clippy::manual_clamp, reason = "`clamp` keeps NaN, which must not be cut")]
#[allow(clippy::inline_always, reason = "the body must take its caller's instructions")]
pub(super) fn byte_of_f32(value: f32) -> u8 {
    // `max` gives the other number for NaN, so the result lies in the range in any case.
    let clipped = value.max(0.0).min(255.0);
    // SAFETY: finite and within i32's range.
    let whole: i32 = unsafe { clipped.to_int_unchecked() };
    whole.to_le_bytes()[0]
}

/// As [`byte_of_f32`].
#[inline(always)]
#[allow(unsafe_code, reason = "the plain cast's checks keep it from being vectorised")]
#[allow(clippy::manual_clamp, reason = "`clamp` keeps NaN, which must not be cut")]
#[allow(clippy::inline_always, reason = "the body must take its caller's instructions")]
pub(super) fn byte_of_f64(value: f64) -> u8 {
    let clipped = value.max(0.0).min(255.0);
    // SAFETY: finite and within i32's range.
    let whole: i32 = unsafe { clipped.to_int_unchecked() };
    whole.to_le_bytes()[0]
}

/// Compiles a function for each [`Level`], and calls the one of the level in use.
macro_rules! for_levels {
    (
        $(#[$meta:meta])*
        $visibility:vis fn $name:ident($($arg:ident: $kind:ty),* $(,)?) $(-> $result:ty)?
            $body:block
    ) => {
        $(#[$meta])*
        #[allow(unsafe_code, reason = "calls what is compiled for the instructions found")]
        #[allow(clippy::inline_always, reason = "the body must take its caller's instructions")]
        #[allow(clippy::too_many_arguments, reason = "the body's own business")]
        $visibility fn $name($($arg: $kind),*) $(-> $result)? {
            #[inline(always)]
            fn scalar($($arg: $kind),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $kind),*) $(-> $result)? {
                    scalar($($arg),*)
                }

                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
                #[target_feature(enable = "avx2,fma")]
                fn avx512($($arg: $kind),*) $(-> $result)? {
                    scalar($($arg),*)
                }

                match $crate::image::simd::level() {
                    // SAFETY: this level is in use only if the processor has its instructions.
                    $crate::image::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::image::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::image::simd::Level::Scalar => {}
                }
            }
            scalar($($arg),*)
        }
    };
}

pub(crate) use for_levels;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::cast_possible_truncation, reason = "what the plain cast gives is asked")]
    fn numbers_are_cut_as_by_the_plain_cast() {
        let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, 1e300, -1e300, 255.99999];
        let values = (-3000..30_000).map(|n| f64::from(n) / 100.0).chain(odd);
        for value in values {
            assert_eq!(byte_of_f64(value), value as u8, "{value}");
            assert_eq!(byte_of_f32(value as f32), value as f32 as u8, "{value}");
        }
    }
}
