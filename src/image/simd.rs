//! Which vector instructions the kernels use, and how a kernel is compiled for each.
//!
//! Owns the choice, made once per process from what the processor has. A kernel is written once, in
//! plain Rust, and compiled three times by [`for_levels`]: Rust's arithmetic does not depend on the
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

/// Compiles a function for each [`Level`], and calls the one of the level in use.
macro_rules! for_levels {
    (
        $(#[$meta:meta])*
        $visibility:vis fn $name:ident($($arg:ident: $kind:ty),* $(,)?) $(-> $result:ty)? $body:block
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

                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma")]
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
