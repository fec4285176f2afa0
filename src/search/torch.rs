//! The one place that calls libtorch so far: it asks it what it is.

/// The libtorch that tch 0.24 demands; its build script refuses any other.
const LIBTORCH_VERSION: &str = "2.11.0";

/// Version and threads of the libtorch that this process has loaded.
pub(super) fn describe() -> String {
    let n_threads = tch::get_num_threads();
    let unit = if n_threads == 1 { "thread" } else { "threads" };
    let cuda = if tch::Cuda::is_available() { "CUDA" } else { "CPU only" };
    format!("libtorch {LIBTORCH_VERSION}, {cuda}, {n_threads} {unit}")
}
