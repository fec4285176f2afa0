//! libtorch's CUDA part, which nothing links: the same binary runs on hosts that have none.

use std::sync::OnceLock;

use tch::Cuda;

/// Found through the executable's RUNPATH, beside the libtorch that it links.
pub const CUDA_LIBRARY: &str = "libtorch_cuda.so";

/// Loads the CUDA part once; it stays for the life of the process.
///
/// # Errors
/// libtorch has none, or its libraries are not whole.
pub fn load_cuda() -> Result<(), String> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    LOADED.get_or_init(open_cuda).clone()
}

fn open_cuda() -> Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: the library's initialisers register CUDA's kernels with the libtorch that this
    // process links and came with; the two are pinned to one version.
    #[allow(unsafe_code, reason = "CUDA's part of libtorch must not be linked")]
    let opened = unsafe { Library::open(Some(CUDA_LIBRARY), RTLD_NOW | RTLD_GLOBAL) };
    let library = opened.map_err(|error| error.to_string())?;
    compute_the_same_twice()?;
    // Kernels are called until the process ends.
    std::mem::forget(library);
    Ok(())
}

/// `at::globalContext()`.
type GlobalContext = unsafe extern "C" fn() -> *mut std::ffi::c_void;
/// `at::Context::setDeterministicCuDNN(bool)`.
type SetDeterministic = unsafe extern "C" fn(*mut std::ffi::c_void, bool);

/// Has cuDNN choose algorithms without races, always by the same rule. tch has no call for the
/// first.
fn compute_the_same_twice() -> Result<(), String> {
    use libloading::os::unix::{Library, Symbol};
    Cuda::cudnn_set_benchmark(false);
    let this = Library::this();
    // SAFETY: both are exported by the very libtorch that tch demands, with these signatures in the
    // Itanium C++ ABI: a reference and `this` are pointers. The context lives as long as the
    // process.
    #[allow(unsafe_code, reason = "two functions of libtorch that tch does not wrap")]
    unsafe {
        let context: Symbol<GlobalContext> =
            this.get(b"_ZN2at13globalContextEv\0").map_err(|error| error.to_string())?;
        let set: Symbol<SetDeterministic> = this
            .get(b"_ZN2at7Context21setDeterministicCuDNNEb\0")
            .map_err(|error| error.to_string())?;
        set(context(), true);
    }
    Ok(())
}
